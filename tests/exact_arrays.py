"""Arrays for the exact tests, and one function in three namespaces."""

import contextlib
import importlib

import numpy as np

NAMES = ("numpy", "torch", "jax.numpy")


def namespace(name):
    return importlib.import_module(name)


def array(x, xp):
    x = np.asarray(x)
    return xp.from_numpy(x.copy()) if xp.__name__ == "torch" else xp.asarray(x)


def run(function, *arrays, name, jit=True):
    """`function(*arrays, xp=xp)` in a namespace, the results in NumPy; in JAX compiled."""
    xp = namespace(name)
    call = lambda *a: function(*a, xp=xp)  # noqa: E731
    around = contextlib.nullcontext()
    if name == "jax.numpy":
        import jax

        import usual

        around = jax.enable_x64(True)
        call = usual.jit(call) if jit else call
    with around, np.errstate(all="ignore"):
        out = call(*(array(x, xp) for x in arrays))
        if isinstance(out, tuple | list):
            return [np.asarray(part) for part in out]
        return np.asarray(out)


def same(a, b):
    """Whether two float32 arrays have the same bits; any NaN is as good as another."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype == np.float32
    if a.shape != b.shape:
        return False
    nan = np.isnan(a) & np.isnan(b)
    return bool(((a.view(np.int32) == b.view(np.int32)) | nan).all())


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
