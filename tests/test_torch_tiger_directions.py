"""Directions around directions: soft signs, trust ratios, clips, slices; each with all the rest."""

import copy
import dataclasses
import io
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cruxy_control import PlateauGuard  # noqa: E402
from cruxy_control.slices import Slices, blocks, per_group  # noqa: E402
from cruxy_torch import (  # noqa: E402
    AXIOM,
    AdaptiveGradientClip,
    BalanceSlices,
    ClipRms,
    CruxyOptimizer,
    Momentum,
    ScaleSlices,
    SignBlend,
    TrustRatio,
    _blocks,
)
from cruxy_torch._actuators.axiom import FactoredDirection  # noqa: E402
from cruxy_torch._actuators.moments import Adam, Lion  # noqa: E402
from relatives import crossed, relatives  # noqa: E402
from torch_low_bit import assert_same, gradients, parameters, state_of, train  # noqa: E402
from torch_released import OFF  # noqa: E402


def ramp(count):
    """A schedule of the weight."""
    return (0.1 * count).clip(max=0.6)


FACTORED = FactoredDirection(
    momentum=0.0, decay_rate=0.8, clip_rms=None, relative_step=False, streak_boost=1.0,
    snr_floor=0.0, min_dim_size_to_factor=32,
)  # fmt: skip
QKV = per_group(4, 6, 3)
"""Four groups of six queries' heads, a key's and a value's: 96 rows."""

DIRECTIONS = {
    "blend": SignBlend(),
    "soft": SignBlend(temperature=0.5, weight=0.0),
    "schedule": SignBlend(weight=ramp),
    "factored": SignBlend(Momentum(dataclasses.replace(FACTORED, power=0.5))),
    "trust": TrustRatio(SignBlend(), decay=0.9),
    "trust of rows": TrustRatio(Adam(1e-30, True), decay=0.9, per="row"),
    "trust of a momentum": TrustRatio(SignBlend(Momentum(FACTORED)), space="momentum"),
    "agc": AdaptiveGradientClip(SignBlend(), 0.1),
    "agc of rows": AdaptiveGradientClip(Lion(), 0.1, per="row"),
    "rms": ClipRms(SignBlend(weight=1.0), 0.9),
    "rms of blocks": ClipRms(SignBlend(), 0.9, per="block"),
    "everything": ClipRms(TrustRatio(AdaptiveGradientClip(SignBlend(), 0.1), decay=0.5), 0.01),
}
SLICED = {
    "slices": ScaleSlices(SignBlend(), QKV, {"q": 0.9, "k": 0.8, "v": 1.1}),
    "balance": BalanceSlices(SignBlend(), QKV, every=2),
    "trust of slices": TrustRatio(SignBlend(), decay=0.9, per="slice", slices=QKV),
}
SHAPES = ((96, 64), (33,), (), (5, 3, 300), (0, 3))
NAMES = [*DIRECTIONS, *SLICED]
DIFFERENT = ("factored", "trust of rows", "everything", "balance")
every_direction = pytest.mark.parametrize("name", NAMES)
different_directions = pytest.mark.parametrize("name", relatives(NAMES, DIFFERENT))


def made(name, law=OFF, seed=0, **options):
    shapes = ((96, 64), (96,)) if name in SLICED else SHAPES
    params = parameters(*shapes, seed=seed)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "direction": (DIRECTIONS | SLICED)[name]} | options
    return params, CruxyOptimizer(params, law=law, **options)


def stepped(direction, params, grads, **options):
    """What parameters become in one step at rate 1, without decay."""
    params = [torch.nn.Parameter(torch.as_tensor(p, dtype=torch.float32)) for p in params]
    optimizer = CruxyOptimizer(
        params, lr=1.0, law=OFF, weight_decay=0.0, direction=direction, **options
    )
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.as_tensor(g, dtype=torch.float32).expand_as(p).clone()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    return [b - p.detach() for b, p in zip(before, params, strict=True)]


def test_temperature_zero_without_a_weight_is_lion_to_the_bit():
    ran = []
    for options in ({"direction": SignBlend(temperature=0.0, weight=0.0)}, {"use_lion": True}):
        params = parameters(*SHAPES)
        optimizer = CruxyOptimizer(params, lr=1e-3, betas=(0.9, 0.99), fused=False, **options)
        train(params, optimizer, 5)
        gradients(params, 5)
        params[0].grad[3, 4] = math.nan
        optimizer.step(loss=1.0)
        train(params, optimizer, 5, start=6)
        ran.append(([p.detach() for p in params], state_of(optimizer)))
    (ours, state), (theirs, expected) = ran
    assert all(map(torch.equal, ours, theirs))
    assert_same(state, expected)


