"""What holds for every law whatever the stream: bounds, steadiness, outliers, skipped steps."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cruxy_control import (
    Meta3,
    SelfDriving,
    Signals,
    StabilityV1,
    StabilityV2,
    betas,
    meta_learning_rate,
)
from cruxy_control.controls import neutral
from relatives import crossed
from streams import clean

LAWS = {"stability_v1": StabilityV1(), "stability_v2": StabilityV2(), "meta3": Meta3()}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))

anything = st.floats(allow_nan=True, allow_infinity=True)
a_norm = st.floats(0, 1e38) | st.sampled_from([np.nan, np.inf])


def run(law, norm, loss, b1=0.9, b2=0.999):
    """Rates, betas and controls over a stream of norms."""
    state, rows = law.init(np.float32(0.0), xp=np), []
    with np.errstate(all="ignore"):
        for n, x in zip(norm, loss, strict=True):
            n = np.float32(n)
            state, controls = law.step(state, Signals(n, n, np.float32(x)), xp=np)
            rate = meta_learning_rate(controls, 1.0, xp=np) * controls.phase_scale
            rows.append((float(rate), *map(float, betas(controls, b1, b2, xp=np)), controls))
    return state, rows


def finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


@every_law
@settings(max_examples=60, deadline=None)
@given(stream=st.lists(st.tuples(a_norm, anything), min_size=1, max_size=40))
@example(stream=[(7e37, 0.0), *[(x, 0.0) for x in (0.0, 0.0, 6e37)] * 3])  # a sum that overflowed
def test_no_stream_makes_the_controller_leave_its_bounds_or_its_numbers(law, stream):
    state, rows = run(law, *zip(*stream, strict=True))
    assert finite(state)
    for rate, beta1, beta2, controls in rows:
        assert 0 <= rate <= 12
        assert 0 <= beta1 <= 1
        assert 0 <= beta2 <= 1
        assert 0 <= controls.clip_scale <= 1
        assert finite(controls._replace(clip_threshold=np.float32(0)))
        assert not np.isnan(controls.clip_threshold)


@every_law
@settings(max_examples=25, deadline=None)
@given(size=st.floats(1e-3, 1e15))
def test_steady_gradient_is_phase_one_half_from_the_first_step(law, size):
    # Below 1e-3 the eps of 1e-8 is no longer negligible beside v1's squared norm.
    _, rows = run(law, [size] * 30, [1.0] * 30)
    for _, _, _, controls in rows:
        assert float(controls.phase) == pytest.approx(0.5, abs=6e-3)


def test_meta3_on_a_steady_gradient_is_what_the_docstring_says():
    _, rows = run(Meta3(), [1.0] * 50, [1.0] * 50)
    rate, beta1, beta2, controls = rows[-1]
    assert rate == pytest.approx(0.75, abs=1e-5)
    assert beta1 == pytest.approx(0.873, abs=1e-3)
    assert beta2 == pytest.approx(0.9, abs=1e-6)
    assert float(controls.clip_threshold) == pytest.approx(1.5, abs=1e-5)


def test_meta3_holds_beta2_at_its_lower_bound_on_almost_every_noisy_step():
    norm, _, loss = clean()
    _, rows = run(Meta3(), norm, loss)
    at_bound = [row[2] == float(np.float32(0.9)) for row in rows]
    assert np.mean(at_bound) > 0.95, "it leaves it only where phi is below a third"


def test_meta3_with_everything_off_is_no_controller():
    law = Meta3(
        rate_gain=0.0,
        beta2_gain=0.0,
        phase_strength=0.0,
        beta2_phase_strength=0.0,
        beta1_gain=0.0,
        clip_threshold=None,
    )
    norm, _, loss = clean(300)
    _, rows = run(law, norm, loss)
    for rate, beta1, beta2, controls in rows:
        assert (rate, controls.clip_scale) == (1.0, 1.0)
        assert (beta1, beta2) == (pytest.approx(0.9, abs=1e-7), pytest.approx(0.999, abs=1e-7))


def test_stability_v2_only_ever_brakes():
    norm, _, loss = clean()
    _, rows = run(StabilityV2(), norm, loss)
    assert max(row[0] for row in rows) <= 1.0
    assert np.median([row[0] for row in rows]) == 1.0


@every_law
def test_slow_factor_does_not_wind_up(law):
    falling = np.concatenate([np.geomspace(1e6, 1.0, 3000), np.ones(400)])
    _, rows = run(law, falling, np.ones(3400))
    assert 0.5 <= rows[-1][0] <= 10.0


OUTLIERS = {
    "norm times 1000": lambda norm, loss, at: norm.__setitem__(at, norm[at] * 1000),
    "norm 1e18": lambda norm, loss, at: norm.__setitem__(at, 1e18),
    "zero norm": lambda norm, loss, at: norm.__setitem__(at, 0.0),
    "loss 1e30": lambda norm, loss, at: loss.__setitem__(at, 1e30),
    "loss -1e30": lambda norm, loss, at: loss.__setitem__(at, -1e30),
}


@every_law
@pytest.mark.parametrize(
    ("outlier", "at"),
    crossed(
        OUTLIERS,
        [0, 1, 3, 300],
        fast=[("norm times 1000", 3), ("norm 1e18", 0), ("zero norm", 300), ("loss -1e30", 1)],
    ),
)
def test_one_finite_outlier_has_no_lasting_effect(law, outlier, at):
    norm, _, loss = clean(900)
    _, want = run(law, norm, loss)
    OUTLIERS[outlier](norm, loss, at)
    _, got = run(law, norm, loss)
    # A slow window of 1,000 steps sees at most 9 means more, 1 % of itself, when it is full. In the
    # first steps it is all there is, and what is left are a few moves of the slow loop, of at most
    # 5 % each. Uncapped, the same outlier leaves the rate 16 % to nine times too high.
    tolerance = 0.03 if at == 300 else 0.15
    for after in (at + 150, 899):
        for name in ("meta_scale", "beta1_factor", "beta2_gap", "phase", "clip_threshold"):
            ours = float(getattr(got[after][3], name))
            assert ours == pytest.approx(float(getattr(want[after][3], name)), rel=tolerance), name


@pytest.mark.parametrize("law", [Meta3(), SelfDriving()])
def test_counters_stay_at_the_largest_number(law):
    state = law.init(np.float32(0.0), xp=np)
    top = np.int32(2**31 - 1)
    state = state._replace(step=top, sensors=state.sensors._replace(rising=top))
    one = np.float32(1.0)
    for norm in (1.0, 2.0, 3.0):
        signals = Signals(one, np.float32(norm), one, one, one)
        state, _ = law.step(state, signals, xp=np)
        state = state._replace(sensors=state.sensors._replace(rising=top))
    assert (state.step, state.step.dtype) == (top, np.int32)
    signals = Signals(one, np.float32(4.0), one, one, one)
    assert law.step(state, signals, xp=np)[0].sensors.rising == top


@every_law
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_leaves_the_law_as_it_was_even_a_hundred_running(law, bad):
    norm, _, loss = clean(50)
    state, _ = run(law, norm, loss)
    after = state
    with np.errstate(all="ignore"):
        for _ in range(100):
            signals = Signals(np.float32(bad), np.float32(1.0), np.float32(1.0))
            after, controls = law.step(after, signals, xp=np)
            assert not controls.ok
            assert meta_learning_rate(controls, 1.0, xp=np) == 0.0
            assert betas(controls, 0.9, 0.999, xp=np) == (1.0, 1.0)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@every_law
def test_missing_loss_holds_the_curvature_and_its_pair(law):
    _, rows = run(law, [1.0, 1.0, 1.0, 1.0], [2.0, np.nan, np.nan, 1.5])
    slopes = [float(row[3].curvature) for row in rows]
    expected = 0.0 if isinstance(law, StabilityV1) else 0.05 * -0.5
    assert slopes == [0.0, 0.0, 0.0, pytest.approx(expected)]


@every_law
def test_frozen_model_gives_plain_numbers(law):
    state, rows = run(law, [0.0] * 300, [1.0] * 300)
    assert finite(state)
    assert all(np.isfinite(row[:3]).all() for row in rows)


@every_law
def test_model_that_thaws_is_not_taken_for_an_outlier(law):
    _, rows = run(law, [0.0] * 30 + [1.0] * 300, [1.0] * 330)
    assert float(rows[-1][3].phase) == pytest.approx(0.5, abs=0.03)


def controls(**changed):
    base = neutral(np.bool_(True), xp=np)
    return base._replace(**{k: np.float32(v) for k, v in changed.items()})


def test_neutral_controls_give_the_base_betas():
    assert betas(controls(), 0.9, 0.999, xp=np) == (np.float32(0.9), pytest.approx(0.999))


def test_base_outside_the_bounds_widens_them():
    law = controls(beta1_min=0.85, beta1_max=0.95, beta2_min=0.9, beta2_max=0.9999)
    assert betas(law, 0.5, 0.8, xp=np) == (pytest.approx(0.5), pytest.approx(0.8))
    assert betas(law, 0.97, 0.99995, xp=np) == (pytest.approx(0.97), pytest.approx(0.99995))


def test_base_of_zero_means_none_and_stays_zero():
    law = controls(beta1_min=0.85, beta2_min=0.9)
    assert betas(law, 0.0, 0.0, xp=np) == (0.0, 0.0)


def test_slow_beta2_loop_closes_the_gap_to_one():
    beta2 = betas(controls(beta2_gap=0.5), 0.9, 0.99, xp=np)[1]
    assert beta2 == pytest.approx(0.995)


def test_emergency_shift_is_bounded():
    beta2 = betas(controls(beta2_shift=0.01, beta2_max=0.9999), 0.9, 0.999, xp=np)[1]
    assert beta2 == pytest.approx(0.9999)


def test_rate_bounds_act_on_the_product():
    rate = meta_learning_rate(controls(meta_scale=10.0), 0.1, (1e-7, 1e-2), xp=np)
    assert rate == pytest.approx(1e-2)


WRONG = [
    (Meta3, {"meta_interval": 0}, "meta_interval must be a whole number >= 1, got 0"),
    (Meta3, {"gamma": 0.5}, r"gamma must be in \[1, infinity\), got 0.5"),
    (Meta3, {"fast_decay": 1.0}, r"fast_decay must be in \[0, 1\), got 1.0"),
    (Meta3, {"slow_decay": float("nan")}, r"slow_decay must be in \[0, 1\), got nan"),
    (Meta3, {"reference_window": 1}, "reference_window must be a whole number >= 2"),
    (Meta3, {"scale_bounds": (2.0, 1.0)}, r"scale_bounds must have lower <= upper"),
    (Meta3, {"scale_bounds": 1.0}, r"scale_bounds must be a pair"),
    (Meta3, {"scale_bounds": (2.0, 3.0)}, r"scale_bounds must contain 1, got"),
    (Meta3, {"clip_threshold": 0.0}, r"clip_threshold must be in \(0, infinity\), got 0.0"),
    (Meta3, {"phase_strength": 1.0}, r"phase_strength must be in \[0, 1\), got 1.0"),
    (Meta3, {"history": 0}, "history must be a whole number >= 1"),
    (StabilityV1, {"temperature": 0.0}, r"temperature must be in \(0, infinity\), got 0.0"),
    (StabilityV1, {"high_phase": 0.1}, r"high_phase must be in \[0.45, 1\], got 0.1"),
    (StabilityV2, {"alarm_brake": 2.0}, r"alarm_brake must be in \(0, 1\], got 2.0"),
    (StabilityV2, {"outlier_cap": 0.5}, r"outlier_cap must be in \[1, infinity\), got 0.5"),
]


@pytest.mark.parametrize(("law", "wrong", "message"), WRONG)
def test_wrong_constant_raises_with_rule_value_and_remedy(law, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        law(**wrong)
    assert ";" in str(error.value), "the remedy follows"


def test_switch_must_be_a_boolean():
    with pytest.raises(TypeError, match="debias must be True or False, got 'no'"):
        Meta3(debias="no")


def test_numpy_constants_do_not_widen_the_state():
    law = Meta3(rate_gain=np.float64(0.05), scale_bounds=(np.float64(0.1), np.float64(10.0)))
    state, _ = run(law, [1.0] * 12, [1.0] * 12)
    assert {np.asarray(leaf).dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.slow
def test_every_constant_changes_something():
    """No option is stored and never read."""
    norm, _, loss = clean(400)
    norm[200:240] *= 5.0
    norm[300] *= 1000.0
    loss[250] = 1e4
    loss[100] = np.nan
    norm[260:300] *= np.geomspace(1, 30, 40)
    loss[330:380] += np.linspace(0.0, 100.0, 50)
    for law in LAWS.values():
        want = run(law, norm, loss)[1]
        for field in dataclasses.fields(law):
            changed = CHANGES.get((type(law), field.name), CHANGES.get(field.name))
            if changed is None:
                value = getattr(law, field.name)
                changed = not value if isinstance(value, bool) else type(value)(value * 0.9)
            if field.name in ("gamma", "level_temperature"):
                continue  # read by the sensors; shown by the next test
            got = run(dataclasses.replace(law, **{field.name: changed}), norm, loss)[1]
            assert str(got) != str(want), f"{type(law).__name__}.{field.name} is never read"


def test_level_temperature_acts_where_both_windows_are_equal():
    law, one = StabilityV2(), np.float32(1.0)
    state = law.init(np.float32(0.0), xp=np)
    full = type(state.sensors.windows.fast)(one, one)
    windows = state.sensors.windows._replace(fast=full, slow=full)
    sensors = state.sensors._replace(windows=windows, history=np.ones(14, np.float32))
    state = state._replace(sensors=sensors, error=np.float32(0.5))
    after, _ = law.step(state, Signals(one, one, one), xp=np)
    assert float(after.control) == pytest.approx(np.tanh(0.02 * -0.5 / 0.1))


CHANGES = {
    "clip_threshold": 2.0,
    "history": 3,
    "reference_window": 20,
    "meta_interval": 3,
    "beta1_bounds": (0.88, 0.89),
    "beta2_bounds": (0.95, 0.96),
    "scale_bounds": (0.999, 1.0),
    "beta2_gap_bounds": (0.9999, 1.0001),
    "surge_ratio": 1.2,
    "curvature_alarm": 0.01,
    "alarm": 0.4,
}
