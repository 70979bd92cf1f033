"""A relative limit falls with the width of a tensor, the same in both frameworks and on every path.

What a step of size 1 would move is far above the limit here, so that a tensor moves by its limit.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cruxy_optax
from cruxy_control import Meta3, SelfDriving
from cruxy_control.formulas.limits import relative_limit, width_of, width_share
from cruxy_optax import exact as jax_exact
from cruxy_optax import scale_by_controlled_adam, scale_by_meta_learning_rate, stabilize

torch = pytest.importorskip("torch")

from cruxy_torch import CruxyOptimizer  # noqa: E402
from cruxy_torch import exact as torch_exact  # noqa: E402
from cruxy_torch._native import library  # noqa: E402

HELD = SelfDriving(gain=0.0)
SHAPES = {"wide": (256, 300), "narrow": (64, 300), "vector": (300,), "convolution": (100, 16, 3, 3)}
SHARES = {"wide": 0.5, "narrow": 1.0, "vector": 1.0, "convolution": 0.8}


@pytest.mark.parametrize(
    ("width", "shapes"),
    [
        (1, [(), (7,), (1, 300), (0,), (0, 128), (128, 0), (5, 0, 128)]),
        (384, [(384, 384), (1152, 384), (384, 4, 96), (384, 3, 4, 96), (12, 384, 384)]),
        (128, [(128, 64, 3, 3), (3, 3, 64, 128), (128, 576)]),
        (9, [(128, 1, 3, 3), (3, 3, 1, 128)]),
        (65, [(65, 768), (768, 65)]),
    ],
)
def test_a_width_is_that_of_the_matrix_in_every_layout(width, shapes):
    assert {shape: width_of(shape) for shape in shapes} == dict.fromkeys(shapes, width)
    assert all(width_of(torch.Size(shape)) == width for shape in shapes)


def test_the_share_falls_with_the_root_of_the_width():
    assert [width_share((d, 4 * d)) for d in (8, 64, 256, 1024)] == [1.0, 1.0, 0.5, 0.25]
    assert width_share((256, 256), 256) == width_share((256, 256), None) == 1.0
    limits = relative_limit(
        np.array([4.0, 4.0, 0.0], np.float32), 0.1, 0.01, xp=np, share=np.array([1.0, 0.5, 0.5])
    )
    np.testing.assert_allclose(limits, [0.2, 0.1, 0.0005], rtol=1e-6)


def jax_moves(tx, shapes=SHAPES):
    params = {name: jnp.full(shape, 2.0) for name, shape in shapes.items()}
    updates: Any = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[
        0
    ]
    return {name: float(-u.mean()) for name, u in updates.items()}


def torch_moves(make, shapes=SHAPES, steps=1):
    params = {name: torch.nn.Parameter(torch.full(shape, 2.0)) for name, shape in shapes.items()}
    optimizer = make(list(params.values()))
    before = {name: p.detach().clone() for name, p in params.items()}
    for _ in range(steps):
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
    return {name: float((before[name] - p.detach()).mean()) for name, p in params.items()}


def left_in_jax(state):
    """The share of the rate that a limit has left."""
    (found,) = (one for one in state.inner_state if hasattr(one, "applied_rate"))
    return float(found.limit_scale)


def moved(share, limit=0.1):
    return pytest.approx({name: 2.0 * limit * share[name] for name in SHAPES}, rel=1e-4)


ALL_ONE = dict.fromkeys(SHAPES, 1.0)
ADAM: dict[str, Any] = {"weight_decay": 0.0, "law": HELD}


def test_in_jax():
    assert jax_moves(cruxy_optax.self_driving(100.0, **ADAM)) == moved(SHARES)
    assert jax_moves(cruxy_optax.self_driving_lion(100.0, **ADAM)) == moved(ALL_ONE, 0.01)
    lion = jax_moves(cruxy_optax.self_driving_lion(100.0, **ADAM), {"wide": (1536, 1536)})
    assert lion == pytest.approx({"wide": 0.01}, rel=1e-4)  # half of a hundredth of 2

    def alone(**limits):
        rate = scale_by_meta_learning_rate(100.0, relative_limit=0.1, **limits)
        return stabilize(optax.chain(scale_by_controlled_adam(), rate), HELD)

    assert jax_moves(alone()) == moved(SHARES)
    assert jax_moves(alone(limit_width=None)) == moved(ALL_ONE)
    quarter = {name: min(1.0, math.sqrt(0.25) * share) for name, share in SHARES.items()}
    of_16 = quarter | {"vector": 1.0}
    assert jax_moves(alone(limit_width=16)) == moved(of_16)
    with pytest.raises(ValueError, match=r"limit_width must be in \(0, infinity\), got 0"):
        alone(limit_width=0)


def test_injected_and_on_several_devices():
    """Where a width may be traced, and where the largest of all is worked out apart."""

    def chain(rate):
        return stabilize(optax.chain(scale_by_controlled_adam(), rate), HELD)

    injected = optax.inject_hyperparams(scale_by_meta_learning_rate)
    assert jax_moves(chain(injected(100.0, relative_limit=0.1))) == moved(SHARES)

    shapes = {"w": (16, 8), "low": (2, 8), "v": (8,)}
    start = {name: jnp.full(shape, 2.0) for name, shape in shapes.items()}
    start["low"] = jnp.full((2, 8), 0.5)
    rates = chain(scale_by_meta_learning_rate(0.15, relative_limit=0.1, limit_width=2))
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    found = []
    for sharding in (None, NamedSharding(mesh, P(None, "data"))):
        params = start
        if sharding is not None:
            params = {
                name: jax.device_put(p, sharding if p.ndim == 2 else NamedSharding(mesh, P()))
                for name, p in start.items()
            }
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = jax.jit(rates.update)(grads, rates.init(params), params)
        found.append({name: float(-u.mean()) for name, u in updates.items()})
        assert left_in_jax(state) == 1.0
    assert found[0] == pytest.approx(
        {"w": 0.05 * math.sqrt(548 / 152), "low": 0.05, "v": 0.15}, rel=1e-3
    )
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_what_is_left_of_the_rate_is_seen_by_the_law_of_the_least_narrowed():
    tx = cruxy_optax.self_driving(100.0, **ADAM)
    for shape, share in (((256, 256), 0.5), ((64, 64), 1.0)):
        params = {"w": jnp.full(shape, 2.0)}
        grads = jax.tree.map(jnp.ones_like, params)
        _, state = tx.update(grads, tx.init(params), params)
        assert left_in_jax(state) == pytest.approx(0.2 * share / 100.0, rel=1e-5)
        p = torch.nn.Parameter(torch.full(shape, 2.0))
        optimizer = CruxyOptimizer([p], lr=100.0, mode="self_driving", **ADAM)
        p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
        assert float(optimizer._law()["limit_scale"]) == pytest.approx(0.002 * share, rel=1e-5)


def test_no_width_counts_with_muon_inside():
    rng = np.random.default_rng(0)
    shapes = {"wide": (256, 256), "narrow": (64, 64), "vector": (300,), "embedding": (300, 256)}
    start = {name: np.full(shape, 2.0, np.float32) for name, shape in shapes.items()}
    grads = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    options = {"interpolation": 0.0, "averaging": None, **ADAM}

    tx = cruxy_optax.self_driving_muon(100.0, **options)
    params = jax.tree.map(jnp.asarray, start)
    signs: Any = jax.tree.map(jnp.asarray, grads)
    updates: Any = tx.update(signs, tx.init(params), params, value=1.0)[0]
    sizes = {name: float(jnp.sqrt(jnp.mean(u**2))) for name, u in updates.items()}
    assert sizes["vector"] == pytest.approx(0.4, rel=1e-4)
    assert sizes["embedding"] == pytest.approx(0.4, rel=1e-4)
    assert sizes["wide"] == pytest.approx(sizes["narrow"], rel=0.05)

    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    roles = {"wide": "mlp.up", "narrow": "mlp.up", "vector": "norm", "embedding": "embedding.token"}
    groups = [{"params": [p], "role": roles[name]} for name, p in theirs.items()]
    optimizer = CruxyOptimizer(groups, lr=100.0, mode="self_driving", direction="muon", **options)
    for name, p in theirs.items():
        p.grad = torch.tensor(grads[name])
    optimizer.step(loss=1.0)
    for name, p in theirs.items():
        moved = p.detach().numpy() - start[name]
        np.testing.assert_allclose(moved, updates[name], rtol=1e-2, atol=1e-3)


PATHS: dict[str, dict[str, Any]] = {
    "single": {"fused": False},
    "foreach": {"foreach": True},
    "native": {"fused": True},
    "8 bits": {"state_bits": 8},
    "groups": {},
}


@pytest.mark.parametrize("path", PATHS)
def test_in_torch(path):
    if path == "native" and not library.available():
        pytest.skip("needs a C compiler")

    def make(params, lion=False):
        if path == "groups":
            params = [{"params": params[:1]}, {"params": params[1:]}]
        options = {"mode": "self_driving", "use_lion": lion, **ADAM, **PATHS[path]}
        return CruxyOptimizer(params, lr=100.0, **options)

    assert torch_moves(make) == moved(SHARES)
    if path != "groups":
        lion = torch_moves(lambda params: make(params, lion=True), {"wide": (1536, 1536)})
        assert lion == pytest.approx({"wide": 0.01}, rel=1e-4)
    assert torch_moves(lambda params: make(params, lion=True)) == moved(ALL_ONE, 0.01)


def test_released_in_torch():
    params = {name: torch.nn.Parameter(torch.full(s, 2.0)) for name, s in SHAPES.items()}
    optimizer = CruxyOptimizer(
        params.values(), lr=100.0, relative_limit=0.1, weight_decay=0.0, law=Meta3()
    )
    optimizer.register_hooks()
    torch.stack([p.sum() for p in params.values()]).sum().backward()
    optimizer.step(loss=1.0)
    moves = {name: 2.0 - float(p.detach().mean()) for name, p in params.items()}
    assert moves == moved(SHARES)


def test_debug_check_knows_the_limit_of_a_wide_tensor():
    params = [torch.nn.Parameter(torch.full(shape, 2.0)) for shape in SHAPES.values()]
    optimizer = CruxyOptimizer(params, lr=100.0, mode="self_driving", weight_decay=0.0, law=HELD)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=1.0)
    rates = [tensor.rate for tensor in optimizer.debug_check().tensors]
    assert rates == pytest.approx([0.2 * share for share in SHARES.values()], rel=1e-4)


def test_both_frameworks_agree_on_what_is_wide():
    rng = np.random.default_rng(0)
    start = {n: rng.normal(0.0, 0.1, s).astype(np.float32) for n, s in SHAPES.items()}
    params: Any = jax.tree.map(jnp.asarray, start)
    tx = cruxy_optax.self_driving(0.05)
    state, update = tx.init(params), jax.jit(tx.update)
    theirs = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in start.items()}
    optimizer = CruxyOptimizer(theirs.values(), lr=0.05, mode="self_driving")
    for step in range(12):
        grads = {n: rng.normal(0.1, 1.0, s).astype(np.float32) for n, s in SHAPES.items()}
        updates, state = update(grads, state, params, value=2.0 - 0.01 * step)
        params = optax.apply_updates(params, updates)
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        optimizer.step(loss=2.0 - 0.01 * step)
    for name, p in theirs.items():
        np.testing.assert_allclose(params[name], p.detach().numpy(), rtol=1e-5, atol=1e-6)
    ours = left_in_jax(state)
    assert 0.0 < ours < 1.0
    assert float(optimizer._law()["limit_scale"]) == pytest.approx(ours, rel=1e-5)


def test_exactly_in_both_frameworks():
    shapes = {"wide": (256, 256), "narrow": (64, 64)}
    options: dict[str, Any] = {"weight_decay": 0.0, "relative_limit": 0.1}
    found = torch_moves(lambda params: torch_exact.Controlled(params, lr=100.0, **options), shapes)
    assert found == pytest.approx({"wide": 0.075, "narrow": 0.15}, rel=1e-4)  # a throttle of 0.75
    tx = jax_exact.controlled(100.0, **options)
    params = {name: jnp.full(shape, 2.0) for name, shape in shapes.items()}
    grads = jax.tree.map(jnp.ones_like, params)
    updates: Any = tx.update(grads, tx.init(params), params, value=jnp.float32(1.0))[0]
    moves = {name: float(-u.mean()) for name, u in updates.items()}
    assert moves == pytest.approx(found, rel=1e-5)
