"""Tiger in Optax is a chain of parts, each of which can be switched on; LoRA's loops; the guard."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cruxy_control import LoraPid, Meta3, PlateauGuard, SelfDriving
from cruxy_control.slices import blocks
from cruxy_optax import (
    add_controlled_decayed_weights,
    balance_slices,
    blend_by_lora_pid,
    blend_sign,
    clip_by_parameter_norm,
    clip_by_predicted_norm,
    clip_by_rms,
    meta_lion,
    quantize_state,
    scale_by_controlled_momentum,
    scale_by_meta_learning_rate,
    scale_by_role,
    scale_by_slices,
    scale_by_trust_ratio_ema,
    stabilize,
    telemetry,
    throttle_by_phase,
    tiger,
)
from cruxy_optax._actuators.factored import scale_by_factored_rms
from optimizers import assert_close, assert_same, train

RATE, STEPS = 0.01, 6
SLICES = {"h.*.qkv.kernel": blocks(4, 2, 2, axis=1)}
PASSIVE = Meta3(
    phase_strength=0.0,
    rate_gain=0.0,
    beta1_gain=0.0,
    beta2_gain=0.0,
    beta2_phase_strength=0.0,
    clip_threshold=None,
)


def tree(seed=0):
    """A fused attention with an adapter, an embedding and a norm."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    layer = {
        "qkv": {"kernel": leaf(6, 8)},
        "out": {"kernel": leaf(8, 6), "lora_a": leaf(8, 2), "lora_b": leaf(2, 6)},
        "norm": {"scale": leaf(6)},
    }
    return {"wte": {"embedding": leaf(10, 6)}, "h": {"0": layer}}


def adapter(updates):
    """What is LoRA's."""
    return {k: x for k, x in updates["h"]["0"]["out"].items() if k.startswith("lora")}


def gradients(steps=STEPS, scale=1.0):
    """A stack of gradients like `tree`, and losses."""
    each = [tree(1 + t) for t in range(steps)]
    stacked = jax.tree.map(lambda *leaves: scale * jnp.stack(leaves), *each)
    return stacked, jnp.linspace(2.0, 1.0, steps)


def by_hand(before=(), momentum=None, blended=None, after=(), decay=None, last=()):
    """The chain that `tiger` is."""
    return stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            *before,
            momentum or scale_by_controlled_momentum(),
            blended or blend_sign(0.2, 0.0),
            *after,
            decay or optax.add_decayed_weights(1e-3),
            *last,
            throttle_by_phase(),
            scale_by_meta_learning_rate(RATE),
        )
    )


def rising(count):
    return 0.1 * count


CHAINS = {
    "default": ({}, {}),
    "soft": ({"temperature": 1.0}, {"blended": blend_sign(0.2, 1.0)}),
    "schedule": ({"blend": rising}, {"blended": blend_sign(rising, 0.0)}),
    "decay": ({"weight_decay": 0.1}, {"decay": optax.add_decayed_weights(0.1)}),
    "trust": (
        {"trust_cap": 5.0, "trust_decay": 0.9},
        {"after": [scale_by_trust_ratio_ema(5.0, 0.9)]},
    ),
    "momentum": (
        {"trust_cap": 5.0, "trust_space": "momentum"},
        {
            "blended": scale_by_trust_ratio_ema(
                5.0, space="momentum", direction=blend_sign(0.2, 0.0)
            )
        },
    ),
    "agc": ({"agc": 0.1}, {"before": [clip_by_parameter_norm(0.1)]}),
    "rms": (
        {"clip_rms": 0.5, "clip_rms_per": "row"},
        {"after": [clip_by_rms(0.5, per="row")]},
    ),
    "power": (
        {"power": 0.5, "min_dim_size_to_factor": 4},
        {"before": [scale_by_factored_rms(0.8, 4, 0.5)]},
    ),
    "slices": (
        {"slices": SLICES, "slice_rates": {"k": 0.8}},
        {"after": [scale_by_slices(SLICES, {"k": 0.8})]},
    ),
    "sliced": (
        {"slices": SLICES, "trust_cap": 5.0, "trust_per": "slice"},
        {"after": [scale_by_trust_ratio_ema(5.0, per="slice", slices=SLICES)]},
    ),
    "balance": (
        {"slices": SLICES, "balance_slices": True},
        {"after": [balance_slices(SLICES)]},
    ),
    "roles": (
        {"role_rates": {"embedding": 0.5}},
        {"last": [scale_by_role({"embedding": 0.5})]},
    ),
    "8 bits": (
        {"state_bits": 8},
        {"momentum": quantize_state(scale_by_controlled_momentum(), 8)},
    ),
}


