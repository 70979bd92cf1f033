"""Gradient release in use: closures, shared and added parameters, returning, refusals."""

import copy
import io

import pytest

torch = pytest.importorskip("torch")

import torch_models as models  # noqa: E402
from cruxy_torch import CruxyOptimizer  # noqa: E402
from torch_released import OFF, released, train  # noqa: E402


class TestUse:
    def test_parameters_without_a_gradient_are_untouched(self):
        net, optimizer = released()
        net[5].requires_grad_(False)
        before = [p.detach().clone() for p in net[5].parameters()]
        train(net, optimizer, 2)
        assert all(map(torch.equal, net[5].parameters(), before))
        assert not any(p in optimizer.state for p in net[5].parameters())

    def test_shared_parameters_are_updated_once_by_their_whole_gradient(self):
        def net():
            torch.manual_seed(0)
            net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
            net[2].weight = net[0].weight
            return net

        ours, theirs = net(), net()
        optimizers = [CruxyOptimizer(n.parameters(), lr=1e-2, law=OFF) for n in (ours, theirs)]
        optimizers[0].register_hooks()
        for step in range(5):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            for n, optimizer in zip((ours, theirs), optimizers, strict=True):
                loss = n(x).square().mean()
                loss.backward()
                optimizer.step(loss=loss)
                optimizer.zero_grad()
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))

    def test_a_closure_is_a_pass(self):
        net, optimizer = released()
        other, theirs = released()
        train(other, theirs, 3)
        for step in range(3):

            def closure(step=step):
                loss = models.loss_of(net, *models.batch(step))
                loss.backward()
                return loss

            optimizer.step(closure)
        models.assert_equal(models.everything(net, optimizer), models.everything(other, theirs))

    def test_an_observed_loss_counts(self):
        net, optimizer = released()
        models.loss_of(net, *models.batch(0)).backward()
        optimizer.observe(2.5)
        optimizer.step()
        assert optimizer.telemetry()["loss"] == 2.5

    def test_a_step_without_a_pass_does_nothing(self):
        net, optimizer = released()
        train(net, optimizer, 1)
        before = models.everything(net, optimizer)
        assert optimizer.step(loss=1.0) == 1.0
        models.assert_equal(models.everything(net, optimizer), before)

    def test_an_assigned_gradient_is_used_by_step(self):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = CruxyOptimizer([p], lr=0.1)
        optimizer.register_hooks()
        p.grad = torch.ones(3)
        optimizer.step()
        assert torch.all(p < 1.0)
        assert p.grad is None

    def test_a_group_added_later_is_released_too(self):
        net = models.model()
        params = list(net.parameters())
        optimizer = CruxyOptimizer(params[:3])
        optimizer.register_hooks()
        optimizer.add_param_group({"params": params[3:]})
        models.loss_of(net, *models.batch(0)).backward()
        assert all(p.grad is None for p in params)

    def test_a_parameter_thawed_later_is_hooked_by_the_next_call(self):
        net = models.model()
        net[0].requires_grad_(False)
        optimizer = models.optimizer(net)
        optimizer.register_hooks()
        net[0].requires_grad_(True)
        models.loss_of(net, *models.batch(0)).backward()
        assert net[0].weight.grad is not None
        optimizer.step()
        optimizer.register_hooks()
        models.loss_of(net, *models.batch(1)).backward()
        assert all(p.grad is None for p in net.parameters())

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing_changes_nothing(self, reentrant):
        from torch.utils.checkpoint import checkpoint

        def steps(checkpointed):
            torch.manual_seed(0)
            layers = [torch.nn.Linear(6, 6) for _ in range(3)]
            optimizer = CruxyOptimizer([p for n in layers for p in n.parameters()], lr=1e-2)
            optimizer.register_hooks()
            for step in range(4):
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
                x.requires_grad_()
                for layer in layers:
                    x = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
                    x = x.tanh()
                loss = x.square().mean()
                loss.backward()
                optimizer.step(loss=loss)
            return [p for n in layers for p in n.parameters()]

        assert all(map(torch.equal, steps(True), steps(False)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype):
        net, plain = models.model(dtype), models.model(dtype)
        ours, theirs = models.optimizer(net, law=OFF), models.optimizer(plain, law=OFF)
        ours.register_hooks()
        train(net, ours, 5)
        train(plain, theirs, 5)
        assert all(map(torch.equal, net.parameters(), plain.parameters()))


class TestReturning:
    def test_removing_hooks_restores_ordinary_steps(self):
        net, optimizer = released(law=OFF)
        plain = models.model()
        theirs = models.optimizer(plain, law=OFF)
        train(net, optimizer, 3)
        optimizer.remove_hooks()
        models.loss_of(net, *models.batch(3)).backward()
        assert len(models.gradients(net)) == len(list(net.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        train(net, optimizer, 3, start=4)
        train(plain, theirs, 7)
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0.0, atol=7 * 16 * 2.0**-24)

    def test_removing_hooks_in_the_midst_of_a_pass_loses_nothing_but_its_measurements(self):
        net, optimizer = released()
        train(net, optimizer, 2)
        models.loss_of(net, *models.batch(2)).backward()
        optimizer.remove_hooks()
        optimizer.register_hooks()
        train(net, optimizer, 1, start=3)
        assert optimizer.telemetry()["step"] == 3

    @pytest.mark.parametrize("name", ["meta3", "meta_lion", "stability_v2"])
    def test_resume_is_bit_identical(self, name):
        net, optimizer = released(name)
        train(net, optimizer, 5)
        file = io.BytesIO()
        torch.save([net.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        train(net, optimizer, 5, start=5)
        resumed, other = released(name)
        resumed.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        train(resumed, other, 5, start=5)
        models.assert_equal(models.everything(resumed, other), models.everything(net, optimizer))

    def test_a_copy_has_no_hooks_and_steps_ordinarily(self):
        net, optimizer = released()
        train(net, optimizer, 2)
        twin, other = copy.deepcopy((net, optimizer))
        models.train(twin, other, 2, start=2)
        assert other.telemetry()["step"] == 4
        assert optimizer.telemetry()["step"] == 2


class TestRefusals:
    def test_gradient_accumulation(self):
        net, optimizer = released()
        train(net, optimizer, 1)
        models.loss_of(net, *models.batch(1)).backward()
        after_one = [p.detach().clone() for p in net.parameters()]
        with pytest.raises(RuntimeError, match=r"one backward pass a step .* call step\(\) after"):
            models.loss_of(net, *models.batch(2)).backward()
        assert all(map(torch.equal, net.parameters(), after_one))
        optimizer.step()
        train(net, optimizer, 1, start=3)
        assert optimizer.telemetry()["step"] == 3

    def test_a_grad_scaler(self):
        net, optimizer = released()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(models.loss_of(net, *models.batch(0))).backward()
        with pytest.raises(RuntimeError, match="must not be scaled while hooks are registered"):
            scaler.step(optimizer)
        assert optimizer.telemetry()["step"] == 0

    def test_sparse_gradients(self):
        embedding = torch.nn.Embedding(5, 2, sparse=True)
        optimizer = CruxyOptimizer(embedding.parameters())
        optimizer.register_hooks()
        with pytest.raises(RuntimeError, match="gradients must be dense"):
            embedding(torch.tensor([1])).sum().backward()

    def test_a_process_group(self):
        net = models.model()
        optimizer = models.optimizer(net)
        optimizer._process_group = object()
        with pytest.raises(ValueError, match="process_group must be None to release gradients"):
            optimizer.register_hooks()

    def test_a_compiled_step(self):
        optimizer = models.optimizer(models.model(), compile=True)
        with pytest.raises(ValueError, match="compile must be False to release gradients"):
            optimizer.register_hooks()
