"""Gradient release: parameters move inside `backward`, with the controls of the last step."""

import gc
import math
import weakref

import pytest

torch = pytest.importorskip("torch")

import torch_models as models  # noqa: E402
from cruxy_control import Meta3, Signals, StabilityV2, betas  # noqa: E402
from cruxy_control.controls import clip_scale, neutral  # noqa: E402
from cruxy_torch import CruxyOptimizer  # noqa: E402
from relatives import crossed  # noqa: E402
from torch_models import OPTIONS  # noqa: E402
from torch_released import COUNTERS, OFF, PATHS, released, train  # noqa: E402

CHANGES = [
    name for name in OPTIONS if not name.startswith(("stability", "self_driving", "meta3_gamma"))
]
"""The options of the update; those of the law make no difference while it is off."""

EVERY = crossed(CHANGES, PATHS)


class TestControllerOff:
    @pytest.mark.parametrize(("name", "path"), EVERY)
    def test_fifty_released_steps_equal_fifty_ordinary_ones(self, name, path):
        options = {**OPTIONS[name], "law": OFF, **PATHS[path]}
        net, plain = models.model(), models.model()
        ours, theirs = models.optimizer(net, **options), models.optimizer(plain, **options)
        ours.register_hooks()
        train(net, ours, 50)
        train(plain, theirs, 50)
        # The same arithmetic on each tensor; but foreach calls round otherwise, which may turn a
        # sign of Lion's.
        foreach, lion = path == "foreach", name.startswith("meta_lion")
        roundings = 50 * 16 * 2.0**-24 if foreach else 0.0
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            apart = ((p - q).abs() > roundings).sum()
            assert apart <= (0.02 * p.numel() + 1 if foreach and lion else 0)

    def test_what_the_law_measures_is_what_it_measures_ordinarily(self):
        net, optimizer = released(law=OFF)
        plain = models.model()
        theirs = models.optimizer(plain, law=OFF)
        train(net, optimizer, 20)
        train(plain, theirs, 20)
        ours, other = optimizer.telemetry(), theirs.telemetry()
        for name in ("grad_norm", "gamma_norm", "loss", "curvature", "phase", "step"):
            # Sums of six tensors in another order, over twenty steps.
            assert ours[name] == pytest.approx(other[name], rel=20 * 8 * 2.0**-24)


def lagged(net, law, lr, steps, *, b1=0.9, b2=0.999, weight_decay=0.01):
    """Adam under the law of the step before: the readable reference in float64.

    The rate, both betas and the clipping threshold are those the law ordered at the end of the
    previous step, and at first nothing; each tensor is clipped by its own norm.
    """
    state = law.init(torch.zeros(()), xp=torch)
    controls = neutral(torch.tensor(True), xp=torch)
    moments = {p: [torch.zeros_like(p), torch.zeros_like(p), 1.0, 1.0] for p in net.parameters()}
    for step in range(steps):
        loss = models.loss_of(net, *models.batch(step, torch.float64))
        grads = torch.autograd.grad(loss, list(net.parameters()))
        beta1, beta2 = (float(b) for b in betas(controls, b1, b2, xp=torch))
        rate = lr * float(controls.meta_scale) * float(controls.phase_scale)
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                m = moments[p]
                x = g * float(clip_scale(controls.clip_threshold, g.norm(), xp=torch))
                m[0] = beta1 * m[0] + (1 - beta1) * x
                m[1] = beta2 * m[1] + (1 - beta2) * x * x
                m[2], m[3] = m[2] * beta1, m[3] * beta2
                u = (beta1 * m[0] + (1 - beta1) * x) / (1 - m[2] * beta1)
                u = u / ((m[1] / (1 - m[3])).sqrt() + 1e-8)
                p -= rate * (u + weight_decay * p)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        sigma = sum(float(g.abs().pow(law.gamma).sum()) for g in grads) ** (1 / law.gamma)
        measured = (
            torch.tensor(float(x), dtype=torch.float32) for x in (norm, sigma, loss.detach())
        )
        state, controls = law.step(state, Signals(*measured), xp=torch)


