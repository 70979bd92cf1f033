"""The examples about memory run, and what they print was counted."""

import importlib
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

SMALL = ("--context", 32, "--batch-size", 2, "--steps", 3)

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the main program of an example on a short text and returns what it prints."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    monkeypatch.setenv("COLUMNS", "100")
    speech = "ALL:\nSpeak, speak. Before we proceed any further, hear me speak.\n\n"
    (tmp_path / "play.txt").write_text(speech * 60)

    def run(name, *arguments):
        main = importlib.import_module(name).main
        main([*map(str, arguments), "--data", str(tmp_path / "play.txt")])
        return capsys.readouterr().out

    return run


def figures(shown, name):
    """The estimated and the measured figure of a line."""
    lines = (line for line in shown.splitlines() if "measured" in line)
    words = next(line for line in lines if line.startswith(name)).split()
    return float(words[-5]), float(words[-2])


@cpu_only
@pytest.mark.parametrize("optimizer", ["axiom", "lion"])
def test_all_parameters_are_trained_in_the_small_shape_without_a_gpu(optimizer, run):
    shown = run("full_finetune_4gb", "--optimizer", optimizer, *SMALL)
    assert "step    3  loss" in shown
    parameters, measured = figures(shown, "parameters")
    assert parameters == measured == 1.47
    state, measured = figures(shown, "optimizer state")
    assert state == measured < (0.05 if optimizer == "axiom" else 0.45)
    # The tied embedding's gradient also waits inside autograd, which no hook sees.
    released, measured = figures(shown, "gradients alive together")
    assert 0 < measured <= released < parameters / 5


@cpu_only
def test_the_pretrained_model_asks_for_a_gpu(run, capsys):
    with pytest.raises(SystemExit):
        run("full_finetune_4gb", "--pretrained")
    assert "needs a GPU; leave out --pretrained" in capsys.readouterr().err


def test_the_comparison_trains_every_optimizer_from_the_same_weights(run, tmp_path):
    shown = run("llm_finetune_bench", "--output", tmp_path, "--state-budget", "300KB", *SMALL)
    results = json.loads((tmp_path / "results.json").read_text())
    runs = {row["optimizer"]: row for row in results["runs"]}
    assert list(runs) == [
        *("adamw", "meta3", "self_driving", "meta_lion", "meta_lion_8bit", "meta_lion_4bit"),
        *("axiom", "axiom_momentum", "cosmic"),
    ]
    for row in runs.values():
        assert row["label"] in shown
        assert row["state_bytes"] == row["estimated_state_bytes"]
        assert row["validation_loss"] < results["settings"]["validation_loss_before"]
    each = {name: row["state_bytes_per_parameter"] for name, row in runs.items()}
    assert each["adamw"] == pytest.approx(8.0, abs=1e-3)
    assert each["axiom"] < 0.06 < each["meta_lion_4bit"] < 0.54
    assert each["meta_lion_8bit"] < 1.04
    assert runs["cosmic"]["state_bytes"] <= 300_000


def test_the_comparison_also_releases_gradients(run, tmp_path):
    losses = []
    for name, release in (("kept", ()), ("released", ("--release",))):
        output = tmp_path / name
        run("llm_finetune_bench", "--output", output, "--optimizer", "axiom", *SMALL, *release)
        (row,) = json.loads((output / "results.json").read_text())["runs"]
        losses.append(row["validation_loss"])
    # Only what the controller orders comes a step later: 0.75 of the rate, one step of three.
    assert losses[0] == pytest.approx(losses[1], abs=0.2)
    assert losses[0] != losses[1]
