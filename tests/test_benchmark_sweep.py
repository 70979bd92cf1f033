"""Finished runs are kept, used again, and run anew once what they depend on has changed."""

import argparse
import inspect
import shutil

import jax
import pytest

from benchmark_quadratic import QUIET, known_workload, task  # noqa: F401
from benchmarks import _comparison, _finished, _sweep
from benchmarks._jax import our_optimizers as jax_optimizers
from benchmarks._jax import training
from benchmarks._jax.entries import SOURCES
from benchmarks._jax.our_optimizers import OPTIMIZERS
from benchmarks._torch import our_optimizers as torch_optimizers
from benchmarks.workloads import ALONE, NAMES
from cruxy_control.formulas.averaging import averaging_weight
from cruxy_optax import average_iterates

TASKS = [task(rate=rate, seed=seed) for rate in (0.1, 0.2) for seed in (0, 1)]


def outcome(runs):
    """What has to be the same; seconds need not."""
    return {key: value._replace(seconds=0.0) for key, value in runs.items()}


def test_sweep_that_was_interrupted_equals_one_that_was_not(tmp_path):
    whole = _sweep.sweep(TASKS, tmp_path / "whole.jsonl", workers=0, console=QUIET)
    cut = tmp_path / "cut.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    # Two finished runs and the line that a crash cut short.
    cut.write_text("\n".join([*lines[:2], lines[2][:50]]) + "\n")
    resumed = _sweep.sweep(TASKS, cut, workers=0, console=QUIET)
    assert outcome(resumed) == outcome(whole)
    assert outcome(_sweep.finished(cut)) == outcome(whole)


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    store = tmp_path / "runs.jsonl"
    first = _sweep.sweep(TASKS, store, workers=0, console=QUIET)
    monkeypatch.setattr(_sweep, "_train", lambda tasks: pytest.fail("run again"))
    assert _sweep.sweep(TASKS, store, workers=0, console=QUIET) == first


def test_runs_of_other_code_are_run_again(tmp_path, monkeypatch):
    store = tmp_path / "runs.jsonl"
    _sweep.sweep(TASKS, store, workers=0, console=QUIET)
    monkeypatch.setattr(_sweep, "source", lambda *_: "another")
    assert _sweep.finished(store) == {}


def test_failed_run_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"rate=0\.1.*division by zero"):
        _sweep.sweep(TASKS[:1], tmp_path / "runs.jsonl", workers=0, console=QUIET)


def test_over_grid_runs_every_rate_with_every_seed(tmp_path):
    parser = argparse.ArgumentParser()
    _comparison.add_arguments(parser, optimizers=("sgd",))
    options = parser.parse_args(["--seeds", "2", "--workers", "0"])
    options.output = tmp_path
    by_rate = _comparison.Comparison(options, QUIET).over_grid(["sgd"])["sgd"]
    assert tuple(by_rate) == OPTIMIZERS["sgd"].rates()
    assert all(tuple(records) == (0, 1) for records in by_rate.values())
    assert jax.default_backend() == "cpu" or options.workers == 0


FRAMEWORKS = {"jax": jax_optimizers, "torch": torch_optimizers}

OURS = {
    "jax": [name for name, entry in OPTIMIZERS.items() if entry.sources == SOURCES],
    "torch": [*torch_optimizers.OURS],
}

PACKAGES = {
    "jax": ("cruxy_control", "cruxy_exact", "cruxy_optax"),
    "torch": ("cruxy_control", "cruxy_exact", "cruxy_torch"),
}
"""What our optimizers are made of."""


def test_source_of_a_peer_does_not_depend_on_ours():
    for framework in FRAMEWORKS:
        files = _sweep.files(framework, "adamw", "digits-conv")
        assert {path.relative_to(_finished.ROOT).parts[0] for path in files} == {"benchmarks"}


def test_source_of_a_peer_that_averages_as_ours_depends_on_that():
    files = {str(path) for path in _sweep.files("jax", "dog", "digits-conv")}
    assert {inspect.getsourcefile(f) for f in (average_iterates, averaging_weight)} <= files


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_source_of_each_of_ours_depends_on_the_same_packages(framework):
    assert len(OURS[framework]) > 10
    files = {tuple(_sweep.files(framework, name, "digits-conv")) for name in OURS[framework]}
    assert len(files) == 1


@pytest.mark.parametrize(
    ("framework", "package"),
    [(framework, package) for framework, several in PACKAGES.items() for package in several],
)
def test_change_in_any_room_of_a_package_changes_the_source(
    framework, package, tmp_path, monkeypatch
):
    unread = shutil.ignore_patterns("__pycache__", "py.typed", "published.json")
    for folder in ("benchmarks", *PACKAGES[framework]):
        shutil.copytree(_finished.ROOT / folder, tmp_path / folder, ignore=unread)
    monkeypatch.setattr(_finished, "ROOT", tmp_path)

    def source():
        return _sweep.source.__wrapped__(framework, "meta3", "digits-conv")

    before, unseen = source(), []
    for path in (path for path in (tmp_path / package).rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        if source() == before:
            unseen.append(path.relative_to(tmp_path))
        path.write_bytes(content)
    assert unseen == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_source_names_files_that_are_there(framework):
    workloads = [name for name in NAMES if framework == "jax" or name not in ALONE]
    for name in FRAMEWORKS[framework].OPTIMIZERS:
        assert _sweep.files(framework, name, workloads[0])
    for workload in workloads:
        assert _sweep.files(framework, "adamw", workload)


def test_source_that_has_moved_is_an_error(monkeypatch):
    moved = OPTIMIZERS["adamw"]._replace(sources=("cruxy_optax/gone.py",))
    monkeypatch.setitem(OPTIMIZERS, "adamw", moved)
    with pytest.raises(FileNotFoundError, match=r"'cruxy_optax/gone.py', which names none"):
        _sweep.files("jax", "adamw", "digits-conv")


def test_framework_compares_those_of_the_usual_optimizers_that_it_has():
    parser = argparse.ArgumentParser()
    _comparison.add_arguments(parser, optimizers=("meta3", "muon", "adamw"))
    options = parser.parse_args(["--framework", "torch"])
    assert _comparison.Comparison(options, QUIET).optimizers == ["torch:meta3", "torch:adamw"]
    options = parser.parse_args(["--framework", "torch", "--optimizer", "jax:muon", "adamw"])
    assert _comparison.Comparison(options, QUIET).optimizers == ["muon", "torch:adamw"]
