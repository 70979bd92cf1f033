"""The instruments for time, memory and resumption find what was put there."""

import argparse
import itertools
import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

pytest.importorskip("torch")

import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks._jax import measured_optimizers as measured_jax
from benchmarks._jax import memory as memory_jax
from benchmarks._jax import resume as resume_jax
from benchmarks._jax import step_time as step_time_jax
from benchmarks._measured_optimizers import MeasuredOptimizer, chosen
from benchmarks._resumed import first_difference
from benchmarks._shapes import TINYLLAMA
from benchmarks._torch import memory as memory_torch
from benchmarks._torch import resume as resume_torch
from benchmarks._torch import step_time as step_time_torch
from benchmarks._torch.device import DEVICE
from benchmarks.workloads import Workload

QUIET = Console(quiet=True)
SHAPES = {"w": (100, 200), "b": (50,)}
COUNT = 20_050
SIZE = 1000


def quadratic(name, data=None, framework="jax"):
    """Half the squared distance to a target of which every batch is a noisy reading."""

    def batches(seed):
        rng = np.random.default_rng(seed)
        while True:
            yield rng.normal(size=SIZE).astype(np.float32)

    return Workload(
        name=name,
        steps=8,
        unit="loss",
        init=lambda seed: {"x": jnp.zeros(SIZE)} if framework == "jax" else Point(),
        loss=distance if framework == "jax" else distance_in_torch,
        batches=batches,
        held_out=lambda params: 0.0,
        settings={},
    )


def distance(params, target):
    return 0.5 * jnp.sum((params["x"] - target) ** 2)


def distance_in_torch(model, target):
    return 0.5 * ((model.x - torch.from_numpy(target).to(DEVICE)) ** 2).sum()


