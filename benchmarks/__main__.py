"""`python -m benchmarks NAME`: every claim of the README as a command that measures it again."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from benchmarks._protocol import Protocol, run

MODULES = {
    "paper-table": "paper_table",
    "rate-sensitivity": "rate_sensitivity",
    "tuned-baselines": "tuned_baselines",
    "anytime": "anytime",
    "stability-stress": "stability_stress",
    "defaults": "defaults",
    "finetuning": "finetuning",
    "alignment": "alignment",
    "ablation": "ablation",
    "step-time": "step_time",
    "memory": "memory",
    "resume": "resume",
}


def protocol(name: str) -> Protocol:
    """The benchmark of that name; what it needs is imported only now."""
    return importlib.import_module(f"benchmarks.{MODULES[name]}").PROTOCOL


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line `argv`, by default the process's own, names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures the project's claims. Each name has a --help of its own.",
    )
    parser.add_argument("name", choices=[*MODULES, "report"])
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = parser.parse_args(arguments[:1]).name
    if name == "report":
        from benchmarks.report import main as report

        report(arguments[1:])
    else:
        run(protocol(name), arguments[1:])


if __name__ == "__main__":
    main()
