"""`Trainer`: what it reports is true, what it saves is enough, what is wrong is named."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import torch_trainer_run as runs  # noqa: E402
from cruxy_torch import AXIOM, AXIOM_Trainer, CruxyOptimizer, Trainer, state_bytes  # noqa: E402
from cruxy_torch.training import checkpoint  # noqa: E402
from cruxy_torch.training.evaluation import averages  # noqa: E402
from cruxy_torch.training.losses import Loss  # noqa: E402

SEED_KEYS = (
    "train_losses", "initial_train_loss", "final_train_loss", "train_improvement_pct",
    "val_losses", "val_ppls", "initial_val_ppl", "final_val_ppl", "val_improvement_pct",
    "peak_vram_gb", "tokens_per_sec", "total_time_min",
    "compression_total",
)  # fmt: skip
"""As the seed lists them."""


pytestmark = pytest.mark.usefixtures("one_thread")


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def killed(folder, name, workers, persistent, kill_at):
    """Runs in a process that kills itself."""
    process = subprocess.run(
        [
            *(sys.executable, str(Path(runs.__file__)), str(folder), name),
            *(str(workers), str(persistent), str(kill_at)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -9, process.stderr


@pytest.mark.parametrize(
    ("name", "workers", "persistent"),
    [
        ("released", 2, False),
        pytest.param("released", 0, False, marks=pytest.mark.slow),
        pytest.param("self_driving", 2, False, marks=pytest.mark.slow),
        pytest.param("torch", 2, False, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path, name, workers, persistent):
    """Seven batches an epoch: killed in the second, resumed in the middle of it."""
    whole = runs.trainer(tmp_path / "whole", name, workers, persistent)
    expected = whole.fit(runs.STEPS)
    (tmp_path / "killed").mkdir()
    killed(tmp_path / "killed", name, workers, persistent, kill_at=13)
    assert sorted(p.name for p in (tmp_path / "killed").glob("*.pt")) == ["run-10.pt", "run-5.pt"]
    again = runs.trainer(tmp_path / "killed", name, workers, persistent)
    seed(99)  # what is drawn before is of no account
    results = again.fit(runs.STEPS, resume="latest")
    assert_same(bits(whole.model), bits(again.model))
    assert results["train_losses"] == expected["train_losses"]
    assert results["val_losses"] == expected["val_losses"]
    assert_same(averages_of(whole), averages_of(again))


def averages_of(trainer):
    """The averages of the parameters; themselves where there are none."""
    with averages(trainer.optimizer):
        return bits(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 10, 15])
def test_a_generator_of_the_loaders_own_is_brought_back(tmp_path, stop):
    whole = runs.trainer(tmp_path / "a", "torch", 2, own_generator=True)
    whole.fit(runs.STEPS)
    runs.trainer(tmp_path / "b", "torch", 2, own_generator=True).fit(stop)
    again = runs.trainer(tmp_path / "b", "torch", 2, own_generator=True)
    again.fit(runs.STEPS, resume=tmp_path / "b" / f"run-{stop}.pt")
    assert_same(bits(whole.model), bits(again.model))


class Still(torch.utils.data.Dataset):
    """Points without noise, which workers that are kept cannot repeat."""

    def __len__(self):
        return 13

    def __getitem__(self, index):
        x = torch.sin(torch.arange(3.0) * (index + 1))
        return x, x.sum().reshape(1)


def still(folder, **options):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    loader = torch.utils.data.DataLoader(Still(), batch_size=4, shuffle=True, **options)
    return Trainer(
        net,
        loader,
        None,
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        nn.MSELoss(),
        checkpoint_interval=3,
        checkpoint_dir=folder,
        results_prefix=folder / "run",
        save_results=False,
        progress=False,
    )


@pytest.mark.parametrize("stop", [3, 6])
def test_workers_that_are_kept_get_the_same_order(tmp_path, stop):
    options = {"num_workers": 1, "persistent_workers": True}
    whole = still(tmp_path / "a", **options)
    whole.fit(10)
    still(tmp_path / "b", **options).fit(stop)
    again = still(tmp_path / "b", **options)
    again.fit(10, resume="latest")
    assert_same(bits(whole.model), bits(again.model))


class Stateful:
    """A loader that says itself where it is, as torchdata's does, and draws no seed when asked."""

    def __init__(self):
        self.place, self.asked = 0, 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.asked, self.place = self.asked + 1, state["place"]

    def __iter__(self):
        while self.place < 5:
            self.place += 1
            x = torch.full((2, 3), float(self.place))
            yield x, x.sum(1, keepdim=True)
        self.place = 0


