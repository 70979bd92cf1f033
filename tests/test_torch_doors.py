"""What `CruxyOptimizer` makes of groups, ends, devices and states of another kind."""

import copy

import pytest

torch = pytest.importorskip("torch")

import cruxy_torch  # noqa: E402
import torch_models as models  # noqa: E402
from cruxy_control import Meta3, PlateauGuard, SelfDriving  # noqa: E402
from cruxy_control.usual import USUAL  # noqa: E402
from cruxy_torch import AXIOM, CruxyOptimizer, SignBlend, param_groups  # noqa: E402
from test_torch_state import same  # noqa: E402

VARIANTS = {
    "driving": {},
    "pulled": {"interpolation": 0.6},
    "lion": {"mode": "self_driving_lion"},
    "muon": {"direction": "muon"},
    "muon_free": {"direction": "muon", "interpolation": 0.0},
    "meta3": {"mode": "meta3"},
    "meta_lion": {"mode": "meta_lion"},
    "blend": {"direction": SignBlend()},
}


def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def optimizer_of(net, **options):
    groups = param_groups(net, lr=1e-3, weight_decay=0.1)
    return CruxyOptimizer(groups, **{"mode": "self_driving", **options})


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        loss = (net(x) - x[:, :2]).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def law_of(optimizer):
    return optimizer._settings.law


class TestKinds:
    """What is said nowhere goes with the direction of a group."""

    def group(self, **options):
        return {"params": [torch.nn.Parameter(torch.ones(4, 4))], **options}

    def test_a_group_of_lion_is_as_an_optimizer_of_lion(self):
        own = CruxyOptimizer([self.group(use_lion=True)], mode="self_driving")
        whole = CruxyOptimizer([self.group()], mode="self_driving", use_lion=True)
        assert own.param_groups[0]["relative_limit"] == USUAL["lion"].relative_limit == 0.01
        assert own.param_groups[0]["betas"] == (0.9, 0.95)
        names = own.param_groups[0].keys() - {"params", "controller"}
        assert all(own.param_groups[0][n] == whole.param_groups[0][n] for n in names)
        assert law_of(own) == law_of(whole) == SelfDriving(limit_yield=None)

    def test_groups_of_two_kinds_have_what_goes_with_each_and_the_law_of_lion(self):
        for lion in (True, False):
            optimizer = CruxyOptimizer(
                [self.group(use_lion=not lion), self.group()], mode="self_driving", use_lion=lion
            )
            limits = {g["use_lion"]: g["relative_limit"] for g in optimizer.param_groups}
            betas = {g["use_lion"]: g["betas"] for g in optimizer.param_groups}
            assert limits == {True: 0.01, False: 0.1}
            assert betas == {True: (0.9, 0.95), False: (0.9, 0.99)}
            assert law_of(optimizer).limit_yield is None
        none_left = CruxyOptimizer(
            [self.group(use_lion=False)], mode="self_driving_lion", total_steps=10
        )
        assert law_of(none_left) == SelfDriving(total_steps=10)

    def test_a_group_that_is_added_too(self):
        optimizer = CruxyOptimizer([self.group()], mode="self_driving")
        optimizer.add_param_group(self.group(use_lion=True))
        assert optimizer.param_groups[1]["relative_limit"] == 0.01
        assert optimizer.param_groups[1]["betas"] == (0.9, 0.95)
        assert law_of(optimizer) == SelfDriving()

    def test_what_was_given_counts_in_every_group(self):
        given = {"betas": (0.8, 0.9), "relative_limit": None}
        groups = [self.group(use_lion=True), self.group(use_lion=True, relative_limit=0.5)]
        optimizer = CruxyOptimizer(groups, mode="self_driving", **given)
        assert [g["betas"] for g in optimizer.param_groups] == [(0.8, 0.9)] * 2
        assert [g["relative_limit"] for g in optimizer.param_groups] == [None, 0.5]
        copied = copy.deepcopy(optimizer)
        copied.add_param_group(self.group(use_lion=True))
        assert copied.param_groups[2]["betas"] == (0.8, 0.9)

    def test_a_vector_beside_muon_may_take_lion_and_a_matrix_may_not(self):
        groups = param_groups(mlp(), lr=1e-3)
        bias = next(group for group in groups if group["role"] == "bias")
        bias["use_lion"] = True
        optimizer = CruxyOptimizer(groups, mode="self_driving", direction="muon")
        limits = {g["role"]: g["relative_limit"] for g in optimizer.param_groups}
        assert limits.pop("bias") == 0.01
        assert set(limits.values()) == {USUAL["muon"].relative_limit}
        assert law_of(optimizer) == law_of(optimizer_of(mlp(), direction="muon"))
        with pytest.raises(ValueError, match="use_lion must be False where direction says"):
            optimizer.add_param_group({**self.group(), "role": "mlp.up", "use_lion": True})

    def test_lion_beside_a_direction_of_ones_own_is_refused_in_a_group(self):
        with pytest.raises(ValueError, match="use_lion must be False where direction says"):
            CruxyOptimizer([self.group(use_lion=True)], direction=SignBlend())

    def test_a_group_of_lion_trains(self):
        def after(groups, **options):
            net = mlp()
            optimizer = CruxyOptimizer(groups(net), mode="self_driving", **options)
            train(net, optimizer, 10)
            return [p.detach() for p in net.parameters()]

        own = after(lambda net: [{"params": net.parameters(), "use_lion": True}])
        whole = after(lambda net: net.parameters(), use_lion=True)
        assert all(map(torch.equal, own, whole))


