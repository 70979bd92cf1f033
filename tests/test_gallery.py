"""The short scripts of the gallery train, each in its library, and the page lists every one."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

# A twentieth of the loss of a coin toss: nearly all points that were not trained on are right.
LEARNED = 0.035


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the main program of a script and returns what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


def losses(shown):
    """The losses of the lines about points that were not trained on."""
    return [float(line.split()[-1]) for line in shown.splitlines() if line.startswith("unseen")]


@pytest.mark.parametrize(
    ("script", "library"),
    [("with_flax", "flax"), ("with_equinox", "equinox"), ("with_haiku", "haiku")],
)
def test_modules_of_jax_learn_without_a_rate_and_so_does_their_average(run, script, library):
    pytest.importorskip(library)
    parameters, average = losses(run(script))
    assert max(parameters, average) < LEARNED


def test_a_run_that_orbax_saved_goes_on_bit_for_bit(run, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    step, arrays = run("save_and_resume", "--output", tmp_path / "run").splitlines()
    assert step == "step 200"
    same, every = re.findall(r"\d+", arrays)
    assert same == every
    assert list((tmp_path / "run").iterdir())


def test_a_run_that_torch_saved_goes_on_bit_for_bit(run, one_thread, tmp_path):
    step, tensors = run("save_and_resume_torch", "--output", tmp_path / "run.pt").splitlines()
    assert step == "step 200"
    same, every = re.findall(r"\d+", tensors)
    assert same == every == "8"
    assert (tmp_path / "run.pt").exists()


def test_a_scheduler_moves_the_rate_of_meta3_and_of_self_driving(run, one_thread):
    lines = run("with_scheduler").splitlines()
    assert [line[:5] for line in lines] == ["Meta3", "self-"]
    for line in lines:
        halfway, last, loss = map(float, re.findall(r"\d\.\d+(?:e[-+]\d+)?", line))
        assert last < halfway / 20
        assert loss < LEARNED


def test_accelerate_trains_to_the_end_that_it_was_told(run, one_thread):
    pytest.importorskip("accelerate")
    shown = run("with_accelerate")
    assert shown.startswith("320 steps")
    assert max(losses(shown)) < LEARNED


def test_lightning_tells_the_end_and_validates_the_average(run, one_thread):
    pytest.importorskip("pytorch_lightning")
    shown = run("with_lightning")
    assert "told by Lightning: 320 steps" in shown
    assert max(losses(shown)) < LEARNED


def test_the_trainer_of_hugging_face_learns_without_a_rate(run, one_thread, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    shown = run("with_hf_trainer", "--output", tmp_path)
    before, after = map(float, shown.split("held-out loss ")[1].splitlines()[0].split(" -> "))
    assert after < before / 2
    assert list(tmp_path.glob("*.safetensors"))


def test_the_memory_of_seven_billion_parameters_is_counted_and_a_way_that_fits_is_named(run):
    pytest.importorskip("transformers")
    shown = run("memory_of_7b", "--device", "24GB")
    assert shown.startswith("6,738,415,616 parameters")
    ways = dict(re.findall(r"^(\S.*?) +([\d.]+) GB$", shown, re.M))
    named = shown.splitlines()[-1].split(":")[0]
    assert float(next(size for way, size in ways.items() if way.startswith(named))) < 24


def test_roles_become_groups(run):
    pytest.importorskip("transformers")
    table, groups = run("roles").split("\n\n")
    assert "attention.q" in table
    rates = {line.split()[0]: float(line.split()[4]) for line in groups.splitlines()}
    assert rates["norm"] == 3e-3
    assert rates["attention.q"] == 1e-3


def test_the_gallery_lists_every_script():
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    scripts = {path.name for path in EXAMPLES.glob("[!_]*.py")}
    assert scripts == set(re.findall(r"\w+\.py", page))
