"""The C kernels of exact functions have the bits of their references, whatever they are given."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cruxy_exact import attention, layers, optimizers, sums  # noqa: E402
from cruxy_exact.engines import Precision  # noqa: E402
from cruxy_torch._native import library  # noqa: E402
from cruxy_torch._native.exact import NAMESPACE  # noqa: E402
from exact_arrays import normal, same  # noqa: E402

pytestmark = pytest.mark.skipif(not library.available(), reason="no C compiler")

SPECIAL = np.float32([0, 2.0**-125, 2.0**-124, -1e-37, 3e38, -3e38, 88.6, -87.0, 1e-30, 7.0])


def wide(*shape, seed=0):
    """Numbers of all sizes, with special ones among them."""
    x = normal(*shape, seed=seed) * 2.0 ** normal(*shape, seed=seed + 50, scale=6)
    x = x.astype(np.float32).reshape(-1)
    x[:: max(1, x.size // 10)][: SPECIAL.size] = SPECIAL[: len(x[:: max(1, x.size // 10)])]
    return torch.from_numpy(np.asarray(layers.settle(x, xp=np)).reshape(shape))


def lost(x):
    """With NaN and infinity."""
    x = x.clone()
    x.view(-1)[[1, -1]] = torch.tensor([float("nan"), float("inf")])
    return x


def cross_entropy(z, xp):
    labels = torch.arange(z[..., 0].numel()).reshape(z.shape[:-1]) % z.shape[-1]
    y, kept = layers.cross_entropy_forward(z, labels, xp=xp)
    return y, kept[0]


def with_backward(name, part, *more):
    def call(x, xp):
        y, kept = getattr(part, f"{name}_forward")(x, *more, xp=xp)
        g = layers.mul(y, 0.37, xp=torch) if name != "softmax" else x
        return y, *getattr(part, f"{name}_backward")(kept, g, xp=xp)

    return call


def adamw(x, xp):
    p, g, m, v = x, x.flip(0), x * 0.5, x.abs()
    p, m, v = (layers.settle(t, xp=torch) for t in (p, m, v))
    return optimizers.adamw(p, g, m, v, (1.7, 0.9), lr=1e-3, xp=xp)


W, B = wide(33, seed=3), wide(33, seed=4)
CASES = {
    "total rows": lambda x, xp: sums.total(x, -1, xp=xp),
    "total columns": lambda x, xp: sums.total(x, (0, 1), xp=xp),
    "total": lambda x, xp: sums.total(x, xp=xp),
    "total middle": lambda x, xp: sums.total(x, 1, xp=xp),
    "total keepdims": lambda x, xp: sums.total(x, (1, 2), keepdims=True, xp=xp),
    "matmul": lambda x, xp: sums.matmul(x, wide(33, 7), xp=xp),
    "matmul transposed": lambda x, xp: sums.matmul(x.mT, x, precision=Precision(13), xp=xp),
    "matmul of slices": lambda x, xp: sums.matmul(x[..., ::2], wide(40, 17)[1:].t()[:, :9].mT.mT
                                                  [:17], xp=xp),
    "matmul in blocks": lambda x, xp: sums.matmul(
        x.reshape(4, -1), x.reshape(4, -1).t(), precision=Precision(23), xp=xp),
    "gelu": with_backward("gelu", layers),
    "layer norm": with_backward("layer_norm", layers, W, B),
    "softmax": with_backward("softmax", attention),
    "dropout": with_backward("dropout", layers, torch.tensor(-77, dtype=torch.int32), 200),
    "cross entropy": cross_entropy,
    "adamw": adamw,
}  # fmt: skip


def results(case, x, xp):
    out = CASES[case](x, xp)
    return [np.asarray(part) for part in (out if isinstance(out, tuple | list) else (out,))]


@pytest.mark.parametrize("change", ["plain", "lost", "not contiguous", "empty", "large"])
@pytest.mark.parametrize("case", CASES)
def test_the_library_has_the_bits_of_the_reference(case, change):
    x = wide(*((20, 60, 33) if change == "large" else (4, 5, 33)))
    if change == "lost":
        x = lost(x)
    elif change == "not contiguous":
        x = wide(4, 10, 33)[:, ::2]
    elif change == "empty":
        x = x[:0]
        if case in ("matmul in blocks", "softmax"):
            pytest.skip("reshapes what is not empty")
    got, want = results(case, x, NAMESPACE), results(case, x, torch)
    assert len(got) == len(want)
    assert all(a.dtype != np.float32 or same(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
def test_two_threads_have_the_bits_of_one():
    before = torch.get_num_threads()
    out = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out.append([results(case, wide(20, 60, 33), NAMESPACE) for case in CASES])
    finally:
        torch.set_num_threads(before)
    pairs = zip(*out, strict=True)
    assert all(same(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


def test_labels_out_of_range_are_an_error():
    with pytest.raises(IndexError, match="labels must be from 0 to 2"):
        layers.cross_entropy_forward(torch.ones(2, 3), torch.tensor([0, 3]), xp=NAMESPACE)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set_has_the_bits_of_the_reference(isa):
    """The library is built for the instruction set that PyTorch is held to."""
    here = Path(__file__)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(here), "-k",
         "bits_of_the_reference and not every"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": isa}, cwd=here.parent.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:]
