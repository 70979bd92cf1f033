"""What is around every exact call in JAX: 64-bit types, and a machine that can be exact."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cruxy_exact import arithmetic, engines
from cruxy_exact.engines import Precision

FAST_MATH = "xla_cpu_enable_fast_math"
"""The flag of XLA under which it may rearrange float arithmetic."""
PLATFORMS = ("cpu", "gpu", "cuda", "rocm")
"""Those that have IEEE float64."""


def check_flags(flags: str) -> None:
    """Refuses fast math.

    Args:
        flags: the text of the environment variable `XLA_FLAGS`.

    Raises:
        RuntimeError: where it is on.
    """
    fast = False
    for flag in flags.split():
        name, _, value = flag.lstrip("-").partition("=")
        if name == FAST_MATH:
            fast = value.lower() in ("", "true", "1")
    if fast:
        raise RuntimeError(
            "exact arithmetic needs XLA to keep float arithmetic as it is written, got "
            f"--{FAST_MATH} in XLA_FLAGS; remove it, or set it to false."
        )


def check_platform(platform: str) -> None:
    """Refuses devices without IEEE float64.

    Args:
        platform: `jax.Device.platform`.

    Raises:
        RuntimeError: on a TPU, on Metal, and on what is not known.
    """
    if platform not in PLATFORMS:
        raise RuntimeError(
            f"exact arithmetic needs IEEE float64, which the platform {platform!r} lacks; train on "
            "a CPU or an NVIDIA GPU (JAX_PLATFORMS=cpu)."
        )


def platform() -> str:
    """The platform that JAX puts arrays on here."""
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


@contextlib.contextmanager
def frame() -> Iterator[None]:
    """64-bit types inside, whatever the program around has.

    Raises:
        RuntimeError: where the platform cannot be exact.
    """
    check_machine(platform())
    with jax.enable_x64(True):
        yield


@functools.cache
def check_machine(platform: str) -> None:
    """Refuses a platform that lacks float64 or whose compiler changes float arithmetic.

    Compiles a chain of products, sums, quotients and roots once and compares it with NumPy: a
    compiler that contracts or rearranges it, or divides inexactly, is found, by whatever flag it
    was told to.

    Raises:
        RuntimeError: where it is one.
    """
    check_flags(os.environ.get("XLA_FLAGS", ""))
    check_platform(platform)
    x = np.random.default_rng(0).standard_normal((3, 4096)).astype(np.float32)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        compiled = np.asarray(jax.jit(functools.partial(_chain, xp=jnp))(*x))
    if not np.array_equal(compiled, _chain(*x, xp=np)):
        raise RuntimeError(
            f"float arithmetic that XLA compiles for {platform!r} is not what is written; look for "
            "fast math among XLA_FLAGS and compiler options."
        )


def _chain(a: Any, b: Any, c: Any, *, xp: Any) -> Any:
    y = arithmetic.add(arithmetic.mul(a, b, xp=xp), c, xp=xp)
    z = arithmetic.sub(arithmetic.mul(y, a, xp=xp), arithmetic.mul(b, c, xp=xp), xp=xp)
    z = arithmetic.add(arithmetic.mul(z, a, xp=xp), arithmetic.f32(0.7), xp=xp)
    z = arithmetic.div(z, arithmetic.sqrt(xp.abs(b), xp=xp), xp=xp)
    return arithmetic.add(
        arithmetic.exp(z, xp=xp), arithmetic.sub(arithmetic.add(z, a, xp=xp), z, xp=xp), xp=xp
    )


def tested(precision: Precision) -> Precision:
    """The same bits, and an engine that is exact here.

    Raises:
        TypeError: where it is no `Precision`.
    """
    if not isinstance(precision, Precision):
        raise TypeError(
            f"precision must be an exact.Precision, got {precision!r}; use "
            "exact.Precision(bits=20)."
        )
    return _tested(precision, platform())


@functools.cache
def _tested(precision: Precision, platform: str) -> Precision:
    check_machine(platform)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return engines.choose(precision, jnp.zeros(1, jnp.float32), xp=jnp)