def test_a_loader_with_a_state_is_asked_for_it(tmp_path):
    def made():
        torch.manual_seed(0)
        return Trainer(
            nn.Linear(3, 1),
            Stateful(),
            None,
            lambda params: torch.optim.SGD(params, lr=1e-3),
            nn.MSELoss(),
            checkpoint_interval=7,
            checkpoint_dir=tmp_path,
            results_prefix=tmp_path / "run",
            save_results=False,
            progress=False,
        )

    whole = made()
    whole.fit(12)
    again = made()
    again.fit(12, resume=tmp_path / "run-7.pt")
    assert again.train_loader.asked == 1
    assert_same(bits(whole.model), bits(again.model))


def test_other_data_than_in_the_saved_run_is_noticed(tmp_path):
    still(tmp_path).fit(3)
    again = still(tmp_path)
    again.train_loader.dataset.__class__ = type(
        "Other", (Still,), {"__getitem__": lambda self, i: (torch.ones(3), torch.ones(1))}
    )
    with pytest.warns(UserWarning, match="train_loader gives other batches"):
        again.fit(4, resume="latest")


class Tiny(nn.Module):
    """A language model by the interface of transformers: tokens and labels in, a loss out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(11, 32), nn.Linear(32, 11)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.out(self.embed(input_ids))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Output", (), {"loss": loss, "logits": logits})()


def padded_rows():
    """Token rows of different lengths, as lists: what the seed's script collates."""
    rng = np.random.default_rng(0)
    rows = []
    for length in (9, 4, 7, 2, 8, 3):
        ids = rng.integers(1, 11, length).tolist()
        pad = 9 - length
        rows.append(
            {
                "text": "dropped",
                "input_ids": ids + [0] * pad,
                "attention_mask": [1] * length + [0] * pad,
            }
        )
    return rows


def language_trainer(folder, **options):
    loader = torch.utils.data.DataLoader(padded_rows(), batch_size=4)
    return AXIOM_Trainer(
        Tiny(),
        loader,
        loader,
        lr=1e-2,
        eval_interval=4,
        checkpoint_interval=0,
        checkpoint_dir=folder,
        results_prefix=str(folder / "run"),
        progress=False,
        **options,
    )


def reference_loss(model):
    """The mean over all tokens that count, in NumPy's float64."""
    total, count = 0.0, 0
    embed = model.embed.weight.detach().numpy().astype(np.float64)
    weight = model.out.weight.detach().numpy().astype(np.float64)
    bias = model.out.bias.detach().numpy().astype(np.float64)
    for row in padded_rows():
        logits = embed[row["input_ids"]] @ weight.T + bias
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in range(1, 9):
            if row["attention_mask"][place]:
                total -= logits[place - 1, row["input_ids"][place]]
                count += 1
    return total / count


def test_the_results_are_the_seeds_and_each_is_what_it_says(tmp_path):
    trainer = language_trainer(tmp_path)
    before = reference_loss(trainer.model)
    results = trainer.fit(steps=10)
    assert tuple(results)[: len(SEED_KEYS)] == SEED_KEYS
    after = reference_loss(trainer.model)
    assert results["val_losses"][0] == pytest.approx(before, rel=1e-6)
    assert results["val_losses"][-1] == pytest.approx(after, rel=1e-6)
    assert results["val_steps"] == [0, 4, 8, 10]
    assert results["val_ppls"] == pytest.approx([math.exp(v) for v in results["val_losses"]])
    assert results["initial_val_ppl"] == pytest.approx(math.exp(before), rel=1e-6)
    assert results["final_val_ppl"] == pytest.approx(math.exp(after), rel=1e-6)
    better = 100 * (1 - math.exp(after) / math.exp(before))
    assert results["val_improvement_pct"] == pytest.approx(better, rel=1e-4)
    losses = results["train_losses"]
    assert len(losses) == results["steps"] == 10
    assert (results["initial_train_loss"], results["final_train_loss"]) == (losses[0], losses[-1])
    assert results["train_improvement_pct"] == pytest.approx(100 * (1 - losses[-1] / losses[0]))
    assert (results["peak_vram_gb"], results["skipped_total"]) == (None, 0)
    assert 0 < results["peak_rss_gb"] < 100
    seconds = 60 * results["total_time_min"]
    tokens = 5 * (4 * 9) + 5 * (2 * 9)  # ten steps are five times both batches, padding included
    assert results["tokens_per_sec"] == pytest.approx(tokens / seconds)
    count = sum(p.numel() for p in trainer.model.parameters())
    largest = max(p.nbytes for p in trainer.model.parameters())
    held = largest + state_bytes(trainer.optimizer)
    assert results["compression_total"] == pytest.approx(12 * count / held)
    assert results["telemetry"]["step"] == 10