@pytest.mark.parametrize(
    "name",
    relatives(
        [name for name in NAMES if "agc" not in name and name != "everything"],
        ["blend", "factored", "trust of rows", "rms of blocks", "balance"],
    ),
)
def test_gradients_a_thousand_times_as_large_change_nothing(name):
    def run(scale):
        params, optimizer = made(name)
        for step in range(8):
            gradients(params, step, scale)
            optimizer.step(loss=1.0)
        return params

    for ours, theirs in zip(run(1e-2), run(10.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * 1e-2 * 8)


@pytest.mark.parametrize(("name", "bits"), crossed(NAMES, [32, 8, 4]))
def test_it_resumes_to_the_bit(name, bits):
    whole, optimizer = made(name, state_bits=bits)
    train(whole, optimizer, 6)
    params, first = made(name, state_bits=bits)
    train(params, first, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    _, second = made(name, state_bits=bits, seed=1)
    again = second.param_groups[0]["params"]
    with torch.no_grad():
        for p, old in zip(again, params, strict=True):
            p.copy_(old)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(again, second, 3, start=3)
    assert all(map(torch.equal, again, whole))
    assert_same(state_of(second), state_of(optimizer))


@every_direction
def test_a_bad_gradient_changes_nothing_first_or_later(name):
    params, optimizer = made(name, state_bits=8)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    before = [p.detach().clone() for p in params]
    optimizer.step(loss=1.0)
    assert all(map(torch.equal, params, before))
    train(params, optimizer, 3)
    before, kept = [p.detach().clone() for p in params], state_of(optimizer)
    gradients(params, 9)
    params[0].grad[0, 0] = math.inf
    optimizer.step(loss=1.0)
    assert all(map(torch.equal, params, before))
    assert_same(state_of(optimizer), kept)
    assert all(torch.isfinite(p).all() for p in params)


@different_directions
def test_zeros_stay_finite(name):
    params, optimizer = made(name)
    with torch.no_grad():
        for p in params:
            p.zero_()
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step(loss=1.0)
    assert all(torch.equal(p, torch.zeros_like(p)) for p in params)
    train(params, optimizer, 2)
    assert all(torch.isfinite(p).all() for p in params)
    assert (params[0] != 0).any()


@different_directions
def test_released_gradients_give_what_ordinary_steps_do(name):
    ordinary, optimizer = made(name)
    released, other = made(name)
    other.register_hooks()
    for step in range(4):
        gradients(ordinary, step)
        grads = [p.grad.clone() for p in ordinary]
        optimizer.step(loss=1.0)
        sum((p * g).sum() for p, g in zip(released, grads, strict=True)).backward()
        assert released[0].grad is None
        other.step(loss=1.0)
    for ours, theirs in zip(released, ordinary, strict=True):
        torch.testing.assert_close(ours, theirs)


@different_directions
def test_blocks_do_not_change_what_it_gives(name, monkeypatch):
    whole, optimizer = made(name)
    train(whole, optimizer, 4)
    monkeypatch.setattr(_blocks, "BLOCK", 1024)
    parts, optimizer = made(name)
    train(parts, optimizer, 4)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_is_pickled_with_the_optimizer():
    params, optimizer = made("schedule")
    train(params, optimizer, 2)
    twin = copy.deepcopy(optimizer)
    train(params, optimizer, 2, start=2)
    train(twin.param_groups[0]["params"], twin, 2, start=2)
    assert torch.equal(params[0], twin.param_groups[0]["params"][0])


def test_a_schedule_advances_on_good_steps_alone():
    seen = []
    (p,) = parameters((3,))
    direction = SignBlend(weight=lambda count: seen.append(int(count)) or 0.2)
    optimizer = CruxyOptimizer([p], direction=direction)
    for factor in (1.0, math.nan, 1.0):
        p.grad = torch.full((3,), factor)
        optimizer.step(loss=1.0)
    assert seen == [0, 1, 1]


def test_a_plateau_takes_the_sign_out_of_a_blend():
    (p,) = parameters((4,))
    law = PlateauGuard(OFF, patience=1, loss_decay=0.0)
    direction = SignBlend(Momentum(), temperature=0.0, weight=0.25)
    options = {"betas": (0.0, 0.0), "weight_decay": 0.0, "direction": direction}
    optimizer = CruxyOptimizer([p], lr=1.0, law=law, **options)
    moved = []
    for _ in range(5):
        before = p.detach().clone()
        p.grad = torch.tensor([3.0, -1.0, 1.0, 1.0])
        optimizer.step(loss=1.0)
        moved.append(before - p.detach())
    unit = torch.tensor([3.0, -1.0, 1.0, 1.0]) / math.sqrt(3.0)
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(moved[0], 0.75 * sign + 0.25 * unit)
    assert optimizer.telemetry()["sign_weight"] == 0.0
    torch.testing.assert_close(moved[-1], unit)


class TestTrust:
    def test_a_step_is_a_share_of_its_tensor(self):
        moved = stepped(
            TrustRatio(Momentum(), cap=10.0, floor=1e-2),
            [torch.full((3, 4), 2.0), torch.zeros(5), torch.ones(2)],
            [0.5, 1.0, 0.0],
            betas=(0.0, 0.0),
        )
        for ours, size in zip(moved, (2.0, 1e-2, 0.0), strict=True):
            torch.testing.assert_close(ours, torch.full_like(ours, size))

    def test_it_is_capped(self):
        (moved,) = stepped(TrustRatio(Momentum(), cap=10.0), [torch.ones(4)], [1e-3])
        torch.testing.assert_close(moved, torch.full((4,), 10.0 * 1e-3 * 0.1))

    def test_its_average_is_bias_corrected(self):
        p, seen = torch.nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64)), []
        direction = TrustRatio(Momentum(), decay=0.9)
        options = {"betas": (0.0, 0.0), "weight_decay": 0.0, "direction": direction}
        optimizer = CruxyOptimizer([p], lr=1e-9, law=OFF, **options)
        for size in (1.0, 4.0):
            before = p.detach().clone()
            p.grad = torch.full_like(p, size)
            optimizer.step()
            seen.append(((before - p.detach()) / 1e-9 / size).mean().item())
        logs = (0.9 * math.log(2.0) + math.log(0.5)) / 1.9
        assert seen == pytest.approx([2.0, math.exp(logs)], rel=1e-5)

    def test_that_of_slices_is_that_of_tensors_that_were_split(self):
        layout = blocks(12, 6, 6)
        self.compare_with_split(layout, torch.randn(24, 10))

    def test_that_of_slices_along_a_second_axis_is_too(self):
        self.compare_with_split(blocks(12, 6, 6, axis=1), torch.randn(10, 24))

    def test_that_of_slices_in_many_pieces_is_too(self):
        self.compare_with_split(per_group(2, 4, 2), torch.randn(24, 3, 2))

    def compare_with_split(self, layout, value):
        index = {n: [i for a, b in r for i in range(a, b)] for n, r in layout.parts()}

        def cut(x, name):
            return x.index_select(layout.axis, torch.tensor(index[name]))

        whole = torch.nn.Parameter(value.clone())
        split = [torch.nn.Parameter(cut(value, name).clone()) for name in index]
        options = {"lr": 1e-2, "law": OFF, "betas": (0.9, 0.99)}
        sliced = TrustRatio(Lion(), decay=0.9, per="slice", slices=layout)
        ours = CruxyOptimizer([whole], direction=sliced, **options)
        theirs = CruxyOptimizer(split, direction=TrustRatio(Lion(), decay=0.9), **options)
        for step in range(5):
            gradients([whole], step)
            for p, name in zip(split, index, strict=True):
                p.grad = cut(whole.grad, name)
            ours.step(loss=1.0)
            theirs.step(loss=1.0)
        for p, name in zip(split, index, strict=True):
            torch.testing.assert_close(cut(whole.detach(), name), p.detach())
        ratios = [theirs.state[p]["trust_log"] for p in split]
        torch.testing.assert_close(ours.state[whole]["trust_log"], torch.stack(ratios))

    @pytest.mark.parametrize(
        "make",
        [
            lambda per: TrustRatio(Lion(), decay=0.9, per=per),
            lambda per: AdaptiveGradientClip(Lion(), 0.05, per=per),
            lambda per: ClipRms(Momentum(), 1e-3, per=per),
        ],
    )
    def test_that_of_rows_is_that_of_tensors_of_one_row(self, make):
        value = torch.randn(5, 7) * torch.logspace(-2, 2, 5)[:, None]
        whole = torch.nn.Parameter(value.clone())
        rows = [torch.nn.Parameter(row.clone()) for row in value]
        ours = CruxyOptimizer([whole], lr=1e-2, law=OFF, direction=make("row"))
        theirs = CruxyOptimizer(rows, lr=1e-2, law=OFF, direction=make("tensor"))
        for step in range(5):
            gradients([whole], step, 1.0)
            for p, grad in zip(rows, whole.grad, strict=True):
                p.grad = grad.clone()
            ours.step(loss=1.0)
            theirs.step(loss=1.0)
        torch.testing.assert_close(whole.detach(), torch.stack([p.detach() for p in rows]))

    def test_a_momentum_is_measured_before_its_sign(self):
        direction = TrustRatio(SignBlend(temperature=0.0, weight=0.0), space="momentum")
        (moved,) = stepped(direction, [torch.full((4,), 2.0)], [0.5], betas=(0.0, 0.0))
        torch.testing.assert_close(moved, torch.full((4,), 4.0))  # 2 / 0.5 times a sign

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"cap": 0.0}, r"cap must be in \(0, infinity\]"),
            ({"floor": 0.0}, r"floor must be in \(0"),
            ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
            ({"per": "block"}, "per must be one of"),
            ({"per": "slice"}, "come together"),
            ({"slices": QKV}, "come together"),
            ({"space": "momentum"}, "measures what goes into a SignBlend, got Lion"),
            ({"space": "precond"}, "space must be one of"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, options, words):
        with pytest.raises(ValueError, match=words):
            TrustRatio(Lion(), **options)


