"""A small GPT trained in both frameworks from the same weights and batches stays together."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cruxy_optax import meta3, meta_lion, telemetry

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from _demo import GPTConfig  # noqa: E402
from _gpt import GPT as FlaxGPT  # noqa: E402, N811
from _gpt_torch import GPT as TorchGPT  # noqa: E402, N811
from cruxy_torch import CruxyOptimizer  # noqa: E402

CONFIG, VOCABULARY, BATCH, STEPS = GPTConfig(layers=2, heads=2, width=32, context=16), 23, 8, 100


def torch_name(path):
    """The PyTorch name of a Flax weight."""
    *module, kind = [str(getattr(p, "key", getattr(p, "name", p))) for p in path]
    return ".".join([*module, "weight"]), kind


def copy_weights(model, twin):
    """Gives the PyTorch twin the Flax model's weights; a kernel's output axis comes first there."""
    twins = dict(twin.named_parameters())
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for path, variable in flat:
        name, kind = torch_name(path)
        weight = np.array(variable[...])
        weight = weight.T if kind == "kernel" else weight
        with torch.no_grad():
            twins.pop(name).copy_(torch.tensor(weight))
    assert not twins, "every parameter has its counterpart"


@pytest.mark.parametrize(
    "lion", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["meta3", "meta_lion"]
)
def test_gpt_trained_in_both_frameworks_stays_together(lion):
    rate = 3e-4 if lion else 3e-3
    model = FlaxGPT(CONFIG, VOCABULARY, rngs=nnx.Rngs(0))
    twin = TorchGPT(CONFIG, VOCABULARY)
    copy_weights(model, twin)
    graph, params = nnx.split(model, nnx.Param)
    tx = meta_lion(rate, weight_decay=0.1) if lion else meta3(rate, weight_decay=0.1)
    state = tx.init(params)
    options = {"use_lion": True, "betas": (0.9, 0.99)} if lion else {}
    optimizer = CruxyOptimizer(twin.parameters(), lr=rate, weight_decay=0.1, **options)

    @jax.jit
    def step(params, state, inputs, targets):
        def loss_fn(params):
            logits = nnx.merge(graph, params)(inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng(0)
    text = np.cumsum(rng.integers(0, 3, 5000)) % VOCABULARY  # something there is to learn
    losses = []
    for _ in range(STEPS):
        starts = rng.integers(0, len(text) - CONFIG.context - 1, BATCH)
        window = np.stack([text[i : i + CONFIG.context + 1] for i in starts])
        inputs, targets = window[:, :-1], window[:, 1:]
        params, state, ours = step(params, state, jnp.asarray(inputs), jnp.asarray(targets))
        optimizer.zero_grad()
        logits = twin(torch.tensor(inputs))
        theirs = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(targets).flatten()
        )
        theirs.backward()
        optimizer.step(loss=theirs)
        losses.append((float(ours), theirs.item()))
    ours, theirs = np.array(losses).T
    assert ours[-1] < 0.8 * ours[0], "it learns"
    # Two backward passes differ by rounding, which training amplifies; a sign that falls the other
    # way moves a weight by twice the rate. The losses stay within 1 % of each other.
    np.testing.assert_allclose(theirs, ours, rtol=1e-2)
    np.testing.assert_allclose(theirs[:10], ours[:10], rtol=1e-3 if lion else 1e-4)
    shown, values = optimizer.telemetry(), telemetry(state)
    assert shown["phase"] == pytest.approx(float(values["phase"]), rel=1e-2)
    assert shown["learning_rate"] == pytest.approx(float(values["learning_rate"]), rel=1e-2)
