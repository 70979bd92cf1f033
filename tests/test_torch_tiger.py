"""`Tiger`, its groups and its backends' names: what is written for `tiger_optim` runs."""

import copy
import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import torch_tiger_workers as workers  # noqa: E402
from cruxy_control import LoraPid, Meta3, PlateauGuard, SelfDriving  # noqa: E402
from cruxy_control.slices import blocks  # noqa: E402
from cruxy_torch import CruxyOptimizer, Tiger, build_tagged_param_groups, use_backend  # noqa: E402
from cruxy_torch import tiger as names  # noqa: E402
from cruxy_torch._actuators.directions import Momentum, SignBlend  # noqa: E402
from cruxy_torch._actuators.lora_pid import BlendByLoraPid  # noqa: E402
from cruxy_torch._actuators.slices import BalanceSlices, ScaleSlices  # noqa: E402
from cruxy_torch._actuators.trust import (  # noqa: E402
    AdaptiveGradientClip,
    ClipRms,
    TrustRatio,
)
from relatives import crossed  # noqa: E402
from torch_low_bit import assert_same, gradients, parameters, state_of, train  # noqa: E402
from torch_released import OFF  # noqa: E402

QUICKSTART = """
import torch, torch.nn as nn
from tiger_optim import Tiger, build_tagged_param_groups

# tiny demo model
class TinyMix(nn.Module):
    def __init__(self, d=256, ff=512, heads=4):
        super().__init__()
        self.mha = nn.MultiheadAttention(d, heads, batch_first=True)
        self.up  = nn.Linear(d, ff)
        self.down= nn.Linear(ff, d)
        self.ln  = nn.LayerNorm(d)
    def forward(self, x):
        h,_ = self.mha(x,x,x)
        h = torch.nn.functional.gelu(self.up(h))
        h = self.down(h)
        return self.ln(h)

model = TinyMix()
groups = build_tagged_param_groups(model, base_lr=3e-4, base_wd=0.01, enable_qkv_slicing=True)

opt = Tiger(
    groups,
    # modern default
    factored=True, precond_alpha=1.0, trust_space="precond",
    use_foreach_update=True, bucket_standardize=True, bucket_scalarless=True,
    # premium toggles are automatically no-op on AGPL build
)

x = torch.randn(16, 32, 256)
y = torch.randn(16, 32, 256)
loss_fn = nn.MSELoss()

opt.zero_grad(set_to_none=True)
loss = loss_fn(model(x), y)
loss.backward()
opt.step()
"""
"""As its README has it; the same for the next two."""

KNOWN_GOOD = """
Tiger(..., update_buffer_dtype="fp32", lr=2e-4, agc_clip=0.02, trust_clip=5.0,
      rms_clip_threshold=1.0, rms_clip_granularity="param")
"""

LEGACY = """
Tiger(
  groups,
  factored=False, precond_alpha=0.0,      # lighten preconditioning
  use_trust_ratio=False,                  # cut extra norms
  use_foreach_update=False,               # avoid foreach overhead
  bucket_standardize=False, bucket_scalarless=False,
  update_buffer_dtype="fp32",
  lr=2e-4, agc_clip=0.02, trust_clip=5.0
)
"""


