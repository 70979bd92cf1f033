"""`load_model`: fewer bytes, frozen codes, and a model that learns, by whatever codes are here."""

import importlib.util
import os
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import cruxy_torch  # noqa: E402
from cruxy_control.memory import Model, adapter_count, loaded_bytes  # noqa: E402
from cruxy_torch import AXIOM, load_model  # noqa: E402
from cruxy_torch._memory.estimate import is_coded, nbytes  # noqa: E402

WAYS = [("torchao", 8), ("bitsandbytes", 8), ("bitsandbytes", 4)]
SHARES = {8: 0.62, 4: 0.45}
"""Largest shares of the bytes in bfloat16."""


def has(backend):
    return importlib.util.find_spec(backend) is not None


every_way = pytest.mark.parametrize(
    ("backend", "bits"),
    [
        pytest.param(*way, marks=pytest.mark.skipif(not has(way[0]), reason=f"needs {way[0]}"))
        for way in WAYS
    ],
)


@pytest.fixture(autouse=True)
def quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama in bfloat16, nearly all of which are linear layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def held(model):
    return sum(map(nbytes, model.parameters())) + sum(b.nbytes for b in model.buffers())


def tokens():
    return torch.arange(4)[:, None] * 7 + torch.arange(16)


def train(model, steps=20):
    """First and last loss of a run with released gradients."""
    ids = tokens() % 64
    optimizer = AXIOM([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.register_hooks()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    optimizer.remove_hooks()
    return losses[0], losses[-1]


def codes(model):
    """Bit patterns of what is in few bits, by name."""
    return {
        name: [part.clone() for part in parts(param)]
        for name, param in model.named_parameters()
        if is_coded(param)
    }


def parts(param):
    if hasattr(param, "__tensor_flatten__"):
        return [getattr(param, name) for name in param.__tensor_flatten__()[0]]
    return [param.data]


@pytest.mark.skipif(not os.environ.get("CI"), reason="only what tests every change must have one")
def test_continuous_integration_has_codes_to_test_with():
    assert has("torchao") or has("bitsandbytes")


@every_way
def test_codes_take_a_share_of_bfloat16_and_what_the_estimate_says(folder, backend, bits):
    coded = held(load_model(folder, bits=bits, backend=backend))
    assert coded < SHARES[bits] * held(load_model(folder, bits=16))
    estimate = cruxy_torch.estimate_memory(folder)
    assert estimate[f"int{bits}_gb"] * 1e9 == pytest.approx(coded, rel=0.03)


def test_sixteen_bits_take_what_the_estimate_says(folder):
    model = load_model(folder, bits=16, train="all")
    assert cruxy_torch.estimate_memory(str(folder))["fp16_gb"] * 1e9 == held(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())


@every_way
@pytest.mark.parametrize("trained", ["rest", "lora"])
def test_a_model_learns_while_its_codes_stay(folder, backend, bits, trained):
    model = load_model(folder, bits=bits, backend=backend, train=trained)
    before = codes(model)
    first, last = train(model)
    assert last < 0.8 * first
    after = codes(model)
    assert before.keys() == after.keys()
    assert len(before) == 14
    assert all(torch.equal(a, b) for n in before for a, b in zip(before[n], after[n], strict=True))


@every_way
def test_what_is_trained_is_what_was_asked_for(folder, backend, bits):
    rest = load_model(folder, bits=bits, backend=backend)
    names = {n.split(".")[-2] for n, p in rest.named_parameters() if p.requires_grad}
    assert names == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "lm_head",
    }
    lora = load_model(folder, bits=bits, backend=backend, train="lora", rank=4)
    assert all("lora_" in n for n, p in lora.named_parameters() if p.requires_grad)
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert trained == adapter_count(cruxy_torch.estimate_memory(folder).model, 4)


@every_way
def test_saved_adapters_load_into_the_model_in_bfloat16(folder, tmp_path, backend, bits):
    model = load_model(folder, bits=bits, backend=backend, train="lora", rank=4)
    train(model, 5)
    model.save_pretrained(tmp_path)
    whole = peft.PeftModel.from_pretrained(load_model(folder, bits=16), tmp_path)
    saved = {n: p for n, p in model.named_parameters() if "lora_" in n}
    loaded = {n: p for n, p in whole.named_parameters() if "lora_" in n}
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[n], loaded[n].to(saved[n].dtype)) for n in saved)


@every_way
def test_an_evaluation_in_between_leaves_codes_and_gradients_as_they_are(folder, backend, bits):
    torch.manual_seed(1)
    model = load_model(folder, bits=bits, backend=backend, train="lora", rank=4)
    ids = tokens() % 64
    before, grads = codes(model), []
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if "lora_B" in n})
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
    after = codes(model)
    assert all(torch.equal(a, b) for n in before for a, b in zip(before[n], after[n], strict=True))
    assert all(grads[0][name].abs().sum() > 0 for name in grads[0])
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@every_way
def test_checkpointed_activations_give_adapters_the_same_gradients(folder, backend, bits):
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = load_model(
            folder,
            bits=bits,
            backend=backend,
            train="lora",
            gradient_checkpointing=checkpointed,
        )
        ids = tokens() % 64
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for n, p in model.named_parameters() if "lora_B" in n])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_training_codes_is_refused_with_the_bytes_of_the_alternative(folder):
    needed = cruxy_torch.estimate_memory(folder).released_total / 1e9
    with pytest.raises(ValueError, match=rf"bits=8, whose codes are frozen; .* takes {needed:.2f}"):
        load_model(folder, train="all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "bits must be 16, 8 or 4, got 2"),
        ({"train": "heads"}, "train must be 'rest', 'lora' or 'all', got 'heads'"),
        ({"backend": "hqq"}, "backend must be 'auto', 'torchao' or 'bitsandbytes', got 'hqq'"),
        ({"bits": 4, "backend": "torchao"}, "got 'torchao' with bits=4"),
        ({"rank": 0}, "rank must be a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(folder, **options)


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [
        ("torchao", {"bits": 8}, "low-bit"),
        ("bitsandbytes", {"bits": 4}, "low-bit"),
        ("peft", {"bits": 16, "train": "lora"}, "hf"),
        ("transformers", {}, "hf"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch, module, options, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}, which is not installed.*\[{extra}\]"):
        load_model(folder, **options)


def test_a_model_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(OSError, match=r"must be a folder with a config.json or a name on the hub"):
        load_model(tmp_path, bits=16)


@pytest.mark.skipif(not has("torchao"), reason="needs torchao")
def test_layers_of_another_kind_are_named(tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got no layer of its kind in GPT2LMHeadModel; try"):
        load_model(tmp_path)


def test_bytes_of_codes_are_those_of_their_formula():
    model = Model(count=100 * 30 + 7, linear=((100, 30),), buffers=8)
    assert loaded_bytes(model, 16) == 2 * 3007 + 8
    assert loaded_bytes(model, 8) == 3000 + 500 + 14 + 8
    assert loaded_bytes(model, 4) == 1500 + 4 * 47 + 64 + 14 + 8