def test_results_are_written_as_json_and_as_a_picture_of_both_curves(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    results = language_trainer(tmp_path).fit(steps=6)
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved["train_losses"] == results["train_losses"]
    assert saved["val_ppls"] == results["val_ppls"]
    pixels = (image.imread(tmp_path / "run.png")[..., :3] * 255).round().astype(int)
    for color in ((31, 119, 180), (255, 127, 14)):  # of the first and the second curve
        assert (np.abs(pixels - color).max(-1) <= 2).sum() > 100


def test_without_matplotlib_the_json_is_written_and_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = language_trainer(tmp_path)
    with pytest.warns(UserWarning, match="no picture is drawn"):
        trainer.fit(steps=1)
    assert (tmp_path / "run.json").exists()
    assert not (tmp_path / "run.png").exists()


def test_a_loss_that_is_no_number_is_null_in_the_json(tmp_path):
    trainer = still(tmp_path)
    trainer._save_results = True
    trainer._loss = lambda model, batch: torch.full((), math.nan, requires_grad=True)
    trainer._loss.tokens = lambda batch: None
    trainer._loss.counts_tokens = False
    trainer.fit(1)
    assert json.loads((tmp_path / "run.json").read_text())["train_losses"] == [None]


def hooks_of(model):
    return [p for p in model.parameters() if p._post_accumulate_grad_hooks]


def test_cleanup_leaves_no_hook_and_so_does_the_end_of_a_block(tmp_path):
    trainer = language_trainer(tmp_path)
    assert len(hooks_of(trainer.model)) == 3
    trainer.fit(2)
    trainer.cleanup()
    assert hooks_of(trainer.model) == []
    with language_trainer(tmp_path) as trainer:
        assert hooks_of(trainer.model)
    assert hooks_of(trainer.model) == []


def test_evaluation_leaves_the_run_as_it_is(tmp_path):
    plain, evaluated = (runs.trainer(tmp_path / n, "released", 0) for n in "ab")
    plain.model[2].eval()  # a part that the user keeps still
    evaluated.model[2].eval()
    seed(2)
    plain._step(), plain._step()
    seed(2)
    evaluated._step()
    modes = [m.training for m in evaluated.model.modules()]
    first, _ = evaluated.evaluate(max_batches=1)
    assert [m.training for m in evaluated.model.modules()] == modes
    evaluated._step()
    assert_same(bits(plain.model), bits(evaluated.model))
    assert math.isfinite(first)


def test_the_average_is_evaluated_and_saved_and_the_run_goes_on_from_the_weights(tmp_path):
    trainer = runs.trainer(tmp_path, "self_driving", 0)
    trainer.val_loader = [(torch.ones(4, 6), torch.zeros(4, 1))]
    trainer.fit(8)
    weights = bits(trainer.model)
    with trainer.optimizer.averaged():
        trainer.model.eval()
        expected = trainer.model(torch.ones(4, 6)).square().mean().item()
        average = bits(trainer.model)
        trainer.model.train()
    assert trainer.evaluate()[0] == pytest.approx(expected, rel=1e-6)
    trainer.save_model(tmp_path / "model.pt")
    assert_same(torch.load(tmp_path / "model.pt"), average)
    assert_same(bits(trainer.model), weights)
    assert not torch.equal(average["0.weight"], weights["0.weight"])


def test_a_self_driving_run_is_told_where_it_ends_unless_it_knows(tmp_path):
    trainer = runs.trainer(tmp_path, "self_driving", 0)
    trainer.fit(6)
    assert trainer.optimizer.total_steps == 6
    assert trainer.optimizer.telemetry()["learning_rate"] < 1e-3
    trainer.fit(9)
    assert trainer.optimizer.total_steps == 9
    knows = runs.trainer(tmp_path, "self_driving", 0)
    knows.optimizer.set_total_steps(50)
    knows.fit(3)
    assert knows.optimizer.total_steps == 50
    free = runs.trainer(tmp_path, "self_driving", 0)
    free._pass_horizon = False
    free.fit(3)
    assert free.optimizer.total_steps is None


def test_a_scheduler_is_stepped_and_brought_back(tmp_path):
    def made():
        trainer = still(tmp_path)
        trainer.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 2, 0.5)
        return trainer

    whole = made()
    whole.fit(8)
    assert whole.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**4)
    again = made()
    again.fit(8, resume=tmp_path / "run-3.pt")
    assert_same(bits(whole.model), bits(again.model))


