"""`cruxy_optax` and `cruxy_torch` are one optimizer: step by step, and handed over mid-run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_optax import (
    averaged_params,
    meta3,
    meta_lion,
    self_driving,
    self_driving_lion,
    stability_v1,
    stability_v2,
    telemetry,
)

torch = pytest.importorskip("torch")

from cruxy_torch import CruxyOptimizer  # noqa: E402
from cruxy_torch._interop import state_from_optax, state_to_optax  # noqa: E402
from relatives import relatives  # noqa: E402

STEPS, RATE, DECAY = 200, 3e-3, 0.1
SHAPES = {"w": (6, 16), "b": (16,), "s": ()}

MODES = {
    "meta3": (meta3, {"mode": "meta3"}),
    "stability_v1": (stability_v1, {"mode": "stability_v1"}),
    "stability_v2": (stability_v2, {"mode": "stability_v2"}),
    "meta_lion": (meta_lion, {"use_lion": True, "betas": (0.9, 0.99)}),
    "self_driving": (self_driving, {"mode": "self_driving"}),
    "self_driving_lion": (self_driving_lion, {"mode": "self_driving", "use_lion": True}),
}
LION = ("meta_lion", "self_driving_lion")
every_mode = pytest.mark.parametrize(
    "name", relatives(MODES, MODES.keys() - {"stability_v2", "self_driving_lion"})
)

# Both frameworks round each float32 operation on their own: a step of size RATE differs by a few
# ulps of its moments, at random, and 200 of them are added.
ULPS = 10 * STEPS
CLOSE = {"rtol": ULPS * 2.0**-24, "atol": ULPS * 2.0**-24}
# beta2 of v1 and v2 comes to within 1e-4 of 1, and 1 - beta2 weighs what enters nu.
SECOND = {"rtol": 2.0**-24 / 1e-4, "atol": 1e-12}
# Lion: where beta1 m + (1 - beta1) g is within an ulp of 0 the sign may fall either way.
FLIPPED = 0.01


def stream(seed=0, steps=STEPS):
    """Gradients with surges, spikes and NaN steps; losses that fall, are missing or NaN."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0.0, 0.3, steps))
    size[60:80] *= 5.0
    size[[100, 150]] = 1000.0
    grads = [
        {k: np.asarray(size[t] * rng.normal(size=s), np.float32) for k, s in SHAPES.items()}
        for t in range(steps)
    ]
    for t in (0, 33, 34, 120):
        grads[t]["w"][0, 0] = [np.nan, np.inf, -np.inf, 1e30][t % 4]
    losses = [float(x) for x in 2.0 - np.arange(steps) / steps + rng.normal(0, 0.05, steps)]
    for t in range(10, steps, 17):
        losses[t] = None if t % 2 else float("nan")
    return grads, losses


def start():
    rng = np.random.default_rng(7)
    return {k: np.asarray(rng.normal(size=s), np.float32) for k, s in SHAPES.items()}


class Jax:
    """The JAX side of a run."""

    def __init__(self, name, params):
        self.tx = MODES[name][0](RATE, weight_decay=DECAY)
        self.params = jax.tree.map(jnp.asarray, params)
        self.state = self.tx.init(self.params)
        self.step_fn = jax.jit(self._step)

    def _step(self, params, state, grads, loss):
        updates, state = self.tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    def step(self, grads, loss):
        loss = np.float32(np.nan if loss is None else loss)
        self.params, self.state = self.step_fn(self.params, self.state, grads, loss)

    @property
    def moments(self):
        return self.state.inner_state[1]


class Torch:
    """The PyTorch side of the same run."""

    def __init__(self, name, params):
        self.params = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in params.items()}
        options = MODES[name][1]
        self.optimizer = CruxyOptimizer(
            self.params.values(), lr=RATE, weight_decay=DECAY, **options
        )

    def step(self, grads, loss):
        for k, p in self.params.items():
            p.grad = torch.tensor(grads[k])
        self.optimizer.step(loss=loss)

    def moment(self, k, key):
        return self.optimizer.state[self.params[k]][key].numpy()


SHOWN = (
    "learning_rate",
    "alignment",
    "phase",
    "curvature",
    "beta1",
    "beta2",
    "clip_threshold",
    "clip_scale",
)


def assert_together(name, ours, theirs):
    """Parameters, moments and controls of both sides within rounding."""
    values = telemetry(ours.state)
    shown = theirs.optimizer.telemetry()
    assert set(values) == set(shown)
    for key in set(SHOWN) & set(shown):
        np.testing.assert_allclose(
            float(values[key]), shown[key], rtol=2e-4, atol=1e-6, err_msg=key
        )
    for key in ("step", "skipped_total", "skipped_in_a_row"):
        assert int(values[key]) == shown[key]
    if name in LION:
        apart = [
            np.abs(np.asarray(ours.params[k]) - p.detach().numpy()) > CLOSE["atol"]
            for k, p in theirs.params.items()
        ]
        assert np.mean(np.concatenate([x.ravel() for x in apart])) <= FLIPPED
    for k, p in theirs.params.items():
        if name not in LION:
            np.testing.assert_allclose(ours.params[k], p.detach().numpy(), **CLOSE)
            np.testing.assert_allclose(ours.moments.nu[k], theirs.moment(k, "exp_avg_sq"), **SECOND)
        np.testing.assert_allclose(ours.moments.mu[k], theirs.moment(k, "exp_avg"), **CLOSE)
    if name == "self_driving":
        average = averaged_params(ours.state, ours.params)
        with theirs.optimizer.averaged():
            for k, p in theirs.params.items():
                np.testing.assert_allclose(average[k], p.detach().numpy(), **CLOSE)


