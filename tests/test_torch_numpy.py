"""The scalars a law runs on in `CruxyOptimizer` on CPU give what NumPy gives, bit by bit."""

import itertools

import numpy as np
import pytest

pytest.importorskip("torch")

from cruxy_control import (
    Meta3,
    Signals,
    StabilityV1,
    StabilityV2,
    betas,
    meta_learning_rate,
)
from cruxy_torch import _law_state, _scalar_numpy

VALUES = [np.float32(x) for x in (0.0, 1.0, -2.5, np.inf, -np.inf, np.nan)]


def bits(values):
    arrays = [np.asarray(value) for value in values]
    return [(array.dtype, array.tobytes()) for array in arrays]


def replay(law, xp):
    """A stream with outliers, steps that are skipped, and missing losses."""
    random = np.random.default_rng(0)
    state = law.init(np.float32(0.0), xp=xp)
    rows = []
    for step in range(300):
        norm = np.exp(random.normal()) * (1000.0 if step % 90 == 0 else 1.0)
        norm = np.float32([np.nan, np.inf, 0.0][step % 3] if step % 17 == 0 else norm)
        loss = np.float32(np.nan if step % 13 == 0 else random.normal())
        state, controls = law.step(state, Signals(norm, norm, loss), xp=xp)
        rate = meta_learning_rate(controls, 1e-3, (1e-7, 1e-2), xp=xp)
        used = (*controls, *betas(controls, 0.9, 0.999, xp=xp), rate)
        rows.append(bits(_law_state.leaves(state)) + bits(np.array(used, np.float32)))
    return rows


@pytest.mark.parametrize("law", [Meta3(), Meta3.cruxy_2_1_0(), StabilityV2(), StabilityV1()])
def test_every_law_gives_the_same_bits_as_on_numpy(law):
    with np.errstate(all="ignore"):
        assert replay(law, _scalar_numpy) == replay(law, np)


@pytest.mark.parametrize("name", ["minimum", "maximum"])
@pytest.mark.parametrize(("x", "y"), list(itertools.product(VALUES, VALUES)))
def test_the_smaller_and_the_larger_of_two_are_those_of_numpy(name, x, y):
    for pair in ((x, y), (x, float(y)), (np.stack([x, y]), y)):
        ours, theirs = (getattr(xp, name)(*pair) for xp in (_scalar_numpy, np))
        np.testing.assert_array_equal(ours, theirs, strict=True)


def test_what_is_no_scalar_and_what_it_does_not_name_is_numpys():
    ring = np.arange(4, dtype=np.float32)
    for call in (
        lambda xp: xp.where(ring > 1.0, ring, 0.0),
        lambda xp: xp.where(np.bool_(True), -1.0, ring),
        lambda xp: xp.clip(ring, 1.0, 2.0),
        lambda xp: xp.isfinite(ring),
        lambda xp: xp.zeros_like(ring, dtype=xp.int32),
        lambda xp: xp.ones_like(ring),
        lambda xp: xp.roll(ring, 1),
        lambda xp: xp.log1p(ring),
    ):
        np.testing.assert_array_equal(call(_scalar_numpy), call(np), strict=True)
