"""Initial weights that NumPy draws: to compile a draw takes JAX longer than a short run."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx


def draw_weights(shapes: nnx.State, seed: int, gain: float = 1.0) -> nnx.State:
    """Weights of a model: kernels and embeddings normal, scales 1, biases 0.

    Args:
        shapes: of the parameters, from `nnx.eval_shape`.
        seed: of the generator.
        gain: the variance of a kernel's elements, times its inputs.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for path, variable in nnx.to_flat_state(shapes):
        *inputs, outputs = variable.shape
        if inputs:
            value = rng.normal(0.0, math.sqrt(gain / math.prod(inputs)), (*inputs, outputs))
        else:
            value = np.full(outputs, float(path[-1] == "scale"))
        weights[path] = variable.replace(jnp.asarray(value, jnp.float32))
    return nnx.from_flat_state(weights)
