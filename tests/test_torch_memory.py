"""What `estimate_memory` counts is what a step allocates, and nothing is allocated for it."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cruxy_torch  # noqa: E402
from cruxy_torch import AXIOM, Cosmic, CruxyOptimizer, estimate_memory, state_bytes  # noqa: E402
from relatives import crossed  # noqa: E402


def mlp():
    return nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 200), nn.Linear(200, 3))


def conv():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)
    )


def gpt():
    """Decoder-only, with the output tied to the embedding."""
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(300, 128),
            "block": nn.TransformerEncoderLayer(128, 4, 512, batch_first=True),
            "head": nn.Linear(128, 300, bias=False),
        }
    )
    model["head"].weight = model["embed"].weight
    return model


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 192, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 16, 192))
        layer = nn.TransformerEncoderLayer(192, 3, 400, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(192, 10)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(tokens).mean(1))


def llama():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def loss_of(model):
    if isinstance(model, nn.ModuleDict):
        x = model["block"](model["embed"](torch.arange(12).reshape(2, 6)))
        return model["head"](x).square().mean()
    if hasattr(model, "config"):
        tokens = torch.arange(16).reshape(2, 8)
        return model(input_ids=tokens, labels=tokens).loss
    shape = {"Sequential": (4, 20), "ViT": (2, 3, 16, 16)}[type(model).__name__]
    if isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.Conv2d):
        shape = (4, 3, 8, 8)
    return model(torch.ones(shape)).square().mean()


MODELS = [mlp, conv, gpt, ViT, llama]

FACTORIES = {
    "adamw": torch.optim.AdamW,
    "amsgrad": lambda params: torch.optim.Adam(params, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, momentum=0.9),
    "plain_sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
    "rmsprop": lambda params: torch.optim.RMSprop(params, centered=True),
    "adagrad": torch.optim.Adagrad,
    "meta3": CruxyOptimizer,
    "meta_lion": lambda params: CruxyOptimizer(params, use_lion=True),
    "meta_lion_bfloat16": lambda params: CruxyOptimizer(
        params, use_lion=True, momentum_dtype=torch.bfloat16
    ),
    "meta3_8bit": lambda params: CruxyOptimizer(params, state_bits=8),
    "meta_lion_4bit": lambda params: CruxyOptimizer(params, use_lion=True, state_bits=4),
    "axiom": AXIOM,
    "axiom_momentum": lambda params: AXIOM(params, momentum=0.9),
    "cosmic": lambda params: Cosmic(params, state_budget="200KB"),
}


@pytest.mark.parametrize(("factory", "build"), crossed(FACTORIES, MODELS))
def test_state_and_gradients_are_those_of_a_real_step(build, factory):
    with torch.device("meta"):
        estimate = estimate_memory(build(), FACTORIES[factory])
    model = build()
    optimizer = FACTORIES[factory](list(model.parameters()))
    loss_of(model).backward()
    optimizer.step()
    assert estimate.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert estimate.parameters == sum(p.nbytes for p in model.parameters())
    assert estimate.buffers == sum(b.nbytes for b in model.buffers())
    assert estimate.state == state_bytes(optimizer)


@pytest.mark.parametrize("build", MODELS)
def test_gradients_that_are_released_never_exceed_the_estimate_and_reach_it(build):
    model = build()
    estimate = estimate_memory(model, torch.optim.SGD)
    alive, peak = {}, 0

    def free(param):
        nonlocal peak
        alive[param] = param.grad.nbytes
        peak = max(peak, sum(alive.values()))
        param.grad = None
        del alive[param]

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(free)
    loss_of(model).backward()
    shared = list(model.parameters())[:1] if isinstance(model, nn.ModuleDict) else []
    # A shared tensor's gradient waits in autograd, where no hook sees it, for its last use.
    assert estimate.released_gradients == peak + sum(p.nbytes for p in shared)


def test_a_billion_parameters_are_counted_without_memory():
    with torch.device("meta"):
        model = nn.ModuleList(
            nn.Linear(2**14, 2**14, bias=False, dtype=torch.bfloat16) for _ in "1234"
        )
    estimate = estimate_memory(model, lambda params: CruxyOptimizer(params, use_lion=True))
    assert estimate.count == 2**30
    assert (estimate.parameters, estimate.gradients) == (2**31, 2**31)
    assert estimate.released_gradients == 2**29
    assert 2**31 < estimate.state < 2**31 + 1024  # the controller is under a kilobyte


def test_the_model_is_left_as_it_is():
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    estimate_memory(model, torch.optim.AdamW)
    for param, old in zip(model.parameters(), before, strict=True):
        assert param.grad is None
        assert torch.equal(param, old)


def test_frozen_parameters_have_neither_gradient_nor_state():
    model = mlp().requires_grad_(False)
    frozen = estimate_memory(model, torch.optim.AdamW)
    assert frozen.parameters == sum(p.nbytes for p in model.parameters())
    assert (frozen.gradients, frozen.released_gradients, frozen.state) == (0, 0, 0)
    model[0].weight.requires_grad_(True)
    assert estimate_memory(model, torch.optim.SGD).gradients == model[0].weight.nbytes


def test_groups_come_from_the_factory():
    def factory(params):
        matrices = [p for p in params if p.ndim > 1]
        others = [p for p in params if p.ndim < 2]
        return CruxyOptimizer([{"params": matrices, "use_lion": True}, {"params": others}])

    model = mlp()
    matrices = sum(p.nbytes for p in model.parameters() if p.ndim > 1)
    others = sum(p.nbytes + 4 for p in model.parameters() if p.ndim < 2)
    moments = matrices + 2 * others
    assert moments < estimate_memory(model, factory).state < moments + 1024


def test_totals_add_up_and_the_table_names_every_kind():
    estimate = cruxy_torch.MemoryEstimate(
        count=10, parameters=40, buffers=8, gradients=40, released_gradients=12, state=80
    )
    assert (estimate.total, estimate.released_total) == (168, 140)
    lines = str(estimate).splitlines()
    assert [line[:28].strip() for line in lines] == [
        "10 parameters",
        "parameters",
        "buffers",
        "gradients",
        "released",
        "optimizer state",
        "total",
        "gradients released",
    ]
    assert lines[5].split()[-3:] == ["80", "B", "8.0000"]
    assert len({len(line) for line in lines}) == 1


def test_an_optimizer_whose_step_needs_a_closure_is_named():
    with pytest.raises(TypeError, match=r"must need no closure, got one that does \(LBFGS\)"):
        estimate_memory(mlp(), torch.optim.LBFGS)


def test_a_factory_of_something_else_is_named():
    with pytest.raises(TypeError, match="must make a torch optimizer, got None; give for instance"):
        estimate_memory(mlp(), lambda params: None)


def test_a_metrics_file_of_the_optimizer_is_not_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    estimate_memory(
        mlp(), lambda params: CruxyOptimizer(params, log_metrics=True, metrics_path=path)
    )
    assert not path.exists()


@pytest.mark.parametrize(
    "factory",
    [
        torch.optim.AdamW,
        AXIOM,
        Cosmic,
        lambda params: CruxyOptimizer(params, mode="self_driving", state_bits=8),
    ],
)
def test_an_optimizer_is_counted_before_its_first_step_and_after(factory):
    model = mlp()
    optimizer = factory(model.parameters())
    before = estimate_memory(optimizer)
    assert not optimizer.state
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    after = estimate_memory(optimizer)
    assert before.state == after.state == state_bytes(optimizer)
    assert after.parameters == after.gradients == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("given", ["config", "folder", "name"])
def test_a_name_a_folder_and_a_configuration_count_alike(tmp_path, given, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    config.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    source = {"config": config, "folder": tmp_path / "tiny", "name": "tiny"}[given]
    estimate = estimate_memory(source)
    assert estimate.count == model.num_parameters()
    assert estimate.parameters == sum(p.nbytes for p in model.parameters())
    assert estimate.state == estimate_memory(model, AXIOM).state
    assert set(estimate.keys()) > {"fp16_gb", "int8_gb", "int4_gb", "recommendation", "state"}
    assert estimate["fp16_gb"] > estimate["int8_gb"] > estimate["int4_gb"]


def test_what_is_nowhere_and_what_is_no_model_are_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(OSError, match=r"must be a folder with a config.json or a name on the hub"):
        estimate_memory(tmp_path)
    with pytest.raises(TypeError, match=r"model must be a module, an optimizer, .* got int"):
        estimate_memory(3)
    with pytest.raises(KeyError, match="the names of an estimate are fp16_gb"):
        estimate_memory(mlp())["fp15_gb"]


def test_the_first_way_that_fits_is_recommended():
    with torch.device("meta"):
        model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])
    ways = dict(estimate_memory(model).ways)
    names, sizes = list(ways), list(ways.values())
    assert sizes == sorted(sizes, reverse=True)
    count = sum(p.numel() for p in model.parameters())
    assert sizes[0] == 16 * count
    for name, size in ways.items():
        estimate = estimate_memory(model, device_memory=round(1.2 * size) + 1)
        assert estimate["recommendation"].startswith(name)
    assert "does not fit" in estimate_memory(model, device_memory="1MB")["recommendation"]
    halves = model.to(torch.bfloat16)
    assert ways[names[2]] == estimate_memory(halves).released_total
