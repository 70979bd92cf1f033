"""`Cosmic` in PyTorch: tiers under a budget, what survives a new plan, the log, the gates."""

import copy
import io
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from cruxy_control import Meta3  # noqa: E402
from cruxy_control.tiers import GATE_FLOOR, SCALE_BOUNDS, SIGN_STEP  # noqa: E402
from cruxy_torch import Cosmic, CruxyOptimizer, estimate_memory, state_bytes  # noqa: E402
from torch_models import trained_with_and_without_scaler  # noqa: E402

STILL = Meta3(
    phase_strength=0.0, rate_gain=0.0, beta1_gain=0.0, beta2_gain=0.0, clip_threshold=None,
    beta2_phase_strength=0.0,
)  # fmt: skip
"""A controller that orders nothing but the guard."""

SHAPES = {"small": (8,), "middle": (40, 30), "large": (100, 80), "other": (80, 100), "scalar": ()}
MOMENTS = {name: 8 * math.prod(shape) + 8 for name, shape in SHAPES.items()}


def parameters():
    rng = np.random.default_rng(0)
    return {
        name: nn.Parameter(torch.tensor(rng.standard_normal(shape).astype(np.float32)))
        for name, shape in SHAPES.items()
    }


def gradients(step, sizes=None):
    """By name, of the given root mean squares (about)."""
    rng = np.random.default_rng(100 + step)
    sizes = sizes or {}
    return {
        name: torch.tensor((sizes.get(name, 1.0) * rng.standard_normal(shape)).astype(np.float32))
        for name, shape in SHAPES.items()
    }


def optimizer(params, budget, **options):
    named = list(params.items())
    return Cosmic(
        named,
        **{"lr": 1e-2, "state_budget": budget, "law": STILL, "weight_decay": 0.0, **options},
    )


def step_with(opt, params, grads, loss=None):
    for name, p in params.items():
        grad = grads.get(name)
        p.grad = None if grad is None else grad.to(p.dtype)
    opt.step(loss=loss)


def fixed(params):
    """Bytes of an optimizer whose tensors are all at tier 0."""
    opt = optimizer(params, "1GB")
    return state_bytes(opt) + 12 * len(params)


