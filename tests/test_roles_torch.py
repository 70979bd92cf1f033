"""Roles in PyTorch: groups for any optimizer, tables, masks, wrapped and tied models."""

import copy
import math
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cruxy_torch  # noqa: E402
from cruxy_torch import label_roles, param_groups, role_mask, role_table  # noqa: E402


class Block(nn.Module):
    """An attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm2, self.mlp = (
            nn.LayerNorm(16),
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
        )

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """A small language model."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 16), nn.Embedding(8, 16)
        self.blocks, self.ln_f = nn.ModuleList([Block(), Block()]), nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def net(**options):
    torch.manual_seed(0)
    return Net(**options)


def train(model, optimizer, steps=2):
    for step in range(steps):
        tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(
            model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(**({"loss": loss} if hasattr(optimizer, "telemetry") else {}))
    return {name: param.detach().clone() for name, param in model.named_parameters()}


ROLES = {
    "wte.weight": "embedding",
    "wpe.weight": "position",
    "ln_f.weight": "norm",
    "ln_f.bias": "norm.bias",
    "lm_head.weight": "head",
} | {
    f"blocks.{i}.{name}": role
    for i in (0, 1)
    for name, role in {
        "norm1.weight": "norm",
        "norm1.bias": "norm.bias",
        "attn.in_proj_weight": "attention.qkv",
        "attn.in_proj_bias": "bias",
        "attn.out_proj.weight": "attention.out",
        "attn.out_proj.bias": "bias",
        "norm2.weight": "norm",
        "norm2.bias": "norm.bias",
        "mlp.0.weight": "mlp.up",
        "mlp.0.bias": "bias",
        "mlp.2.weight": "mlp.down",
        "mlp.2.bias": "bias",
    }.items()
}


def test_a_model_of_ones_own_is_labelled_in_its_own_order():
    labels = label_roles(net())
    assert labels == ROLES
    assert list(labels) == [name for name, _ in net().named_parameters()]


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "cruxy": lambda groups: cruxy_torch.CruxyOptimizer(groups, mode="stability_v1"),
    "cruxy self-driving": lambda groups: cruxy_torch.CruxyOptimizer(groups, mode="self_driving"),
    "axiom": cruxy_torch.AXIOM,
    "cosmic": cruxy_torch.Cosmic,
}