class TestDoors:
    """What holds for the whole optimizer is no option of a group."""

    @pytest.mark.parametrize(
        ("make", "option"),
        [
            (CruxyOptimizer, {"stochastic_rounding": True}),
            (CruxyOptimizer, {"momentum_dtype": torch.bfloat16}),
            (CruxyOptimizer, {"direction": "muon"}),
            (CruxyOptimizer, {"total_steps": 5}),
            (CruxyOptimizer, {"law": Meta3()}),
            (AXIOM, {"max_grad_norm": 1.0}),
        ],
    )
    def test_it_is_refused(self, make, option):
        (name,) = option
        message = f"{name} must be given to {make.__name__}.*leave it out of the group"
        with pytest.raises(ValueError, match=message):
            make([{"params": [torch.nn.Parameter(torch.ones(3))], **option}])

    def test_the_direction_is_no_option_of_a_group(self):
        optimizer = optimizer_of(mlp(), direction="muon")
        extra = {"params": [("extra", torch.nn.Parameter(torch.ones(3)))], "role": "norm"}
        with pytest.raises(ValueError, match="direction must be given to CruxyOptimizer"):
            optimizer.add_param_group({**extra, "direction": None})
        optimizer.add_param_group({**extra, "direction": "muon"})  # of a group that was taken out

    def test_keys_of_torch_and_of_the_user_pass(self):
        keys = {
            "foreach": None, "fused": None, "capturable": False, "differentiable": False,
            "amsgrad": False, "initial_lr": 0.1, "swa_lr": 0.1, "max_lr": 0.1, "base_momentum": 0.9,
            "param_names": ["x"], "name": "body", "lr_scale": 0.5, "tag": {"mine": 1},
        }  # fmt: skip
        optimizer = CruxyOptimizer([{"params": [torch.nn.Parameter(torch.ones(3))], **keys}])
        assert {name: optimizer.param_groups[0][name] for name in keys} == keys

    def test_an_end_meets_a_law_that_is_shown_in_short(self):
        with pytest.raises(ValueError, match=r"SelfDriving, got Meta3\(\); leave it out"):
            optimizer_of(mlp(), mode="meta3", total_steps=10)


