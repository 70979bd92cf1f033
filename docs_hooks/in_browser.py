"""Looks at every page of the built site in a browser, wide and narrow, and keeps a picture of each.

    python -m docs_hooks.in_browser
    python -m docs_hooks.in_browser --page tutorial self_driving --output site-pictures

It fails where a page slides sideways or writes an error to the console. It needs Chromium and its
driver (Debian: `apt-get install chromium chromium-driver`) and `pip install ".[docs-check]"`.
"""

import argparse
import base64
import functools
import http.server
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = (1400, 390)
"""Of the window, in CSS pixels: a desk and a phone."""

TALLEST = 4_000
"""Where a picture ends by default, in CSS pixels; the check reads all of the page."""

# What is wider than the page and not inside a box of its own that scrolls.
_TOO_WIDE = """
const width = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth <= width) return [];
const boxed = (node) => {
  for (let at = node.parentElement; at && at !== document.body; at = at.parentElement)
    if (getComputedStyle(at).overflowX !== "visible") return true;
  return false;
};
return [...document.querySelectorAll("article *")]
  .filter((node) => node.getBoundingClientRect().right > width + 1 && !boxed(node))
  .slice(0, 5)
  .map((node) => `<${node.localName} class="${node.className}"> ${node.textContent.slice(0, 60)}`)
  .concat([`the page is ${document.documentElement.scrollWidth} wide`]);
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the check with the command line `argv`, by default the process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m docs_hooks.in_browser",
        description="Takes a picture of every page at two widths; fails on sideways scroll and "
        "console errors.",
    )
    parser.add_argument(
        "--site", type=Path, default=Path("site"), help="the built pages (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("site-pictures"),
        help="where the pictures go (default: %(default)s)",
    )
    parser.add_argument(
        "--tallest",
        type=int,
        default=TALLEST,
        help="where a picture ends, in CSS pixels (default: %(default)s)",
    )
    parser.add_argument("--page", nargs="+", help="names of pages (default: all)")
    options = parser.parse_args(argv)
    pages = addresses(options.site)
    if not pages:
        parser.error(f"--site must hold built pages, got {options.site}; run make docs.")
    wanted = options.page or list(pages)
    if unknown := set(wanted) - set(pages):
        parser.error(f"--page must be of {', '.join(pages)}, got {', '.join(sorted(unknown))}.")
    options.output.mkdir(parents=True, exist_ok=True)
    complaints = 0
    with served(options.site) as root, browser() as driver:
        for name in wanted:
            for width in WIDTHS:
                picture = options.output / f"{name.replace('/', '-')}-{width}.png"
                for complaint in look(
                    driver, f"{root}/{pages[name]}", width, picture, tallest=options.tallest
                ):
                    complaints += 1
                    print(f"{name} at {width}: {complaint}", flush=True)
    print(f"{len(wanted)} pages at {len(WIDTHS)} widths; pictures are in {options.output}/")
    sys.exit(f"{complaints} complaints" if complaints else None)


def addresses(site: Path) -> dict[str, str]:
    """The address of every page inside `site`, by its name."""
    found = {}
    for path in sorted(site.rglob("index.html")):
        folder = path.parent.relative_to(site)
        found["home" if folder == Path() else folder.as_posix()] = path.relative_to(site).as_posix()
    return found


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serves `site` on this machine while inside, and gives its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if Path("/usr/bin/chromium").exists():
        options.binary_location = "/usr/bin/chromium"
        service = Service("/usr/bin/chromedriver")
    else:
        service = Service()
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def look(driver: Any, address: str, width: int, picture: Path, *, tallest: int) -> list[str]:
    """Opens a page, keeps its picture as far as `tallest`, and says what is wrong with it."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(address)
    found = [f"slides sideways: {what}" for what in driver.execute_script(_TOO_WIDE)]
    height = driver.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, tallest), "scale": 1}
    shot = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    data = driver.execute_cdp_cmd("Page.captureScreenshot", shot)["data"]
    picture.write_bytes(base64.b64decode(data))
    found += [
        f"console: {entry['message']}"
        for entry in driver.get_log("browser")
        if entry["level"] == "SEVERE"
    ]
    return found


if __name__ == "__main__":
    main()
