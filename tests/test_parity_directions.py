"""Directions around directions, and Tiger, are the same in both frameworks, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cruxy_optax
from cruxy_control import LoraPid, Meta3, PlateauGuard
from cruxy_control.slices import per_group
from cruxy_optax import (
    balance_slices,
    blend_sign,
    clip_by_parameter_norm,
    clip_by_predicted_norm,
    clip_by_rms,
    scale_by_controlled_adam,
    scale_by_controlled_momentum,
    scale_by_meta_learning_rate,
    scale_by_slices,
    scale_by_trust_ratio_ema,
    soften_sign,
    stabilize,
    throttle_by_phase,
)

torch = pytest.importorskip("torch")

from cruxy_torch import (  # noqa: E402
    AXIOM,
    AdaptiveGradientClip,
    BalanceSlices,
    BlendByLoraPid,
    ClipRms,
    CruxyOptimizer,
    ScaleSlices,
    SignBlend,
    Tiger,
    TrustRatio,
)
from cruxy_torch._actuators.moments import Adam  # noqa: E402

STEPS, RATE = 200, 3e-3
SHAPES = {"conv": (3, 5, 300), "matrix": (60, 36), "scalar": (), "vector": (30,)}
FUSED = {"qkv": (48, 20)}
QKV = per_group(3, 6, 2)
RATES = {"q": 0.9, "k": 0.8, "v": 1.1}

# Both frameworks round each float32 operation on their own: a step of size RATE differs by a few
# ulps, at random, and 200 of them are added.
CLOSE = {"rtol": 10 * STEPS * 2.0**-24, "atol": 10 * STEPS * 2.0**-24}


def stream(shapes, seed=0):
    """Gradients with surges, spikes and steps that are not finite; losses with gaps."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0.0, 0.3, STEPS))
    size[60:80] *= 5.0
    size[[100, 150]] = 1000.0
    grads = [
        {k: np.asarray(size[t] * rng.normal(size=s), np.float32) for k, s in shapes.items()}
        for t in range(STEPS)
    ]
    first = next(k for k in shapes if k in ("matrix", "qkv"))
    for t, bad in ((0, np.nan), (33, np.inf), (120, 1e30)):
        grads[t][first][1, 2] = bad
    losses = 2.0 - np.arange(STEPS) / STEPS + rng.normal(0, 0.05, STEPS)
    losses[5::11] = np.nan
    return grads, losses.astype(np.float32)


def start(shapes):
    rng = np.random.default_rng(7)
    return {k: np.asarray(0.3 * rng.normal(size=s), np.float32) for k, s in shapes.items()}


def assert_same_run(tx, make, shapes, close=CLOSE, skipped=3):
    """A transformation, and the optimizer that `make` makes of parameters by name."""

    @jax.jit
    def step(ours, state, grads, loss):
        updates, state = tx.update(grads, state, ours, value=loss)
        return optax.apply_updates(ours, updates), state

    ours = jax.tree.map(jnp.asarray, start(shapes))
    params = {k: torch.nn.Parameter(torch.tensor(x)) for k, x in start(shapes).items()}
    state, optimizer = tx.init(ours), make(params)
    for grads, loss in zip(*stream(shapes), strict=True):
        ours, state = step(ours, state, grads, loss)
        for k, p in params.items():
            p.grad = torch.tensor(grads[k])
        optimizer.step(loss=float(loss))
        for k, p in params.items():
            np.testing.assert_allclose(ours[k], p.detach().numpy(), **close, err_msg=k)
    assert optimizer.telemetry()["skipped_total"] == skipped
    return state, optimizer, params


LAW = Meta3()


def chained(*parts, law=LAW):
    return stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            *parts,
            throttle_by_phase(),
            scale_by_meta_learning_rate(RATE),
        ),
        law=law,
    )


def directed(direction, law=None):
    def make(params):
        return CruxyOptimizer(
            params.values(),
            lr=RATE,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            direction=direction,
            law=law,
        )

    return make


def ramp(count):
    """A schedule for both."""
    return 0.004 * count


PAIRS = {
    "soft": ([soften_sign(0.5)], SignBlend(temperature=0.5, weight=0.0)),
    "blend": ([blend_sign()], SignBlend()),
    "schedule": ([blend_sign(ramp)], SignBlend(weight=ramp)),
    "trust": (
        [blend_sign(), scale_by_trust_ratio_ema(decay=0.9)],
        TrustRatio(SignBlend(), decay=0.9),
    ),
    "trust of rows": (
        [blend_sign(), scale_by_trust_ratio_ema(2.0, 0.9, 0.1, per="row")],
        TrustRatio(SignBlend(), 2.0, 0.9, 0.1, per="row"),
    ),
    "trust of a momentum": (
        [scale_by_trust_ratio_ema(space="momentum", direction=blend_sign())],
        TrustRatio(SignBlend(), space="momentum"),
    ),
    "rms": ([blend_sign(1.0), clip_by_rms(0.9)], ClipRms(SignBlend(weight=1.0), 0.9)),
    "rms of rows": ([blend_sign(), clip_by_rms(0.7, per="row")], ClipRms(SignBlend(), 0.7, "row")),
    "rms of blocks": (
        [blend_sign(), clip_by_rms(0.7, per="block")],
        ClipRms(SignBlend(), 0.7, "block"),
    ),
}
SLICED = {
    "slices": (
        [blend_sign(), scale_by_slices({"qkv": QKV}, RATES)],
        ScaleSlices(SignBlend(), QKV, RATES),
    ),
    "balance": (
        [blend_sign(), balance_slices({"qkv": QKV}, every=10)],
        BalanceSlices(SignBlend(), QKV, every=10),
    ),
    "trust of slices": (
        [
            blend_sign(),
            scale_by_trust_ratio_ema(2.0, 0.9, per="slice", slices={"qkv": QKV}),
        ],
        TrustRatio(SignBlend(), 2.0, 0.9, per="slice", slices=QKV),
    ),
}


