"""What steps send between devices, counted: nothing gathered, sums packed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cruxy_optax as ours
from benchmarks._counted import Task
from benchmarks._jax.hlo import axes_of, collectives, kernels
from benchmarks._jax.scale import measured
from benchmarks._wire import Message, sent_bytes
from cruxy_control.slices import blocks
from optimizers import assert_close
from relatives import crossed

SHAPES = {
    "embed": {"embedding": (64, 32)},
    "layer_0": {"kernel": (32, 64), "bias": (64,), "scale": (32,)},
    "layer_1": {"kernel": (64, 32), "bias": (32,)},
}
SLICES = {"layer_0.kernel": blocks(8, 8, 16, axis=0)}


def steered(*members):
    return ours.stabilize(optax.chain(*members, ours.scale_by_meta_learning_rate(1e-3)))


# Maker, and how many packed sums wait for one another: the norms, then what each part measures.
STAGES = {
    "meta3": (lambda: ours.meta3(1e-3), 1),
    "meta_lion": (lambda: ours.meta_lion(1e-3), 1),
    "meta3_8bit": (lambda: ours.meta3(1e-3, state_bits=8), 1),
    "stability_v1": (lambda: ours.stability_v1(1e-3), 1),
    "stability_v2": (lambda: ours.stability_v2(1e-3), 1),
    "self_driving": (ours.self_driving, 1),
    "self_driving_4bit": (lambda: ours.self_driving(state_bits=4), 1),
    "self_driving_lion": (ours.self_driving_lion, 1),
    "axiom": (lambda: ours.axiom(1e-3), 4),
    "axiom_all": (
        lambda: ours.axiom(b1=0.9, momentum_bits=32, relative_step=True, snr_floor=0.1),
        5,
    ),
    "cosmic": (lambda: ours.cosmic(1e-3, state_budget="30KB"), 2),
    "tiger": (lambda: ours.tiger(1e-3), 2),
    "tiger_all": (
        lambda: ours.tiger(1e-3, power=0.5, trust_cap=10.0, trust_decay=0.9, agc=1.0),
        6,
    ),
    "limit_relative_step": (ours.limit_relative_step, 1),
    "soften_sign": (ours.soften_sign, 1),
    "blend_sign": (ours.blend_sign, 1),
    "scale_by_trust_ratio_ema": (lambda: ours.scale_by_trust_ratio_ema(decay=0.9), 1),
    "trust of rows": (lambda: ours.scale_by_trust_ratio_ema(per="row"), 1),
    "clip_by_parameter_norm": (ours.clip_by_parameter_norm, 1),
    "clip_by_rms": (ours.clip_by_rms, 1),
    "rms of rows": (lambda: ours.clip_by_rms(per="row"), 1),
    "centralize_kernels": (ours.centralize_kernels, 1),
    "blend_by_lora_pid": (
        lambda: steered(ours.blend_by_lora_pid(ours.scale_by_controlled_momentum())),
        5,
    ),
    "scale_by_slices": (lambda: ours.scale_by_slices(SLICES, {"k": 0.5}), 0),
    "balance_slices": (lambda: ours.balance_slices(SLICES, every=1), 2),
    "scale_by_role": (lambda: ours.scale_by_role({"embedding": 0.3}), 0),
    "decayed": (
        lambda: steered(ours.scale_by_controlled_adam(), ours.add_controlled_decayed_weights(0.1)),
        1,
    ),
    "track_gamma_norm": (ours.track_gamma_norm, 1),
    "track_curvature": (ours.track_curvature, 1),
}
MESHES = {
    "one axis": ((8,), ("data",), P("data"), P()),
    "two axes": ((4, 2), ("data", "model"), P("data", "model"), P()),
    "vectors split": ((4, 2), ("data", "model"), P("data", "model"), P("model")),
    "three axes": ((2, 2, 2), ("data", "model", "expert"), P(("data", "expert"), "model"), P()),
}
TWICE = {
    "rows twice": ((4, 2), ("data", "model"), P(("data", "model")), P()),
    "columns twice": ((4, 2), ("data", "model"), P(None, ("data", "model")), P()),
    "rows thrice": ((2, 2, 2), ("data", "model", "expert"), P(("data", "model", "expert")), P()),
    "both": ((2, 2, 2), ("data", "model", "expert"), P("expert", ("data", "model")), P()),
    "copies": ((2, 2, 2), ("data", "model", "expert"), P("model", "expert"), P()),
}
"""More ways to split a matrix: along several axes of the mesh at once, and less than all."""
BACKWARDS = ((4, 2), ("data", "model"), P(("model", "data")), P())
FAST = (
    *(("meta3", "explicit"), ("self_driving", "auto")),
    *(("axiom", "explicit"), ("limit_relative_step", "auto")),
)
ALIKE = ("meta3", "meta_lion", "self_driving_lion", "axiom", "tiger")
MOST = {
    "meta3": 3,
    "meta_lion": 3,
    "tiger": 4,
    "self_driving_lion": 5,
    "self_driving": 5,
    "axiom": 6,
}
"""Times the equations that a layer has under AdamW. Those of scalars are compiled once for all."""
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def placed(values, mesh, matrices, vectors):
    specs = jax.tree.map(lambda x: matrices if x.ndim > 1 else vectors, values)
    places = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    return jax.device_put(values, places)


def step_of(tx):
    tx = optax.with_extra_args_support(tx)
    return lambda grads, state, params: tx.update(grads, state, params, value=jnp.float32(1.0))


def run(tx, kind, layout):
    """What a step sends, and what it makes of parameters and gradients."""
    shape, names, matrices, vectors = (MESHES | TWICE | {"backwards": BACKWARDS})[layout]
    mesh = jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape))
    with jax.set_mesh(mesh):
        params, grads = (placed(tree(seed), mesh, matrices, vectors) for seed in (0, 1))
        state = jax.jit(tx.init)(params)
        done = jax.jit(step_of(tx)).lower(grads, state, params).compile()
        updates, state = done(grads, state, params)
    return collectives(done.as_text()), jax.device_get(updates), state, params


@pytest.mark.parametrize(
    ("name", "kind", "layout"),
    crossed(STAGES, KINDS, MESHES, fast=[(*one, "two axes") for one in FAST]),
)
def test_nothing_is_gathered_and_sums_are_packed(name, kind, layout):
    make, stages = STAGES[name]
    found, updates, _, _ = run(make(), kind, layout)
    axes = len(MESHES[layout][0])
    assert {one.operation for one in found} <= {"all-reduce"}
    # A sum over two axes of a mesh is one all-reduce after another to XLA.
    assert len(found) <= stages * axes
    # Factors have a number a row and a column, rows of statistics one a row; the rest is scalars.
    assert sum(one.bytes for one in found) < 4096
    tx = make()
    params, grads = tree(0), tree(1)
    want = step_of(tx)(grads, tx.init(params), params)[0]
    assert_close(updates, jax.device_get(want), ulps=512)


MUONS = ("orthogonalize_updates", "self_driving_muon")


@pytest.mark.parametrize(
    ("name", "kind", "layout"),
    [
        *crossed(MUONS, KINDS, MESHES | TWICE, fast=[(MUONS[0], "auto", "rows twice")]),
        *crossed(MUONS, ["explicit"], ["backwards"], fast=[]),
    ],
)
def test_no_device_gathers_more_than_one_matrix_at_a_time(name, kind, layout):
    tx = getattr(ours, name)()
    found, updates, _, _ = run(tx, kind, layout)
    matrix = 4 * 64 * 32
    # A share of eight, filled up. What is copied on automatic axes, whose copies nothing tells:
    # two of four parts of each.
    most = 2.0 if (kind, layout) == ("auto", "copies") else 1.5
    assert max(one.bytes for one in found) <= matrix * most
    params, grads = tree(0), tree(1)
    want = step_of(tx)(grads, tx.init(params), params)[0]
    np.testing.assert_allclose(
        updates["layer_0"]["kernel"], want["layer_0"]["kernel"], rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["self_driving", pytest.param("axiom", marks=pytest.mark.slow)])
def test_nothing_as_large_as_a_parameter_is_on_every_device(name, kind):
    _, _, state, params = run(STAGES[name][0](), kind, "two axes")
    smallest = min(x.size for x in jax.tree.leaves(params) if x.ndim > 1)
    whole = [x for x in jax.tree.leaves(state) if x.sharding.is_fully_replicated]
    assert max(x.size for x in whole) < smallest


def test_init_under_jit_makes_the_state_in_its_place():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params = placed(tree(), mesh, P("data", "model"), P())
        tx = ours.self_driving()
        places = jax.tree.map(lambda leaf: leaf.sharding, jax.eval_shape(tx.init, params))
        made = jax.jit(tx.init, out_shardings=places).lower(params).compile()
        state = made(params)
    assert collectives(made.as_text()) == []
    moments = state.inner_state[1].mu["layer_0"]["kernel"]
    assert moments.sharding.spec == P("data", "model")


def test_a_stack_of_layers_is_one_leaf():
    """Sums over stacked layers cost what one leaf costs."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tx = ours.limit_relative_step()

    def sent(shape, spec):
        leaf = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        text = jax.jit(step_of(tx)).lower(leaf, tx.init(leaf), leaf).compile().as_text()
        return [one.bytes for one in collectives(text)]

    assert sent((6, 16, 8), P(None, "data", "model")) == sent((16, 8), P("data", "model"))