def everything(opt, params):
    kept = {name: p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        kept |= {f"{name}.{key}": value.clone() for key, value in opt.state[p].items()}
    return kept


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


class TestTiers:
    def test_the_first_plan_takes_what_fits(self):
        params = parameters()
        base = fixed(params) + 4 * len(SHAPES)  # a scalar for each
        budget = base + MOMENTS["scalar"] + MOMENTS["small"] + MOMENTS["middle"] - 12
        opt = optimizer(params, budget)
        step_with(opt, params, gradients(0))
        assert opt.tiers() == {"small": 2, "middle": 2, "large": 1, "other": 1, "scalar": 2}
        assert state_bytes(opt) == budget

    def test_a_budget_of_everything_is_adam_behind_gates(self):
        params, others = parameters(), parameters()
        ours = optimizer(params, "1GB", law=Meta3())
        theirs = CruxyOptimizer(others.values(), lr=1e-2, weight_decay=0.0, fused=False)
        for step in range(5):
            # Sizes fall, so that no gate closes.
            sizes = dict.fromkeys(SHAPES, 2.0**-step)
            step_with(ours, params, gradients(step, sizes), loss=1.0)
            for name, p in others.items():
                p.grad = gradients(step, sizes)[name]
            theirs.step(loss=1.0)
        assert set(ours.tiers().values()) == {2}
        for name in params:
            # The same operations, but for norms summed in another order: ulps of a step of 1e-2.
            torch.testing.assert_close(params[name], others[name], rtol=2.0**-22, atol=1e-7)

    def test_no_room_leaves_signs(self):
        params = parameters()
        opt = optimizer(params, fixed(params))
        start = {name: p.detach().clone() for name, p in params.items()}
        grads = gradients(0)
        step_with(opt, params, grads)
        assert set(opt.tiers().values()) == {0}
        for name, p in params.items():
            expected = start[name] - 1e-2 * SIGN_STEP * grads[name].sign()
            torch.testing.assert_close(p.detach(), expected)

    def test_tier_1_steps_by_the_relative_size_of_its_gradient(self):
        params = parameters()
        opt = optimizer(params, fixed(params) + 4 * len(SHAPES), retier_every=None)
        start = {name: p.detach().clone() for name, p in params.items()}
        grads = gradients(0, {"small": 3.0, "middle": 1.0, "large": 0.01, "scalar": 1.0})
        step_with(opt, params, grads)
        assert set(opt.tiers().values()) == {1}
        squares = {name: float(g.square().mean()) for name, g in grads.items()}
        mean = sum(squares.values()) / len(squares)
        for name, p in params.items():
            factor = np.clip(math.sqrt(mean / squares[name]), *SCALE_BOUNDS)
            expected = start[name] - 1e-2 * SIGN_STEP * factor * grads[name].sign()
            torch.testing.assert_close(p.detach(), expected)

    def test_weight_decay_reaches_every_tier(self):
        for extra in (0, 4 * len(SHAPES), 10**9):
            params = parameters()
            opt = optimizer(params, fixed(params) + extra, weight_decay=0.5, lr=0.1)
            start = {name: p.detach().clone() for name, p in params.items()}
            zeros = {name: torch.zeros_like(p) for name, p in params.items()}
            step_with(opt, params, zeros)
            for name, p in params.items():
                torch.testing.assert_close(p.detach(), 0.95 * start[name])


class TestBudget:
    @settings(max_examples=25, deadline=None)
    @given(
        extra=st.integers(0, 90_000),
        bits=st.sampled_from([32, 16, 8, 4]),
        sizes=st.lists(
            st.dictionaries(st.sampled_from(sorted(SHAPES)), st.floats(1e-4, 1e3)),
            min_size=1, max_size=4,
        ),
    )  # fmt: skip
    def test_is_never_exceeded_whatever_the_gradients(self, extra, bits, sizes):
        params = parameters()
        budget = fixed(params) + extra
        opt = optimizer(params, budget, state_bits=bits, retier_every=1)
        seen = []
        for step, size in enumerate(sizes):
            step_with(opt, params, gradients(step, size))
            seen.append(state_bytes(opt))
        assert max(seen) <= budget
        plan = opt.retier()
        assert plan["bytes"] == state_bytes(opt)

    def test_too_small_a_budget_says_what_would_do(self):
        params = parameters()
        needed = fixed(params)
        opt = optimizer(params, needed - 1)
        with pytest.raises(ValueError, match=f"state_budget must be at least {needed:,} bytes"):
            step_with(opt, params, gradients(0))
        step_with(optimizer(params, needed), params, gradients(0))

    def test_low_bits_buy_more_tensors(self):
        counts = {}
        for bits in (32, 4):
            params = parameters()
            opt = optimizer(params, fixed(params) + 12_000, state_bits=bits)
            step_with(opt, params, gradients(0))
            counts[bits] = opt.tiers()["large"]
            if bits == 4:
                assert "exp_avg_codes" in opt.state[params["large"]]
        assert counts == {32: 1, 4: 2}

    def test_the_estimate_is_what_the_first_step_takes(self):
        model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 100))
        for bits in (32, 8):

            def factory(params, bits=bits):
                return Cosmic(params, state_budget=20_000, state_bits=bits)

            opt = factory(list(model.parameters()))
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            opt.step()
            assert estimate_memory(model, factory).state == state_bytes(opt) <= 20_000

    def test_a_saved_state_that_does_not_fit_is_refused_and_changes_nothing(self):
        params = parameters()
        opt = optimizer(params, "1MB")
        step_with(opt, params, gradients(0))
        saved = opt.state_dict()
        others = parameters()
        small = optimizer(others, fixed(others) + 100)
        step_with(small, others, gradients(0))
        before = everything(small, others)
        with pytest.raises(ValueError, match="for the state that was saved, got"):
            small.load_state_dict(saved)
        assert_same(everything(small, others), before)


