"""Other libraries' loops under AXIOM, Cosmic and self-driving: release, averages, the end."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hf_models as models  # noqa: E402
from cruxy_torch import AXIOM, Cosmic, CruxyOptimizer  # noqa: E402
from cruxy_torch.integrations.huggingface import CruxyTrainer  # noqa: E402
from hf_models import train, training_arguments, weights  # noqa: E402
from relatives import relatives  # noqa: E402

DRIVING = "mode=self_driving"


pytestmark = pytest.mark.usefixtures("one_thread")


def averages(trainer):
    own = trainer.optimizer.optimizer
    with own.averaged():
        return weights(trainer.model)


@pytest.mark.parametrize("released", relatives([False, True], [True]))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AXIOM, {"lr": 1e-2, "momentum": 0.9, "averaging": 16}),
        pytest.param(Cosmic, {"lr": 1e-2, "state_budget": "30KB"}, marks=pytest.mark.slow),
    ],
)
def test_axiom_and_cosmic_train_and_resume_bit_by_bit(tmp_path, kind, options, released):
    arguments = {"save_strategy": "steps", "save_steps": 5, "max_steps": 8}
    chosen = {"optimizer_cls_and_kwargs": (kind, options), "release_gradients": released}
    full, whole = train(tmp_path, trainer_options=chosen, **arguments)
    own = full.optimizer.optimizer
    assert isinstance(own, kind)
    assert (own._release is not None) == released
    assert own.telemetry()["step"] == 8
    assert own.telemetry()["curvature"] != 0  # the losses have arrived
    _, resumed = train(
        tmp_path, resume=tmp_path / "checkpoint-5", trainer_options=chosen, **arguments
    )
    models.assert_same_state(whole.state_dict(), resumed.state_dict())


def test_an_optimizer_with_hooks_is_taken_and_frees_every_gradient(tmp_path):
    model = models.llama()
    optimizer = AXIOM(model.parameters(), lr=1e-2)
    optimizer.register_hooks()
    trainer, _ = train(
        tmp_path, model=model, max_steps=2, trainer_options={"optimizers": (optimizer, None)}
    )
    assert trainer.optimizer.optimizer is optimizer
    assert optimizer.memory_usage()["gradients"] == 0


def test_hooks_and_accumulation_exclude_each_other(tmp_path):
    arguments = training_arguments(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps must be 1 .* got 2"):
        CruxyTrainer(model=models.llama(), args=arguments, release_gradients=True)


def test_gradients_of_a_self_driving_run_cannot_be_released(tmp_path):
    with pytest.raises(ValueError, match='mode must not be "self_driving" to release'):
        train(tmp_path, optim_args=DRIVING, trainer_options={"release_gradients": True})


def test_a_self_driving_run_knows_its_end_and_keeps_its_rate_constant(tmp_path):
    trainer, _ = train(tmp_path, optim_args=DRIVING)
    own = trainer.optimizer.optimizer
    assert own.total_steps == 12
    rates = {line["learning_rate"] for line in trainer.state.log_history if "loss" in line}
    assert rates == {1e-2}
    last = [line["cruxy_learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert last[-1] < 0.3 * max(last)


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ({}, {"total_steps": None}, None),
        ({}, {"total_steps": 40}, 40),
        ({"optim_args": f"{DRIVING}, total_steps=30"}, {}, 30),
        ({"optim_args": f"{DRIVING}, total_steps=None"}, {}, None),
    ],
)
def test_the_end_is_what_one_says_it_is(tmp_path, arguments, options, told):
    arguments = {"optim_args": DRIVING, "max_steps": 1, **arguments}
    trainer, _ = train(tmp_path, trainer_options=options, **arguments)
    assert trainer.optimizer.optimizer.total_steps == told


def test_a_relative_limit_that_came_with_the_mode_suits_the_end(tmp_path):
    free = CruxyOptimizer(models.llama().parameters(), mode="self_driving")
    given = CruxyOptimizer(models.llama().parameters(), mode="self_driving", relative_limit=0.05)
    for optimizer in (free, given):
        optimizer.set_total_steps(100)
    told = CruxyOptimizer(models.llama().parameters(), mode="self_driving", total_steps=100)
    assert free.param_groups[0]["relative_limit"] == told.param_groups[0]["relative_limit"]
    assert given.param_groups[0]["relative_limit"] == 0.05


def test_the_end_needs_a_law_that_finds_the_rate():
    with pytest.raises(ValueError, match="total_steps needs a law that finds the rate"):
        AXIOM(models.llama().parameters()).set_total_steps(10)


@pytest.mark.parametrize(
    ("arguments", "falls"),
    [({"lr_scheduler_type": "cosine"}, True), ({"warmup_steps": 2}, True), ({}, False)],
)
def test_a_schedule_that_was_asked_for_is_obeyed(tmp_path, arguments, falls):
    trainer, _ = train(tmp_path, optim_args=DRIVING, max_steps=4, **arguments)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert (len(set(rates)) > 1) == falls


def test_other_modes_keep_the_usual_schedule(tmp_path):
    trainer, _ = train(tmp_path, max_steps=4)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]


def with_evaluation(tmp_path, **arguments):
    return train(
        tmp_path,
        optim_args=DRIVING,
        save_strategy="steps",
        save_steps=5,
        eval_strategy="steps",
        eval_steps=5,
        trainer_options={"eval_dataset": models.sequences(8)},
        **arguments,
    )


def loss_of(model):
    model.eval()
    rows = torch.stack([row["input_ids"] for row in models.sequences(8)])
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()


def test_the_average_is_evaluated_and_saved_and_a_run_goes_on_from_the_weights(tmp_path):
    trainer, model = with_evaluation(tmp_path)
    raw, average = weights(model), averages(trainer)
    with trainer.optimizer.optimizer.averaged():
        expected = loss_of(model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(loss_of(model), rel=1e-5)
    models.assert_same_state(weights(model), raw)
    trainer.save_model(tmp_path / "final")
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")
    models.assert_same_state(weights(saved), average)

    _, resumed = with_evaluation(tmp_path, resume=tmp_path / "checkpoint-5")
    models.assert_same_state(weights(resumed), raw)


def test_the_best_model_is_the_average_that_was_evaluated(tmp_path):
    trainer, model = with_evaluation(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss"
    )
    best = min(line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line)
    assert loss_of(model) == pytest.approx(best, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("told", [False, True])
def test_the_callback_of_lightning_tells_the_end_and_validates_the_average(told):
    lightning = pytest.importorskip("pytorch_lightning")
    from cruxy_torch.integrations.lightning import CruxyCallback

    torch.manual_seed(0)
    x = torch.randn(32, 3)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        def training_step(self, batch):
            return (self.net(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch):
            seen.append(weights(self.net))

        def configure_optimizers(self):
            return CruxyOptimizer(self.parameters(), mode="self_driving")

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[CruxyCallback(pass_horizon=told)],
    )
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    trainer.fit(module, loader, torch.utils.data.DataLoader(data, batch_size=32))
    own = trainer.optimizers[0]
    assert own.total_steps == (12 if told else None)
    last = weights(module.net)
    with own.averaged():
        models.assert_same_state(seen[-1], weights(module.net))
    assert not torch.equal(seen[-1]["weight"], last["weight"])