SHORT = {"default", "agc", "power"}
"""The others are for `make test-all`."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SHORT else [pytest.mark.slow]) for n in CHAINS]
)
def test_each_option_is_a_part_of_a_chain(name):
    options, parts = CHAINS[name]
    grads, losses = gradients(3)
    got, _ = train(tiger(RATE, **options), tree(), grads, losses)
    assert_same(got, train(by_hand(**parts), tree(), grads, losses)[0])


def test_sign_alone_is_meta_lion_bit_for_bit():
    grads, losses = gradients()
    got = train(tiger(RATE, blend=0.0), tree(), grads, losses)
    assert_same(got[0], train(meta_lion(RATE), tree(), grads, losses)[0])


ALL = {
    "blend": optax.linear_schedule(0.1, 0.6, 10),
    "temperature": 0.5,
    "power": 0.5,
    "min_dim_size_to_factor": 4,
    "trust_cap": 5.0,
    "trust_decay": 0.9,
    "agc": 0.5,
    "clip_rms": 0.9,
    "slices": SLICES,
    "slice_rates": {"q": 0.9, "k": 0.8, "v": 1.1},
    "balance_slices": True,
    "lora_pid": LoraPid(interval=2),
    "role_rates": {"lora.b": 4.0},
    "law": PlateauGuard(Meta3(), patience=3),
}


def test_gradients_a_thousand_times_as_large_change_nothing():
    tx = tiger(RATE, **{**ALL, "agc": None, "lora_pid": None, "law": PASSIVE})
    (grads, losses), (large, _) = gradients(), gradients(scale=1000.0)
    got, want = (train(tx, tree(), g, losses)[0] for g in (large, grads))
    assert_close(got, want, ulps=512)


def test_step_with_everything_compiles_once_and_a_bad_gradient_moves_nothing():
    tx, (grads, losses) = tiger(RATE, **ALL), gradients()
    params, step = tree(), jax.jit(tx.update)
    state = tx.init(params)
    for t in range(STEPS):
        now = jax.tree.map(lambda g, t=t: g[t], grads)
        if t == 4:
            now["wte"]["embedding"] = now["wte"]["embedding"].at[2, 1].set(jnp.nan)
        updates, after = step(now, state, params, value=losses[t])
        if t == 4:
            assert_same(optax.apply_updates(params, updates), params)
            kept, before = ([*x.inner_state[:6], x.law_state] for x in (after, state))
            held = jax.tree.map(lambda x: x, kept), before
            for a, b in zip(*map(jax.tree_util.tree_leaves_with_path, held), strict=True):
                if "beta" not in jax.tree_util.keystr(a[0]):
                    assert_same(a[1], b[1])
        params, state = optax.apply_updates(params, updates), after
    assert step._cache_size() == 1
    assert int(telemetry(state)["skipped_total"]) == 1


def test_run_with_everything_goes_on_from_a_checkpoint_bit_for_bit():
    tx, (grads, losses) = tiger(RATE, **ALL), gradients()
    first, last = (jax.tree.map(lambda g, k=k: g[k], grads) for k in (slice(3), slice(3, 6)))
    params, state = train(tx, tree(), first, losses[:3])
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
    structure = jax.tree.structure((tree(), tx.init(tree())))
    params, state = structure.unflatten(map(jnp.asarray, saved))
    assert_same(train(tx, params, last, losses[3:], state), train(tx, tree(), grads, losses))


@pytest.mark.slow
def test_sharded_run_with_everything_equals_the_whole():
    tx, (grads, losses) = tiger(RATE, **ALL), gradients(4)
    want = train(tx, tree(), grads, losses)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))

    def put(x, lead=0):
        axes = [None] * lead + (["data"] if x.shape[lead] % 2 == 0 else [])
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    params, split = jax.tree.map(put, tree()), jax.tree.map(lambda x: put(x, 1), grads)
    got = train(tx, params, split, losses)
    assert_close(jax.device_get(got[0]), jax.device_get(want[0]), ulps=512)


def test_loops_of_lora_steer_blend_and_clip_of_its_tensors_alone():
    pid, (grads, losses) = LoraPid(interval=2), gradients(8)
    steered = tiger(RATE, lora_pid=pid, temperature=1.0, law=PASSIVE, weight_decay=0.0)
    plain = tiger(RATE, temperature=1.0, law=PASSIVE, weight_decay=0.0)
    got, state = train(steered, tree(), grads, losses)
    want, _ = train(plain, tree(), grads, losses)
    assert not jnp.allclose(got["h"]["0"]["out"]["lora_a"], want["h"]["0"]["out"]["lora_a"])
    got["h"]["0"]["out"], want["h"]["0"]["out"] = (
        {"kernel": x["h"]["0"]["out"]["kernel"]} for x in (got, want)
    )
    assert_close(got, want)
    loops = state.inner_state[1].inner_states[True].inner_state.pid
    assert loops.blend.shape == (2,)
    assert float(abs(loops.blend - 0.2).min()) > 0.01


def reference(grads, params, pid, b1, b2, temperature):
    """Clip, momentum and blend of one tensor under its loops, in float64: the directions."""
    loops, m, directions = pid.init(np.float64(0.0), xp=np), np.zeros_like(grads[0]), []
    norm = max(1e-3, np.linalg.norm(params))
    for g in grads:
        g = g * min(1.0, loops.agc * norm / np.linalg.norm(g))
        c, m = b1 * m + (1 - b1) * g, b2 * m + (1 - b2) * g
        rms = np.sqrt(np.mean(c * c))
        u = (1 - loops.blend) * (1 + temperature) * c / (np.abs(c) + temperature * rms)
        u = u + loops.blend * c / rms
        rho = np.mean(np.abs(u) > 0.25 * np.sqrt(np.mean(u * u)))
        loops, _ = pid.step(loops, np.float64(rho), np.True_, xp=np)
        directions.append(u)
    return directions, loops


@pytest.mark.parametrize("zero", [False, True], ids=["a", "b"])
def test_loops_of_lora_are_their_equations(zero):
    pid, rng = LoraPid(interval=3), np.random.default_rng(0)
    params = np.zeros((5, 4)) if zero else rng.normal(size=(5, 4))
    grads = rng.normal(size=(60, 5, 4)) * rng.lognormal(0.0, 1.0, size=(60, 1, 1))
    tx = stabilize(
        blend_by_lora_pid(scale_by_controlled_momentum(0.9, 0.99), pid, 0.5), law=PASSIVE
    )
    p = jnp.asarray(params, jnp.float32)
    state, step = tx.init(p), jax.jit(tx.update)
    want, loops = reference(grads, params, pid, 0.9, 0.99, 0.5)
    for g, u in zip(grads, want, strict=True):
        got, state = step(jnp.asarray(g, jnp.float32), state, p)
        np.testing.assert_allclose(got, u, rtol=2e-4, atol=2e-5)
    mine = state.inner_state.pid
    np.testing.assert_allclose(mine.blend, [loops.blend], rtol=1e-4)
    np.testing.assert_allclose(mine.agc, [loops.agc], rtol=1e-4)


def test_guard_takes_sign_and_decay_away_on_a_plateau():
    guard = PlateauGuard(PASSIVE, patience=3, loss_decay=0.0)
    tx = tiger(1.0, b1=0.0, weight_decay=0.5, law=guard)
    params = jnp.array([1.0, 1.0, 1.0, 1.0])
    grads, state = jnp.array([3.0, -1.0, 1.0, 1.0]), tx.init(params)
    for _ in range(6):
        updates, state = tx.update(grads, state, params, value=1.0)
    rms = np.sqrt(3.0)
    np.testing.assert_allclose(updates, -(grads / rms + 0.05 * params), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("decayed", [0.1, optax.constant_schedule(0.1)])
def test_guard_and_decay_by_hand_agree(decayed):
    guard, (grads, losses) = PlateauGuard(Meta3(), patience=2), gradients(3)
    own = stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            scale_by_controlled_momentum(),
            blend_sign(0.2, 0.0),
            add_controlled_decayed_weights(0.1),
            throttle_by_phase(),
            scale_by_meta_learning_rate(RATE),
        ),
        law=guard,
    )
    tx = tiger(RATE, weight_decay=decayed, law=guard)
    losses = jnp.ones_like(losses)
    assert_same(train(tx, tree(), grads, losses)[0], train(own, tree(), grads, losses)[0])


def test_self_driving_steers_by_its_momentum():
    grads, losses = gradients()
    for options in ({}, {"lora_pid": LoraPid()}):
        _, state = train(tiger(RATE, law=SelfDriving(), **options), tree(), grads, losses)
        assert -1.0 <= float(telemetry(state)["alignment"]) <= 1.0
        assert float(state.signals.alignment) != 0.0


WRONG = [
    ({"trust_decay": 0.9}, "trust_decay is an option of trust_cap"),
    ({"trust_space": "momentum"}, "trust_space is an option of trust_cap"),
    ({"trust_per": "row"}, "trust_per is an option of trust_cap"),
    ({"clip_rms_per": "row"}, "clip_rms_per is an option of clip_rms"),
    ({"slice_rates": {"q": 0.9}}, "slice_rates is an option of slices"),
    ({"balance_slices": True}, "balance_slices is an option of slices"),
    ({"slices": SLICES}, "nothing was asked for them"),
    ({"trust_cap": 1.0, "trust_per": "slice"}, "trust_per is an option of slices"),
    ({"trust_cap": 1.0, "trust_space": "momentum", "lora_pid": LoraPid()}, "no place beside"),
    ({"power": 2.0}, r"power must be in \[0, 1\], got 2.0"),
    ({"blend": -0.1}, r"weight must be in \[0, 1\], got -0.1"),
    ({"min_dim_size_to_factor": 1}, "must be a whole number >= 2, got 1; 32 is usual"),
    ({"agc": 0.0}, r"clip must be in \(0, infinity\), got 0.0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_value(options, message):
    with pytest.raises(ValueError, match=message) as error:
        tiger(RATE, **options)
    assert ";" in str(error.value), "the remedy follows"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiger(RATE, lora_pid=0.1), "pid must be a LoraPid, got 0.1"),
        (lambda: blend_by_lora_pid(0.1), "momentum must be a gradient transformation, got 0.1"),
    ],
)
def test_wrong_kind(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_inject_hyperparams_says_what_has_to_be_static_and_then_adds_nothing():
    with pytest.raises(ValueError, match=r"min_dim_size_to_factor .* name it in static_args"):
        optax.inject_hyperparams(tiger)(RATE).init(tree())
    static = ("min_dim_size_to_factor", "power")
    state = optax.inject_hyperparams(tiger, static_args=static)(RATE).init(tree())
    structures = map(jax.tree.structure, (state.inner_state, tiger(RATE).init(tree())))
    assert len(set(structures)) == 1


def test_loops_of_lora_have_nothing_to_do_without_lora():
    params = {"norm": {"scale": jnp.ones(3)}}
    got, want = (
        tx.update(params, tx.init(params), params)[0]
        for tx in (tiger(RATE, lora_pid=LoraPid()), tiger(RATE))
    )
    assert_close(got, want)