class TestStatesOfOthers:
    """A state of another optimizer is refused, with what differs, and nothing is lost."""

    @pytest.mark.parametrize(
        ("saved", "here", "differs"),
        [
            ("driving", "pulled", r"interpolation=0.6 in group 0.*got one of interpolation=0.0"),
            ("pulled", "driving", r"interpolation=0.0 in group 0.*with interpolation=0.6"),
            ("lion", "driving", r"use_lion=False in group 0.*with use_lion=True"),
            ("driving", "lion", r"use_lion=True in group 0.*with use_lion=False"),
            ("meta_lion", "meta3", r"use_lion=False in group 0.*with use_lion=True"),
            ("meta3", "meta_lion", r"use_lion=True in group 0.*with use_lion=False"),
            ("muon", "muon_free", r"interpolation=0.0 in group 0.*with interpolation=0.7"),
            ("muon_free", "muon", r"interpolation=0.7 in group 0.*with interpolation=0.0"),
            ("muon", "driving", r"direction=None in group 0.*with direction='muon'"),
            ("driving", "blend", r"direction='SignBlend' in group 0.*with direction=None"),
            ("meta3", "driving", r"SelfDriving\(\), got one that lacks .*has besides beta2_gap"),
        ],
    )
    def test_it_is_refused_and_says_what_differs(self, saved, here, differs):
        theirs, net = mlp(), mlp()
        other, optimizer = (
            optimizer_of(n, **VARIANTS[v]) for n, v in ((theirs, saved), (net, here))
        )
        train(theirs, other, 2)
        train(net, optimizer, 2)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=differs):
            optimizer.load_state_dict(other.state_dict())
        assert same(optimizer.state_dict(), before)
        train(net, optimizer, 1, start=2)

    def test_every_group_is_looked_at(self):
        def made(*lions):
            params = [torch.nn.Parameter(torch.ones(3)) for _ in lions]
            groups = [{"params": [p], "use_lion": x} for p, x in zip(params, lions, strict=True)]
            return CruxyOptimizer(groups)

        with pytest.raises(ValueError, match=r"use_lion=True in group 1"):
            made(False, True).load_state_dict(made(False, False).state_dict())
        made(False, True).load_state_dict(made(False, True).state_dict())

    @pytest.mark.parametrize("here", [{"averaging": None}, {"average_bits": 8}, {"total_steps": 9}])
    def test_what_comes_from_the_file_makes_no_other_optimizer(self, here):
        net = mlp()
        saved = optimizer_of(mlp(), averaging=4.0, betas=(0.8, 0.9))
        optimizer = optimizer_of(net, **here)
        optimizer.load_state_dict(saved.state_dict())
        assert optimizer.param_groups[0]["averaging"] == 4.0
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
        train(net, optimizer, 1)

    def test_a_law_that_keeps_more_is_named_by_its_parts(self):
        net = mlp()
        saved = optimizer_of(mlp(), law=PlateauGuard(SelfDriving(excess_share=0.5)))
        optimizer = optimizer_of(net, law=PlateauGuard(SelfDriving()))
        with pytest.raises(ValueError, match=r"PlateauGuard\(.*has besides inner.progress;"):
            optimizer.load_state_dict(saved.state_dict())
        saved = optimizer_of(mlp(), law=SelfDriving(excess_share=0.5))
        optimizer = optimizer_of(net, law=SelfDriving(set_point=-0.1))
        with pytest.raises(
            ValueError, match=r"set_point=-0.1\), got one that has besides progress"
        ):
            optimizer.load_state_dict(saved.state_dict())

    @pytest.mark.parametrize(
        "state",
        [
            None,
            {},
            {"state": {}},
            {"state": {}, "param_groups": []},
            {"state": {}, "param_groups": [{}]},
            {"state": {0: 5}, "param_groups": [{"params": [0, 1]}]},
            {"state": [], "param_groups": [{"params": [0, 1]}]},
            {"state": {}, "param_groups": [{"params": [0, 1], "controller": 5}]},
            {"state": {}, "param_groups": [{"params": [0, 1], "controller": {"format": 2}}]},
        ],
    )
    def test_what_is_no_state_is_refused(self, state):
        net = mlp()
        optimizer = optimizer_of(net)
        train(net, optimizer, 1)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=r"the state must .*can be loaded"):
            optimizer.load_state_dict(state)
        assert same(optimizer.state_dict(), before)

    @pytest.mark.parametrize(
        ("named", "called"), [(True, "beside 0.weight, got"), (False, "group 0, parameter 0")]
    )
    def test_a_wrong_shape_is_named(self, named, called):
        def made(width):
            net = torch.nn.Sequential(torch.nn.Linear(6, width))
            optimizer = CruxyOptimizer(net.named_parameters() if named else net.parameters())
            net(torch.ones(1, 6)).sum().backward()
            optimizer.step()
            return optimizer

        with pytest.raises(ValueError, match=rf"exp_avg .*{called}.*it was saved with\.$"):
            made(4).load_state_dict(made(5).state_dict())