def test_bfloat16_precision_computes_under_autocast(tmp_path):
    seen = []

    def loss_fn(model, batch):
        y = model(batch[0])
        seen.append(y.dtype)
        return (y.float() - batch[1]).square().mean()

    loader = torch.utils.data.DataLoader(Still(), batch_size=4)
    trainer = Trainer(
        nn.Linear(3, 1), loader, None, None, loss_fn, precision="bf16", checkpoint_interval=0,
        save_results=False, progress=False,
    )  # fmt: skip
    trainer.fit(1)
    assert seen == [torch.bfloat16]
    assert trainer.model.weight.dtype == torch.float32
    trainer.cleanup()


def test_a_model_with_frozen_codes_is_saved_without_them(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def made(lr=1e-2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 1))
        quantize_(net[1], Int8WeightOnlyConfig())
        net[1].requires_grad_(False)
        loader = torch.utils.data.DataLoader(Still(), batch_size=4, shuffle=True)
        return Trainer(
            net, loader, None, lambda params: AXIOM(params, lr=lr), nn.MSELoss(), release=True,
            checkpoint_interval=3, checkpoint_dir=tmp_path, results_prefix=tmp_path / "run",
            save_results=False, progress=False,
        )  # fmt: skip

    whole = made()
    whole.fit(7)
    saved = torch.load(tmp_path / "run-3.pt", weights_only=True)["model"]
    assert sorted(saved) == ["0.bias", "0.weight", "1.bias", "2.bias", "2.weight"]
    again = made()
    again.fit(7, resume=tmp_path / "run-3.pt")
    x = torch.ones(1, 3)
    with torch.no_grad():
        assert torch.equal(whole.model(x), again.model(x))
    saved = torch.load(tmp_path / "run-7.pt", weights_only=True)["model"]
    assert_same(saved, checkpoint.weights(again.model))


def test_a_checkpoint_of_other_shapes_names_the_first_and_changes_nothing(tmp_path):
    trainer = still(tmp_path)
    trainer.fit(3)
    other = still(tmp_path)
    other.model = nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.2), nn.Linear(9, 1))
    before = bits(other.model)
    with pytest.raises(ValueError, match=r"0.weight must have shape \(9, 3\), got \(8, 3\)"):
        other.load_checkpoint(tmp_path / "run-3.pt")
    assert_same(bits(other.model), before)
    other.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"got none for 3.weight; build the model"):
        other.load_checkpoint(tmp_path / "run-3.pt")
    other.model = nn.Sequential(nn.Linear(3, 8))
    with pytest.raises(ValueError, match=r"got none named 2.bias"):
        other.load_checkpoint(tmp_path / "run-3.pt")


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    trainer = still(tmp_path)
    trainer.fit(3)
    path = tmp_path / "run-3.pt"
    before = path.read_bytes()

    def dies(saved, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint(path=path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run-3.pt"]


def test_files_of_others_are_not_taken_for_checkpoints(tmp_path):
    trainer = still(tmp_path)
    with pytest.raises(FileNotFoundError, match="a checkpoint must exist"):
        trainer.fit(1, resume=tmp_path / "none.pt")
    torch.save({"model": 1}, tmp_path / "run-9.pt")
    with pytest.raises(ValueError, match="must be one that Trainer has saved"):
        trainer.fit(1, resume="latest")


def one_batch(loss_fn=None, loader=None, **options):
    loader = [(torch.ones(4, 3), torch.ones(4, 1))] if loader is None else loader
    defaults = {"checkpoint_interval": 0, "save_results": False, "progress": False}
    return Trainer(nn.Linear(3, 1), loader, loss_fn=loss_fn, **{**defaults, **options})


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: one_batch(nn.MSELoss(), []), ValueError, "must have batches, got an empty one"),
        (
            lambda: one_batch(nn.MSELoss(), iter([(torch.ones(4, 3), torch.ones(4, 1))])),
            ValueError,
            "got one that can be read once",
        ),
        (
            lambda: one_batch(nn.MSELoss(reduction="none")),
            ValueError,
            r"a floating-point tensor of one element, got shape \(4, 1\); return for instance",
        ),
        (lambda: one_batch(lambda m, b: 3.0), ValueError, "one element, got 3.0"),
        (lambda: one_batch(nn.MSELoss(), [torch.ones(2, 3)]), ValueError, "inputs and targets"),
        (lambda: one_batch(nn.MSELoss(), eval_interval=0), ValueError, "eval_interval must be"),
        (lambda: one_batch(nn.MSELoss(), precision="int8"), ValueError, "precision must be"),
        (lambda: one_batch(nn.MSELoss(), optimizer=3), TypeError, "optimizer must be a torch"),
        (
            lambda: one_batch(nn.MSELoss(), optimizer=torch.optim.AdamW, release=True),
            ValueError,
            "release must be left out .* got AdamW",
        ),
    ],
)
def test_what_is_wrong_is_named(made, error, message):
    with pytest.raises(error, match=message):
        made().fit(2)


