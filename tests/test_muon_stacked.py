"""Scanned layers under Muon: what is a vector, what is decayed, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from cruxy_optax import orthogonalize_updates, scale_by_controlled_muon, self_driving_muon

LAYERS, WIDTH = 3, 8


def ones(*shape):
    return jnp.ones((LAYERS, *shape))


def tree():
    return {
        "layers": {
            "mlp": {"up": {"kernel": ones(WIDTH, 20), "bias": ones(20)}},
            "mixer": {"gate": ones(WIDTH), "decay": ones(WIDTH), "w": ones(WIDTH)},
            "norm": {"scale": ones(WIDTH)},
        },
        "proj": {"kernel": jnp.ones((WIDTH, WIDTH))},
    }


def unrolled(params):
    """The same model with its layers in a row."""
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(LAYERS)]
    return {"layers": layers, "proj": params["proj"]}


def test_what_is_a_vector_without_the_axis_of_layers_is_adams():
    """The momentum of such a one was handed on as it is, of whatever size."""
    tx = self_driving_muon(stacked=("layers.*",), weight_decay=0.0, relative_limit=None)
    params = tree()
    for scale in (1e-4, 1e3):
        grads = jax.tree.map(lambda p, scale=scale: scale * p, params)
        updates, _ = tx.update(grads, tx.init(params), params, value=1.0)
        for name in ("gate", "decay", "w"):
            bias = updates["layers"]["mlp"]["up"]["bias"][0, 0]
            np.testing.assert_allclose(updates["layers"]["mixer"][name], bias, rtol=1e-3)


def test_layers_in_a_stack_have_the_directions_and_the_decay_of_layers_in_a_row():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), tree())
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), tree())
    moved = []
    for stacked, own in (((), unrolled), (("layers.*",), lambda x: x)):
        tx = self_driving_muon(stacked=stacked, relative_limit=None, averaging=None)
        updates, _ = tx.update(own(grads), tx.init(own(params)), own(params), value=1.0)
        moved.append(updates)
    for ours, theirs in zip(*map(jax.tree.leaves, (moved[0], unrolled(moved[1]))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-9)


def test_decay_is_not_for_the_vectors_of_a_stack():
    tx, params = self_driving_muon(stacked=("layers.*",), averaging=None), tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, value=1.0)
    decayed = {
        jax.tree_util.keystr(path) for path, u in jax.tree.leaves_with_path(updates) if u.any()
    }
    assert decayed == {"['layers']['mlp']['up']['kernel']", "['proj']['kernel']"}


@pytest.mark.parametrize("make", [self_driving_muon, orthogonalize_updates])
def test_a_text_alone_is_no_sequence_of_patterns(make):
    with pytest.raises(TypeError, match=r"sequence of patterns, got 'layers.\*'; write \('layers"):
        make(stacked="layers.*")
    with pytest.raises(TypeError, match=r"must hold shell patterns .* got 3; for instance"):
        make(stacked=(3,))


@pytest.mark.parametrize("make", [self_driving_muon, orthogonalize_updates])
def test_a_pattern_of_no_parameter_is_reported(make):
    with pytest.raises(ValueError, match=r"must match the path of a parameter, got 'layrs.\*'; "):
        make(stacked=("layers.*", "layrs.*")).init(tree())


@pytest.mark.parametrize("make", [self_driving_muon, orthogonalize_updates])
def test_a_kernel_that_nothing_explains_is_refused_from_the_start(make):
    with pytest.raises(ValueError, match="nothing tells which axes are inputs"):
        make().init(tree())


def attention(names, shape, bias=None):
    return {
        name: {"kernel": ones(*shape), **({} if bias is None else {"bias": ones(*bias)})}
        for name in names
    }


QKV = ("query", "key", "value")
SCANNED = {
    "biases": ({"attn": attention(QKV, (8, 8), (8,))}, "*"),
    "outputs": ({"attn": attention((*QKV, "out"), (8, 8))}, "*"),
    "norms": ({"attn": attention(QKV, (8, 8)), "norm": {"scale": ones(8)}}, "*"),
    "the output's bias": ({"attn": attention(["o_proj"], (8, 8), (8,))}, "*"),
    "the output and norms": (
        {"attn": attention(["o_proj"], (8, 8)), "norm": {"scale": ones(8)}},
        "*",
    ),
    "heads": ({"attn": attention(QKV, (8, 2, 4), (2, 4))}, "*"),
    "heads without biases": ({"attn": attention((*QKV, "out"), (8, 2, 4))}, "*"),
    "convolutions": ({"conv": {"kernel": ones(3, 8, 8), "bias": ones(8)}}, "*"),
    "among others": (
        {"layers": {"attn": attention(QKV, (8, 8), (8,))}, "norm": {"scale": jnp.ones(8)}},
        r"layers.*",
    ),
}


@pytest.mark.parametrize("name", SCANNED)
def test_layers_that_what_stands_beside_them_shows_are_not_taken_for_inputs(name):
    params, pattern = SCANNED[name]
    with pytest.raises(ValueError, match="axes of a kernel must be clear") as refused:
        self_driving_muon().init(params)
    assert f'stacked=("{pattern}",)' in str(refused.value)
    updates, _ = orthogonalize_updates(stacked=(pattern,)).update(params, optax.EmptyState())
    for path, u in jax.tree.leaves_with_path(updates):
        if "kernel" in jax.tree_util.keystr(path):
            assert float(abs(u).max()) < 0.5  # orthogonal, not handed on


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [2, 8])
def test_attention_of_flax_needs_no_word(heads, bias):
    """Also with as many heads as inputs, where its axes could be those of layers."""
    layer = linen.MultiHeadDotProductAttention(num_heads=heads, use_bias=bias)
    params = layer.init(jax.random.key(0), jnp.ones((1, 5, WIDTH)))["params"]
    of_nnx = nnx.MultiHeadAttention(heads, WIDTH, decode=False, use_bias=bias, rngs=nnx.Rngs(0))
    for own in (params, {"layer": params, "norm": {"scale": jnp.ones(WIDTH)}}):
        self_driving_muon().init(own)
    self_driving_muon().init(nnx.state(of_nnx, nnx.Param))
    tx = orthogonalize_updates()
    updates, _ = tx.update(params, tx.init(params))
    query = updates["query"]["kernel"].reshape(WIDTH, WIDTH)
    alone, _ = tx.update({"kernel": params["query"]["kernel"].reshape(WIDTH, WIDTH)}, tx.init({}))
    np.testing.assert_allclose(query, alone["kernel"], atol=1e-6)


def test_layers_that_linen_scans_are_refused_until_they_are_named():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            attend = linen.MultiHeadDotProductAttention(2, use_bias=False, name="attn")
            return linen.LayerNorm(name="norm")(attend(x)), None

    scan = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    params = {"layers": scan().init(jax.random.key(0), jnp.ones((1, 5, 8)), None)["params"]}
    params["final"] = {"scale": jnp.ones(8)}
    with pytest.raises(ValueError, match=r'stacked=\("layers\.\*",\)'):
        self_driving_muon().init(params)
    tx = self_driving_muon(stacked=("layers.*",), weight_decay=0.0)
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    own, _ = orthogonalize_updates().update(
        {"attn": jax.tree.map(lambda x: x[0], params["layers"]["attn"])}, optax.EmptyState()
    )
    ours = updates["layers"]["attn"]["query"]["kernel"][0]
    theirs = own["attn"]["query"]["kernel"]
    cosine = jnp.vdot(ours, theirs) / jnp.linalg.norm(ours) / jnp.linalg.norm(theirs)
    assert float(cosine) == pytest.approx(-1.0, abs=1e-4)


def test_patterns_may_come_from_a_generator():
    tx = scale_by_controlled_muon(stacked=(name for name in ["layers.*"]))
    assert tx.init(tree())
