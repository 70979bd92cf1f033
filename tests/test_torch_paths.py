"""The paths of the torch update agree: tensor by tensor, foreach, and the C library."""

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch_models as models  # noqa: E402
from cruxy_control import SelfDriving  # noqa: E402
from cruxy_torch import CruxyOptimizer, _blocks  # noqa: E402
from cruxy_torch._native import library, passes  # noqa: E402
from cruxy_torch._sensors.sizes import sizes  # noqa: E402
from relatives import crossed, relatives  # noqa: E402
from torch_low_bit import parameters  # noqa: E402
from torch_models import OPTIONS  # noqa: E402

STEPS = 30
PATHS: dict[str, dict[str, Any]] = {
    "single": {"fused": False},
    "foreach": {"foreach": True},
    "native": {"fused": True},
}
needs_compiler = pytest.mark.skipif(not library.available(), reason="needs a C compiler")


def run(options, path, dtype=torch.float32):
    net = models.model(dtype)
    optimizer = models.optimizer(net, **options, **PATHS[path])
    models.train(net, optimizer, STEPS)
    return models.everything(net, optimizer)


LIKE_OTHERS = ("meta3_plain", "meta3_gamma_1.7", "meta_lion_centralized", "self_driving_lion")
"""They have a near relative among the options."""


