"""All that a step computes on scalars as one Triton kernel, written by the law's own formulas."""

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton_cases as cases  # noqa: E402
import triton_roundings  # noqa: E402
from cruxy_control import (  # noqa: E402
    Meta3,
    PlateauGuard,
    SelfDriving,
    StabilityV1,
    StabilityV2,
)
from cruxy_control.law import needs_excess  # noqa: E402
from cruxy_torch import CruxyOptimizer, _law_state, _step  # noqa: E402
from cruxy_torch._native import (  # noqa: E402
    triton_launch,
    triton_law,
    triton_tape,
    triton_written,
)
from cruxy_torch._sensors.sizes import Sizes  # noqa: E402
from triton_cases import DEVICE  # noqa: E402

pytestmark = [pytest.mark.gpu, cases.needs_a_place_to_run]

CASES = {
    "meta3": {},
    "meta3, every step": {"law": Meta3(meta_interval=1, reference_window=3)},
    "meta3 of the package": {"law": Meta3.cruxy_2_1_0(), "lr_bounds": (1e-7, 1e-2)},
    "meta3 with a largest norm": {"lr": 1e-2, "max_grad_norm": 2.0},
    "meta3 without clipping, climbing": {"law": Meta3(clip_threshold=None), "maximize": True},
    "stability v1": {"law": StabilityV1()},
    "stability v2": {"law": StabilityV2()},
    "a guard for plateaus": {"law": PlateauGuard(Meta3(), patience=5)},
    "8 bits, limited, averaged": {"state_bits": 8, "relative_limit": 0.1, "averaging": 4.0},
    "self-driving": {"mode": "self_driving"},
    "self-driving, wide": {"mode": "self_driving", "wide": True},
    "self-driving, interpolated": {"mode": "self_driving", "interpolation": 0.6},
    "self-driving by the excess": {
        "law": SelfDriving(excess_share=0.5),
        "lr": 1e-2,
        "averaging": 4.0,
        "relative_limit": 0.1,
    },
    "self-driving to an end": {"mode": "self_driving", "total_steps": 300},
    "self-driving, yielding": {"law": SelfDriving(limit_yield=5.0), "lr": 1e-2},
    "self-driving Lion under a schedule": {"mode": "self_driving", "use_lion": True, "falls": True},
    "a guard around self-driving": {"law": PlateauGuard(SelfDriving(), patience=3)},
    "self-driving without a limit": {"mode": "self_driving", "relative_limit": None},
    "rates of 0 at first": {"mode": "self_driving", "idle": True},
}

ROUNDINGS = 8 if cases.INTERPRETED else 32
"""Units of the last place after one step from the same state; each number also has the bound that
follows from the operations it comes from, see `triton_roundings`. On a GPU PyTorch's quotients and
powers are less exact."""


