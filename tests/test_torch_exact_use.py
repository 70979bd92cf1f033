"""Exact training in use: the example, two processes, optimizers beside torch's, compiling."""

import dataclasses
import importlib
import os
import socket
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from cruxy_control import PlateauGuard, SelfDriving, StabilityV2  # noqa: E402
from cruxy_exact import verify as check  # noqa: E402
from cruxy_exact.reference import Reference  # noqa: E402
from cruxy_torch import CruxyOptimizer, exact, use_backend  # noqa: E402
from exact_models import batch, model, reference_state  # noqa: E402

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = Reference(width=16, heads=2, blocks=1, length=8, batch=4, vocabulary=16, grain=1)


@pytest.fixture
def example(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("exact_training")
    return lambda *arguments: module.main(list(arguments))


def test_the_example_stops_and_goes_on_with_the_same_bits(example, tmp_path):
    run = str(tmp_path / "run.npz")
    example("--model", "vit", "--steps", "2", "--save", run)
    resumed = example("--model", "vit", "--steps", "3", "--load", run, "--micro-batches", "4")
    assert resumed == example("--model", "vit", "--steps", "3")


def test_the_example_trains_the_reference(example):
    wanted = {k: torch.from_numpy(p) for k, p in reference_state(Reference(grain=1), 1).items()}
    assert example("--steps", "1") == exact.checksum(wanted, grain=1)


def worker(rank, port, folder):
    """Two steps: grains spread over processes, and one grain a process by DDP's hook."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    ours = model(SMALL)
    optimizer, grains = exact.AdamW(ours.parameters(), lr=SMALL.lr), exact.GrainAccumulator(ours)
    for step in range(2):
        x, y = batch(SMALL, step)
        for i in range(SMALL.batch)[rank::2]:
            exact.set_step(ours, step, i)
            exact.cross_entropy(ours(x[i : i + 1]), y[i : i + 1]).backward()
            grains.add()
        grains.finish(SMALL.batch * SMALL.length)
        exact.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    inside = model(SMALL).eval()
    wrapped = DistributedDataParallel(inside)
    wrapped.register_comm_hook(None, exact.ddp_hook)
    x, y = batch(SMALL, 0)
    part = slice(2 * rank, 2 * rank + 2)
    exact.cross_entropy(wrapped(x[part]), y[part]).backward()
    gradients = {name: p.grad for name, p in inside.named_parameters()}
    torch.save({"grains": ours.named(), "ddp": gradients}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
class TestTwoProcesses:
    def test_grains_over_two_processes_have_the_bits_of_one(self, processes):
        wanted = reference_state(SMALL, 2)
        for rank in processes:
            assert all(
                torch.equal(rank["grains"][k], torch.from_numpy(p)) for k, p in wanted.items()
            )

    def test_the_hook_of_ddp_adds_the_processes_exactly(self, processes):
        alone = model(SMALL).eval()
        grains = exact.GrainAccumulator(alone)
        x, y = batch(SMALL, 0)
        for part in (slice(2, 4), slice(0, 2)):
            exact.cross_entropy(alone(x[part]), y[part]).backward()
            grains.add()
        grains.finish()
        for rank in processes:
            assert all(torch.equal(rank["ddp"][k], p.grad) for k, p in alone.named_parameters())


class Lion(torch.optim.Optimizer):
    """Lion as its paper has it, in whatever the parameters are."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                (b1, b2), g = group["betas"], p.grad
                u = (b1 * m + (1 - b1) * g).sign() + group["weight_decay"] * p
                p -= group["lr"] * u
                m.mul_(b2).add_(g, alpha=1 - b2)


PAIRS = {
    "adamw": (exact.AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "lion": (exact.Lion, Lion, {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    "sgd": (exact.SGD, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
    "momentum": (exact.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_an_exact_optimizer_follows_torchs_in_float64(name):
    ours, theirs, options = PAIRS[name]
    start = torch.randn(30, generator=torch.Generator().manual_seed(0))
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    pair = ours([p], **options), theirs([q], **options)
    for step in range(20):
        g = torch.randn(30, generator=torch.Generator().manual_seed(step + 1))
        p.grad, q.grad = g, g.double()
        for optimizer in pair:
            optimizer.step()
    assert torch.allclose(p.double(), q, rtol=0, atol=20 * 2.0**-22)


def controlled(backend, steps=4, resume=False, law=None):
    """The checksum after some steps, one of which has a gradient that is not finite."""
    net = model(SMALL).eval()
    if isinstance(law, SelfDriving | PlateauGuard):
        make = lambda: exact.SelfDriving(net.parameters(), law=law)  # noqa: E731
    else:
        make = lambda: exact.Controlled(net.parameters(), lr=1e-2, law=law)  # noqa: E731
    optimizer = make()
    with use_backend(backend):
        for step in range(steps):
            if resume and step == 2:
                saved = optimizer.state_dict()
                optimizer = make()
                optimizer.load_state_dict(saved)
            x, y = batch(SMALL, step)
            optimizer.zero_grad()
            loss = exact.cross_entropy(net(x), y)
            loss.backward()
            if step == 1:
                next(net.parameters()).grad[0, 0] = float("nan")
            optimizer.step(loss=loss.detach())
    averages = [s["average"] for s in optimizer.state.values() if "average" in s]
    return exact.checksum({**net.state_dict(), "averages": averages})


GUARDED = PlateauGuard(SelfDriving(), patience=1, loss_decay=0.0)


@pytest.mark.parametrize(
    "law",
    [
        None,
        pytest.param(StabilityV2(), marks=pytest.mark.slow),
        pytest.param(SelfDriving(total_steps=5), marks=pytest.mark.slow),
        GUARDED,
    ],
)
def test_a_law_has_the_same_bits_with_and_without_c_kernels_and_after_a_stop(law):
    found = {controlled("auto", law=law), controlled("reference", law=law)}
    found.add(controlled("auto", resume=True, law=law))
    assert len(found) == 1


def test_meta3_moves_nothing_where_the_first_gradient_is_not_finite():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = exact.Controlled([p])
    p.grad = torch.tensor([1.0, float("inf")])
    optimizer.step()
    assert p.tolist() == [1.0, 1.0]


def self_driving(make, steps=40):
    """What parameters and averages come to on a noisy quadratic, from a step far too small."""
    random = torch.Generator().manual_seed(0)
    p = [torch.nn.Parameter(torch.randn(n, generator=random)) for n in (30, 7)]
    optimizer = make(p)
    for _ in range(steps):
        for x in p:
            x.grad = (x.detach() - 1.0) + 0.5 * torch.randn(len(x), generator=random)
        optimizer.step(loss=torch.tensor(1.0))
    with optimizer.averaged():
        averages = [x.detach().clone() for x in p]
    return torch.cat([x.detach() for x in (*p, *averages)])


@pytest.mark.parametrize("steps", [{}, {"total_steps": 40}])
def test_an_exact_self_driving_run_follows_a_plain_one(steps):
    """The law amplifies roundings: its integral has a gain of up to 1 a step."""
    ours = self_driving(lambda p: exact.SelfDriving(p, **steps))
    theirs = self_driving(
        lambda p: CruxyOptimizer(p, mode="self_driving", weight_decay=1e-4, **steps)
    )
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "order", [pytest.param([0, 1, 2, 3], marks=pytest.mark.slow), [2, 0, 3, 1]]
)
def test_a_self_driving_run_by_grains_has_the_bits_of_numpy(order):
    reference = dataclasses.replace(SMALL, driver=check.self_driving())
    net = model(reference)
    optimizer, grains = exact.SelfDriving(net.parameters()), exact.GrainAccumulator(net)
    for step in range(2):
        x, y = batch(reference, step)
        for i in order:
            exact.set_step(net, step, i)
            loss = exact.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
            loss.backward()
            grains.add(loss)
        loss = grains.finish(reference.batch * reference.length)
        optimizer.step(loss=loss)
        optimizer.zero_grad()
    wanted = reference_state(reference, 2)
    assert all(torch.equal(p, torch.from_numpy(wanted[k])) for k, p in net.named().items())


def test_no_tensor_moves_by_more_than_the_relative_limit():
    p = torch.nn.Parameter(torch.full((4,), 2.0))
    optimizer = exact.Controlled([p], lr=100.0, weight_decay=0.0, relative_limit=0.1)
    p.grad = torch.ones(4)
    optimizer.step()
    assert torch.allclose(p.detach(), torch.full((4,), 1.8 + 0.05), atol=1e-5)


def test_averages_are_in_place_inside_their_block_alone():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = exact.Controlled([p], lr=0.5, averaging=0.0)
    for _ in range(2):
        p.grad = torch.ones(2)
        optimizer.step()
    after = p.detach().clone()
    with optimizer.averaged():
        assert not torch.equal(p, after)
        with pytest.raises(RuntimeError, match="inside averaged"):
            optimizer.step()
    assert torch.equal(p, after)


def test_the_order_of_the_parameters_is_no_part_of_the_bits():
    def trained(order):
        p = [torch.nn.Parameter(torch.full((n,), 0.1 * n)) for n in (3, 5, 11, 2, 6)]
        optimizer = exact.SelfDriving([p[i] for i in order])
        for step in range(6):
            for x in p:
                x.grad = torch.linspace(-1.0, 2.0, len(x)) / (1 + step)
            optimizer.step()
        return torch.cat([x.detach() for x in p])

    assert torch.equal(trained(range(5)), trained([3, 1, 4, 0, 2]))


@pytest.mark.parametrize(
    ("make", "options"),
    [(exact.AdamW, {"lr": -1.0}), (exact.AdamW, {"betas": (1.0, 0.9)}), (exact.Lion, {"lr": -1.0}),
     (exact.SGD, {"nesterov": True}), (exact.Controlled, {"weight_decay": -1.0}),
     (exact.Controlled, {"lr": 0.0, "law": SelfDriving()}),
     (exact.SelfDriving, {"averaging": -1.0}), (exact.SelfDriving, {"relative_limit": 0.0})],
)  # fmt: skip
def test_a_number_out_of_its_range_is_an_error(make, options):
    with pytest.raises(ValueError, match=r"(must be|needs)"):
        make([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.slow
@pytest.mark.parametrize("function", [exact.gelu, exact.silu, exact.softmax])
def test_a_compiled_function_has_the_same_bits(function):
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.compile(function)(x), function(x))
