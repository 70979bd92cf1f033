"""An average in 16 and 8 bits is that in float32 on every path and through all that keeps it."""

import copy
import io

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import cruxy_optax
import cruxy_torch
from cruxy_torch import CruxyOptimizer
from relatives import crossed, relatives
from test_average_bits import ERROR

either = pytest.mark.parametrize("bits", [16, 8])
PATHS = {
    "reference": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "C": {"fused": True},
}


def parameters(dtype=torch.float32):
    rng = np.random.default_rng(0)
    shapes = (64, 64), (17, 301), (7,)
    values = [torch.tensor(0.1 * rng.normal(size=s), dtype=dtype) for s in shapes]
    return [torch.nn.Parameter(value) for value in values]


def gradients(params, step):
    torch.manual_seed(step)
    return [(0.1 * p.detach() + torch.randn_like(p)).to(p.dtype) for p in params]


def take(optimizer, params, step, grads=None):
    for p, g in zip(params, grads or gradients(params, step), strict=True):
        p.grad = g
    optimizer.step(loss=1.0)


def averages(optimizer, params):
    with optimizer.averaged():
        return [p.detach().double().clone() for p in params]


def wandering(optimizer, params, steps=120):
    """The exact averages after so many steps."""
    exact = [p.detach().double() for p in params]
    for t in range(steps):
        take(optimizer, params, t)
        exact = [
            a + 17.0 / (t + 17.0) * (p.detach().double() - a)
            for a, p in zip(exact, params, strict=True)
        ]
    return exact


def error(params, found, exact):
    """The largest error of an average, over the distance of that from the parameter."""
    rows = zip(params, found, exact, strict=True)
    return max(float((a - e).norm() / (p.detach() - e).norm()) for p, a, e in rows)


def driving(params, bits, **options):
    return CruxyOptimizer(params, mode="self_driving", average_bits=bits, **options)


@pytest.mark.parametrize(("bits", "path"), crossed([16, 8], PATHS))
def test_average_is_that_of_the_parameters_on_every_path(bits, path):
    params = parameters()
    optimizer = driving(params, bits, **PATHS[path])
    exact = wandering(optimizer, params)
    assert error(params, averages(optimizer, params), exact) < ERROR[bits]


@pytest.mark.parametrize("bits", relatives([16, 8], [8]))
def test_average_of_bfloat16_parameters_is_that_of_what_they_really_are(bits):
    params = parameters(torch.bfloat16)
    optimizer = driving(params, bits, stochastic_rounding=True)
    exact = wandering(optimizer, params)
    wide = [cruxy_torch._memory.state.average_of(p, optimizer.state[p]) for p in params]
    assert error(params, wide, exact) < ERROR[bits]


@either
def test_large_tensor_is_treated_in_blocks_that_give_the_same(bits, monkeypatch):
    found = []
    for block in (1 << 22, 1024):
        monkeypatch.setattr("cruxy_torch._blocks.BLOCK", block)
        params = parameters()
        optimizer = driving(params, bits)
        wandering(optimizer, params, 3)
        found.append(averages(optimizer, params))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=0.0, atol=0.0)


@either
def test_training_is_the_same_to_the_bit_and_the_libraries_go_on_to_take_it(bits):
    found = []
    for each in (bits, 32):
        params = parameters()
        optimizer = driving(params, each)
        wandering(optimizer, params, 3)
        found.append((params, optimizer.backend))
    (coded, here), (exact, there) = found
    assert here == there
    assert all(map(torch.equal, coded, exact))


@either
def test_skipped_step_leaves_every_code_as_it_was(bits):
    params = parameters()
    optimizer = driving(params, bits)
    wandering(optimizer, params, 5)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    take(optimizer, params, 5, [torch.full_like(p, torch.nan) for p in params])
    after = optimizer.state_dict()["state"]
    keys = ("average", "average_codes", "average_scales")
    for old, new in zip(before.values(), after.values(), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in keys if k in old)


@either
def test_parameter_without_a_gradient_is_averaged_all_the_same(bits):
    params = parameters()
    optimizer = driving(params, bits)
    wandering(optimizer, params, 10)
    still = params[0].detach().clone()
    before = averages(optimizer, params)[0] - still
    for t in range(60):
        grads = gradients(params, t)
        take(optimizer, params[1:], t, grads[1:]) if t else None
        params[0].grad = None
    after = averages(optimizer, params)[0] - still
    share = np.prod([1.0 - 17.0 / (t + 17.0) for t in range(10, 69)])
    assert abs(float((after * before).sum() / before.square().sum()) - share) < 0.02


