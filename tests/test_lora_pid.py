"""`LoraPid`: against a reference in float64, alike in every namespace, and within its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cruxy_control import LoraPid, large_share
from cruxy_control.law import check_law

torch = pytest.importorskip("torch")

NAMESPACES = {"numpy": np, "jax": jnp, "torch": torch}
EPS = 2.0**-24
SHOWN = (
    "blend", "agc", "blend_integral", "agc_integral", "blend_volatility", "agc_volatility",
    "blend_flips", "agc_flips",
)  # fmt: skip


def shares(steps=200, tensors=3, seed=0):
    """Shares of large entries that drift and jump, with some unknown; float32, `(steps, n)`."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)[:, None]
    rho = 0.5 + 0.3 * np.sin(t / 15 + np.arange(tensors)) + 0.15 * rng.normal(size=(steps, tensors))
    rho = np.clip(np.where(t > steps // 2, 1.0 - rho, rho), 0.0, 1.0)
    rho[rng.random((steps, tensors)) < 0.05] = np.nan
    return rho.astype(np.float32)


def run(pid, rho, ok=True, xp=np):
    """Every state over a stream of shares; there are as many loops as a row has."""
    rho = np.asarray(rho, np.float32)
    ok = np.broadcast_to(ok, len(rho))
    array = (lambda x: torch.from_numpy(np.array(x))) if xp is torch else xp.asarray
    step = jax.jit(lambda *a: pid.step(*a, xp=jnp)) if xp is jnp else lambda *a: pid.step(*a, xp=xp)
    state, states = pid.init(array(np.zeros(rho.shape[1:], np.float32)), xp=xp), []
    for now, good in zip(rho, ok, strict=True):
        state, (blend, agc) = step(state, array(now), array(good))
        assert (blend.shape, agc.shape) == (rho.shape[1:],) * 2
        states.append(type(state)(*map(np.asarray, state)))
    return states


def column(states, name):
    return np.stack([getattr(state, name) for state in states])


def reference(pid, rho, ok):
    """What `SHOWN` names, of one tensor after each step, in float64 and with branches."""
    average = weight = wait = 0.0
    goals = [(pid.blend_base, pid.blend_slope), (pid.agc_base, pid.agc_slope)]
    bounds = [pid.blend_bounds, pid.agc_bounds]
    value, integral, last = [pid.blend, pid.agc], [0.0, 0.0], [None, None]
    volatile, flips, rows = [0.0, 0.0], [0.0, 0.0], []
    for now, good in zip(rho, ok, strict=True):
        if good and np.isfinite(now):
            weight = pid.rho_decay * weight + 1 - pid.rho_decay
            average += (1 - pid.rho_decay) / weight * (float(now) - average)
            wait = (wait + 1) % pid.interval
            for i, (base, slope) in enumerate(goals if wait == 0 else ()):
                error = base + slope * average - value[i]
                change = 0.0 if last[i] is None else error - last[i]
                flipped = last[i] is not None and np.sign(error) == -np.sign(last[i])
                volatile[i] = pid.memory * volatile[i] + (1 - pid.memory) * abs(change)
                flips[i] = pid.memory * flips[i] + (1 - pid.memory) * flipped
                integral[i] = min(max(integral[i] + error, -pid.anti_windup), pid.anti_windup)
                value[i] += pid.kp * error
                value[i] += pid.ki * integral[i] / (1 + pid.inertia_i * volatile[i])
                value[i] += pid.kd * change / (1 + pid.inertia_d * flips[i])
                value[i] = min(max(value[i], bounds[i][0]), bounds[i][1])
                last[i] = error
        rows.append((*value, *integral, *volatile, *flips))
    return np.array(rows)


@pytest.mark.parametrize("interval", [20, 3])
@pytest.mark.parametrize("name", NAMESPACES)
def test_it_is_the_reference_in_float64(name, interval):
    pid, rho = LoraPid(interval=interval), shares(400)
    ok = np.random.default_rng(1).random(400) < 0.95
    states = run(pid, rho, ok, NAMESPACES[name])
    got = np.stack([column(states, name) for name in SHOWN], 1)
    want = np.stack([reference(pid, rho[:, i], ok) for i in range(3)], 2)
    assert np.all(want[-1, 4:] > 0.0), "inertia has to be at work"
    # The averages forget, the integral adds up to 133 errors below 1.
    np.testing.assert_allclose(got, want, rtol=0, atol=133 * EPS)


def test_all_namespaces_agree_over_200_steps():
    pid, rho = LoraPid(interval=2), shares()
    states = {name: run(pid, rho, xp=xp) for name, xp in NAMESPACES.items()}
    for other in ("jax", "torch"):
        for field in SHOWN:
            a, b = column(states["numpy"], field), column(states[other], field)
            np.testing.assert_allclose(a, b, rtol=0, atol=100 * EPS)


def test_a_vector_of_loops_is_as_many_loops_alone():
    pid, rho = LoraPid(interval=2), shares()
    together = run(pid, rho)[-1]
    for i in range(3):
        alone = run(pid, rho[:, i])[-1]
        np.testing.assert_array_equal([f[i] for f in together], np.stack(alone))


def test_every_field_is_float32_and_of_the_shape_asked_for():
    for state in run(LoraPid(interval=1), shares(5)):
        assert {(field.dtype.name, field.shape) for field in state} == {("float32", (3,))}


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_a_steady_share_is_followed_to_the_set_points_of_the_design(rho):
    state = run(LoraPid(interval=1), np.full(300, rho))[-1]
    assert state.blend == pytest.approx(0.1 + 0.4 * rho, abs=1e-4)
    assert state.agc == pytest.approx(0.05 - 0.04 * rho, abs=1e-4)


def test_nothing_moves_between_two_intervals():
    blend = column(run(LoraPid(), np.full(60, 1.0)), "blend")
    changed = 1 + np.flatnonzero(np.diff(blend, prepend=np.float32(0.2)))
    assert changed.tolist() == [20, 40, 60]


def test_anti_windup_holds_the_integral_and_lets_it_return_at_once():
    held = LoraPid(interval=1, kp=0.0, ki=0.0, kd=0.0, rho_decay=0.0)  # the error stays
    integral = column(run(held, [1.0] * 50 + [0.0] * 3), "blend_integral")
    assert integral[49] == 0.5
    np.testing.assert_allclose(integral[50:], [0.4, 0.3, 0.2], atol=1e-6)


def test_without_it_the_integral_winds_up():
    free = LoraPid(interval=1, kp=0.0, ki=0.0, kd=0.0, anti_windup=1e6)
    assert column(run(free, [1.0] * 50), "blend_integral")[-1] == pytest.approx(15.0, rel=1e-4)


def test_volatility_slows_the_integral_and_flips_the_derivative():
    swinging = [0.0, 1.0] * 10

    def way(**gains):
        pid = LoraPid(interval=1, rho_decay=0.0, **{"kp": 0.0, "ki": 0.0, "kd": 0.0, **gains})
        return np.abs(np.diff(column(run(pid, swinging), "blend"))).sum()

    assert way(ki=0.05) < way(ki=0.05, inertia_i=0.0)
    assert way(kd=0.1) < way(kd=0.1, inertia_d=0.0)


def test_a_rounding_above_1_counts_as_1():
    assert run(LoraPid(interval=1), [np.float32(1.0 + 2.0**-23)]) == run(LoraPid(interval=1), [1.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_share_that_is_none_leaves_the_state_as_it_was(bad):
    states = run(LoraPid(interval=1), [0.3, 0.9, bad])
    assert states[2] == states[1]


def test_a_skipped_step_leaves_the_state_as_it_was():
    states = run(LoraPid(interval=1), [0.3, 0.9, 0.1], [True, True, False])
    assert states[2] == states[1]


def test_one_tensor_that_is_skipped_does_not_hold_the_others():
    pid = LoraPid(interval=1)
    state = pid.init(np.zeros(2, np.float32), xp=np)
    state, _ = pid.step(state, np.float32([0.9, 0.9]), np.array([True, False]), xp=np)
    assert state.rho.tolist() == [np.float32(0.9), 0.0]


gain = st.floats(0.0, 100.0)


@settings(max_examples=100, deadline=None)
@given(
    kp=gain, ki=gain, kd=gain, rho=st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=40)
)
def test_no_gain_and_no_share_leaves_the_bounds(kp, ki, kd, rho):
    for state in run(LoraPid(interval=1, kp=kp, ki=ki, kd=kd), rho):
        assert np.all(np.isfinite(state))
        assert 0.0 <= state.blend <= 1.0
        assert 0.0 < state.agc <= 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be a whole number >= 1, got 0"),
        ({"rho_decay": 1.0}, r"rho_decay must be in \[0, 1\), got 1.0"),
        ({"memory": -0.1}, r"memory must be in \[0, 1\), got -0.1"),
        ({"kp": -1.0}, r"kp must be in \[0, infinity\), got -1.0"),
        ({"anti_windup": np.nan}, r"anti_windup must be in \[0, infinity\), got nan"),
        ({"blend": 1.5}, r"blend must be in \[0, 1\], got 1.5"),
        ({"blend_slope": 0.95}, r"blend_base \+ blend_slope must be in \[0, 1\], got 1.05"),
        ({"agc": 0.0}, r"agc must be in \[0.001, 1\], got 0.0"),
        ({"agc_slope": -0.05}, r"agc_base \+ agc_slope must be in \[0.001, 1\], got 0.0"),
        ({"agc_bounds": (0.0, 1.0)}, r"the lower end of agc_bounds must be in \(0, infinity\)"),
    ],
)
def test_a_constant_outside_its_range_raises(options, message):
    with pytest.raises(ValueError, match=message):
        LoraPid(**options)


def test_it_is_no_law_of_a_whole_optimizer():
    with pytest.raises(TypeError, match="law must be an instance with `gamma`"):
        check_law(LoraPid())


D = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)


@pytest.mark.parametrize(
    ("d", "want"),
    [(np.sign(D), 1.0), (np.eye(4, dtype=np.float32), 0.25), (0 * D, 0.0), (1e-30 * D, None)],
)
@pytest.mark.parametrize("name", NAMESPACES)
def test_the_sensor_counts_entries_above_a_quarter_of_the_root_mean_square(name, d, want):
    xp = NAMESPACES[name]
    wide = d.astype(np.float64)
    rms = np.sqrt(np.mean(wide**2))
    want = np.mean(np.abs(wide) > 0.25 * rms) if want is None else want
    array = torch.from_numpy if xp is torch else xp.asarray
    got = large_share(array(d), array(np.array(rms, np.float32)), xp=xp)
    assert (float(got), str(got.dtype).removeprefix("torch.")) == (pytest.approx(want), "float32")
