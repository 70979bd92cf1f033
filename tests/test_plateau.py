"""`PlateauGuard`: when it acts, against a reference in float64, and that every path obeys it."""

import copy
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cruxy_optax
from cruxy_control import Meta3, PlateauGuard, SelfDriving, Signals, StabilityV1
from cruxy_control.controls import neutral

torch = pytest.importorskip("torch")

import cruxy_torch  # noqa: E402

NAMESPACES = {"numpy": np, "jax": jnp, "torch": torch}
ONE = np.float32(1.0)


def run(law, losses, norms=None, xp=np):
    """Every state and every order of a law over a stream of losses."""
    norms = np.ones(len(losses)) if norms is None else norms
    array = {np: np.float32, jnp: jnp.float32, torch: torch.tensor}[xp]
    step = jax.jit(lambda *a: law.step(*a, xp=jnp)) if xp is jnp else lambda *a: law.step(*a, xp=xp)
    state, states, orders = law.init(array(0.0), xp=xp), [], []
    with np.errstate(all="ignore"):
        for norm, loss in zip(norms, losses, strict=True):
            state, controls = step(state, Signals(array(norm), array(norm), array(loss)))
            states.append(state)
            orders.append(controls)
    return states, orders


def moved(orders):
    return np.array([(float(c.sign_weight), float(c.decay_scale)) for c in orders])