def test_on_explicit_axes_more_tensors_send_no_more():
    """XLA packs 256 numbers at most; here they are added up before anything is sent."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    place = NamedSharding(mesh, P("data", "model"))
    grads = {
        f"layer_{i}": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=place) for i in range(300)
    }
    tx = ours.track_gamma_norm()
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, grads)
        text = jax.jit(step_of(tx)).lower(grads, state, grads).compile().as_text()
    assert [(one.operation, one.bytes) for one in collectives(text)] == [("all-reduce", 4)]


@pytest.mark.slow
def test_512_devices_get_as_many_messages_as_8():
    tasks = [Task(name, "llama-1b", True) for name in ("self_driving", "axiom")]

    def numbers(mesh):
        found = measured(mesh, tasks, patience=300.0)
        return [sum(message["times"] for message in one["messages"]) for one in found]

    assert numbers({"data": 64, "model": 8}) == numbers({"data": 4, "model": 2})


@pytest.mark.parametrize(
    "name", [n for n in STAGES if n not in ("scale_by_slices", "balance_slices")]
)
def test_a_stack_may_have_more_elements_than_an_integer_counts(name):
    tx = STAGES[name][0]() if name != "cosmic" else ours.cosmic(1e-3, state_budget="400GB")
    shapes = {"layers": {"kernel": (80, 8192, 28672)}, "norm": {"scale": (8192,)}}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(step_of(tx), params, state, params)
    assert updates["layers"]["kernel"].shape == (80, 8192, 28672)


def test_uneven_shards_under_shard_map():
    """Norms of shards that differ in what they hold are those of the whole."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx, alone = ours.self_driving(axis_names="data"), ours.self_driving()
    params = {"w": jnp.zeros((16, 4)).at[3].set(5.0), "b": jnp.ones(4)}
    state = alone.init(params)
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: P("data") if "'w'" in jax.tree_util.keystr(path) else P(), state
    )
    split = {"w": P("data"), "b": P()}
    step = jax.shard_map(
        step_of(tx), mesh=mesh, in_specs=(split, specs, split), out_specs=(split, specs)
    )
    text = jax.jit(step).lower(params, state, params).compile().as_text()
    assert len(collectives(text)) == 1
    got = jax.jit(step)(params, state, params)
    assert_close(jax.device_get(got), jax.device_get(step_of(alone)(params, state, params)), 512)


