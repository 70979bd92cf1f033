"""Whole steps by Triton: what it takes, what follows where it fails, what its kernels become."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import cruxy_torch  # noqa: E402
import torch_models as models  # noqa: E402
import triton_cases as cases  # noqa: E402
from cruxy_control import Meta3, PlateauGuard  # noqa: E402
from cruxy_torch import AXIOM, CruxyOptimizer  # noqa: E402
from cruxy_torch._native import triton_found, triton_passes  # noqa: E402
from torch_low_bit import parameters  # noqa: E402
from triton_cases import DEVICE, needs_a_gpu  # noqa: E402

runs = cases.needs_a_place_to_run
gpu = pytest.mark.gpu
BUILDS = Path(__file__).with_name("triton_builds.py")
STEPS = 5


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch):
    """Triton is what a step is to take, also on the CPU of the interpreter."""
    triton_found.forgive()
    if not triton_found.available(DEVICE):
        yield
        return
    with cruxy_torch.use_backend("triton"):
        yield
    triton_found.forgive()


def trained(options, *, reference=False, steps=STEPS, damage=None):
    net = models.model().to(DEVICE)
    path = {"fused": False, "foreach": False} if reference else {}
    optimizer = CruxyOptimizer(net.parameters(), **{"lr": 1e-2, **options}, **path)
    for step in range(steps):
        x, y = (t.to(DEVICE) for t in models.batch(step))
        optimizer.zero_grad()
        loss = models.loss_of(net, x, y)
        loss.backward()
        if damage is not None:
            damage(step, net)
        optimizer.step(loss=loss)
    return models.everything(net, optimizer), optimizer


TRAINED = {
    **{name: models.OPTIONS[name] for name in (
        "meta3", "meta3_l2", "meta3_maximize", "meta_lion", "meta_lion_bfloat16", "stability_v1",
        "self_driving", "self_driving_lion", "limited",
    )},
    "plateau": {"law": PlateauGuard(Meta3(), patience=1)},
}  # fmt: skip


def assert_near(ours, theirs, *, lion=False, roundings=STEPS * 64 * 2.0**-24):
    for key, value in theirs.items():
        apart = (ours[key].double() - value.double()).abs().nan_to_num()
        allowed = roundings * max(1.0, value.double().abs().max().item() if value.numel() else 1.0)
        turned = 0.002 * value.numel() + 1 if lion and key.startswith("param.") else 0
        assert torch.gt(apart, allowed).sum() <= turned, key


@gpu
@runs
@pytest.mark.parametrize("name", TRAINED)
def test_training_follows_the_reference(name):
    options = TRAINED[name]
    (ours, by_triton), (theirs, _) = trained(options), trained(options, reference=True)
    assert by_triton.backend == ({"triton": 8}, {})
    roundings = STEPS * (2.0**-9 if "bfloat16" in name else 64 * 2.0**-24)
    assert_near(ours, theirs, lion=options.get("use_lion", False), roundings=roundings)


@gpu
@runs
def test_a_gradient_that_is_not_finite_is_skipped():
    def damage(step, net):
        if step == 2:
            models.spoil(net, torch.nan)

    ours, optimizer = trained({}, damage=damage)
    assert optimizer.telemetry()["skipped_total"] == 1
    models.assert_finite(ours)
    assert_near(ours, trained({}, reference=True, damage=damage)[0])


@gpu
@runs
def test_what_does_not_fit_takes_the_next_path_in_the_same_step():
    whole, half, gaps, image, empty = (
        p.detach().to(DEVICE) for p in parameters((96, 77), (60, 20), (8, 6), (8, 3, 5, 5), (0, 3))
    )
    double = torch.ones(6, 5, dtype=torch.float64, device=DEVICE)
    tensors = [
        whole, half.bfloat16(), double, gaps[:, ::2], image.to(memory_format=torch.channels_last),
        empty,
    ]  # fmt: skip

    def step(**path):
        params = [torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in tensors]
        params[3] = torch.nn.Parameter(tensors[3].clone().repeat_interleave(2, 1)[:, ::2])
        optimizer = CruxyOptimizer(params, state_bits=8, **path)
        for number in range(2):
            for i, p in enumerate(params):
                g = torch.Generator().manual_seed(10 * number + i)
                grad = torch.randn(p.shape, generator=g).to(DEVICE, p.dtype)
                p.grad = grad.contiguous(memory_format=torch.channels_last) if i == 4 else grad
            optimizer.step(loss=1.0)
        return params, optimizer

    (ours, by_triton), (theirs, _) = step(), step(fused=False, foreach=False)
    layout = "layout: not all in one order without gaps"
    assert by_triton.backend.tensors["triton"] == 4
    assert by_triton.backend.why == {"dtype torch.float64": 1, layout: 1}
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@gpu
@runs
@pytest.mark.parametrize("mode", ["meta3", "self_driving"])
def test_a_kernel_that_fails_is_told_once_and_done_without(mode, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("ptxas: no such machine\nfatal: it is not there")

    class Kernel:
        def __getitem__(self, grid):
            return broken

    monkeypatch.setattr(triton_passes.triton_steps, "update_of_chunks", Kernel())
    with caplog.at_level(logging.WARNING):
        ours, optimizer = trained({"mode": mode})
    assert [r.message for r in caplog.records if "kernel failed" in r.message] == [
        "a kernel failed: RuntimeError: fatal: it is not there; steps go on without Triton, with "
        "the same numbers"
    ]
    assert_near(ours, trained({"mode": mode}, reference=True)[0])
    backend = next(b for b in cruxy_torch.backends() if b.name == "triton")
    assert (backend.available, backend.why) == (
        False, "a kernel failed: RuntimeError: fatal: it is not there"
    )  # fmt: skip
    assert "triton" not in optimizer.backend.tensors


@gpu
@runs
def test_the_first_kernel_of_a_step_may_fail_too(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise OSError("no driver")

    monkeypatch.setattr(triton_passes.triton_steps, "sums_of_chunks", Kernel())
    ours, _ = trained({"mode": "self_driving"})
    assert_near(ours, trained({"mode": "self_driving"}, reference=True)[0])


@gpu
@runs
@pytest.mark.parametrize("taken", ["foreach", "reference"])
def test_foreach_and_not_fused_do_without(taken):
    params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in parameters((8, 8), (8, 8))]
    told = {"foreach": True} if taken == "foreach" else {"fused": False, "foreach": False}
    optimizer = CruxyOptimizer(params, **told)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    assert optimizer.backend == ({taken: 2}, {"another backend was chosen": 2})


@gpu
@runs
def test_an_optimizer_without_a_pass_says_so():
    params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in parameters((8, 8))]
    optimizer = AXIOM(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step(loss=1.0)
    assert optimizer.backend.why == {"FactoredDirection has no native pass": 1}


@gpu
@runs
def test_released_gradients_take_it_too():
    def released(**path):
        params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in parameters((30, 40), (300,))]
        optimizer = CruxyOptimizer(params, relative_limit=0.1, **path)
        optimizer.register_hooks()
        for _ in range(2):
            sum((p - 3.0).square().sum() for p in params).backward()
            optimizer.step(loss=1.0)
        return params, optimizer.backend.tensors

    (ours, taken), (theirs, _) = released(), released(fused=False, foreach=False)
    assert taken == {"triton": 2}
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@gpu
@needs_a_gpu
@pytest.mark.parametrize("options", [{}, {"mode": "self_driving"}, {"state_bits": 4}])
def test_no_step_waits_for_the_device(options):
    params = [torch.nn.Parameter(torch.randn(n, device=DEVICE)) for n in (70_000, 300)]
    optimizer = CruxyOptimizer(params, **options)
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step(loss=torch.ones((), device=DEVICE))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@needs_a_gpu
@pytest.mark.parametrize("options", [{}, {"mode": "self_driving"}, {"state_bits": 4}])
def test_a_step_is_captured_in_a_graph_and_replayed(options):
    def start():
        generator = torch.Generator(device=DEVICE).manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(n, device=DEVICE, generator=generator))
            for n in (70_000, 300)
        ]
        for p in params:
            p.grad = torch.randn(p.shape, device=DEVICE, generator=generator)
        return params, CruxyOptimizer(params, **options)

    (eager, one), (replayed, other) = start(), start()
    loss = torch.ones((), device=DEVICE)
    for _ in range(6):
        one.step(loss=loss)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            other.step(loss=loss)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.step(loss=loss)
    for _ in range(3):
        graph.replay()
    assert all(map(torch.equal, eager, replayed))


def built(*names):
    """What `triton_builds.py` says of these forms, or of all; a process where kernels are code."""
    run = subprocess.run(
        [sys.executable, str(BUILDS), "--json", *names],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def assert_well_built(forms):
    for name, row in forms.items():
        for capability, found in row.items():
            assert found["spilled"] == 0, (name, capability, found)
            assert found["atomics"] == found["ordered_atomics"], (name, capability, found)
            narrow = ("not aligned", "sums of tensors", "sums of all", "scalars")
            if not any(words in name for words in narrow):
                assert found["wide_loads"] > 0, (name, capability, found)


def test_the_usual_update_is_compiled_without_a_gpu_and_spills_nothing():
    assert_well_built(built("Adam"))


def test_products_are_written_after_all_programs_have_read_them():
    (adam,) = built("Adam").values()
    assert {row["ordered_atomics"] for row in adam.values()} == {1}


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_capability_and_spills_nothing():
    forms = built()
    assert {frozenset(row) for row in forms.values()} == {frozenset(("75", "80", "89", "90"))}
    assert_well_built(forms)