def rough_descent(steps=1500, seed=0):
    """Losses that fall, stand still, fall again; some missing, some steps not finite."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)
    level = 1.0 + np.exp(-t / 80) - 0.5 / (1 + np.exp(-(t - 900) / 60))
    losses = (level + 0.02 * rng.normal(size=steps)).astype(np.float32)
    losses[rng.random(steps) < 0.1] = np.nan
    norms = np.where(rng.random(steps) < 0.02, np.inf, 1.0)
    return losses, norms


def reference(law, losses, norms):
    """Both factors after each step, in float64 and with branches."""
    average = weight = 0.0
    best, count, level, rows = math.inf, 0, 1.0, []
    recovery = law.recovery or law.patience // 2
    for loss, norm in zip(losses, norms, strict=True):
        if np.isfinite(loss) and np.isfinite(norm):
            weight = law.loss_decay * weight + 1 - law.loss_decay
            average += (1 - law.loss_decay) / weight * (float(loss) - average)
            if weight < 0.5 or average < best - law.threshold * abs(best):
                best, count = average, 0
            else:
                count += 1
            level = 0.0 if count >= law.patience else min(1.0, level + 1 / recovery)
        rows.append((level, 1 - (1 - law.decay) * (1 - level)))
    return np.array(rows)


@pytest.mark.parametrize("name", NAMESPACES)
def test_both_factors_are_those_of_a_reference_in_float64(name):
    law, (losses, norms) = PlateauGuard(Meta3(), patience=60), rough_descent()
    _, orders = run(law, losses, norms, xp=NAMESPACES[name])
    wanted = reference(law, losses, norms)
    assert {0.0, 1.0} <= set(wanted[:, 0])
    assert np.any((wanted[:, 0] > 0) & (wanted[:, 0] < 1))
    # The ramp adds 30 times, each with a rounding of 2^-24.
    np.testing.assert_allclose(moved(orders), wanted, rtol=0, atol=40 * 2.0**-24)


def test_it_acts_after_patience_steps_and_leaves_over_half_as_many():
    law = PlateauGuard(Meta3(), patience=40)
    losses = [1.0] * 100 + [0.5] * 60
    _, orders = run(law, losses)
    signs = moved(orders)[:, 0]
    young = 13  # steps in which 1 - 0.95^t is below a half
    assert np.all(signs[: young + 39] == 1.0)
    assert np.all(signs[young + 39 : 100] == 0.0)
    np.testing.assert_allclose(signs[100:], np.minimum(np.arange(1, 61) / 20, 1.0), atol=1e-6)


def test_a_slow_descent_is_none_of_its_business():
    # The average follows 20 steps behind; each step is 1.5 thresholds.
    losses = 1.0 * (1 - 1.5e-4) ** np.arange(2000)
    _, orders = run(PlateauGuard(Meta3(), patience=20), losses)
    assert np.all(moved(orders) == 1.0)


def test_negative_losses_improve_downwards():
    _, orders = run(PlateauGuard(Meta3(), patience=20), -1.0 - 0.01 * np.arange(300))
    assert np.all(moved(orders) == 1.0)


def test_the_other_orders_are_those_of_the_wrapped_law():
    losses, norms = rough_descent(300)
    _, guarded = run(PlateauGuard(Meta3(), patience=20), losses, norms)
    _, plain = run(Meta3(), losses, norms)
    for got, want in zip(guarded, plain, strict=True):
        assert got._replace(sign_weight=ONE, decay_scale=ONE) == want


@pytest.mark.parametrize("loss", [np.nan, np.inf, 3.4028235e38])
def test_a_step_without_a_loss_leaves_the_guard_as_it_was_and_steps_the_law(loss):
    law = PlateauGuard(Meta3(), patience=20)
    states, _ = run(law, [1.0] * 50 + [0.5, loss])
    assert states[-1][1:] == states[-2][1:]
    assert states[-1].inner.step == states[-2].inner.step + 1


@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_a_step_that_is_skipped_leaves_everything_as_it_was(norm):
    law = PlateauGuard(Meta3(), patience=20)
    states, orders = run(law, [1.0] * 50 + [0.5], [1.0] * 50 + [norm])
    assert not orders[-1].ok
    assert jax.tree.all(jax.tree.map(np.array_equal, states[-1], states[-2]))


def test_losses_whose_difference_overflows_leave_it_as_it_was():
    states, _ = run(PlateauGuard(Meta3()), [3e38, -3e38, 3e38])
    assert all(np.isfinite(states[-1].loss))


def test_what_the_wrapped_law_needs_is_forwarded():
    guard = PlateauGuard(SelfDriving(gamma=1.7))
    assert (guard.gamma, guard.needs_alignment, guard.steers_decay) == (1.7, True, True)
    assert not PlateauGuard(Meta3()).needs_alignment


def test_a_guard_in_a_guard_multiplies():
    law = PlateauGuard(PlateauGuard(Meta3(), patience=20), patience=30, decay=0.5)
    _, orders = run(law, [1.0] * 100)
    np.testing.assert_allclose(moved(orders)[-1], (0.0, 0.05), atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"law": Meta3}, TypeError, "law must be an instance"),
        ({"patience": 0}, ValueError, "patience must be a whole number >= 1, got 0"),
        ({"threshold": -1.0}, ValueError, r"threshold must be in \[0, 1\), got -1.0"),
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\], got 1.5"),
        ({"recovery": 0}, ValueError, "recovery must be a whole number >= 1, got 0"),
        ({"loss_decay": 1.0}, ValueError, r"loss_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_constant_outside_its_range_raises(options, error, message):
    with pytest.raises(error, match=message):
        PlateauGuard(**{"law": Meta3(), **options})


# That everything obeys.


class FixedState(NamedTuple):
    """Nothing but what a law has to have."""

    nothing: Any


class Fixed:
    """A law that orders what it is given."""

    gamma = 2.0
    steers_decay = True

    def __init__(self, **orders):
        self.orders = orders

    def init(self, like, *, xp):
        return FixedState(xp.zeros_like(like, dtype=xp.float32))

    def step(self, state, signals, *, xp):
        controls = neutral(xp.isfinite(signals.grad_norm), xp=xp)
        moved = {name: controls.meta_scale * value for name, value in self.orders.items()}
        return state, controls._replace(**moved)


class Plain(Fixed):
    """One that leaves sign and decay alone."""

    steers_decay = False


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(size=shape), dtype=torch.float32) for shape in [(9, 7), (5,)]]


def trained(make, steps=12, released=False):
    """Parameters after some steps of an optimizer on a quadratic, and the optimizer."""
    params = [torch.nn.Parameter(p) for p in tensors()]
    optimizer = make(params)
    if released:
        optimizer.register_hooks()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(((p - goal) ** 2).sum() for p, goal in zip(params, tensors(1), strict=True))
        loss.backward()
        optimizer.step(loss=loss)
    return [p.detach().numpy() for p in params], optimizer


CRUXY = {
    "adam": {},
    "l2": {"decoupled_weight_decay": False},
    "lion": {"use_lion": True},
}
PATHS = {
    "native": {},
    "single": {"fused": False},
    "foreach": {"foreach": True},
    "compiled": {"compile": True},
}


@pytest.mark.parametrize("kind", CRUXY)
@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] * (p == "compiled")) for p in PATHS]
)
def test_every_path_of_pytorch_decays_by_the_coefficient_times_the_scale(path, kind):
    def run(law, decay):
        options = CRUXY[kind] | PATHS[path] | {"lr": 0.01, "law": law, "weight_decay": decay}
        return trained(lambda params: cruxy_torch.CruxyOptimizer(params, **options))[0]

    got, want = run(Fixed(decay_scale=0.25), 0.4), run(Plain(), 0.1)
    other = run(Plain(), 0.4)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(other, want, strict=True))
    for a, b in zip(got, want, strict=True):
        # A product and a sum round twice where one call rounds once: an ulp a step.
        np.testing.assert_allclose(a, b, rtol=0, atol=12 * 2.0**-22)


OTHERS = {"axiom": cruxy_torch.AXIOM, "cosmic": cruxy_torch.Cosmic}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_other_optimizers_of_pytorch_do_so_too(kind):
    def run(law, decay):
        return trained(lambda p: OTHERS[kind](p, lr=0.01, law=law, weight_decay=decay))[0]

    got, want = run(Fixed(decay_scale=0.25), 0.4), run(Plain(), 0.1)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=12 * 2.0**-22)


def test_with_released_gradients_the_scale_holds_for_the_step_after():
    def run(law, released, decays):
        params = [torch.nn.Parameter(p) for p in tensors()]
        optimizer = cruxy_torch.CruxyOptimizer(params, lr=0.01, law=law)
        if released:
            optimizer.register_hooks()
        for decay in decays:
            optimizer.param_groups[0]["weight_decay"] = decay
            optimizer.zero_grad()
            sum((p**2).sum() for p in params).backward()
            optimizer.step()
        return [p.detach().numpy() for p in params]

    got = run(Fixed(decay_scale=0.25), True, [0.4] * 6)
    want = run(Plain(), False, [0.4] + [0.1] * 5)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=6 * 2.0**-22)


def in_jax(make, steps=12):
    params = [jnp.asarray(p.numpy()) for p in tensors()]
    goals = [jnp.asarray(p.numpy()) for p in tensors(1)]
    tx = make()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss = sum(jnp.sum((p - goal) ** 2) for p, goal in zip(params, goals, strict=True))
        grads = [2 * (p - goal) for p, goal in zip(params, goals, strict=True)]
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


JAX = {
    "meta3": lambda **o: cruxy_optax.meta3(0.01, **o),
    "meta_lion": lambda **o: cruxy_optax.meta_lion(0.01, **o),
    "self_driving": lambda **o: cruxy_optax.self_driving(0.01, **o),
    "axiom": lambda **o: cruxy_optax.axiom(0.01, **o),
    "cosmic": lambda **o: cruxy_optax.cosmic(0.01, **o),
    "schedule": lambda weight_decay, law: cruxy_optax.meta3(
        0.01, law=law, weight_decay=optax.constant_schedule(weight_decay), mask=[True, False]
    ),
}


SLOW = ("meta_lion", "self_driving", "axiom")
"""What has a near relative that is not."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in JAX]
)
def test_every_optimizer_of_jax_decays_by_the_coefficient_times_the_scale(kind):
    got, _ = in_jax(lambda: JAX[kind](law=Fixed(decay_scale=0.25), weight_decay=0.4))
    want, _ = in_jax(lambda: JAX[kind](law=Plain(), weight_decay=0.1))
    other, _ = in_jax(lambda: JAX[kind](law=Plain(), weight_decay=0.4))
    assert np.abs(other[0] - want[0]).max() > 1e-4
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=12 * 2.0**-22)


