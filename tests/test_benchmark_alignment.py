"""The study of the sensor finds what is known, and refuses what it cannot measure."""

import json

import pytest

from benchmark_quadratic import quadratic
from benchmarks import alignment
from benchmarks._commands import protocol
from benchmarks._jax import alignment as engine
from benchmarks._protocol import run


def test_sensor_on_a_quadratic_agrees_at_small_rates_and_opposes_at_large_ones():
    curve = engine.curve(quadratic(), "momentum SGD", 1.0, steps=110, watched=100)
    shown = dict(zip(curve["rates"], curve["alignments"], strict=True))
    # Small steps follow one straight line; large ones swing from one side to the other.
    assert shown[0.0009] > 0.99
    assert shown[0.9] < 0.3
    assert curve["losses"][0] > curve["losses"][3]
    assert curve["batch"] == 3


def test_nothing_is_trained_before_all_widths_are_known_to_fit(monkeypatch, capsys):
    monkeypatch.setattr(engine, "curve", lambda *_: pytest.fail("trained"))
    for arguments in (
        ["--width", "64"],
        ["--width", "64", "66", "--workload", "shakespeare-small"],
    ):
        with pytest.raises(SystemExit):
            run(protocol("alignment"), arguments)
    assert "--width must be a multiple" in capsys.readouterr().err


def test_language_model_is_made_as_wide_as_asked_for():
    widths = [engine.widened("shakespeare-small", w).settings["width"] for w in (32, 96)]
    assert widths == [32, 96]


def test_sensor_study_writes_its_table_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "load", quadratic)
    run(
        protocol("alignment"),
        ["--workload", "digits-conv", "--share", "1", "--steps", "101", "--output", str(tmp_path)],
    )
    result = json.loads((tmp_path / "alignment-constant-rates.json").read_text())
    rows = protocol("alignment").rows(result).rows
    assert [row[1] for row in rows] == [*alignment.DIRECTIONS] == [*engine.DIRECTIONS]
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
