"""Three optimizers built from the parts: what stands in the chain is up to you.

Every chain is put under a control law by `stabilize`, which measures the raw gradient once and
hands the controls to whichever of the parts are there.
"""

import jax
import jax.numpy as jnp
import optax

import cruxy_optax
from cruxy_optax import (
    clip_by_predicted_norm,
    scale_by_controlled_adam,
    scale_by_controlled_lion,
    scale_by_meta_learning_rate,
    stabilize,
    throttle_by_phase,
)

STEPS = 1000

CHAINS = {
    # What meta_lion() is made of, in the order of the paper.
    "Lion, every part": stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            scale_by_controlled_lion(b1=0.9, b2=0.99),
            optax.add_decayed_weights(1e-3),
            throttle_by_phase(),
            scale_by_meta_learning_rate(1e-2),
        ),
        law=cruxy_optax.Meta3(),
    ),
    # A schedule in place of a number, decay for one matrix alone, no throttle and another law.
    "Adam, a schedule, no throttle": stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            scale_by_controlled_adam(b1=0.9, b2=0.999),
            optax.masked(optax.add_decayed_weights(1e-3), {"left": True, "right": False}),
            scale_by_meta_learning_rate(optax.cosine_decay_schedule(1e-2, STEPS)),
        ),
        law=cruxy_optax.StabilityV2(),
    ),
    # The direction is optax's own; the clip, the rate and the guard are ours.
    "optax.scale_by_rms": stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            optax.scale_by_rms(decay=0.99),
            throttle_by_phase(),
            scale_by_meta_learning_rate(1e-2),
        ),
        law=cruxy_optax.Meta3(),
    ),
}


def loss_fn(params: dict[str, jax.Array], target: jax.Array) -> jax.Array:
    """Squared error of a factorisation, the mean over the entries."""
    return jnp.mean((params["left"] @ params["right"] - target) ** 2)


def train(tx: optax.GradientTransformationExtraArgs) -> tuple[float, dict[str, float]]:
    """The loss after `STEPS` steps, and the controller's telemetry of the last one."""
    keys = jax.random.split(jax.random.key(0), 4)
    target = jax.random.normal(keys[0], (16, 4)) @ jax.random.normal(keys[1], (4, 16))
    params = {
        "left": jax.random.normal(keys[2], (16, 4)),
        "right": jax.random.normal(keys[3], (4, 16)),
    }

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params, target)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(STEPS):
        params, opt_state = step(params, opt_state)
    telemetry = jax.device_get(cruxy_optax.telemetry(opt_state))
    return float(loss_fn(params, target)), {key: float(telemetry[key]) for key in telemetry}


if __name__ == "__main__":
    for name, tx in CHAINS.items():
        loss, last = train(tx)
        rate, phase, clip = last["learning_rate"], last["phase"], last["clip_threshold"]
        print(f"{name:30} loss {loss:.4f}  rate {rate:.1e}  phase {phase:.2f}  clip at {clip:.2f}")
