"""What a step starts by Triton, counted: of every optimizer and direction."""

import collections

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
launches = pytest.importorskip("benchmarks._torch.launches")

import cruxy_torch  # noqa: E402
import triton_cases as cases  # noqa: E402
from cruxy_control import Meta3, PlateauGuard  # noqa: E402
from cruxy_torch import AXIOM, Cosmic, CruxyOptimizer, Momentum  # noqa: E402
from triton_cases import DEVICE  # noqa: E402

pytestmark = [pytest.mark.gpu, cases.needs_a_place_to_run]


def started(make, shapes, dtypes=(torch.float32,)):
    """What the second step starts, with parameters of each shape in each dtype."""
    params = [
        torch.nn.Parameter(torch.ones(shape, device=DEVICE, dtype=dtype))
        for dtype in dtypes
        for shape in shapes
    ]
    optimizer = make(params)
    for param in params:
        param.grad = torch.ones_like(param)
    loss = torch.ones((), device=DEVICE)
    with cruxy_torch.use_backend("triton"):
        optimizer.step(loss=loss)
        return launches.counted(lambda: optimizer.step(loss=loss))


TOGETHER = {
    "meta3": {},
    "meta_lion": {"use_lion": True},
    "stability_v1": {"mode": "stability_v1"},
    "stability_v2": {"mode": "stability_v2"},
    "a guard for plateaus": {"law": PlateauGuard(Meta3())},
    "self_driving": {"mode": "self_driving"},
    "self_driving, interpolated": {"mode": "self_driving", "interpolation": 0.6},
    "self_driving-lion": {"mode": "self_driving", "use_lion": True},
    "self_driving-no-average": {"mode": "self_driving", "averaging": None},
    "self_driving to an end": {"mode": "self_driving", "total_steps": 100},
    "limited, averaged": {"relative_limit": 0.1, "averaging": 4.0},
    "8 bits": {"state_bits": 8},
    "4 bits": {"state_bits": 4, "use_lion": True},
    "16 bits by chance": {"state_bits": 16, "stochastic_rounding": True},
}


@pytest.mark.parametrize("name", TOGETHER)
def test_a_step_starts_few_kernels_and_nothing_of_torch(name):
    found = started(lambda params: CruxyOptimizer(params, **TOGETHER[name]), [(4096,), (8192,)])
    kernels = [launch.kernel for launch in found.ours]
    assert kernels == ["sums_of_chunks", "sums_of_all", "decide", "update_of_chunks"]
    assert found.torch == []


def test_every_form_adds_a_launch_of_sums_and_one_of_the_update():
    def make(params):
        return CruxyOptimizer(params, mode="self_driving", momentum_dtype=torch.float32)

    found = started(make, [(300,), (40,)], dtypes=(torch.float32, torch.bfloat16))
    assert collections.Counter(launch.kernel for launch in found.ours) == {
        "sums_of_chunks": 2, "sums_of_all": 1, "decide": 1, "update_of_chunks": 2,
    }  # fmt: skip
    assert found.torch == []


def muon(params):
    role = {True: "attention.q", False: "norm"}
    each = {name: [p for p in params if (p.ndim == 2) is matrix] for matrix, name in role.items()}
    groups = [{"params": own, "role": name} for name, own in each.items() if own]
    return CruxyOptimizer(groups, direction="muon")


MATRIX = (64, 48)
ONE_AT_A_TIME = {
    "AXIOM": (AXIOM, ["squares_of_matrix", "sizes_of_matrix", "move_of_matrix"], 31),
    "AXIOM, momentum": (lambda ps: AXIOM(ps, momentum=0.9), ["move_of_tensor"], 55),
    "COSMIC": (Cosmic, ["adam_of_tensor"], 3),
    "COSMIC, signs": (lambda ps: Cosmic(ps, state_budget=480), ["sign_of_tensor"], 3),
    "Muon": (muon, ["momentum_of_tensor", "move_of_tensor"], 1),
    "momentum": (
        lambda ps: CruxyOptimizer(ps, direction=Momentum(), betas=(0.9, 0.99)),
        ["momentum_of_tensor", "move_of_tensor"],
        0,
    ),
}
"""What makes each, what it starts for a matrix, and calls of torch for a further one at most."""


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_a_direction_of_its_own_starts_its_kernels_for_each_tensor(name):
    make, of_matrix, most = ONE_AT_A_TIME[name]
    one, three = (started(make, [MATRIX] * count) for count in (1, 3))
    for count, found in ((1, one), (3, three)):
        kernels = [launch.kernel for launch in found.ours]
        assert kernels[:3] == ["sums_of_chunks", "sums_of_all", "decide"]
        assert collections.Counter(kernels[3:]) == collections.Counter(of_matrix * count)
    assert len(three.torch) - len(one.torch) <= 2 * most


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_the_scalars_of_every_law_are_one_launch_with_nothing_of_torch_before_it(name):
    found = started(ONE_AT_A_TIME[name][0], [MATRIX, MATRIX])
    assert [launch.after for launch in found.ours[:3]] == [0, 0, 0]
