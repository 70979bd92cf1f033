"""Every benchmark by its name on the command line."""

import importlib

from benchmarks._protocol import Protocol

MODULES = {
    "paper-table": "paper_table",
    "rate-sensitivity": "rate_sensitivity",
    "tuned-baselines": "tuned_baselines",
    "anytime": "anytime",
    "stability-stress": "stability_stress",
    "defaults": "defaults",
    "standings": "standings",
    "finetuning": "finetuning",
    "alignment": "alignment",
    "ablation": "ablation",
    "horizon": "horizon",
    "carry-over": "carry_over",
    "fresh-seeds": "fresh_seeds",
    "roles": "roles",
    "yielding": "yielding",
    "averages": "averages",
    "components": "components",
    "activations": "activations",
    "wires": "wires",
    "labelling": "labelling",
    "step-time": "step_time",
    "exact": "exact",
    "memory": "memory",
    "large-models": "large_models",
    "scale": "scale",
    "resume": "resume",
    "launches": "launches",
    "gpu": "gpu",
}
"""The module that holds each, in the order of the report."""


def protocol(name: str) -> Protocol:
    """The benchmark of that name; what it needs is imported only now."""
    return importlib.import_module(f"benchmarks.{MODULES[name]}").PROTOCOL
