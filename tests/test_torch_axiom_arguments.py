"""What AXIOM takes from its seed: a bound on the norm, an error for what is no number."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cruxy_torch import AXIOM  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 2))


def gradients(model, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(p.shape, generator=generator) for p in model.parameters()]


def give(model, grads):
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad.clone()


def stepped(grads_of_steps, **options):
    model = net()
    # Without the limit of each tensor's size only the clip can scale a gradient.
    optimizer = AXIOM(model.parameters(), lr=1e-2, clip_rms=None, power=0.0, **options)
    for grads in grads_of_steps:
        give(model, grads)
        optimizer.step(loss=1.0)
    return optimizer, [p.detach().clone() for p in model.parameters()]


def test_the_norm_over_all_parameters_is_bounded_and_sensed_as_it_is():
    grads = gradients(net(), 50.0, 1)
    norm = np.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
    factor = 2.0 / (norm + 1e-6)
    bound, got = stepped([grads], max_grad_norm=2.0)
    _, expected = stepped([[g * factor for g in grads]])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert bound.telemetry()["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert bound.telemetry()["clip_scale"] == pytest.approx(factor, rel=1e-5)


def test_a_gradient_within_the_bound_is_left_alone():
    steps = [gradients(net(), 0.01, i) for i in range(3)]
    bound, ours = stepped(steps, max_grad_norm=2.0)
    _, theirs = stepped(steps)
    assert bound.telemetry()["clip_scale"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_with_hooks_each_tensor_is_bounded_by_its_own_norm():
    coefficients = gradients(net(), 10.0, 3)

    def run(released, grads, **options):
        model = net()
        optimizer = AXIOM(model.parameters(), lr=1e-2, clip_rms=None, power=0.0, **options)
        if released:
            optimizer.register_hooks()
        pairs = zip(model.parameters(), grads, strict=True)
        sum((p * c).sum() for p, c in pairs).backward()
        optimizer.step(loss=1.0)
        return [p.detach().clone() for p in model.parameters()]

    bounded = [c * min(1.0, 0.5 / (c.norm().item() + 1e-6)) for c in coefficients]
    released = run(True, coefficients, max_grad_norm=0.5)
    expected = run(True, bounded)
    for a, b in zip(released, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_an_anomaly_names_its_tensors_and_leaves_everything_as_it_was():
    model = net()
    optimizer = AXIOM(model.named_parameters(), detect_anomaly=True)
    give(model, gradients(model, 1.0, 0))
    optimizer.step(loss=1.0)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    give(model, gradients(model, 1.0, 1))
    model[0].weight.grad[0, :3] = float("nan")
    model[1].bias.grad[1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"in 0.weight \(3\), 1.bias \(1\); lower"):
        optimizer.step(loss=1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert optimizer.telemetry()["step"] == 1
    assert optimizer.state_dict()["param_groups"][0]["lr"] == state["param_groups"][0]["lr"]
    give(model, gradients(model, 1.0, 2))
    optimizer.step(loss=1.0)
    assert optimizer.telemetry()["step"] == 2


def test_an_anomaly_in_a_released_gradient_is_named_by_step():
    model = net()
    optimizer = AXIOM(model.parameters(), detect_anomaly=True)
    optimizer.register_hooks()
    loss = model(torch.full((2, 4), 1e30)).pow(2).sum()
    loss.backward()
    with pytest.raises(FloatingPointError, match=r"group 0, parameter 0 \(shape \(40, 4\)\)"):
        optimizer.step(loss=loss)
    loss = model(torch.ones(2, 4)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    assert optimizer.telemetry()["step"] == 1


def test_without_it_a_step_is_skipped_and_counted():
    model = net()
    optimizer = AXIOM(model.parameters())
    give(model, gradients(model, 1.0, 0))
    model[0].weight.grad[0, 0] = float("nan")
    optimizer.step(loss=1.0)
    assert optimizer.telemetry()["skipped_total"] == 1


def test_an_optimizer_that_detects_can_be_pickled_and_goes_on():
    model = net()
    optimizer = AXIOM(model.parameters(), detect_anomaly=True, max_grad_norm=1.0)
    twin, other = copy.deepcopy((model, optimizer))
    give(twin, gradients(twin, 1.0, 0))
    next(twin.parameters()).grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        other.step(loss=1.0)


def test_momentum_comes_with_what_needs_it_group_by_group():
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "snr_floor": 0.1}]
    optimizer = AXIOM([*groups, {"params": [c], "streak_boost": 1.2, "momentum": 0.5}])
    assert [g["momentum"] for g in optimizer.param_groups] == [0.0, 0.9, 0.5]


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ValueError, match=r"max_grad_norm must be in \(0, infinity\)"):
        AXIOM([nn.Parameter(torch.ones(2))], max_grad_norm=bound)


def test_cosmic_logs_a_line_a_step(tmp_path):
    import json

    from cruxy_torch import Cosmic

    model, path = net(), tmp_path / "metrics.jsonl"
    optimizer = Cosmic(model.parameters(), log_metrics=True, metrics_path=path)
    for i in range(3):
        give(model, gradients(model, 1.0, i))
        optimizer.step(loss=1.0)
    optimizer._log.flush()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
