"""The PyTorch examples run, and the demo's model is the one the JAX demo trains."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
STEPS = 20

SPEECH = "FIRST CITIZEN:\nBefore we proceed any further, hear me speak.\n\nALL:\nSpeak, speak.\n\n"


def run(script, *arguments):
    """Runs an example as a user does, on one thread: the models are tiny."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        "PYTHONPATH": path,
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
        cwd=ROOT,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


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

    def __init__(self, text_file, output):
        self.output = output
        self.shown = run(
            "shakespeare_torch.py",
            *("--data", text_file, "--output", output, "--seed", 3),
            *("--steps", STEPS, "--batch-size", 2),
        )
        self.results = json.loads((output / "results.json").read_text())
        self.runs = {row["optimizer"]: row for row in self.results["runs"]}

    def telemetry(self, optimizer):
        lines = (self.output / f"telemetry-{optimizer}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def demo(text_file, tmp_path_factory):
    return Demo(text_file, tmp_path_factory.mktemp("demo"))


def test_the_demo_trains_adamw_self_driving_and_meta3_and_shows_them(demo):
    assert list(demo.runs) == ["adamw", "self_driving", "meta3"]
    for label, row in zip(("AdamW", "Self-driving", "Meta3"), demo.runs.values(), strict=True):
        line = next(line for line in demo.shown.splitlines() if f"│ {label} " in line)
        assert f"{row['validation_loss']:.4f}" in line
    assert "Written by the model that" in demo.shown
    assert (demo.output / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("optimizer", "bytes_"), [("adamw", 8), ("self_driving", 12), ("meta3", 8)]
)
def test_state_is_the_moments_and_less_than_a_kilobyte(demo, optimizer, bytes_):
    parameters = demo.results["settings"]["parameters"]
    reported = demo.runs[optimizer]["state_bytes_per_parameter"]
    assert bytes_ * parameters < reported * parameters < bytes_ * parameters + 1024


def test_telemetry_is_one_line_a_step_and_the_loss_reaches_the_controller(demo):
    lines = demo.telemetry("meta3")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["curvature"] != 0
    assert demo.runs["meta3"]["skipped_steps"] == 0


def test_every_optimizer_starts_from_the_same_weights_and_batch(demo):
    first = [demo.telemetry(name)[0]["loss"] for name in ("self_driving", "meta3")]
    assert first[0] == first[1]


def test_validation_ends_after_the_last_step(demo):
    for row in demo.runs.values():
        assert row["validation"][-1] == [STEPS, row["validation_loss"]]


def test_the_model_computes_what_the_jax_model_does(module):
    nnx = pytest.importorskip("flax.nnx")
    import jax.numpy as jnp

    shape = {"layers": 2, "heads": 2, "width": 16, "context": 8}
    theirs = module("_gpt").GPT(module("_demo").GPTConfig(**shape), 11, rngs=nnx.Rngs(0))
    ours = module("_gpt_torch").GPT(module("_demo").GPTConfig(**shape), 11)
    flat = {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.state(theirs, nnx.Param).flat_state()
    }
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    state = {}
    for name, value in flat.items():
        stem, kind = name.rsplit(".", 1)
        state[f"{stem}.{names[kind]}"] = torch.tensor(value.T if kind == "kernel" else value)
    ours.load_state_dict(state)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 8))
    expected = np.asarray(theirs(jnp.asarray(tokens)))
    logits = ours(torch.tensor(tokens)).detach().numpy()
    # Sums of at most 64 terms, in two layers of three matrices each, in another order.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=scale * 64 * 2.0**-23)


@pytest.mark.parametrize("size", ["small", "paper", "10m"])
def test_models_have_the_size_they_are_named_for(module, size):
    with torch.device("meta"):
        model = module("_gpt_torch").GPT(module("_demo").MODELS[size].config, 65)
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e6, 1) == {"small": 0.1, "paper": 0.8, "10m": 10.7}[size]


def test_the_chunks_of_a_run_are_the_batches_of_one_generator(module):
    demo, data = module("_demo"), module("_data")
    corpus, config = data.encode("speech", SPEECH * 20), demo.GPTConfig(1, 1, 4, 16)
    parts = list(demo.chunks(corpus, config, steps=25, batch=3, seed=5))
    assert [(taken, len(windows)) for taken, windows, _ in parts] == [(10, 10), (20, 10), (25, 5)]
    assert parts[-1][2]
    rng = np.random.default_rng(5)
    for _, windows, _ in parts:
        expected = data.batches(corpus.train, 3, 16, len(windows), rng)
        np.testing.assert_array_equal(windows, expected)


def test_bytes_stand_for_any_text(module):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    tokenizer = module("_causal_lm").ByteTokenizer()
    text = "Être ou ne pas être"
    assert tokenizer.decode([*tokenizer.encode(text), 31999]) == text


def test_windows_do_not_overlap(module):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    windows = module("_causal_lm").Windows(torch.arange(23), 5)
    assert len(windows) == 4
    rows = torch.stack([windows[index]["input_ids"] for index in range(4)])
    assert torch.equal(rows.flatten(), torch.arange(20))


def test_tinyllama_has_the_shape_of_its_name(module):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(module("_causal_lm").TINYLLAMA)
    assert sum(p.numel() for p in model.parameters()) == 1_100_048_384


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--lora", 2, "--lion")])
def test_hf_finetune_learns_resumes_and_writes(text_file, tmp_path, options):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    arguments = (
        *("--data", text_file, "--output", tmp_path, "--context", 32, "--steps", 6),
        *("--batch-size", 2, "--learning-rate", 2e-3, *options),
    )
    shown = run("hf_finetune.py", *arguments)
    before, after = shown.split("validation loss ")[1].split("\n")[0].split(" -> ")
    assert float(after) < float(before)
    assert list(tmp_path.glob("*.safetensors"))
    if not options:
        assert "validation loss" in run("hf_finetune.py", *arguments, "--resume")


def test_an_unknown_model_ends_with_a_message(module, text_file, tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    with pytest.raises(SystemExit) as stop:
        module("hf_finetune").main(["--model", str(tmp_path), "--data", str(text_file)])
    assert stop.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_tinyllama_runs_in_its_small_shape_without_a_gpu(module, text_file, tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    shown = run(
        "tinyllama_4gb.py",
        *("--tiny", "--data", text_file, "--output", tmp_path, "--context", 32, "--steps", 3),
    )
    assert "step    3  loss" in shown
    assert list(tmp_path.glob("adapter_model.safetensors"))
    with pytest.raises(SystemExit):
        module("tinyllama_4gb").main(["--random-init"])
    assert "add --tiny" in capsys.readouterr().err