class TestClips:
    def test_a_gradient_is_no_longer_than_a_share_of_its_parameter(self):
        params = [torch.full((4,), 2.0), torch.zeros(4), torch.full((4,), 2.0)]
        direction = AdaptiveGradientClip(Momentum(), 0.1, eps=1e-2)
        moved = stepped(direction, params, [1.0, 1.0, 0.01], betas=(0.0, 0.0))
        norms = [u.norm().item() for u in moved]
        assert norms == pytest.approx([0.1 * 4.0, 0.1 * 1e-2, 0.02], rel=1e-5)

    def test_blocks_are_those_of_256_elements(self):
        grad = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
        grad[1] *= 0.01
        direction = ClipRms(Momentum(), 0.5, per="block")
        (moved,) = stepped(direction, [torch.zeros(3, 600)], [grad], betas=(0.0, 0.0))
        want = grad.numpy().astype(np.float64)
        for start in range(0, 600, 256):
            part = want[:, start : start + 256]
            part *= np.minimum(1.0, 0.5 / np.sqrt((part**2).mean(1, keepdims=True)))
        np.testing.assert_allclose(moved.numpy(), want, rtol=1e-5)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: ClipRms(Lion(), 0.0),
            lambda: ClipRms(Lion(), per="slice"),
            lambda: AdaptiveGradientClip(Lion(), 0.0),
            lambda: AdaptiveGradientClip(Lion(), eps=0.0),
            lambda: AdaptiveGradientClip(Lion(), per="block"),
            lambda: SignBlend(temperature=-1.0),
            lambda: SignBlend(weight=1.1),
        ],
    )
    def test_what_is_outside_its_range_is_refused(self, make):
        with pytest.raises(ValueError, match="must be"):
            make()

    def test_a_momentum_of_a_momentum_is_refused(self):
        with pytest.raises(ValueError, match="must not keep a momentum of its own, got Lion"):
            Momentum(Lion())