def test_in_jax_with_released_gradients_the_scale_holds_for_the_step_after():
    def loss_fn(head, embed, x, batch):
        return jnp.sum(x**2)

    def run(law, decays):
        params = cruxy_optax.LayerStack(jnp.ones((2, 3)), jnp.ones((2, 3)), ())
        state = None
        for decay in decays:
            released = cruxy_optax.release_gradients(
                cruxy_optax.meta3(0.01, law=law, weight_decay=decay),
                lambda embed, batch: batch @ embed,
                lambda layer, x, batch: x * layer,
                loss_fn,
            )
            state = released.init(params) if state is None else state
            params, state, _ = jax.jit(released.step)(params, state, jnp.ones((1, 2)))
        return params

    got, want = run(Fixed(decay_scale=0.25), [0.4] * 3), run(Plain(), [0.4, 0.1, 0.1])
    for a, b in zip(got[:2], want[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3 * 2.0**-22)


def test_before_a_direction_it_is_the_l2_coefficient_that_is_scaled():
    def chain(law, decay):
        return cruxy_optax.stabilize(
            optax.chain(
                cruxy_optax.add_controlled_decayed_weights(decay),
                cruxy_optax.scale_by_controlled_adam(),
                cruxy_optax.scale_by_meta_learning_rate(0.01),
            ),
            law=law,
        )

    got, _ = in_jax(lambda: chain(Fixed(decay_scale=0.25), 0.4))
    want, _ = in_jax(lambda: chain(Plain(), 0.1))
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=12 * 2.0**-22)


