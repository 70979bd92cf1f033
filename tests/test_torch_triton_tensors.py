"""Triton kernels for one tensor: AXIOM's matrices, Muon's momentum, any direction's move."""

import collections

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import cruxy_torch  # noqa: E402
import triton_cases as cases  # noqa: E402
from cruxy_control import Meta3, PlateauGuard  # noqa: E402
from cruxy_torch import (  # noqa: E402
    AXIOM,
    AdaptiveGradientClip,
    Cosmic,
    CruxyOptimizer,
    Momentum,
    _blocks,
)
from cruxy_torch._native import triton_found, triton_launch, triton_matrices  # noqa: E402
from triton_cases import DEVICE  # noqa: E402

pytestmark = [pytest.mark.gpu, cases.needs_a_place_to_run]

SHAPES = ((96, 77), (40, 200), (33,), (64, 64), (4, 3, 5))


def muon(**options):
    def make(params):
        roles = ["attention.q" if p.ndim == 2 else "norm" for p in params]
        groups = [{"params": [p], "role": role} for p, role in zip(params, roles, strict=True)]
        return CruxyOptimizer(groups, direction="muon", **options)

    return make


OPTIMIZERS = {
    "AXIOM": AXIOM,
    "AXIOM, relative": lambda ps: AXIOM(ps, relative_step=True, relative_limit=0.1, maximize=True),
    "AXIOM, no clip, half a root": lambda ps: AXIOM(ps, clip_rms=None, power=0.5, averaging=2.0),
    "AXIOM, steered decay": lambda ps: AXIOM(
        ps, weight_decay=0.1, law=PlateauGuard(Meta3(clip_threshold=None), patience=1)
    ),
    "AXIOM, momentum in 4 bits": lambda ps: AXIOM(ps, momentum=0.9),
    "COSMIC": Cosmic,
    "COSMIC, few bytes": lambda ps: Cosmic(ps, state_budget=30_000, relative_limit=0.1),
    "COSMIC, 8 bits": lambda ps: Cosmic(ps, state_bits=8, averaging=2.0),
    "clipped momentum": lambda ps: CruxyOptimizer(
        ps,
        direction=AdaptiveGradientClip(Momentum(), 1e-3),
        relative_limit=0.1,
        betas=(0.9, 0.99),
    ),
    "Muon": muon(),
    "Muon, 4 bits, bfloat16 by chance": muon(state_bits=4, stochastic_rounding=True),
    "Muon, 16 bits": muon(state_bits=16),
}


@pytest.fixture(autouse=True)
def _fresh():
    triton_found.forgive()
    yield
    triton_found.forgive()


def trained(make, backend, *, dtype=torch.float32, damage=None, steps=3):
    """Parameters and states after a few steps by a backend, and what was launched."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
        for shape in SHAPES
    ]
    optimizer, launched, launch = make(params), collections.Counter(), triton_launch.launch

    def counted(device, kernel, *args, **kwargs):
        launched[getattr(getattr(kernel, "fn", kernel), "__name__", "")] += 1
        launch(device, kernel, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, cruxy_torch.use_backend(backend):
        patch.setattr(triton_launch, "launch", counted)
        for step in range(steps):
            for param in params:
                grad = torch.randn(param.shape, generator=generator)
                param.grad = grad.to(DEVICE, dtype)
            if damage == step:
                params[0].grad[3, 5] = torch.nan
            optimizer.step(loss=torch.tensor(1.0, device=DEVICE))
    found = [*params] + [
        value
        for param in params
        for value in optimizer.state[param].values()
        if isinstance(value, torch.Tensor)
    ]
    return [tensor.detach().clone() for tensor in found], launched


def assert_near(ours, theirs, roundings=64):
    for one, other in zip(ours, theirs, strict=True):
        if one.dtype in (torch.int8, torch.uint8, torch.bfloat16):
            assert torch.ne(one, other).float().mean() <= 5e-3 or one.numel() < 300
        else:
            apart = (one.double() - other.double()).abs()
            assert (apart <= roundings * 2.0**-24 * (1.0 + other.double().abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_follows_the_reference(name, dtype):
    ours, launched = trained(OPTIMIZERS[name], "triton", dtype=dtype)
    assert_near(ours, trained(OPTIMIZERS[name], "reference", dtype=dtype)[0])
    moves = ("move_of_matrix", "move_of_tensor", "adam_of_tensor", "sign_of_tensor")
    assert sum(map(launched.get, moves, [0] * 4)) >= 3 * len(SHAPES) - 2 * 3


@pytest.mark.parametrize("name", ["AXIOM", "COSMIC", "Muon"])
def test_a_gradient_that_is_not_finite_moves_nothing(name):
    for step in (0, 1):
        ours, _ = trained(OPTIMIZERS[name], "triton", damage=step)
        assert all(tensor.isfinite().all() for tensor in ours)
        assert_near(ours, trained(OPTIMIZERS[name], "reference", damage=step)[0])


def test_a_matrix_under_axiom_is_passed_over_three_times():
    _, launched = trained(AXIOM, "triton", steps=1)
    assert {name: launched[name] for name in launched if name.endswith("matrix")} == {
        "squares_of_matrix": 3, "sizes_of_matrix": 3, "move_of_matrix": 3,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["AXIOM", "Muon", "Muon, 4 bits, bfloat16 by chance"])
def test_tensors_that_come_in_blocks_give_the_same_numbers(name, monkeypatch):
    whole, _ = trained(OPTIMIZERS[name], "triton")
    monkeypatch.setattr(_blocks, "BLOCK", 2048)
    parts, _ = trained(OPTIMIZERS[name], "triton")
    assert_near(parts, whole)


@pytest.mark.parametrize("kernel", ["squares_of_matrix", "sizes_of_matrix", "move_of_matrix"])
def test_whichever_kernel_fails_the_step_is_taken_once(kernel, monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise OSError("no driver")

    monkeypatch.setattr(triton_matrices, kernel, Broken())
    ours, _ = trained(AXIOM, "triton")
    assert_near(ours, trained(AXIOM, "reference")[0])