class TestRetiering:
    def quiet_and_loud(self, budget_for=("large",), **options):
        params = parameters()
        extra = sum(MOMENTS[name] - 4 for name in budget_for)
        budget = fixed(params) + 4 * len(SHAPES) + extra
        return params, optimizer(params, budget, retier_every=None, **options)

    def test_moments_go_where_the_gradient_is(self):
        params, opt = self.quiet_and_loud()
        step_with(opt, params, gradients(0, {"other": 100.0}))
        assert (opt.tiers()["large"], opt.tiers()["other"]) == (2, 1)
        done = opt.retier()
        assert (opt.tiers()["large"], opt.tiers()["other"]) == (1, 2)
        moved = [(t["name"], t["from"], t["to"]) for t in done["transitions"]]
        assert moved == [("large", 2, 1), ("other", 1, 2)]

    def test_moments_that_stay_are_kept_bit_for_bit(self):
        params, opt = self.quiet_and_loud(SHAPES)
        for step in range(3):
            step_with(opt, params, gradients(step))
        before = everything(opt, params)
        assert opt.retier()["transitions"] == []
        assert_same(everything(opt, params), before)

    def test_survivors_are_kept_while_others_move(self):
        params, opt = self.quiet_and_loud(("large", "middle", "small", "scalar"))
        for step in range(3):
            step_with(opt, params, gradients(step, {"other": 100.0}))
        assert opt.tiers() == {"small": 2, "middle": 2, "large": 2, "other": 1, "scalar": 2}
        before = everything(opt, params)
        opt.retier()
        assert opt.tiers() == {"small": 2, "middle": 2, "large": 1, "other": 2, "scalar": 2}
        after = everything(opt, params)
        stay = [name for name in before if name.split(".")[0] in ("small", "middle", "scalar")]
        assert_same({n: after[n] for n in stay}, {n: before[n] for n in stay})

    def test_a_tensor_that_falls_to_tier_1_goes_on_from_its_average(self):
        params, opt = self.quiet_and_loud()
        for step in range(3):
            step_with(opt, params, gradients(step, {"other": 100.0, "large": 0.1}))
        opt.retier()
        state = opt.state[params["large"]]
        torch.testing.assert_close(state["mean_square"], state["grad_slow"] ** 2)
        assert state["mean_square"].sqrt().item() == pytest.approx(0.1, rel=0.05)

    def test_a_late_promotion_starts_its_own_bias_correction(self):
        params, opt = self.quiet_and_loud()
        for step in range(5):
            step_with(opt, params, gradients(step, {"other": 100.0}))
        opt.retier()
        before = params["other"].detach().clone()
        grad = gradients(9, {"other": 1.0})
        step_with(opt, params, grad)
        # Adam's first step has the size of the rate whatever the gradient; with the bias
        # correction of step 6 it would be 0.1 / 0.47 / sqrt(0.001 / 0.006) = 0.5 of that.
        moved = (before - params["other"].detach()) / 1e-2
        torch.testing.assert_close(moved, grad["other"].sign(), rtol=1e-3, atol=1e-3)

    def test_hysteresis_stops_two_tensors_from_taking_turns(self):
        flips = {}
        for hysteresis in (0.0, 0.2):
            a, b = (nn.Parameter(torch.zeros(50)) for _ in "ab")
            params = {"a": a, "b": b}
            base = fixed(params) + 8
            opt = optimizer(
                params, base + 8 * 50 + 8, hysteresis=hysteresis, retier_every=1, lr=0.0
            )
            count = 0
            for step in range(40):
                louder = "ab"[step % 2]  # by turns 10 % louder, on average the same
                grads = {n: torch.full((50,), 1.1 if n == louder else 1.0) for n in params}
                before = opt.tiers()
                step_with(opt, params, grads)
                count += bool(before) and opt.tiers() != before
            flips[hysteresis] = count
        assert flips[0.0] > 5
        assert flips[0.2] == 0

    def test_it_happens_every_so_many_steps(self, tmp_path):
        path = tmp_path / "tiers.jsonl"
        params = parameters()
        opt = optimizer(params, fixed(params) + 2000, retier_every=3, log_path=path)
        for step in range(7):
            step_with(opt, params, gradients(step))
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 3, 6]

    def test_equal_runs_have_equal_plans_and_parameters(self):
        results = []
        for _ in range(2):
            params = parameters()
            opt = optimizer(params, fixed(params) + 12_000, retier_every=2, state_bits=4)
            for step in range(8):
                step_with(opt, params, gradients(step, {"large": 10.0 ** (step % 3)}))
            results.append((opt.tiers(), everything(opt, params)))
        assert results[0][0] == results[1][0]
        assert_same(results[0][1], results[1][1])

    def test_the_log_says_what_moved_and_what_is_gated(self, tmp_path):
        path = tmp_path / "tiers.jsonl"
        params, opt = self.quiet_and_loud(log_path=path)
        for step in range(20):
            step_with(opt, params, gradients(step, {"other": 100.0 if step > 10 else 1.0}))
        opt.retier()
        first, last = map(json.loads, path.read_text().splitlines())
        assert first["step"] == 0
        assert {t["name"] for t in first["transitions"]} == set(SHAPES)
        assert (last["step"], last["budget"]) == (20, opt._budget)
        assert last["bytes"] == state_bytes(opt) <= last["budget"]
        assert sum(last["tensors"]) == len(SHAPES)
        promoted = next(t for t in last["transitions"] if t["name"] == "other")
        assert (promoted["from"], promoted["to"]) == (1, 2)
        assert promoted["bytes"] == MOMENTS["other"]
        # The only one whose gradient is larger than it used to be, but for the noise of a sample.
        assert GATE_FLOOR <= last["gates"].pop("other") < 0.7
        assert all(
            gate > 0.7 for name, gate in last["gates"].items() if name in ("middle", "large")
        )

    def test_tensors_without_names_are_called_by_group_and_place(self):
        a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        opt = Cosmic([{"params": [a]}, {"params": [b]}])
        a.grad, b.grad = torch.ones(3), torch.ones(3)
        opt.step()
        assert list(opt.tiers()) == ["0.0", "1.0"]


