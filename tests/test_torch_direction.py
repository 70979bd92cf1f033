"""A direction that this library does not have, written as a user would: all the rest works with it.

It is that of the page "Write a direction of your own".
"""

import copy
import inspect
import io
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from cruxy_control import SelfDriving  # noqa: E402
from cruxy_torch import CruxyOptimizer, Direction, _blocks, state_bytes  # noqa: E402
from torch_low_bit import gradients, parameters, state_of, train  # noqa: E402
from torch_released import OFF  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "direction.md"


class SignBlend(Direction):
    """Half the sign of the momentum, half the momentum at a root mean square of 1."""

    moments = ("exp_avg",)

    def blocks(self, tensor, factors, orders):
        squares = 0.0
        for i in range(tensor.blocks):
            m, beta1 = tensor.read("exp_avg", i), orders.beta1
            m = beta1 * m + (1.0 - beta1) * tensor.gradient(i)
            tensor.write("exp_avg", i, m)
            squares = squares + m.square().sum()
        rms = (tensor.total(squares) / max(1, tensor.numel)).sqrt() + 1e-12

        def block(i):
            m = tensor.read("exp_avg", i)
            return m.sign() / 2 + m / rms / 2

        return block


LAWS = {"meta3": {}, "self_driving": {"mode": "self_driving"}}
every_law = pytest.mark.parametrize("law", list(LAWS))
SHAPES = ((96, 64), (33,), ())


def made(law="meta3", params=None, law_of_its_own=None, **options):
    params = parameters(*SHAPES) if params is None else params
    options |= LAWS[law] | {"law": law_of_its_own, "direction": SignBlend()}
    return params, CruxyOptimizer(params, lr=1e-3, **options)


def test_the_page_has_this_direction():
    source = inspect.getsource(SignBlend).replace("(Direction)", "(cruxy_torch.Direction)")
    assert source in PAGE.read_text()


@every_law
def test_it_is_stepped_as_its_formula_says(law):
    (p,), optimizer = made(law, parameters((20,)), weight_decay=0.0)
    m, value = torch.zeros(20), p.detach().clone()
    for step in range(5):
        gradients([p], step)
        optimizer.step(loss=1.0)
        seen = optimizer.telemetry()
        m = seen["beta1"] * m + (1 - seen["beta1"]) * p.grad * seen["clip_scale"]
        direction = m.sign() / 2 + m / m.square().mean().sqrt() / 2
        rate = seen["learning_rate"]
        if law == "self_driving":
            rate = min(rate, 0.1 * max(value.square().mean().sqrt().item(), 0.01))
        value = value - rate * direction
        torch.testing.assert_close(p.detach(), value, rtol=1e-5, atol=1e-7)


@every_law
def test_it_trains(law):
    p = torch.nn.Parameter(torch.full((8,), 3.0))
    optimizer = made(law, [p], weight_decay=0.0)[1]
    for _ in range(400):
        optimizer.zero_grad()
        loss = ((p - 1.0) ** 2).sum()
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.param_groups[0]["lr"] = 3e-2
    with optimizer.averaged() if law == "self_driving" else torch.no_grad():
        torch.testing.assert_close(p.detach(), torch.ones(8), atol=0.05, rtol=0.0)


