"""Activations in 8 and 4 bits: bytes, gradients without a bias, and what is left alone."""

import gc
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from cruxy_torch import AXIOM_CHECKPOINT, compress_activations  # noqa: E402

every_width = pytest.mark.parametrize("bits", [8, 4])


class Block(nn.Module):
    """Attention and an MLP: views of one storage, a residual that is saved twice, a mask."""

    def __init__(self, d=32, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down, self.drop = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Dropout(0.1)

    def forward(self, x):
        batch, length, d = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .view(batch, length, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, d))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x)))))


class Model(nn.Module):
    """A small GPT; `remat` puts each block into a checkpoint region."""

    def __init__(self, d=32, layers=2, words=40, remat=False):
        super().__init__()
        self.words, self.remat = nn.Embedding(words, d), remat
        self.blocks = nn.ModuleList([Block(d) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, words)

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.remat else block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids.flatten())


def model_and_data(**options):
    torch.manual_seed(0)
    return Model(**options), torch.randint(0, 40, (8, 32))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def kept_without(model, run):
    """Every storage that autograd keeps by itself, with its dtype, but for parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, alive = {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor.dtype)
            alive.append(tensor)  # so that no address is given twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run()
    return list(found.values())


class TestBytes:
    """What is reported is what is there."""

    @every_width
    def test_what_is_kept_equals_what_hooks_of_our_own_count(self, bits):
        model, ids = model_and_data()
        torch.manual_seed(1)
        kept = kept_without(model, lambda: model(ids))
        torch.manual_seed(1)
        with compress_activations(model, bits, min_elements=1024) as store:
            loss = model(ids)
        coded = [n // 4 for n, dtype in kept if dtype == torch.float32 and n // 4 >= 1024]
        exact = sum(n for n, _ in kept) - 4 * sum(coded)
        groups = sum(-(-count // 256) for count in coded)
        fine = (8 * 32 * 40 + 2 * 8 * 4 * 32) // 256  # log-probabilities; attention's sums
        stats = store.memory_stats()
        assert len(coded) > 10
        assert stats["original_bytes"] == sum(n for n, _ in kept)
        assert stats["exact_bytes"] == exact
        coarse = (groups - fine) * (256 * bits // 8 + 4)
        assert stats["stored_bytes"] == exact + coarse + fine * (256 + 4)
        assert stats["held_bytes"] == stats["stored_bytes"] - exact
        assert stats["compression_ratio"] == stats["original_bytes"] / stats["stored_bytes"]
        loss.backward()
        assert store.memory_stats()["held_bytes"] == 0

    @pytest.mark.parametrize(("bits", "share"), [(8, 0.27), (4, 0.145)])
    def test_a_quarter_is_kept_or_an_eighth(self, bits, share):
        model, ids = model_and_data()
        with compress_activations(model, bits, min_elements=256) as store:
            model(ids)
        assert 1.0 / store.memory_stats()["compression_ratio"] < share

    def test_the_tensor_itself_is_freed_before_the_backward_pass(self):
        x = torch.randn(8192, requires_grad=True)
        with compress_activations(nn.Identity(), min_elements=256):
            y = (x * 2.0).exp()
            loss = y.square().sum()
            probe = __import__("weakref").ref(y.untyped_storage())
            del y
        gc.collect()
        assert probe() is None
        loss.backward()

    def test_views_of_one_storage_are_coded_and_decoded_once(self, monkeypatch):
        from cruxy_torch._memory import activations

        decoded = []
        decode = activations.decode
        monkeypatch.setattr(activations, "decode", lambda c: decoded.append(c) or decode(c))
        x = torch.randn(3, 2, 4, 8, 64, requires_grad=True)
        with compress_activations(nn.Identity(), min_elements=256) as store:
            q, k, v = (x * 1.0).unbind()
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        assert store.memory_stats()["held_bytes"] < 1.5 * x.numel()  # q, k, v and the output
        out.sum().backward()
        assert len(decoded) == 2

    def test_a_small_slice_of_a_large_storage_is_coded_alone(self):
        large = torch.randn(64, 4096)
        weight = torch.randn(4096, requires_grad=True)
        with compress_activations(nn.Identity()) as store:
            loss = (large[3] * weight).sum()
        assert store.memory_stats()["original_bytes"] == 4 * 4096
        loss.backward()
        assert (weight.grad - large[3]).abs().max() <= (large[3].max() - large[3].min()) / 250


class TestGradients:
    """The forward pass is untouched; gradients are right, and unbiased where that can be."""

    @every_width
    def test_forward_is_the_same_bit_for_bit(self, bits):
        model, ids = model_and_data()
        torch.manual_seed(2)
        want = model(ids)
        torch.manual_seed(2)
        with compress_activations(model, bits, min_elements=256):
            got = model(ids)
        assert torch.equal(got, want)

    @pytest.mark.parametrize(("bits", "allowed"), [(8, 0.02), (4, 0.3)])
    def test_gradients_of_a_gpt_are_near(self, bits, allowed):
        model, ids = model_and_data()
        model.eval()
        model(ids).backward()
        want = gradients(model)
        model.zero_grad()
        with compress_activations(model, bits, min_elements=256):
            loss = model(ids)
        loss.backward()
        assert (gradients(model) - want).norm() < allowed * want.norm()

    @every_width
    def test_the_mean_of_64_gradients_of_a_linear_model_is_the_exact_one(self, bits):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
        x, y = torch.randn(256, 32).abs(), torch.randn(256, 32)

        def run():
            # The derivative is linear in every activation, and each is coded apart.
            return (model(x) * y).mean()

        run().backward()
        want, draws = gradients(model), []
        for _ in range(64):
            model.zero_grad()
            with compress_activations(model, bits, min_elements=256):
                loss = run()
            loss.backward()
            draws.append(gradients(model))
        draws = torch.stack(draws)
        noise = draws.std(0) / math.sqrt(len(draws))
        moving = noise > 0
        z = ((draws.mean(0) - want)[moving] / noise[moving]).abs()
        assert moving.sum() > 2000
        # Student's t of 63 degrees: 0.4 % lie beyond 3, one in 10^7 beyond 6.
        assert (z > 3.0).double().mean() < 0.01
        assert z.max() < 6.0

    def test_the_nearest_level_has_a_smaller_error_that_no_mean_takes_away(self):
        model, ids = model_and_data()
        model.eval()

        def grads(**options):
            model.zero_grad()
            with compress_activations(model, 8, min_elements=256, **options):
                loss = model(ids)
            loss.backward()
            return gradients(model)

        assert torch.equal(grads(stochastic=False), grads(stochastic=False))
        assert not torch.equal(grads(), grads())

    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("loss", ["cross_entropy", "log_softmax", "method"])
    def test_a_sure_models_log_probabilities_keep_8_bits(self, bits, loss):
        torch.manual_seed(0)
        logits = (4 * torch.randn(512, 65)).requires_grad_()
        targets = torch.distributions.Categorical(logits=logits.detach()).sample()

        def gradient():
            if loss == "cross_entropy":
                value = nn.functional.cross_entropy(logits, targets)
            else:
                by = (
                    nn.functional.log_softmax if loss == "log_softmax" else torch.Tensor.log_softmax
                )
                value = -by(logits, -1).gather(1, targets[:, None]).mean()
            return torch.autograd.grad(value, logits)[0]

        exact, draws = gradient(), []
        for step in range(16):
            with compress_activations(nn.Linear(1, 1), bits, step=step):
                draws.append(gradient())
        draws = torch.stack(draws)
        assert 0 < (draws[0] - exact).norm() < 0.05 * exact.norm()  # 0.44 with steps of 4 bits
        noise = (draws - draws.mean(0)).norm(dim=(1, 2)).mean() / 16**0.5
        assert (draws.mean(0) - exact).norm() < 1.2 * noise  # 1.9 with steps of 4 bits

    def test_attentions_sums_keep_8_bits_and_its_inputs_4(self):
        query, key, value = (torch.randn(8, 8, 128, 32).requires_grad_() for _ in range(3))
        with compress_activations(nn.Linear(1, 1), 4) as store:
            out = nn.functional.scaled_dot_product_attention(query=query, key=key, value=value)
        count, sums = 8 * 8 * 128 * 32, 8 * 8 * 128
        # Query, key, value and output in 4 bits; a sum a row in 8.
        expected = 4 * count * (0.5 + 4 / 256) + sums * (1 + 4 / 256)
        assert store.memory_stats()["stored_bytes"] == pytest.approx(expected, rel=1e-3)
        out.sum().backward()

    def test_step_and_seed_tell_draws_apart_and_repeat_them(self):
        model, ids = model_and_data()
        model.eval()

        def grads(**options):
            model.zero_grad()
            with compress_activations(model, 4, min_elements=256, **options):
                loss = model(ids)
            loss.backward()
            return gradients(model)

        first = grads(step=5)
        assert torch.equal(grads(step=5), first)
        assert not torch.equal(grads(step=6), first)
        assert not torch.equal(grads(step=5, seed=1), first)

    def test_backward_may_be_called_inside_the_block_and_twice(self):
        model, ids = model_and_data()
        model.eval()
        with compress_activations(model, step=0, min_elements=256):
            loss = model(ids)
            loss.backward(retain_graph=True)
            once = gradients(model)
            loss.backward()
        torch.testing.assert_close(gradients(model), 2 * once)

    def test_what_is_not_finite_stays_visible(self):
        model, ids = model_and_data()
        with torch.no_grad():
            model.words.weight[:, 0] = torch.nan
        with compress_activations(model, min_elements=256):
            loss = model(ids)
        loss.backward()
        assert gradients(model).isnan().any()


class TestPassedThrough:
    """What is not an activation is kept as it is."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
    def test_other_dtypes(self, dtype):
        x = torch.randn(8192, dtype=dtype, requires_grad=True)
        with compress_activations(nn.Identity()) as store:
            y = (x * x).abs().sum()
        assert store.memory_stats()["compression_ratio"] == 1.0
        y.backward()

    def test_integers(self):
        table = nn.Embedding(10, 4)
        ids = torch.randint(0, 10, (8192,))
        with compress_activations(table) as store:
            loss = table(ids).sum()
        assert store.memory_stats() == {
            "original_bytes": 8 * 8192,
            "stored_bytes": 8 * 8192,
            "exact_bytes": 8 * 8192,
            "compression_ratio": 1.0,
            "held_bytes": 0,
        }
        loss.backward()

    @pytest.mark.parametrize("autocast", [False, True])
    def test_parameters_their_views_and_their_casts(self, autocast):
        layer = nn.Linear(128, 128)
        x = torch.randn(2, 128, requires_grad=True)

        def run():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return layer(x).float().sum()

        run().backward()
        want, x.grad = x.grad, None
        with compress_activations(layer, min_elements=256) as store:
            loss = run()
        loss.backward()
        assert store.memory_stats()["held_bytes"] == 0
        assert torch.equal(x.grad, want)

    def test_a_tensor_that_is_modified_in_place_is_coded_anew(self):
        x = torch.randn(8192, requires_grad=True)
        with compress_activations(nn.Identity()):
            y = x * 1.0
            first = y.square().sum()
            y.mul_(3.0)
            second = y.square().sum()
        grads = torch.autograd.grad(first, x, retain_graph=True)[0]
        assert (grads - 2 * x).abs().max() < 0.1
        grads = torch.autograd.grad(second, x)[0]
        assert (grads - 18 * x).abs().max() < 1.0


