"""What self-driving obeys, what it says, and what it can be put around, in both frameworks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import cruxy_optax
from cruxy_control import RUN_PHASES, Meta3, SelfDriving, Signals, explain
from cruxy_control.formulas.averaging import averaging_orders
from cruxy_control.self_driving import begin_cooldown
from cruxy_control.usual import USUAL, WEIGHT_DECAY, usual_law
from cruxy_optax._states import direction_kind
from cruxy_torch import CruxyOptimizer, Direction, Orthogonal, SignBlend

ONE = np.float32(1.0)


def stepped(law, state, alignment, limit=1.0, base=1.0):
    signals = Signals(
        *(ONE, ONE, ONE), *map(np.float32, (alignment, limit, base)), momentum_ratio=ONE / 4
    )
    return law.step(state, signals, xp=np)


def started(law):
    return law.init(np.float32(0.0), xp=np)


def searched(law):
    """The state after the search, at the set point all along."""
    state = started(law)
    for _ in range(185):
        state, _ = stepped(law, state, law.set_point)
    return state


class TestSchedule:
    def test_what_a_schedule_takes_teaches_the_law_nothing_once_the_search_is_over(self):
        law = SelfDriving()
        state = searched(law)
        for base in (1.0, 1.0, 0.9, 0.81):
            state, controls = stepped(law, state, -0.2, base=base)
        found = controls.meta_scale
        assert found > 1.0
        for base in (0.79, 0.5, 0.1, 0.0):
            state, controls = stepped(law, state, 0.9, limit=float(base > 0.0), base=base)
            assert controls.meta_scale == found
            assert controls.schedule_scale == pytest.approx(base, rel=1e-6)

    def test_it_learns_again_where_the_schedule_rises(self):
        law = SelfDriving()
        state = searched(law)
        for base in (1.0, 0.5, 0.5, 1.0):
            state, controls = stepped(law, state, 0.5, base=base)
        before = controls.meta_scale
        assert stepped(law, state, 0.5, base=1.2)[1].meta_scale > before

    def test_in_the_search_the_law_corrects_what_a_schedule_does(self):
        law = SelfDriving()
        state, _ = stepped(law, started(law), 0.5, base=1.0)
        state, controls = stepped(law, state, 0.5, base=0.5)
        assert stepped(law, state, 0.5, base=0.25)[1].meta_scale > controls.meta_scale

    def test_a_law_may_work_against_every_schedule(self):
        law = SelfDriving(schedule_share=0.0)
        state, _ = stepped(law, searched(law), 0.5, base=1.0)
        state, controls = stepped(law, state, 0.5, base=0.1)
        assert stepped(law, state, 0.5, base=0.01)[1].meta_scale > controls.meta_scale

    def test_who_says_no_base_rate_has_no_schedule(self):
        law = SelfDriving()
        signals = Signals(ONE, ONE, ONE, ONE / 2, ONE)
        assert law.step(started(law), signals, xp=np)[1].schedule_scale == 1.0

    def test_both_frameworks_end_a_run_by_a_schedule_alike(self):
        steps, start = 250, np.array([1.0, -2.0, 3.0], np.float32)
        schedule = optax.linear_schedule(0.01, 0.0, steps)
        tx = cruxy_optax.self_driving(schedule, weight_decay=0.0)
        params = jnp.asarray(start)
        state, shown = tx.init(params), []
        update = jax.jit(tx.update)
        grads = np.random.default_rng(0).normal(0.3, 1.0, (steps, 3)).astype(np.float32)
        for grad in grads:
            updates, state = update(jnp.asarray(grad), state, params)
            params = optax.apply_updates(params, updates)
            shown.append(jax.device_get(cruxy_optax.telemetry(state)))
        x = torch.nn.Parameter(torch.tensor(start))
        optimizer = CruxyOptimizer([x], lr=0.01, mode="self_driving", weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
        for step in range(steps):
            x.grad = torch.tensor(grads[step])
            optimizer.step()
            scheduler.step()
            ours = optimizer.telemetry()
            for name in ("learning_rate", "schedule_scale", "limit_scale", "momentum_ratio"):
                assert ours[name] == pytest.approx(float(shown[step][name]), rel=1e-3, nan_ok=True)
        np.testing.assert_allclose(x.detach(), params, rtol=1e-4)
        rates = [float(values["learning_rate"]) for values in shown[185:]]
        falls = [later / earlier for earlier, later in itertools.pairwise(rates)]
        wanted = [(steps - s - 1) / (steps - s) for s in range(185, steps - 1)]
        assert falls == pytest.approx(wanted, rel=1e-4)

    def test_under_a_schedule_muon_is_pulled_in_both_frameworks_until_the_rate_falls(self):
        rates = [1e-3] * 4 + [5e-4] * 4
        tx = cruxy_optax.self_driving_muon(lambda step: jnp.array(rates)[step], weight_decay=0.0)
        params = {"mlp": {"up": {"kernel": jnp.eye(4)}}}
        state, update = tx.init(params), jax.jit(tx.update)
        kernel = torch.nn.Parameter(torch.eye(4))
        groups = [{"params": [kernel], "role": "mlp.up", "lr": rates[0], "weight_decay": 0.0}]
        optimizer = CruxyOptimizer(groups, mode="self_driving", direction="muon")
        drawn = np.random.default_rng(0)
        for count, rate in enumerate(rates):
            grad = drawn.normal(size=(4, 4)).astype(np.float32)
            grads = {"mlp": {"up": {"kernel": jnp.asarray(grad.T)}}}
            mean = cruxy_optax.averaged_params(state, params)["mlp"]["up"]["kernel"]
            updates, state = update(grads, state, params, value=jnp.float32(1.0))
            params = optax.apply_updates(params, updates)
            optimizer.param_groups[0]["lr"], kernel.grad = rate, torch.tensor(grad)
            optimizer.step(loss=1.0)
            ours = params["mlp"]["up"]["kernel"]
            np.testing.assert_allclose(kernel.detach().T, ours, atol=1e-5)
            falls = np.bool_(count > rates.index(5e-4))  # the step after it has fallen
            weight, _ = averaging_orders(count, 2.0, 0.7, falls, xp=np)
            wanted = mean + weight * (ours - mean)
            found = cruxy_optax.averaged_params(state, params)["mlp"]["up"]["kernel"]
            np.testing.assert_allclose(found, wanted, atol=1e-6)

    def test_what_the_limit_left_before_is_told_though_the_next_is_written_over_it(self):
        law, one = SelfDriving(), torch.ones(())
        kept = torch.tensor(0.5)
        state = law.init(torch.zeros(()), xp=torch)
        _, controls = law.step(state, Signals(*(one, one, one), one / 2, kept, one), xp=torch)
        kept.fill_(0.25)
        assert controls.limit_scale == 0.5


class TestLimitThatYields:
    def test_it_gives_way_by_the_count_of_steps_that_nothing_opposed(self):
        law, count = SelfDriving(limit_yield=20.0), 0.0
        state = started(law)
        seen = [(0.5, 0.5), (0.5, 0.5), (0.5, 1.0), (-0.9, 0.5), (-0.9, 0.5), (-0.9, 0.3)]
        average = weight = 0.0
        for alignment, limit in seen:
            state, controls = stepped(law, state, alignment, limit=limit)
            average, weight = 0.9 * average + 0.1 * alignment, 0.9 * weight + 0.1
            binds = limit < 1.0 and average / weight > 0.0
            count = count + 1.0 if binds else 0.95 * count
            assert controls.limit_factor == pytest.approx((1.0 + count / 20.0) ** -0.5, rel=1e-6)

    @pytest.mark.parametrize(("kind", "factor"), [("adam", 0.845), ("lion", 1.0), ("muon", 1.0)])
    def test_by_default_only_that_of_adam_does(self, kind, factor):
        law = usual_law(kind, ends=False)
        state = started(law)
        for _ in range(20):
            state, controls = stepped(law, state, 0.9, limit=0.1)
        assert controls.limit_factor == pytest.approx(factor, abs=1e-3)

    def test_a_rate_that_falls_leaves_the_count_as_it_is(self):
        law = SelfDriving(total_steps=50, limit_yield=10.0)
        state = started(law)
        for _ in range(10):
            state, _ = stepped(law, state, 0.9, limit=0.5)
        before = state.hold.resisted
        for _ in range(20):
            state, _ = stepped(law, state, 0.9, limit=0.5)
        assert before == state.hold.resisted == 10.0

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
    def test_what_is_no_count_is_refused(self, value):
        with pytest.raises(ValueError, match=r"limit_yield must be .*use 50"):
            SelfDriving(limit_yield=value)

    def test_both_frameworks_lower_the_limits_of_all_tensors(self):
        law = SelfDriving(limit_yield=1.0)
        tx = cruxy_optax.self_driving(10.0, weight_decay=0.0, law=law)
        params = jnp.array([2.0, 2.0])
        state = tx.init(params)
        x = torch.nn.Parameter(torch.tensor([2.0, 2.0]))
        optimizer = CruxyOptimizer([x], lr=10.0, mode="self_driving", law=law, weight_decay=0.0)
        moved = []
        for _ in range(6):
            updates, state = tx.update(jnp.ones(2), state, params)
            x.grad, before = torch.ones(2), x.detach().clone()
            optimizer.step()
            np.testing.assert_allclose(x.detach() - before, updates, rtol=1e-4)
            factor = float(cruxy_optax.telemetry(state)["limit_factor"])
            moved.append((factor, float(-updates[0]) / float(params[0])))
            params = optax.apply_updates(params, updates)
        assert moved[-1][0] < 0.5
        for factor, share in moved[1:]:
            assert share == pytest.approx(0.1 * factor, rel=0.02)


def driven_values(**changes):
    values = {
        "step": 40, "skipped_total": 0, "skipped_in_a_row": 0, "ok": True, "learning_rate": 0.01,
        "run_phase": 1.0, "limit_scale": 1.0, "schedule_scale": 1.0, "alignment": -0.2,
        "limited_steps": 0.0, "limit_factor": 1.0, "momentum_ratio": 0.12, "beta1": 0.9,
        "clip_scale": 1.0, "grad_norm": 2.0,
    }  # fmt: skip
    return values | changes


class TestExplain:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({}, "The law sets the rate: gradients oppose the steps a little (alignment -0.20)"),
            ({}, "found and followed (step 40, rate 0.01)"),
            ({}, "0.12 times as long as the gradient; it would be 0.23"),
            ({"run_phase": 0.0}, "The rate is still looked for"),
            ({"run_phase": 2.0}, "the rate falls to 0"),
            ({"run_phase": 3.0}, "The run has ended"),
            (
                {"limit_scale": 0.5, "limited_steps": 7.0, "alignment": 0.3},
                "The relative limit, not the law, sets the rate of every tensor and has for 7 "
                "steps: gradients do not oppose the steps (alignment 0.30)",
            ),
            ({"limit_scale": 0.5, "limit_factor": 0.6}, "limit (at 0.60 of its value)"),
            ({"schedule_scale": 0.25}, "The schedule has left 0.25 of the highest rate"),
            ({"limit_scale": 0.0}, "The rate that was set is 0"),
            ({"ok": False, "skipped_in_a_row": 2, "skipped_total": 3}, "2 in a row, 3 in all"),
            ({"clip_scale": 0.5}, "The gradient, 2 long, was clipped to 0.5 of that."),
        ],
    )
    def test_it_says_what_binds_and_where_the_run_is(self, changes, text):
        assert text in explain(driven_values(**changes))

    @pytest.mark.parametrize(
        ("left", "phase", "binds"),
        [
            (0.9, 1.0, ". The law sets the rate"),  # it is not obeyed there
            (0.5, 1.0, ". Where it is not, the law sets the rate"),  # as with schedule_share=0.0
            (0.5, 2.0, ". The momentum"),
        ],
    )
    def test_of_a_schedule_it_says_when_it_is_obeyed_and_what_binds(self, left, phase, binds):
        text = explain(driven_values(schedule_scale=left, run_phase=phase))
        rule = "below the law's schedule_share of it, 0.8 unless you have set another, it is obeyed"
        assert f"The schedule has left {left:.2f} of the highest rate that was set; {rule}" in text
        assert rule + binds in text
        limited = explain(driven_values(schedule_scale=left, run_phase=phase, limit_scale=0.5))
        assert "The relative limit, not the law, sets the rate" in limited

    def test_a_ratio_that_is_not_known_is_not_said(self):
        for ratio in (float("nan"), float("inf")):
            assert "momentum" not in explain(driven_values(momentum_ratio=ratio))

    def test_a_state_is_explained_in_jax_and_an_optimizer_in_torch(self):
        tx, params = cruxy_optax.self_driving(100.0), jnp.ones(3)
        state = tx.init(params)
        assert cruxy_optax.explain(state) == "No step was taken yet."
        x = torch.nn.Parameter(torch.ones(3))
        optimizer = CruxyOptimizer([x], lr=100.0, mode="self_driving")
        for _ in range(3):
            _, state = tx.update(params, state, params)
            x.grad = torch.ones(3)
            optimizer.step()
        for text in (cruxy_optax.explain(state), optimizer.explain()):
            assert "still looked for (step 3" in text
            assert "The relative limit (at 0.98 of its value), not the law" in text

    def test_of_other_laws_it_names_the_factors(self):
        tx = cruxy_optax.stabilize(cruxy_optax.scale_by_meta_learning_rate(0.1), law=Meta3())
        _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
        assert "The rate of step 1 is 0.1 (slow factor 1" in cruxy_optax.explain(state)

    def test_several_controllers_have_a_line_each(self):
        both = optax.partition(
            {"a": cruxy_optax.meta3(0.1), "b": cruxy_optax.meta3(0.2)}, {"a": "a", "b": "b"}
        )
        params = {"a": jnp.ones(2), "b": jnp.ones(2)}
        _, state = both.update(params, both.init(params), params)
        assert len(cruxy_optax.explain(state).splitlines()) == 2


def phases(law, steps):
    state, seen = started(law), []
    for _ in range(steps):
        state, controls = stepped(law, state, -0.25)
        seen.append(RUN_PHASES[int(controls.run_phase)])
    return seen


@pytest.mark.parametrize(("total", "begun"), [(200, None), (None, 30), (20, None)])
def test_the_limit_is_doubled_where_an_end_is_known_but_not_at_once(total, begun):
    law = SelfDriving(total_steps=total, limit_yield=None)
    state, seen = started(law), []
    for step in range(40):
        if step == begun:
            state = begin_cooldown(state, 100, xp=np)
        state, controls = stepped(law, state, -0.25)
        seen.append(float(controls.limit_factor))
    # The controls are read from the state after the step.
    first = {200: 19, None: 30, 20: 4}[total]
    assert seen == [1.0] * first + [2.0] * (40 - first)


def test_phases_of_a_run_whose_end_is_known_and_of_one_without():
    ended = phases(SelfDriving(total_steps=10), 12)
    assert ended == ["search"] * 2 + ["cooldown"] * 8 + ["end"] * 2
    endless = phases(SelfDriving(), 400)
    assert (endless[0], endless[-1]) == ("search", "trunk")
    assert endless == sorted(endless)


DIRECTIONS = {
    "adam": optax.scale_by_adam(),
    "trace": optax.chain(optax.trace(0.9), optax.scale_by_rms()),
    "lion": optax.scale_by_lion(),
    "blend": optax.chain(
        cruxy_optax.scale_by_controlled_momentum(0.9, 0.95), cruxy_optax.blend_sign(0.2)
    ),
    "coded": cruxy_optax.quantize_state(cruxy_optax.scale_by_controlled_lion(), bits=8),
    "orthogonal": optax.chain(
        cruxy_optax.scale_by_controlled_momentum(0.9, 0.95), cruxy_optax.orthogonalize_updates()
    ),
    "by role": optax.partition(
        {True: optax.scale_by_adam(), False: cruxy_optax.scale_by_controlled_muon()},
        cruxy_optax.role_mask("embedding", "head"),
    ),
}
KINDS = {"lion": "lion", "blend": "lion", "coded": "lion", "orthogonal": "muon", "by role": "muon"}


class TestDirections:
    @pytest.mark.parametrize("name", DIRECTIONS)
    def test_the_law_is_put_around_any_direction_with_a_first_moment(self, name):
        def loss(params):
            return jnp.sum((params["kernel"] - 2.0 * jnp.eye(4)) ** 2)

        tx = cruxy_optax.self_driving(direction=DIRECTIONS[name], weight_decay=0.0)
        params = {"kernel": jnp.eye(4) + 0.1}
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state

        for _ in range(250):
            params, state = step(params, state)
        assert loss(cruxy_optax.averaged_params(state, params)) < 0.05 * loss(
            {"kernel": jnp.eye(4)}
        )

    @pytest.mark.parametrize("name", DIRECTIONS)
    def test_limit_decay_and_set_point_come_with_its_kind(self, name):
        kind = KINDS.get(name, "adam")
        params = {"kernel": 2.0 * jnp.ones((4, 4)), "scale": jnp.ones(4)}
        assert direction_kind(DIRECTIONS[name].init(params)) == kind
        usual = cruxy_optax.self_driving(1e3, direction=DIRECTIONS[name])
        said = cruxy_optax.self_driving(
            1e3,
            direction=DIRECTIONS[name],
            weight_decay=WEIGHT_DECAY,
            mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
            relative_limit=USUAL[kind].relative_limit,
            averaging=2.0 if kind == "muon" else 16.0,
            interpolation=USUAL[kind].interpolation,
            law=SelfDriving(
                set_point=-0.07 if kind == "muon" else -0.25, limit_yield=USUAL[kind].limit_yield
            ),
        )
        ends = []
        for tx in (usual, said):
            own, state = params, tx.init(params)
            for grads in (params, jax.tree.map(lambda x: -x, params)):
                updates, state = tx.update(grads, state, own)
                own = optax.apply_updates(own, updates)
            ends.append((own, cruxy_optax.telemetry(state)["meta_scale"]))
        jax.tree.map(np.testing.assert_array_equal, *ends)

    def test_a_known_end_moves_the_set_point_of_muon(self):
        assert usual_law("muon", ends=True).set_point == -0.2
        assert usual_law("muon", ends=False).set_point == -0.15

    def test_what_is_no_direction_is_refused(self):
        with pytest.raises(TypeError, match="direction must be a gradient transformation, got 'x'"):
            cruxy_optax.self_driving(direction="x")
        with pytest.raises(ValueError, match="state_bits is an argument of Adam's direction"):
            cruxy_optax.self_driving(direction=optax.scale_by_lion(), state_bits=8)
        with pytest.raises(ValueError, match="inner keeps none"):
            cruxy_optax.self_driving(direction=optax.scale_by_sign()).init(jnp.ones(2))

    @pytest.mark.parametrize(
        ("direction", "kind"), [(Orthogonal(), "muon"), (SignBlend(), "lion"), (None, "adam")]
    )
    def test_in_torch_they_come_with_its_kind_too(self, direction, kind):
        x = torch.nn.Parameter(torch.ones(4, 4))
        optimizer = CruxyOptimizer([x], mode="self_driving", direction=direction)
        assert optimizer.param_groups[0]["relative_limit"] == USUAL[kind].relative_limit
        pulled = USUAL[kind].interpolation > 0.0
        set_point = USUAL[kind].set_point_pulled if pulled else USUAL[kind].set_point
        assert optimizer._settings.law.set_point == set_point

    def test_in_torch_a_kind_that_is_none_is_refused(self):
        class Odd(Direction):
            moments, kind = ("exp_avg",), "odd"

        x = torch.nn.Parameter(torch.ones(2))
        with pytest.raises(
            ValueError, match="kind of Odd must be one of adam, lion, muon, got 'odd'"
        ):
            CruxyOptimizer([x], direction=Odd())
