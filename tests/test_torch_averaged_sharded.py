"""`averaged` under `fully_shard`: the forward pass takes what is in the parameters' place."""

import contextlib
import sys

import pytest

torch = pytest.importorskip("torch")
fsdp = pytest.importorskip("torch.distributed.fsdp")

from cruxy_torch import CruxyOptimizer, Trainer  # noqa: E402

if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no fully_shard", allow_module_level=True)


@pytest.fixture(autouse=True)
def alone():
    """One rank, which is all there are, and one thread."""
    dist, threads = torch.distributed, torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 100), torch.nn.Tanh(), torch.nn.Linear(100, 2))


def sharded(*, apart):
    """The same, of which the root owns everything, or only the last layer."""
    model = net()
    if apart:
        fsdp.fully_shard(model[0])
    return fsdp.fully_shard(model)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 6, generator=generator), torch.randn(64, 2, generator=generator)


def loss_of(model):
    x, y = data()
    return (model(x) - y).square().mean()


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step(loss=loss)
    return loss.item()


@pytest.fixture(params=[False, True], ids=["whole", "apart"])
def pair(request):
    """A model that is sharded and one that is not, with an optimizer each, after 30 steps."""
    made = []
    for model in (sharded(apart=request.param), net()):
        optimizer = CruxyOptimizer(model.parameters(), mode="self_driving")
        train(model, optimizer, 30)
        made.append((model, optimizer))
    return made


@pytest.mark.parametrize("graded", [False, True])
def test_forward_passes_see_the_average_inside_and_the_parameters_outside(pair, graded):
    seen = []
    for model, optimizer in pair:
        with contextlib.nullcontext() if graded else torch.no_grad():
            own = [loss_of(model).item()]
            with optimizer.averaged():
                own.append(loss_of(model).item())
            own.append(loss_of(model).item())
            with optimizer.averaged():
                own.append(loss_of(model).item())
        seen.append([*own, train(model, optimizer, 1), train(model, optimizer, 1)])
    ours, plain = seen
    assert ours == pytest.approx(plain, rel=1e-5)
    before, inside, after, again, first, _ = plain
    assert before == after == first
    assert inside == again
    assert before != pytest.approx(inside, rel=1e-3)


def test_what_is_read_inside_is_the_average_after_a_forward_pass_too(pair):
    (model, optimizer), (plain, other) = pair
    with torch.no_grad():
        loss_of(model)
    with optimizer.averaged(), other.averaged():
        for own, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.full_tensor().detach(), expected.detach())


def test_the_parameters_are_back_where_the_block_raises(pair):
    (model, optimizer), (plain, _) = pair
    with contextlib.suppress(KeyError), torch.no_grad(), optimizer.averaged():
        loss_of(model)
        raise KeyError
    with torch.no_grad():
        assert loss_of(model).item() == pytest.approx(loss_of(plain).item(), rel=1e-5)


def test_the_trainer_evaluates_between_steps_and_trains_as_it_does_unsharded(tmp_path):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=16)
    found = []
    for number, model in enumerate((sharded(apart=False), net())):
        trainer = Trainer(
            *(model, loader, loader),
            lambda params: CruxyOptimizer(params, mode="self_driving"),
            torch.nn.MSELoss(),
            eval_interval=5,
            checkpoint_interval=0,
            results_prefix=tmp_path / str(number),
            progress=False,
        )
        found.append(trainer.fit(20))
    ours, plain = found
    assert ours["train_losses"] == pytest.approx(plain["train_losses"], rel=1e-4)
    assert ours["val_losses"] == pytest.approx(plain["val_losses"], rel=1e-4)


def test_a_torch_that_does_not_list_its_modules_is_refused(monkeypatch):
    model = sharded(apart=False)
    optimizer = CruxyOptimizer(model.parameters(), mode="self_driving")
    train(model, optimizer, 1)
    monkeypatch.setitem(sys.modules, "torch.distributed._composable_state", None)
    refused = pytest.raises(RuntimeError, match=r"modules under fully_shard must .* use torch")
    with refused, optimizer.averaged():
        pass
    monkeypatch.undo()
    with optimizer.averaged():
        loss_of(model)