class TestGroups:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_every_optimizer_takes_them(self, name):
        model = net()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        rates = {"attention": 0, "bias": 0}
        optimizer = OPTIMIZERS[name](param_groups(model, lr=1e-2, rates=rates))
        after = train(model, optimizer)
        still = {name for name in before if torch.equal(before[name], after[name])}
        assert still == {n for n, role in ROLES.items() if role.partition(".")[0] in rates}

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_groups_with_all_rates_of_1_train_as_none(self, name):
        one, other = net(), net()
        grouped = train(one, OPTIMIZERS[name](param_groups(one, lr=1e-3)))
        plain = OPTIMIZERS[name](
            [{"params": list(other.parameters()), "lr": 1e-3, "weight_decay": 0.0}]
        )
        plain = train(other, plain)
        # AXIOM's random bits are numbered by place; the law adds up norms in another order.
        bound = 2e-3 if name in ("axiom", "cosmic") else 1e-5 if "cruxy" in name else 0.0
        assert max((grouped[n] - plain[n]).abs().max() for n in plain) <= bound

    def test_each_parameter_is_in_one_group_with_its_name(self):
        model = net()
        named = dict(model.named_parameters())
        groups = param_groups(model, lr=1e-3)
        pairs = [(n, p) for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)]
        assert len(pairs) == len(named)
        assert all(named[name] is param for name, param in pairs)
        assert all(ROLES[n] == g["role"] for g in groups for n in g["param_names"])

    def test_rates_and_decays_are_multiplied_by_the_longest_key(self):
        rates = {"attention": 2, "attention.out": 3, "norm": 0.5}
        decays = {"mlp": 0, "mlp.down": 0.5, "norm.bias": 1}
        groups = param_groups(net(), lr=0.1, weight_decay=0.2, rates=rates, decays=decays)
        found = {group["role"]: (group["lr"], group["weight_decay"]) for group in groups}
        assert found == {
            "embedding": (0.1, 0.2),
            "position": (0.1, 0.0),
            "norm": (0.05, 0.0),
            "norm.bias": (0.05, 0.2),
            "attention.qkv": (0.2, 0.2),
            "attention.out": (0.1 * 3, 0.2),
            "bias": (0.1, 0.0),
            "mlp.up": (0.1, 0.0),
            "mlp.down": (0.1, 0.1),
            "head": (0.1, 0.2),
        }

    def test_a_bias_takes_the_rate_of_biases_alone(self):
        groups = param_groups(net(), lr=1.0, rates={"attention": 2, "mlp": 2})
        assert {g["lr"] for g in groups if g["role"] == "bias"} == {1.0}

    def test_a_bare_matrix_and_that_of_a_layer_have_a_group_each(self):
        model = nn.ModuleDict(
            {"a": nn.Linear(4, 4, bias=False), "b": nn.ParameterList([torch.ones(4, 4)])}
        )
        groups = param_groups(model, lr=1.0, weight_decay=0.1)
        assert [(g["role"], g["param_names"], g["weight_decay"]) for g in groups] == [
            ("matrix", ["a.weight"], 0.1),
            ("matrix", ["b.0"], 0.0),
        ]

    def test_what_is_frozen_is_left_out(self):
        model = net().requires_grad_(False)
        model.lm_head.requires_grad_(True)
        assert [g["param_names"] for g in param_groups(model, lr=1.0)] == [["lm_head.weight"]]

    def test_a_rate_in_a_tensor_is_copied_for_each_group(self):
        lr = torch.tensor(0.5)
        groups = param_groups(net(), lr=lr, rates={"norm": 3})
        lr.fill_(9.0)
        assert {g["role"]: g["lr"].item() for g in groups}["norm.bias"] == 1.5
        assert len({id(g["lr"]) for g in groups} | {id(lr)}) == len(groups) + 1

    def test_roles_and_names_are_saved_and_loaded(self):
        model = net()
        optimizer = cruxy_torch.CruxyOptimizer(param_groups(model, lr=1e-3))
        train(model, optimizer)
        other = cruxy_torch.CruxyOptimizer(param_groups(net(), lr=1e-3))
        other.load_state_dict(optimizer.state_dict())
        assert role_table(other) == role_table(optimizer)

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
    @pytest.mark.parametrize("name", ["rates", "decays"])
    def test_a_factor_outside_its_range_is_refused(self, name, value):
        with pytest.raises(ValueError, match=rf"{name}\['norm'\] must be in \[0, infinity\)"):
            param_groups(net(), lr=1.0, weight_decay=0.1, **{name: {"norm": value}})

    @pytest.mark.parametrize("value", [True, "1", None])
    def test_a_factor_that_is_no_number_is_refused(self, value):
        with pytest.raises(TypeError, match="must be a number"):
            param_groups(net(), lr=1.0, rates={"norm": value})

    @pytest.mark.parametrize("name", ["rates", "decays"])
    def test_an_unknown_role_is_refused_with_those_that_are_there(self, name):
        message = rf"keys of {name} must be roles .* got 'attn'; this model has attention.out, att"
        with pytest.raises(ValueError, match=message):
            param_groups(net(), lr=1.0, weight_decay=0.1, **{name: {"attn": 2.0}})

    def test_a_decay_of_nothing_is_refused(self):
        with pytest.raises(ValueError, match="decays multiply weight_decay"):
            param_groups(net(), lr=1.0, decays={"head": 0.1})

    @pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": 1.0, "weight_decay": math.nan}])
    def test_numbers_outside_their_range_are_refused(self, options):
        with pytest.raises(ValueError, match="must be in"):
            param_groups(net(), **options)

    def test_a_model_in_which_nothing_is_trained_is_refused(self):
        with pytest.raises(ValueError, match="some parameter must require a gradient"):
            param_groups(net().requires_grad_(False), lr=1.0)

    def test_what_is_no_model_is_refused(self):
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got list"):
            param_groups(list(net().parameters()), lr=1.0)


