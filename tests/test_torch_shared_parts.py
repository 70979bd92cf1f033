"""What the one frame of an update gives to every optimizer: averages, limits, laws, telemetry."""

import pytest

torch = pytest.importorskip("torch")

from cruxy_control import SelfDriving  # noqa: E402
from cruxy_control.controls import DRIVEN  # noqa: E402
from cruxy_torch import AXIOM, Cosmic, CruxyOptimizer, state_bytes  # noqa: E402
from torch_low_bit import parameters, train  # noqa: E402

SHAPES = ((64, 64), (33,), ())
BUDGET = 90_000

OPTIMIZERS = {
    "cruxy": CruxyOptimizer,
    "axiom": AXIOM,
    "axiom_momentum": lambda params, **options: AXIOM(params, momentum=0.9, **options),
    "cosmic": lambda params, **options: Cosmic(
        params, state_budget=BUDGET, retier_every=2, **options
    ),
    "cosmic_small": lambda params, **options: Cosmic(params, state_budget=25_000, **options),
}
every_optimizer = pytest.mark.parametrize("name", list(OPTIMIZERS))


def made(name, **options):
    params = parameters(*SHAPES)
    return params, OPTIMIZERS[name](params, lr=1e-2, weight_decay=0.0, **options)


@every_optimizer
def test_the_average_is_the_mean_of_the_iterates_at_power_0(name):
    params, optimizer = made(name, averaging=0.0)
    mean = [torch.zeros_like(p) for p in params]
    for step in range(5):
        train(params, optimizer, 1, start=step)
        mean = [m + (p.detach() - m) / (step + 1) for m, p in zip(mean, params, strict=True)]
    before = [p.detach().clone() for p in params]
    with optimizer.averaged():
        for p, m in zip(params, mean, strict=True):
            torch.testing.assert_close(p.detach(), m, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@every_optimizer
def test_an_average_changes_no_step(name):
    params, optimizer = made(name)
    averaged, other = made(name, averaging=16.0)
    train(params, optimizer, 3)
    train(averaged, other, 3)
    if name != "cosmic_small":  # where the average takes from the budget
        assert all(torch.equal(p, q) for p, q in zip(params, averaged, strict=True))


@every_optimizer
def test_no_tensor_moves_by_more_than_its_limit(name):
    params, optimizer = made(name, relative_limit=1e-3)
    sizes = [p.detach().square().mean().sqrt() for p in params]
    whole = torch.cat([p.detach().reshape(-1) for p in params]).square().mean().sqrt()
    before = [p.detach().clone() for p in params]
    train(params, optimizer, 1)
    for p, old, size in zip(params, before, sizes, strict=True):
        moved = (p - old).square().mean().sqrt()
        assert 0.0 < moved <= 1.01e-3 * max(min(size, whole), 0.01)


@every_optimizer
def test_a_limit_that_never_binds_changes_no_bit(name):
    params, optimizer = made(name)
    limited, other = made(name, relative_limit=1e6)
    train(params, optimizer, 3)
    train(limited, other, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, limited, strict=True))


@every_optimizer
def test_an_average_is_saved_and_loaded(name):
    params, optimizer = made(name, averaging=4.0, relative_limit=0.05)
    train(params, optimizer, 4)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = OPTIMIZERS[name](twin, averaging=4.0)
    other.load_state_dict(optimizer.state_dict())
    train(params, optimizer, 3, start=4)
    train(twin, other, 3, start=4)
    for p, q in zip(params, twin, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["average"], other.state[q]["average"])


@pytest.mark.parametrize("name", ["cosmic", "cosmic_small"])
def test_averages_count_in_the_budget(name):
    params, optimizer = made(name, averaging=16.0)
    budget = optimizer._budget
    for step in range(6):
        train(params, optimizer, 1, start=step)
        assert state_bytes(optimizer) <= budget
    assert all(optimizer.state[p]["average"].numel() == p.numel() for p in params)


def test_a_budget_below_the_averages_is_refused():
    params, optimizer = made("cosmic_small", averaging=16.0)
    small = Cosmic(params, state_budget=10_000, averaging=16.0)
    train(params, optimizer, 1)
    with pytest.raises(ValueError, match="state_budget must be at least"):
        train(params, small, 1)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_axiom_drives_itself_where_it_has_momentum(bits):
    p = torch.nn.Parameter(torch.full((64, 64), 3.0))
    optimizer = AXIOM(
        [p], lr=1e-4, weight_decay=0.0, momentum=0.9, momentum_bits=bits, law=SelfDriving(),
        relative_limit=0.1, averaging=16.0,
    )  # fmt: skip
    for _ in range(150):
        optimizer.zero_grad()
        loss = ((p - 1.0) ** 2).mean()
        loss.backward()
        optimizer.step(loss=loss)
    with optimizer.averaged():
        assert abs(p.detach().mean() - 1.0) < 0.1
    assert optimizer.telemetry()["meta_scale"] > 10.0


def test_axiom_without_momentum_cannot_drive_itself():
    with pytest.raises(ValueError, match="AXIOM keeps none without momentum, got SelfDriving"):
        made("axiom", law=SelfDriving())
    _, optimizer = made("axiom_momentum", law=SelfDriving())
    with pytest.raises(ValueError, match=r"set momentum=0\.9, or use Meta3\(\)"):
        optimizer.add_param_group({"params": parameters((3,)), "momentum": 0.0})
    assert len(optimizer.param_groups) == 1


def test_axiom_cannot_start_its_search_at_0():
    with pytest.raises(ValueError, match="lr must be above 0 under a law that finds the rate"):
        AXIOM(parameters((3,)), lr=0.0, momentum=0.9, law=SelfDriving())


def test_cosmic_cannot_drive_itself():
    with pytest.raises(ValueError, match="which Cosmic keeps of some tensors only and may drop"):
        made("cosmic", law=SelfDriving())


@every_optimizer
def test_telemetry_leaves_out_what_there_is_not(name):
    params, optimizer = made(name)
    train(params, optimizer, 1)
    seen = optimizer.telemetry()
    assert "alignment" not in seen
    assert ("beta1" in seen) == ("beta2" in seen) == (not name.startswith("axiom"))


def test_telemetry_of_a_law_has_what_that_law_decides():
    law_of = {mode: CruxyOptimizer(parameters((3,)), mode=mode).telemetry() for mode in (
        "stability_v1", "stability_v2", "meta3", "self_driving",
    )}  # fmt: skip
    assert {"curvature", "warning", "clip_threshold", "alignment"}.isdisjoint(
        law_of["stability_v1"]
    )
    assert "alignment" in law_of["self_driving"]
    assert law_of["meta3"].keys() == law_of["stability_v2"].keys()
    assert law_of["self_driving"].keys() - law_of["meta3"].keys() == {"alignment", *DRIVEN}
