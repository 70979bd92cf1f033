"""Other libraries' loops: a second run has an end of its own, and Muon is told what is what."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hf_models as models  # noqa: E402
from cruxy_torch import CruxyOptimizer, Trainer, param_groups  # noqa: E402
from cruxy_torch.integrations.huggingface import CruxyTrainer  # noqa: E402
from hf_models import train, training_arguments, weights  # noqa: E402

DRIVING = "mode=self_driving"
MUON = "mode=self_driving, direction=muon"


pytestmark = pytest.mark.usefixtures("one_thread")


def moved(model, before):
    return [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]


def own_of(trainer):
    return trainer.optimizer.optimizer


def rates(trainer):
    return [row["cruxy_learning_rate"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("optim_args", [DRIVING, MUON])
def test_a_second_call_of_train_trains_to_its_own_end(tmp_path, optim_args):
    trainer, model = train(tmp_path, optim_args=optim_args, max_steps=12)
    before = weights(model)
    trainer.train()
    own = own_of(trainer)
    assert (own.telemetry()["step"], own.total_steps) == (24, 24)
    assert moved(model, before) == list(before)
    found = rates(trainer)
    assert len(found) == 12
    assert 0 < found[-1] < 0.5 * max(found)


def test_a_second_run_is_resumed_bit_by_bit_with_the_end_that_it_had(tmp_path):
    class Spoiled(CruxyTrainer):
        """Skips some steps, which count as those of the run."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * float("nan") if inputs["input_ids"][0, 0] % 4 == 0 else loss

    def made(folder, model, optimizer=None):
        arguments = {"optim_args": DRIVING, "save_strategy": "steps", "save_steps": 5}
        return Spoiled(
            model=model,
            args=training_arguments(
                folder, max_steps=8, per_device_train_batch_size=1, **arguments
            ),
            train_dataset=models.sequences(16),
            optimizers=(optimizer, None),
        )

    first = made(tmp_path / "first", models.llama())
    first.train()
    skipped = own_of(first).telemetry()["skipped_total"]
    assert skipped > 0
    again = made(tmp_path / "second", first.model, own_of(first))
    again.train()
    whole = weights(again.model)
    assert own_of(again).telemetry()["skipped_total"] > skipped
    assert own_of(again).total_steps == 16

    for trainer in (again, made(tmp_path / "second", models.llama())):
        trainer.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-5"))
        assert own_of(trainer).total_steps == 16
        models.assert_same_state(weights(trainer.model), whole)


def test_a_first_run_that_is_resumed_after_it_ended_has_the_end_it_had(tmp_path):
    arguments = {"optim_args": DRIVING, "save_strategy": "steps", "save_steps": 5, "max_steps": 8}
    trainer, model = train(tmp_path, **arguments)
    whole = weights(model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert own_of(trainer).total_steps == 8
    models.assert_same_state(weights(model), whole)


def lightning_run(optimizer, net, epochs, *, predicts=None, ckpt_path=None, folder=None):
    lightning = pytest.importorskip("pytorch_lightning")
    from cruxy_torch.integrations.lightning import CruxyCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch):
            return (self.net(batch[0]) - batch[1]).square().mean()

        def predict_step(self, batch):
            predicts.append(weights(net))

        def configure_optimizers(self):
            return optimizer

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CruxyCallback()],
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, generator=generator)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    loader, module = torch.utils.data.DataLoader(data, batch_size=8), Module()
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    if predicts is not None:
        trainer.predict(module, loader)
    if folder is not None:
        trainer.save_checkpoint(folder / "run.ckpt")
        return folder / "run.ckpt"
    return trainer


def linear():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    return net, CruxyOptimizer(net.parameters(), mode="self_driving")


def test_a_second_fit_of_lightning_trains_to_its_own_end_and_predicts_the_average():
    net, optimizer = linear()
    lightning_run(optimizer, net, 3)
    assert optimizer.total_steps == 12
    before, seen = weights(net), []
    lightning_run(optimizer, net, 2, predicts=seen)
    assert (optimizer.telemetry()["step"], optimizer.total_steps) == (20, 20)
    assert moved(net, before) == list(before)
    raw = weights(net)
    with optimizer.averaged():
        models.assert_same_state(seen[-1], weights(net))
    models.assert_same_state(weights(net), raw)
    assert not torch.equal(seen[-1]["weight"], raw["weight"])