class Point(nn.Module):
    """The quadratic's parameters."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(SIZE, device=DEVICE))


@pytest.fixture
def known_workload(monkeypatch):
    """Every workload is the quadratic, in both frameworks."""
    for module in (memory_jax, resume_jax, step_time_jax, resume_torch, step_time_torch):
        monkeypatch.setattr(module, "load", quadratic)


def test_the_llama_has_the_parameters_of_tinyllama():
    assert sum(map(math.prod, TINYLLAMA.values())) == 1_100_048_384


def test_a_known_state_gives_known_bytes():
    # optax counts steps in one int32, torch in a float32 for each parameter.
    assert memory_jax.state_bytes("adamw", SHAPES) == 2 * 4 * COUNT + 4
    assert memory_torch.state_bytes("adamw", SHAPES) == 2 * 4 * COUNT + 2 * 4
    assert memory_jax.state_bytes("lion", SHAPES) == 4 * COUNT + 4


@pytest.mark.parametrize("name", ["meta3", "meta3-8bit", "meta_lion-4bit", "adamw-foreach"])
def test_counted_bytes_are_those_of_a_state_that_took_a_step(name):
    entry = step_time_torch.OPTIMIZERS[name]
    alone = step_time_torch.Alone(entry.make, SHAPES)
    counted = memory_torch.state_bytes(name, SHAPES)
    assert alone.state_bytes_per_parameter * COUNT == pytest.approx(counted, rel=1e-12)


def test_the_peak_holds_parameters_state_and_batch(known_workload):
    adamw, lion = (memory_jax.peak_bytes(name, "quadratic", None) for name in ("adamw", "lion"))
    assert adamw >= 4 * SIZE * (1 + 2 + 1)
    assert lion >= 4 * SIZE * (1 + 1 + 1)
    assert memory_torch.peak_bytes("adamw", "quadratic", None) is None or torch.cuda.is_available()


def test_a_step_that_is_timed_is_taken():
    timed = step_time_jax.Timed(
        lambda params, state, add: (params + add, state + 1), jnp.zeros(3), jnp.int32(0), 2.0
    )
    assert timed.time() > 0
    assert timed.time() > 0
    np.testing.assert_array_equal(timed.params, np.full(3, 4.0))
    assert timed.state == 2


def test_state_that_is_the_parameters_themselves_is_timed():
    # Schedule-Free starts with a copy of them, which a donated buffer cannot be.
    rows = step_time_jax.optimizer_steps(SHAPES, 2, ["adamw", "schedule-free"], QUIET)
    assert rows["adamw"]["ratio"] == 1.0
    assert rows["schedule-free"]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.01)


@pytest.mark.parametrize("module", [step_time_jax, step_time_torch])
def test_whole_training_steps_are_timed_against_adamw(module, known_workload):
    rows = module.training_steps("quadratic", None, 2, ["adamw", "meta_lion"], QUIET)
    assert rows["adamw"]["ratio"] == 1.0
    assert rows["meta_lion"]["milliseconds"] > 0


def resume(module, make, folder):
    return module.resume(make, "quadratic", steps=8, stop=3, folder=folder)


def test_a_resumable_jax_optimizer_is_found_identical(known_workload, tmp_path):
    found = resume(resume_jax, lambda: optax.sgd(0.1, momentum=0.9), tmp_path)
    assert found.first_difference is None
    assert found.bytes_on_disk > 0


def test_a_jax_optimizer_that_remembers_outside_its_state_is_caught(known_workload, tmp_path):
    built = itertools.count(1)
    found = resume(resume_jax, lambda: optax.sgd(0.1 * next(built)), tmp_path)
    assert found.first_difference == "['params']['x']"


class Forgetful(torch.optim.Optimizer):
    """Momentum of which `state_dict` knows nothing."""

    def __init__(self, params):
        super().__init__(params, {})
        self.momentum = [torch.zeros_like(p) for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p, m in zip(self.param_groups[0]["params"], self.momentum, strict=True):
            p -= 0.1 * m.mul_(0.9).add_(p.grad)


def test_a_resumable_torch_optimizer_is_found_identical(known_workload, tmp_path):
    def descent(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    found = resume(resume_torch, descent, tmp_path)
    assert found.first_difference is None
    # Parameters and momentum, at least.
    assert found.bytes_on_disk >= 2 * 4 * SIZE


def test_a_torch_optimizer_that_remembers_outside_its_state_is_caught(known_workload, tmp_path):
    found = resume(resume_torch, lambda model: Forgetful(model.parameters()), tmp_path)
    assert found.first_difference == "['model']['x']"


def test_bits_are_compared_not_values():
    nan = np.float32(np.nan)
    zero = resume_jax.leaves(({"a": jnp.float32(0.0)}, nan))
    assert first_difference(zero, resume_jax.leaves(({"a": jnp.float32(0.0)}, nan))) is None
    minus = resume_jax.leaves(({"a": jnp.float32(-0.0)}, nan))
    assert first_difference(zero, minus) == "['params']['a']"
    half = resume_jax.leaves(({"a": jnp.bfloat16(0.0)}, nan))
    assert first_difference(zero, half) == "['params']['a']"
    before = dict(resume_torch.leaves({"a": [torch.tensor(0.0), 1]}))
    assert first_difference(before, dict(resume_torch.leaves({"a": [torch.tensor(-0.0), 1]})))
    assert first_difference(before, dict(resume_torch.leaves({"a": [torch.tensor(0.0)]})))


def figures(folder, name, *arguments):
    """What a command writes."""
    main([name, *arguments, "--output", str(folder)])
    [path] = folder.glob("*.json")
    assert path.with_suffix(".png").exists()
    return json.loads(path.read_text())


@pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_step_time_writes_what_it_prints(framework, tmp_path, capsys):
    names = ("meta3", "meta_lion", "meta_lion-bfloat16")
    found = figures(
        tmp_path, "step-time", "--framework", framework, "--size", "0.1m", "--repeats", "2",
        "--training", "--optimizer", *names,
    )  # fmt: skip
    [update] = found["timings"]
    rows = update["optimizers"]
    assert list(rows) == ["adamw", *names]
    assert rows["adamw"]["ratio"] == 1.0
    bytes_each = [rows[name]["state_bytes_per_parameter"] for name in names]
    assert bytes_each == [pytest.approx(size, abs=0.03) for size in (8, 4, 2)]
    if framework == "jax":
        assert all(row["host_calls"] == 0 and row["compile_ratio"] > 0 for row in rows.values())
    assert "Meta-Lion, bfloat16" in capsys.readouterr().out


def test_memory_writes_what_it_prints(tmp_path, capsys):
    found = figures(tmp_path, "memory", "--training", "--optimizer", "lion", "adamw-foreach")
    rows = {(row["framework"], row["name"]): row for row in found["optimizers"]}
    assert list(rows) == [
        ("jax", "adamw"), ("jax", "lion"), ("torch", "adamw"), ("torch", "adamw-foreach"),
    ]  # fmt: skip
    assert rows["jax", "lion"]["state_bytes"]["tinyllama"] == 4 * 1_100_048_384 + 4
    assert "8.0000" in capsys.readouterr().out


def test_resume_writes_what_it_prints(known_workload, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("benchmarks.resume.load", quadratic)
    built = itertools.count(1)
    broken = MeasuredOptimizer("Broken", lambda: optax.sgd(0.1 * next(built)))
    monkeypatch.setitem(measured_jax.OPTIMIZERS, "broken", broken)
    found = figures(
        tmp_path, "resume", "--framework", "jax", "--optimizer", "broken",
        "--steps", "6", "--stop", "2",
    )  # fmt: skip
    differences = {row["label"]: row["first_difference"] for row in found["optimizers"]}
    assert differences == {"AdamW": None, "Broken": "['params']['x']"}
    shown = capsys.readouterr().out
    assert "yes" in shown
    assert "NO" in shown


@pytest.mark.slow  # importing every peer takes a quarter of a minute
def test_a_peer_that_is_not_installed_is_left_out_unless_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    options = argparse.Namespace(framework=["torch"], optimizer=None, ours_alone=False)
    wanted = chosen(options, Console(width=200))["torch"]
    assert "prodigy" not in wanted
    assert {"adamw", "meta3", "adamw-foreach"} <= set(wanted)
    assert "prodigy is left out: Prodigy needs the package prodigyopt" in capsys.readouterr().out
    options.optimizer = ["prodigy"]
    with pytest.raises(ValueError, match="needs the package prodigyopt, which is not installed"):
        chosen(options, QUIET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step-time", "--repeats", "1"], "--repeats must be a whole number of at least 2, got 1"),
        (["step-time", "--optimizer", "sgd"], "--optimizer must be one of adamw, meta3, "),
        (["memory", "--framework", "jax", "--optimizer", "adagc"], "got 'adagc'"),
        (["memory", "--framework", "mxnet"], "invalid choice: 'mxnet'"),
        (["memory", "--data", "missing.txt"], "missing.txt"),
        (["resume", "--steps", "5", "--stop", "5"], "--stop must be below --steps, got 5 and 5"),
        (["resume", "--stop", "0"], "--stop must be a whole number of at least 1, got 0"),
        (["resume", "--workload", "cartpole"], "invalid choice: 'cartpole'"),
    ],
)
def test_bad_arguments_exit_with_a_message(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
