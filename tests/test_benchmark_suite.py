"""The benchmarks' instruments give the known answer where there is one."""

import argparse
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from benchmarks import _comparison, _sweep, alignment, report
from benchmarks.__main__ import MODULES, main, protocol
from benchmarks._jax import training
from benchmarks._jax.optimizers import GUARDED_PEERS, PEERS, RATES, Optimizer
from benchmarks._jax.our_optimizers import (
    ABLATION,
    COMPACT,
    OPTIMIZERS,
    PUBLISHED,
    SCHEDULED,
    SELF_DRIVING,
    VARIED,
)
from benchmarks._protocol import run
from benchmarks._runs import Task
from benchmarks._statistics import mean, paired, sensitivity
from benchmarks._torch.our_optimizers import OPTIMIZERS as TORCH_OPTIMIZERS
from benchmarks.faults import FAULTS
from benchmarks.stability_stress import recovery
from benchmarks.workloads import Workload

QUIET = Console(quiet=True)
STEPS = 40


def quadratic(name="quadratic", data=None):
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


VARIANTS = ABLATION.keys() | VARIED.keys() | PUBLISHED.keys() | COMPACT.keys()
UNGUARDED = PEERS.keys() | SCHEDULED.keys() | {"adamw-clipped"}
EVERY = [
    pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else [])
    for name in sorted(OPTIMIZERS)
]


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_runs_with_a_traced_rate(name):
    record = training.train([task(name, OPTIMIZERS[name].rates()[3])])[0]
    assert record.finite
    assert record.held_out[-1] < record.start
    assert record.skipped == (None if name in UNGUARDED else 0)


def test_schedule_ends_at_zero():
    from benchmarks._jax.optimizers import warm_up_cosine, warm_up_stable_decay

    for schedule in (warm_up_cosine(1.0, 100), warm_up_stable_decay(1.0, 100)):
        values = [float(schedule(step)) for step in range(101)]
        assert values[0] == 0.0
        assert max(values) == pytest.approx(1.0)
        assert values[100] == pytest.approx(0.0, abs=1e-6)


def test_sensitivity_equals_the_hand_computed_figure():
    # Counted: 3 (capped at the start), 1, 2, 3 (no number). Above the best: 2, 0, 1, 2.
    losses = {1e-3: 5.0, 1e-2: 1.0, 1e-1: 2.0, 1.0: math.nan}
    found = sensitivity(losses, start=3.0)
    assert found.best == 1.0
    assert found.best_rate == 1e-2
    assert found.sensitivity == (2 + 0 + 1 + 2) / 4
    assert not found.at_edge
    assert sensitivity({1.0: 1.0, 2.0: 2.0}, start=3.0).at_edge


def test_mean_and_its_error_equal_the_hand_computed_figures():
    found = mean([1.0, 3.0])
    assert (found.mean, found.error, found.count) == (2.0, 1.0, 2)
    assert math.isnan(mean([1.0]).error)


def test_paired_difference_leaves_out_what_the_seed_does_to_both():
    found = paired({0: 10.5, 1: 0.5}, {0: 10.0, 1: 0.0})
    assert (found.mean, found.error) == (0.5, 0.0)
    with pytest.raises(ValueError, match="same seeds"):
        paired({0: 1.0}, {1: 1.0})


def test_every_grid_spans_the_same_decades():
    for name, optimizer in OPTIMIZERS.items():
        if name in SELF_DRIVING or name in VARIED:
            assert (optimizer.rates()[0], optimizer.rates()[-1]) == (1e-6, 10.0)
            continue
        grid = optimizer.rates()
        assert len(grid) == len(RATES)
        assert grid[-1] / grid[0] == pytest.approx(RATES[-1] / RATES[0], rel=1e-4)


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


def test_source_of_a_peer_does_not_depend_on_ours_and_that_of_ours_does():
    ours, theirs = OPTIMIZERS["meta3"].sources, OPTIMIZERS["adamw"].sources
    assert "cruxy_optax/**/*.py" in ours
    assert not any(pattern.startswith("cruxy") for pattern in theirs)


def test_failed_run_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"rate=0\.1.*division by zero"):
        _sweep.sweep(TASKS[:1], tmp_path / "runs.jsonl", workers=0, console=QUIET)