def muon_net():
    """Muon whose average does not pull: there the law has another set point in a run that ends."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    groups = param_groups(net, lr=1e-3)
    rules = {"mode": "self_driving", "direction": "muon", "averaging": 16}
    return net, CruxyOptimizer(groups, **rules)


def test_a_resumed_fit_of_lightning_has_the_law_of_the_whole_one(tmp_path):
    net, optimizer = muon_net()
    lightning_run(optimizer, net, 4)
    law = optimizer._settings.law
    half, its = muon_net()
    path = lightning_run(its, half, 2, folder=tmp_path)
    resumed, own = muon_net()
    lightning_run(own, resumed, 4, ckpt_path=path)
    assert own._settings.law == law
    assert (own.telemetry()["step"], own.total_steps) == (16, 16)


def own_trainer(folder, net, optimizer):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, generator=generator)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    return Trainer(
        net,
        torch.utils.data.DataLoader(data, batch_size=8),
        None,
        optimizer,
        torch.nn.MSELoss(),
        checkpoint_interval=5,
        checkpoint_dir=folder,
        save_results=False,
        progress=False,
    )


def test_an_optimizer_of_another_trainer_trains_to_the_end_of_this_one(tmp_path):
    net, optimizer = linear()
    own_trainer(tmp_path / "a", net, optimizer).fit(12)
    before = weights(net)
    own_trainer(tmp_path / "b", net, optimizer).fit(8)
    assert (optimizer.telemetry()["step"], optimizer.total_steps) == (20, 20)
    assert moved(net, before) == list(before)
    whole = weights(net)

    fresh, its = linear()
    own_trainer(tmp_path / "b", fresh, its).fit(8, resume=tmp_path / "b" / "run-5.pt")
    assert its.total_steps == 20
    models.assert_same_state(weights(fresh), whole)


def test_a_resumed_run_of_the_trainer_has_the_law_of_the_whole_one(tmp_path):
    net, optimizer = muon_net()
    own_trainer(tmp_path, net, optimizer).fit(12)
    whole = weights(net)
    fresh, its = muon_net()
    own_trainer(tmp_path, fresh, its).fit(12, resume=tmp_path / "run-5.pt")
    assert its._settings.law == optimizer._settings.law
    models.assert_same_state(weights(fresh), whole)


@pytest.mark.parametrize("way", ["optim_args", "optimizer_cls_and_kwargs"])
def test_muon_learns_from_the_trainer_what_each_parameter_is(tmp_path, way):
    given = {"optim_args": MUON}, {}
    if way == "optimizer_cls_and_kwargs":
        options = {"lr": 1e-2, "mode": "self_driving", "direction": "muon"}
        given = {}, {way: (CruxyOptimizer, options)}
    trainer, model = train(tmp_path, weight_decay=0.2, trainer_options=given[1], **given[0])
    groups = own_of(trainer).param_groups
    expected = param_groups(model, lr=1e-2, weight_decay=0.2)
    for own, one in zip(groups, expected, strict=True):
        assert {key: own[key] for key in ("role", "lr", "weight_decay", "param_names")} == {
            key: one[key] for key in ("role", "lr", "weight_decay", "param_names")
        }
    decay = {group["role"]: group["weight_decay"] for group in groups}
    assert (decay["attention.q"], decay["embedding"], decay["norm"]) == (0.2, 0.2, 0.0)
    assert own_of(trainer).telemetry()["step"] == 12
    assert moved(model, weights(models.llama())) == [name for name, _ in model.named_parameters()]


def test_muon_in_the_trainer_resumes_bit_by_bit(tmp_path):
    arguments = {"optim_args": MUON, "save_strategy": "steps", "save_steps": 5, "max_steps": 8}
    _, whole = train(tmp_path, **arguments)
    _, resumed = train(tmp_path, resume=tmp_path / "checkpoint-5", **arguments)
    models.assert_same_state(weights(resumed), weights(whole))


@pytest.mark.parametrize("optim_args", [DRIVING, MUON])
def test_a_decay_of_the_optimizer_counts_before_that_of_the_arguments(tmp_path, optim_args):
    optim_args += ", weight_decay=0.3"
    arguments = training_arguments(tmp_path, optim_args=optim_args, weight_decay=0.1)
    made = CruxyTrainer(model=models.llama(), args=arguments).create_optimizer()
    assert {group["weight_decay"] for group in made.param_groups} == {0.0, 0.3}
    assert arguments.weight_decay == 0.1