class TestShared:
    def test_a_tied_weight_is_an_embedding_once(self):
        model = net(tied=True)
        assert "lm_head.weight" not in label_roles(model)
        row = next(row for row in role_table(model).rows if row.example == "wte.weight")
        assert (row.role, row.tied, row.tensors) == ("embedding", ("head",), 1)

    def test_a_parameter_in_two_roles_is_refused_by_both_names(self):
        model = net()
        model.blocks[0].mlp[2].weight = nn.Parameter(torch.zeros(16, 16))
        model.blocks[0].attn.out_proj.weight = model.blocks[0].mlp[2].weight
        message = (
            r"attention.out as 'blocks.0.attn.out_proj.weight' and mlp.down as 'blocks.0.mlp.2.w"
        )
        with pytest.raises(ValueError, match=message):
            label_roles(model)

    def test_a_rule_decides_between_two_roles(self):
        model = net()
        model.blocks[0].attn.out_proj.weight = model.blocks[0].mlp[0].weight
        labels = label_roles(model, rules=[("*.attn.out_proj.weight", "attention.out")])
        assert labels["blocks.0.attn.out_proj.weight"] == "attention.out"

    def test_what_one_name_tells_is_enough(self):
        model = nn.ModuleDict(
            {"some": nn.Linear(4, 4), "attn": nn.ModuleDict({"q": nn.Linear(4, 4)})}
        )
        model["some"].weight = model["attn"]["q"].weight
        assert label_roles(model)["some.weight"] == "attention.q"