def test_under_torchrun_it_says_what_trains_in_several_processes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "1")
    one_batch(nn.MSELoss())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"got 2 processes, .* the same files; use CruxyTrainer"):
        one_batch(nn.MSELoss())


def test_a_compiled_model_is_given_what_the_model_takes():
    batch = {"input_ids": torch.ones(1, 3), "text": ["dropped"]}
    found = Loss(None, torch.compile(Tiny())).arguments(batch)
    assert sorted(found) == ["input_ids", "labels"]


def test_a_model_without_a_loss_of_its_own_is_named():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, input_ids):
            return self.inner(input_ids)

    trainer = Trainer(Silent(), [torch.ones(2, 3)], save_results=False, progress=False)
    with pytest.raises(ValueError, match="Silent must give a loss, got none from"):
        trainer.fit(1)


def test_steps_that_were_taken_count_and_fewer_are_refused(tmp_path):
    trainer = still(tmp_path)
    trainer.fit(4)
    assert trainer.fit(6)["steps"] == 6
    with pytest.raises(ValueError, match="steps must be at least the 6 that were taken, got 5"):
        trainer.fit(5)
    with pytest.raises(ValueError, match="step must be 6, which was taken last, got 7"):
        trainer.save_checkpoint(step=7)


def test_evaluation_needs_something_to_evaluate():
    trainer = one_batch(nn.MSELoss())
    with pytest.raises(ValueError, match="needs a val_loader"):
        trainer.evaluate()
    trainer.val_loader = []
    with pytest.raises(ValueError, match="must have something to evaluate"):
        trainer.evaluate()


def test_the_script_of_the_seed_runs_with_its_import_changed(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    train_data, val_data = padded_rows(), padded_rows()
    train_loader = torch.utils.data.DataLoader(train_data, batch_size=4, shuffle=True)
    val_loader = torch.utils.data.DataLoader(val_data, batch_size=4)
    trainer = AXIOM_Trainer(
        model,
        train_loader,
        val_loader,
        lr=5e-4,
        eval_interval=200,
        checkpoint_interval=1000,
    )
    results = trainer.fit(steps=3)
    assert results["final_val_ppl"] < results["initial_val_ppl"]
    trainer.save_checkpoint(step=3, path="checkpoint.pt")
    trainer.load_checkpoint("checkpoint.pt")
    loss, ppl = trainer.evaluate(max_batches=50)
    assert ppl == pytest.approx(math.exp(loss))
    trainer.cleanup()
    assert (tmp_path / "axiom.json").exists()


def test_a_warm_up_before_the_hooks_ignores_lr_scale_with_one_warning():
    net = nn.Linear(3, 1)
    optimizer = AXIOM(
        net.parameters(),
        lr=0.001,
        weight_decay=0.01,
        max_grad_norm=None,
        detect_anomaly=True,
        streak_boost=1.5,
        snr_floor=0.5,
    )
    assert optimizer.param_groups[0]["momentum"] == 0.9
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in range(4):
            if step == 2:
                optimizer.register_hooks(lr_scale=25.0)
            optimizer.zero_grad()
            loss = net(torch.ones(2, 3)).square().mean()
            loss.backward()
            optimizer.step(loss=loss.item())
    assert [str(w.message)[:25] for w in found] == ["lr_scale=25.0 is ignored:"]
    assert optimizer.memory_usage()["gradients"] == 0


def test_a_factory_or_an_optimizer_will_do():
    model = nn.Linear(3, 1)
    optimizer = CruxyOptimizer(model.parameters())
    given = Trainer(model, [], optimizer=optimizer, loss_fn=nn.MSELoss())
    assert given.optimizer is optimizer
    assert not given.optimizer._release
