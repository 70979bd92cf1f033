"""`quantize_state`: which leaves of a state are coded, how, in how many bytes; what is refused."""

import math
import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

from cruxy_exact.codes import BlockCode
from cruxy_optax import meta3, meta_lion, quantize_state, stability_v1, stability_v2
from low_bit import coded, large_tree

S, N = True, False
LEAVES = {
    "adamw": (optax.adamw(1e-3), {"mu": S, "nu": N}),
    "lion": (optax.lion(1e-3), {"mu": S}),
    "sgd": (optax.sgd(1e-3, momentum=0.9), {"trace": S}),
    "adagrad": (optax.adagrad(1e-3), {"sum_of_squares": N}),
    "rmsprop": (optax.rmsprop(1e-3, momentum=0.9), {"nu": N, "trace": S}),
    "amsgrad": (optax.amsgrad(1e-3), {"mu": S, "nu": N, "nu_max": N}),
    "adan": (optax.adan(1e-3), {"m": S, "v": S, "n": N, "g": S}),
    "adadelta": (optax.adadelta(1e-3), {"e_g": N, "e_x": N}),
    "schedule_free": (optax.contrib.schedule_free_adamw(1e-3), {"nu": N}),
    "prodigy": (optax.contrib.prodigy(), {"exp_avg": S, "exp_avg_sq": N, "grad_sum": S}),
    "multi_steps": (
        optax.MultiSteps(optax.sgd(1e-3), 2).gradient_transformation(),
        {"acc_grads": S},
    ),
    "meta3": (meta3(1e-3), {"mu": S, "nu": N}),
}


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_like_parameters_are_coded_with_the_sign_of_their_field(name):
    tx, fields = LEAVES[name]
    state = quantize_state(tx).init(large_tree())
    found = coded(state)
    assert {p.rsplit("['")[-1] for p in found} == {"w']", "long']"}
    signs = {re.sub(r".*\.(\w+)\['\w+'\]", r"\1", p): n.code.signed for p, n in found.items()}
    assert signs == fields


def test_factored_moments_and_small_leaves_are_left_alone():
    tx = quantize_state(optax.adafactor(1e-3, min_dim_size_to_factor=32))
    assert {p.rsplit(".", 1)[-1] for p in coded(tx.init(large_tree()))} == {"v['long']"}


def test_parameters_may_be_one_bare_array():
    state = quantize_state(optax.adam(1e-3)).init(jnp.zeros((64, 64)))
    assert sorted(coded(state)) == [".inner_state[0].mu", ".inner_state[0].nu"]


def test_masked_and_partitioned_leaves_are_found():
    labels = {"w": "a", "long": "l", "b": "a", "s": "l"}
    tx = optax.partition({"a": optax.adam(1e-3), "l": optax.lion(1e-3)}, labels)
    found = coded(quantize_state(tx).init(large_tree()))
    assert [p.rsplit(".", 1)[-1] for p in found] == ["mu['w']", "nu['w']", "mu['long']"]
    tx = optax.masked(optax.adam(1e-3), {"w": True, "long": False, "b": True, "s": False})
    found = coded(quantize_state(tx).init(large_tree()))
    assert [p.rsplit(".", 1)[-1] for p in found] == ["mu['w']", "nu['w']"]


@pytest.mark.parametrize(
    "select",
    [
        {"w": True, "long": False, "b": True, "s": True},
        lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ],
    ids=["tree", "function"],
)
def test_select_keeps_chosen_leaves_in_float32(select):
    state = quantize_state(optax.lion(1e-3), select=select).init(large_tree())
    assert [p.rsplit(".", 1)[-1] for p in coded(state)] == ["mu['w']"]
    assert state.inner_state[0].mu["long"].dtype == jnp.float32


def test_select_may_be_a_prefix():
    params = {"body": large_tree(), "head": large_tree()}
    state = quantize_state(optax.lion(1e-3), select={"body": True, "head": False}).init(params)
    assert {p.split("'")[1] for p in coded(state)} == {"body"}


