"""Every optimizer of the comparison trains in PyTorch."""

import numpy as np
import pytest

from benchmarks._runs import Task
from benchmarks._torch import training
from benchmarks._torch.optimizers import LOW_BIT
from benchmarks._torch.our_optimizers import (
    ACTIVATIONS,
    COMPACT,
    OPTIMIZERS,
    OURS,
    SCHEDULED,
    SELF_DRIVING,
)


def task(optimizer="adamw", rate=3e-3, **changes):
    run = Task("digits-conv", optimizer, rate, 0, 12, (12,), framework="torch")
    return run._replace(**changes)


# Of the parameters of digits-conv, 23,040 of 25,866 lie in tensors of 4,096 elements or more.
LARGE = 23_040 / 25_866


def coded(bits, moments):
    """Bytes a parameter: codes and a scale of two bytes for every 256, float32 where small."""
    return moments * (LARGE * (bits / 8 + 2 / 256) + (1 - LARGE) * 4)


# Bytes of state per parameter; Prodigy keeps two more copies of everything, self-driving one.
STATE = {
    "meta_lion": 4,
    "meta_lion-bfloat16": 2,
    "meta_lion-8bit": coded(8, 1),
    "meta_lion-4bit": coded(4, 1),
    "meta3-8bit": coded(8, 2),
    "meta3-4bit": coded(4, 2),
    "self_driving": 12,
    # Embeddings, output layer and vectors have a moment more.
    **dict.fromkeys(("self_driving-muon", *SCHEDULED), 8.43),
    "cruxy-meta_lion": 4,
    "prodigy": 16,
    # Shapes decide what is factored; both are counted where AXIOM is tested.
    "axiom": 1.3,
    "axiom-momentum": 2.2,
}


LONG_IMPORTS = ("stable-adamw", "adagc")


"""Their package takes a quarter of a minute to import."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in (*COMPACT, *LONG_IMPORTS) else [])
        for name in OPTIMIZERS
        if name not in LOW_BIT and name not in ACTIVATIONS
    ],
)
def test_every_torch_optimizer_trains(name):
    entry = OPTIMIZERS[name]
    rate = entry.rates()[2]
    assert rate == (1e-3 if name in SELF_DRIVING | SCHEDULED else pytest.approx(3e-3 * entry.scale))
    [record] = training.train([task(name, rate, evaluate_at=(6, 12))])
    assert record.finite
    assert record.start == pytest.approx(2.31, abs=0.1)
    assert len(record.losses) == 12
    assert record.held_out[1] < record.start
    assert record.held_out[0] != record.held_out[1]
    assert record.skipped == (0 if name in OURS | SCHEDULED else None)
    # A controller is 460 bytes, and clocks are 8 a tensor.
    want = pytest.approx(STATE.get(name, 8), rel=0.01, abs=0.03)
    assert record.state_bytes_per_parameter == want


@pytest.mark.slow  # torchao compiles its step
@pytest.mark.parametrize("name", LOW_BIT)
def test_low_bit_torch_optimizers_train(name):
    pytest.importorskip(name.partition("-")[0])
    entry = OPTIMIZERS[name]
    [record] = training.train([task(name, entry.rates()[2])])
    assert record.finite
    assert record.held_out[0] < record.start
    # Small tensors' states are float32; scales and tables of codes add a few bytes in a hundred.
    moments, bits = 1 if "lion" in name else 2, 4 if "4bit" in name else 8
    least = moments * (23_040 * bits / 8 + 2_826 * 4) / 25_866
    assert least < record.state_bytes_per_parameter < 1.2 * least


@pytest.mark.parametrize("name", ["schedule-free", "self_driving"])
def test_evaluation_is_at_the_average(name):
    """Evaluating in between moves weights to the average and back, and must not change training."""
    once, often = training.train([task(name), task(name, evaluate_at=(4, 8, 12))])
    np.testing.assert_allclose(often.losses, once.losses, rtol=1e-3)
    assert once.held_out[0] != once.start


def test_faults_are_refused_in_torch():
    with pytest.raises(ValueError, match="must be 'none' in PyTorch, got 'nan'"):
        training.train([task(fault="nan")])
