"""`torch.compile` around the step and inside it."""

import pytest

torch = pytest.importorskip("torch")

import torch_models as models  # noqa: E402
from cruxy_torch._native import library  # noqa: E402

BUILT = (
    pytest.mark.slow,
    pytest.mark.skipif(not library.available(), reason="torch.compile needs a C compiler too"),
)
STEPS = 12


def built(test):
    """A test of what Inductor builds."""
    for mark in BUILT:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def assert_close(ours, theirs):
    """Parameters, moments and the controller after the same training."""
    ours, theirs = (models.everything(*pair) for pair in (ours, theirs))
    for key, value in theirs.items():
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        allowed = STEPS * 32 * 2.0**-24 * scale
        torch.testing.assert_close(ours[key], value, rtol=0.0, atol=allowed, msg=key)


def plainly(**options):
    net = models.model()
    optimizer = models.optimizer(net, **options, fused=False)
    models.train(net, optimizer, STEPS)
    return net, optimizer


def compiled(backend, **options):
    net = models.model()
    optimizer = models.optimizer(net, **options)

    @torch.compile(fullgraph=True, backend=backend)
    def step(loss):
        optimizer.step(loss=loss)

    for index in range(STEPS):
        optimizer.zero_grad()
        loss = models.loss_of(net, *models.batch(index))
        loss.backward()
        step(loss.detach())
    return net, optimizer


@pytest.mark.parametrize(
    ("name", "backend"),
    [("meta_lion_centralized", "eager"), ("self_driving", "eager")]
    + [
        pytest.param(name, "inductor", marks=BUILT)
        for name in ("meta3", "meta_lion_centralized", "self_driving", "stability_v2")
    ],
)
def test_a_compiled_step_has_no_graph_break_and_one_graph(name, backend):
    options = models.OPTIONS[name]
    ours = compiled(backend, **{**options, "lr": torch.tensor(1e-3)})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_close(ours, plainly(**{**options, "lr": 1e-3}))


@built
def test_compile_true_follows_a_schedule_without_compiling_again():
    net = models.model()
    optimizer = models.optimizer(net, compile=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(STEPS):
        models.train(net, optimizer, 1, start=step)
        schedule.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    other = models.model()
    plain = models.optimizer(other, fused=False)
    schedule = torch.optim.lr_scheduler.ExponentialLR(plain, 0.9)
    for step in range(STEPS):
        models.train(other, plain, 1, start=step)
        schedule.step()
    assert_close((net, optimizer), (other, plain))


@built
def test_compile_true_is_guarded():
    net = models.model()
    optimizer = models.optimizer(net, compile=True)
    models.train(net, optimizer, 2)
    before = models.everything(net, optimizer)

    def damage(step, net):
        models.spoil(net, float("nan"))

    models.train(net, optimizer, 1, start=2, damage=damage)
    counters = ("controller.skipped_total", "controller.skipped_in_a_row")
    models.assert_equal(models.everything(net, optimizer), before, but=counters)


@built
def test_foreach_compiles_too():
    assert_close(compiled("inductor", foreach=True, lr=torch.tensor(1e-2)), plainly())