class TestMask:
    def test_it_holds_names_and_tensors_of_its_roles(self):
        model = net()
        mask = role_mask(model, "attention.out", "mlp")
        inside = [n for n, role in ROLES.items() if role in ("attention.out", "mlp.up", "mlp.down")]
        assert list(mask) == inside
        assert [n for n, p in model.named_parameters() if mask(p)] == inside
        assert [n for n in ROLES if n in mask] == inside
        assert len(mask) == 6

    def test_a_tied_weight_is_in_by_both_of_its_names(self):
        mask = role_mask(net(tied=True), "embedding")
        assert "wte.weight" in mask
        assert "lm_head.weight" in mask
        assert list(mask) == ["wte.weight"]

    def test_it_selects_what_is_kept_in_few_bits(self):
        model = nn.ModuleDict(
            {"mlp": nn.ModuleDict({"fc1": nn.Linear(64, 80)}), "other": nn.Linear(64, 80)}
        )
        mask = role_mask(model, "mlp")
        optimizer = cruxy_torch.CruxyOptimizer(model.parameters(), state_bits=8, select=mask)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        coded = [n for n, p in model.named_parameters() if "exp_avg_codes" in optimizer.state[p]]
        assert coded == ["mlp.fc1.weight"]

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_it_is_copied_with_its_tensors(self, copied):
        model, mask = copied((net(), role_mask(net(), "head")))
        model, mask = copied((model := net(), role_mask(model, "head")))
        assert [n for n, p in model.named_parameters() if mask(p)] == ["lm_head.weight"]

    def test_names_of_wrappers_make_no_difference(self):
        model = net()
        compiled = torch.compile(model)
        for mask in (role_mask(model, "mlp"), role_mask(compiled, "mlp")):
            assert "_orig_mod.blocks.0.mlp.0.weight" in mask
            assert "blocks.0.mlp.0.weight" in mask
            assert "blocks.0.attn.in_proj_weight" not in mask

    def test_a_wrapper_and_what_it_wraps_are_told_apart_by_name(self):
        layer = Around(nn.Linear(4, 4, bias=False))
        layer.weight = layer.gamma
        del layer.gamma
        mask = role_mask(nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": layer})}), "vector")
        assert "attn.q_proj.weight" in mask
        assert "attn.q_proj.module.weight" not in mask

    def test_a_tensor_of_another_model_is_refused(self):
        with pytest.raises(
            ValueError, match=r"a parameter of its model, got another of shape \(3,\)"
        ):
            role_mask(net(), "mlp")(torch.zeros(3))

    def test_no_role_and_an_unknown_one_are_refused(self):
        with pytest.raises(ValueError, match="must be given roles"):
            role_mask(net())
        with pytest.raises(ValueError, match="got 'attn'; this model has"):
            role_mask(net(), "attn")


class TestTable:
    def test_rows_add_up_to_the_model(self):
        model = net()
        rows = role_table(model).rows
        assert sum(row.tensors for row in rows) == len(ROLES)
        assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())

    def test_printed_it_has_factors_examples_and_slices(self):
        table = role_table(net(tied=True), rates={"embedding": 1 / 3}, decays={"head": 0})
        assert str(table).splitlines()[:4] == [
            f"{'role':<22}tensors      parameters      rate    decay  decided by  for example",
            f"{'embedding':<22}      1             176   x 0.333      x 1  class       wte.weight"
            "  (tied: head)",
            f"{'position':<22}      1             128       x 1      x 0  class       wpe.weight",
            f"{'norm':<22}      5              80       x 1      x 0  class       "
            "blocks.0.norm1.weight",
        ]
        assert "blocks.0.attn.in_proj_weight  (axis 0: q 16, k 16, v 16)" in str(table)

    def test_biases_stand_by_what_they_belong_to(self):
        rows = [row for row in role_table(net()).rows if row.role == "bias"]
        assert [row.of for row in rows] == ["attention.qkv", "attention.out", "mlp.up", "mlp.down"]

    def test_of_an_optimizer_it_has_what_the_groups_have_now(self):
        optimizer = torch.optim.AdamW(param_groups(net(), lr=1e-3, weight_decay=0.1))
        optimizer.param_groups[0]["lr"] = 0.25
        row = role_table(optimizer).rows[0]
        assert (row.role, row.rate, row.decay, row.example) == (
            "embedding",
            0.25,
            0.1,
            "wte.weight",
        )

    def test_an_optimizer_with_names_is_labelled_by_them(self):
        model = net()
        try:
            optimizer = torch.optim.SGD(model.named_parameters(), lr=0.5)
        except TypeError:
            pytest.skip("this torch takes no names")
        table = role_table(optimizer)
        found = {row.example: row.role for row in table.rows}
        assert found["wte.weight"] == "embedding"
        assert found["blocks.0.attn.in_proj_weight"] == "attention.qkv"
        assert {row.rate for row in table.rows} == {0.5}

    def test_a_group_that_is_added_later_is_in_it(self):
        model = net()
        groups = param_groups(model, lr=1e-3)
        optimizer = cruxy_torch.CruxyOptimizer(groups[:-1])
        optimizer.add_param_group(groups[-1])
        assert role_table(optimizer) == role_table(
            torch.optim.AdamW(param_groups(net(), lr=1e-3), weight_decay=0.0)
        )

    def test_names_that_are_not_as_many_as_parameters_are_refused(self):
        optimizer = torch.optim.SGD(param_groups(net(), lr=1.0))
        optimizer.param_groups[2]["params"].pop(0)
        with pytest.raises(ValueError, match="as many param_names as params, got 5 and 4 in group"):
            role_table(optimizer)

    def test_an_optimizer_without_names_is_refused(self):
        with pytest.raises(ValueError, match="groups of an optimizer must have roles or names"):
            role_table(torch.optim.SGD(net().parameters(), lr=1.0))

    def test_rates_for_an_optimizer_are_refused(self):
        optimizer = torch.optim.SGD(param_groups(net(), lr=1.0))
        with pytest.raises(ValueError, match="must be left out for an optimizer"):
            role_table(optimizer, rates={"norm": 2})

    def test_what_is_neither_is_refused(self):
        with pytest.raises(TypeError, match=r"a torch.nn.Module or a torch optimizer, got dict"):
            role_table({})