def fast(*names, of):
    """All of them, but for these marked slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in of]


@pytest.mark.parametrize("name", fast("blend", of=PAIRS))
def test_direction_agrees_step_by_step(name):
    theirs, ours = PAIRS[name]
    assert_same_run(chained(scale_by_controlled_momentum(), *theirs), directed(ours), SHAPES)


@pytest.mark.parametrize("name", fast("trust of slices", of=SLICED))
def test_sliced_direction_agrees_step_by_step(name):
    theirs, ours = SLICED[name]
    assert_same_run(chained(scale_by_controlled_momentum(), *theirs), directed(ours), FUSED)


@pytest.mark.slow
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_adaptive_clip_agrees_step_by_step(per):
    tx = chained(clip_by_parameter_norm(0.1, per=per), scale_by_controlled_momentum(), blend_sign())
    assert_same_run(tx, directed(AdaptiveGradientClip(SignBlend(), 0.1, per=per)), SHAPES)


@pytest.mark.slow
def test_trust_ratio_of_adam_agrees_step_by_step():
    tx = chained(scale_by_controlled_adam(0.9, 0.99), scale_by_trust_ratio_ema(decay=0.9))
    assert_same_run(tx, directed(TrustRatio(Adam(1e-8, True), decay=0.9)), SHAPES)


@pytest.mark.slow
def test_a_plateau_takes_the_sign_away_in_both():
    law = PlateauGuard(LAW, patience=20, threshold=0.05)
    tx = chained(scale_by_controlled_momentum(), blend_sign(), law=law)
    state, optimizer, _ = assert_same_run(tx, directed(SignBlend(), law), SHAPES)
    shown = cruxy_optax.telemetry(state)
    assert float(shown["sign_weight"]) == pytest.approx(optimizer.telemetry()["sign_weight"])


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_axiom_with_a_part_of_its_root_agrees_step_by_step(power):
    tx = cruxy_optax.axiom(RATE, weight_decay=0.1, power=power)
    make = functools.partial(AXIOM, lr=RATE, weight_decay=0.1, power=power)
    assert_same_run(tx, lambda params: make(params.values()), SHAPES)


@pytest.mark.slow
def test_lora_pid_agrees_step_by_step():
    # The share of large entries is a count: an entry that rounding moves over the line counts in
    # one framework alone, one in 2,160 here, which moves the blend by 0.4 times that.
    pid = LoraPid(interval=5)
    tx = chained(cruxy_optax.blend_by_lora_pid(scale_by_controlled_momentum(), pid, 0.5))
    direction = BlendByLoraPid(pid=pid, temperature=0.5)
    state, optimizer, params = assert_same_run(tx, directed(direction), SHAPES)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "pid"))
    (steered,) = (node for node in nodes if hasattr(node, "pid"))
    blends = [optimizer.state[params[k]]["lora_pid"][3].item() for k in sorted(SHAPES)]
    # The loops here have not seen the last step yet.
    np.testing.assert_allclose(blends, steered.pid.blend, rtol=0.05)


TIGERS = {
    "plain": ({"blend": 0.5}, {"blend": 0.5}),
    "quickstart": (
        {"power": 1.0, "trust_cap": 10.0, "trust_space": "momentum"},
        {"factored": True, "precond_alpha": 1.0, "trust_space": "precond"},
    ),
    "known good": (
        {"agc": 0.02, "trust_cap": 5.0, "clip_rms": 1.0},
        {
            "update_buffer_dtype": "fp32",
            "agc_clip": 0.02,
            "trust_clip": 5.0,
            "rms_clip_threshold": 1.0,
            "rms_clip_granularity": "param",
        },
    ),
    "legacy": (
        {"agc": 0.02},
        {
            "factored": False,
            "precond_alpha": 0.0,
            "use_trust_ratio": False,
            "agc_clip": 0.02,
            "trust_clip": 5.0,
        },
    ),
}


@pytest.mark.parametrize("name", fast("quickstart", of=TIGERS))
def test_tiger_agrees_step_by_step(name):
    theirs, ours = TIGERS[name]
    # A hard sign, the default, may fall either way where its argument is within an ulp of 0.
    tx = cruxy_optax.tiger(RATE, weight_decay=0.1, temperature=1.0, **theirs)
    make = functools.partial(Tiger, lr=RATE, weight_decay=0.1, use_sign=False, **ours)
    assert_same_run(tx, lambda params: make(params.values()), SHAPES)


def test_tiger_with_slices_and_lora_agrees_step_by_step():
    slices, pid = {"qkv": QKV}, LoraPid(interval=5)
    shapes = FUSED | {"lora_a": (4, 20), "lora_b": (48, 4)}
    tx = cruxy_optax.tiger(
        RATE,
        weight_decay=0.1,
        temperature=1.0,
        trust_cap=3.0,
        trust_decay=0.9,
        trust_per="slice",
        slices=slices,
        slice_rates=RATES,
        balance_slices=True,
        lora_pid=pid,
    )

    def make(params):
        lora = [params["lora_a"], params["lora_b"]]
        groups = [
            {"params": [params["qkv"]], "slices": QKV, "slice_rates": (0.9, 0.8, 1.1)},
            {"params": lora, "role": "lora.a"},
        ]
        return Tiger(
            groups,
            lr=RATE,
            weight_decay=0.1,
            temperature=1.0,
            trust_clip=3.0,
            trust_decay=0.9,
            trust_per="slice",
            balance_slices=True,
            lora_pid=pid,
        )

    assert_same_run(tx, make, shapes)