@every_law
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_it_resumes_to_the_bit(law, bits):
    whole, optimizer = made(law, state_bits=bits)
    train(whole, optimizer, 12)
    params, first = made(law, state_bits=bits)
    train(params, first, 5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again, second = made(law, [torch.nn.Parameter(p.detach().clone()) for p in params])
    second.load_state_dict(torch.load(file, weights_only=True))
    train(again, second, 7, start=5)
    for ours, theirs in zip(again, whole, strict=True):
        assert torch.equal(ours, theirs)


def test_it_is_pickled_with_the_optimizer():
    params, optimizer = made()
    train(params, optimizer, 2)
    twin = copy.deepcopy(optimizer)
    train(params, optimizer, 2, start=2)
    train(twin.param_groups[0]["params"], twin, 2, start=2)
    assert torch.equal(params[0], twin.param_groups[0]["params"][0])


@every_law
@pytest.mark.parametrize("bits", [32, 8])
def test_a_bad_gradient_changes_nothing(law, bits):
    params, optimizer = made(law, state_bits=bits)
    for p in params:  # a first step of which a root mean square is 0
        p.grad = torch.full_like(p, float("nan"))
    before = [p.detach().clone() for p in params]
    optimizer.step(loss=1.0)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    train(params, optimizer, 3)
    before, kept = [p.detach().clone() for p in params], state_of(optimizer)
    gradients(params, 9)
    params[0].grad[0, 0] = float("inf")
    optimizer.step(loss=1.0)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    for now, old in zip(state_of(optimizer), kept, strict=True):
        assert all(torch.equal(now[name], old[name]) for name in old)


def test_it_is_averaged_and_limited():
    params, optimizer = made(relative_limit=0.01, averaging=0.0)
    mean = [torch.zeros_like(p) for p in params]
    for step in range(6):
        before = params[0].detach().clone()
        train(params, optimizer, 1, start=step)
        moved = (params[0] - before).square().mean().sqrt()
        assert moved <= 1.01 * 0.01 * before.square().mean().sqrt()
        mean = [m + (p.detach() - m) / (step + 1) for m, p in zip(mean, params, strict=True)]
    with optimizer.averaged():
        for p, m in zip(params, mean, strict=True):
            torch.testing.assert_close(p.detach(), m, rtol=1e-5, atol=1e-6)


def test_it_is_kept_in_few_bits():
    params, optimizer = made(params=parameters((128, 128)), state_bits=4)
    train(params, optimizer, 3)
    assert state_bytes(optimizer) < 0.6 * 128 * 128 + 1000


def test_gradients_are_released_with_it():
    ordinary, optimizer = made(law_of_its_own=OFF)
    released, other = made(law_of_its_own=OFF)
    other.register_hooks()
    for step in range(4):
        gradients(ordinary, step)
        grads = [p.grad.clone() for p in ordinary]
        optimizer.step(loss=1.0)
        sum((p * g).sum() for p, g in zip(released, grads, strict=True)).backward()
        assert released[0].grad is None
        other.step(loss=1.0)
    torch.testing.assert_close(released[0], ordinary[0])


def test_blocks_do_not_change_what_it_gives(monkeypatch):
    whole, optimizer = made()
    train(whole, optimizer, 3)
    monkeypatch.setattr(_blocks, "BLOCK", 1024)
    parts, optimizer = made()
    train(parts, optimizer, 3)
    torch.testing.assert_close(parts[0], whole[0])


class Plain(Direction):
    """The gradient itself."""

    def formula(self, x, moments, factors, orders):
        return x, {}


def test_one_without_a_moment_is_refused_under_a_law_that_steers_by_it():
    with pytest.raises(ValueError, match="keeps none to compare with, got SelfDriving; name one"):
        CruxyOptimizer(parameters((3,)), law=SelfDriving(), direction=Plain())


def test_one_without_a_moment_steps_by_its_formula():
    (p,) = parameters((3,))
    before = p.detach().clone()
    optimizer = CruxyOptimizer([p], lr=0.1, direction=Plain(), weight_decay=0.0)
    p.grad = torch.tensor([0.1, -0.2, 0.3])
    optimizer.step(loss=1.0)
    rate = optimizer.telemetry()["learning_rate"]
    torch.testing.assert_close(p.detach(), before - rate * p.grad)
    assert optimizer.state[p] == {}


def test_a_class_or_two_directions_are_refused():
    with pytest.raises(TypeError, match="direction must be 'muon' or an instance of"):
        CruxyOptimizer(parameters((3,)), direction=SignBlend)
    with pytest.raises(ValueError, match="use_lion must be False where direction says"):
        CruxyOptimizer(parameters((3,)), direction=SignBlend(), use_lion=True)
