"""Where JAX computes."""

import jax


def name() -> str:
    """The accelerator, or the processor where there is none, as JAX names it."""
    return f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}"
