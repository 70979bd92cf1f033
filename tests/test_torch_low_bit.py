"""Moments in fewer bits, in PyTorch."""

import copy
import functools
import io
import math
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cruxy_control import Meta3  # noqa: E402
from cruxy_exact.codes import BlockCode, pack  # noqa: E402
from cruxy_exact.random_bits import random_bits, stream_key  # noqa: E402
from cruxy_torch import CruxyOptimizer, _blocks  # noqa: E402
from cruxy_torch._kept import Coded, Rounded, any_by_chance  # noqa: E402
from cruxy_torch._memory.state import value_of  # noqa: E402
from cruxy_torch._native import library  # noqa: E402
from relatives import crossed  # noqa: E402
from torch_low_bit import PATHS, assert_same, gradients, parameters, state_of, train  # noqa: E402

FAST = [path for path in PATHS if path != "single"]
NEITHER_CLIPS_NOR_DECAYS = {"law": Meta3(clip_threshold=None), "betas": (0.0, 0.0)}
"""Moments are then the gradient and its square, to the bit, on every path."""


SHAPES = [(64, 100), (4097,), (33, 5, 5, 7), (50,), (2, 300, 9)]
"""Rows of any length, ends of any length, and one parameter too small to be coded."""


class TestBytes:
    @pytest.mark.parametrize(
        ("bits", "lion", "each"), [(8, True, 1.04), (4, True, 0.54), (8, False, 2.04),
                                   (4, False, 1.04), (16, True, 2.0), (16, False, 4.0)],
    )  # fmt: skip
    def test_bytes_a_parameter(self, bits, lion, each):
        (p,) = params = parameters((384, 1536))
        optimizer = train(params, CruxyOptimizer(params, use_lion=lion, state_bits=bits), 1)
        size = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
        clocks = 0 if lion else 8
        assert (size - clocks) / p.numel() <= each
        moments = 1 if lion else 2
        # The codes, a bfloat16 for 256 of them, and one number that says how they are cut.
        blocks = p.numel() / 256 if bits < 16 else 0
        assert size - clocks == moments * (p.numel() * bits / 8 + 2 * blocks) + 8 * (bits < 16)

    @pytest.mark.parametrize("bits", [16, 8, 4])
    def test_parameters_of_fewer_than_4096_elements_keep_float32(self, bits):
        small, large = params = parameters((63, 65), (64, 64))
        optimizer = train(params, CruxyOptimizer(params, state_bits=bits), 1)
        assert optimizer.state[small]["exp_avg"].dtype == torch.float32
        assert optimizer.state[small]["exp_avg_sq"].dtype == torch.float32
        assert ("exp_avg" in optimizer.state[large]) == (bits == 16)
        if bits == 16:
            assert optimizer.state[large]["exp_avg_sq"].dtype == torch.bfloat16

    def test_select_and_groups_choose(self):
        params = parameters((64, 64), (64, 64), (64, 64))
        optimizer = CruxyOptimizer(
            [{"params": params[:2], "state_bits": 4}, {"params": params[2:], "use_lion": True}],
            state_bits=8,
            select=lambda p: p is not params[0],
        )
        train(params, optimizer, 2)
        first, second, third = (optimizer.state[p] for p in params)
        assert first["exp_avg"].dtype == torch.float32
        assert second["exp_avg_codes"].dtype == torch.uint8
        assert third["exp_avg_codes"].dtype == torch.int8
        assert "exp_avg_sq_codes" in second
        assert "exp_avg_sq_codes" not in third