TEXT = """
%body (p: f32[4]) -> f32[4] {
  %g = f32[4,64]{1,0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %r = (f32[], f32[16]{0}) all-reduce(%a, %b), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}
  %q = bf16[8]{0} all-to-all(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %s = f32[4]{0} all-reduce(%a), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}
  %w = (s32[]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_collectives_are_read_with_size_axis_and_number():
    mesh = {"data": 4, "model": 2}
    read = [(c.operation, c.bytes, axes_of(c.devices, mesh), c.times) for c in collectives(TEXT)]
    assert read == [
        ("all-gather", 1024, ("model",), 3),
        ("all-reduce", 68, ("data",), 1),
        ("all-to-all", 16, ("model",), 1),
        ("all-reduce", 16, ("model",), 1),
    ]


def test_a_ring_sends_what_the_hand_counts():
    assert sent_bytes(Message("all-reduce", 800, ("data",), 4)) == 1200.0
    assert sent_bytes(Message("all-gather", 800, ("data",), 4, times=2)) == 1200.0
    assert sent_bytes(Message("reduce-scatter", 200, ("data",), 4)) == 600.0


def layers(tx, number):
    """A step for so many matrices of one shape on a mesh, traced."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split, whole = NamedSharding(mesh, P("data", "model")), NamedSharding(mesh, P())

    def on(leaf):
        place = split if leaf.ndim == 2 else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    params = {f"layer_{i}": jax.ShapeDtypeStruct((64, 128), jnp.float32) for i in range(number)}
    params, state = jax.tree.map(on, (params, jax.eval_shape(tx.init, params)))
    return jax.jit(step_of(tx)).trace(params, state, params)


def equations(jaxpr):
    """Of a program, and of all programs inside it."""
    values = [value for eqn in jaxpr.eqns for value in eqn.params.values()]
    inside = [getattr(value, "jaxpr", value) for value in values]
    return len(jaxpr.eqns) + sum(equations(one) for one in inside if hasattr(one, "eqns"))


@pytest.mark.parametrize(
    "name", ["self_driving", *(pytest.param(n, marks=pytest.mark.slow) for n in ALIKE)]
)
def test_more_layers_of_a_shape_are_no_more_to_compile(name):
    """A number baked into each tensor's loops, such as its place in a stack, makes each another."""
    make, _ = STAGES[name]
    few, many = (kernels(layers(make(), n).lower().compile().as_text()) for n in (3, 6))
    assert len(many) == len(few)


def test_on_one_device_a_program_grows_as_the_number_of_tensors():
    """What is made of all of them is worked out once, and not in the loop of each."""

    def lines(number):
        params = {f"layer_{i}": jnp.ones((4, 8)) for i in range(number)}
        tx = ours.self_driving()
        step = jax.jit(step_of(tx)).lower(params, tx.init(params), params)
        return len(step.compile().as_text().splitlines())

    few, more, many = map(lines, (17, 34, 51))
    assert many - more < 1.1 * (more - few)


@pytest.mark.parametrize("name", [*ALIKE, "self_driving"])
def test_a_layer_takes_few_equations_more_than_under_adamw(name):
    def a_layer(tx):
        few, many = (equations(layers(tx, n).jaxpr.jaxpr) for n in (2, 4))
        return (many - few) / 2

    make, _ = STAGES[name]
    assert a_layer(make()) <= MOST[name] * a_layer(optax.adamw(1e-3))