def test_faults_do_what_they_say():
    grads = {"a": jnp.ones(2), "b": jnp.full((2, 2), 2.0)}
    assert FAULTS["times-1000"].gradients(grads)["b"][0, 0] == 2000.0
    huge = FAULTS["huge"].gradients(grads)
    assert float(huge["b"].max()) == pytest.approx(1e30)
    assert jnp.sum(huge["b"] == 2.0) == 3
    assert jnp.isnan(FAULTS["nan"].gradients(grads)["a"]).all()
    assert jnp.isfinite(FAULTS["nan"].gradients(grads)["b"]).all()
    assert jnp.isinf(FAULTS["inf"].gradients(grads)["a"]).all()
    batch = {"x": np.ones(3), "y": np.arange(50)}
    shuffled = FAULTS["labels"].batch(batch)
    assert sorted(shuffled["y"]) == list(range(50))
    assert (shuffled["y"] != batch["y"]).any()
    assert FAULTS["twice-1000"].strikes(10) == (2, 3, 4, 5, 6, 7)


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


def driven(name, losses, params, grads):
    """Parameters of a peer, and those to evaluate at, after a step for every loss and gradient."""
    peer = PEERS[name]
    tx = peer.make(1.0, STEPS)
    params = jax.tree.map(jnp.float32, params)
    state = tx.init(params)
    for loss, grad in zip(losses, grads, strict=True):
        grad = jax.tree.map(jnp.float32, grad)
        updates, state = tx.update(grad, state, params, value=jnp.float32(loss))
        params = optax.apply_updates(params, updates)
    return params, peer.averaged(state, params)


def drawn(steps, seed=0):
    """Losses that fall and rise, a matrix and a vector, and gradients of theirs."""
    rng = np.random.default_rng(seed)
    losses = 2.0 + np.sin(np.arange(steps) / 3.0) * np.linspace(0.1, 1.9, steps)
    shapes = {"w": (3, 2), "b": (4,)}
    params, *grads = [{k: rng.normal(size=n) for k, n in shapes.items()} for _ in range(steps + 1)]
    return losses, params, grads


def adam_moments(grads, b1, b2):
    """The moments after each gradient, not debiased."""
    mu = nu = dict.fromkeys(grads[0], 0.0)
    for grad in grads:
        mu = {k: b1 * mu[k] + (1 - b1) * g for k, g in grad.items()}
        nu = {k: b2 * nu[k] + (1 - b2) * g * g for k, g in grad.items()}
        yield mu, nu