class TestControllerOn:
    @pytest.mark.parametrize("law", [Meta3(), Meta3(clip_threshold=0.05), StabilityV2()])
    def test_the_only_difference_is_a_lag_of_one_step(self, law):
        steps, lr = 40, 1e-2
        net, reference = models.model(), models.model(dtype=torch.float64)
        optimizer = models.optimizer(net, law=law, lr=lr)
        optimizer.register_hooks()
        train(net, optimizer, steps)
        lagged(reference, law, lr, steps)
        # Each step adds a few roundings of float32 to values of order one; Adam's quotient passes
        # a relative error of a moment on to an update of at most `lr`, forty times.
        allowed = steps * 64 * 2.0**-24
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.double(), q, rtol=0.0, atol=allowed)

    def test_without_the_lag_the_reference_is_another(self):
        """The test above can tell: ordinary steps are not within its tolerance."""
        net, reference = models.model(), models.model(dtype=torch.float64)
        train(net, models.optimizer(net), 40)
        lagged(reference, Meta3(), 1e-2, 40)
        pairs = zip(net.parameters(), reference.parameters(), strict=True)
        assert max((p - q).abs().max() for p, q in pairs if p.numel()) > 40 * 64 * 2.0**-24

    def test_the_first_pass_obeys_no_orders(self):
        net, optimizer = released()
        train(net, optimizer, 1)
        report = optimizer.telemetry()
        assert report["learning_rate"] == pytest.approx(1e-2)
        assert (report["beta1"], report["beta2"]) == pytest.approx((0.9, 0.999))
        train(net, optimizer, 1, start=1)
        assert optimizer.telemetry()["learning_rate"] < 0.9e-2

    def test_hooks_begin_with_the_orders_of_the_last_ordinary_step(self):
        net = models.model()
        optimizer = models.optimizer(net)
        train(net, optimizer, 5)
        throttled = 1e-2 * (1 - 0.5 * optimizer.telemetry()["phase"])
        optimizer.register_hooks()
        train(net, optimizer, 1, start=5)
        assert optimizer.telemetry()["learning_rate"] == pytest.approx(throttled, rel=1e-6)

    def test_a_schedule_and_groups_count(self):
        net = models.model()
        params = list(net.parameters())
        groups = [{"params": params[:2], "lr": 0.0}, {"params": params[2:], "use_lion": True}]
        optimizer = CruxyOptimizer(groups, lr=1e-3)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=1)
        optimizer.register_hooks()
        before = [p.detach().clone() for p in params]
        train(net, optimizer, 1)
        schedule.step()
        train(net, optimizer, 1, start=1)
        assert all(map(torch.equal, params[:2], before[:2]))
        moved = (params[2] - before[2]).abs().max()
        assert 0 < moved <= 1.6e-3


class TestMemory:
    def live(self, net, optimizer):
        """The most bytes of `.grad` alive at any time of a backward pass, and at its end."""
        most = 0

        def look(_):
            nonlocal most
            alive = [p.grad for p in net.parameters() if p.grad is not None]
            most = max(most, sum(g.numel() * g.element_size() for g in alive))

        # Registered first, so that it runs before the gradient is freed.
        handles = [p.register_post_accumulate_grad_hook(look) for p in net.parameters()]
        optimizer.register_hooks()
        loss = models.loss_of(net, *models.batch(0))
        loss.backward()
        left = [p for p in net.parameters() if p.grad is not None]
        optimizer.step(loss=loss)
        for handle in handles:
            handle.remove()
        return most, left

    def test_no_more_than_one_gradient_is_alive(self):
        net = models.model()
        most, left = self.live(net, models.optimizer(net))
        assert most == max(p.numel() * p.element_size() for p in net.parameters())
        assert left == []

    def test_hooks_do_not_keep_the_optimizer_alive(self):
        net, optimizer = released()
        train(net, optimizer, 1)
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None
        models.loss_of(net, *models.batch(1)).backward()
        assert all(p.grad is not None for p in net.parameters())


class TestGuard:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
    def test_a_bad_tensor_stays_as_it_was_and_the_step_counts_as_skipped(self, path, bad):
        net, optimizer = released(**PATHS[path])
        train(net, optimizer, 3)
        before = models.everything(net, optimizer)
        spoiled = net[0].bias
        index = next(i for i, p in enumerate(optimizer.state) if p is spoiled)
        handle = spoiled.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), bad))
        train(net, optimizer, 1, start=3)
        handle.remove()
        after = models.everything(net, optimizer)
        still = {key for key in before if torch.equal(after[key], before[key])}
        ours = {key for key in before if key.startswith((f"{index}.", "param.0.bias"))}
        law = {key for key in before if key.startswith("controller")} - set(COUNTERS)
        assert ours | law <= still
        assert {key for key in before if key.startswith("param.")} & still == {
            "param.0.bias",
            "param.empty",
        }
        report = optimizer.telemetry()
        assert (report["ok"], report["skipped_total"], report["step"]) == (False, 1, 3)
        train(net, optimizer, 2, start=4)
        report = optimizer.telemetry()
        assert (report["ok"], report["skipped_in_a_row"], report["step"]) == (True, 0, 5)
        models.assert_finite(models.everything(net, optimizer))

    def test_a_spike_in_one_tensor_is_clipped_at_once(self):
        """The threshold is the last step's, the norm this step's."""
        law = Meta3(clip_threshold=0.01)
        net, calm = models.model(), models.model()
        ours, theirs = (models.optimizer(n, law=law, use_lion=False) for n in (net, calm))
        for optimizer in (ours, theirs):
            optimizer.register_hooks()
        train(net, ours, 3)
        train(calm, theirs, 3)
        net[0].bias.register_hook(lambda g: g * 1e6)
        train(net, ours, 1, start=3)
        train(calm, theirs, 1, start=3)
        # Clipped to the same norm in the same direction, the gradient is the same to rounding.
        moments = [o.state[n[0].bias]["exp_avg"] for o, n in ((ours, net), (theirs, calm))]
        torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-8)