@either
def test_copy_and_saved_state_go_on_to_the_bit(bits):
    params = parameters()
    optimizer = driving(params, bits)
    wandering(optimizer, params, 5)
    twins, other = copy.deepcopy((params, optimizer))
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = driving(fresh, 32)
    loaded.load_state_dict(torch.load(saved))  # it brings the bits that were saved
    for one, own in ((optimizer, params), (other, twins), (loaded, fresh)):
        wandering(one, own, 3)
    for one, own in ((other, twins), (loaded, fresh)):
        for a, b in zip(averages(one, own), averages(optimizer, params), strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("bits", relatives([16, 8], [8]))
def test_averages_of_released_gradients_are_kept_in_fewer_bits_too(bits):
    found = []
    for each in (32, bits):
        params = parameters()
        optimizer = CruxyOptimizer(params, averaging=16.0, average_bits=each)
        optimizer.register_hooks()
        for t in range(40):
            weights = gradients(params, t)
            used = range(3) if t % 4 else range(1, 3)  # the first is late now and then
            sum((params[i] * weights[i]).sum() for i in used).backward()
            optimizer.step(loss=1.0)
            optimizer.zero_grad()
        found.append((params, averages(optimizer, params)))
    (_, exact), (params, coded) = found
    assert error(params, coded, exact) < ERROR[bits]


@pytest.mark.parametrize(("bits", "size"), [(32, 12.0), (16, 10.008), (8, 9.008)])
def test_estimate_counts_the_bytes(bits, size):
    model = torch.nn.Linear(1024, 1024, bias=False, device="meta")
    memory = cruxy_torch.estimate_memory(model, lambda params: driving(params, bits))
    assert memory.state / memory.count == pytest.approx(size, abs=2e-3)


@pytest.mark.parametrize("kind", relatives(["AXIOM", "Tiger", "Cosmic"], ["Tiger"]))
def test_other_optimizers_keep_it_too(kind):
    params = parameters()
    more = {"state_budget": "1MB"} if kind == "Cosmic" else {}
    optimizer = getattr(cruxy_torch, kind)(params, averaging=16.0, average_bits=8, **more)
    exact = wandering(optimizer, params)
    assert optimizer.state[params[0]]["average_codes"].dtype == torch.int8
    assert error(params, averages(optimizer, params), exact) < ERROR[8]


@pytest.mark.parametrize("bits", [4, 0, "8"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="average_bits must be 8, 16 or 32, got"):
        driving(parameters(), bits)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        pytest.param(8, 8, marks=pytest.mark.slow),
        (8, 32),
        pytest.param(32, 8, marks=pytest.mark.slow),
        (16, 16),
    ],
)
def test_run_moves_between_frameworks_with_its_average(here, there):
    rng = np.random.default_rng(0)
    values = {n: 0.1 * rng.normal(size=s).astype("f") for n, s in (("a", (64, 96)), ("b", (5000,)))}
    tx = cruxy_optax.self_driving(average_bits=here)
    tree = {name: jnp.asarray(value) for name, value in values.items()}
    state = tx.init(tree)
    for _ in range(20):
        grads = {n: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for n, v in values.items()}
        updates, state = tx.update(grads, state, tree, value=1.0)
        tree = {n: p + updates[n] for n, p in tree.items()}
    exact = cruxy_optax.averaged_params(state, tree)

    params = [torch.nn.Parameter(torch.tensor(np.asarray(tree["a"]).T.copy()))]
    params.append(torch.nn.Parameter(torch.tensor(np.asarray(tree["b"]))))
    optimizer = driving(params, there)
    leaves = lambda t: [t["a"].T, t["b"]]  # noqa: E731
    optimizer.load_state_dict(cruxy_torch.state_from_optax(optimizer, state, leaves))
    moved = averages(optimizer, params)
    back = cruxy_torch.state_to_optax(optimizer, state, lambda p: {"a": p[0].T, "b": p[1]})
    again = cruxy_optax.averaged_params(back, tree)
    for name, one, wide in (("a", moved[0].T, again["a"]), ("b", moved[1], again["b"])):
        distance = float(jnp.abs(exact[name] - tree[name]).max())
        # Half a step of the coarser side, which is a 32nd of the largest distance at most.
        atol = distance / 32
        np.testing.assert_allclose(one, exact[name], atol=atol, rtol=0.0)
        np.testing.assert_allclose(wide, exact[name], atol=2 * atol, rtol=0.0)
