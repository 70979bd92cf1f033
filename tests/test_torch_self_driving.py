"""`mode="self_driving"`: averages that are swapped in and always back, options, refusals."""

import copy
import math

import pytest

torch = pytest.importorskip("torch")

import torch_models as models  # noqa: E402
from cruxy_control import SelfDriving  # noqa: E402
from cruxy_torch import AXIOM, Cosmic, CruxyOptimizer  # noqa: E402


def trained(steps=5, dtype=torch.float32, **options):
    net = models.model(dtype)
    optimizer = CruxyOptimizer(net.parameters(), **{"mode": "self_driving", **options})
    models.train(net, optimizer, steps)
    return net, optimizer


def values(net):
    return [p.detach().clone() for p in net.parameters()]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_average_of_power_zero_is_the_mean_of_the_iterates():
    net = models.model()
    optimizer = CruxyOptimizer(net.parameters(), mode="self_driving", averaging=0.0)
    seen = []
    for step in range(6):
        models.train(net, optimizer, 1, start=step)
        seen.append(values(net))
    with optimizer.averaged():
        for p, *iterates in zip(net.parameters(), *seen, strict=True):
            torch.testing.assert_close(p.detach(), torch.stack(iterates).mean(0))


def test_parameters_come_back_whatever_happens_inside():
    net, optimizer = trained()
    before = values(net)
    with optimizer.averaged():
        assert any((a != b).any() for a, b in zip(values(net), before, strict=True))
    assert_equal(values(net), before)
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert_equal(values(net), before)


def test_step_and_nesting_are_refused_inside():
    net, optimizer = trained()
    before = values(net)
    with optimizer.averaged():
        with pytest.raises(RuntimeError, match="must not be called inside averaged"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="must not be nested"), optimizer.averaged():
            pass
    assert_equal(values(net), before)
    optimizer.step()


def test_average_is_float32_beside_half_precision_parameters():
    net, optimizer = trained(dtype=torch.bfloat16)
    assert {state["average"].dtype for state in optimizer.state.values()} == {torch.float32}
    with optimizer.averaged():
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


def test_group_may_keep_no_average_and_a_limit_of_its_own():
    net = models.model()
    first, *rest = net.parameters()
    groups = [{"params": [first], "averaging": None, "relative_limit": None}, {"params": rest}]
    optimizer = CruxyOptimizer(groups, mode="self_driving", lr=10.0)
    models.train(net, optimizer, 1)
    assert "average" not in optimizer.state[first]
    assert all("average" in optimizer.state[p] for p in rest)
    assert optimizer.telemetry()["learning_rate"] == 10.0
    models.train(net, optimizer, 1, start=1)
    # The group without a limit took the whole rate, so nothing is taken back.
    assert optimizer.telemetry()["meta_scale"] > 0.1


def test_start_that_is_far_too_high_is_taken_back_after_one_step():
    net = models.model()
    optimizer = CruxyOptimizer(net.parameters(), mode="self_driving", lr=1e3, weight_decay=0.0)
    before = values(net)
    models.train(net, optimizer, 1)
    for a, b in zip(values(net), before, strict=True):
        if a.numel():
            size = max(b.square().mean().sqrt().item(), 0.01)
            assert (a - b).abs().max().item() <= 0.1 * size * 1.05
    models.train(net, optimizer, 1, start=1)
    whole = torch.cat([p.reshape(-1) for p in before]).square().mean().sqrt()
    assert optimizer.telemetry()["learning_rate"] <= 0.1 * whole * math.e


def test_limit_looks_at_the_parameters_of_all_groups_together():
    nets = [models.model() for _ in range(2)]
    first, *rest = nets[0].parameters()
    split = CruxyOptimizer([{"params": [first]}, {"params": rest}], mode="self_driving", lr=1e3)
    together = CruxyOptimizer(nets[1].parameters(), mode="self_driving", lr=1e3)
    for net, optimizer in zip(nets, (split, together), strict=True):
        models.train(net, optimizer, 3)
    for a, b in zip(values(nets[0]), values(nets[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_defaults_follow_the_mode():
    params = [torch.nn.Parameter(torch.ones(2))]
    driving = CruxyOptimizer(params, mode="self_driving").param_groups[0]
    assert (driving["betas"], driving["averaging"]) == ((0.9, 0.99), 16.0)
    lion = CruxyOptimizer(params, law=SelfDriving(), use_lion=True).param_groups[0]
    assert lion["betas"] == (0.9, 0.95)
    plain = CruxyOptimizer(params).param_groups[0]
    assert (plain["betas"], plain["averaging"]) == ((0.9, 0.999), None)


def test_what_does_not_fit_is_refused_at_the_door():
    params = [torch.nn.Parameter(torch.ones(300))]
    with pytest.raises(ValueError, match=r"relative_limit must be in \(0, infinity\), got 0"):
        CruxyOptimizer(params, relative_limit=0.0)
    with pytest.raises(ValueError, match=r"averaging must be in \[0, infinity\), got -1"):
        CruxyOptimizer(params, averaging=-1.0)
    with (
        pytest.raises(ValueError, match="every group has averaging=None"),
        CruxyOptimizer(params).averaged(),
    ):
        pass
    with pytest.raises(ValueError, match="to release gradients: its law compares"):
        CruxyOptimizer(params, mode="self_driving").register_hooks()
    for make in (AXIOM, Cosmic):
        with pytest.raises(ValueError, match="must not steer by the first moment"):
            make(params, law=SelfDriving())


def test_copies_and_pickles_keep_averages_and_go_on_alike():
    net, optimizer = trained()
    other_net, other = copy.deepcopy((net, optimizer))
    for pair in ((net, optimizer), (other_net, other)):
        models.train(*pair, 3, start=5)
    with optimizer.averaged(), other.averaged():
        assert_equal(values(net), values(other_net))


def test_sixteen_bits_and_codes_are_sensed_as_what_they_stand_for():
    torch.manual_seed(0)
    start, shown = torch.randn(64, 128), {}
    for bits in (32, 16, 8):
        p = torch.nn.Parameter(start.clone())
        optimizer = CruxyOptimizer([p], mode="self_driving", lr=1e-4, state_bits=bits)
        for _ in range(3):
            p.grad = start + 0.5
            optimizer.step()
        shown[bits] = optimizer.telemetry()["alignment"]
    assert shown[32] == pytest.approx(1.0, abs=1e-5)
    assert shown[16] == pytest.approx(1.0, abs=1e-4)
    assert shown[8] == pytest.approx(1.0, abs=2e-3)
