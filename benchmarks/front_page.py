"""Draws the picture of the README from the stored figures: what a rate does to each optimizer.

    python -m benchmarks front-page

AdamW ends where its rate lets it, self-driving in one place from any start.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

FIGURES = Path("docs/evidence/rate-sensitivity-shakespeare-small.json")
PICTURE = Path("docs/images/front-page.png")

# Name in the figures, what the picture calls it, colour, marker: Okabe and Ito (2008).
CURVES = (
    ("adamw", "AdamW, constant rate", "#000000", "s"),
    ("adamw-cosine", "AdamW, warm-up and cosine", "#0072B2", "^"),
    ("self_driving", "self-driving, from seven starts", "#D55E00", "o"),
    ("self_driving-muon", "self-driving Muon, from three starts", "#009E73", "D"),
)


def main(argv: Sequence[str]) -> None:
    """Draws the picture.

    Args:
        argv: the arguments, without the name of the command.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks front-page", description="Draws the picture of the README."
    )
    parser.add_argument(
        "--input", type=Path, default=FIGURES, help="the figures (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=PICTURE, help="the picture (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if not options.input.is_file():
        parser.error(
            f"--input must be figures of rate-sensitivity, got {options.input}, which is no file; "
            "run python -m benchmarks rate-sensitivity."
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(json.loads(options.input.read_text()))
    figure.savefig(options.output, dpi=160, facecolor="white")
    print(options.output)


def draw(result: dict[str, Any]) -> Figure:
    """The held-out loss over the rate, large enough in print for a phone.

    Args:
        result: what `rate-sensitivity` wrote, with every name of `CURVES`.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name, text, color, marker in CURVES:
        row = result["optimizers"][name]
        axes.errorbar(
            result["grid"][name],
            row["losses"],
            yerr=[error or 0.0 for error in row["errors"]],
            color=color,
            marker=marker,
            markersize=7,
            linewidth=2.5,
            capsize=3,
            label=text,
        )
    work = result["workload"]
    axes.set_xscale("log")
    axes.set_xlabel("the learning rate that you give", fontsize=14)
    axes.set_ylabel("held-out loss", fontsize=14)
    axes.set_title(
        f"Small GPT on Shakespeare, {work['steps']:,} steps", loc="left", fontsize=15, weight="bold"
    )
    axes.tick_params(labelsize=12)
    axes.legend(frameon=False, fontsize=13, loc="upper left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
