"""Plans of tiers keep their budget, and change only for a reason."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cruxy_control import filters
from cruxy_control.tiers import (
    MOMENTS,
    SCALAR,
    SIGN,
    TIERS,
    Candidate,
    averaged_square,
    check_plan,
    fill,
    noise_gate,
    observe,
    parse_bytes,
    relative_scale,
    report,
    smallest_budget,
    state_bytes,
)

FIXED = 100


@st.composite
def candidates(draw):
    """Tensors of any size, gradients of any size, moments of any width."""
    count = draw(st.integers(1, 8))
    made = []
    for number in range(count):
        size = draw(st.integers(0, 5000))
        moments = 4 + draw(st.integers(0, 8)) * size + draw(st.integers(0, 16))
        rms = draw(st.floats(0, 1e6) | st.sampled_from([1.0, float("nan"), float("inf")]))
        made.append(Candidate(f"t{number}", size, (0, 4, moments), rms))
    return made


@settings(max_examples=200, deadline=None)
@given(candidates(), st.integers(0, 200_000), st.floats(0, 2))
def test_a_plan_keeps_its_budget_leaves_nothing_that_fits_and_returns_itself(
    tensors, spare, hysteresis
):
    budget = smallest_budget(tensors, fixed=FIXED) + spare
    plan = fill(tensors, budget, fixed=FIXED, hysteresis=hysteresis)
    used = state_bytes(tensors, plan, fixed=FIXED)
    assert used <= budget
    for tensor in tensors:
        tier = plan[tensor.name]
        if tier < MOMENTS:
            assert used + tensor.bytes[tier + 1] - tensor.bytes[tier] > budget
    assert fill(tensors, budget, fixed=FIXED, current=plan, hysteresis=hysteresis) == plan


@settings(max_examples=50, deadline=None)
@given(candidates(), st.integers(0, 50_000), st.randoms())
def test_a_plan_does_not_depend_on_the_order_of_the_tensors(tensors, spare, random):
    budget = smallest_budget(tensors, fixed=FIXED) + spare
    plan = fill(tensors, budget, fixed=FIXED)
    random.shuffle(tensors)
    assert fill(tensors, budget, fixed=FIXED) == plan


def pair(first, second):
    return [Candidate("a", 100, (0, 4, 800), first), Candidate("b", 100, (0, 4, 800), second)]


def test_moments_go_where_the_gradient_is_largest_per_byte():
    assert fill(pair(1.0, 2.0), 900, fixed=0) == {"a": SCALAR, "b": MOMENTS}
    dear = [Candidate("a", 100, (0, 4, 800), 1.0), Candidate("b", 100, (0, 4, 1700), 2.0)]
    assert fill(dear, 1800, fixed=0) == {"a": MOMENTS, "b": SCALAR}


@pytest.mark.parametrize(("rival", "wins"), [(1.1, False), (1.19, False), (1.21, True)])
def test_a_rival_takes_over_only_where_it_is_better_by_the_hysteresis(rival, wins):
    held = {"a": MOMENTS, "b": SCALAR}
    plan = fill(pair(1.0, rival), 900, fixed=0, current=held, hysteresis=0.2)
    assert (plan["b"] == MOMENTS) == wins
    assert state_bytes(pair(1.0, rival), plan, fixed=0) <= 900


def test_a_budget_below_the_smallest_says_what_would_do():
    tensors = [Candidate("a", 10, (8, 12, 80), 1.0)]
    assert fill(tensors, 108, fixed=FIXED) == {"a": SIGN}
    with pytest.raises(ValueError, match=r"state_budget must be at least 108 bytes .*, got 107;"):
        fill(tensors, 107, fixed=FIXED)


def test_a_plan_of_the_users_is_checked():
    tensors = pair(1.0, 1.0)
    assert check_plan(tensors, {"b": 2, "a": 0}, 800, fixed=0) == {"a": 0, "b": 2}
    with pytest.raises(ValueError, match=r"tiers must have the path of every tensor .*'c'"):
        check_plan(tensors, {"a": 0, "b": 0, "c": 0}, 800, fixed=0)
    with pytest.raises(ValueError, match=r"tiers must be 0, 1 or 2, got 3 for b"):
        check_plan(tensors, {"a": 0, "b": 3}, 800, fixed=0)
    with pytest.raises(ValueError, match=r"a plan of 1,600 bytes for 800"):
        check_plan(tensors, {"a": 2, "b": 2}, 800, fixed=0)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        (7, 7),
        ("64MB", 64_000_000),
        ("64 mb", 64_000_000),
        ("0.22MB", 220_000),
        ("1.5KiB", 1536),
        ("2G", 2 * 10**9),
        ("1TiB", 2**40),
        ("12", 12),
        ("12B", 12),
        (".5KB", 500),
    ],
)
def test_sizes_are_read_in_powers_of_1000_or_with_an_i_of_1024(text, bytes_):
    assert parse_bytes("state_budget", text) == bytes_


@pytest.mark.parametrize("text", ["", "MB", "1e6", "-5MB", "64 megabytes", "1iB", -1])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"state_budget must be .*got .*; give bytes"):
        parse_bytes("state_budget", text)


@pytest.mark.parametrize("value", [None, 1.5, True, b"64MB"])
def test_what_is_neither_number_nor_text_is_refused(value):
    with pytest.raises(TypeError, match="state_budget must be a size in bytes, got"):
        parse_bytes("state_budget", value)


def test_a_report_is_json_and_names_what_changed():
    tensors = pair(1.0, float("nan"))
    before, after = {"a": 1, "b": 1}, {"a": 2, "b": 1}
    done = report(tensors, before, after, {"a": 1.0, "b": 0.5}, step=3, budget=900, fixed=10)
    assert json.loads(json.dumps(done, allow_nan=False)) == {
        "step": 3,
        "budget": 900,
        "bytes": 814,
        "tensors": [0, 1, 1],
        "transitions": [{"name": "a", "from": 1, "to": 2, "rms": 1.0, "bytes": 800}],
        "gates": {"b": 0.5},
    }
    assert TIERS == (0, 1, 2)


def averages_after(*sizes):
    """The averages of one tensor whose gradient had these sizes."""
    zero = np.zeros(1, np.float32)
    state = filters.Windows(*[filters.Ema(zero, np.float32(0.0))] * 2)
    for size in sizes:
        state = observe(state, np.array([size], np.float32), xp=np)
    return state


def test_a_steady_gradient_is_not_gated_however_small():
    for size in (1.0, 1e-12, 0.0):
        gate = noise_gate(averages_after(*[size] * 20), xp=np)
        np.testing.assert_allclose(gate, 1.0, rtol=1e-6)


def test_the_gate_closes_where_a_gradient_grows_and_nothing_opens_it_above_one():
    grown = noise_gate(averages_after(*[1.0] * 500, *[8.0] * 20), xp=np)
    assert 0.1 <= grown[0] < 0.2
    assert noise_gate(averages_after(*[1.0] * 500, *[0.1] * 20), xp=np)[0] == 1.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e18), min_size=1, max_size=40))
def test_a_gate_is_never_above_one_nor_below_a_tenth(sizes):
    gate = noise_gate(averages_after(*sizes), xp=np)[0]
    assert np.float32(0.1) <= gate <= 1.0


def test_the_scale_is_the_inverse_of_the_gradients_size_within_its_bounds():
    v = np.array([1.0, 4.0, 1e-9, 1e9], np.float32)
    np.testing.assert_allclose(
        relative_scale(v, np.float32(2.0), xp=np), [2.0**0.5, 0.5**0.5, 2.0, 0.5], rtol=1e-6
    )


def test_the_scalar_is_the_mean_of_what_was_seen_at_first():
    v, weight = np.float32(0.0), np.float32(0.0)
    for square in (1.0, 3.0):
        v = averaged_square(v, weight, np.float32(square))
        weight = np.float32(0.999) * weight + np.float32(0.001)
    np.testing.assert_allclose(v, (0.999 * 1.0 + 3.0) / 1.999, rtol=1e-5)