class TestRegions:
    """Checkpoint regions, and what is refused."""

    def test_of_checkpoint_regions_the_inputs_alone_are_kept(self):
        model, ids = model_and_data(layers=4)
        remat, _ = model_and_data(layers=4, remat=True)
        held = []
        for each in (model, remat):
            torch.manual_seed(3)
            with compress_activations(each, step=0, min_elements=256) as store:
                loss = each(ids)
            held.append(store.memory_stats()["held_bytes"])
            loss.backward()
        assert held[1] < held[0] / 4
        difference = (gradients(model) - gradients(remat)).norm()
        assert difference < 0.02 * gradients(model).norm()

    def test_double_backward_is_refused(self):
        model, ids = model_and_data()
        with compress_activations(model, min_elements=256):
            loss = model(ids)
        with pytest.raises(RuntimeError, match="must not be differentiated twice"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)

    def test_a_compiled_model_is_refused(self):
        compiled = torch.compile(nn.Linear(3, 3))
        with (
            pytest.raises(ValueError, match=r"must not run under torch\.compile"),
            compress_activations(compiled),
        ):
            pass

    def test_tracing_through_the_block_is_refused(self):
        layer = nn.Linear(64, 64)

        def run(x):
            with compress_activations(layer):
                return layer(x).sum()

        with pytest.raises(Exception, match="compress_activations"):
            torch.compile(run, backend="eager", fullgraph=True)(torch.randn(128, 64))

    def test_a_block_inside_itself_is_refused(self):
        store = compress_activations(nn.Identity())
        with store, pytest.raises(RuntimeError, match="must not stand inside itself"), store:
            pass

    def test_a_passed_tensor_that_was_modified_is_noticed(self):
        x = torch.randn(16, requires_grad=True)
        with compress_activations(nn.Identity()):
            y = x * 1.0
            loss = y.square().sum()
        y.mul_(2.0)
        with pytest.raises(RuntimeError, match="must not be modified in place"):
            loss.backward()

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"bits": 2}, "bits must be 8 or 4, got 2"),
            ({"min_elements": 0}, "min_elements must be"),
        ],
    )
    def test_arguments_outside_their_range_are_refused(self, options, error):
        with pytest.raises(ValueError, match=error):
            compress_activations(nn.Identity(), **options)

    def test_a_model_is_asked_for(self):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
            compress_activations(8)