def test_outside_stabilize_it_says_where_it_belongs():
    tx = cruxy_optax.add_controlled_decayed_weights(0.1)
    with pytest.raises(ValueError, match="must run inside stabilize"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


def test_a_negative_decay_is_refused():
    with pytest.raises(ValueError, match=r"weight_decay must be in \[0, infinity\), got -1"):
        cruxy_optax.add_controlled_decayed_weights(-1.0)


class Sign(cruxy_torch.Direction):
    """The sign as much as the law wants of it."""

    moments = ("exp_avg",)

    def formula(self, x, moments, factors, orders):
        return x.sign() * orders.sign_weight, {}


@pytest.mark.parametrize("released", [False, True])
def test_a_direction_of_pytorch_is_told_the_weight_of_a_sign(released):
    def run(law):
        options = {"lr": 1e-4, "law": law, "direction": Sign(), "weight_decay": 0.0}
        make = lambda p: cruxy_torch.CruxyOptimizer(p, **options)  # noqa: E731
        return trained(make, steps=2, released=released)[0][0]

    # With released gradients the first step is under no orders.
    ways = ((1.0 if released else 0.25) + 0.25) / 2.0
    begin = tensors()[0].numpy()
    want = begin + ways * (run(Plain()) - begin)
    np.testing.assert_allclose(run(Fixed(sign_weight=0.25)), want, atol=1e-6)


# State.


TORCH = {
    "native": lambda p, law: cruxy_torch.CruxyOptimizer(p, lr=0.01, law=law, weight_decay=0.1),
    "foreach": lambda p, law: cruxy_torch.CruxyOptimizer(
        p, lr=0.01, law=law, weight_decay=0.1, foreach=True
    ),
    "axiom": lambda p, law: cruxy_torch.AXIOM(p, lr=0.01, law=law, weight_decay=0.1),
    "cosmic": lambda p, law: cruxy_torch.Cosmic(p, lr=0.01, law=law, weight_decay=0.1),
    "released": lambda p, law: cruxy_torch.CruxyOptimizer(p, lr=0.01, law=law, weight_decay=0.1),
}
LOSSES = [1.0] * 40 + [0.5] * 4 + [0.4] * 6
GUARD = PlateauGuard(Meta3(), patience=16)


def feed(optimizer, params, losses, released):
    if released:
        optimizer.register_hooks()
    for loss in losses:
        optimizer.zero_grad()
        sum((p * goal).sum() for p, goal in zip(params, tensors(1), strict=True)).backward()
        optimizer.step(loss=loss)


@pytest.mark.parametrize("at", [35, 43], ids=["plateau", "return"])
@pytest.mark.parametrize("kind", TORCH)
def test_a_run_of_pytorch_is_resumed_to_the_bit(kind, at):
    def parameters():
        return [torch.nn.Parameter(p) for p in tensors()]

    whole, first, second = parameters(), parameters(), parameters()
    released = kind == "released"
    feed(TORCH[kind](whole, GUARD), whole, LOSSES, released)
    one = TORCH[kind](first, GUARD)
    feed(one, first, LOSSES[:at], released)
    assert one.telemetry()["sign_weight"] == (0.0 if at == 35 else pytest.approx(3 / 8))
    two = TORCH[kind](second, GUARD)
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    feed(two, second, LOSSES[at:], released)
    assert all(torch.equal(p, q) for p, q in zip(whole, second, strict=True))


@pytest.mark.parametrize("kind", ["meta3", "cosmic", pytest.param("axiom", marks=pytest.mark.slow)])
def test_a_run_of_jax_is_resumed_to_the_bit(kind):
    tx = JAX[kind](law=GUARD, weight_decay=0.1)
    params = [jnp.asarray(p.numpy()) for p in tensors()]
    grads = [jnp.asarray(p.numpy()) for p in tensors(1)]

    @jax.jit
    def step(params, state, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    def feed(params, state, losses):
        for loss in losses:
            params, state = step(params, state, loss)
        return params, state

    whole = feed(params, tx.init(params), LOSSES)
    half, state = feed(params, tx.init(params), LOSSES[:43])
    assert float(cruxy_optax.telemetry(state)["sign_weight"]) == pytest.approx(3 / 8)
    leaves, tree = jax.tree.flatten((half, state))
    saved = [np.asarray(leaf) for leaf in leaves]
    resumed = feed(*jax.tree.unflatten(tree, list(map(jnp.asarray, saved))), LOSSES[43:])
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, resumed))


