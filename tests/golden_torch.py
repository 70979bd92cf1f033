"""PyTorch's part of `golden_runs`."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cruxy_torch
from cruxy_control import SelfDriving
from golden_runs import SAVED, STEPS, digest, machine, start, stream

HELD = SelfDriving(limit_yield=None)
"""The law of then, whose limit did not give way."""

DRIVING: dict[str, Any] = {"mode": "self_driving", "law": HELD, "weight_decay": 0.01}
LION: dict[str, Any] = {"use_lion": True, "lr": 1e-3, "betas": (0.9, 0.99)}

CRUXY: dict[str, dict[str, Any]] = {
    "meta3": {},
    "meta3-16": {"state_bits": 16},
    "meta3-8": {"state_bits": 8},
    "meta3-4": {"state_bits": 4},
    "meta_lion": LION,
    "meta_lion-16": LION | {"state_bits": 16},
    "meta_lion-8": LION | {"state_bits": 8},
    "meta_lion-4": LION | {"state_bits": 4},
    "stability_v1": {"mode": "stability_v1"},
    "stability_v2": {"mode": "stability_v2"},
    "self_driving": DRIVING,
    "self_driving-16": DRIVING | {"state_bits": 16},
    "self_driving-8": DRIVING | {"state_bits": 8},
    "self_driving-4": DRIVING | {"state_bits": 4},
    "self_driving_lion": DRIVING | {"use_lion": True},
    "self_driving_lion-4": DRIVING | {"use_lion": True, "state_bits": 4},
    "plain": {"use_nesterov": False, "weight_decay": 0.0},
    "l2": {"decoupled_weight_decay": False},
    "centralized": {"use_gc": True},
    "centralized-8": {"use_gc": True, "state_bits": 8},
    "lion_centralized": LION | {"use_gc": True},
    "maximize": {"maximize": True},
    "gamma_1.7": {"gamma_norm": 1.7},
    "gamma_2": {"gamma_norm": 2.0},
    "limited": {"relative_limit": 0.01, "averaging": 0.0},
    "bounded": {"lr_bounds": (1e-4, 2e-3)},
    "lion_bfloat16": LION | {"momentum_dtype": torch.bfloat16},
    "select": {"state_bits": 8, "select": lambda p: p.ndim != 2},
}
"""Options of `CruxyOptimizer`; `-N` are bits."""

PATHS: dict[str, dict[str, Any]] = {
    "native": {},
    "single": {"fused": False},
    "foreach": {"foreach": True},
}

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _cruxy(options: dict[str, Any]) -> Any:
    def make(groups: list[dict[str, Any]]) -> Any:
        groups = [{"decay_vectors": True, **group} for group in groups]
        return cruxy_torch.CruxyOptimizer(groups, **{"lr": 3e-3, **options})

    return make


def _axiom(**options: Any) -> Any:
    return lambda groups: cruxy_torch.AXIOM(groups, lr=3e-3, **options)


def _cosmic(budget: int | str, **options: Any) -> Any:
    return lambda groups: cruxy_torch.Cosmic(
        groups, lr=3e-3, state_budget=budget, retier_every=30, **options
    )


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {}
"""By name: what makes the optimizer of groups, and how it is run."""

for _name, _options in CRUXY.items():
    for _path, _how in PATHS.items():
        RUNS[f"{_name}/{_path}"] = (_cruxy(_options | _how), {})
for _dtype in DTYPES:
    for _path, _how in PATHS.items():
        RUNS[f"meta3/{_dtype}/{_path}"] = (_cruxy(_how), {"dtype": _dtype})
        RUNS[f"lion/{_dtype}/{_path}"] = (_cruxy(LION | _how), {"dtype": _dtype})
for _bits in (32, 8):
    for _path, _how in PATHS.items():
        RUNS[f"stochastic-{_bits}/{_path}"] = (
            _cruxy({"stochastic_rounding": True, "state_bits": _bits} | _how),
            {"dtype": "bfloat16"},
        )
RUNS["meta3/released"] = (_cruxy({}), {"released": True})
RUNS["meta3-4/released"] = (_cruxy({"state_bits": 4}), {"released": True})
RUNS["meta_lion-8/released"] = (_cruxy(LION | {"state_bits": 8}), {"released": True})
RUNS["limited/released"] = (_cruxy(CRUXY["limited"]), {"released": True})
RUNS["stochastic/released"] = (
    _cruxy({"stochastic_rounding": True}), {"released": True, "dtype": "bfloat16"},
)  # fmt: skip
RUNS["axiom"] = (_axiom(), {})
for _bits in (32, 16, 8, 4):
    RUNS[f"axiom-{_bits}"] = (_axiom(momentum=0.9, momentum_bits=_bits), {})
RUNS["axiom/relative"] = (_axiom(relative_step=True, clip_rms=None), {})
RUNS["axiom/streak"] = (_axiom(momentum=0.9, streak_boost=1.5, snr_floor=0.1), {})
RUNS["axiom/whole"] = (_axiom(min_dim_size_to_factor=1000, maximize=True), {})
RUNS["axiom/bfloat16"] = (_axiom(), {"dtype": "bfloat16"})
RUNS["axiom-4/released"] = (_axiom(momentum=0.9), {"released": True})
RUNS["axiom/driven_v2"] = (_axiom(lr_bounds=(1e-4, 2e-3)), {})
for _bits in (32, 16, 8, 4):
    RUNS[f"cosmic-{_bits}"] = (_cosmic("40KB", state_bits=_bits), {})
RUNS["cosmic/small"] = (_cosmic("1KB"), {})
RUNS["cosmic/middle"] = (_cosmic("4KB", maximize=True), {})
RUNS["cosmic/bfloat16"] = (_cosmic("40KB"), {"dtype": "bfloat16"})
RUNS["cosmic/released"] = (_cosmic("40KB"), {"released": True})

SAVED_RUNS = (
    *(f"{name}/native" for name in CRUXY if name.split("-")[0] in (
        "meta3", "meta_lion", "stability_v1", "stability_v2", "self_driving", "self_driving_lion",
    )),
    "limited/native", "lion_bfloat16/native", "lion/float16/native", "stochastic-8/native",
    *(name for name in RUNS if name.startswith(("axiom-", "cosmic-")) and "/" not in name),
    "axiom", "axiom/whole", "cosmic/small", "meta3-4/released",
)  # fmt: skip
"""Runs whose state half-way is kept."""


def parameters(dtype: str = "float32") -> dict[str, torch.nn.Parameter]:
    wide = {k: torch.from_numpy(np.asarray(v)) for k, v in start().items()}
    return {k: torch.nn.Parameter(v.to(getattr(torch, dtype))) for k, v in wide.items()}


def make(name: str) -> tuple[dict[str, torch.nn.Parameter], Any]:
    """Parameters and optimizer of a run, in two groups of unequal decay."""
    factory, how = RUNS[name]
    params = parameters(how.get("dtype", "float32"))
    groups = [
        {"params": [params["w"], params["c"]]},
        {"params": [params["b"], params["s"]], "weight_decay": 0.0, "lr": 2e-3},
    ]
    optimizer = factory(groups)
    if how.get("released"):
        optimizer.register_hooks()
    return params, optimizer


def train(name: str, params: dict[str, torch.nn.Parameter], optimizer: Any, steps: range) -> None:
    """Takes these steps of the shared stream; `b` has no gradient in every fifth."""
    released = RUNS[name][1].get("released", False)
    grads, losses = stream()
    for step in steps:
        given = {
            k: torch.from_numpy(np.asarray(grads[step][k])).to(p.dtype)
            for k, p in params.items()
            if k != "b" or step % 5 != 4
        }
        if released:
            sum((params[k] * g).sum() for k, g in given.items()).backward()  # type: ignore[union-attr]
        else:
            for k, p in params.items():
                p.grad = given.get(k)
        optimizer.step(loss=float(losses[step]))


def bits(params: dict[str, torch.nn.Parameter], optimizer: Any) -> list[np.ndarray]:
    """Parameters and averages.

    The average of `b` is left out: in steps without a gradient for `b` it stood still in the commit
    before, where it has to move like every other.
    """
    tensors = [p.detach() for p in params.values()]
    states = [optimizer.state[p] for name, p in params.items() if name != "b"]
    tensors += [state["average"] for state in states if "average" in state]
    return [t.view(-1).view(torch.uint8).numpy() for t in tensors]


def basis() -> dict[str, str]:
    """What bits depend on beside the code."""
    return {
        "machine": machine(),
        "torch": str(torch.__version__),
        "simd": torch.backends.cpu.get_cpu_capability(),
    }


def write(folder: Path) -> None:
    kept: dict[str, Any] = {"basis": basis(), "digests": {}, "saved": {}}
    for name in RUNS:
        params, optimizer = make(name)
        train(name, params, optimizer, range(SAVED))
        if name in SAVED_RUNS:
            kept["saved"][name] = {
                "state": copy.deepcopy(optimizer.state_dict()),
                "params": {k: p.detach().clone() for k, p in params.items()},
            }
        train(name, params, optimizer, range(SAVED, STEPS))
        kept["digests"][name] = digest(bits(params, optimizer))
        if name in SAVED_RUNS:
            kept["saved"][name]["after"] = params["w"].detach()[:4].clone()
    torch.save(kept, folder / "torch.pt")
    print(f"{len(RUNS)} runs, {(folder / 'torch.pt').stat().st_size:,} bytes")