class TestGates:
    @pytest.mark.parametrize("extra", [0, 4 * len(SHAPES), 10**9])
    def test_a_gradient_that_grows_is_damped_and_one_that_falls_is_not(self, extra):
        steps = {}
        for change in (1.0, 1000.0, 0.001):
            params = parameters()
            opt = optimizer(params, fixed(params) + extra, betas=(0.0, 0.0))
            same = gradients(0)
            for _ in range(20):
                step_with(opt, params, same)
            before = params["large"].detach().clone()
            step_with(opt, params, {name: change * g for name, g in same.items()})
            steps[change] = (params["large"].detach() - before).abs().mean().item()
        assert steps[0.001] == pytest.approx(steps[1.0], rel=1e-4)
        # The fast average takes in a tenth (a little more while it is young) of at most ten times
        # the slow one, the slow one about a twentieth: the gate is 1.45 / 1.97.
        assert 0.6 < steps[1000.0] / steps[1.0] < 0.85


@pytest.mark.parametrize("extra", [0, 16, 12_000, 10**9])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_bad_gradient_leaves_everything_bit_for_bit(value, extra):
    params = parameters()
    opt = optimizer(params, fixed(params) + extra, state_bits=8, retier_every=None)
    bad = gradients(5)
    bad["large"][3, 4] = value
    start = {name: p.detach().clone() for name, p in params.items()}
    step_with(opt, params, bad)  # before anything was learnt
    for name, p in params.items():
        assert torch.equal(p.detach(), start[name])
    step_with(opt, params, gradients(0))
    before = everything(opt, params)
    step_with(opt, params, bad)
    assert_same(everything(opt, params), before)
    step_with(opt, params, gradients(1))
    assert all(torch.isfinite(p).all() for p in params.values())
    assert opt.telemetry()["skipped_total"] == 2


@pytest.mark.parametrize("bad", [None, {}, {"state": {0: 5}, "param_groups": [{"params": [0]}]}])
def test_what_is_no_state_is_refused(bad):
    opt = optimizer(parameters(), "1GB")
    with pytest.raises(ValueError, match=r"only what state_dict\(\) gave can be loaded"):
        opt.load_state_dict(bad)


def test_a_run_goes_on_under_a_smaller_budget():
    params = parameters()
    opt = optimizer(params, "1GB")
    step_with(opt, params, gradients(0))
    saved, small = copy.deepcopy(opt.state_dict()), fixed(params) + 8_000
    smaller = optimizer(params, small)
    with pytest.raises(ValueError, match=rf"then call retier\(state_budget={small}\)"):
        smaller.load_state_dict(saved)
    enough = optimizer(params, "1GB")
    enough.load_state_dict(saved)
    before = enough.tiers()
    with pytest.raises(ValueError, match="state_budget must be at least"):
        enough.retier(state_budget=10)
    assert enough.tiers() == before
    assert enough.retier(state_budget=small)["budget"] == small
    assert state_bytes(enough) <= small
    step_with(enough, params, gradients(1))
    smaller.load_state_dict(enough.state_dict())
    assert smaller.tiers() == enough.tiers() != before


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_stopped(bits):
    def make(params):
        return optimizer(params, fixed(params) + 30_000, retier_every=3, state_bits=bits)

    params = parameters()
    opt = make(params)
    sizes = [{"large": 10.0 ** (step % 3), "middle": 3.0} for step in range(10)]
    for step in range(5):
        step_with(opt, params, gradients(step, sizes[step]))
    file = io.BytesIO()
    torch.save({"params": {n: p.data for n, p in params.items()}, "opt": opt.state_dict()}, file)
    for step in range(5, 10):
        step_with(opt, params, gradients(step, sizes[step]))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = {name: nn.Parameter(value) for name, value in saved["params"].items()}
    other = make(others)
    other.load_state_dict(saved["opt"])
    for step in range(5, 10):
        step_with(other, others, gradients(step, sizes[step]))
    assert other.tiers() == opt.tiers()
    assert_same(everything(other, others), everything(opt, params))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 5))


def train(model, opt, steps):
    for step in range(steps):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        loss = (model(x) - x[:, :5].sin()).square().mean()
        loss.backward()
        opt.step(loss=loss)
    return loss.item()


