"""`optimizer.debug_check`: what it measures, what it names, and that nothing changes by looking."""

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cruxy_control import Meta3  # noqa: E402
from cruxy_torch import (  # noqa: E402
    AXIOM,
    Cosmic,
    CruxyOptimizer,
    label_roles,
    param_groups,
)

NAN = float("nan")


class Layer(torch.nn.Module):
    """A little of everything: names that tell a role, a matrix that is coded, a running mean."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.tokens = torch.nn.Embedding(8, 64)
        self.self_attn = torch.nn.ModuleDict(
            {"q_proj": torch.nn.Linear(64, 64), "o_proj": torch.nn.Linear(64, 64)}
        )
        self.bn = torch.nn.BatchNorm1d(64)
        self.to(dtype)

    def forward(self, x):
        x = self.tokens(x)
        return self.bn(self.self_attn["o_proj"](self.self_attn["q_proj"](x).tanh()))


OPTIMIZERS = {
    "adam": lambda net, **more: CruxyOptimizer(net.parameters(), **more),
    "self_driving": lambda net, **more: CruxyOptimizer(
        net.parameters(), mode="self_driving", **more
    ),
    "lion8": lambda net, **more: CruxyOptimizer(net.parameters(), use_lion=True, state_bits=8),
    "adam4": lambda net, **more: CruxyOptimizer(net.parameters(), state_bits=4),
    "adam16": lambda net, **more: CruxyOptimizer(net.parameters(), state_bits=16),
    "axiom": lambda net, **more: AXIOM(net.parameters(), momentum=0.9),
    "cosmic": lambda net, **more: Cosmic(net.parameters(), state_budget="40KB"),
}


def trained(name="adam", steps=2, dtype=torch.float32, **more):
    torch.manual_seed(0)
    net = Layer(dtype)
    optimizer = OPTIMIZERS[name](net, **more)
    for step in range(steps):
        take(net, optimizer, step)
    return net, optimizer


def take(net, optimizer, step=0):
    optimizer.zero_grad()
    loss = (net(torch.arange(8)) * (1.0 + step)).square().mean()
    loss.backward()
    optimizer.step(loss=loss.detach())


def rms(*tensors):
    flat = np.concatenate([t.detach().double().numpy().ravel() for t in tensors])
    return float(np.sqrt(np.mean(flat**2)))


def snapshot(net, optimizer):
    state = optimizer.state_dict()
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return copy.deepcopy((net.state_dict(), state["state"], state["param_groups"], grads))


def same(a, b):
    """Whether two nests of tensors and values are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class TestNumbers:
    def test_sizes_are_those_of_numpy(self):
        net, optimizer = trained()
        weight = net.self_attn["q_proj"].weight
        values = {t.name: t.values for t in optimizer.debug_check(net).tensors}
        found = {k: v.rms for k, v in values["self_attn.q_proj.weight"].items()}
        state = optimizer.state[weight]
        want = {
            "parameter": rms(weight),
            "gradient": rms(weight.grad),
            "exp_avg": rms(state["exp_avg"]),
            "exp_avg_sq": rms(state["exp_avg_sq"]),
        }
        assert found == pytest.approx(want, rel=1e-12)

    def test_roles_add_up_their_tensors(self):
        net, optimizer = trained()
        biases = [net.self_attn["q_proj"].bias, net.self_attn["o_proj"].bias]
        role = optimizer.debug_check(net).roles["bias"]
        assert (role.tensors, role.values["gradient"].elements) == (2, 128)
        assert role.values["gradient"].rms == pytest.approx(rms(*(b.grad for b in biases)))

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_a_block_around_a_step_knows_the_update(self, name):
        net, optimizer = trained(name)
        before = net.self_attn["o_proj"].weight.detach().clone()
        with optimizer.debug_check(net) as check:
            take(net, optimizer)
        (found,) = [t for t in check.tensors if t.name == "self_attn.o_proj.weight"]
        after = net.self_attn["o_proj"].weight
        assert found.ratio == pytest.approx(rms(after - before) / rms(after), rel=1e-5)

    def test_several_steps_in_a_block_are_one_update(self):
        net, optimizer = trained()
        before = net.tokens.weight.detach().clone()
        with optimizer.debug_check(net) as check:
            take(net, optimizer)
            take(net, optimizer)
        assert check.roles["embedding"].values["update"].rms == pytest.approx(
            rms(net.tokens.weight - before), rel=1e-5
        )

    def test_an_error_in_the_block_comes_through(self):
        net, optimizer = trained()
        check = optimizer.debug_check(net)
        with pytest.raises(ZeroDivisionError), check:
            _ = 1 / 0
        assert "update" not in check.tensors[0].values

    @pytest.mark.parametrize("bits", [4, 8])
    def test_coded_moments_are_decoded(self, bits):
        net, optimizer = trained("adam", state_bits=bits)
        plain = trained("adam")[1].debug_check().tensors[1].values["exp_avg"].rms
        (found,) = [
            t.values["exp_avg"].rms
            for t in optimizer.debug_check(net).tensors
            if t.name == "self_attn.q_proj.weight"
        ]
        assert found == pytest.approx(plain, rel=2.0**-bits)

    def test_numbers_whose_squares_overflow_have_a_size(self):
        net, optimizer = trained()
        net.tokens.weight.grad.fill_(1e30)
        size = optimizer.debug_check(net).roles["embedding"].values["gradient"].rms
        assert size == pytest.approx(1e30)

    def test_size_is_that_of_the_finite_numbers(self):
        net, optimizer = trained()
        net.tokens.weight.grad.fill_(2.0)[0, 0] = math.inf
        stats = optimizer.debug_check(net).roles["embedding"].values["gradient"]
        assert stats == (512, 2.0, 1)