def plain(labels: dict[str, str]) -> list[str]:
    """The roles alone, in order."""
    return list(labels.values())


class TestWrapped:
    def test_compiled_models_have_the_same_roles(self):
        assert plain(label_roles(torch.compile(net()))) == plain(ROLES_IN_ORDER)

    def test_parametrized_weights_have_the_same_role(self):
        model = net()
        nn.utils.parametrizations.spectral_norm(model.blocks[0].mlp[0])
        nn.utils.parametrizations.weight_norm(model.blocks[0].mlp[2])
        labels = label_roles(model)
        assert labels["blocks.0.mlp.0.parametrizations.weight.original"] == "mlp.up"
        assert labels["blocks.0.mlp.2.parametrizations.weight.original0"] == "vector"
        assert labels["blocks.0.mlp.2.parametrizations.weight.original1"] == "mlp.down"

    def test_checkpointed_layers_have_the_same_roles(self):
        wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
        model = net()
        model.blocks[0].mlp[0] = wrapper.checkpoint_wrapper(model.blocks[0].mlp[0])
        model.blocks[1] = wrapper.checkpoint_wrapper(model.blocks[1])
        assert plain(label_roles(model)) == plain(ROLES_IN_ORDER)

    def test_sharded_models_have_the_same_table(self, one_rank):
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        if not hasattr(fsdp, "fully_shard"):
            pytest.skip("this torch has no fully_shard")
        model, whole = net(), net()
        for block in model.blocks:
            fsdp.fully_shard(block, mesh=one_rank)
        fsdp.fully_shard(model, mesh=one_rank)
        assert role_table(model) == role_table(whole)
        optimizer = cruxy_torch.CruxyOptimizer(param_groups(model, lr=1e-3))
        assert role_table(optimizer) == role_table(
            cruxy_torch.CruxyOptimizer(param_groups(whole, lr=1e-3))
        )


class Around(nn.Module):
    """A module with a vector of its own around another."""

    def __init__(self, module):
        super().__init__()
        self.module, self.gamma = module, nn.Parameter(torch.ones(4))


class TestOwners:
    @pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Embedding(4, 4)])
    def test_what_a_wrapper_owns_is_not_what_it_wraps(self, layer):
        model = nn.ModuleDict({"attn": nn.ModuleDict({"out": Around(layer)})})
        (group,) = (
            group
            for group in param_groups(model, lr=1.0, weight_decay=0.1)
            if "attn.out.gamma" in group["param_names"]
        )
        assert (group["role"], group["weight_decay"]) == ("vector", 0.0)

    def test_the_gain_of_a_convolution_is_not_decayed(self):
        layer = nn.Conv2d(3, 4, 3, bias=False)
        layer.gain = nn.Parameter(torch.ones(4, 1, 1, 1))
        groups = param_groups(layer, lr=1.0, weight_decay=0.1)
        found = {name: g["weight_decay"] for g in groups for name in g["param_names"]}
        assert found == {"weight": 0.1, "gain": 0.0}

    def test_the_weight_of_a_class_of_ones_own_is_decayed(self):
        layer = type("ColumnParallelLinear", (nn.Module,), {})()
        layer.weight = nn.Parameter(torch.ones(4, 4))
        layer.table = nn.Parameter(torch.ones(4, 4))
        groups = param_groups(nn.ModuleDict({"layer": layer}), lr=1.0, weight_decay=0.1)
        found = {name: g["weight_decay"] for g in groups for name in g["param_names"]}
        assert found == {"layer.weight": 0.1, "layer.table": 0.0}

    def test_a_child_that_leads_back_to_its_parent_changes_nothing(self):
        model = net()
        model.blocks[0].parent = model
        assert label_roles(model) == ROLES_IN_ORDER
        assert role_table(model) == role_table(net())
        assert cruxy_torch.qkv_slices(model) == cruxy_torch.qkv_slices(net())

    def test_a_model_of_several_outputs_that_wants_to_know_which_has_roles(self):
        cls = type("Several", (Net,), {"get_output_embeddings": lambda self, i: None})
        assert label_roles(cls()) == ROLES_IN_ORDER


