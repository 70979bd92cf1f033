"""`python -m cruxy_exact verify`: the reference model, trained here and compared to the bit."""

import argparse
import json
import sys

from cruxy_exact import verify as check
from cruxy_exact.engines import ENGINES, Precision
from cruxy_exact.reference import Reference


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 1 where bits differ.

    Raises:
        SystemExit: with 2, where the options do not go together or what they name is not there.
    """
    parser = argparse.ArgumentParser(prog="python -m cruxy_exact", description=__doc__)
    parser.add_argument("command", choices=("verify", "publish"))
    parser.add_argument("--framework", choices=("numpy", "torch", "jax"), default="numpy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engine", choices=ENGINES, default="f64")
    parser.add_argument("--bits", type=int, default=20)
    parser.add_argument("--grain", type=int, help="sequences in a grain; without it no grains")
    parser.add_argument("--optimizer", choices=("adamw", "self-driving"), default="adamw")
    parser.add_argument("--plain-kernels", action="store_true", help="no C kernels in PyTorch")
    parser.add_argument("--replace", action="store_true", help="publish other bits than before")
    parser.add_argument("--bench", action="store_true", help="print the slowdown as well")
    options = parser.parse_args(arguments)
    if options.replace and options.command != "publish":
        parser.error("--replace must go with publish; verify writes nothing.")
    if options.bench and (options.command != "verify" or options.framework not in check.SIDES):
        parser.error("--bench must go with verify and --framework torch or jax.")
    if options.grain is not None and options.grain < 1:
        parser.error(
            f"--grain must be at least 1, got {options.grain}; leave it out for no grains."
        )
    driver = check.self_driving() if options.optimizer == "self-driving" else None
    try:
        where = check.framework(options.framework, options.device, native=not options.plain_kernels)
        precision = Precision(options.bits, options.engine)
        reference = Reference(grain=options.grain, precision=precision, driver=driver)
        publishes = options.command == "publish"
        expected = None if publishes else check.published_of(reference)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    if publishes:
        return _publish(where, reference, options.replace)
    print(", ".join(x for x in check.describe(where, reference).values() if x))
    found, problem = check.verify(where, reference, expected=expected)
    print(f"checksum {found}: {problem or 'as published'}")
    if options.bench:
        exact, plain = check.slowdown(where, reference)
        print(f"step {1e3 * exact:.1f} ms, plain {1e3 * plain:.1f} ms: {exact / plain:.1f} times")
    return 1 if problem else 0


def _publish(where: check.Framework, reference: Reference, replace: bool) -> int:
    """Writes the table of a reference into the file of published ones, and what it was seen on."""
    path = check.PUBLISHED
    rows = json.loads(path.read_text("utf-8")) if path.exists() else {}
    old = rows.get(check.key(reference), {})
    found, _ = check.verify(where, reference)
    new = {**old, "checksum": found}
    if found != old.get("checksum"):
        new = check.table(where, reference)
        if reference.grain is not None:
            del new["operations"], new["steps"]  # a grain at a time, too long to keep
    known = old.get("checksum", new["checksum"]) == new["checksum"]
    if not known and not replace:
        print(f"{new['checksum']} is not {old['checksum']}, which is published; verify says where")
        return 1
    seen, here = old.get("seen", []) if known else [], check.describe(where, reference)
    seen = sorted([*(row for row in seen if row != here), here], key=lambda row: [*row.values()])
    rows[check.key(reference)] = {**new, "seen": seen}
    path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print(f"{check.key(reference)}: {new['checksum']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
