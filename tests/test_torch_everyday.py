"""What users and other tools do to an optimizer in the course of a run, and what comes of it."""

import ast
import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402

from cruxy_control.filters import MAX_COUNT  # noqa: E402
from cruxy_torch import AXIOM, Cosmic, CruxyOptimizer  # noqa: E402
from relatives import crossed  # noqa: E402
from torch_low_bit import gradients, parameters, train  # noqa: E402

ROOT = Path(__file__).parent.parent

MAKE = {
    "meta3": CruxyOptimizer,
    "single": lambda p, **o: CruxyOptimizer(p, fused=False, **o),
    "foreach": lambda p, **o: CruxyOptimizer(p, foreach=True, **o),
    "lion": lambda p, **o: CruxyOptimizer(p, use_lion=True, **o),
    "self_driving": lambda p, **o: CruxyOptimizer(p, mode="self_driving", **o),
    "low_bit": lambda p, **o: CruxyOptimizer(p, state_bits=8, **o),
    "axiom": AXIOM,
    "axiom_momentum": lambda p, **o: AXIOM(p, momentum=0.9, **o),
    "cosmic": lambda p, **o: Cosmic(p, state_budget="90KB", **o),
}
every_optimizer = pytest.mark.parametrize("name", list(MAKE))
SHAPES = ((64, 80), (33,), ())


def descend(p, optimizer, steps, target=1.0):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        optimizer.step(loss=loss)
    return loss.item()


