"""Every benchmark that trains writes its figures, and the report shows them."""

import json
import math
import shutil

import pytest

from benchmark_quadratic import known_workload  # noqa: F401
from benchmarks import _kept_rows, report
from benchmarks.__main__ import main
from benchmarks._commands import MODULES, protocol
from benchmarks._kept_rows import onto
from benchmarks._standings import cells
from benchmarks._statistics import mean, paired, sensitivity
from benchmarks.stability_stress import recovery
from relatives import relatives


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
    assert rows.headers[2:] == ["worst seed", "worse by, at the same rate"]
    assert rows.rows[0][0] == "Self-driving"
    # Seed 1 starts at twice the distance of seed 0.
    losses = result["optimizers"]["self_driving"]["by_seed"]
    assert losses[1] > losses[0]
    assert rows.rows[0][2:] == [f"{losses[1]:.3f}", "+0.000 \u00b1 0.000"]


def test_parts_are_compared_at_one_rate_where_it_is_given(tmp_path, capsys):
    arguments = ["--rate", "0.02", "--optimizer", "meta3-8bit"]
    main(["ablation", "--workers", "0", "--seeds", "2", "--output", str(tmp_path), *arguments])
    result = json.loads(next(tmp_path.glob("ablation-*.json")).read_text())
    assert (result["rates"], result["grid"]) == ([0.02], {})


def test_other_budget_is_a_part_of_its_own(tmp_path, capsys):
    _, result = figures(tmp_path, "defaults")
    assert result["part"] == "quadratic"
    assert result["optimizers"]["adamw"]["rate"] == 1e-3
    few = ["--workers", "0", "--seeds", "1", "--steps", "20", "--optimizer", "adamw"]
    main(["defaults", *few, "--output", str(tmp_path)])
    assert (tmp_path / "defaults-quadratic-20-steps.json").exists()


@pytest.mark.parametrize(
    "name",
    relatives(sorted(ARGUMENTS), ["ablation", "defaults", "rate-sensitivity", "tuned-baselines"]),
)
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


def test_report_takes_a_table_with_rows_of_earlier_commits_and_says_which(tmp_path, capsys):
    path, result = figures(tmp_path)
    other = {**result, "part": "other"}
    other["environment"] = result["environment"] | {"commit": "b" * 40}
    rows = result["optimizers"]
    other["optimizers"] = rows | {"adamw": rows["adamw"] | {"commit": "c" * 40}}
    beside = path.with_name("rate-sensitivity-other.json")
    beside.write_text(json.dumps(other))
    shutil.copy(path.with_suffix(".png"), beside.with_suffix(".png"))
    report.main(["--input", str(tmp_path), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs/evidence.md").read_text()
    assert "AdamW, constant at cccccccccc" in page


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
        (["anytime", "--optimizer", "mxnet:sgd"], "must be NAME, jax:NAME or torch:NAME"),
        (["stability-stress", "--framework", "torch"], "in JAX alone, got torch:self_driving"),
        (["ablation", "--framework", "torch"], "must name the variants"),
        (["paper-table", "--framework", "torch"], "got 'meta_lion-paper'"),
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


def test_rows_that_are_not_measured_anew_are_kept_with_their_commit(tmp_path):
    path, old = figures(tmp_path, versions={}, processor="one")
    earlier = tmp_path / "earlier.json"
    new = {**old, "optimizers": {"adamw": old["optimizers"]["adamw"] | {"best": 0.5}}}
    new["environment"] = old["environment"] | {"commit": "b" * 40}
    earlier.write_text(json.dumps(old))
    merged = onto(new, earlier)
    assert list(merged["optimizers"]) == ["adamw", "meta3"]
    assert merged["optimizers"]["adamw"]["best"] == 0.5
    assert merged["optimizers"]["meta3"] == old["optimizers"]["meta3"] | {"commit": "a" * 40}
    assert merged["grid"] == old["grid"]
    path.write_text(json.dumps(merged))
    report.main(["--input", str(tmp_path), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "evidence.md").read_text()
    assert "commit bbbbbbbbbb; Meta3 at aaaaaaaaaa." in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [7]}, "the same seeds"),
        ({"environment": {"changed": True}}, "figures of a commit"),
        (
            {"environment": {"changed": False, "processor": "other", "versions": {}}},
            "figures of this processor",
        ),
    ],
)
def test_rows_of_something_else_are_not_kept(changes, message, tmp_path):
    new = {
        "protocol": "resume", "seeds": [0], "optimizers": {},
        "environment": {"processor": "one", "versions": {}, "changed": False},
    }  # fmt: skip
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(new | changes))
    with pytest.raises(ValueError, match=message):
        onto(new, earlier)
    with pytest.raises(ValueError, match="a table of optimizers"):
        onto({"protocol": "alignment", "curves": {}}, earlier)


def test_rows_without_names_of_their_own_are_kept_by_framework_and_optimizer(tmp_path):
    def row(framework, name, size):
        return {"framework": framework, "name": name, "label": name, "bytes_on_disk": size}

    environment = {"processor": "one", "versions": {}, "changed": False, "commit": "a" * 40}
    old = {
        "environment": environment,
        "optimizers": [row("jax", "adamw", 1), row("torch", "adamw", 2)],
    }
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(old))
    rows = [row("torch", "adamw", 3), row("torch", "meta3", 4)]
    merged = onto({"environment": environment, "optimizers": rows}, earlier)
    kept = row("jax", "adamw", 1) | {"commit": "a" * 40}
    assert merged["optimizers"] == [kept, *rows]
    assert _kept_rows.earlier(merged) == {"a" * 40: ["adamw"]}


def test_a_kept_row_is_not_paired_with_a_reference_of_now():
    now = {"loss": 1.0, "error": 0.3, "difference": 0.0, "difference_error": 0.0}
    then = {"loss": 2.0, "error": 0.4, "difference": 0.7, "difference_error": 0.1}
    assert cells(then, now) == ("2.000 \u00b1 0.400", "+0.700 \u00b1 0.100")
    kept = then | {"commit": "a" * 40}
    assert cells(kept, now) == ("2.000 \u00b1 0.400", "+1.000 \u00b1 0.500, not paired")
    assert cells(kept, now | {"commit": "a" * 40})[1] == "+0.700 \u00b1 0.100"
