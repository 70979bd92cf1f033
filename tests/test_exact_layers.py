"""Exact layers: their bits in three namespaces, their gradients beside float64's."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

import torch.nn.functional as F  # noqa: E402, N812

from cruxy_exact import accumulate, attention, convolution, layers  # noqa: E402
from cruxy_exact.engines import Precision  # noqa: E402
from exact_arrays import normal, run, same  # noqa: E402

PARTS = (layers, attention, convolution)
IDS = np.random.default_rng(0).integers(0, 11, (3, 5)).astype(np.int32)
D = 12
COSINE, SINE = (np.float32(t) for t in attention.rotary_table(5, 8))


def sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def fused(qkv):
    q, k, v = (x.reshape(2, 5, 4, 4).transpose(1, 2) for x in qkv.chunk(3, -1))
    return sdpa(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 16)


def turned(x):
    a, b = x.chunk(2, -1)
    c, s = (torch.from_numpy(t).double() for t in (COSINE, SINE))
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def patches(x, w, b):
    out = F.conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1), b, stride=2, padding=1)
    return out.permute(0, 2, 3, 1)


def entropy(z):
    return F.cross_entropy(
        z.reshape(-1, 11), torch.from_numpy(IDS).long().reshape(-1), reduction="none"
    ).reshape(3, 5)


CASES = {
    "linear": ([(3, 5, D), (D, 7), (7,)], (), {}, lambda x, w, b: x @ w + b),
    "linear-no-bias": ([(3, 5, D), (D, 7)], (), {}, lambda x, w: x @ w),
    "matmul": ([(2, 5, D), (2, D, 7)], (), {}, torch.matmul),
    "layer_norm": ([(3, 5, D), (D,), (D,)], (), {}, lambda x, w, b: F.layer_norm(x, (D,), w, b)),
    "rms_norm": ([(3, 5, D), (D,)], (), {}, lambda x, w: F.rms_norm(x, (D,), w, 1e-6)),
    "gelu": ([(50, D)], (), {}, lambda x: F.gelu(x, approximate="tanh")),
    "gelu_exact": ([(50, D)], (), {}, F.gelu),
    "silu": ([(50, D)], (), {}, F.silu),
    "relu": ([(50, D)], (), {}, F.relu),
    "add": ([(5, D), (5, D)], (), {}, torch.add),
    "mul": ([(5, D), (5, D)], (), {}, torch.mul),
    "sum": ([(5, D)], (), {}, torch.sum),
    "embed": ([(11, D)], (IDS,), {}, lambda w: w[torch.from_numpy(IDS).long()]),
    "cross_entropy": ([(3, 5, 11)], (IDS,), {}, entropy),
    "softmax": ([(3, 5, D)], (), {}, lambda z: torch.softmax(z, -1)),
    "attention": ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 3)], (), {}, sdpa),
    "attention-grouped": (
        [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 3)], (), {"causal": True},
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
    ),
    "attention-masked": (
        [(2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 3)], (np.eye(5)[::-1] + np.eye(5) > 0,), {},
        lambda q, k, v: sdpa(
            q, k, v, attn_mask=torch.from_numpy((np.eye(5)[::-1] + np.eye(5) > 0).copy())
        ),
    ),
    "fused_attention": ([(2, 5, 48)], (4,), {}, fused),
    "rotary": ([(2, 3, 5, 8)], (COSINE, SINE), {}, turned),
    "convolution": (
        [(2, 9, 8, 3), (3, 3, 3, 5), (5,)], (), {"stride": (2, 2), "padding": (1, 1)}, patches
    ),
}  # fmt: skip
WITH_PRODUCTS = ("linear", "matmul", "attention", "fused_attention", "convolution")
NAMES = ["torch", pytest.param("jax.numpy", marks=pytest.mark.slow)]


def pair(case):
    name = case.partition("-")[0]
    part = next(part for part in PARTS if hasattr(part, f"{name}_forward"))
    return getattr(part, f"{name}_forward"), getattr(part, f"{name}_backward")


def inputs(case):
    return [normal(*shape, seed=i) for i, shape in enumerate(CASES[case][0])]


def both(case, name, bits=20):
    """The output and all gradients, of a fixed gradient of the output."""
    forward, backward = pair(case)
    _, rest, options, _ = CASES[case]
    if case.partition("-")[0] in (
        "linear",
        "matmul",
        "attention",
        "fused_attention",
        "convolution",
    ):
        options = {**options, "precision": Precision(bits)}
    arrays = inputs(case)
    fixed = [x for x in rest if isinstance(x, int)]
    rest = [x for x in rest if not isinstance(x, int)]

    def call(*args, xp):
        y, kept = forward(*args, *fixed, xp=xp, **options)
        g = (y * 0.0 + 0.25) + settled(y, xp)
        return (y, *backward(kept, g, xp=xp))

    return run(call, *arrays, *rest, name=name)


def settled(y, xp):
    return layers.settle(y * 0.25, xp=xp)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_a_layer_has_the_bits_it_has_in_numpy(case, name):
    pairs = zip(both(case, name), both(case, "numpy"), strict=True)
    assert [same(a, b) for a, b in pairs] == [True] * (1 + len(CASES[case][0]))


@pytest.mark.parametrize("case", CASES)
def test_a_layer_and_its_gradients_are_near_those_of_float64(case):
    arrays = [torch.from_numpy(x).double().requires_grad_() for x in inputs(case)]
    want = CASES[case][3](*arrays)
    g = torch.full_like(want, 0.25) + want.detach() * 0.25
    grads = torch.autograd.grad(want, arrays, g)
    for got, true in zip(both(case, "numpy", bits=22), (want.detach(), *grads), strict=True):
        true = true.numpy()
        assert got.shape == true.shape
        assert np.linalg.norm(got - true) <= 2e-6 * np.linalg.norm(true)


def test_copies_of_a_fork_have_their_gradients_added_exactly():
    gs = [normal(50) * np.float32(10.0**i) for i in range(4)]
    orders = [layers.fork_backward((), tuple(order), xp=np)[0] for order in (gs, gs[::-1])]
    assert same(*orders)
    assert np.allclose(orders[0], np.sum(gs, 0, dtype=float), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("keep", [0, 257])
def test_dropout_that_keeps_no_share_is_an_error(keep):
    with pytest.raises(ValueError, match="keep must be from 1 to 256"):
        layers.dropout_forward(np.ones(3, np.float32), np.int32(1), keep, xp=np)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_drops_the_same_elements(name):
    x, key = normal(300, 7), np.array(12345, np.int32)

    def call(x, key, xp):
        y, kept = layers.dropout_forward(x, key, 200, xp=xp)
        return y, *layers.dropout_backward(kept, x, xp=xp)

    got, want = run(call, x, key, name=name), run(call, x, key, name="numpy")
    assert [same(a, b) for a, b in zip(got, want, strict=True)] == [True, True]
    assert abs((want[0] == 0).mean() - 56 / 256) < 0.03


def test_heads_that_do_not_divide_are_an_error():
    q, k = normal(1, 4, 2, 8), normal(1, 3, 2, 8)
    with pytest.raises(ValueError, match="divide those of q"):
        attention.attention_forward(q, k, k, xp=np)


def test_a_kernel_larger_than_its_image_is_an_error():
    with pytest.raises(ValueError, match="must fit into the image"):
        convolution.convolution_forward(normal(1, 2, 2, 1), normal(3, 3, 1, 1), xp=np)


@pytest.mark.parametrize(
    "name", ["numpy", "torch", pytest.param("jax.numpy", marks=pytest.mark.slow)]
)
def test_grains_have_one_sum_in_any_order_and_any_split(name):
    r = np.random.default_rng(0)
    for trial in range(6):
        n = int(r.integers(1, 9))
        scale = 2.0 ** r.uniform(-100, 100) * 2.0 ** r.uniform(-20, 20, (n, 7, 5))
        gs = [layers.settle((normal(7, 5, seed=i + n) * s).astype(np.float32), xp=np)
              for i, s in enumerate(scale)]  # fmt: skip

        def split(*gs, xp, cut):
            parts = []
            for part in (gs[:cut], gs[cut:]):
                grains = accumulate.empty(gs[0], xp=xp)
                for g in part:
                    grains = accumulate.push(grains, g, xp=xp)
                parts.append(grains)
            return accumulate.value(accumulate.merge(parts, xp=xp), xp=xp)

        want = run(lambda *a, xp: split(*a, xp=xp, cut=0), *gs, name="numpy")
        for order in (r.permutation(n) for _ in range(1 if "jax" in name else 4)):
            cut = int(r.integers(0, n + 1))
            got = run(lambda *a, xp: split(*a, xp=xp, cut=cut), *(gs[i] for i in order), name=name)  # noqa: B023
            assert same(got, want), trial
        true, peak = np.sum(gs, 0, dtype=np.longdouble), max(np.abs(g).max() for g in gs)
        bound = n * peak * 2.0**-30 + np.abs(true) * 2.0**-24 + 2.0**-125
        assert (np.abs(want - true) <= bound).all()


def test_a_grain_that_is_not_finite_is_never_forgotten():
    bad = np.float32([1.0, np.nan])
    with np.errstate(all="ignore"):
        grains = accumulate.push(accumulate.empty(bad, xp=np), bad, xp=np)
        grains = accumulate.push(grains, np.ones(2, np.float32), xp=np)
    assert np.isnan(accumulate.value(grains, xp=np)).all()
