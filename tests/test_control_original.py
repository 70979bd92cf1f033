"""In compatibility settings each law is the controller of the package `cruxy` 2.1.0.

Where the original is wrong, the difference is shown by a test of its own, named for it.
"""

import math

import numpy as np
import pytest

from cruxy_control import Meta3, Signals, StabilityV1, StabilityV2, betas, meta_learning_rate
from streams import clean

cruxy = pytest.importorskip("cruxy", reason="the original is a test-only dependency")
torch = pytest.importorskip("torch")

RATE, B1, B2 = 1e-3, 0.9, 0.999
STEPS = 2000
# 2,000 running products of float32 factors against float64 ones, a few roundings each.
RELATIVE = STEPS * 4 * 2.0**-24


def original(name):
    v2 = cruxy.CruxyV2Controller(RATE, B1, B2)
    return {
        "stability_v1": lambda: cruxy.CruxyV1Controller(RATE, B2),
        "stability_v2": lambda: v2,
        "meta3": lambda: cruxy.MetaCruxyController(v2),
    }[name]()


def step_original(controller, norm, gamma_norm, loss):
    """One step on a gradient of one element, whose every norm is its size."""
    if isinstance(controller, cruxy.CruxyV1Controller):
        return controller.step([torch.tensor([norm], dtype=torch.float64)])
    return controller.step([torch.tensor([gamma_norm], dtype=torch.float64)], loss, norm)


def run_original(name, stream):
    controller = original(name)
    return [step_original(controller, *map(float, row)) for row in zip(*stream, strict=True)]


def run_ours(law, stream):
    state, rows = law.init(np.float32(0.0), xp=np), []
    with np.errstate(all="ignore"):
        for row in zip(*stream, strict=True):
            state, controls = law.step(state, Signals(*map(np.float32, row)), xp=np)
            beta1, beta2 = betas(controls, B1, B2, xp=np)
            rate = meta_learning_rate(controls, RATE, xp=np) * controls.phase_scale
            rows.append(
                {
                    "lr": float(rate),
                    "beta1": float(beta1),
                    "beta2": float(beta2),
                    "phase": float(controls.phase),
                    "clip_threshold": float(controls.clip_threshold),
                    "curvature": float(controls.curvature),
                    "warning": float(controls.warning),
                }
            )
    return rows


LAWS = {
    "stability_v1": StabilityV1.cruxy_2_1_0(),
    "stability_v2": StabilityV2.cruxy_2_1_0(),
    "meta3": Meta3.cruxy_2_1_0(),
}


@pytest.mark.parametrize("name", LAWS)
def test_compatibility_law_follows_the_original_over_2000_steps(name):
    stream = clean(STEPS, seed=3)
    ours, theirs = run_ours(LAWS[name], stream), run_original(name, stream)
    compared = set(theirs[0]) & set(ours[0])
    assert compared >= {"lr", "beta2", "phase"}
    for key in compared:
        np.testing.assert_allclose(
            [row[key] for row in ours],
            [row[key] for row in theirs],
            rtol=RELATIVE,
            atol=1e-6,
            err_msg=key,
        )


def test_original_phase_is_an_artefact_of_its_start_on_a_constant_gradient():
    steady = (np.ones(1000), np.ones(1000), np.ones(1000))
    theirs = [row["phase"] for row in run_original("meta3", steady)]
    t = np.arange(1, 1001)
    assert theirs[0] > 0.98
    assert theirs[99] == pytest.approx(0.91, abs=0.005)
    assert theirs[999] == pytest.approx(0.61, abs=0.005)
    assert all(np.diff(theirs)[20:] < 0), "it falls with time alone"
    ours = [row["phase"] for row in run_ours(Meta3(), steady)]
    np.testing.assert_allclose(ours, np.full(len(t), 0.5), atol=1e-6)


def test_original_stability_v2_collapses_its_rate_at_the_start():
    steady = (np.ones(300), np.ones(300), np.ones(300))
    assert run_original("stability_v2", steady)[-1]["lr"] < RATE / 1000
    assert run_ours(StabilityV2(), steady)[-1]["lr"] == pytest.approx(RATE)


def test_original_warning_can_never_fire_its_emergency():
    law = StabilityV2(trend_weight=0.0)
    assert law.surge_weight + law.curvature_weight <= law.alarm
    surging = (np.geomspace(1, 1e6, 60), np.geomspace(1, 1e6, 60), np.linspace(1, 500, 60))
    assert max(row["warning"] for row in run_original("stability_v2", surging)) <= 0.7
    assert max(row["warning"] for row in run_ours(StabilityV2(), surging)) > 0.7


def test_original_curvature_is_poisoned_for_good_by_one_nan_loss():
    norm, gamma_norm, loss = clean(50)
    loss[10] = math.nan
    assert math.isnan(run_original("meta3", (norm, gamma_norm, loss))[-1]["curvature"])
    assert math.isfinite(run_ours(Meta3(), (norm, gamma_norm, loss))[-1]["curvature"])


def test_original_error_depends_on_the_units_of_the_gradient():
    norm, gamma_norm, loss = clean(400)

    def spread(rows):
        return np.std([row["beta2"] for row in rows])

    small = (norm * 1e-3, gamma_norm * 1e-3, loss)
    assert spread(run_original("stability_v1", small)) < 1e-6, "the controller is dead"
    ratio = spread(run_ours(StabilityV1(), small)) / spread(
        run_ours(StabilityV1(), (norm, gamma_norm, loss))
    )
    assert ratio == pytest.approx(1.0, abs=0.05)


def test_original_final_rate_is_silently_clamped():
    steady = (np.ones(20), np.ones(20), np.ones(20))
    v2 = cruxy.CruxyV2Controller(1.0, B1, B2)
    controller = cruxy.MetaCruxyController(v2)
    theirs = [step_original(controller, *map(float, row)) for row in zip(*steady, strict=True)]
    assert theirs[-1]["lr"] == 1e-2, "a rate of 1 was asked for"


def test_original_ignores_the_first_beta_in_v1():
    controller = cruxy.CruxyV1Controller(RATE, B2)
    assert step_original(controller, 1.0, 1.0, 1.0)["beta1"] == 0.9
    _, controls = StabilityV1().step(
        StabilityV1().init(np.float32(0), xp=np), Signals(*[np.float32(1.0)] * 3), xp=np
    )
    assert float(betas(controls, 0.8, B2, xp=np)[0]) == pytest.approx(0.8)
