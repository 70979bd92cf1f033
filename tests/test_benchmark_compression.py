"""The engines that train with compressed activations and wires, and their two protocols."""

import json

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks._commands import protocol
from benchmarks._frameworks import room
from benchmarks._runs import Task
from benchmarks._sweep import entry, files

STEPS = 12


def run(framework, optimizer, rate=3e-3):
    task = Task("digits-conv", optimizer, rate, 0, STEPS, (STEPS,), framework=framework)
    engine = getattr(entry(framework, optimizer), "engine", "training")
    (record,) = room(framework, engine, framework).train([task])
    return record


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_in_few_bits_train_nearly_as_exact_ones(bits):
    exact, coded = (run("torch", name) for name in ("meta3", f"meta3-activations{bits}"))
    assert coded.finite
    assert coded.skipped == 0
    assert coded.losses[0] == exact.losses[0]  # the forward pass is untouched
    assert coded.losses[1:] != exact.losses[1:]
    np.testing.assert_allclose(coded.losses, exact.losses, rtol=0.1)


@pytest.mark.parametrize(
    "name",
    [
        "meta3-wire8",
        pytest.param("meta3-wire4", marks=pytest.mark.slow),
        pytest.param("meta3-wire8-feedback", marks=pytest.mark.slow),
        pytest.param("meta3-wire4-feedback", marks=pytest.mark.slow),
    ],
)
def test_workers_on_a_wire_train_nearly_as_one(name):
    exact, coded = run("jax", "meta3"), run("jax", name)
    assert coded.finite
    assert coded.skipped == 0
    np.testing.assert_allclose(coded.losses[0], exact.losses[0], rtol=1e-5)
    assert coded.losses[1:] != exact.losses[1:]
    np.testing.assert_allclose(coded.losses, exact.losses, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lion-vote", "meta_lion-vote"])
def test_voters_learn(name):
    record = run("jax", name, 3e-4)
    assert record.finite
    assert record.held_out[-1] < record.start


def test_a_run_depends_on_the_engine_that_trains_it():
    names = {path.name for path in files("jax", "meta3-wire8", "digits-conv")}
    assert {"wires.py", "wired_optimizers.py"} <= names
    names = {path.name for path in files("torch", "meta3-activations8", "digits-conv")}
    assert "activations.py" in names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"),
    [("activations", "meta3-activations8"), ("wires", "meta3-wire8")],
)
def test_the_protocols_write_their_figures(name, variant, tmp_path, capsys):
    few = ["--workers", "0", "--seeds", "1", "--steps", "4", "--rate", "3e-3"]
    few += ["--workload", "digits-conv", "--optimizer", variant, "--output", str(tmp_path)]
    main([name, *few])
    result = json.loads(next(tmp_path.glob(f"{name}-*.json")).read_text())
    rows = protocol(name).rows(result).rows
    assert len(rows) == 2
    assert result["part"].endswith("-meta3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["activations", "--framework", "jax"], "--framework must be torch"),
        (["wires", "--framework", "torch"], "--framework must be jax"),
    ],
)
def test_the_other_framework_is_refused(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*argv, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err