class TestFlat:
    @pytest.mark.parametrize("rows", [192, 0])
    @pytest.mark.parametrize("name", ["linear1", "self_attn"])
    def test_weights_that_have_lost_their_shapes_are_refused(self, name, rows):
        model = nn.TransformerEncoderLayer(8, 2, 16)
        leaf = "in_proj_weight" if name == "self_attn" else "weight"
        setattr(getattr(model, name), leaf, nn.Parameter(torch.zeros(rows)))
        with pytest.raises(ValueError, match=rf"got {name}.{leaf} of shape \({rows},\), as Fully"):
            param_groups(model, lr=1.0)

    def test_a_flat_parameter_is_refused(self, one_rank):
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        model = fsdp.FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"got .*_flat_param of shape .* use fully_shard, or"):
            label_roles(model)


ROLES_IN_ORDER = {name: ROLES[name] for name, _ in net().named_parameters()}


@pytest.fixture
def one_rank():
    """A mesh of this process alone."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


class TestAdapters:
    @pytest.fixture
    def adapted(self):
        peft = pytest.importorskip("peft")
        from transformers import LlamaConfig, LlamaForCausalLM

        from role_models import GROUPED

        def make(**options):
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**GROUPED))
            options.setdefault("target_modules", ["q_proj", "down_proj", "embed_tokens"])
            config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
            return model, peft.get_peft_model(copy.deepcopy(model), config)

        return make

    def test_what_is_adapted_keeps_its_role(self, adapted):
        plain_model, model = adapted(modules_to_save=["lm_head"])
        labels = label_roles(model)
        for name, role in label_roles(plain_model).items():
            parts = f"base_model.model.{name}".rpartition(".")
            possible = {
                f"{parts[0]}.{inner}{parts[2]}" for inner in ("", "base_layer.", "original_module.")
            }
            assert {labels[n] for n in possible if n in labels} == {role}, name

    def test_adapters_belong_to_what_they_adapt(self, adapted):
        _, model = adapted(use_dora=False)
        rows = [(r.role, r.of, r.tensors) for r in role_table(model).rows if r.role[:4] == "lora"]
        assert rows == [
            ("lora.a", "embedding", 1),
            ("lora.b", "embedding", 1),
            ("lora.a", "attention.q", 2),
            ("lora.b", "attention.q", 2),
            ("lora.a", "mlp.down", 2),
            ("lora.b", "mlp.down", 2),
        ]

    def test_magnitudes_are_scales_that_are_not_decayed(self, adapted):
        _, model = adapted(use_dora=True)
        groups = param_groups(model, lr=1e-3, weight_decay=0.1)
        found = {g["role"]: (len(g["params"]), g["weight_decay"]) for g in groups}
        assert found == {"lora.a": (5, 0.1), "lora.b": (5, 0.1), "lora.scale": (5, 0.0)}

    def test_lora_plus_moves_b_sixteen_times_as_far(self, adapted):
        _, model = adapted(target_modules=["q_proj"])
        groups = param_groups(model, lr=1e-3, rates={"lora.b": 16})
        optimizer = torch.optim.AdamW(groups)
        before = [[p.detach().clone() for p in group["params"]] for group in groups]
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        moved = {
            group["role"]: max(
                (p - q).abs().max().item() for p, q in zip(group["params"], old, strict=True)
            )
            for group, old in zip(groups, before, strict=True)
        }
        # B is 0 at first, so that A has no gradient; Adam's first step is the rate.
        assert moved == {"lora.a": 0.0, "lora.b": pytest.approx(16e-3, rel=1e-3)}