class TestSlices:
    def test_rates_are_those_of_groups_of_tensors_that_were_split(self):
        value, layout = torch.randn(24, 5), blocks(12, 6, 6)
        rates = {"q": 0.9, "v": 1.1}
        whole = torch.nn.Parameter(value.clone())
        split = [torch.nn.Parameter(x.clone()) for x in value.split([12, 6, 6])]
        direction = ScaleSlices(Lion(), layout, rates)
        options = {"law": OFF, "weight_decay": 0.0}
        ours = CruxyOptimizer([whole], lr=1e-2, direction=direction, **options)
        groups = [
            {"params": [p], "lr": 1e-2 * rates.get(name, 1.0)}
            for p, name in zip(split, "qkv", strict=True)
        ]
        theirs = CruxyOptimizer(groups, use_lion=True, **options)
        for step in range(5):
            gradients([whole], step)
            for p, grad in zip(split, whole.grad.split([12, 6, 6]), strict=True):
                p.grad = grad.clone()
            ours.step(loss=1.0)
            theirs.step(loss=1.0)
        torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in split]))

    def test_steps_that_differ_come_closer(self):
        p = torch.nn.Parameter(torch.ones(24, 5))
        direction = BalanceSlices(Momentum(), blocks(8, 8, 8), every=1)
        optimizer = CruxyOptimizer([p], law=OFF, direction=direction)
        sizes = torch.tensor([0.9, 1.0, 1.15]).repeat_interleave(8)[:, None].expand(24, 5)
        for _ in range(60):
            p.grad = sizes.clone()
            optimizer.step(loss=1.0)
        rates = optimizer.state[p]["slice_rates"]
        assert rates[0] > 1.0 > rates[2]
        balanced = rates * torch.tensor([0.9, 1.0, 1.15])
        assert balanced.max() / balanced.min() < 1.15 / 0.9

    def test_a_tensor_without_queries_has_two_slices(self):
        p = torch.nn.Parameter(torch.ones(8, 5))
        direction = BalanceSlices(SignBlend(), blocks(0, 4, 4), every=1)
        optimizer = CruxyOptimizer([p], direction=direction)
        train([p], optimizer, 2)
        assert optimizer.state[p]["slice_rates"].shape == (2,)

    def test_ranges_may_come_as_lists(self):
        p = torch.nn.Parameter(torch.ones(6))
        layout = Slices(0, [(0, 2)], [(2, 4)], [(4, 6)])
        optimizer = CruxyOptimizer([p], direction=ScaleSlices(Lion(), layout, {"q": 0.0}))
        train([p], optimizer, 1)
        assert (p[2:] != 1.0).all()

    @pytest.mark.parametrize(
        "make",
        [
            lambda layout: ScaleSlices(Lion(), layout, {}),
            lambda layout: BalanceSlices(Lion(), layout),
            lambda layout: TrustRatio(Lion(), per="slice", slices=layout),
        ],
    )
    def test_a_layout_that_does_not_fill_its_tensor_is_refused(self, make):
        p = torch.nn.Parameter(torch.ones(6, 2))
        optimizer = CruxyOptimizer([p], direction=make(blocks(2, 2, 1)))
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=r"2 \+ 2 \+ 1 = 5 indices for a size of 6"):
            optimizer.step(loss=1.0)
        assert torch.equal(p, torch.ones(6, 2))

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: ScaleSlices(Lion(), QKV, {"k": -1.0}), r"rates\['k'\] must be in \[0"),
            (lambda: ScaleSlices(Lion(), QKV, {"o": 1.0}), "rates must be of"),
            (lambda: BalanceSlices(Lion(), QKV, every=0), "every must be"),
            (lambda: BalanceSlices(Lion(), QKV, clip=1.0), r"clip must be in \(0, 1\)"),
            (lambda: BalanceSlices(Lion(), QKV, bounds=(1.1, 1.3)), "bounds must contain 1"),
        ],
    )
    def test_what_is_outside_its_range_is_refused(self, make, words):
        with pytest.raises(ValueError, match=words):
            make()