class TestWhatBinds:
    def test_rate_is_what_the_step_applied_of_each_group(self):
        torch.manual_seed(0)
        net = Layer()
        parts = [net.tokens.parameters(), net.self_attn.parameters()]
        groups = [{"params": list(p), "lr": lr} for p, lr in zip(parts, (1e-3, 4e-3), strict=True)]
        optimizer = CruxyOptimizer(groups)
        take(net, optimizer)
        roles = optimizer.debug_check().roles
        first = optimizer.telemetry()["learning_rate"]
        assert roles["group 0"].rates == (first, first)
        assert roles["group 1"].rates == pytest.approx((4 * first, 4 * first))

    def test_rate_of_a_skipped_step_is_0(self):
        net, optimizer = trained()
        loss = net(torch.arange(8)).sum()
        loss.backward()
        net.tokens.weight.grad[0, 0] = NAN
        optimizer.step(loss=loss.detach())
        assert optimizer.debug_check().tensors[0].rate == 0.0

    @pytest.mark.parametrize("threshold", [0.5, None])
    def test_a_clip_that_binds_is_seen(self, threshold):
        net, optimizer = trained("adam", law=Meta3(clip_threshold=threshold))
        net.tokens.weight.grad.mul_(1e4)
        optimizer.step(loss=1.0)
        assert optimizer.debug_check().clip_binds == (threshold is not None)

    def test_tensors_at_their_limit_are_named(self):
        net, optimizer = trained("adam", lr=0.02, relative_limit=0.1)
        rate = optimizer.telemetry()["learning_rate"]
        check = optimizer.debug_check(net)
        sizes = {t.name: t.values["parameter"].rms for t in check.tensors}
        whole = rms(*net.parameters())
        bound = {n: 0.1 * max(0.01, min(size, whole)) for n, size in sizes.items()}
        assert set(check.limited) == {name for name, limit in bound.items() if limit < rate}
        assert 0 < len(check.limited) < len(sizes)
        assert {t.name: t.rate for t in check.tensors} == pytest.approx(
            {name: min(rate, limit) for name, limit in bound.items()}
        )

    def test_no_rate_is_known_before_the_first_step(self):
        _, optimizer = trained(steps=0)
        check = optimizer.debug_check()
        assert math.isnan(check.tensors[0].rate)
        assert str(check).startswith("no step yet")


def _parameter(net, optimizer):
    net.self_attn["q_proj"].weight.data[3, 2] = NAN
    return "self_attn.q_proj.weight", "parameter", 1


def _gradient(net, optimizer):
    net.bn.bias.grad[5] = -math.inf
    return "bn.bias", "gradient", 1


def _first(net, optimizer):
    optimizer.state[net.self_attn["o_proj"].bias]["exp_avg"][0] = NAN
    return "self_attn.o_proj.bias", "exp_avg", 1


def _second(net, optimizer):
    optimizer.state[net.tokens.weight]["exp_avg_sq"][7, 63] = NAN
    return "tokens.weight", "exp_avg_sq", 1


def _clock(net, optimizer):
    optimizer.state[net.tokens.weight]["beta1_product"].fill_(NAN)
    return "tokens.weight", "beta1_product", 1