class Attention(nn.Module):
    """A transformer's block with the names that roles go by."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(32, 64), "down_proj": nn.Linear(64, 32)})
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attn(x, x, x)[0]
        return self.norm(self.mlp["down_proj"](self.mlp["up_proj"](x).tanh()))


def trained(optimizer, model, steps=3, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(0, 11, (4, 6), generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - 1.0).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return [p.detach() for p in model.parameters()]


def groups_of(seed=0):
    torch.manual_seed(seed)
    model = Attention()
    return model, build_tagged_param_groups(model, 1e-3, 0.1, enable_qkv_slicing=True)


class TestTheReadme:
    def test_its_quickstart_runs_and_moves_everything(self):
        space = {}
        with pytest.warns(UserWarning, match="use_foreach_update, bucket_standardize"):
            exec(QUICKSTART.replace("tiger_optim", "cruxy_torch.tiger"), space)
        before = [p.detach().clone() for p in space["model"].parameters()]
        space["opt"].step()
        for p, old in zip(space["model"].parameters(), before, strict=True):
            assert not torch.equal(p, old)
            assert torch.isfinite(p).all()

    @pytest.mark.parametrize("text", [KNOWN_GOOD, LEGACY])
    @pytest.mark.filterwarnings("ignore:use_foreach_update")
    def test_its_other_settings_train(self, text):
        model, groups = groups_of()
        optimizer = eval(text.strip().replace("...", "groups"), {"Tiger": Tiger, "groups": groups})
        x = torch.randint(0, 11, (4, 6))
        losses = [(model(x) - 1.0).square().mean().item()]
        trained(optimizer, model, 20)
        losses.append((model(x) - 1.0).square().mean().item())
        assert losses[1] < losses[0]


class TestGroups:
    def test_rates_and_decays_are_tigers_by_our_roles(self):
        groups = build_tagged_param_groups(Attention(), base_lr=1.0, base_wd=0.1)
        got = {g["role"]: (g["lr"], g["weight_decay"], "slices" in g) for g in groups}
        assert got == {
            "embedding": (0.5, 0.0, False),
            "attention.qkv": (1.0, 0.1, False),
            "bias": (0.5, 0.0, False),
            "attention.out": (1.0, 0.1, False),
            "mlp.up": (1.1, 0.1, False),
            "mlp.down": (0.9, 0.1, False),
            "norm": (0.5, 0.0, False),
            "norm.bias": (0.5, 0.0, False),
        }

    def test_lora_has_a_rate_of_its_own_and_no_decay(self):
        model = nn.ModuleDict({"q_proj": nn.ModuleDict({"lora_A": nn.Linear(4, 2, bias=False)})})
        (group,) = build_tagged_param_groups(model, base_lr=1.0)
        assert (group["role"], group["lr"], group["weight_decay"]) == ("lora.a", 0.8, 0.0)

    def test_slices_of_one_layout_share_a_group(self):
        model = nn.ModuleList([nn.MultiheadAttention(w, 2) for w in (8, 8, 16)])
        groups = build_tagged_param_groups(model, enable_qkv_slicing=True)
        sliced = [g for g in groups if "slices" in g]
        assert [len(g["params"]) for g in sliced] == [2, 1]
        assert sliced[1]["slices"] == tuple(blocks(16, 16, 16))
        assert sliced[1]["slice_rates"] == (0.9, 0.8, 1.1)

    def test_every_parameter_is_in_one_group(self):
        model, groups = groups_of()
        params = [p for group in groups for p in group["params"]]
        assert len(params) == len(set(params)) == len(list(model.parameters()))


class TestParts:
    def direction(self, group=None, **options):
        options = {"blend": 0.3, "use_sign": False} | options
        optimizer = Tiger([{"params": parameters((96, 64)), **(group or {})}], **options)
        return optimizer._direction_of(optimizer.param_groups[0])

    def test_alone_it_is_the_blend_with_a_hard_sign(self):
        (p,) = parameters((3,))
        optimizer = Tiger([p])
        got = optimizer._direction_of(optimizer.param_groups[0])
        assert got == SignBlend(Momentum(), temperature=0.0, weight=0.2)

    def test_without_a_blend_it_is_lion_to_the_bit(self):
        ran = []
        for make in (
            lambda ps: Tiger(ps, blend=0.0),
            lambda ps: CruxyOptimizer(ps, betas=(0.9, 0.99), use_lion=True),
        ):
            params = parameters((96, 64), (33,))
            with use_backend("reference"):  # the library sums the norms in another order
                train(params, make(params), 5)
            ran.append(params)
        assert all(map(torch.equal, *ran))

    def test_everything_is_put_together_from_the_inside_out(self):
        layout = blocks(32, 32, 32)
        group = {"slices": layout, "slice_rates": (0.9, 0.8, 1.1)}
        got = self.direction(
            group,
            agc_clip=0.1,
            rms_clip_threshold=2.0,
            rms_clip_granularity="row",
            trust_clip=5.0,
            trust_decay=0.9,
            trust_per="slice",
            balance_slices=True,
        )
        blend = AdaptiveGradientClip(SignBlend(Momentum(), 1.0, 0.3), 0.1)
        trust = TrustRatio(ClipRms(blend, 2.0, "row"), 5.0, 0.9, per="slice", slices=layout)
        rates = {"q": 0.9, "k": 0.8, "v": 1.1}
        assert got == BalanceSlices(ScaleSlices(trust, layout, rates), layout)

    @pytest.mark.parametrize(
        ("options", "power", "smallest"),
        [
            ({"factored": True}, 1.0, 32),
            ({"factored": True, "precond_alpha": 0.5}, 0.5, 32),
            ({"factored": False, "precond_alpha": 0.5}, 0.5, sys.maxsize),
        ],
    )
    def test_the_preconditioner_comes_before_the_momentum(self, options, power, smallest):
        momentum = self.direction(**options).inner
        assert isinstance(momentum, Momentum)
        second = momentum.inner
        assert (second.power, second.min_dim_size_to_factor, second.clip_rms) == (
            power,
            smallest,
            None,
        )

    @pytest.mark.parametrize("options", [{"precond_alpha": 0.0}, {"factored": False}, {}])
    def test_there_is_none_without_a_power(self, options):
        assert self.direction(**options).inner == Momentum()

    @pytest.mark.parametrize(
        ("options", "there"),
        [
            ({}, False),
            ({"trust_clip": 5.0}, True),
            ({"trust_space": "precond"}, True),
            ({"use_trust_ratio": True}, True),
            ({"use_trust_ratio": False, "trust_clip": 5.0}, False),
        ],
    )
    def test_a_trust_ratio_is_there_where_it_is_meant(self, options, there):
        assert isinstance(self.direction(**options), TrustRatio) == there

    def test_lora_is_steered_and_the_rest_is_not(self):
        params = parameters((8, 4), (8, 8))
        groups = [{"params": params[:1], "role": "lora.b"}, {"params": params[1:]}]
        pid = LoraPid(interval=3)
        optimizer = Tiger(groups, lora_pid=pid)
        lora, rest = map(optimizer._direction_of, optimizer.param_groups)
        assert lora == BlendByLoraPid(Momentum(), pid, 0.0)
        assert rest == SignBlend(Momentum(), 0.0)
        train(params, optimizer, 8)
        assert optimizer.state[params[0]]["lora_pid"][3] != pid.blend
        assert "lora_pid" not in optimizer.state[params[1]]

    def test_a_plateau_guard_is_put_around_the_law(self):
        (p,) = parameters((3,))
        optimizer = Tiger([p], plateau_patience=2)
        assert optimizer._settings.law == PlateauGuard(Meta3(), patience=2)
        for _ in range(40):
            p.grad = torch.ones(3)
            optimizer.step(loss=1.0)
        assert optimizer.telemetry()["sign_weight"] == 0.0


class TestPresets:
    def test_they_fill_in_what_is_not_given(self):
        (p,) = parameters((3,))
        modern, legacy = (Tiger([p], preset=name) for name in ("modern", "legacy"))
        assert modern._parts.factored.power == 1.0
        assert (modern._parts.trust, modern._parts.trust_space) == (10.0, "momentum")
        assert (legacy._parts.factored, legacy._parts.trust, legacy._parts.agc) == (
            None,
            None,
            0.02,
        )
        own = Tiger([p], preset="modern", precond_alpha=0.5, trust_space="update")
        assert (own._parts.factored.power, own._parts.trust_space) == (0.5, "update")

    def test_none_is_taken_unasked(self):
        assert Tiger(parameters((3,))).preset is None

    def test_auto_says_what_and_why(self, capsys):
        assert Tiger(parameters((3,)), preset="auto").preset == "modern"
        said = capsys.readouterr().out
        assert said == 'Tiger takes preset="modern", since the device is no CUDA device.\n'

    @pytest.mark.parametrize(("capability", "preset"), [((7, 5), "legacy"), ((8, 0), "modern")])
    def test_auto_goes_by_the_capability(self, capability, preset, monkeypatch, capsys):
        (p,) = parameters((3,))
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        optimizer = Tiger([{"params": [p]}], preset="auto")
        assert optimizer.preset == preset
        assert f"capability {capability[0]}.{capability[1]}" in capsys.readouterr().out


OPTIONS = {
    "plain": {},
    "quickstart": {"factored": True, "precond_alpha": 1.0, "trust_space": "precond"},
    "everything": {
        "factored": False,
        "precond_alpha": 0.5,
        "agc_clip": 0.1,
        "rms_clip_threshold": 1.0,
        "trust_clip": 5.0,
        "trust_decay": 0.9,
        "trust_per": "slice",
        "balance_slices": True,
        "plateau_patience": 2,
    },
}


@pytest.mark.parametrize(("name", "bits"), crossed(OPTIONS, [32, 8, 4]))
def test_it_resumes_to_the_bit(name, bits):
    def made(seed=0):
        model, groups = groups_of(seed)
        return model, Tiger(groups, state_bits=bits, **OPTIONS[name])

    model, optimizer = made()
    whole = trained(optimizer, model, 6)
    model, first = made()
    trained(first, model, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), first.state_dict()), file)
    file.seek(0)
    again, second = made(seed=1)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    second.load_state_dict(state)
    assert all(map(torch.equal, trained(second, again, 3, start=3), whole))
    assert_same(state_of(second), state_of(optimizer))


def test_it_is_pickled_with_its_parts():
    model, groups = groups_of()
    optimizer = Tiger(groups, **OPTIONS["everything"])
    trained(optimizer, model)
    model, twin = copy.deepcopy((model, optimizer))
    assert vars(twin._parts) == vars(optimizer._parts)
    trained(twin, model)


@pytest.mark.parametrize("name", OPTIONS)
def test_released_gradients_give_what_ordinary_steps_do(name):
    options = {k: v for k, v in OPTIONS[name].items() if k != "plateau_patience"} | {"law": OFF}
    (model, groups), (other, others) = groups_of(), groups_of()
    ordinary, released = Tiger(groups, **options), Tiger(others, **options)
    released.register_hooks()
    for ours, theirs in zip(trained(released, other), trained(ordinary, model), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_can_be_checked_and_tells_what_took_its_step():
    model, groups = groups_of()
    optimizer = Tiger(groups, **OPTIONS["everything"])
    trained(optimizer, model)
    assert not optimizer.debug_check(model).nonfinite
    assert optimizer.backend.tensors == {"reference": len(list(model.parameters()))}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"update_buffer_dtype": "bf16"}, 'must be "fp32", got .* state_bits=16 keeps'),
        ({"trust_space": "raw"}, "trust_space must be one of 'update', 'precond'"),
        ({"trust_per": "block"}, "trust_per must be one of"),
        ({"rms_clip_granularity": "head"}, "rms_clip_granularity must be one of 'param'"),
        ({"preset": "fast"}, 'preset must be "auto", "modern", "legacy" or None'),
        ({"precond_alpha": 1.5}, r"precond_alpha must be in \[0, 1\]"),
        ({"blend": 1.5}, r"weight must be in \[0, 1\]"),
        ({"temperature": -1.0}, r"temperature must be in \[0"),
        ({"use_sign": True, "temperature": 1.0}, "use_sign=True is temperature=0"),
        ({"agc_clip": 0.0}, r"clip must be in \(0"),
        ({"rms_clip_threshold": 0.0}, r"limit must be in \(0"),
        ({"trust_clip": 0.0}, r"cap must be in \(0"),
        ({"trust_decay": 0.9}, "trust_decay needs what it acts on.*trust_clip=10"),
        ({"trust_per": "row"}, "trust_per needs what it acts on"),
        ({"trust_per": "slice", "trust_clip": 5.0}, "groups with slices"),
        ({"balance_slices": True}, "balance_slices needs what it acts on"),
        ({"lora_pid": True}, 'lora_pid needs .*groups of a role "lora"'),
        ({"plateau_patience": 0}, "plateau_patience must be a whole number >= 1"),
        ({"slice_rates": (1.0, 1.0, 1.0)}, "slice_rates need slices"),
        ({"slices": blocks(1, 1, 1), "slice_rates": (1.0, 1.0)}, "must be three numbers"),
        ({"slices": blocks(1, 1, 1), "slice_rates": (1.0, -1.0, 1.0)}, "slice_rates of k"),
        ({"slices": blocks(1, 1, 2)}, r"1 \+ 1 \+ 2 = 4 indices for a size of 3"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_door(options, words):
    with pytest.raises(ValueError, match=words):
        Tiger(parameters((3,)), **options)


def test_a_trust_of_the_momentum_beside_lora_is_refused():
    groups = [{"params": parameters((3,)), "role": "lora.a"}]
    with pytest.raises(ValueError, match="has no place beside lora_pid"):
        Tiger(groups, lora_pid=True, trust_space="precond")


class TestBackendsNames:
    @pytest.fixture(autouse=True)
    def _automatic(self):
        with use_backend(None):
            yield

    def test_they_tell_what_there_is(self):
        there = names.available_backends()
        assert list(there) == ["native", "triton", "foreach", "reference", "compile"]
        assert names.backend_diagnostics()["reference"]["available"]

    @pytest.mark.parametrize(
        ("preferred", "disabled", "first"),
        [
            (["foreach"], None, "foreach"),
            (["reference", "foreach"], None, "reference"),
            (["foreach"], ["foreach"], "reference"),
            (None, ["all"], "reference"),
            (None, ["native"], "foreach"),
            (["julia", "rust"], ["rust"], "reference"),
        ],
    )
    def test_the_first_that_is_there_is_chosen(self, preferred, disabled, first):
        names.configure_backends(preferred=preferred, disabled=disabled)
        assert names.current_backend_priority()[0] == first
        names.reset_backend_configuration()
        assert names.current_backend_priority() == ["native", "reference"]

    def test_the_readmes_calls_run(self):
        names.configure_backends(preferred=["julia", "rust"])
        names.configure_backends(disabled=["all"])
        assert names.current_backend_priority() == ["reference"]
        names.reset_backend_configuration()
        names.refresh_backend_state(reload=True, reset_metrics=True)
        assert names.available_backends()["reference"]
        assert names.current_backend_priority() == ["native", "reference"]

    def test_an_unknown_one_is_refused(self):
        with pytest.raises(ValueError, match=r"backends must be of .* got 'vulkan'"):
            names.configure_backends(preferred=["vulkan"])

    def test_the_variables_are_read_anew(self, monkeypatch):
        monkeypatch.setenv("TIGER_ACCEL_PREFER", "foreach, native")
        monkeypatch.setenv("TIGER_ACCEL_DISABLE", "foreach,rust")
        names.refresh_backend_state()
        assert names.current_backend_priority() == ["reference"]

    def test_the_variables_are_read_at_import(self):
        code = "from cruxy_torch.tiger import current_backend_priority as p; print(p())"
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TIGER_ACCEL_DISABLE": "all"},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        assert out.stdout == "['reference']\n"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes saw."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(workers.run, (folder,), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("name", workers.NAMES)
def test_sharded_equals_whole(ranks, name):
    for seen in ranks:
        for split, whole in zip(*seen[name], strict=True):
            torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_it_is_compiled_like_every_direction():
    def made(**options):
        params = parameters((96, 64), (33,))
        direction = TrustRatio(SignBlend(temperature=0.5), decay=0.9)
        optimizer = CruxyOptimizer(params, direction=direction, **options)
        for step in range(4):
            gradients(params, step)
            optimizer.step(loss=1.0)
        return params

    for ours, theirs in zip(made(compile=True), made(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_generator_in_a_group_is_read_once():
    net = torch.nn.Linear(3, 4)
    optimizer = Tiger([{"params": net.parameters()}], preset="auto")
    assert len(optimizer.param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("more", "new"),
    [
        ({"factored": True}, {"step": 0, "row_var": 0.0, "col_var": 0.0}),
        ({"blend": lambda step: 0.2 + 0.0 * step}, {"blend_step": 0}),
        ({"balance_slices": True}, {"slice_step": 0, "slice_rates": 1.0}),
    ],
)
def test_a_state_without_a_part_is_loaded_and_the_part_starts_anew(more, new):
    x = torch.nn.Parameter(torch.ones(48, 40))
    groups = [{"params": [x], "slices": blocks(16, 16, 16)}]
    x.grad = torch.ones_like(x)
    before, after = Tiger(groups), Tiger(groups, **more)
    before.step()
    after.load_state_dict(before.state_dict())
    got, old = dict(after.state[x]), before.state[x]
    assert torch.equal(got.pop("exp_avg"), old["exp_avg"])
    assert {name: value.unique().item() for name, value in got.items()} == new
    after.step()
    assert torch.isfinite(x).all()


def test_a_direction_of_ones_own_starts_what_a_state_lacks():
    x = torch.nn.Parameter(torch.ones(3))
    x.grad = torch.ones_like(x)
    before = CruxyOptimizer([x], direction=SignBlend())
    after = CruxyOptimizer([x], direction=SignBlend(weight=lambda step: 0.2 + 0.0 * step))
    before.step()
    after.load_state_dict(before.state_dict())
    after.step()
    assert after.state[x]["blend_step"] == 1


def test_a_blend_without_a_hash_is_obeyed():
    @dataclasses.dataclass
    class Constant:
        value: float

        def __call__(self, step):
            return self.value + 0.0 * step

    ran = []
    for blend in (0.3, Constant(0.3)):
        params = parameters((4, 3))
        train(params, Tiger(params, blend=blend), 2)
        ran.append(params[0])
    torch.testing.assert_close(*ran)


@pytest.mark.parametrize("off", [{"preset": "legacy"}, {"use_trust_ratio": False}])
def test_a_trust_clip_without_a_trust_ratio_warns(off):
    with pytest.warns(UserWarning, match="trust_clip=5.0 .* without effect"):
        Tiger(parameters((3,)), trust_clip=5.0, **off)


def test_a_model_at_a_rate_of_zero_is_on_no_plateau():
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = Tiger([x], law=SelfDriving(), plateau_patience=5)
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(40):
        x.grad = torch.ones_like(x)
        optimizer.step(loss=1.0)
    assert optimizer.telemetry()["sign_weight"] == 1.0