@every_mode
def test_both_frameworks_agree_step_by_step(name):
    ours, theirs = Jax(name, start()), Torch(name, start())
    for grads, loss in zip(*stream(), strict=True):
        ours.step(grads, loss)
        theirs.step(grads, loss)
        if int(ours.state.step):  # before the first good step torch has no moments to show
            assert_together(name, ours, theirs)


def leaves(tree):
    return [tree[k] for k in SHAPES]


def tree_of(values):
    return dict(zip(SHAPES, values, strict=True))


@every_mode
def test_run_begun_in_jax_continues_in_torch(name):
    grads, losses = stream()
    ours = Jax(name, start())
    for t in range(100):
        ours.step(grads[t], losses[t])
    theirs = Torch(name, {k: np.array(ours.params[k]) for k in SHAPES})
    theirs.optimizer.load_state_dict(state_from_optax(theirs.optimizer, ours.state, leaves))
    for t in range(100, STEPS):
        ours.step(grads[t], losses[t])
        theirs.step(grads[t], losses[t])
    assert_together(name, ours, theirs)


@every_mode
def test_run_begun_in_torch_continues_in_jax(name):
    grads, losses = stream()
    theirs = Torch(name, start())
    for t in range(100):
        theirs.step(grads[t], losses[t])
    ours = Jax(name, {k: p.detach().numpy().copy() for k, p in theirs.params.items()})
    ours.state = jax.tree.map(jnp.asarray, state_to_optax(theirs.optimizer, ours.state, tree_of))
    spec = jax.tree.map(lambda x: (x.shape, x.dtype), ours.tx.init(ours.params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), ours.state) == spec
    for t in range(100, STEPS):
        ours.step(grads[t], losses[t])
        theirs.step(grads[t], losses[t])
    assert_together(name, ours, theirs)


def test_there_and_back_is_the_same_bits():
    ours = Jax("meta3", start())
    grads, losses = stream()
    for t in range(60):
        ours.step(grads[t], losses[t])
    theirs = Torch("meta3", {k: np.array(ours.params[k]) for k in SHAPES})
    theirs.optimizer.load_state_dict(state_from_optax(theirs.optimizer, ours.state, leaves))
    back = state_to_optax(theirs.optimizer, ours.state, tree_of)
    jax.tree.map(np.testing.assert_array_equal, back.law_state, ours.state.law_state)
    jax.tree.map(np.testing.assert_array_equal, back.inner_state, ours.state.inner_state)


def test_moving_says_what_does_not_fit():
    ours, theirs = Jax("meta3", start()), Torch("meta3", start())
    with pytest.raises(ValueError, match="one controller with one set of moments, got 0 and 0"):
        state_from_optax(theirs.optimizer, optax.adam(1e-3).init(ours.params), leaves)
    with pytest.raises(ValueError, match=r"its parameter's shape \(6, 16\), got \(16, 6\)"):
        state_from_optax(theirs.optimizer, ours.state, lambda t: [t["w"].T, t["b"], t["s"]])
    with pytest.raises(ValueError, match="one leaf for each of the optimizer's 3 parameters"):
        state_from_optax(theirs.optimizer, ours.state, lambda t: [t["w"]])
    with pytest.raises(ValueError, match="every parameter must have taken a step"):
        state_to_optax(theirs.optimizer, ours.state, tree_of)


def bfloat16_pair():
    """A run of each framework on bfloat16 parameters, one step in."""
    params = {"w": jnp.ones((6, 16), jnp.bfloat16)}
    tx = meta3(RATE)
    _, state = tx.update(params, tx.init(params), params, value=1.0)
    p = torch.nn.Parameter(torch.ones(6, 16, dtype=torch.bfloat16))
    optimizer = CruxyOptimizer([p], lr=RATE, weight_decay=1e-4)
    p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    return tx, params, state, optimizer


def test_a_state_handed_back_has_the_dtypes_and_shapes_of_init():
    tx, params, _, optimizer = bfloat16_pair()
    like = tx.init(params)
    back = state_to_optax(optimizer, like, lambda leaves: {"w": leaves[0]})
    for ours, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(like), strict=True):
        assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
    stepped, _ = jax.jit(tx.update)(params, back, params, value=0.9)
    assert stepped["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mode": "self_driving"},
            "both sides must have the same law, got Meta3State in opt_state",
        ),
        ({"use_lion": True}, r"must have the same direction, got moments \('exp_avg', "),
    ],
)
def test_sides_that_do_not_fit_are_refused_by_name(options, message):
    _, _, state, _ = bfloat16_pair()
    p = torch.nn.Parameter(torch.ones(6, 16))
    optimizer = CruxyOptimizer([p], **options)
    p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    with pytest.raises(ValueError, match=message):
        state_from_optax(optimizer, state, lambda tree: [tree["w"]])
    with pytest.raises(ValueError, match=message):
        state_to_optax(optimizer, state, lambda leaves: {"w": leaves[0]})
