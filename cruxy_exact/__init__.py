"""The same bits in NumPy, JAX and PyTorch: low-bit codes and random bits, written once.

Pure functions over an array namespace `xp` (`numpy`, `jax.numpy` or `torch`), which need the
standard library alone.
"""

from cruxy_exact.affine import AffineCode
from cruxy_exact.codes import BlockCode
from cruxy_exact.random_bits import round_to_bfloat16, stream_key

__all__ = ["AffineCode", "BlockCode", "round_to_bfloat16", "stream_key"]
