"""The protocol that compares exact training with plain, without the training itself."""

import json

import pytest

pytest.importorskip("jax")

from benchmarks import exact
from benchmarks._jax import exact_losses
from benchmarks._protocol import run


def test_losses_are_compared_seed_by_seed(monkeypatch, tmp_path):
    def train(name, seed, steps, data, *, exactly):
        assert (name, steps, data) == ("shakespeare-small", 20, None)
        return {"held_out": 2.0 + seed + 0.25 * exactly, "checksum": f"{seed}{exactly:d}"}

    monkeypatch.setattr(exact_losses, "train", train)
    argv = ["--losses", "shakespeare-small", "--steps", "20", "--seeds", "0", "1"]
    run(exact.PROTOCOL, [*argv, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "exact-losses-shakespeare-small.json").read_text())
    rows = {row[0]: row[1:] for row in exact.PROTOCOL.rows(result).rows}
    assert rows["plain"][0] == "2.500 ± 0.500"
    assert rows["exact"][0] == "2.750 ± 0.500"
    assert rows["exact"][1].startswith("0.250")
    assert rows["exact"][2] == "01, 11"


@pytest.mark.slow
def test_a_small_model_trains_exactly_as_well_as_plainly():
    plain, exactly = (
        exact_losses.train("shakespeare-small", 0, 20, None, exactly=kind) for kind in (False, True)
    )
    assert exactly["held_out"] == pytest.approx(plain["held_out"], abs=2e-3)
    assert exactly["checksum"] != plain["checksum"]