def _buffer(net, optimizer):
    net.bn.running_var[1] = NAN
    return "bn.running_var", "buffer", 1


def _controller(net, optimizer):
    optimizer.param_groups[0]["controller"]["controls"][0] = NAN
    return "controller", "controls", 1


PLACES = [_parameter, _gradient, _first, _second, _clock, _buffer, _controller]


def names(check):
    return [(found.name, found.where, found.count) for found in check.nonfinite]


class TestNames:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_nothing_is_named_where_all_is_well(self, name):
        net, optimizer = trained(name)
        assert optimizer.debug_check(net).nonfinite == ()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("plant", PLACES)
    def test_one_planted_anywhere_is_named(self, plant, dtype):
        net, optimizer = trained(dtype=dtype)
        planted = plant(net, optimizer)
        check = optimizer.debug_check(net)
        assert names(check) == [planted]
        assert f"{planted[0]}: {planted[1]} (1 of" in str(check)

    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
    def test_one_in_codes_is_named(self, bits, moment):
        net, optimizer = trained("adam", state_bits=bits)
        state = optimizer.state[net.self_attn["q_proj"].weight]
        state[f"{moment}_scales"][2] = NAN
        assert names(optimizer.debug_check(net)) == [("self_attn.q_proj.weight", moment, 256)]

    @pytest.mark.parametrize("key", ["row_var", "col_var"])
    def test_one_in_a_factor_is_named(self, key):
        net, optimizer = trained("axiom")
        optimizer.state[net.self_attn["q_proj"].weight][key].view(-1)[1] = NAN
        assert names(optimizer.debug_check(net)) == [("self_attn.q_proj.weight", key, 1)]

    def test_a_step_that_was_skipped_leaves_nothing_to_name(self):
        net, optimizer = trained()
        net.tokens.weight.grad[0, 0] = NAN
        optimizer.step(loss=1.0)
        optimizer.zero_grad()
        assert names(optimizer.debug_check(net)) == []

    def test_one_in_an_average_is_named(self):
        net, optimizer = trained("self_driving")
        optimizer.state[net.tokens.weight]["average"][0, 0] = NAN
        assert names(optimizer.debug_check(net)) == [("tokens.weight", "average", 1)]

    def test_one_in_the_update_is_named(self):
        net, optimizer = trained()
        with optimizer.debug_check(net) as check:
            net.bn.weight.data[0] = NAN
        assert names(check) == [("bn.weight", "parameter", 1), ("bn.weight", "update", 1)]

    def test_one_in_a_frozen_parameter_is_named(self):
        torch.manual_seed(0)
        net = Layer()
        optimizer = CruxyOptimizer(net.self_attn.parameters())
        net.tokens.weight.data[0, 0] = NAN
        check = optimizer.debug_check(net)
        assert names(check) == [("tokens.weight", "parameter", 1)]
        assert math.isnan(check.roles["embedding"].rates[0])

    def test_groups_and_places_name_what_has_no_name(self):
        net, optimizer = trained()
        list(net.parameters())[3].grad[0, 0] = NAN
        assert names(optimizer.debug_check()) == [
            ("group 0, parameter 3 (shape (64, 64))", "gradient", 1)
        ]

    @pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="has no names"
    )
    def test_names_that_came_with_the_parameters_are_used(self):
        net = Layer()
        optimizer = CruxyOptimizer(net.named_parameters())
        assert optimizer.debug_check().tensors[0].name == "tokens.weight"

    def test_roles_and_names_of_groups_are_used(self):
        net = Layer()
        optimizer = CruxyOptimizer(param_groups(net, lr=1e-3))
        found = {t.name: t.role for t in optimizer.debug_check().tensors}
        assert found == {t.name: t.role for t in optimizer.debug_check(net).tensors}
        assert found == label_roles(net)

    def test_roles_of_groups_are_those_with_the_model_too(self):
        net = Layer()
        rules = [("*o_proj.weight", "head")]
        optimizer = CruxyOptimizer(param_groups(net, rules=rules, lr=1e-3))
        found = {t.name: t.role for t in optimizer.debug_check(net).tensors}
        assert found == label_roles(net, rules)
        check = optimizer.debug_check(net, rules=[("*o_proj.weight", "matrix")])
        assert {t.name: t.role for t in check.tensors}["self_attn.o_proj.weight"] == "matrix"

    @pytest.mark.parametrize("change", ["taken", "added"])
    def test_names_that_no_longer_fit_are_not_used(self, change):
        net, optimizer = trained(steps=0)
        (group,) = optimizer.param_groups
        group["param_names"] = [name for name, _ in net.named_parameters()]
        if change == "taken":
            group["params"].pop(0)
        else:
            group["params"].append(torch.nn.Parameter(torch.ones(3)))
        group["params"][0].grad = torch.full_like(group["params"][0], NAN)
        shape, count = ((64, 64), 4096) if change == "taken" else ((8, 64), 512)
        place = f"group 0, parameter 0 (shape {shape})"
        assert names(optimizer.debug_check()) == [(place, "gradient", count)]

    def test_rules_name_roles(self):
        net, optimizer = trained()
        check = optimizer.debug_check(net, rules=[("tokens.*", "head")])
        assert check.tensors[0].role == "head"