class TestDefaults:
    """Of the process: its dtype and its device."""

    @pytest.mark.parametrize(
        ("name", "dtype"), crossed(MAKE, [torch.float64, torch.bfloat16, torch.float16])
    )
    def test_the_default_dtype_changes_no_bit(self, name, dtype):
        right, wanted = parameters(*SHAPES), parameters(*SHAPES)
        train(wanted, MAKE[name](wanted, lr=1e-2), 4)
        torch.set_default_dtype(dtype)
        try:
            optimizer = MAKE[name](right, lr=1e-2)
            for step in range(4):
                torch.set_default_dtype(torch.float32)
                gradients(right, step)
                torch.set_default_dtype(dtype)
                optimizer.step(loss=1.0 / (1 + step))
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(p, q) for p, q in zip(right, wanted, strict=True))

    def test_no_tensor_is_made_without_dtype_and_device(self):
        made = {"zeros", "ones", "full", "empty", "tensor", "arange"}
        found = []
        for path in sorted((ROOT / "cruxy_torch").rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if ast.unparse(node.func.value) == "torch" and node.func.attr in made:
                    given = {keyword.arg for keyword in node.keywords}
                    if not {"dtype", "device"} <= given and None not in given:
                        found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
        assert not found


class TestRateOfZero:
    """What moves nothing teaches nothing."""

    @pytest.mark.parametrize("lion", [False, True])
    @pytest.mark.parametrize("pause", [20, 100])
    def test_self_driving_goes_on_after_a_pause_as_without_it(self, lion, pause):
        ends = []
        for length in (0, pause):
            p = nn.Parameter(torch.full((40,), 3.0))
            optimizer = CruxyOptimizer([p], mode="self_driving", use_lion=lion)
            descend(p, optimizer, 15)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = 0.0
            if length:
                before = p.detach().clone()
                descend(p, optimizer, length)
                assert torch.equal(p, before)
            optimizer.param_groups[0]["lr"] = rate
            descend(p, optimizer, 1)
            ends.append(optimizer.telemetry()["meta_scale"])
        assert 0.8 < ends[1] / ends[0] < 1.25

    def test_a_group_at_rate_0_changes_nothing_for_the_others(self):
        alone, beside, still = parameters((40,), (40,), (40,))
        beside.data.copy_(alone)
        one = CruxyOptimizer([alone], mode="self_driving")
        groups = [{"params": [beside]}, {"params": [still], "lr": 0.0, "relative_limit": None}]
        two = CruxyOptimizer(groups, mode="self_driving")
        before = still.detach().clone()
        for step in range(60):
            gradients([alone, still], step, scale=1e-4)  # below every clip
            beside.grad = alone.grad.clone()
            one.step(loss=1.0)
            two.step(loss=1.0)
        assert torch.equal(still, before)
        scales = [o.telemetry()["meta_scale"] for o in (one, two)]
        assert scales[0] == pytest.approx(scales[1], rel=1e-3)

    @every_optimizer
    def test_a_tool_that_fills_the_state_takes_no_step(self, name):
        ends = []
        for peek in (False, True):
            params = parameters(*SHAPES)
            optimizer = MAKE[name](params, lr=1e-2, lr_bounds=(1e-3, 1.0))
            if peek:
                for p in params:
                    p.grad = torch.zeros_like(p)
                optimizer.param_groups[0]["lr"] = 0.0
                before = [p.detach().clone() for p in params]
                optimizer.step()
                optimizer.param_groups[0]["lr"] = 1e-2
                assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
                assert optimizer.telemetry()["step"] == optimizer.telemetry()["skipped_total"] == 0
                assert len(optimizer.state) == len(params)
            train(params, optimizer, 4)
            ends.append([p.detach().clone() for p in params])
        assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


class TestAverages:
    """Of parameters that have no gradient in some steps."""

    @every_optimizer
    @pytest.mark.parametrize("released", [False, True])
    def test_an_average_moves_in_steps_without_a_gradient(self, name, released):
        if released and name == "self_driving":
            pytest.skip("its law needs all gradients at once")
        params = parameters((64, 80), (33,))
        optimizer = MAKE[name](params, lr=1e-2, weight_decay=0.0, averaging=0.0)
        if released:
            optimizer.register_hooks()
        mean = torch.zeros(33)
        for step in range(6):
            gradients(params, step)
            grads = [p.grad.clone() for p in params]
            late = step in (2, 3, 5)
            if released:
                for p in params:
                    p.grad = None
                chosen = params[:1] if late else params
                sum((p * g).sum() for p, g in zip(chosen, grads, strict=False)).backward()
            elif late:
                params[1].grad = None
            optimizer.step(loss=1.0)
            mean += (params[1].detach() - mean) / (step + 1)
        with optimizer.averaged():
            torch.testing.assert_close(params[1].detach(), mean, rtol=1e-5, atol=1e-6)


class TestLoading:
    """What does not belong here is refused, and changes nothing."""

    @pytest.mark.parametrize(
        ("saver", "loader"),
        [("meta3", "axiom"), ("axiom", "cosmic"), ("cosmic", "meta3"), ("axiom_momentum", "lion")],
    )
    def test_a_state_of_another_class_is_refused(self, saver, loader):
        params, others = parameters(*SHAPES), parameters(*SHAPES)
        saved, optimizer = MAKE[saver](params), MAKE[loader](others)
        train(params, saved, 2)
        train(others, optimizer, 1)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="the state must be one of"):
            optimizer.load_state_dict(saved.state_dict())
        torch.testing.assert_close(optimizer.state_dict(), before, equal_nan=True)
        train(others, optimizer, 1, start=1)

    @pytest.mark.parametrize("name", ["meta3", "lion", "low_bit", "axiom_momentum", "single"])
    @pytest.mark.parametrize("shape", [(80, 64), (1000, 64), (64, 81)])
    def test_a_state_of_another_shape_is_refused(self, name, shape):
        if shape == (80, 64) and name in ("low_bit", "axiom_momentum"):
            pytest.skip("codes are of flattened elements, and these are as many")
        (p,), (q,) = parameters((64, 80)), parameters(shape)
        saved, optimizer = MAKE[name]([p]), MAKE[name]([q])
        train([p], saved, 1)
        with pytest.raises(ValueError, match=r"must have shape|codes must fit"):
            optimizer.load_state_dict(saved.state_dict())
        assert not optimizer.state

    @pytest.mark.parametrize("name", ["meta3", "lion", "single", "foreach", "low_bit"])
    def test_a_state_put_beside_a_parameter_of_another_shape_is_refused(self, name):
        (p,), (q,) = parameters((64, 80)), parameters((100, 80))
        saved = MAKE[name]([p])
        train([p], saved, 1)
        optimizer = MAKE[name]([q])
        optimizer.state[q] = saved.state[p]
        before = q.detach().clone()
        with pytest.raises(ValueError, match="must have shape"):
            train([q], optimizer, 1)
        assert torch.equal(q, before)

    def test_a_load_inside_averaged_leaves_its_guard(self):
        params = parameters((5,))
        optimizer = CruxyOptimizer(params, averaging=16.0)
        train(params, optimizer, 2)
        with optimizer.averaged():
            optimizer.load_state_dict(optimizer.state_dict())
            gradients(params, 3)
            with pytest.raises(RuntimeError, match="inside averaged"):
                optimizer.step()