class TestPower:
    """A part of the root of AXIOM's second moment."""

    @pytest.mark.parametrize("shape", [(40, 50), (30,)])
    def test_it_is_its_equation(self, shape):
        (p,) = parameters(shape)
        optimizer = AXIOM([p], lr=1.0, power=0.5, clip_rms=None, weight_decay=0.0, law=OFF)
        gradients([p], 0)
        before, g = p.detach().double(), p.grad.double().numpy()
        optimizer.step()
        v = g**2 + 1e-30
        if len(shape) > 1:
            v = v.mean(1, keepdims=True) * v.mean(0, keepdims=True) / v.mean()
        moved = (before - p.detach().double()).numpy()
        np.testing.assert_allclose(moved, g * v**-0.25, rtol=1e-4, atol=1e-6)

    def test_none_of_it_is_the_gradient(self):
        (p,) = parameters((40, 50))
        optimizer = AXIOM([p], lr=1.0, power=0.0, clip_rms=None, weight_decay=0.0, law=OFF)
        gradients([p], 0)
        before, g = p.detach().clone(), p.grad.clone()
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), g, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("power", [-0.1, 1.1])
    def test_it_is_between_zero_and_one(self, power):
        with pytest.raises(ValueError, match=r"power must be in \[0, 1\]"):
            AXIOM(parameters((3,)), power=power)

    def test_a_state_that_was_saved_without_it_is_loaded(self):
        params = parameters((40, 50))
        optimizer = AXIOM(params)
        train(params, optimizer, 2)
        saved = optimizer.state_dict()
        del saved["param_groups"][0]["power"]
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["power"] == 1.0
