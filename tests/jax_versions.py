"""What the tests need of JAX and Flax and older versions have elsewhere."""

import jax
import jax.experimental
from flax import nnx

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure


def varying(x, axis):
    """What is the same on all devices, as what may differ along an axis of the mesh."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axis, to="varying")
    return jax.lax.pvary(x, axis)