class Run:
    """Two optimizers that are handed the same measurements: one by the kernel, one without."""

    def __init__(self, name):
        options = {**CASES[name]}
        self.falls, self.idle = options.pop("falls", False), options.pop("idle", False)
        largest = options.pop("max_grad_norm", None)
        # A shape tells the width alone: neither tensor needs the elements that are said of it.
        self.wide = options.pop("wide", False)
        shapes = ((256, 256), (3,), (81, 81)) if self.wide else ((4096,), (3,))
        self.draw, self.own_draw = np.random.default_rng(0), np.random.default_rng(1)
        self.both = []
        for _ in range(2):
            params = [torch.nn.Parameter(torch.ones(n, device=DEVICE)) for n in shapes]
            groups = [{"params": params[:1]}, {"params": params[1:], "lr": 3e-3}]
            optimizer = CruxyOptimizer(groups, **options)
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer._settings = dataclasses.replace(optimizer._settings, max_grad_norm=largest)
            self.both.append(optimizer)

    def measured(self, step):
        """What a step may measure: anything, and now and then nothing, or what is no number."""
        draw = self.draw
        size = float(np.exp(draw.normal(0.0, 1.0)))
        g, gamma, m = size**2, size**1.5 * 3.0, float(np.exp(draw.normal()))
        along = float(draw.uniform(-1.0, 1.0)) * math.sqrt(g * m)
        loss = 1.0 + 0.1 * float(draw.normal())
        kind = step % 23
        if kind == 7:
            g, gamma, along, m = 0.0, 0.0, 0.0, 0.0
        if kind == 11:
            g = gamma = float("nan")
        if kind == 13:
            g = float("inf")
        if kind == 17:
            loss = float("nan")
        if kind == 19:
            g, gamma = 1e30, 1e25
        drives = "limit_scale" in self.both[0]._law()
        total = [g, gamma, along, m] if drives else [g, gamma]
        if needs_excess(self.both[0]._settings.law):  # and a loss that falls, by which it divides
            loss += 3.0 - 0.5 * math.log(1.0 + step)
            total += [g, 0.05 * float(self.own_draw.normal()) if kind != 15 else float("inf")]
        sizes, whole = [None, None], None
        if self.both[0].param_groups[0]["relative_limit"] is not None:
            squares = np.exp(draw.normal(-4.0, 2.0, 2))
            squares[1] = float("nan") if kind == 5 else squares[1]
            second = [squares[1], squares[0]] if self.wide else [squares[1]]
            sizes = [
                Sizes(_there([squares[0]]), [4096]), Sizes(_there(second), [3, 6561][: len(second)])
            ]  # fmt: skip
            whole = _there([4099.0 * squares[0]])[0]
        return _step.Measured(
            _there(total), _there([loss])[0], _there([0.5])[0], sizes, whole,
            4099.0 if whole is not None else 1.0,
        )  # fmt: skip

    def step(self, number, *, together=False):
        """One step of both; returns the orders. `together` begins it in the same state."""
        kernel, plain = self.both
        if together:
            for name, value in kernel._law().items():
                plain._law()[name].copy_(value)
        measured, orders = self.measured(number), []
        for optimizer in self.both:
            for group in optimizer.param_groups:
                if self.falls:
                    group["lr"] = 1.0 / (1.0 + number // 10)
                if self.idle:
                    group["lr"] = 0.0 if number < 5 else 1.0
            optimizer._mark_still(fresh=False)
            groups = [optimizer._group(i) for i in range(2)]
            idle = all(_step.is_zero(group.lr) for group in groups)
            take = triton_law.decide if optimizer is kernel else _step.order
            orders.append(
                take(optimizer._settings, optimizer._law(), groups, measured._replace(idle=idle))
            )
        return orders


def _there(values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def flat(law_state, orders):
    """Everything that a step has decided, by name, as float64, and what is whole."""
    found = {name: value.double().reshape(-1).cpu() for name, value in law_state.items()}
    for index, group in enumerate(orders):
        for name, value in group._asdict().items():
            if value is not None:
                found[f"{index}.{name}"] = torch.as_tensor(value).double().reshape(-1).cpu()
    return found


def apart(ours, theirs, names):
    """The largest distance in units of the last place, and where it is.

    Of what is smaller than 1e-3 those of 1e-3 count, and of differences of averages those of 1.
    """
    worst = (0.0, "")
    for name in names:
        x, y = ours[name], theirs[name]
        assert torch.equal(x.isnan(), y.isnan()), name
        x, y = x.nan_to_num(0.0, 1e39, -1e39), y.nan_to_num(0.0, 1e39, -1e39)
        least = 1.0 if name in ("law.error", "law.control") else 1e-3
        unit = torch.finfo(torch.float32).eps * y.abs().clamp(min=least)
        worst = max(worst, (((x - y).abs() / unit).max().item() if len(y) else 0.0, name))
    return worst


WHOLE = ("step", "skipped", "pairs", "rising", "start", "limited_steps", "ok", "key", "count")


@pytest.fixture
def bounds(monkeypatch):
    """What the last kernel has written, by argument and place, with how far off it may be."""
    found, launch = {}, triton_launch.launch

    def watched(device, kernel, grid, *args, **options):
        known = (r for r in triton_law._kernels.values() if r is not None)
        recorded = next(r for r in known if r.kernel is kernel)
        args_there = [a.cpu().numpy().copy() if isinstance(a, torch.Tensor) else a for a in args]
        given = dict(zip(recorded.types, args_there, strict=True))
        found.clear()
        found.update(triton_roundings.bounds(recorded.source, given))
        launch(device, kernel, grid, *args, **options)

    monkeypatch.setattr(triton_launch, "launch", watched)
    return found


def written(law_state, orders, argument, at):
    """What stands in a place that the kernel writes."""
    kind, index = argument.rstrip("0123456789"), argument.lstrip("abcdefghijklmnopqrstuvwxyz")
    if kind == "state":
        return list(law_state.values())[int(index)].reshape(-1)[at].item()
    if kind == "limits":
        return orders[int(index)].limits[at].item()
    name = kind
    if kind == "out":
        index, at = divmod(at, len(triton_law.NUMBERS))
        orders, name = orders[index:], triton_law.NUMBERS[at]
    value = torch.as_tensor(getattr(orders[0], name))
    return (value.float() if value.dtype == torch.float64 else value).item()


@pytest.mark.parametrize("name", CASES)
def test_one_step_from_any_state_is_that_of_the_reference(name, bounds):
    run = Run(name)
    for step in range(120):
        ours, theirs = run.step(step, together=True)
        assert ours is not None
        for place, bound in bounds.items():
            pair = zip(run.both, (ours, theirs), strict=True)
            x, y = (written(optimizer._law(), orders, *place) for optimizer, orders in pair)
            if math.isfinite(x) or math.isfinite(y):
                assert abs(x - y) <= bound.off, (step, place, x, y)
        ours, theirs = (
            flat(o._law(), orders) for o, orders in zip(run.both, (ours, theirs), strict=True)
        )
        assert ours.keys() == theirs.keys()
        distance, where = apart(ours, theirs, ours)
        assert distance <= ROUNDINGS, (step, where, distance)
        for whole in (n for n in ours if any(w in n.split(".")[-1] for w in WHOLE)):
            assert torch.equal(ours[whole], theirs[whole]), (step, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["meta3", "self-driving", "self-driving, yielding"])
def test_a_thousand_steps_stay_beside_the_reference(name):
    run = Run(name)
    for step in range(1_000):
        orders = run.step(step)
    ours, theirs = (flat(o._law(), own) for o, own in zip(run.both, orders, strict=True))
    assert apart(ours, theirs, ours)[0] <= 1_000 * ROUNDINGS
    assert all(torch.equal(ours[n], theirs[n]) for n in _law_state.COUNTERS)


class Branching:
    """A law that looks at a value."""

    gamma = 1.5

    def init(self, like, *, xp):
        return Meta3().init(like, xp=xp)

    def step(self, state, signals, *, xp):
        if signals.grad_norm > 1.0:
            return Meta3().step(state, signals, xp=xp)
        return Meta3().step(state, signals, xp=xp)


@dataclasses.dataclass(frozen=True)
class FrozenBranching(Branching):
    """The same, whose numbers cannot change."""


@pytest.mark.parametrize("law", [Branching(), FrozenBranching()])
def test_a_law_that_cannot_be_written_down_is_done_without(law):
    CASES["own"] = {"law": law}
    try:
        ours, theirs = Run("own").step(0)
    finally:
        del CASES["own"]
    assert ours is None
    assert theirs is not None


def test_a_schedule_compiles_nothing_anew():
    run = Run("self-driving Lion under a schedule")
    run.step(0)
    before = len(triton_law._kernels)
    for step in range(1, 30):
        run.step(step)
    assert len(triton_law._kernels) == before


def test_powers_and_tangents_are_rounded_once():
    tape = triton_tape.Tape()
    x = tape.vector("x", 256, 256)
    for name, value in (("e", tape.exp(x)), ("t", tape.tanh(x)), ("p", abs(x) ** (1 / 1.5))):
        tape.keep(name, value, triton_tape.FLOAT)
    kernel = triton_written.compiled(tape.source("functions"), "functions")
    xs = np.concatenate([np.linspace(-30, 30, 200), 10.0 ** np.linspace(-30, 1.9, 54), [0.0, 88.0]])
    there = {"x": _there(xs)} | {n: torch.empty(256, device=DEVICE) for n in "etp"}
    kernel[(1,)](*(there[name] for name in tape.types), **triton_law.OPTIONS)
    exact = there["x"].double().cpu().numpy()
    for name, wanted in (
        ("e", np.exp(exact)), ("t", np.tanh(exact)), ("p", np.abs(exact) ** (1 / 1.5)),
    ):  # fmt: skip
        found = there[name].double().cpu().numpy()
        unit = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64)
        assert (np.abs(found - wanted) <= 0.51 * unit).all(), name
