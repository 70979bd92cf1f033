"""The codes of a whole step in PyTorch and in JAX: the same for the same float32 input."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

import cruxy_optax  # noqa: E402
import cruxy_torch  # noqa: E402
from cruxy_control import Meta3  # noqa: E402

STEPS = 3
LAW = Meta3(clip_threshold=None)
"""With decay rates of 0 moments are then the gradient and its square, to the bit."""


def gradient(step, size):
    random = np.random.default_rng(step)
    return (1e-2 * random.standard_normal(size) * np.exp(random.standard_normal(size))).astype(
        np.float32
    )


def low_bit_leaves(node):
    """What is coded in an Optax state, in order."""
    if hasattr(node, "codes"):
        return [node]
    below = node.values() if isinstance(node, dict) else node if isinstance(node, tuple) else ()
    return [leaf for part in below for leaf in low_bit_leaves(part)]


MOMENTS = {
    "exp_avg": lambda: optax.trace(decay=0.0),
    "exp_avg_sq": lambda: optax.scale_by_rms(decay=0.0),
}
"""What optax has for each of the two, with nothing remembered but the last gradient."""


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("moment", MOMENTS)
def test_moments_of_one_leaf_have_the_same_codes_and_scales(moment, bits, fused):
    """A vector is cut into the same blocks by both, and its elements have the same numbers."""
    size = 32 * 256
    param = torch.nn.Parameter(torch.ones(size))
    ours = cruxy_torch.CruxyOptimizer(
        [param], lr=1e-3, betas=(0.0, 0.0), law=LAW, state_bits=bits, fused=fused
    )
    tx = cruxy_optax.quantize_state(MOMENTS[moment](), bits)
    state = tx.init({"w": jnp.ones(size)})
    for step in range(STEPS):
        g = gradient(step, size)
        param.grad = torch.from_numpy(g)
        ours.step()
        _, state = tx.update({"w": jnp.asarray(g)}, state)
        (theirs,) = low_bit_leaves(state)
        codes = ours.state[param][f"{moment}_codes"].numpy().reshape(-1)
        assert np.array_equal(codes, np.asarray(theirs.codes).reshape(-1))
        scales = ours.state[param][f"{moment}_scales"].float().numpy()
        assert np.array_equal(scales, np.asarray(theirs.scales, np.float32).reshape(-1))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_moved_there_and_back_is_off_by_two_roundings_to_the_nearest(bits):
    size = 32 * 256
    tx = cruxy_optax.meta3(1e-3, state_bits=bits)
    params = {"w": jnp.ones(size)}
    state = tx.init(params)
    for step in range(STEPS):
        _, state = tx.update({"w": jnp.asarray(gradient(step, size))}, state, params)
    optimizer = cruxy_torch.CruxyOptimizer([torch.nn.Parameter(torch.ones(size))], state_bits=bits)
    saved = cruxy_torch.state_from_optax(optimizer, state, lambda tree: [tree["w"]])
    optimizer.load_state_dict(saved)
    back = cruxy_torch.state_to_optax(optimizer, state, lambda values: {"w": values[0]})
    pairs = list(zip(low_bit_leaves(state), low_bit_leaves(back), strict=True))
    assert len(pairs) == 2
    for before, after in pairs:
        assert before.codes.dtype == after.codes.dtype
        x, y = np.asarray(before.decode()), np.asarray(after.decode())
        scale = np.repeat(np.asarray(before.scales, np.float32).reshape(-1), 256)
        bound = before.code.error_bound(x, scale, stochastic=False, xp=np)
        again = before.code.error_bound(np.abs(x) + bound, scale, stochastic=False, xp=np)
        assert (np.abs(x - y) <= bound + again).all()