class TestSlots:
    """`AXIOM_CHECKPOINT`, whose names are those of quarterbit."""

    @every_width
    def test_store_restore_and_memory_stats(self, bits):
        slots = AXIOM_CHECKPOINT(max_slots=4, max_n=8192, bits=bits)
        x = torch.randn(2, 64, 64)
        slots.store(x, slot=1)
        slots.store(x + 5.0, slot=3)
        for slot, shift in ((1, 0.0), (3, 5.0)):
            got = slots.restore(slot=slot)
            assert got.shape == x.shape
            assert (got - x - shift).abs().max() < 9.0 / (2**bits - 1)
        stats = slots.memory_stats()
        assert stats["original_bytes"] == 2 * 4 * 8192
        assert stats["stored_bytes"] == 2 * 32 * (256 * bits // 8 + 4)
        assert stats["compression_ratio"] == stats["original_bytes"] / stats["stored_bytes"]

    def test_a_slot_that_is_stored_again_has_the_last(self):
        slots = AXIOM_CHECKPOINT(max_slots=1, max_n=16)
        for value in (1.0, 2.0):
            slots.store(torch.full((4,), value), slot=0)
        assert torch.equal(slots.restore(slot=0), torch.full((4,), 2.0))

    @pytest.mark.parametrize(
        ("act", "error"),
        [
            (lambda s: s.store(torch.ones(4), slot=2), "slot must be"),
            (lambda s: s.restore(slot=0), "slot 0 is empty"),
            (lambda s: s.store(torch.ones(17), slot=0), "at most 16 elements, got 17"),
            (lambda s: s.store(torch.ones(4, dtype=torch.int64), slot=0), "must be float32"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, act, error):
        slots = AXIOM_CHECKPOINT(max_slots=2, max_n=16)
        with pytest.raises((ValueError, TypeError), match=error):
            act(slots)


PEAK = """
import sys, torch
from torch import nn
sys.path.insert(0, {tests!r})
from test_torch_activations import Model
import cruxy_torch
from cruxy_torch.training.results import resident_gb
torch.set_num_threads(1)
torch.manual_seed(0)
model = Model(d=256, layers=6)
ids = torch.randint(0, 40, (16, 256))
def step(ids, bits):
    if bits:
        with cruxy_torch.compress_activations(model, bits):
            loss = model(ids)
    else:
        loss = model(ids)
    loss.backward()
step(ids[:1, :8], int(sys.argv[1]))  # code, gradients and buffers of the libraries
base = resident_gb("VmRSS")
step(ids, int(sys.argv[1]))
print(resident_gb("VmHWM") - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_process_falls_by_60_percent():
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    plain, coded = (
        float(
            subprocess.run(
                [sys.executable, "-c", PEAK.format(tests=tests), bits],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for bits in ("0", "8")
    )
    assert coded < 0.4 * plain