def test_sign_can_be_overridden():
    state = quantize_state(optax.adam(1e-3), signed={"nu": True}).init(large_tree())
    assert all(leaf.code.signed for leaf in coded(state).values())
    tx = quantize_state(optax.contrib.schedule_free_adamw(1e-3), signed={"z": True})
    assert any(".z[" in path for path in coded(tx.init(large_tree())))


# Bytes -----------------------------------------------------------------------------------------


def gpt(layers, width, vocabulary, context):
    shapes = {"token": (vocabulary, width), "position": (context, width)}
    for i in range(layers):
        shapes |= {
            f"{i}.in": (width, 3 * width),
            f"{i}.in_bias": (3 * width,),
            f"{i}.out": (width, width),
            f"{i}.up": (width, 4 * width),
            f"{i}.up_bias": (4 * width,),
            f"{i}.down": (4 * width, width),
            f"{i}.norm": (2, width),
        }
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}


MODELS = {"10.7m": gpt(6, 384, 65, 256), "1.1b": gpt(24, 1792, 32000, 2048)}
BYTES = [
    (lambda: meta_lion(1e-3, state_bits=8), 1.04),
    (lambda: meta_lion(1e-3, state_bits=4), 0.53),
    (lambda: meta3(1e-3, state_bits=8), 2.04),
    (lambda: meta3(1e-3, state_bits=4), 1.04),
    (lambda: quantize_state(optax.adamw(1e-3), 8), 2.04),
    (lambda: quantize_state(optax.adamw(1e-3), 4), 1.04),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("make", "most"), BYTES)
def test_bytes_a_parameter(model, make, most):
    params = MODELS[model]
    state = jax.eval_shape(make().init, params)
    used = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    count = sum(math.prod(p.shape) for p in params.values())
    assert 0.95 * most < used / count <= most


@pytest.mark.parametrize("alias", [meta3, meta_lion, stability_v1, stability_v2])
def test_state_bits_of_every_alias(alias):
    params = {"w": jnp.zeros((64, 64), jnp.bfloat16)}
    plain = jax.tree.map(lambda x: x.dtype, alias(1e-3).init(params))

    def moments(bits):
        state = alias(1e-3, state_bits=bits).init(params).inner_state[1]
        return getattr(state, "inner_state", state)

    assert jax.tree.map(lambda x: x.dtype, alias(1e-3, state_bits=None).init(params)) == plain
    assert moments(32).mu["w"].dtype == jnp.float32
    assert moments(16).mu["w"].dtype == jnp.bfloat16
    for bits in (8, 4):
        assert moments(bits).mu["w"].code == BlockCode(bits, True)
        assert moments(bits).mu["w"].dtype == jnp.float32


WRONG = [
    (lambda: quantize_state(optax.adam(1e-3), 16), ValueError, "bits must be 8 or 4, got 16"),
    (lambda: quantize_state(1e-3), TypeError, "inner must be a gradient transformation, got 0.001"),
    (
        lambda: quantize_state(optax.adam(1e-3), block_size=100),
        ValueError,
        "block_size must be a power of two, got 100; 256 is a usual value",
    ),
    (
        lambda: quantize_state(optax.adam(1e-3), block_size=16),
        ValueError,
        "block_size must be a whole number >= 32, got 16",
    ),
    (
        lambda: quantize_state(meta3(1e-3, state_bits=8)).init(large_tree()),
        ValueError,
        r"quantize_state\(\) must not stand around another one .* side by side",
    ),
    (
        lambda: meta3(1e-3, mu_dtype=jnp.bfloat16, state_bits=8),
        ValueError,
        "state_bits and mu_dtype both say how .* got 8 and .*; give one of them",
    ),
    (
        lambda: meta_lion(1e-3, state_bits=3),
        ValueError,
        "state_bits must be 32, 16, 8 or 4, got 3; use one of them, and name it in static_args",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_wrong_argument_raises_with_rule_value_and_remedy(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_it_says_so_where_no_leaf_is_large_enough_to_be_coded():
    with pytest.warns(UserWarning, match="state_bits=8 codes nothing here"):
        meta3(1e-3, state_bits=8).init({"w": jnp.ones((63, 65))})


def test_it_says_nothing_where_one_leaf_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meta3(1e-3, state_bits=8).init({"w": jnp.ones((64, 64)), "b": jnp.ones(64)})
