"""Mean ranks come from figures that are there, and grids can be narrowed."""

import json

import pytest

from benchmark_quadratic import known_workload  # noqa: F401
from benchmarks import report, standings
from benchmarks.__main__ import main


def write(
    folder, part, losses, defaults=None, by_seed=True, benchmark="rate-sensitivity", seeds=(0, 1)
):
    """Figures as the benchmarks leave them, from final losses by optimizer, rate and seed."""
    environment = {"changed": False, "commit": "a" * 40}
    rows = {
        name: {"label": name.upper(), "best_rate": min(by_rate, key=lambda r: sum(by_rate[r]))}
        | ({"by_seed": [*by_rate.values()]} if by_seed else {})
        for name, by_rate in losses.items()
    }
    result = {
        "command": "python -m benchmarks rate-sensitivity",
        "part": part,
        "seeds": [*seeds],
        "environment": environment,
        "grid": {name: [*by_rate] for name, by_rate in losses.items()},
        "optimizers": rows,
    }
    (folder / f"{benchmark}-{part}.json").write_text(json.dumps(result))
    if defaults:
        rows = {name: {"label": name.upper(), "by_seed": own} for name, own in defaults.items()}
        result = {"environment": environment, "optimizers": rows}
        (folder / f"defaults-{part}.json").write_text(json.dumps(result))


def standing(folder, *arguments):
    main(["standings", "--input", str(folder), "--output", str(folder), *arguments])
    return json.loads((folder / "standings-all.json").read_text())


def test_tuned_and_untuned_are_ranked_together_on_every_workload(tmp_path, capsys):
    adamw = {1e-3: [3.0, 3.2], 1e-2: [2.0, 2.2]}
    driving = {1e-3: [2.5, 2.7], 1e-1: [1.0, 1.0]}
    write(tmp_path, "one", {"adamw": adamw, "self_driving": driving}, {"muon": [2.6, 2.7]})
    write(tmp_path, "two", {"adamw": adamw, "self_driving": driving, "lion": adamw})
    result = standing(tmp_path)
    ranks = {name: row["ranks"] for name, row in result["optimizers"].items()}
    # The start of 0.1 is not one that self-driving comes with, and Muon and Lion have one workload.
    assert ranks == {
        "adamw, tuned": [1.0, 1.0],
        "self_driving, nothing tuned": [2.0, 2.0],
        "adamw, nothing tuned": [3.0, 3.0],
    }
    assert result["left_out"] == ["lion, tuned", "muon, nothing tuned"]
    assert result["optimizers"]["adamw, tuned"]["label"] == "ADAMW"
    first = standing(tmp_path, "--workloads", "one")["optimizers"]
    assert first["muon, nothing tuned"]["ranks"] == [3.0]


def test_carry_over_is_ranked_by_itself(tmp_path, capsys):
    rows = {"adamw": {1e-2: [2.0, 2.2]}, "self_driving": {1e-3: [1.0, 1.0]}}
    write(tmp_path, "one", rows, benchmark="carry-over")
    write(tmp_path, "two", {"adamw": {1e-2: [0.0, 0.0]}, "lion": {1e-2: [1.0, 1.0]}})
    result = standing(tmp_path, "--grids", "carry-over")
    ranks = {name: row["rank"] for name, row in result["optimizers"].items()}
    assert ranks == {"adamw, tuned": 2.0, "self_driving, nothing tuned": 1.0}


def test_equal_losses_share_a_rank():
    losses = {"a": 2.0, "b": 1.0, "c": 2.0, "d": 3.0}
    assert standings.ranked(losses) == {"a": 2.5, "b": 1.0, "c": 2.5, "d": 4.0}


def test_error_over_seeds_equals_the_hand_computed_jackknife():
    # Without the last seed of the first workload "a" is first there, else second in the mean.
    tables = {
        "one": {"a": [1.0, 1.0, 9.0], "b": [2.0, 2.0, 2.0]},
        "two": {"a": [1.0, 1.0], "b": [2.0, 2.0]},
    }
    # Mean ranks over both workloads: 3/2, 3/2 and 1, of which the variance is 2/3 of 1/6.
    expected = (2 / 3 * (2 * (1 / 6) ** 2 + (1 / 3) ** 2)) ** 0.5
    assert standings.jackknifed(tables) == pytest.approx({"a": expected, "b": expected})


