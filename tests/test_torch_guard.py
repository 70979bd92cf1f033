"""One bad batch costs one step and nothing else, in every dtype and under loss scaling."""

import math

import pytest

torch = pytest.importorskip("torch")

import torch_models as models  # noqa: E402
from cruxy_torch import CruxyOptimizer  # noqa: E402
from cruxy_torch._native import library  # noqa: E402
from relatives import crossed  # noqa: E402
from torch_models import OPTIONS  # noqa: E402

COUNTERS = ("controller.skipped_total", "controller.skipped_in_a_row")
PATHS = {"single": {"fused": False}, "foreach": {"foreach": True}}
if library.available():
    PATHS["native"] = {"fused": True}
BAD = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf, "finite_1e30": 1e30}


def spoil(value):
    return lambda step, net: models.spoil(net, value)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "bad"), crossed(["meta3", "meta3_l2", "meta_lion", "stability_v1"], BAD)
)
def test_a_bad_gradient_changes_nothing(name, path, bad):
    net = models.model()
    optimizer = models.optimizer(net, **OPTIONS[name], **PATHS[path])
    models.train(net, optimizer, 3)
    before = models.everything(net, optimizer)
    models.train(net, optimizer, 1, start=3, damage=spoil(BAD[bad]))
    models.assert_equal(models.everything(net, optimizer), before, but=COUNTERS)
    report = optimizer.telemetry()
    assert (report["ok"], report["skipped_total"], report["skipped_in_a_row"]) == (False, 1, 1)
    models.train(net, optimizer, 1, start=4)
    after = optimizer.telemetry()
    assert (after["ok"], after["step"], after["skipped_total"]) == (True, 4, 1)
    assert after["skipped_in_a_row"] == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_the_first_step_may_be_the_bad_one(path, eps):
    net, clean = models.model(), models.model()
    optimizer = models.optimizer(net, eps=eps, **PATHS[path])
    models.train(net, optimizer, 1, damage=spoil(math.nan))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), clean.parameters(), strict=True))
    other = models.optimizer(clean, eps=eps, **PATHS[path])
    models.train(net, optimizer, 3, start=1)
    models.train(clean, other, 3, start=1)
    ours, theirs = models.everything(net, optimizer), models.everything(clean, other)
    models.assert_equal(ours, theirs, but=COUNTERS)


def test_a_hundred_bad_steps_leave_everything_as_it_was():
    net = models.model()
    optimizer = models.optimizer(net)
    models.train(net, optimizer, 2)
    before = models.everything(net, optimizer)
    models.train(net, optimizer, 100, start=2, damage=spoil(math.nan))
    models.assert_equal(models.everything(net, optimizer), before, but=COUNTERS)
    assert optimizer.telemetry()["skipped_in_a_row"] == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("path", ["single", "foreach"])
@pytest.mark.parametrize("lion", [False, True])
def test_other_dtypes_are_guarded_and_train(dtype, path, lion):
    net = models.model(dtype)
    optimizer = models.optimizer(net, use_lion=lion, **PATHS[path])
    models.train(net, optimizer, 3)
    before = models.everything(net, optimizer)
    models.train(net, optimizer, 1, start=3, damage=spoil(math.nan))
    models.assert_equal(models.everything(net, optimizer), before, but=COUNTERS)
    models.train(net, optimizer, 3, start=4)
    assert optimizer.telemetry()["ok"]
    assert not torch.equal(net[3].weight, before["param.3.weight"])
    for param, state in optimizer.state.items():
        second = torch.float64 if dtype == torch.float64 else torch.float32
        assert state["exp_avg"].dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert lion or state["exp_avg_sq"].dtype == second
        assert param.dtype == dtype


def test_mixed_dtypes_share_one_controller():
    net = models.model()
    net[0].to(torch.bfloat16)
    net[3].to(torch.float64)
    optimizer = models.optimizer(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    number = sum(p.numel() for p in net.parameters())
    assert optimizer.telemetry()["grad_norm"] == pytest.approx(math.sqrt(number), rel=1e-6)
    before = models.everything(net, optimizer)
    models.spoil(net, 1e200)
    optimizer.step()
    models.assert_equal(models.everything(net, optimizer), before, but=COUNTERS)


@pytest.mark.parametrize("lion", [False, True])
def test_large_float16_gradients_are_clipped_and_stay_finite(lion):
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.float16))
    optimizer = CruxyOptimizer([p], use_lion=lion)
    for _ in range(5):
        p.grad = torch.full_like(p, 6e4)
        optimizer.step()
    report = optimizer.telemetry()
    assert report["ok"]
    assert report["clip_scale"] < 1e-5
    assert p.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[p].values())


@pytest.mark.parametrize("value", [0.0, 1e-40])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["meta3", "stability_v2", "stability_v1"])
def test_vanishing_gradients_give_no_nan(value, path, mode):
    net = models.model()
    optimizer = models.optimizer(net, mode=mode, **PATHS[path])
    for p in net.parameters():
        p.grad = torch.full_like(p, value)
    for _ in range(12):
        optimizer.step(loss=1.0)
    models.assert_finite(models.everything(net, optimizer))


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, -2.0, 0.0, 1e30])
def test_any_loss_leaves_the_controller_finite(loss):
    net = models.model()
    optimizer = models.optimizer(net)
    models.train(net, optimizer, 3)
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.01)
    optimizer.step(loss=loss)
    models.train(net, optimizer, 2)
    assert math.isfinite(optimizer.telemetry()["curvature"])
    models.assert_finite(models.everything(net, optimizer))


class TestGradScaler:
    """`torch.amp.GradScaler` hands over `grad_scale` and `found_inf`."""

    @pytest.mark.parametrize("unscale", [False, True])
    @pytest.mark.parametrize("path", PATHS)
    def test_scaled_steps_equal_unscaled_ones(self, path, unscale):
        net, plain = models.model(), models.model()
        ours = models.optimizer(net, **PATHS[path])
        theirs = models.optimizer(plain, **PATHS[path])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(5):
            ours.zero_grad()
            loss = models.loss_of(net, *models.batch(step))
            scaler.scale(loss).backward()
            raw = [g.clone() for g in models.gradients(net)]
            if unscale:
                scaler.unscale_(ours)
            else:
                scaler.step(ours, loss=loss)
                assert all(map(torch.equal, models.gradients(net), raw))
            if unscale:
                scaler.step(ours, loss=loss)
            scaler.update()
        models.train(plain, theirs, 5)
        # The scale is a power of two, so nothing is rounded.
        models.assert_equal(models.everything(net, ours), models.everything(plain, theirs))

    @pytest.mark.parametrize("path", PATHS)
    def test_an_infinity_skips_the_step_and_lowers_the_scale(self, path):
        net = models.model()
        optimizer = models.optimizer(net, **PATHS[path])
        models.train(net, optimizer, 2)
        before = models.everything(net, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(models.loss_of(net, *models.batch(2))).backward()
        models.spoil(net, math.inf)
        scaler.step(optimizer)
        scaler.update()
        models.assert_equal(models.everything(net, optimizer), before, but=COUNTERS)
        assert scaler.get_scale() == 512.0