class TestDevices:
    """Another default device than the parameters' changes nothing."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "options",
        [
            *VARIANTS.values(),
            *({"mode": mode} for mode in ("stability_v1", "stability_v2")),
            *({"state_bits": bits, "average_bits": min(bits, 16)} for bits in (16, 8)),
            {"state_bits": 4, "direction": "muon"},
            {"interpolation": 0.6, "average_bits": 8, "stochastic_rounding": True},
            {"direction": "muon", "stochastic_rounding": True, "average_bits": 16},
            {"mode": "meta3", "averaging": 16, "relative_limit": 0.1, "use_gc": True},
            {"law": PlateauGuard(SelfDriving())},
            {"foreach": True},
            {"fused": False},
        ],
    )
    def test_a_step_is_the_same(self, options, dtype):
        def stepped(device):
            torch.manual_seed(0)
            net = torch.nn.Sequential(*(torch.nn.Linear(72, 72) for _ in range(2))).to(dtype)
            optimizer = optimizer_of(net, **options)
            grads = [torch.randn_like(p) for p in net.parameters()]
            with torch.device(device):
                for _ in range(3):
                    for p, grad in zip(net.parameters(), grads, strict=True):
                        p.grad = grad.clone()
                    optimizer.step(loss=1.0)
            return models.everything(net, optimizer)

        models.assert_equal(stepped("meta"), stepped("cpu"))


class TestEnds:
    """The set point of a run that knew its end from the start, wherever it is told again."""

    @pytest.mark.parametrize("told", ["at once", "before the first step"])
    def test_a_run_that_goes_on_has_the_law_that_it_had(self, told):
        options = {"direction": "muon", "interpolation": 0.0}
        net = mlp()
        at_once = {"total_steps": 40} if told == "at once" else {}
        optimizer = optimizer_of(net, **options, **at_once)
        if not at_once:
            optimizer.set_total_steps(40)
        assert law_of(optimizer).set_point == USUAL["muon"].set_point_ended
        train(net, optimizer, 3)
        state, weights = copy.deepcopy((optimizer.state_dict(), net.state_dict()))
        train(net, optimizer, 3, start=3)

        resumed = mlp()
        other = optimizer_of(resumed, **options)
        resumed.load_state_dict(weights)
        other.load_state_dict(state)
        other.set_total_steps(40)
        assert law_of(other) == law_of(optimizer)
        train(resumed, other, 3, start=3)
        models.assert_equal(models.everything(resumed, other), models.everything(net, optimizer))

    def test_a_run_without_an_end_keeps_its_set_point(self):
        net = mlp()
        options = {"direction": "muon", "interpolation": 0.0}
        optimizer = optimizer_of(net, **options)
        train(net, optimizer, 2)
        other = optimizer_of(mlp(), **options)
        other.load_state_dict(optimizer.state_dict())
        for own in (optimizer, other):
            own.set_total_steps(40)
            assert law_of(own).set_point == USUAL["muon"].set_point
            assert own.total_steps == 40

    def test_an_optimizer_that_was_told_stays_so_whatever_it_loads(self):
        options = {"direction": "muon", "interpolation": 0.0}
        net = mlp()
        running = optimizer_of(net, **options)
        train(net, running, 1)
        optimizer = optimizer_of(mlp(), **options, total_steps=40)
        optimizer.load_state_dict(running.state_dict())
        optimizer.set_total_steps(50)
        assert law_of(optimizer).set_point == USUAL["muon"].set_point_ended

    def test_a_state_of_before_may_lack_it(self):
        net = mlp()
        saved = optimizer_of(net).state_dict()
        for group in saved["param_groups"]:
            del group["ends"]
        optimizer = optimizer_of(net)
        optimizer.load_state_dict(saved)
        assert not any(group["ends"] for group in optimizer.param_groups)


class TestGroupsThatGo:
    """The controller stays where its group is taken out."""

    @pytest.mark.parametrize("mode", ["meta3", "self_driving"])
    def test_it_moves_into_the_group_that_is_first_then(self, mode):
        net = mlp()
        optimizer = optimizer_of(net, mode=mode)
        train(net, optimizer, 3)
        held = optimizer.param_groups[0]["controller"]
        gone = optimizer.param_groups.pop(0)
        for param in gone["params"]:
            del optimizer.state[param]
        assert optimizer.telemetry()["step"] == 3
        assert optimizer.param_groups[0]["controller"] is held
        train(net, optimizer, 2, start=3)
        assert optimizer.telemetry()["step"] == 5
        optimizer.add_param_group({**gone, "params": list(gone["params"])})
        assert ["controller" in group for group in optimizer.param_groups] == [True, False, False]

    @pytest.mark.parametrize("use", [lambda o: o, copy.deepcopy])
    def test_what_is_saved_has_it(self, use):
        net = mlp()
        optimizer = optimizer_of(net)
        train(net, optimizer, 2)
        for param in optimizer.param_groups.pop(0)["params"]:
            del optimizer.state[param]
        assert "controller" not in repr(optimizer)
        saved = use(optimizer).state_dict()
        assert int(saved["param_groups"][0]["controller"]["step"]) == 2
        optimizer.load_state_dict(saved)
        assert optimizer.telemetry()["step"] == 2

    def test_it_stays_where_all_groups_are_replaced_or_moved(self):
        net = mlp()
        optimizer = CruxyOptimizer(net[0].parameters(), mode="self_driving")
        train(net, optimizer, 2)
        optimizer.param_groups.clear()
        optimizer.state.clear()
        optimizer.add_param_group({"params": net[2].parameters()})
        train(net, optimizer, 1, start=2)
        assert optimizer.telemetry()["step"] == 3
        optimizer.add_param_group({"params": net[0].parameters()})
        optimizer.param_groups.reverse()
        train(net, optimizer, 1, start=3)
        assert ["controller" in group for group in optimizer.param_groups] == [True, False]
        assert optimizer.telemetry()["step"] == 4


def test_groups_of_other_optimizers_pass_too():
    extra = {"params": [torch.nn.Parameter(torch.ones(3))], "weight_decay": 0.1, "lr": 0.1}
    for make in (cruxy_torch.AXIOM, cruxy_torch.Tiger, cruxy_torch.Cosmic, torch.optim.AdamW):
        group = dict(make([dict(extra)]).param_groups[0])
        optimizer = CruxyOptimizer([torch.torch.nn.Parameter(torch.ones(3))])
        optimizer.add_param_group({**group, "params": [torch.torch.nn.Parameter(torch.ones(2))]})


def test_a_vector_of_stacked_layers_takes_adam():
    def moved(size, **group):
        p = torch.nn.Parameter(torch.ones(3, 4))
        optimizer = CruxyOptimizer(
            [{"params": [p], **group}], mode="self_driving", direction="muon", weight_decay=0.0
        )
        p.grad = torch.full_like(p, size)
        optimizer.step(loss=1.0)
        assert set(optimizer.state[p]) >= {"exp_avg", "exp_avg_sq"}
        return p.detach()

    for size in (1e-2, 1e3):
        stacked = moved(size, role="matrix", stacked=True)
        assert torch.equal(stacked, moved(size, role="embedding"))
        assert (stacked < 1.0).all()


def test_stacked_is_no_pattern():
    group = {
        "params": [torch.nn.Parameter(torch.ones(3, 4, 4))],
        "role": "matrix",
        "stacked": "layers.*",
    }
    with pytest.raises(TypeError, match=r"must be True or False, got 'layers\.\*'"):
        CruxyOptimizer([group], mode="self_driving", direction="muon")


def test_a_cooldown_is_counted_in_int32():
    optimizer = CruxyOptimizer([torch.nn.Parameter(torch.ones(3))], mode="self_driving")
    with pytest.raises(ValueError, match="steps must be in"):
        optimizer.cooldown(2**40)
