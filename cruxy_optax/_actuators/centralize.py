"""Gradient centralization for kernels laid out as Flax and most of JAX lay them out."""

import jax
import jax.numpy as jnp
import optax


def centralize_kernels() -> optax.GradientTransformation:
    """Subtracts from each kernel's gradient its mean over the input axes.

    A leaf of two or more axes is taken for a kernel whose last axis is the output (Flax, Haiku);
    leaves of fewer axes pass. `optax.centralize` averages over all axes but the first instead,
    which is right for kernels whose output comes first, as in PyTorch.

    Returns:
        An `optax.GradientTransformation` without state.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import centralize_kernels
        >>> tx = centralize_kernels()
        >>> grads = jnp.array([[1.0, 4.0], [3.0, 8.0]])
        >>> print(tx.update(grads, tx.init(grads))[0])
        [[-1. -2.]
         [ 1.  2.]]

    References:
        Yong et al., [Gradient Centralization](https://arxiv.org/abs/2004.01461), 2020.
    """

    def centralized(update: jax.typing.ArrayLike, _: jax.typing.ArrayLike | None) -> jax.Array:
        g = jnp.asarray(update)
        if g.ndim < 2:
            return g
        return g - jnp.mean(g, axis=tuple(range(g.ndim - 1)), keepdims=True)

    return optax.stateless_with_tree_map(centralized)
