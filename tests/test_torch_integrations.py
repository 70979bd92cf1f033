"""Other libraries' training loops: each brings the loss, raw gradients, and a run that resumes."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hf_models as models  # noqa: E402
from cruxy_control import Meta3  # noqa: E402
from cruxy_torch import CruxyOptimizer  # noqa: E402
from cruxy_torch.integrations.huggingface import CruxyTrainer  # noqa: E402
from hf_models import Telemetry, train, training_arguments  # noqa: E402
from relatives import crossed, relatives  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# A sum of n terms in another order moves by a few ulps of it; telemetry is float32.
ULP = 2.0**-23


@pytest.mark.parametrize("accumulate", relatives([1, 2, 3], [1, 3]))
def test_the_loss_and_the_raw_gradient_norm_of_the_whole_batch_reach_the_optimizer(
    tmp_path, accumulate
):
    # 11 batches of an epoch: the last step has fewer micro-batches than the others.
    seen = Telemetry()
    trainer, _ = train(
        tmp_path,
        count=44,
        callbacks=[seen],
        gradient_accumulation_steps=accumulate,
        num_train_epochs=2,
        max_steps=-1,
    )
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == len(seen.rows) == 2 * -(-11 // accumulate)
    for line, row in zip(logged, seen.rows, strict=True):
        assert row["loss"] == pytest.approx(line["loss"], rel=8 * ULP)
        assert row["grad_norm"] == pytest.approx(line["grad_norm"], rel=64 * ULP)
        assert row["grad_norm"] > 1  # where the Trainer would clip by default


def test_accumulated_micro_batches_train_as_one_batch(tmp_path):
    _, whole = train(tmp_path, per_device_train_batch_size=8)
    _, parts = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, value in whole.state_dict().items():
        # Twelve steps of at most 1e-2 each, on gradients that differ in their last bits.
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "accumulate"), crossed([{}, {"optim_args": "use_lion=True"}], [1, 2])
)
def test_a_resumed_run_continues_bit_by_bit(tmp_path, options, accumulate):
    arguments = {
        **options,
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    full, whole = train(tmp_path, **arguments)
    half, resumed = train(tmp_path, resume=tmp_path / "checkpoint-5", **arguments)
    models.assert_same_state(whole.state_dict(), resumed.state_dict())
    ours, theirs = (trainer.optimizer.optimizer.state_dict() for trainer in (full, half))
    controllers = (state["param_groups"][0]["controller"] for state in (ours, theirs))
    models.assert_same_state(*controllers)
    for index, state in ours["state"].items():
        models.assert_same_state(state, theirs["state"][index])
    assert half.state.global_step == 12


def test_bfloat16_autocast_keeps_parameters_and_moments_in_float32(tmp_path):
    seen = Telemetry()
    trainer, model = train(tmp_path, callbacks=[seen], bf16=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = trainer.optimizer.optimizer.state
    assert {s["exp_avg"].dtype for s in state.values()} == {torch.float32}
    assert all(row["ok"] and row["curvature"] == row["curvature"] for row in seen.rows)
    assert seen.rows[-1]["curvature"] != 0


def test_float16_autocast_with_a_scaler_reports_unscaled_gradients(tmp_path):
    seen = Telemetry()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer, _ = train(tmp_path, fp16=True, scaler=scaler, callbacks=[seen])
    logged = [line for line in trainer.state.log_history if "loss" in line]
    for line, row in zip(logged, seen.rows, strict=True):
        assert row["grad_norm"] == pytest.approx(line["grad_norm"], rel=64 * ULP)
        assert row["loss"] == pytest.approx(line["loss"], rel=8 * ULP)
        assert row["ok"]


def test_an_overflow_that_the_scaler_finds_is_skipped_cleanly(tmp_path):
    seen = Telemetry()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, backoff_factor=2.0**-8)
    _, model = train(tmp_path, fp16=True, scaler=scaler, callbacks=[seen])
    assert [row["ok"] for row in seen.rows] == [False] + [True] * 11
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_lora_trains_the_adapters_alone_and_resumes_bit_by_bit(tmp_path):
    pytest.importorskip("peft")
    seen = Telemetry()
    arguments = {"save_strategy": "steps", "save_steps": 5}
    trainer, whole = train(tmp_path, model=models.with_lora(), callbacks=[seen], **arguments)
    fresh = models.with_lora().state_dict()
    moved = {n for n, value in whole.state_dict().items() if not torch.equal(value, fresh[n])}
    assert moved == {name for name in fresh if "lora_" in name}
    assert len(trainer.optimizer.optimizer.state) == len(moved)
    assert seen.rows[-1]["curvature"] != 0

    resumed = models.with_lora()
    train(tmp_path, model=resumed, resume=tmp_path / "checkpoint-5", **arguments)
    models.assert_same_state(whole.state_dict(), resumed.state_dict())


def test_training_arguments_reach_the_optimizer(tmp_path):
    arguments = training_arguments(
        tmp_path,
        learning_rate=2e-3,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_epsilon=1e-6,
        optim_args="mode=stability_v2, use_gc=True",
    )
    model = models.llama()
    made = CruxyTrainer(model=model, args=arguments).create_optimizer()
    decayed, spared = made.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    for group in (decayed, spared):
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.999), 1e-6)
        assert group["use_gc"]
    same = CruxyOptimizer(model.parameters(), mode="stability_v2")
    assert decayed["controller"].keys() == same.param_groups[0]["controller"].keys()


@pytest.mark.parametrize(
    ("optim_args", "betas"),
    [
        ("mode=self_driving", (0.9, 0.99)),
        ("mode=self_driving, use_lion=True", (0.9, 0.95)),
        ("mode=meta3", (0.9, 0.999)),
        ("mode=self_driving, betas=(0.8, 0.97), use_gc=True", (0.8, 0.97)),
    ],
)
def test_betas_that_nobody_set_are_those_of_the_mode(tmp_path, optim_args, betas):
    arguments = training_arguments(tmp_path, optim_args=optim_args)
    made = CruxyTrainer(model=models.llama(), args=arguments).create_optimizer()
    assert made.param_groups[0]["betas"] == betas


def test_a_scheduler_moves_the_rate_that_the_controller_multiplies(tmp_path):
    seen = Telemetry()
    trainer, _ = train(tmp_path, callbacks=[seen], warmup_steps=4)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates[0] < rates[4] > rates[-1]
    for rate, row in zip(rates, seen.rows, strict=True):
        factors = row["meta_scale"] * row["phase_scale"]
        assert row["learning_rate"] == pytest.approx(rate * factors, rel=8 * ULP)


def test_the_log_shows_what_the_controller_decided(tmp_path):
    trainer, _ = train(tmp_path, max_steps=1)
    line = trainer.state.log_history[0]
    assert line["cruxy_phase"] == 0.5
    assert line["cruxy_learning_rate"] == pytest.approx(0.75 * line["learning_rate"], rel=8 * ULP)
    assert "cruxy_phase" not in trainer.state.log_history[-1]  # the summary of the run


def test_the_arguments_of_the_caller_are_left_alone(tmp_path):
    arguments = training_arguments(tmp_path)
    trainer = CruxyTrainer(model=models.llama(), args=arguments)
    assert trainer.args.max_grad_norm == 0
    assert arguments.max_grad_norm == 1.0


@pytest.mark.parametrize("way", ["optimizer_cls_and_kwargs", "optimizers"])
def test_an_optimizer_may_be_given_in_the_ways_of_the_trainer(tmp_path, way):
    model, options = models.llama(), {"lr": 1e-3, "law": Meta3(gamma=1.7)}
    given = {
        "optimizer_cls_and_kwargs": (CruxyOptimizer, options),
        "optimizers": (CruxyOptimizer(model.parameters(), **options), None),
    }
    seen = Telemetry()
    train(tmp_path, model=model, callbacks=[seen], trainer_options={way: given[way]}, max_steps=3)
    assert len(seen.rows) == 3
    assert seen.rows[-1]["curvature"] != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm must be 0 or left out, got 0.5"),
        ({"optim": "sgd"}, "optim must be left out, got 'sgd'"),
    ],
)
def test_arguments_that_would_blind_the_controller_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        CruxyTrainer(model=models.llama(), args=training_arguments(tmp_path, **arguments))


def test_another_optimizer_is_refused(tmp_path):
    model, arguments = models.llama(), training_arguments(tmp_path)
    other = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="must hold an optimizer of cruxy_torch, got SGD"):
        CruxyTrainer(model=model, args=arguments, optimizers=(other, None))
    with pytest.raises(TypeError, match="must name a class of cruxy_torch"):
        CruxyTrainer(
            model=model,
            args=arguments,
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}),
        )


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("use_lion", ValueError, "optim_args must be name=value"),
        ("nesterov=True", TypeError, "nesterov"),
        ("mode=fast", ValueError, "mode must be"),
    ],
)
def test_bad_optim_args_are_refused_when_training_starts(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path, optim_args=text)


class _Sharded(transformers.Trainer):
    """A trainer that says it runs under DeepSpeed, which is not installed."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = True