def test_a_guarded_run_moves_from_jax_to_pytorch():
    _, state = in_jax(lambda: cruxy_optax.meta3(0.01, law=PlateauGuard(Meta3(), patience=2)), 30)
    params = [torch.nn.Parameter(p) for p in tensors()]
    optimizer = cruxy_torch.CruxyOptimizer(params, law=PlateauGuard(Meta3(), patience=2))
    saved = cruxy_torch.state_from_optax(optimizer, state, lambda tree: tree)
    optimizer.load_state_dict(saved)
    shown = cruxy_optax.telemetry(state)
    for name in ("sign_weight", "decay_scale"):
        assert optimizer.telemetry()[name] == float(shown[name])


def test_self_driving_is_guarded_too():
    guard = PlateauGuard(SelfDriving(), patience=10)
    _, state = in_jax(lambda: cruxy_optax.self_driving(law=guard, total_steps=30), 31)
    shown = cruxy_optax.telemetry(state)
    assert shown["learning_rate"] == 0.0, "the end is the wrapped law's to know"
    _, optimizer = trained(lambda p: cruxy_torch.CruxyOptimizer(p, law=guard), 30)
    names = {"alignment", "sign_weight", "decay_scale"}
    assert names <= shown.keys() & optimizer.telemetry().keys()


@pytest.mark.parametrize("law", [Meta3(), StabilityV1()])
def test_without_a_guard_nothing_more_is_kept_or_shown(law):
    _, state = in_jax(lambda: cruxy_optax.meta3(0.01, law=law), 2)
    assert (state.controls.sign_weight, state.controls.decay_scale) == (None, None)
    assert "decay_scale" not in cruxy_optax.telemetry(state)
    _, optimizer = trained(lambda p: cruxy_torch.CruxyOptimizer(p, law=law), 2)
    assert len(optimizer.param_groups[0]["controller"]["controls"]) == 16
    assert "decay_scale" not in optimizer.telemetry()


def test_a_state_of_another_law_is_refused():
    plain = trained(lambda p: cruxy_torch.CruxyOptimizer(p), 2)[1].state_dict()
    guarded = cruxy_torch.CruxyOptimizer([torch.nn.Parameter(p) for p in tensors()], law=GUARD)
    with pytest.raises(ValueError, match="must belong to the same law"):
        guarded.load_state_dict(plain)


def test_the_log_has_both(tmp_path):
    path = tmp_path / "log.jsonl"
    options = {"log_metrics": True, "metrics_path": path, "law": GUARD}
    trained(lambda p: cruxy_torch.CruxyOptimizer(p, **options), 3)[1]._log.flush()
    assert '"sign_weight": 1.0, "decay_scale": 1.0' in path.read_text()


def test_a_loss_that_stands_still_because_nothing_moves_is_no_plateau():
    law, one = PlateauGuard(SelfDriving(), patience=5), np.float32(1.0)
    state = law.init(np.float32(0.0), xp=np)
    for _ in range(40):  # a rate of 0
        state, controls = law.step(state, Signals(one, one, one, one, np.float32(0.0)), xp=np)
    assert state.count == 0
    assert controls.sign_weight == 1.0
