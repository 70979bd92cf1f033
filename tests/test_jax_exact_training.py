"""Exact training in JAX: optimizers, grains, checksum, modules, refusals, and the hashes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
flax_nnx = pytest.importorskip("flax.nnx")

import cruxy_optax  # noqa: E402
import usual  # noqa: E402
from cruxy_control import PlateauGuard, SelfDriving  # noqa: E402
from cruxy_exact import verify as check  # noqa: E402
from cruxy_exact.reference import Reference  # noqa: E402
from cruxy_optax import exact  # noqa: E402
from cruxy_optax.exact import _frame  # noqa: E402
from cruxy_torch import exact as torch_exact  # noqa: E402
from exact_arrays import normal, same  # noqa: E402
from exact_jax import DESIGN, own_data, sharded, train, train_by_grains  # noqa: E402

ROOT = Path(__file__).parent.parent
SMALL = Reference(vocabulary=16, width=16, heads=2, blocks=1, length=8, batch=4)
SMALL_GRAINS = Reference(vocabulary=16, width=16, heads=2, blocks=1, length=8, batch=4, grain=1)


def numpys(reference, steps):
    """The parameters of the reference in NumPy."""
    state, _, _ = check.train(check.framework("numpy"), reference, steps)
    return state.params


def equal(a, b):
    return [name for name in b if not same(a[name], b[name])] == []


def test_functions_and_optimizer_train_the_reference_to_the_bit():
    assert equal(train(exact, SMALL, 3)[0], numpys(SMALL, 3))


@pytest.mark.slow
def test_grains_over_devices_and_calls_have_the_bits_of_grains_in_a_row():
    assert equal(train_by_grains(exact, SMALL_GRAINS, 2, 2, 2)[0], numpys(SMALL_GRAINS, 2))


def test_grains_add_up_in_any_order():
    gs = normal(40, 5) * np.float32(10.0) ** np.arange(-20, 20, dtype=np.float32)[:, None]

    def added(order):
        halves = [exact.no_grains(gs[0])] * 2
        for n, i in enumerate(order):
            halves[n % 2] = push(halves[n % 2], gs[i])
        return exact.grain_sum(exact.merge_grains(*halves))

    push = usual.jit(exact.add_grain)
    assert same(added(range(40)), added(np.random.default_rng(0).permutation(40)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, (8, 1), (4, 2)])
def test_a_self_driving_run_has_the_same_bits_on_every_mesh(mesh):
    reference = dataclasses.replace(SMALL, batch=8, driver=check.self_driving())
    placed = () if mesh is None else sharded(*mesh)
    params, state = train(exact, reference, 4, own_data, *placed)
    numpy, _, _ = check.train(check.framework("numpy"), reference, 4)
    assert equal(params, numpy.params)
    assert equal(cruxy_optax.averaged_params(state, params), numpy.averages)


@pytest.mark.slow
def test_a_self_driving_run_has_the_bits_of_its_grains_over_devices():
    reference = dataclasses.replace(SMALL_GRAINS, driver=check.self_driving())
    assert equal(train_by_grains(exact, reference, 3, 2)[0], numpys(reference, 3))


PARAMS = {"w": normal(4, 3), "b": normal(3, seed=1)}
GRADS = [{"w": normal(4, 3, seed=i), "b": normal(3, seed=i + 9)} for i in (2, 3, 4)]
GUARDED = PlateauGuard(SelfDriving(total_steps=3), patience=1, loss_decay=0.0)
OPTIMIZERS = {
    "adamw": (
        lambda: exact.adamw(1e-2, weight_decay=0.1),
        lambda p: torch_exact.AdamW(p, 1e-2, weight_decay=0.1),
    ),
    "lion": (
        lambda: exact.lion(1e-2, weight_decay=0.1),
        lambda p: torch_exact.Lion(p, 1e-2, weight_decay=0.1),
    ),
    "sgd": (lambda: exact.sgd(1e-2), lambda p: torch_exact.SGD(p, 1e-2)),
    "nesterov": (
        lambda: exact.sgd(1e-2, 0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch_exact.SGD(p, 1e-2, 0.9, 0.1, nesterov=True),
    ),
    "controlled": (lambda: exact.controlled(1e-2), lambda p: torch_exact.Controlled(p, 1e-2)),
    "self-driving": (exact.self_driving, torch_exact.SelfDriving),
    "guarded": (
        lambda: exact.self_driving(law=GUARDED),
        lambda p: torch_exact.SelfDriving(p, law=GUARDED),
    ),
}
LAWS = ("controlled", "self-driving", "guarded")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "guarded" else n for n in OPTIMIZERS]
)
def test_an_optimizer_steps_as_in_pytorch(name):
    make, make_torch = OPTIMIZERS[name]
    tx, params = optax.with_extra_args_support(make()), PARAMS
    state, update = tx.init(params), usual.jit(tx.update)
    theirs = {k: torch.nn.Parameter(torch.from_numpy(p.copy())) for k, p in PARAMS.items()}
    optimizer = make_torch(theirs.values())
    for grads in GRADS:
        updates, state = update(grads, state, params, value=1.0)
        params = exact.apply_updates(params, updates)
        for k, p in theirs.items():
            p.grad = torch.from_numpy(grads[k].copy())
        optimizer.step(**({"loss": 1.0} if name in LAWS else {}))
    assert equal(params, {k: p.detach().numpy() for k, p in theirs.items()})
    if "driving" in name:
        averages = {k: optimizer.state[p]["average"].numpy() for k, p in theirs.items()}
        assert equal(cruxy_optax.averaged_params(state, params), averages)


def test_a_step_that_is_not_finite_moves_nothing_under_a_law():
    tx = exact.controlled(1e-2, weight_decay=0.1)
    bad = {"w": GRADS[0]["w"] * np.float32("nan"), "b": GRADS[0]["b"]}
    updates, _ = tx.update(bad, tx.init(PARAMS), PARAMS, value=1.0)
    assert equal(exact.apply_updates(PARAMS, updates), PARAMS)


def test_weight_decay_keeps_to_its_mask():
    tx = exact.sgd(1.0, weight_decay=0.5, mask={"w": True, "b": False})
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    assert same(updates["w"], -0.5 * PARAMS["w"])
    assert not updates["b"].any()


def test_a_clip_keeps_the_norm_and_what_is_below_it():
    tx = exact.clip_by_global_norm(1.0)
    (clipped, _), (kept, _) = (
        tx.update(g, ()) for g in (GRADS[0], jax.tree.map(lambda x: x / 64, GRADS[0]))
    )
    assert abs(float(exact.global_norm(clipped)) - 1.0) < 2e-6
    assert same(kept["w"], GRADS[0]["w"] / 64)


def test_schedules_have_the_bits_of_numpy():
    from cruxy_exact import optimizers as core

    counts = np.arange(0, 1000, 7, dtype=np.int32)
    cosine = {"peak": 1e-3, "warmup": 10, "steps": 900, "end": 1e-5}
    wsd = {"peak": 1e-3, "warmup": 10, "decay": 90, "steps": 900}
    assert same(exact.warmup_cosine(**cosine)(counts), core.warmup_cosine(counts, **cosine, xp=np))
    want = core.warmup_stable_decay(counts, **wsd, xp=np)
    assert same(usual.jit(exact.warmup_stable_decay(**wsd))(counts), want)


def test_a_pytree_has_the_checksum_of_a_state_dict():
    state_dict = {k: torch.from_numpy(p) for k, p in PARAMS.items()}
    assert exact.checksum(PARAMS) == torch_exact.checksum(state_dict)


def test_a_checksum_does_not_see_the_sharding():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(PARAMS["w"], jax.NamedSharding(mesh, jax.P("d")))
    assert exact.checksum({**PARAMS, "w": spread}) == exact.checksum(PARAMS)


def test_a_checksum_of_other_types_is_an_error():
    with pytest.raises(TypeError, match="float32 arrays, got bfloat16 in 'a'"):
        exact.checksum({"a": jnp.ones(1, jnp.bfloat16)})


class Model(flax_nnx.Module):
    def __init__(self, fused=True):
        rngs, nn = flax_nnx.Rngs(0), exact.nnx
        self.tok = nn.Embed(11, 8, rngs=rngs)
        self.norm, self.rms = nn.LayerNorm(8, epsilon=1e-5), nn.RMSNorm(8)
        self.mix = nn.Attention(
            4, 8, kv_heads=2, fused=fused, causal=True, rotary_base=100.0, rngs=rngs
        )
        self.drop = nn.Dropout(0.25, layer=5, seed=3)
        self.head = nn.Linear(8, 11, rngs=rngs)

    def __call__(self, ids, step):
        h = self.tok(ids)
        h = exact.add(h, self.drop(self.mix(self.norm(h)), step))
        return self.head(self.rms(h))


class TorchModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = torch_exact.Embedding(11, 8)
        self.norm, self.rms = torch_exact.LayerNorm(8), torch_exact.RMSNorm(8, eps=1e-6)
        self.mix = torch_exact.Attention(8, 4, 2, causal=True, rotary_base=100.0)
        self.drop = torch_exact.Dropout(0.25, 5, 3)
        self.head = torch_exact.Linear(8, 11)

    def forward(self, ids):
        h = self.tok(ids)
        h = torch_exact.add(h, self.drop(self.mix(self.norm(h))))
        return self.head(self.rms(h))


IDS = np.random.default_rng(0).integers(0, 11, (2, 5)).astype(np.int32)


def test_modules_are_those_of_pytorch_to_the_bit():
    """Parameters move over, and gradients come out the same."""
    model, theirs = Model(), TorchModel()
    theirs.load_state_dict(
        {k: torch.from_numpy(np.asarray(p).copy()) for k, p in exact.nnx.state_dict(model).items()}
    )
    assert exact.checksum(model) == torch_exact.checksum(theirs)

    def loss(model):
        losses = exact.softmax_cross_entropy_with_integer_labels(model(IDS, 7), IDS)
        return exact.sum(losses)

    grads = flax_nnx.jit(flax_nnx.grad(loss))(model)
    torch_exact.set_step(theirs, 7)
    ids = torch.from_numpy(IDS).long()
    torch_exact.cross_entropy(theirs(ids), ids).backward()
    got = Model()
    flax_nnx.update(got, grads)
    assert equal(
        exact.nnx.state_dict(got), {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    )


def test_separate_projections_have_the_outputs_of_a_fused_one():
    fused, apart = Model().mix, Model(fused=False).mix
    parts = np.split(np.asarray(fused.qkv.kernel[...]), (8, 12), axis=1)
    for layer, kernel in zip((apart.query, apart.key, apart.value), parts, strict=True):
        layer.kernel[...] = jnp.asarray(kernel)
    apart.out.kernel[...] = fused.out.kernel[...]
    x = normal(2, 5, 8)
    assert same(fused(x), apart(x))


def test_separate_projections_have_the_gradients_of_forked_layers_in_pytorch():
    mix, x = exact.nnx.Attention(2, 8, fused=False, rngs=flax_nnx.Rngs(0)), normal(2, 5, 8)
    loss = lambda mix, x: exact.sum(exact.silu(mix(x)))  # noqa: E731
    grads, by_x = jax.jit(jax.grad(loss, (0, 1)))(mix, x)
    theirs = {k: torch.tensor(np.asarray(p)) for k, p in exact.nnx.state_dict(mix).items()}
    theirs = {k: p.requires_grad_() for k, p in theirs.items()}
    y = torch.from_numpy(x).requires_grad_()

    def linear(name, x):
        return torch_exact.linear(x, theirs[f"{name}.weight"], theirs[f"{name}.bias"])

    pairs = zip(("query", "key", "value"), torch_exact.fork(y, 3), strict=True)
    heads = [linear(name, c).unflatten(-1, (2, 4)).transpose(1, 2) for name, c in pairs]
    mixed = torch_exact.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch_exact.sum(torch_exact.silu(linear("out", mixed))).backward()
    assert same(by_x, y.grad.numpy())
    assert equal(exact.nnx.state_dict(grads), {k: p.grad.numpy() for k, p in theirs.items()})


def test_parameters_go_to_pytorch_and_back():
    model, arrays = Model(), exact.nnx.state_dict(Model())
    exact.nnx.load_state_dict(model, {k: 2 * x for k, x in arrays.items()})
    assert equal(exact.nnx.state_dict(model), {k: 2 * np.asarray(x) for k, x in arrays.items()})


def test_parameters_of_another_model_are_an_error():
    arrays = exact.nnx.state_dict(Model())
    with pytest.raises(ValueError, match=r"\['more'\] too many and \[\] too few"):
        exact.nnx.load_state_dict(Model(), {**arrays, "more": arrays["head.bias"]})
    with pytest.raises(ValueError, match=r"head\.bias must be float32 of a shape"):
        exact.nnx.load_state_dict(Model(), {**arrays, "head.bias": np.zeros(2, np.float32)})


def test_dropout_without_a_step_is_an_error_unless_it_drops_nothing():
    layer, x = exact.nnx.Dropout(0.5, layer=0), normal(3)
    with pytest.raises(ValueError, match="step=None"):
        layer(x)
    layer.eval()
    assert layer(x) is x


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: exact.adamw(-1.0), ValueError, "learning_rate must be"),
        (lambda: exact.sgd(0.1, nesterov=True), ValueError, "momentum above 0"),
        (lambda: exact.controlled(0.0, law=SelfDriving()), ValueError, "learning_rate must be"),
        (lambda: exact.self_driving(relative_limit=0.0), ValueError, "relative_limit must be"),
        (lambda: exact.accumulate_grains(exact.sgd(0.1), 0), ValueError, "every must be"),
        (lambda: exact.sgd(0.1).update(PARAMS, exact.sgd(0.1).init(PARAMS)), ValueError, "params"),
        (lambda: exact.adamw(0.1).init({"a": jnp.ones(1, jnp.bfloat16)}), TypeError, "bfloat16"),
        (lambda: _frame.check_platform("tpu"), RuntimeError, "IEEE float64"),
        (lambda: _frame.check_platform("METAL"), RuntimeError, "IEEE float64"),
        (lambda: _frame.check_flags("--xla_cpu_enable_fast_math=true"), RuntimeError, "remove it"),
        (lambda: exact.nnx.Attention(3, 8, rngs=flax_nnx.Rngs(0)), ValueError, "divide"),
    ],
)
def test_bad_input_is_an_error(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_fast_math_that_is_switched_off_is_none():
    _frame.check_flags("--xla_cpu_enable_fast_math --xla_cpu_enable_fast_math=false")


def in_a_process(options, **environment):
    """The digest that a process of its own trains to."""
    out = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "exact_jax.py"), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.split()[0]


def test_fast_math_is_refused_when_exact_is_imported():
    out = subprocess.run(
        [sys.executable, "-c", "from cruxy_optax import exact"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_cpu_enable_fast_math=true",
        },
        capture_output=True,
        text=True,
    )
    assert "RuntimeError: exact arithmetic needs XLA" in out.stderr


DEVICES = "--xla_force_host_platform_device_count=8"


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("isa", ["SSE4_2", "AVX", "AVX2", "AVX512"])
def test_every_instruction_set_has_the_design_hash(isa, threads):
    flags = f"--xla_cpu_max_isa={isa}"
    if threads == "1":
        flags += " --xla_cpu_multi_thread_eigen=false"
    assert in_a_process({}, XLA_FLAGS=flags) == DESIGN[None]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["int8", "int8_direct", "digits"])
def test_every_engine_has_the_design_hash(engine):
    assert in_a_process({"engine": engine}) == DESIGN[None]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 1), (8, 1), (1, 2), (1, 4), (4, 2)])
def test_every_sharding_has_the_design_hash(mesh):
    assert in_a_process({"mesh": mesh}, XLA_FLAGS=DEVICES) == DESIGN[None]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "calls"), [(1, 1), (4, 1), (8, 1), (2, 2), (2, 4)])
def test_every_split_into_grains_has_the_design_hash(devices, calls):
    options = {"grain": 1, "devices": devices, "calls": calls}
    assert in_a_process(options, XLA_FLAGS=DEVICES) == DESIGN[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("control", "flags"),
    [("settle", "--xla_cpu_max_isa=AVX2"), ("fast math", "--xla_cpu_enable_fast_math=true")],
)
def test_a_negative_control_differs(control, flags):
    options = {"steps": 6}
    found = in_a_process({**options, "control": control}, XLA_FLAGS=flags)
    assert found != in_a_process(options, XLA_FLAGS="")