@pytest.mark.parametrize("extra", [0, 10**9])
def test_released_gradients_give_the_parameters_of_ordinary_steps(extra):
    models = [net(), net()]
    plans = []
    for model, release in zip(models, (False, True), strict=True):
        params = dict(model.named_parameters())
        opt = optimizer(params, fixed(params) + extra, retier_every=20)
        if release:
            opt.register_hooks()
        train(model, opt, 50)
        assert release == all(p.grad is None for p in model.parameters())
        plans.append(opt.tiers())
    assert plans[0] == plans[1]
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=50 * 2.0**-22)


def test_a_copy_goes_on_as_the_original():
    model = net()
    opt = Cosmic(model.parameters(), state_budget="5KB", retier_every=2)
    train(model, opt, 3)
    other_model, other = copy.deepcopy((model, opt))
    for each in ((model, opt), (other_model, other)):
        train(*each, 3)
    for ours, theirs in zip(other_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_scaled_gradients_are_those_of_a_run_without_a_scaler():
    models = trained_with_and_without_scaler(
        net, lambda m: Cosmic(m.parameters(), state_budget="5KB", retier_every=2)
    )
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_reads_no_value_on_the_host():
    # A tensor on meta has no values: whoever asks for one is refused.
    with torch.device("meta"):
        params = {name: nn.Parameter(torch.empty(shape)) for name, shape in SHAPES.items()}
    opt = optimizer(params, "20KB", state_bits=4)
    for _ in range(2):
        for p in params.values():
            p.grad = torch.empty_like(p)
        opt.step()
    assert {0, 1, 2} >= set(opt.tiers().values()) >= {1, 2}


@pytest.mark.slow
def test_it_learns_at_every_budget():
    for extra in (0, 2_000, 10**9):
        model = net()
        params = dict(model.named_parameters())
        first = train(model, optimizer(params, "1MB", lr=0.0), 1)
        opt = optimizer(params, fixed(params) + extra, lr=2e-3)
        assert train(model, opt, 150) < first / 3


def test_an_estimate_leaves_the_log_alone(tmp_path):
    path = tmp_path / "tiers.jsonl"
    estimate_memory(net(), lambda params: Cosmic(params, log_path=path, retier_every=1))
    assert not path.exists()


def test_a_newcomer_in_a_later_group_may_take_from_an_earlier_one():
    a, b = nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(100))
    opt = Cosmic([{"params": [a]}, {"params": [b]}], state_budget=1500, weight_decay=0.0)
    a.grad = torch.full((100,), 1e-3)
    b.requires_grad_(False)
    opt.step()
    assert opt.tiers() == {"0.0": 2}
    b.requires_grad_(True)
    a.grad, b.grad = torch.full((100,), 1e-3), torch.ones(100)
    before = a.detach().clone()
    opt.step()
    assert opt.tiers() == {"0.0": 1, "1.0": 2}
    assert state_bytes(opt) <= 1500
    # At tier 1 already in this step: alone there, it steps by its sign at 0.75 of the rate.
    torch.testing.assert_close(a.detach() - before, torch.full((100,), -0.75e-3 * SIGN_STEP))


def test_parameters_that_are_added_or_thawed_later_join_the_plan():
    a, b, c = (nn.Parameter(torch.zeros(5)) for _ in "abc")
    b.requires_grad_(False)
    opt = Cosmic([("a", a), ("b", b)], state_budget="5KB")
    a.grad = torch.ones(5)
    opt.step()
    assert list(opt.tiers()) == ["a"]
    b.requires_grad_(True)
    opt.add_param_group({"params": [("c", c)]})
    a.grad = b.grad = c.grad = torch.ones(5)
    opt.step()
    assert opt.tiers() == {"a": 2, "b": 2, "c": 2}
    torch.testing.assert_close(b.detach(), c.detach())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state_budget": "some"}, ValueError, "state_budget must be a size in bytes, got 'some'"),
        ({"state_budget": 1.5}, TypeError, "state_budget must be a size in bytes, got 1.5"),
        ({"state_bits": 5}, ValueError, "state_bits must be 4, 8, 16 or 32, got 5"),
        ({"retier_every": 0}, ValueError, "retier_every must be a whole number >= 1, got 0"),
        ({"hysteresis": -1.0}, ValueError, r"hysteresis must be in \[0, infinity\), got -1.0"),
        ({"lr": -1.0}, ValueError, r"lr must be in \[0, infinity\), got -1.0"),
    ],
)
def test_bad_arguments_are_named_with_rule_value_and_remedy(options, error, message):
    with pytest.raises(error, match=message):
        Cosmic([nn.Parameter(torch.ones(2))], **options)