def test_schedule_free_plus_follows_the_equations_of_its_author():
    losses, start, grads = drawn(12)
    x, y, z = dict(start), dict(start), dict(start)
    largest = total = 0.0
    moments = adam_moments(grads, 0.9, 0.95)
    for t, (loss, grad, (mu, nu)) in enumerate(zip(losses, grads, moments, strict=True), 1):
        ahead = 0.9 * sum((grad[k] * (z[k] - x[k])).sum() for k in grad)
        norm = sum(np.abs(g).sum() for g in grad.values()) * math.sqrt(math.pi / 2)
        length = max(0.0, loss + ahead) / norm
        for k in grad:
            if grad[k].ndim == 2:
                z[k] = z[k] - 10.0 * length**2 * y[k]
            unit = mu[k] / (1 - 0.9**t) / (np.sqrt(nu[k] / (1 - 0.95**t)) + 1e-8)
            z[k] = z[k] - length * unit
        largest = max(largest, length)
        total += largest**2
        x = {k: x[k] + largest**2 / total * (z[k] - x[k]) for k in x}
        y = {k: 0.9 * x[k] + 0.1 * z[k] for k in x}
    params, averaged = driven("schedule-free-plus", losses, start, grads)
    for k in x:
        np.testing.assert_allclose(params[k], y[k], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(averaged[k], x[k], rtol=1e-4, atol=1e-5)


def test_emosens_follows_the_formulas_of_its_author():
    losses, start, grads = drawn(60)
    short = long = losses[0]
    noise, signal, ratio = 1.0, 0.02, 1.0
    want, branches = dict(start), set()
    moments = adam_moments(grads, 0.9, 0.995)
    for loss, (mu, nu) in zip(losses, moments, strict=True):
        short, long = 0.3 * loss + 0.7 * short, 0.01 * loss + 0.99 * long
        scalar = math.tanh((long - short) / long)
        trust = math.copysign(1 - abs(scalar), scalar)
        noise = 0.97 * noise + 0.03 * abs(scalar)
        signal = 0.97 * signal + 0.03 * abs(trust)
        now = ((abs(noise - signal) + 0.1) / (abs(scalar - trust) + 0.1)) ** 2
        if now >= ratio and trust >= 0.5:
            branches.add("faster")
            ratio = min(now, 1.05 * ratio)
        elif -0.5 <= trust <= 0.5:
            branches.add("slower")
            ratio = 0.98 * now
        else:
            branches.add("held")
        rate = min(max(1e-4 * ratio, 1e-6), 3e-3)
        for k in want:
            decay = 0.1 if want[k].ndim == 2 else 0.0
            unit = mu[k] / (np.sqrt(nu[k]) + 1e-8)
            want[k] = want[k] - rate * (decay * want[k] + unit)
    assert branches == {"faster", "slower", "held"}
    params, _ = driven("emosens", losses, start, grads)
    for k in want:
        moved = np.abs(want[k] - start[k]).max()
        np.testing.assert_allclose(params[k], want[k], atol=1e-3 * moved)


def test_recovery_is_the_longest_wait():
    clean = (1.0,) * 100
    losses = [1.0] * 100
    losses[11:14] = [3.0] * 3
    losses[51:58] = [3.0] * 7
    assert recovery(tuple(losses), clean, strikes=(10, 50)) == 7
    assert recovery((1.0,) * 10 + (3.0,) * 90, clean, strikes=(9,)) is None


def figures(tmp_path, name="rate-sensitivity", **changes):
    """Runs a small benchmark and changes its figures."""
    main([name, "--workers", "0", "--seeds", "2", "--output", str(tmp_path), *ARGUMENTS[name]])
    path = next(tmp_path.glob(f"{name}-*.json"))
    result = json.loads(path.read_text())
    result["environment"] |= {"changed": False, "commit": "a" * 40} | changes
    path.write_text(json.dumps(result))
    return path, result


ARGUMENTS = {
    "rate-sensitivity": ["--optimizer", "adamw", "meta3"],
    "tuned-baselines": ["--optimizer", "meta3"],
    "anytime": ["--optimizer", "meta3"],
    "defaults": ["--optimizer", "adamw"],
    "ablation": ["--optimizer", "meta3-no-clip"],
    "stability-stress": ["--optimizer", "meta3", "adamw-clipped", "--fault", "nan", "labels"],
    "paper-table": ["--optimizer", "adamw"],
}


def test_self_driving_is_taken_apart_from_one_start(tmp_path, capsys):
    arguments = ["--whole", "self_driving", "--optimizer", "self_driving-no-limit"]
    main(["ablation", "--workers", "0", "--seeds", "2", "--output", str(tmp_path), *arguments])
    result = json.loads(next(tmp_path.glob("ablation-*.json")).read_text())
    assert result["part"] == "quadratic-self_driving"
    assert result["rates"] == [1e-3]
    rows = protocol("ablation").rows(result)
    assert len(rows.headers) == 3
    assert rows.rows[0][0] == "Self-driving"
    assert rows.rows[0][2] == "+0.000 \u00b1 0.000"


def test_parts_are_compared_at_one_rate_where_it_is_given(tmp_path, capsys):
    arguments = ["--rate", "0.02", "--optimizer", "meta3-8bit"]
    main(["ablation", "--workers", "0", "--seeds", "2", "--output", str(tmp_path), *arguments])
    result = json.loads(next(tmp_path.glob("ablation-*.json")).read_text())
    assert (result["rates"], result["grid"]) == ([0.02], {})


def test_defaults_are_known_in_both_frameworks():
    for name, ours in OPTIMIZERS.items():
        theirs = TORCH_OPTIMIZERS.get(name)
        assert theirs is None or theirs.default == ours.default, name
    assert OPTIMIZERS["prodigy"].default == TORCH_OPTIMIZERS["prodigy"].default == 1.0


def test_other_budget_is_a_part_of_its_own(tmp_path, capsys):
    _, result = figures(tmp_path, "defaults")
    assert result["part"] == "quadratic"
    assert result["optimizers"]["adamw"]["rate"] == 1e-3
    few = ["--workers", "0", "--seeds", "1", "--steps", "20", "--optimizer", "adamw"]
    main(["defaults", *few, "--output", str(tmp_path)])
    assert (tmp_path / "defaults-quadratic-20-steps.json").exists()


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_benchmark_writes_figures_plot_and_report(name, tmp_path, capsys):
    _, result = figures(tmp_path, name)
    assert "quadratic" in next(tmp_path.glob("*.png")).name
    assert result["command"].startswith(f"python -m benchmarks {name} --workers 0")
    assert str(tmp_path) not in result["command"]
    assert result["seeds"] == [0, 1]
    report.main(["--input", str(tmp_path), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs/evidence.md").read_text()
    for row in protocol(name).rows(result).rows:
        assert f"| {row[0]} | {row[1]} |" in page
    assert f"$ {result['command']}" in page
    assert list((tmp_path / "docs/evidence").glob(f"{name}-quadratic*.png"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {"changed": True}}, "no commit holds"),
        ({"environment": {"commit": "b" * 40}}, "one commit"),
        ({"grid": {"adamw": [1.0, 2.0]}}, "adamw has the grid"),
    ],
    ids=["uncommitted", "commit", "grid"],
)
def test_report_refuses_figures_that_do_not_belong_together(changes, message, tmp_path, capsys):
    path, result = figures(tmp_path)
    other = {**result, "part": "other"}
    other["environment"] = result["environment"] | changes.get("environment", {})
    other["grid"] = changes.get("grid", result["grid"])
    path.with_name("rate-sensitivity-other.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit) as stopped:
        report.main(["--input", str(tmp_path), "--docs", str(tmp_path / "docs")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_report_without_figures_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main(["--input", str(tmp_path)])
    assert "python -m benchmarks rate-sensitivity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "invalid choice"),
        (["rate-sensitivity", "--optimizer", "nothing"], "must be one of meta3"),
        (["rate-sensitivity", "--steps", "10"], "multiple of 4"),
        (["rate-sensitivity", "--seeds", "0"], "at least 1"),
        (["anytime", "--workers", "-1"], "at least 0"),
    ],
)
def test_bad_arguments_are_refused(argv, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*argv, *(["--output", str(tmp_path)] if len(argv) > 1 else [])])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_benchmark_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"python -m benchmarks {name}" in capsys.readouterr().out


def test_no_name_stands_twice_in_the_registry():
    assert not PEERS.keys() & GUARDED_PEERS.keys()
    labels = [optimizer.label for optimizer in OPTIMIZERS.values()]
    assert len(set(labels)) == len(labels)


def test_over_grid_runs_every_rate_with_every_seed(tmp_path):
    parser = argparse.ArgumentParser()
    _comparison.add_arguments(parser, optimizers=("sgd",))
    options = parser.parse_args(["--seeds", "2", "--workers", "0"])
    options.output = tmp_path
    by_rate = _comparison.Comparison(options, QUIET).over_grid(["sgd"])["sgd"]
    assert tuple(by_rate) == OPTIMIZERS["sgd"].rates()
    assert all(tuple(records) == (0, 1) for records in by_rate.values())
    assert jax.default_backend() == "cpu" or options.workers == 0


def test_sensor_on_a_quadratic_agrees_at_small_rates_and_opposes_at_large_ones():
    curve = alignment._curve(quadratic(), "momentum SGD", 1.0, steps=110)
    shown = dict(zip(curve["rates"], curve["alignments"], strict=True))
    # Small steps follow one straight line; large ones swing from one side to the other.
    assert shown[0.0009] > 0.99
    assert shown[0.9] < 0.3
    assert curve["losses"][0] > curve["losses"][3]
    assert curve["batch"] == 3


def test_nothing_is_trained_before_all_widths_are_known_to_fit(monkeypatch, capsys):
    monkeypatch.setattr(alignment, "_curve", lambda *_: pytest.fail("trained"))
    for arguments in (
        ["--width", "64"],
        ["--width", "64", "66", "--workload", "shakespeare-small"],
    ):
        with pytest.raises(SystemExit):
            run(protocol("alignment"), arguments)
    assert "--width must be a multiple" in capsys.readouterr().err


def test_language_model_is_made_as_wide_as_asked_for():
    widths = [alignment._widened("shakespeare-small", w).settings["width"] for w in (32, 96)]
    assert widths == [32, 96]


def test_sensor_study_writes_its_table_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "load", quadratic)
    run(
        protocol("alignment"),
        ["--workload", "digits-conv", "--share", "1", "--steps", "101", "--output", str(tmp_path)],
    )
    result = json.loads((tmp_path / "alignment-constant-rates.json").read_text())
    rows = protocol("alignment").rows(result).rows
    assert [row[1] for row in rows] == [*alignment.DIRECTIONS]
    assert (tmp_path / "alignment-constant-rates.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "100"], "--steps must be above 100"),
        (["--share", "0"], "--share must be"),
        (["--width", "66"], "--width must be a multiple of the 4 heads"),
        (["--width", "0"], "--width must be a multiple of the 4 heads"),
        (["--width", "64", "--workload", "digits-vit"], "--width is for the language models"),
    ],
)
def test_sensor_study_refuses_what_it_cannot_measure(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(protocol("alignment"), arguments)
    assert message in capsys.readouterr().err