def test_report_shows_the_ranks(tmp_path, capsys):
    adamw = {1e-3: [3.0], 1e-2: [2.0]}
    source = tmp_path / "source"
    source.mkdir()
    write(source, "one", {"adamw": adamw})
    main(["standings", "--input", str(source), "--output", str(tmp_path)])
    path = tmp_path / "standings-all.json"
    result = json.loads(path.read_text())
    assert result["command"] == "python -m benchmarks standings --input source"
    result["environment"] |= {"changed": False, "commit": "a" * 40}
    path.write_text(json.dumps(result))
    report.main(["--input", str(tmp_path), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs/evidence.md").read_text()
    assert "| ADAMW | tuned | 1.0 \u00b1 0.0 | 0.0 | 1 |" in page


def test_figures_that_are_not_enough_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        standing(tmp_path)
    assert "run python -m benchmarks rate-sensitivity" in capsys.readouterr().err
    write(tmp_path, "one", {"adamw": {1e-3: [1.0], 1e-2: [2.0]}}, by_seed=False)
    with pytest.raises(SystemExit):
        standing(tmp_path)
    assert "by seed, got those of one" in capsys.readouterr().err
    write(tmp_path, "one", {"adamw": {1e-2: [2.0]}})
    with pytest.raises(SystemExit):
        standing(tmp_path)
    assert "at least two optimizers" in capsys.readouterr().err


def test_grid_is_narrowed_to_the_rates_that_are_given(tmp_path, capsys):
    arguments = ["--workers", "0", "--seeds", "1", "--rates", "1e-2", "1e-1"]
    chosen = ["--optimizer", "sgd", "lion", "self_driving-no-average"]
    main(["carry-over", *arguments, *chosen, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "carry-over-quadratic.json").read_text())
    assert result["grid"] == {
        "sgd": [1e-2, 1e-1],
        "lion": [1e-3, 1e-2],
        "self_driving-no-average": [1e-3],
    }
    assert [len(losses) for losses in result["optimizers"]["sgd"]["by_seed"]] == [1, 1]
    with pytest.raises(SystemExit):
        main(["carry-over", "--rates", "0", "--output", str(tmp_path)])
    assert "--rates must be above 0 and finite, got 0" in capsys.readouterr().err


def test_fresh_seeds_take_the_rates_that_carry_over_chose(tmp_path, capsys):
    write(
        tmp_path,
        "quadratic",
        {
            "adamw-cosine": {1e-2: [2.0]},
            "self_driving": {1e-3: [1.0]},
            "sgd": {0.1: [3.0], 1: [9.0]},
        },
        benchmark="carry-over",
        seeds=[3],
    )
    seeds = ["--workers", "0", "--seeds", "2", "--first-seed", "4"]
    arguments = [*seeds, "--input", str(tmp_path), "--output", str(tmp_path)]
    main(["fresh-seeds", *arguments, "--optimizer", "sgd", "self_driving"])
    result = json.loads((tmp_path / "fresh-seeds-quadratic.json").read_text())
    assert result["grid"] == {"adamw-cosine": [1e-2], "sgd": [0.1], "self_driving": [1e-3]}
    assert (result["tuning_seeds"], result["seeds"]) == ([3], [4, 5])
    # Gradient descent multiplies m, which starts at 1 + seed, by 0.9 in each of the 40 steps.
    expected = [0.5 * 4 * ((1.0 + seed) * 0.9**40) ** 2 for seed in (4, 5)]
    assert result["optimizers"]["sgd"]["by_seed"][0] == pytest.approx(expected, rel=1e-4)
    ranks = standing(tmp_path, "--grids", "fresh-seeds")["optimizers"]
    assert sorted(ranks) == ["adamw-cosine, tuned", "self_driving, nothing tuned", "sgd, tuned"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--first-seed", "2"], r"leave out the seeds that chose the rates, got [3] again"),
        (["--optimizer", "lion"], "must hold the best rate of lion"),
        (["--input", "elsewhere"], "must hold carry-over-quadratic.json"),
    ],
)
def test_fresh_seeds_refuse_what_chose_and_what_was_not_tuned(tmp_path, capsys, changed, said):
    rows = {"adamw-cosine": {1e-2: [2.0]}}
    write(tmp_path, "quadratic", rows, benchmark="carry-over", seeds=[3])
    with pytest.raises(SystemExit):
        main(["fresh-seeds", "--input", str(tmp_path), "--output", str(tmp_path), *changed])
    assert said in capsys.readouterr().err