@pytest.mark.parametrize("path", ["foreach", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("name", relatives(OPTIONS, OPTIONS.keys() - LIKE_OTHERS))
def test_fast_paths_follow_the_reference(name, path):
    ours, theirs = run(OPTIONS[name], path), run(OPTIONS[name], "single")
    # Each step adds a few roundings of float32 to values of order one, and Adam's quotient passes a
    # relative error of a moment on to an update of at most `lr`.
    roundings = STEPS * 16 * 2.0**-24
    if OPTIONS[name].get("momentum_dtype") is torch.bfloat16:
        roundings = STEPS * 2.0**-9
    for key, value in theirs.items():
        if OPTIONS[name].get("use_lion") and key.startswith("param."):
            # One rounding can turn a sign, which moves a weight by two rates.
            turned = torch.gt((ours[key] - value).abs(), roundings)
            assert turned.sum() <= 0.002 * value.numel() + 1
            continue
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(ours[key], value, rtol=roundings, atol=roundings * scale)


@pytest.mark.parametrize(
    ("dtype", "name"),
    crossed([torch.float64, torch.bfloat16, torch.float16], ["meta3", "meta_lion"]),
)
def test_foreach_follows_the_reference_in_other_dtypes(name, dtype):
    ours, theirs = run(OPTIONS[name], "foreach", dtype), run(OPTIONS[name], "single", dtype)
    allowed = {torch.float64: STEPS * 64 * 2.0**-24}.get(dtype, STEPS * torch.finfo(dtype).eps)
    for key, value in theirs.items():
        if key.startswith("param."):
            difference = (ours[key] - value).abs().double()
            assert torch.gt(difference, allowed).sum() <= 0.01 * value.numel() + 1, key


@needs_compiler
@pytest.mark.parametrize("name", ["meta3", "meta_lion_centralized"])
def test_native_handles_channels_last_and_transposed_gradients(name):
    def steps(path):
        net = models.model().to(memory_format=torch.channels_last)  # pyright: ignore
        linear = net.get_submodule("3")
        linear.weight = torch.nn.Parameter(linear.get_parameter("weight").t().contiguous().t())
        optimizer = models.optimizer(net, **OPTIONS[name], **PATHS[path])
        models.train(net, optimizer, 5)
        return [p.detach() for p in net.parameters()]

    for ours, theirs in zip(steps("native"), steps("single"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=5 * 16 * 2.0**-24)


DRIVEN: dict[str, dict[str, Any]] = {
    "average": {},
    "average_of_all": {"averaging": 0.0},
    "no_average": {"averaging": None},
    "maximize": {"maximize": True},
    "l2": {"decoupled_weight_decay": False, "weight_decay": 0.1},
    "centralized": {"use_gc": True},
    "gamma_2": {"law": SelfDriving(gamma=2.0)},
    "bfloat16": {"momentum_dtype": torch.bfloat16},
    **{f"{bits}_bits": {"state_bits": bits} for bits in (16, 8, 4)},
    "lion": {"use_lion": True},
    "lion_8_bits": {"use_lion": True, "state_bits": 8, "averaging": None},
}


def drive(groups, path, steps=8, **options):
    """Trains on gradients that mostly agree, the fifth of them bad; the alignments shown."""
    optimizer = CruxyOptimizer(groups, **{"mode": "self_driving", **options}, **PATHS[path])
    params = [p for group in optimizer.param_groups for p in group["params"]]
    shown = []
    for step in range(steps):
        for i, p in enumerate(params):
            generators = (torch.Generator().manual_seed(seed) for seed in (i, 100 * step + i))
            same, other = (torch.randn(p.shape, generator=g) for g in generators)
            p.grad = (1e-2 * (same + other)).to(p.dtype)
        if step == 4:
            params[0].grad.view(-1)[5] = math.nan
        optimizer.step(loss=1.0 / (1 + step))
        shown.append(optimizer.telemetry()["alignment"])
    return optimizer, shown


def assert_driven_alike(ours, theirs, near):
    """Parameters and state of two optimizers but for a few elements, where a code may differ."""
    for one, other in zip(ours.state.items(), theirs.state.items(), strict=True):
        for key, value in {"param": one[0], **one[1]}.items():
            reference = {"param": other[0], **other[1]}[key]
            apart = (value.detach().double() - reference.detach().double()).abs()
            if key.endswith("codes"):
                assert torch.ne(value, reference).float().mean() < 1e-2, key
            else:
                allowed = near * (1.0 + reference.detach().double().abs())
                assert torch.gt(apart, allowed).sum() <= 0.02 * value.numel(), key


@needs_compiler
@pytest.mark.parametrize("name", DRIVEN)
def test_native_self_driving_follows_the_reference(name):
    def run(path):
        return drive(parameters((96, 77), (5, 1200), (70,), ()), path, **DRIVEN[name])

    (ours, shown), (theirs, expected) = run("native"), run("single")
    compact = any(word in name for word in ("bits", "bfloat16"))
    assert abs(expected[-1]) > 0.3
    assert shown == pytest.approx(expected, abs=1e-3 if compact else 1e-5)
    assert_driven_alike(ours, theirs, 1e-4 if compact else 8 * 16 * 2.0**-24)
    assert ours.telemetry()["skipped_total"] == 1


@needs_compiler
def test_native_self_driving_follows_the_reference_in_groups_of_all_kinds():
    def run(path):
        coded, whole, turned, image, empty = parameters(
            (96, 77), (50, 30), (40, 30), (8, 3, 5, 5), (0, 3)
        )
        (half,) = parameters((60, 20), dtype=torch.bfloat16)
        turned = torch.nn.Parameter(turned.detach().t().contiguous().t())
        image = torch.nn.Parameter(image.detach().to(memory_format=torch.channels_last))
        groups = [
            {"params": [half]},
            {"params": [coded], "state_bits": 8, "maximize": True},
            {"params": [whole, turned], "averaging": 0.0},
            {"params": [image, empty], "averaging": None, "relative_limit": None},
        ]
        return drive(groups, path)

    (ours, shown), (theirs, expected) = run("native"), run("single")
    assert shown == pytest.approx(expected, abs=1e-3)
    assert_driven_alike(ours, theirs, 1e-4)


@needs_compiler
def test_native_mean_squares_are_those_of_the_reference():
    tensors = [*parameters((300, 200), (7,), (), (0, 3)), torch.randn(30, 20).t()[::2]]
    tensors += parameters((20, 5), dtype=torch.bfloat16)
    with torch.no_grad():
        ours, theirs = (sizes(tensors, native=n) for n in (passes, None))
    torch.testing.assert_close(ours.mean_squares, theirs.mean_squares, rtol=1e-6, atol=0.0)
    assert ours.counts == theirs.counts == [60_000, 7, 1, 0, 300, 100]


@needs_compiler
@pytest.mark.parametrize("mode", ["meta3", "self_driving"])
def test_native_result_does_not_depend_on_the_number_of_threads(mode):
    def tensors(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            generator = torch.Generator().manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (50_001, 7)]
            optimizer = CruxyOptimizer(params, mode=mode, fused=True)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
            return [value for p in params for value in (p.detach(), *optimizer.state[p].values())]
        finally:
            torch.set_num_threads(before)

    assert all(map(torch.equal, tensors(1), tensors(2)))


def test_blocks_and_buckets_change_nothing(monkeypatch):
    whole = {path: run(OPTIONS["meta3_centralized"], path) for path in ("single", "foreach")}
    monkeypatch.setattr(_blocks, "BLOCK", 50)
    for path, theirs in whole.items():
        ours = run(OPTIONS["meta3_centralized"], path)
        for key, value in theirs.items():
            # The norms are summed in another order.
            torch.testing.assert_close(ours[key], value, rtol=STEPS * 2.0**-20, atol=1e-5)


@pytest.mark.parametrize("path", ["single", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("lion", [False, True])
def test_no_temporary_is_larger_than_the_largest_parameter(path, lion):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    params = [torch.nn.Parameter(torch.randn(200, 10)) for _ in range(5)]
    optimizer = CruxyOptimizer(params, use_lion=lion, **PATHS[path])
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    with Largest() as mode:
        optimizer.step()
    assert mode.elements <= 2000


def test_without_a_compiler_the_default_still_steps(monkeypatch):
    monkeypatch.setattr(library, "_library", lambda: library.Found(why="no compiler"))
    net = models.model()
    optimizer = models.optimizer(net)
    models.train(net, optimizer, 2)
    assert optimizer.telemetry()["step"] == 2
    with pytest.raises(RuntimeError, match="fused=True needs a C compiler"):
        models.optimizer(net, fused=True)


def test_a_broken_compiler_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._library.cache_clear()
    try:
        assert not library.available()
    finally:
        library._library.cache_clear()


@needs_compiler
def test_the_library_is_built_once_and_survives_an_unwritable_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._library.cache_clear()
    try:
        assert library.available()
        (built,) = (tmp_path / "cruxy_torch").glob("*.so")
        before = built.stat().st_mtime_ns
        library._library.cache_clear()
        assert library.available()
        assert built.stat().st_mtime_ns == before
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        library._library.cache_clear()
        assert library.available()
    finally:
        library._library.cache_clear()


@pytest.mark.parametrize(
    "path", ["single", "foreach", pytest.param("native", marks=needs_compiler)]
)
def test_a_group_without_gradients_stays_as_it_is(path):
    moving, still = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    moving.grad = torch.ones(3)
    groups = [{"params": [still]}, {"params": [moving]}]
    CruxyOptimizer(groups, lr=0.1, **PATHS[path]).step()
    assert torch.equal(still, torch.ones(3))
    assert torch.all(moving < 1.0)


@pytest.mark.parametrize("fused", [None, False])
def test_a_gradient_that_is_to_be_negated_when_it_is_read_descends(fused):
    """The derivative of a conjugate is such a view."""
    x = torch.nn.Parameter(torch.ones(1))
    optimizer = CruxyOptimizer([x], lr=0.1, weight_decay=0.0, fused=fused)
    (torch.complex(torch.ones(1), x).conj() - 1).abs().square().sum().backward()
    assert x.grad.is_neg()
    optimizer.step()
    assert x.item() < 1.0


def test_tensors_that_are_negated_when_they_are_read_take_no_pointer():
    x = torch.nn.Parameter(torch._neg_view(torch.ones(5000)))
    x.grad = torch._neg_view(torch.ones(5000))
    optimizer = CruxyOptimizer([x], lr=0.1, weight_decay=0.0)
    optimizer.step()
    assert (x > -1.0).all()  # against a gradient of -1
    assert "negated" in str(optimizer.backend)
