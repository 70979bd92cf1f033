"""Today's PyTorch optimizers give the numbers, and load the checkpoints, of the commit before."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import golden_torch as golden  # noqa: E402
from golden_runs import SAVED, STEPS, digest  # noqa: E402
from relatives import relatives  # noqa: E402

KEPT = torch.load(Path(__file__).parent / "golden" / "torch.pt", weights_only=True)
SAME = KEPT["basis"] == golden.basis()
"""Whether this machine and torch are those that the fixture was written with: then bits count."""


def finish(name, params, optimizer, begin):
    golden.train(name, params, optimizer, range(begin, STEPS))
    return digest(golden.bits(params, optimizer))


def close(name, params):
    """On another machine sums round otherwise, and a code may be the next one."""
    wanted = KEPT["saved"][name]["after"].double()
    error = (params["w"].detach()[:4].double() - wanted).square().mean().sqrt()
    return error < 0.02 * wanted.square().mean().sqrt()


FAST = (
    *("meta3/single", "meta_lion/foreach", "self_driving/foreach"),
    *("meta3/native", "meta3-16/native", "meta3-4/native", "meta_lion-8/native"),
    *("stability_v1/native", "stability_v2/native", "self_driving/native"),
    *("self_driving-8/native", "self_driving_lion-4/native", "plain/native", "l2/native"),
    *("lion_centralized/native", "maximize/native", "gamma_1.7/native", "limited/native"),
    *("bounded/native", "lion_bfloat16/native", "select/native", "lion/bfloat16/native"),
    *(
        "meta3/float16/foreach",
        "meta3/float64/single",
        "lion/float64/native",
        "stochastic-8/native",
    ),
    *("meta3-4/released", "limited/released", "axiom", "axiom-8", "axiom/relative", "axiom/streak"),
    *("axiom/whole", "axiom-4/released", "axiom/driven_v2", "cosmic-16", "cosmic/small"),
    "cosmic/released",
)
"""Every family, option, path, dtype and number of bits comes up, but not each with each."""


@pytest.mark.parametrize("name", relatives(golden.RUNS, FAST))
def test_a_run_gives_the_bits_it_gave(name):
    params, optimizer = golden.make(name)
    got = finish(name, params, optimizer, 0)
    if SAME:
        assert got == KEPT["digests"][name]
    else:
        assert name not in KEPT["saved"] or close(name, params)


def completed(state, optimizer):
    """The saved state with what a law did not have then: when a rate ends, what holds it."""
    groups, today = state["param_groups"], optimizer.param_groups[0]["controller"]
    new = (".cooldown.", ".hold.", "base_rate", "driven")
    added = {k: v for k, v in today.items() if any(name in k for name in new)}
    first = groups[0] | {"controller": groups[0]["controller"] | added}
    return state | {"param_groups": [first, *groups[1:]]}


FAST_SAVED = (
    *("meta3/native", "meta3-16/native", "meta_lion-8/native", "stability_v1/native"),
    *("stability_v2/native", "self_driving/native", "self_driving_lion-4/native", "limited/native"),
    *("lion/float16/native", "stochastic-8/native", "meta3-4/released", "axiom", "axiom-8"),
    *("axiom/whole", "cosmic-16", "cosmic/small"),
)


@pytest.mark.parametrize("name", relatives(KEPT["saved"], FAST_SAVED))
def test_a_checkpoint_of_the_commit_before_continues_as_it_did(name):
    params, optimizer = golden.make(name)
    saved = KEPT["saved"][name]
    with torch.no_grad():
        for key, p in params.items():
            p.copy_(saved["params"][key])
    optimizer.load_state_dict(completed(saved["state"], optimizer))
    got = finish(name, params, optimizer, SAVED)
    if SAME:
        assert got == KEPT["digests"][name]
    else:
        assert close(name, params)


def test_a_fixture_tells_a_changed_run():
    params, optimizer = golden.make("meta3/native")
    optimizer.param_groups[0]["lr"] *= 1.0 + 2.0**-20
    assert finish("meta3/native", params, optimizer, 0) != KEPT["digests"]["meta3/native"]
    assert np.isfinite(params["w"].detach().numpy()).all()
