"""The set point that follows the excess of the iterate over its average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import cruxy_optax
from cruxy_control import PlateauGuard, SelfDriving, Signals, progress
from cruxy_control.signals import NOT_KNOWN
from cruxy_control.usual import usual_law
from cruxy_optax import exact, stabilize, telemetry
from cruxy_optax._sensors.measure import excess as excess_of
from cruxy_torch import CruxyOptimizer, param_groups
from cruxy_torch import exact as torch_exact
from cruxy_torch._kept import Rounded
from cruxy_torch._memory.state import kept_average
from cruxy_torch._sensors import measure

ONE = np.float32(1.0)
ZERO = np.float32(0.0)


def after(losses, excess, xp=np):
    """The averages after these losses, with one excess all along."""
    state = progress.no_steps(xp.zeros((), dtype=xp.float32), xp=xp)
    for loss in losses:
        loss = xp.asarray(loss, dtype=xp.float32)
        excess = xp.asarray(excess, dtype=xp.float32)
        state = progress.advance(state, excess, loss, excess * 0 + 1, excess * 0 + 1, xp=xp)
    return state


def falling(by, steps=3000, start=50.0):
    """Losses that fall by so much with every factor of e in the steps."""
    return start - by * np.log(np.arange(1, steps + 1))


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, -0.3), (0.25, -0.15), (0.5, 0.0), (0.75, 0.15), (1.2, 0.3)]
)
def test_share_is_the_excess_over_what_the_loss_falls_by_in_a_factor_of_e(share, expected):
    state = after(falling(0.4), 0.4 * share)
    point = progress.adapted(state, -0.07, 0.5, 0.3, xp=np)
    # The weight is 1 less the excess over the loss, which is 47 here.
    weight = 1.0 - 0.4 * share / 46.8
    assert point == pytest.approx(weight * expected - (1.0 - weight) * 0.07, abs=0.002)


def test_share_does_not_depend_on_where_the_loss_began():
    high = np.concatenate([[1e3], falling(0.4)[1:]])
    points = [
        progress.adapted(after(losses, 0.1), -0.07, 0.5, 0.3, xp=np)
        for losses in (falling(0.4), high)
    ]
    assert points[0] == pytest.approx(points[1], abs=0.01)


@pytest.mark.parametrize(("excess", "expected"), [(0.1, 0.3), (-0.1, -0.3)])
def test_where_the_loss_does_not_fall_the_sign_of_the_excess_counts(excess, expected):
    state = after(falling(-0.1), excess)
    assert progress.adapted(state, -0.07, 0.5, 0.3, xp=np) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(("excess", "weight"), [(0.001, 0.9), (0.005, 0.5), (0.02, 0.0)])
def test_on_data_that_are_fitted_the_set_point_stays(excess, weight):
    losses = np.full(500, 0.01)
    point = progress.adapted(after(losses, excess), -0.07, 0.5, 0.3, xp=np)
    assert point == pytest.approx(weight * 0.3 - (1.0 - weight) * 0.07, abs=0.002)


def test_a_loss_below_0_moves_nothing():
    point = progress.adapted(after([-1.0] * 50, 0.1), -0.07, 0.5, 0.3, xp=np)
    assert point == pytest.approx(-0.07)


def test_all_namespaces_agree():
    losses = falling(0.4, steps=60) + np.sin(np.arange(60.0))
    points = [
        float(progress.adapted(after(losses, 0.3, xp), -0.07, 0.5, 0.3, xp=xp))
        for xp in (np, jnp, torch)
    ]
    assert points[0] != pytest.approx(-0.07, abs=0.01)
    np.testing.assert_allclose(points, points[0], rtol=1e-5)


def set_points(law, excesses, losses):
    """The set point of every step."""
    state, found = law.init(ZERO, xp=np), []
    for excess, loss in zip(excesses, losses, strict=True):
        signals = Signals(ONE, ONE, np.float32(loss), ZERO, ONE, ONE, excess=np.float32(excess))
        state, controls = law.step(state, signals, xp=np)
        found.append(float(controls.set_point))
    return found


def test_set_point_is_fixed_at_first_and_where_something_is_not_known():
    law = usual_law("muon", ends=False, interpolation=0.7)
    excesses, losses = np.full(60, 0.1), np.full(60, 5.0)
    losses[40], excesses[50] = np.nan, NOT_KNOWN
    found = set_points(law, excesses, losses)
    fixed = [step for step, point in enumerate(found) if point == np.float32(-0.07)]
    assert fixed == [*range(progress.SETTLED - 1), 40, 50]
    assert found[30] == pytest.approx(0.98 * 0.6 - 0.02 * 0.07, abs=1e-6)


def test_law_steers_to_the_set_point_that_it_shows():
    law = SelfDriving(set_point=-0.07, excess_share=0.5, gain_time=1e9)
    state = law.init(ZERO, xp=np)
    for loss in falling(0.4, steps=200):
        before = state.scale
        signals = Signals(ONE, ONE, np.float32(loss), ONE * 0.1, ONE, ONE, excess=ONE * 0.21)
        state, controls = law.step(state, signals, xp=np)
        assert state.scale == pytest.approx(before * np.exp(0.1 - controls.set_point), rel=1e-5)


def test_what_moves_nothing_is_no_progress():
    law = SelfDriving(excess_share=0.5)
    state = law.init(ZERO, xp=np)
    still = Signals(ONE, ONE, ONE, ZERO, ZERO, ONE, excess=ONE)
    assert law.step(state, still, xp=np)[0].progress == state.progress
    damaged = still._replace(grad_norm=np.float32(np.nan), limit_scale=ONE)
    assert law.step(state, damaged, xp=np)[0].progress == state.progress


@pytest.mark.parametrize(("factor", "loss"), [(1e3, 1.0), (1e30, 1.0), (1.0, 1e4), (1.0, 1e30)])
def test_one_bad_batch_does_not_steer(factor, loss):
    law = SelfDriving(excess_share=0.5)
    losses, points = falling(0.4, steps=600, start=5.0), []
    for strikes in (False, True):
        state = law.init(ZERO, xp=np)
        for step, fine in enumerate(losses):
            hit = strikes and step == 400
            size = np.float32(factor) if hit else ONE
            signals = Signals(
                size, size, np.float32(loss * 5.0 if hit else fine), ZERO, ONE, ONE,
                excess=np.float32(0.2) * size,
            )  # fmt: skip
            state, controls = law.step(state, signals, xp=np)
            points.append(controls.set_point)
    clean, struck = np.split(np.array(points), 2)
    np.testing.assert_array_equal(clean[:400], struck[:400])
    np.testing.assert_allclose(clean[440:], struck[440:], atol=0.12)
    assert abs(clean[-1]) < 0.03


def test_only_muon_whose_average_pulls_asks_for_it_by_itself():
    assert usual_law("muon", ends=False, interpolation=0.7).needs_excess
    assert usual_law("muon", ends=True, interpolation=0.7).needs_excess
    for kind, ends, pull in [("muon", True, 0.0), ("muon", False, 0.0), ("adam", False, 0.6)]:
        assert not usual_law(kind, ends=ends, interpolation=pull).needs_excess
    assert PlateauGuard(SelfDriving(excess_share=0.5)).needs_excess
    assert not PlateauGuard(SelfDriving()).needs_excess


# The sensor.


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jax_measures_the_gradient_along_the_way_from_the_average(bits, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": jax.random.normal(keys[0], (64, 80)).astype(dtype),
        "b": jax.random.normal(keys[1], (7,)).astype(dtype),
    }
    grads = jax.tree.map(
        lambda p, k: jax.random.normal(k, p.shape).astype(dtype),
        params,
        dict(zip("ab", keys[2:], strict=True)),
    )
    tx = cruxy_optax.average_iterates(2.0, bits)
    state = tx.init(params)
    steps = jax.tree.map(lambda g: (0.01 * g).astype(dtype), grads)
    _, state = tx.update(steps, state, params)
    _, state = tx.update(steps, state, params)
    means = jax.tree.leaves(state.iterate_average, is_leaf=lambda x: hasattr(x, "decode"))
    decoded = [
        m.decode(p) if hasattr(m, "decode") else m
        for m, p in zip(means, jax.tree.leaves(params), strict=True)
    ]
    expected = sum(
        np.sum(np.float64(g) * (np.float64(p) - np.float64(m)))
        for g, p, m in zip(jax.tree.leaves(grads), jax.tree.leaves(params), decoded, strict=True)
    )
    found = excess_of(grads, params, means)
    assert found.dtype == jnp.float32
    assert found == pytest.approx(expected, rel=1e-4)


def test_jax_leaves_out_what_has_no_average():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    law = SelfDriving(excess_share=0.5)
    average = optax.masked(cruxy_optax.average_iterates(0.0), {"a": True, "b": False})
    tx = stabilize(optax.chain(optax.trace(0.5), optax.scale(-1.0), average), law=law)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    excess = float(jnp.sum(params["a"] - cruxy_optax.averaged_params(state, params)["a"]))
    assert abs(excess) > 0.1
    _, state = tx.update({"a": jnp.ones(3), "b": jnp.ones(2)}, state, params, value=1.0)
    assert state.signals.excess == pytest.approx(excess, rel=1e-5)


def test_jax_takes_a_mask_of_a_whole_branch():
    params = {"a": {"w": jnp.ones(3)}, "b": {"v": jnp.ones(2), "w": jnp.ones(4)}}
    average = optax.masked(cruxy_optax.average_iterates(0.0), {"a": True, "b": False})
    tx = stabilize(optax.chain(optax.trace(0.5), average), law=SelfDriving(excess_share=0.5))
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params, value=1.0)
    excess = float(jnp.sum(params["a"]["w"] - cruxy_optax.averaged_params(state, params)["a"]["w"]))
    assert abs(excess) > 0.1
    _, state = tx.update(params, state, params, value=1.0)
    assert state.signals.excess == pytest.approx(excess, rel=1e-5)


def test_a_state_of_a_law_without_it_goes_on_with_the_fixed_set_point():
    state = SelfDriving().init(ZERO, xp=np)
    law = SelfDriving(set_point=-0.1, excess_share=0.5)
    signals = Signals(ONE, ONE, ONE, ZERO, ONE, ONE, excess=ONE)
    state, controls = law.step(state, signals, xp=np)
    assert controls.set_point == pytest.approx(-0.1)


def test_a_guard_around_the_law_hands_the_excess_on():
    law = PlateauGuard(SelfDriving(excess_share=0.5), patience=500)
    assert set_points(law, np.full(60, 0.1), np.full(60, 5.0))[-1] > 0.2


def test_jax_says_at_the_door_that_there_is_no_average():
    tx = stabilize(optax.chain(optax.trace(0.9)), law=SelfDriving(excess_share=0.5))
    with pytest.raises(ValueError, match="inner keeps none; put average_iterates"):
        tx.init({"a": jnp.ones(3)})


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, "rounded", 16, 8])
def test_torch_measures_the_gradient_along_the_way_from_the_average(kept):
    torch.manual_seed(0)
    dtype = kept if isinstance(kept, torch.dtype) else torch.float32
    dtype = torch.bfloat16 if kept == "rounded" else dtype
    bits = kept if isinstance(kept, int) else 32
    x = torch.nn.Parameter(torch.randn(64, 80).to(dtype))
    optimizer = CruxyOptimizer([x], mode="self_driving", average_bits=bits)
    for _ in range(3):
        x.grad = torch.randn_like(x)
        optimizer.step(loss=1.0)
    average = kept_average(x, optimizer.state[x], 0)
    with optimizer.averaged():
        mean = x.detach().double().clone()
    if dtype == torch.bfloat16:  # averaged() rounds what it shows
        mean = average.double()
    grad, scale = torch.randn_like(x), torch.tensor(0.5)
    param = Rounded(x.detach(), 0) if kept == "rounded" else x.detach()
    found = measure.excess([grad, grad], [(param, average), None], scale)
    expected = 0.5 * (grad.double() * (x.detach().double() - mean)).sum()
    torch.testing.assert_close(found, expected.float().reshape(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_torch_asks_the_law_with_it_on_every_path(path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    groups = param_groups(net, lr=1e-3, weight_decay=0.1)
    optimizer = CruxyOptimizer(groups, mode="self_driving", direction="muon", **path)
    shown = []
    for _ in range(60):
        batch = torch.randn(4, 8)
        loss = (net(batch) - batch - torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        shown.append(optimizer.telemetry()["set_point"])
    assert shown[:18] == [pytest.approx(-0.07)] * 18
    assert len(set(shown[20:])) > 30
    assert max(map(abs, shown)) <= 0.6001


@pytest.mark.parametrize("climbs", [True, False])
def test_torch_fixes_the_set_point_where_nothing_that_moves_is_averaged_or_it_climbs(climbs):
    x, y = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    law = SelfDriving(set_point=-0.1, excess_share=0.5)
    groups = [{"params": [x], "averaging": 4.0 if climbs else None}, {"params": [y]}]
    optimizer = CruxyOptimizer(groups, law=law, averaging=4.0, lr=1e-3, maximize=climbs)
    for _ in range(40):
        x.grad = torch.randn(3)
        optimizer.step(loss=1.0)
    assert optimizer.telemetry()["set_point"] == pytest.approx(-0.1)


def test_torch_says_at_the_door_that_there_is_no_average():
    x = torch.nn.Parameter(torch.ones(3))
    law = SelfDriving(excess_share=0.5)
    with pytest.raises(ValueError, match=r"excess_share=None .* keep an average with averaging=16"):
        CruxyOptimizer([x], law=law, averaging=None)
    assert CruxyOptimizer([x], law=law, averaging=16.0).telemetry()["step"] == 0


def test_exact_training_refuses_it():
    law = SelfDriving(excess_share=0.5)
    x = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="excess_share=None"):
        torch_exact.Controlled([x], law=law)
    with pytest.raises(ValueError, match="excess_share=None"):
        exact.controlled(0.1, law=law)


def test_an_end_that_is_told_before_the_first_step_is_as_one_told_at_once():
    def net():
        torch.manual_seed(0)
        return torch.nn.Linear(8, 8)

    def optimizer_of(net, **options):
        groups = param_groups(net, lr=1e-3, weight_decay=0.1)
        return CruxyOptimizer(groups, mode="self_driving", direction="muon", **options)

    late, at_once = optimizer_of(net()), optimizer_of(net(), total_steps=40)
    late.set_total_steps(40)
    assert late.state_dict()["param_groups"][0].keys() == (
        at_once.state_dict()["param_groups"][0].keys()
    )
    controllers = [o.param_groups[0]["controller"] for o in (late, at_once)]
    assert controllers[0].keys() == controllers[1].keys()
    assert "law.progress.early" in controllers[0]
    late.load_state_dict(at_once.state_dict())


def test_cooldown_begins_on_a_state_that_has_it():
    tx, params = cruxy_optax.self_driving_muon(), {"w": jnp.ones((4, 4))}
    state = cruxy_optax.cooldown(tx.init(params), steps=2)
    for _ in range(3):
        _, state = tx.update(params, state, params, value=1.0)
    assert telemetry(state)["learning_rate"] == 0.0


# What it is for.


def ends(law, noise, steps=1000):
    """The loss above the least one of the average on a regression with so much noise."""
    tx = cruxy_optax.self_driving_muon(law=law, averaging=2.0, interpolation=0.7, weight_decay=0.0)
    target = jax.random.normal(jax.random.key(1), (16, 16))
    params = {"w": jnp.zeros((16, 16))}

    def loss_fn(params, key):
        x, y = (
            jax.random.normal(key, (4, 16)),
            jax.random.normal(jax.random.fold_in(key, 1), (4, 16)),
        )
        return jnp.mean((x @ (params["w"] - target) - noise * y) ** 2)

    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, key)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), telemetry(state)["set_point"]

    keys = jax.random.split(jax.random.key(2), steps)
    (params, state), shown = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
        (params, tx.init(params))
    )
    error = cruxy_optax.averaged_params(state, params)["w"] - target
    return float(jnp.mean(error**2)), shown


def test_with_noise_the_set_point_rises_as_progress_ends_and_the_end_is_no_higher():
    law = usual_law("muon", ends=False, interpolation=0.7)
    moved, shown = ends(law, noise=4.0)
    fixed, _ = ends(dataclasses.replace(law, excess_share=None), noise=4.0)
    assert shown[20:200].mean() < -0.2
    assert shown[700:].mean() > 0.0
    assert moved < 1.02 * fixed
