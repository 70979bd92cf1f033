"""State of `CruxyOptimizer`: saving, loading, resuming, copying, groups and schedulers."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

import torch_models as models  # noqa: E402
from cruxy_control import Meta3  # noqa: E402
from cruxy_torch import CruxyOptimizer  # noqa: E402
from relatives import relatives  # noqa: E402
from torch_models import OPTIONS  # noqa: E402


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


DIFFERENT = (
    "meta3",
    "meta_lion_bfloat16",
    "stability_v1",
    "stability_v2",
    "self_driving",
    "limited",
)


@pytest.mark.parametrize("name", relatives(OPTIONS, DIFFERENT))
def test_resume_is_bit_identical(name):
    net = models.model()
    optimizer = models.optimizer(net, **OPTIONS[name])
    models.train(net, optimizer, 15)
    saved = through_a_file([net.state_dict(), optimizer.state_dict()])
    models.train(net, optimizer, 15, start=15)

    resumed = models.model(seed=5)
    other = models.optimizer(resumed, **OPTIONS[name])
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    models.train(resumed, other, 15, start=15)
    models.assert_equal(models.everything(resumed, other), models.everything(net, optimizer))


def frozen(state):
    """A deep copy to compare with, tensors and all."""
    return copy.deepcopy(state)


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.allclose(ours, theirs, 0.0, 0.0, equal_nan=True)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def test_loading_leaves_the_callers_dictionary_alone_and_shares_no_memory():
    net = models.model()
    optimizer = models.optimizer(net)
    models.train(net, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    before = frozen(state)
    other_net = models.model()
    other = models.optimizer(other_net)
    other.load_state_dict(state)
    models.train(other_net, other, 3)
    assert same(state, before)


def test_loading_copies_into_the_tensors_that_are_there():
    net = models.model()
    optimizer = models.optimizer(net)
    models.train(net, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    models.train(net, optimizer, 2, start=2)
    memory = optimizer.param_groups[0]["controller"]
    addresses = {key: value.data_ptr() for key, value in memory.items()}
    moments = [value["exp_avg"].data_ptr() for value in optimizer.state.values()]
    optimizer.load_state_dict(state)
    memory = optimizer.param_groups[0]["controller"]
    assert {key: value.data_ptr() for key, value in memory.items()} == addresses
    assert [value["exp_avg"].data_ptr() for value in optimizer.state.values()] == moments
    assert same(optimizer.state_dict(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_keeps_float32_moments_of_half_precision_parameters(dtype):
    net = models.model(dtype)
    optimizer = models.optimizer(net)
    models.train(net, optimizer, 3)
    other = models.optimizer(models.model(dtype))
    other.load_state_dict(optimizer.state_dict())
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_load_hooks_see_what_was_loaded_and_may_change_it():
    net = models.model()
    optimizer = models.optimizer(net)
    models.train(net, optimizer, 3)
    other = models.optimizer(models.model())
    seen = []

    def double(_, state):
        state = copy.deepcopy(state)
        state["state"][0]["exp_avg"] *= 2
        return state

    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(
        lambda opt: seen.append(next(iter(opt.state.values()))["exp_avg"].clone())
    )
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(seen[0], 2 * next(iter(optimizer.state.values()))["exp_avg"])


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ({"mode": "stability_v1"}, {}, "must belong to the same law"),
        ({"law": Meta3(reference_window=7)}, {}, "law.reference must have shape"),
    ],
)
def test_a_state_of_another_law_is_refused_before_anything_changes(saved, here, message):
    optimizer = models.optimizer(models.model(), **here)
    before = frozen(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(models.optimizer(models.model(), **saved).state_dict())
    assert same(optimizer.state_dict(), before)


def test_a_foreign_state_or_format_is_refused():
    net = models.model()
    optimizer = models.optimizer(net)
    foreign = torch.optim.AdamW(net.parameters()).state_dict()
    with pytest.raises(ValueError, match=r"must hold .*controller"):
        optimizer.load_state_dict(foreign)
    newer = copy.deepcopy(optimizer.state_dict())
    newer["param_groups"][0]["controller"]["format"] += 1
    with pytest.raises(ValueError, match="format must be 2, got 3"):
        optimizer.load_state_dict(newer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", ["meta3", "meta_lion_bfloat16", "stability_v2"])
def test_copies_and_pickles_go_on_as_the_original(name, copied):
    net = models.model()
    optimizer = models.optimizer(net, **OPTIONS[name])
    models.train(net, optimizer, 3)
    other_net, other = copied((net, optimizer))
    models.train(net, optimizer, 3, start=3)
    models.train(other_net, other, 3, start=3)
    models.assert_equal(models.everything(other_net, other), models.everything(net, optimizer))
    assert other.telemetry() == optimizer.telemetry()


def test_state_bytes_per_parameter():
    sizes = {"meta3": 8, "meta_lion": 4, "meta_lion_bfloat16": 2}
    for name, expected in sizes.items():
        p = torch.nn.Parameter(torch.zeros(1000))
        p.grad = torch.ones(1000)
        optimizer = CruxyOptimizer([p], **OPTIONS[name])
        optimizer.step()
        large = [v for v in optimizer.state[p].values() if v.ndim]
        assert sum(v.nbytes for v in large) == expected * 1000
        memory = optimizer.param_groups[0]["controller"].values()
        assert sum(v.nbytes for v in memory) < 1024


def test_a_group_added_mid_run_starts_its_own_bias_correction():
    first, second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    law = Meta3(clip_threshold=None, phase_strength=0.0, rate_gain=0.0)
    optimizer = CruxyOptimizer([first], lr=0.1, weight_decay=0.0, law=law)
    for _ in range(5):
        first.grad = torch.ones(3)
        optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.01})
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    # A first step of Adam is one rate long, whatever the gradient.
    torch.testing.assert_close(second.detach(), torch.full((3,), -0.01), rtol=1e-5, atol=0.0)
    assert "controller" not in optimizer.param_groups[1]


def test_groups_have_rates_betas_decay_and_lion_of_their_own():
    def params():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(3)]

    options = [
        {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
        {"lr": 1e-3, "use_lion": True, "use_gc": True},
        {"eps": 1e-3, "use_nesterov": False, "decoupled_weight_decay": False},
    ]
    law = Meta3(rate_gain=0.0, beta2_gain=0.0, phase_strength=0.0, clip_threshold=None)
    together = params()
    groups = [{"params": [p], **o} for p, o in zip(together, options, strict=True)]
    one = CruxyOptimizer(groups, law=law)
    apart = params()
    others = [CruxyOptimizer([p], law=law, **o) for p, o in zip(apart, options, strict=True)]
    for step in range(5):
        for p, q in zip(together, apart, strict=True):
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        one.step()
        for other in others:
            other.step()
    # The three see the same gradient, so each alone has the phase that all have together.
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_parameters_without_gradient_are_left_alone():
    net = models.model()
    optimizer = models.optimizer(net)
    models.train(net, optimizer, 2)
    before = models.everything(net, optimizer)
    weight = dict(net.named_parameters())["5.weight"]
    weight.requires_grad_(False)
    models.train(net, optimizer, 2, start=2)
    after = models.everything(net, optimizer)
    names = [n for n, _ in net.named_parameters()]
    index = names.index("5.weight")
    still = [f"{index}.{key}" for key in optimizer.state[weight]] + ["param.5.weight"]
    assert all(torch.equal(after[key], before[key]) for key in still)
    assert not torch.equal(after["param.5.bias"], before["param.5.bias"])


def test_no_gradients_at_all_is_no_step():
    net = models.model()
    optimizer = models.optimizer(net)
    optimizer.step(loss=1.0)
    assert optimizer.telemetry()["step"] == 0
    assert not optimizer.state


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1])])
def test_schedulers_move_the_rate(lr):
    net = models.model()
    law = Meta3(phase_strength=0.0, rate_gain=0.0)
    lr = lr.clone() if isinstance(lr, torch.Tensor) else lr
    optimizer = models.optimizer(net, lr=lr, law=law)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rates = []
    for step in range(3):
        models.train(net, optimizer, 1, start=step)
        rates.append(optimizer.telemetry()["learning_rate"])
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.05, 0.025], rel=1e-6)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    ],
)
def test_torch_schedulers_accept_it(scheduler):
    net = models.model()
    optimizer = models.optimizer(net)
    schedule = scheduler(optimizer)
    models.train(net, optimizer, 1)
    schedule.step(1.0) if "Plateau" in type(schedule).__name__ else schedule.step()


def test_step_hooks_fire():
    net = models.model()
    optimizer = models.optimizer(net)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    models.train(net, optimizer, 1)
    assert calls == ["before", "after"]


def test_the_printed_form_leaves_the_controller_out():
    optimizer = models.optimizer(models.model())
    assert "lr: 0.01" in repr(optimizer)
    assert "controller" not in repr(optimizer)
    assert "controller" in optimizer.param_groups[0]
