"""What `CruxyOptimizer` accepts and refuses, how a loss reaches it, and its log."""

import json
import math

import pytest

torch = pytest.importorskip("torch")

import torch_models as models  # noqa: E402
from cruxy_control import Meta3  # noqa: E402
from cruxy_torch import CruxyOptimizer  # noqa: E402
from relatives import crossed  # noqa: E402

WRONG = {
    "lr": ({"lr": -1e-3}, r"lr must be in \[0, infinity\), got -0.001"),
    "lr_nan": ({"lr": math.nan}, "lr must be in"),
    "lr_mode": ({"lr": "meta3"}, "lr must be a number, got 'meta3'"),
    "lr_shape": ({"lr": torch.ones(2)}, "tensor lr must have one element"),
    "betas": ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
    "betas_pair": ({"betas": (0.9,)}, "betas must be a pair"),
    "eps": ({"eps": -1.0}, "eps must be in"),
    "weight_decay": ({"weight_decay": -0.1}, "weight_decay must be in"),
    "mode": ({"mode": "meta4"}, "mode must be one of 'meta3', .* got 'meta4'"),
    "law": ({"law": Meta3}, "law must be an instance"),
    "interval": ({"meta_interval": 0}, "meta_interval must be a whole number >= 1, got 0"),
    "gamma": ({"gamma_norm": 0.5}, "gamma_norm must be in"),
    "lr_bounds": ({"lr_bounds": (1.0, 0.1)}, "lr_bounds must have lower <= upper"),
    "momentum_dtype": ({"momentum_dtype": torch.int8}, "momentum_dtype must be a floating"),
    "two_paths": ({"foreach": True, "fused": True}, "at most one of foreach, fused and compile"),
    "differentiable": ({"differentiable": True}, "differentiable must be False"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_with_rule_value_and_remedy(case):
    options, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        models.optimizer(models.model(), **options)


def test_group_options_are_checked_too():
    optimizer = models.optimizer(models.model())
    with pytest.raises(ValueError, match="weight_decay must be in"):
        optimizer.add_param_group(
            {"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": -1}
        )
    assert len(optimizer.param_groups) == 1


def test_no_parameters_raise():
    with pytest.raises(ValueError, match="empty parameter list"):
        CruxyOptimizer([])


def test_trained_parameters_that_are_complex_are_refused():
    p = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match="parameters must be real floating-point"):
        CruxyOptimizer([p])


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = CruxyOptimizer(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        optimizer.step()


def curvature(give):
    """The curvature after five steps of falling loss handed over by `give(optimizer, loss)`."""
    net = models.model()
    optimizer = models.optimizer(net)
    for loss in (2.0, 1.8, 1.7, 1.5, 1.4):
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.1)
        give(optimizer, loss)
    return optimizer.telemetry()["curvature"]


def observe_twice(optimizer, loss):
    optimizer.observe(loss - 0.25)
    optimizer.observe(torch.tensor([loss + 0.25], requires_grad=True))
    optimizer.step()


@pytest.mark.parametrize(
    "give",
    [
        lambda optimizer, loss: optimizer.step(loss=torch.tensor(loss, requires_grad=True)),
        lambda optimizer, loss: optimizer.step(loss=torch.tensor([loss], dtype=torch.float64)),
        lambda optimizer, loss: optimizer.step(lambda: torch.tensor(loss)),
        lambda optimizer, loss: optimizer.step(lambda: 77.0, loss=loss),
        observe_twice,
    ],
)
def test_the_loss_arrives_by_every_way(give):
    number = curvature(lambda optimizer, loss: optimizer.step(loss=loss))
    assert number < 0.0
    assert curvature(give) == pytest.approx(number, rel=1e-6)


def test_without_a_loss_the_curvature_stays_zero():
    assert curvature(lambda optimizer, loss: optimizer.step()) == 0.0


def test_an_observed_loss_serves_one_step():
    net = models.model()
    optimizer = models.optimizer(net)
    optimizer.observe(1.0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.telemetry()["loss"] == 1.0
    optimizer.step()
    assert math.isnan(optimizer.telemetry()["loss"])


@pytest.mark.parametrize("hand_over", ["step", "observe"])
def test_a_loss_that_is_no_number_is_refused(hand_over):
    optimizer = models.optimizer(models.model())
    with pytest.raises(ValueError, match="loss must be one real number"):
        getattr(optimizer, hand_over)(loss=torch.ones(3))


def test_the_closure_runs_with_gradients_and_its_value_comes_back():
    net = models.model()
    optimizer = models.optimizer(net)

    def closure():
        optimizer.zero_grad()
        loss = models.loss_of(net, *models.batch(0))
        loss.backward()
        return loss

    weight = next(net.parameters())
    before = weight.detach().clone()
    loss = optimizer.step(closure)
    assert isinstance(loss, torch.Tensor)
    assert loss.requires_grad
    assert not torch.equal(weight, before)
    assert optimizer.step(loss=1.25) == 1.25


def test_telemetry_before_the_first_step():
    report = models.optimizer(models.model()).telemetry()
    assert math.isnan(report["learning_rate"])
    assert (report["ok"], report["step"], report["skipped_total"]) == (True, 0, 0)


def test_maximize_climbs():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = CruxyOptimizer([p], maximize=True)
    p.grad = torch.ones(3)
    optimizer.step()
    assert (p > 0).all()


def test_the_gradient_is_never_written_to():
    net = models.model()
    optimizer = models.optimizer(net, use_gc=True, maximize=True, decoupled_weight_decay=False)
    models.loss_of(net, *models.batch(0)).backward()
    before = [g.clone() for g in models.gradients(net)]
    optimizer.step()
    assert all(map(torch.equal, models.gradients(net), before))


@pytest.mark.parametrize(
    ("mode", "lion"), crossed(["meta3", "stability_v1", "stability_v2"], [True, False])
)
def test_it_trains(mode, lion):
    net = models.model()
    optimizer = models.optimizer(net, mode=mode, use_lion=lion, lr=3e-3 if lion else 1e-2)
    x, y = models.batch(0)
    first = models.loss_of(net, x, y).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = models.loss_of(net, x, y)
        loss.backward()
        optimizer.step(loss=loss)
    assert models.loss_of(net, x, y).item() < 0.2 * first


class TestMetrics:
    """`log_metrics=True` appends JSON lines."""

    def lines(self, path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_lines_hold_the_telemetry_and_null_for_what_is_not_finite(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        net = models.model()
        optimizer = models.optimizer(net, log_metrics=True, metrics_path=path)
        models.train(net, optimizer, 2)
        reports = optimizer.telemetry()
        for p in net.parameters():
            p.grad = torch.full_like(p, math.inf)
        optimizer.step()
        del optimizer
        good, bad = self.lines(path)[1:]
        assert good["learning_rate"] == reports["learning_rate"]
        assert {k: good[k] for k in ("step", "phase", "ok")} == {
            k: reports[k] for k in ("step", "phase", "ok")
        }
        assert (bad["grad_norm"], bad["loss"], bad["ok"]) == (None, None, False)

    def test_nothing_is_read_from_the_device_before_the_batch_is_full(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        net = models.model()
        optimizer = models.optimizer(net, log_metrics=True, metrics_path=path)
        models.train(net, optimizer, 99)
        assert not path.exists()
        models.train(net, optimizer, 1, start=99)
        assert [line["step"] for line in self.lines(path)] == list(range(1, 101))

    def test_a_second_run_appends(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        for _ in range(2):
            net = models.model()
            optimizer = models.optimizer(net, log_metrics=True, metrics_path=path)
            models.train(net, optimizer, 2)
            del optimizer
        assert [line["step"] for line in self.lines(path)] == [1, 2, 1, 2]


def test_what_was_observed_counts_before_what_the_closure_returned():
    """Lightning's closure knows the last micro-batch alone; `training_step` observes them all."""
    net = models.model()
    optimizer = models.optimizer(net)
    optimizer.observe(3.0)

    def closure():
        optimizer.observe(1.0)
        loss = models.loss_of(net, *models.batch(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.telemetry()["loss"] == 2.0