def test_deepspeed_is_refused_also_in_a_subclass_named_after(tmp_path):
    class Mine(CruxyTrainer, _Sharded):
        pass

    with pytest.raises(ValueError, match="got DeepSpeed"):
        Mine(model=models.llama(), args=training_arguments(tmp_path))


def test_a_subclass_of_the_trainer_is_extended_by_naming_this_class_first(tmp_path):
    class Halved(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            return 0.5 * super().compute_loss(*args, **kwargs)

    class Mine(CruxyTrainer, Halved):
        pass

    seen, halved = Telemetry(), Telemetry()
    train(tmp_path, callbacks=[seen], max_steps=1)
    train(tmp_path, callbacks=[halved], max_steps=1, trainer_class=Mine)
    assert halved.rows[0]["loss"] == pytest.approx(0.5 * seen.rows[0]["loss"], rel=8 * ULP)


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_ranks_hold_one_controller_train_as_one_and_resume(tmp_path, sharded):
    torch.multiprocessing.spawn(models.train_on_rank, (str(tmp_path), sharded), nprocs=2)
    ours, other, *resumed = (
        torch.load(tmp_path / f"{name}{rank}.pt")
        for name in ("whole", "resumed")
        for rank in (0, 1)
    )
    for part in ("controller", "model"):
        models.assert_same_state(ours[part], other[part])
        for rank in resumed:
            models.assert_same_state(ours[part], rank[part])
    _, alone = train(tmp_path, per_device_train_batch_size=8, **models.SHARED)
    for name, value in alone.named_parameters():
        torch.testing.assert_close(ours["model"][name], value.detach(), rtol=0, atol=1e-5)


def regression(count=32):
    """A linear layer and something for it to learn."""
    torch.manual_seed(3)
    x = torch.randn(count, 3)
    return torch.nn.Linear(3, 1), x, x.sum(1, keepdim=True)


def squared_error(net, x, y):
    return ((net(x) - y) ** 2).mean()


def test_accelerate_steps_on_the_mean_of_the_observed_losses():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, x, y = regression()
    optimizer = CruxyOptimizer(net.parameters(), lr=1e-2)
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    net, prepared, loader = accelerator.prepare(net, optimizer, loader)
    losses = []
    for inputs, targets in loader:
        with accelerator.accumulate(net):
            loss = squared_error(net, inputs, targets)
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.observe(loss)
            prepared.step()
            prepared.zero_grad()
        if accelerator.sync_gradients:
            report = optimizer.telemetry()
            assert report["loss"] == pytest.approx(sum(losses) / 2, rel=4 * ULP)
            losses.clear()
    assert report["step"] == 2


@pytest.mark.parametrize(
    ("precision", "observes", "accumulated", "callback"),
    [
        *[
            ("32-true", False, 1, False),
            ("32-true", True, 1, False),
            ("bf16-mixed", False, 1, False),
        ],
        *[("16-mixed", True, 1, False), ("32-true", True, 2, False), ("32-true", False, 2, True)],
        *[("32-true", True, 2, True), ("16-mixed", False, 2, True)],
    ],
)
def test_lightning_hands_over_the_loss(precision, observes, accumulated, callback):
    lightning = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.plugins.precision import MixedPrecision

    from cruxy_torch.integrations.lightning import CruxyCallback

    net, x, y = regression()
    losses, seen = [], []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch):
            loss = squared_error(self.net, *batch)
            losses.append(loss.item())
            if observes:
                self.optimizers().observe(loss)
            return loss

        def on_train_batch_end(self, *_):
            seen.append(self.optimizers().telemetry())

        def configure_optimizers(self):
            return CruxyOptimizer(self.parameters(), lr=1e-2)

    # Lightning itself offers a scaler on GPUs alone.
    chosen = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        chosen = {"plugins": [MixedPrecision(precision, "cpu", scaler)]}
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulated,
        callbacks=[CruxyCallback()] if callback else [],
        **chosen,
    )
    data = torch.utils.data.TensorDataset(x, y)
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8))
    own = [losses[i : i + accumulated] for i in range(0, 4, accumulated)]
    shown = [row["loss"] for row in seen[accumulated - 1 :: accumulated]]
    assert shown == pytest.approx([sum(each) / accumulated for each in own], rel=4 * ULP)
    assert seen[-1]["step"] == 4 // accumulated


def test_lightning_refuses_to_clip_scaled_gradients_before_the_sensors():
    pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.plugins.precision import MixedPrecision

    net, _, _ = regression()
    precision = MixedPrecision("16-mixed", "cpu")
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        precision.clip_gradients(CruxyOptimizer(net.parameters()), clip_val=1.0)