class TestLooking:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_nothing_changes(self, name):
        net, optimizer = trained(name)
        before = snapshot(net, optimizer)
        with optimizer.debug_check(net) as check:
            pass
        str(check)
        assert same(before, snapshot(net, optimizer))

    def test_a_run_that_is_looked_at_is_the_same(self):
        net, optimizer = trained(steps=0)
        for step in range(3):
            with optimizer.debug_check(net):
                take(net, optimizer, step)
        assert same(snapshot(net, optimizer), snapshot(*trained(steps=3)))

    def test_the_host_reads_once(self, monkeypatch):
        """Whatever takes numbers out of a tensor is counted."""
        net, optimizer = trained("self_driving", lr=torch.tensor(1.0))
        reads = []

        def counted(name, original):
            return lambda *args, **kwargs: (reads.append(name), original(*args, **kwargs))[1]

        for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__",
                     "__index__", "__array__"):  # fmt: skip
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, counted(name, original))
        optimizer.debug_check(net)
        assert reads == ["tolist"]

    def test_released_gradients_leave_parameters_and_updates(self):
        net, optimizer = trained()
        optimizer.register_hooks()
        with optimizer.debug_check(net) as check:
            take(net, optimizer)
        assert set(check.tensors[0].values) == {"parameter", "update", "exp_avg", "exp_avg_sq"}


class TestErrors:
    def test_a_model_that_is_none(self):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
            trained(steps=0)[1].debug_check([])

    def test_parameters_without_values(self):
        with torch.device("meta"):
            net = Layer()
        with pytest.raises(ValueError, match=r"got tokens\.weight on the meta device"):
            CruxyOptimizer(net.parameters()).debug_check(net)

    def test_rules_without_a_model(self):
        with pytest.raises(ValueError, match="rules need the model"):
            trained(steps=0)[1].debug_check(rules=[("*", "head")])


def worker(rank, folder):
    """Plants one NaN in the shard of the second rank alone, in each place in turn."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save([sharded(rank, bits) for bits in (32, 8)], f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def sharded(rank, bits):
    """What is found, the sizes, and those that were seen."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 901), torch.nn.Linear(901, 5))
    fully_shard(net)
    optimizer = CruxyOptimizer(net.parameters(), state_bits=bits)
    for step in range(2):
        optimizer.zero_grad()
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())
    weight, clean = net[0].weight, optimizer.debug_check(net)
    kept = optimizer.state[weight]["exp_avg" if bits == 32 else "exp_avg_scales"]
    places = {"parameter": weight.data, "gradient": weight.grad, "exp_avg": kept}
    found = {}
    for where, tensor in places.items():
        part = tensor.to_local().view(-1)
        old = part[-1].clone()
        if rank == 1:
            part[-1] = NAN
        found[where] = names(optimizer.debug_check(net))
        part[-1] = old
    wholes = {"parameter": weight.full_tensor(), "gradient": weight.grad.full_tensor()}
    sizes = {name: rms(whole) for name, whole in wholes.items()}
    return found, sizes, {name: clean.tensors[0].values[name].rms for name in sizes}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks saw, with moments in 32 and in 8 bits."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(worker, (folder,), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("bits", [32, 8])
class TestShards:
    def test_one_in_another_ranks_shard_is_named(self, ranks, bits):
        last = 1 if bits == 32 else 450 * 64 % 256  # the second shard ends within a block
        counts = {"parameter": 1, "gradient": 1, "exp_avg": last}
        want = {where: [("0.weight", where, count)] for where, count in counts.items()}
        assert [rank[bits == 8][0] for rank in ranks] == [want, want]

    def test_sizes_are_those_of_the_whole(self, ranks, bits):
        for rank in ranks:
            _, sizes, seen = rank[bits == 8]
            assert seen == pytest.approx(sizes)
