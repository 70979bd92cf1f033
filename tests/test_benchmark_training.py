"""Training in JAX gives the known answer where there is one, and bad batches strike as they say."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from benchmark_quadratic import STEPS, known_workload, task  # noqa: F401
from benchmarks._jax import training
from benchmarks._jax.faults import CORRUPTIONS
from benchmarks._jax.optimizers import PEERS
from benchmarks._jax.our_optimizers import (
    AVERAGED,
    COMPACT,
    COMPONENTS,
    ENDED,
    OPTIMIZERS,
    PUBLISHED,
    ROLES,
    SCHEDULED,
    WIRED,
)
from benchmarks._jax.rivals import RIVALS
from benchmarks._jax.variants import ABLATION, VARIED, VARIED_MUON, YIELDING
from benchmarks.faults import FAULTS
from relatives import relatives


def test_gradient_descent_on_a_quadratic_gives_the_closed_form():
    record = training.train([task(rate=0.1, seed=1)])[0]
    # Every coordinate of m starts at 2 and shrinks by 0.9 a step; four of them, halved squares.
    expected = [0.5 * 4 * (2.0 * 0.9**n) ** 2 for n in (10, 20, STEPS)]
    assert record.start == 8.0
    np.testing.assert_allclose(record.held_out, expected, rtol=STEPS * 2**-22)
    first = [0.5 * 3 * 2.0**2 + 8.0, (0.5 * 3 * 2.0**2 + 8.0) * 0.81]
    np.testing.assert_allclose(record.losses[:2], first, rtol=1e-6)
    assert len(record.losses) == STEPS
    assert record.final_training_loss(2) == pytest.approx(np.mean(record.losses[-2:]))
    assert record.finite
    assert record.skipped is None


def test_diverged_run_is_seen():
    record = training.train([task(rate=1e4)])[0]
    assert math.isnan(record.held_out[-1])
    assert not record.finite


@pytest.mark.parametrize("name", ["adamw-cosine", "meta3", "schedule-free"])
def test_runs_trained_together_equal_runs_trained_alone(name):
    tasks = [task(name, rate, seed) for rate in (1e-2, 1e-1) for seed in (0, 1)]
    together = training.train(tasks)
    for alone, same in zip(tasks, together, strict=True):
        np.testing.assert_allclose(training.train([alone])[0].held_out, same.held_out, rtol=1e-4)


def test_runs_of_different_optimizers_are_not_trained_together():
    with pytest.raises(ValueError, match="rate and seed alone"):
        training.train([task("sgd"), task("adamw")])


VARIANTS = {
    "self_driving-interpolated",
    *("scheduled-muon", "scheduled-muon-linear", "muon-cosine"),
}.union(ABLATION, VARIED, VARIED_MUON, YIELDING).union(
    *(PUBLISHED, COMPACT, COMPONENTS, ROLES, ENDED, AVERAGED)
)


UNGUARDED = PEERS.keys() | RIVALS.keys() | SCHEDULED.keys() | {"adamw-clipped"}


EVERY = [
    name
    for name in sorted(OPTIMIZERS)
    if not name.endswith("slices")  # of fused q, k and v, which the digits have none of
    and name not in WIRED
]


@pytest.mark.parametrize("name", relatives(EVERY, set(EVERY) - VARIANTS))
def test_every_optimizer_runs_with_a_traced_rate(name):
    rates = OPTIMIZERS[name].rates()
    record = training.train([task(name, rates[len(rates) // 2])])[0]
    assert record.finite
    assert record.held_out[-1] < record.start
    assert record.skipped == (None if name in UNGUARDED else 0)


def test_faults_do_what_they_say():
    grads = {"a": jnp.ones(2), "b": jnp.full((2, 2), 2.0)}
    assert CORRUPTIONS["times-1000"].gradients(grads)["b"][0, 0] == 2000.0
    huge = CORRUPTIONS["huge"].gradients(grads)
    assert float(huge["b"].max()) == pytest.approx(1e30)
    assert jnp.sum(huge["b"] == 2.0) == 3
    assert jnp.isnan(CORRUPTIONS["nan"].gradients(grads)["a"]).all()
    assert jnp.isfinite(CORRUPTIONS["nan"].gradients(grads)["b"]).all()
    assert jnp.isinf(CORRUPTIONS["inf"].gradients(grads)["a"]).all()
    batch = {"x": np.ones(3), "y": np.arange(50)}
    shuffled = CORRUPTIONS["labels"].batch(batch)
    assert sorted(shuffled["y"]) == list(range(50))
    assert (shuffled["y"] != batch["y"]).any()
    assert FAULTS["twice-1000"].strikes(10) == (2, 3, 4, 5, 6, 7)


def test_every_fault_does_something():
    assert {"none", *CORRUPTIONS} == FAULTS.keys()


def test_fault_strikes_the_run_at_its_steps_alone():
    clean, hit = (training.train([task(fault=fault)])[0] for fault in ("none", "times-1000"))
    first = FAULTS["times-1000"].strikes(STEPS)[0]
    # The loss is taken before the step: the one after the strike is the first that differs.
    assert hit.losses[: first + 1] == clean.losses[: first + 1]
    assert hit.losses[first + 1] > 1000 * clean.losses[first + 1]


@pytest.mark.parametrize("fault", ["nan", "inf", "huge"])
def test_guard_and_its_counter_are_seen_by_the_stress_run(fault):
    guarded, plain = (
        training.train([task(name, 1e-2, fault=fault)])[0] for name in ("meta3", "adamw")
    )
    assert guarded.skipped == 3
    assert guarded.finite
    # Adam's second moment overflows on a finite 1e30 too; nothing moves after that.
    assert not plain.finite
