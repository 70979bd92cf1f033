"""A workload whose runs are known beforehand, for the tests of the benchmarks."""

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from benchmarks import _comparison
from benchmarks._jax import training
from benchmarks._jax.optimizers import Optimizer
from benchmarks._jax.our_optimizers import OPTIMIZERS
from benchmarks._runs import Task
from benchmarks.workloads import Workload

QUIET = Console(quiet=True)


STEPS = 40


def quadratic(name="quadratic", data=None, framework="jax"):
    """Half the squared distance to a target that the seed chooses; every batch is the same."""

    def batches(seed):
        return itertools.repeat(np.full(3, 1.0 + seed, np.float32))

    return Workload(
        name="quadratic",
        steps=STEPS,
        unit="loss",
        init=lambda seed: {"x": jnp.zeros(3), "m": jnp.full((2, 2), 1.0 + seed)},
        loss=lambda p, target: 0.5 * jnp.sum((p["x"] - target) ** 2) + 0.5 * jnp.sum(p["m"] ** 2),
        batches=batches,
        held_out=lambda p: 0.5 * jnp.sum(p["m"] ** 2),
        settings={},
    )


@pytest.fixture(autouse=True)
def known_workload(monkeypatch):
    """Every workload is the quadratic, and plain gradient descent an optimizer."""
    monkeypatch.setattr(training, "load", quadratic)
    monkeypatch.setattr(_comparison, "load", quadratic)
    descent = Optimizer("SGD", lambda rate, steps: optax.sgd(rate))
    monkeypatch.setitem(OPTIMIZERS, "sgd", descent)
    training._Programs.of.cache_clear()
    yield
    training._Programs.of.cache_clear()


def task(optimizer="sgd", rate=0.1, seed=0, **changes):
    return Task("quadratic", optimizer, rate, seed, STEPS, (10, 20, STEPS))._replace(**changes)
