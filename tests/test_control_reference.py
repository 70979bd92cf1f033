"""Each law equals an independent float64 reading of its equations, in every namespace."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cruxy_control import Meta3, Signals, StabilityV1, StabilityV2, betas, meta_learning_rate
from reference_law import BETA1, BETA2, ReferenceMeta3, ReferenceV1, ReferenceV2
from relatives import crossed
from streams import STREAMS

LAWS = {
    "stability_v1": (StabilityV1(), ReferenceV1),
    "stability_v2": (StabilityV2(), ReferenceV2),
    "meta3": (Meta3(), ReferenceMeta3),
}

# 200 slow-loop products and 2,000 running products, each with a few roundings of 2^-24 relative.
RELATIVE = 2000 * 4 * 2.0**-24
# c_bar passes through zero: its terms are at most 1, weighed 0.05, over an effective 20 steps.
ABSOLUTE = 1e-6

WORDS = (
    "where clip exp sqrt tanh isfinite arange roll sum maximum minimum stack zeros_like ones_like "
    "float32 int32"
).split()


def only_the_vocabulary(xp):
    """`xp` with the documented words and nothing else."""
    return types.SimpleNamespace(**{word: getattr(xp, word) for word in WORDS})


def used(controls, xp):
    """What an optimizer with lr 1 and the default betas makes of the controls."""
    beta1, beta2 = betas(controls, BETA1, BETA2, xp=xp)
    rate = meta_learning_rate(controls, 1.0, xp=xp) * controls.phase_scale
    shown = {name: getattr(controls, name) for name in ("phase", "curvature", "warning")}
    return {
        "rate": rate,
        "beta1": beta1,
        "beta2": beta2,
        "clip_threshold": controls.clip_threshold,
        **shown,
    }


def replay(law, stream, xp, scalar):
    with np.errstate(all="ignore"):
        state = law.init(scalar(0.0), xp=xp)
        rows = []
        for norm, gamma_norm, loss in zip(*stream, strict=True):
            signals = Signals(scalar(norm), scalar(gamma_norm), scalar(loss))
            state, controls = law.step(state, signals, xp=xp)
            rows.append({k: float(v) for k, v in used(controls, xp).items()})
    return {k: np.array([row[k] for row in rows]) for k in rows[0]}


def replay_jax(law, stream):
    """The same under `jit` and `lax.scan`, which also holds shapes and dtypes constant."""

    @jax.jit
    def run(signals):
        def body(state, one):
            state, controls = law.step(state, one, xp=jnp)
            return state, used(controls, jnp)

        return jax.lax.scan(body, law.init(jnp.zeros(()), xp=jnp), signals)[1]

    return jax.device_get(run(Signals(*(jnp.asarray(x, jnp.float32) for x in stream))))


@pytest.mark.parametrize(("name", "stream"), crossed(LAWS, STREAMS))
@pytest.mark.parametrize("namespace", ["numpy", "jax"])
def test_law_equals_a_float64_reading_of_its_equations(name, stream, namespace):
    law, reference = LAWS[name]
    stream = STREAMS[stream]()
    if namespace == "numpy":
        got = replay(law, stream, only_the_vocabulary(np), np.float32)
    else:
        got = replay_jax(law, stream)
    reading = reference()
    want = [reading.step(*map(float, row)) for row in zip(*stream, strict=True)]
    for key in want[0]:
        expected = np.array([row[key] for row in want])
        np.testing.assert_allclose(got[key], expected, RELATIVE, ABSOLUTE, err_msg=key)


@pytest.mark.parametrize("name", LAWS)
def test_law_runs_on_torch_with_the_same_result(name):
    torch = pytest.importorskip("torch")
    law, _ = LAWS[name]
    stream = STREAMS["rough"](300)
    scalar = functools.partial(torch.tensor, dtype=torch.float32)
    got = replay(law, stream, only_the_vocabulary(torch), scalar)
    want = replay(law, stream, np, np.float32)
    for key in want:
        np.testing.assert_allclose(got[key], want[key], RELATIVE, ABSOLUTE, err_msg=key)


@pytest.mark.parametrize("name", LAWS)
def test_state_keeps_its_types_on_numpy(name):
    law, _ = LAWS[name]
    before = law.init(np.float32(0.0), xp=np)
    one = np.float32(1.0)
    after, _ = law.step(before, Signals(one, one, one), xp=np)
    spec = [(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(before)]
    assert spec == [(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(after)]
    assert {dtype.name for _, dtype in spec} <= {"float32", "int32"}


@pytest.mark.parametrize("name", LAWS)
def test_law_constants_are_frozen_and_hashable(name):
    law, _ = LAWS[name]
    assert hash(law) == hash(dataclasses.replace(law))
    with pytest.raises(dataclasses.FrozenInstanceError):
        law.debias = False
