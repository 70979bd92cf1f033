"""The same bits in NumPy, JAX and PyTorch: low-bit codes, random bits, bit-exact training.

Pure functions over an array namespace `xp` (`numpy`, `jax.numpy` or `torch`), which need the
standard library alone.
"""

from cruxy_exact.affine import AffineCode
from cruxy_exact.codes import BlockCode
from cruxy_exact.engines import Precision
from cruxy_exact.near import NearCode
from cruxy_exact.random_bits import round_to_bfloat16, stream_key
from cruxy_exact.reference import Reference
from cruxy_exact.scalars import Exact

__all__ = [
    "AffineCode",
    "BlockCode",
    "Exact",
    "NearCode",
    "Precision",
    "Reference",
    "round_to_bfloat16",
    "stream_key",
]
