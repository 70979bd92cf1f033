"""Says what to install where JAX is missing, before anything needs it."""

from cruxy_control.extras import require

require("cruxy_optax", "jax", ("chex", "jax", "numpy", "optax"))
