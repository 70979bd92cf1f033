"""Fits a polynomial with Meta3, which is called like `optax.adamw` and told the loss."""

import jax
import jax.numpy as jnp
import optax

import cruxy_optax

x = jnp.linspace(-1.0, 1.0, 256)
y = jnp.sin(3.0 * x)
params = jnp.zeros(6)
tx = cruxy_optax.meta3(learning_rate=0.03, weight_decay=0.0)
opt_state = tx.init(params)


@jax.jit
def train_step(params, opt_state):
    """One step on the mean squared error."""
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((jnp.polyval(p, x) - y) ** 2))(params)
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    return optax.apply_updates(params, updates), opt_state


for _ in range(500):
    params, opt_state = train_step(params, opt_state)
for name, value in cruxy_optax.telemetry(opt_state).items():
    print(f"{name:17} {value:.5g}")
