"""The modes of `CruxyOptimizer`, and what AdamW's arguments cannot mean to it."""

import math
from typing import Any, Literal, get_args

from cruxy_control import Law, Meta3, SelfDriving, StabilityV1, StabilityV2
from cruxy_control.checks import check_count, check_range

Mode = Literal[
    "meta3", "meta_lion", "self_driving", "self_driving_lion", "stability_v2", "stability_v1"
]

LIONS = {"meta_lion": "meta3", "self_driving_lion": "self_driving"}
"""Modes that are others with `use_lion=True`, by the names that JAX has for them."""


def refuse_of_adamw(betas: Any, amsgrad: bool) -> None:
    """Raises where an argument means something else to AdamW, whose order they have."""
    if isinstance(betas, str):
        raise TypeError(
            f"betas must be a pair, got {betas!r}; the arguments stand in the order of "
            f"torch.optim.AdamW: give mode={betas!r}."
        )
    if amsgrad:
        raise ValueError(
            "amsgrad must be False, got True; the controller has no use for the largest second "
            "moment so far."
        )


def law_of(mode: str, gamma: float, rate_gain: float, beta2_gain: float, interval: int) -> Law:
    """The law that `mode` names, with the four constants that are arguments of their own."""
    remedy = "1.5 is the paper's, 2 the Euclidean norm"
    check_range("gamma_norm", gamma, 1.0, math.inf, upper_open=True, remedy=remedy)
    check_range("meta_lr_eta", rate_gain, 0.0, remedy="0.05 is the paper's, 0 switches it off")
    remedy = "0.03 is the paper's, 0 switches it off"
    check_range("meta_lr_beta2", beta2_gain, 0.0, 1.0, upper_open=True, remedy=remedy)
    check_count("meta_interval", interval, 1, remedy="10 is the paper's")
    laws = {
        "meta3": lambda: Meta3(
            gamma=gamma, rate_gain=rate_gain, beta2_gain=beta2_gain, meta_interval=interval
        ),
        "self_driving": lambda: SelfDriving(gamma=gamma),
        "stability_v2": lambda: StabilityV2(gamma=gamma),
        "stability_v1": StabilityV1,
    }
    if mode not in laws:
        raise ValueError(
            f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}; give law= "
            "for a law with constants of your own."
        )
    return laws[mode]()