def expected(value, bits, signed, count, first):
    """Codes and scales of a moment as `cruxy_control` defines them, in NumPy."""
    code = BlockCode(bits, signed)
    flat = np.zeros(-(-value.size // 256) * 256, np.float32)
    flat[: value.size] = value.reshape(-1)
    blocks = flat.reshape(-1, 256)
    scales = code.scale(np.abs(blocks).max(1), xp=np)
    with np.errstate(over="ignore"):
        key = stream_key(np.int32(count), 0, 0, xp=np)
        numbers = np.arange(first, first + flat.size, dtype=np.int32).reshape(-1, 256)
        noise = code.noise(random_bits(key, numbers))
    codes = code.encode(blocks, scales[:, None], noise, xp=np)
    return (pack(codes[:, :128], codes[:, 128:]) if bits == 4 else codes), scales


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lion", [False, True])
def test_codes_are_those_of_the_shared_definition(path, bits, lion):
    params = parameters(*SHAPES)
    options = {"use_lion": lion, "state_bits": bits, **NEITHER_CLIPS_NOR_DECAYS, **PATHS[path]}
    optimizer = CruxyOptimizer(params, **options)
    for step in range(3):
        gradients(params, step)
        optimizer.step()
        first = 0
        for p in params:
            g = p.grad.numpy()
            moments = {"exp_avg": g} | ({} if lion else {"exp_avg_sq": g * g})
            state = optimizer.state[p]
            for name, value in moments.items():
                if p.numel() < 4096:
                    assert np.array_equal(state[name].numpy(), value)
                    continue
                codes, scales = expected(value, bits, name == "exp_avg", step, first)
                assert np.array_equal(state[f"{name}_codes"].numpy(), codes)
                assert np.array_equal(state[f"{name}_scales"].float().numpy(), scales)
            first += 2 * -(-p.numel() // 256) * 256


@pytest.mark.parametrize(
    ("path", "bits", "lion"),
    crossed(
        FAST,
        [16, 8, 4],
        [True, False],
        fast=[*((path, 8, False) for path in FAST), ("foreach", 16, True), ("native", 4, True)],
    ),
)
def test_fast_paths_follow_the_reference(path, bits, lion):
    def run(path):
        params = parameters(*SHAPES)
        options = {"use_lion": lion, "state_bits": bits, "lr": 1e-3, **PATHS[path]}
        return params, train(params, CruxyOptimizer(params, **options), 10)

    (ours, one), (theirs, other) = run(path), run("single")
    for p, q in zip(ours, theirs, strict=True):
        for key, value in one.state[p].items():
            reference = other.state[q][key]
            if value.dtype in (torch.int8, torch.uint8, torch.bfloat16):
                # A last bit of a moment is all that differs, and seldom crosses a level.
                assert torch.ne(value, reference).float().mean() < 1e-2, key
            else:
                torch.testing.assert_close(value, reference, rtol=2.0**-7, atol=1e-6)
        # Where a code differs an update may be off by a level of it: never beyond two rates a step.
        assert (p - q).abs().max() <= 10 * 2 * 1e-3
        assert torch.gt((p - q).abs(), 1e-4).float().mean() < 0.02


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_cutting_large_tensors_into_blocks_changes_nothing(bits, monkeypatch):
    def run():
        params = parameters((96, 77), (5, 1200), (9000,))
        options = {"state_bits": bits, "fused": False}
        train(params, optimizer := CruxyOptimizer(params, **options), 3)
        return params, state_of(optimizer)

    whole, states = run()
    monkeypatch.setattr(_blocks, "BLOCK", 1500)
    cut, others = run()
    # The norms are summed in another order, which is the only thing that may differ.
    for p, q in zip(whole, cut, strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-5)
    for one, other in zip(states, others, strict=True):
        for key in one:
            if key.endswith("codes"):
                assert torch.ne(one[key], other[key]).float().mean() < 1e-3


@pytest.mark.skipif(not library.available(), reason="needs a C compiler")
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_native_codes_do_not_depend_on_the_number_of_threads(bits):
    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params = parameters((70_001,), (300, 300))
            return state_of(train(params, CruxyOptimizer(params, state_bits=bits, fused=True), 3))
        finally:
            torch.set_num_threads(before)

    assert_same(run(1), run(2))


class TestGuard:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize(
        ("bits", "lion", "bad"), crossed([16, 8, 4], [False, True], [math.nan, math.inf, 1e30])
    )
    def test_a_skipped_step_keeps_every_code(self, lion, bits, path, bad):
        params = parameters(*SHAPES)
        optimizer = CruxyOptimizer(params, use_lion=lion, state_bits=bits, **PATHS[path])
        train(params, optimizer, 2)
        before, values = state_of(optimizer), [p.detach().clone() for p in params]
        gradients(params, 2)
        params[0].grad[3, 5] = bad
        optimizer.step()
        assert optimizer.telemetry()["skipped_total"] == 1
        assert_same(state_of(optimizer), before)
        assert all(map(torch.equal, params, values))
        train(params, optimizer, 1, start=3)
        assert all(p.isfinite().all() for p in params)

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize(("scale", "bits"), crossed([0.0, 1e-42, 1e-30, 1e8], [8, 4]))
    def test_gradients_of_any_magnitude_train(self, scale, bits, path):
        params = parameters((64, 100))
        optimizer = CruxyOptimizer(params, state_bits=bits, **PATHS[path])
        for step in range(4):
            gradients(params, step, scale)
            params[0].grad[:10] = 0.0  # whole blocks of zeros
            optimizer.step()
        assert optimizer.telemetry()["ok"]
        assert params[0].isfinite().all()


class TestRounding:
    @pytest.mark.parametrize(("path", "bits"), crossed(PATHS, [16, 8, 4]))
    def test_what_is_less_than_a_step_of_the_code_counts_on_average(self, path, bits):
        """A slow average of a constant: to the nearest it would stay where it is for ever."""
        p = torch.nn.Parameter(torch.zeros(1 << 16))
        optimizer = CruxyOptimizer(
            [p], use_lion=True, betas=(0.9, 0.999), state_bits=bits, **PATHS[path],
            law=Meta3(clip_threshold=None, beta2_phase_strength=0, beta2_gain=0),
        )  # fmt: skip
        p.grad = torch.full_like(p, 0.1)
        p.grad[::256] = 1.0  # each block's scale
        for _ in range(50):
            optimizer.step()
        mean = value_of(p, optimizer.state[p], "exp_avg").view(-1, 256)[:, 1:].mean()
        exact = 0.1 * (1 - 0.999**50)
        # Fifty roundings of each of 65,280 elements, each off by at most a step: at this value
        # below 0.1 times the scale, 1 - 0.999^50, for 4 bits. Five standard deviations.
        step = 0.1 * (1 - 0.999**50)
        assert abs(mean - exact) < 5 * step * math.sqrt(50 / 65280)

    @pytest.mark.parametrize("bits", [16, 8, 4])
    def test_runs_are_reproducible_and_steps_differ(self, bits):
        def run(skip):
            params = parameters((64, 100))
            optimizer = CruxyOptimizer(params, state_bits=bits)
            if skip:
                params[0].grad = torch.full_like(params[0], math.nan)
                optimizer.step()
            return state_of(train(params, optimizer, 4))

        assert_same(run(False), run(False))
        key = "exp_avg" if bits == 16 else "exp_avg_codes"
        assert not torch.equal(run(False)[0][key], run(True)[0][key])


class TestSaving:
    @pytest.mark.parametrize("bits", [16, 8, 4])
    @pytest.mark.parametrize("lion", [False, True])
    def test_resume_is_bit_identical(self, bits, lion):
        params = parameters(*SHAPES)
        optimizer = CruxyOptimizer(params, use_lion=lion, state_bits=bits)
        train(params, optimizer, 3)
        file = io.BytesIO()
        torch.save([[p.detach() for p in params], optimizer.state_dict()], file)
        file.seek(0)
        values, saved = torch.load(file, weights_only=True)
        train(params, optimizer, 3, start=3)
        resumed = [torch.nn.Parameter(value) for value in values]
        other = CruxyOptimizer(resumed, use_lion=lion, state_bits=bits)
        other.load_state_dict(saved)
        train(resumed, other, 3, start=3)
        assert all(map(torch.equal, resumed, params))
        assert_same(state_of(other), state_of(optimizer))

    def test_loading_copies_into_the_codes_that_are_there(self):
        params = parameters((64, 100))
        optimizer = train(params, CruxyOptimizer(params, state_bits=8), 2)
        saved = copy.deepcopy(optimizer.state_dict())
        before = state_of(optimizer)
        train(params, optimizer, 1, start=2)
        addresses = {key: t.data_ptr() for key, t in optimizer.state[params[0]].items()}
        optimizer.load_state_dict(saved)
        assert {key: t.data_ptr() for key, t in optimizer.state[params[0]].items()} == addresses
        assert_same(state_of(optimizer), before)

    @pytest.mark.parametrize("bits", [(32, 8), (8, 32), (4, 8), (16, 4), (8, 16)])
    def test_a_state_keeps_the_bits_it_was_saved_with(self, bits):
        params = parameters((64, 100))
        optimizer = train(params, CruxyOptimizer(params, state_bits=bits[0]), 2)
        other = train(params, CruxyOptimizer(params, state_bits=bits[1]), 1)
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["state_bits"] == bits[0]
        assert_same(state_of(other), state_of(optimizer))
        train(params, other, 1, start=2)
        assert other.telemetry()["step"] == 3

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: through_pickle(pair)])
    def test_copies_go_on_as_the_original(self, copied):
        params = parameters((64, 100))
        optimizer = train(params, CruxyOptimizer(params, state_bits=4), 2)
        twins, other = copied((params, optimizer))
        train(params, optimizer, 2, start=2)
        train(twins, other, 2, start=2)
        assert all(map(torch.equal, params, twins))


def through_pickle(pair):
    import pickle

    return pickle.loads(pickle.dumps(pair))


class TestErrors:
    @pytest.mark.parametrize("bits", [0, 2, 12, 64, "8", None])
    def test_bits(self, bits):
        with pytest.raises(ValueError, match=r"state_bits must be 4, 8, 16 or 32, got"):
            CruxyOptimizer(parameters((3,)), state_bits=bits)
        with pytest.raises(ValueError, match=r"state_bits must be 4, 8, 16 or 32, got"):
            CruxyOptimizer([{"params": parameters((3,)), "state_bits": bits}])

    def test_bits_and_a_dtype(self):
        with pytest.raises(ValueError, match=r"momentum_dtype must be None where state_bits"):
            CruxyOptimizer(parameters((3,)), state_bits=8, momentum_dtype=torch.bfloat16)

    def test_select(self):
        with pytest.raises(TypeError, match=r"select must be a function of a parameter, got \['w"):
            CruxyOptimizer(parameters((3,)), select=["weight"])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_a_trace_sees_what_is_rounded_by_chance(rounded, order):
    """Else a compiled step would take the same random bits every time."""

    def traced(x):
        code = BlockCode(8, signed=True)
        kept = Rounded(x, 0) if rounded else Coded(x, x, code, x.shape, 0)
        return x + any_by_chance([kept, x][::order]), x + any_by_chance([kept]), any_by_chance([x])

    torch._dynamo.reset()
    mixed, alone, plain = torch.compile(traced, backend="eager", fullgraph=True)(torch.zeros(()))
    assert (mixed.item(), alone.item(), plain) == (1.0, 1.0, False)


@pytest.mark.slow
@pytest.mark.skipif(not library.available(), reason="torch.compile needs a C compiler too")
@pytest.mark.parametrize(
    "options",
    [
        {"state_bits": 8},
        {"state_bits": 4, "use_lion": True},
        {"state_bits": 4, "mode": "self_driving"},
    ],
)
def test_a_compiled_step_computes_the_same_codes(options):
    def run(**more):
        params = parameters((64, 100), (50,))
        return state_of(train(params, CruxyOptimizer(params, lr=1e-3, **options, **more), 4))

    torch._dynamo.reset()
    for ours, theirs in zip(run(compile=True), run(fused=False), strict=True):
        for key, value in ours.items():
            if key.endswith("codes"):
                assert torch.ne(value, theirs[key]).float().mean() < 1e-2
            else:
                torch.testing.assert_close(value, theirs[key], rtol=2.0**-7, atol=1e-6)


@functools.cache
def losses(**options):
    """The first loss of a small model, and the mean of the last five."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 300), torch.nn.Tanh(), torch.nn.Linear(300, 64))
    optimizer = CruxyOptimizer(net.parameters(), lr=3e-3, **options)
    series = []
    for step in range(80):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x.repeat(1, 4).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        series.append(loss.item())
    return series[0], sum(series[-5:]) / 5


@pytest.mark.parametrize(
    ("bits", "share"), [pytest.param(16, 0.01, marks=pytest.mark.slow), (8, 0.01), (4, 0.05)]
)
def test_a_model_trains_as_well_as_with_float32(bits, share):
    """To within a hundredth of the loss it began at, and a twentieth with 4 bits."""
    first, float32 = losses()
    assert float32 < 0.6 * first
    assert abs(losses(state_bits=bits)[1] - float32) < share * first


class TestSmall:
    def test_it_says_so_where_no_parameter_is_large_enough_to_be_coded(self):
        with pytest.warns(UserWarning, match="state_bits=8 codes nothing here"):
            CruxyOptimizer(parameters((63, 65)), state_bits=8)

    def test_it_says_nothing_where_one_is(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            CruxyOptimizer(parameters((64, 64), (64,)), state_bits=8)
