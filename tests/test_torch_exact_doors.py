"""What must not train unnoticed: wrong states and labels, second derivatives, half a conversion."""

import copy
import pickle

import pytest
import torch
from torch import nn

import cruxy_torch
from cruxy_control import Meta3
from cruxy_torch import exact

OPTIMIZERS = {
    "adamw": lambda params: exact.AdamW(params),
    "lion": lambda params: exact.Lion(params),
    "sgd": lambda params: exact.SGD(params, momentum=0.9),
    "sgd-plain": lambda params: exact.SGD(params),
    "controlled": lambda params: exact.Controlled(params),
    "self-driving": lambda params: exact.SelfDriving(params),
    "no-average": lambda params: exact.SelfDriving(params, averaging=None),
}


def trained(name, rows=3, steps=2):
    p = nn.Parameter(torch.ones(rows, 2))
    optimizer = OPTIMIZERS[name]([p])
    for i in range(steps):
        p.grad = torch.full_like(p, 0.5 + i)
        optimizer.step()
    return p, optimizer


def values(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("there", OPTIMIZERS)
@pytest.mark.parametrize("here", OPTIMIZERS)
def test_a_state_goes_into_the_optimizer_that_saved_it_alone(there, here):
    _, saved = trained(there)
    p, optimizer = trained(here, steps=1)
    before = values(optimizer)
    if here == there:
        optimizer.load_state_dict(saved.state_dict())
        same(optimizer.state_dict()["state"], saved.state_dict()["state"])
        return
    if {here, there} == {"sgd", "sgd-plain"}:  # the momentum is an option, which is loaded
        optimizer.load_state_dict(saved.state_dict())
        assert optimizer.param_groups[0]["momentum"] == saved.param_groups[0]["momentum"]
    else:
        with pytest.raises(ValueError, match="the state must be one of"):
            optimizer.load_state_dict(saved.state_dict())
        same(values(optimizer), before)
    p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_another_shape_is_refused(name):
    _, saved = trained(name, rows=5)
    _, optimizer = trained(name)
    before = values(optimizer)
    if name == "sgd-plain":  # keeps nothing
        optimizer.load_state_dict(saved.state_dict())
        return
    with pytest.raises(ValueError, match=r"must have shape \(3, 2\) like its parameter"):
        optimizer.load_state_dict(saved.state_dict())
    same(values(optimizer), before)


@pytest.mark.parametrize("bad", [{}, {"state": {}}, {"state": {}, "param_groups": []}, None])
def test_what_is_no_state_is_refused(bad):
    _, optimizer = trained("adamw")
    before = values(optimizer)
    with pytest.raises(ValueError, match=r"only what state_dict\(\) gave can be loaded"):
        optimizer.load_state_dict(bad)
    same(values(optimizer), before)


def test_another_law_is_refused():
    p = nn.Parameter(torch.ones(3, 2))
    driven = exact.Controlled([p], law=Meta3())
    p.grad = torch.ones_like(p)
    driven.step()
    other = exact.SelfDriving([p], averaging=None)
    with pytest.raises(ValueError, match="must be one of the law SelfDriving"):
        other.load_state_dict(driven.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_with_the_same_bits(name, copied):
    p, optimizer = trained(name)
    p2, optimizer2 = copied((p, optimizer))
    for q, o in ((p, optimizer), (p2, optimizer2)):
        q.grad = torch.full_like(q, 0.25)
        o.step()
    same(p2.data, p.data)
    assert p2 is optimizer2.param_groups[0]["params"][0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_is_checked_when_it_is_added(name):
    _, optimizer = trained(name)
    with pytest.raises(TypeError, match=r"take float32 parameters, got torch\.bfloat16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]})
    with pytest.raises(ValueError, match=r"lr must be at least 0, got -1\.0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    group = {"params": [nn.Parameter(torch.ones(2))], "weight_decay": float("nan")}
    with pytest.raises(ValueError, match=r"weight_decay must be at least 0, got nan"):
        type(optimizer)([group])


def test_a_law_that_finds_the_rate_needs_one_in_every_group():
    with pytest.raises(ValueError, match=r"lr must be above 0 under a law that finds the rate"):
        exact.SelfDriving([{"params": [nn.Parameter(torch.ones(2))], "lr": 0.0}])


def test_a_loss_is_one_number():
    p, optimizer = trained("controlled")
    p.grad = torch.ones_like(p)
    before = values(optimizer)
    with pytest.raises(ValueError, match="loss"):
        optimizer.step(loss=torch.ones(2))
    same(values(optimizer), before)
    optimizer.step(loss=torch.tensor([1.0]))
    assert all(x.shape == y.shape for x, y in zip(
        optimizer.param_groups[0]["law_state"], before["param_groups"][0]["law_state"], strict=True
    ))  # fmt: skip


@pytest.fixture(params=["default", "reference"])
def backend(request):
    with cruxy_torch.use_backend(None if request.param == "default" else request.param):
        yield


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["gelu", "silu", "softmax", "relu"])
def test_a_second_derivative_is_refused(name):
    x = torch.linspace(-1.0, 1.0, 6).reshape(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="must not be differentiated twice"):
        torch.autograd.grad(exact.sum(getattr(exact, name)(x)), x, create_graph=True)
    (first,) = torch.autograd.grad(exact.sum(getattr(exact, name)(x)), x)
    assert first.shape == x.shape


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("label", [-100, -1, 3])
def test_a_label_out_of_range_is_refused(label):
    with pytest.raises(IndexError, match=r"labels must be whole numbers from 0 to 2, got"):
        exact.cross_entropy(torch.ones(2, 3), torch.tensor([0, label]))
    with pytest.raises(IndexError, match=r"ids must be whole numbers from 0 to 2, got"):
        exact.embedding(torch.tensor([0, label]), torch.ones(3, 2))


def test_labels_are_whole_numbers():
    with pytest.raises(TypeError, match=r"labels must be whole numbers, got torch\.float32"):
        exact.cross_entropy(torch.ones(2, 3), torch.tensor([0.0, 1.7]))
    assert exact.cross_entropy(torch.ones(0, 3), torch.ones(0, dtype=torch.int64)) == 0.0


def test_convert_swaps_a_module_wherever_it_stands():
    activation, linear = nn.GELU(), nn.Linear(4, 4)
    model = exact.convert_(nn.Sequential(linear, activation, linear, activation))
    assert model[1] is model[3]
    assert model[0] is model[2]
    assert isinstance(model[3], exact.GELU)
    assert isinstance(model[2], exact.Linear)


def test_no_two_layers_and_grains_share_their_random_bits():
    dropouts = exact.convert_(nn.Sequential(*(nn.Dropout() for _ in range(200))))
    assert [dropout.layer for dropout in dropouts][:64] == [*range(64)]
    keys = set()
    for grain in range(40):
        exact.set_step(dropouts, 0, grain)
        keys |= {int(dropout.key) for dropout in dropouts}
    assert len(keys) == 200 * 40


def test_the_law_survives_the_group_that_held_its_state():
    def run(freezes):
        ps = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2,), 2.0))]
        optimizer = exact.Controlled([{"params": [p]} for p in ps])
        for i in range(6):
            if i == 3 and freezes:
                optimizer.param_groups.pop(0)
            for p in ps:
                p.grad = None if i >= 3 and p is ps[0] else torch.full_like(p, 1.0 + i)
            optimizer.step(loss=10.0 - i)
        return ps[1].data

    same(run(freezes=True), run(freezes=False))