class TestParameters:
    """Replaced, frozen, added, or of a class of their own."""

    @every_optimizer
    def test_one_that_was_put_in_anothers_place_is_stepped(self, name):
        params = parameters((64, 80), (33,))
        optimizer = MAKE[name](params, lr=1e-2)
        train(params, optimizer, 2)
        optimizer.state.pop(params[0])
        new = nn.Parameter(torch.ones(70, 80))
        optimizer.param_groups[0]["params"][0] = new
        train([new, params[1]], optimizer, 2, start=2)
        assert (new != 1.0).any()

    @every_optimizer
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64])
    def test_frozen_ones_may_be_of_any_dtype(self, name, dtype):
        p = parameters((64, 80))[0]
        frozen = nn.Parameter(torch.ones(4, dtype=dtype), requires_grad=False)
        optimizer = MAKE[name]([p, frozen])
        train_only = [p]
        train(train_only, optimizer, 2)
        assert torch.equal(frozen, torch.ones(4, dtype=dtype))

    def test_a_refused_group_is_not_added(self):
        optimizer = CruxyOptimizer(parameters((3,)))
        complex_one = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(ValueError, match="real floating-point"):
            optimizer.add_param_group({"params": [complex_one]})
        assert len(optimizer.param_groups) == 1

    def test_cosmic_takes_the_same_names_in_two_groups(self):
        layers = [nn.Linear(5, 4), nn.Linear(5, 4)]
        groups = [{"params": list(layer.named_parameters())} for layer in layers]
        optimizer = Cosmic(groups, state_budget="2KB")
        for layer in layers:
            layer(torch.ones(2, 5)).sum().backward()
        optimizer.step(loss=1.0)
        assert list(optimizer.tiers()) == ["weight", "bias", "1.weight", "1.bias"]

    @every_optimizer
    def test_one_of_a_class_that_wraps_others_is_stepped(self, name):
        wrapped = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
        plain = nn.Parameter(torch.ones(3))
        for p in (wrapped, plain):
            optimizer = MAKE[name]([p], lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                (p * p).sum().backward()
                optimizer.step()
        torch.testing.assert_close(wrapped.a, plain.detach())
        assert (plain < 1.0).all()

    @every_optimizer
    def test_a_second_backward_through_old_weights_raises(self, name):
        torch.manual_seed(0)
        first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        optimizer = MAKE[name]([*first.parameters(), *second.parameters()], lr=0.1)
        hidden = second(torch.tanh(first(torch.ones(2, 4))))
        hidden.sum().backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            hidden.square().mean().backward()


class TestLosses:
    """What may be handed over as one."""

    @pytest.mark.parametrize("loss", [1e39, -1e300, 10**400, float("inf"), torch.tensor(1e39)])
    def test_one_that_float32_does_not_hold_counts_as_none(self, loss):
        params, others = parameters((5,)), parameters((5,))
        optimizer, other = CruxyOptimizer(params), CruxyOptimizer(others)
        train(params, optimizer, 2)
        train(others, other, 2)
        gradients(params, 3)
        gradients(others, 3)
        optimizer.step(loss=loss)
        other.step()
        assert torch.equal(params[0], others[0])
        assert optimizer.telemetry()["ok"]
        assert optimizer.telemetry()["loss"] != optimizer.telemetry()["loss"]

    @pytest.mark.parametrize("loss", ["1.5", [1.0], object()])
    def test_what_is_no_number_is_refused(self, loss):
        params = parameters((5,))
        optimizer = CruxyOptimizer(params)
        gradients(params, 0)
        with pytest.raises(TypeError, match="loss must be a number or a tensor"):
            optimizer.step(loss=loss)
        assert optimizer.telemetry()["step"] == 0


def test_zero_grad_clears_a_pass_that_an_error_left_open():
    p, q = parameters((5,), (5,))
    optimizer = CruxyOptimizer([p, q])
    optimizer.register_hooks()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        ((p * 2.0).sum() + Fails.apply(q * q).sum()).backward()
    optimizer.zero_grad()
    ((p * 2.0).sum() + (q * q).sum()).backward()
    optimizer.step(loss=1.0)
    assert optimizer.telemetry()["step"] == 1


def test_counters_stay_at_the_largest():
    params = parameters((5,))
    optimizer = CruxyOptimizer(params)
    train(params, optimizer, 1)
    optimizer.param_groups[0]["controller"]["step"].fill_(MAX_COUNT)
    optimizer.param_groups[0]["controller"]["law.step"].fill_(MAX_COUNT)
    train(params, optimizer, 2)
    assert optimizer.telemetry()["step"] == MAX_COUNT
    assert optimizer.param_groups[0]["controller"]["law.step"] == MAX_COUNT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": float("inf")}, r"eps must be in \[0, infinity\), got inf"),
        ({"weight_decay": float("inf")}, r"weight_decay must be in \[0, infinity\), got inf"),
        ({"betas": 0.9}, "betas must be a pair, got 0.9"),
        ({"gamma_norm": 0.5, "mode": "stability_v1"}, "gamma_norm must be in"),
        ({"meta_interval": 0, "mode": "self_driving"}, "meta_interval must be a whole number"),
        ({"lr": 0.0, "mode": "self_driving"}, "lr must be above 0 under a law that finds the rate"),
    ],
)
def test_what_no_step_could_use_is_refused_at_the_door(options, message):
    with pytest.raises(ValueError, match=message):
        CruxyOptimizer(parameters((3,)), **options)


@every_optimizer
def test_a_state_has_no_nan_and_no_infinity_where_all_is_well(name):
    params = parameters(*SHAPES)
    optimizer = MAKE[name](params)
    for step in range(2):
        for key, value in optimizer.param_groups[0]["controller"].items():
            assert torch.isfinite(value).all(), key
        assert all(
            torch.isfinite(value.float()).all()
            for state in optimizer.state.values()
            for value in state.values()
        )
        gradients(params, step)
        optimizer.step()
    assert optimizer.telemetry()["loss"] != optimizer.telemetry()["loss"]  # there was none
