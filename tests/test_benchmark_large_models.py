"""What the benchmark of large models counts is what an optimizer really makes."""

import argparse

import pytest
from rich.console import Console

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("pytorch_optimizer")

from benchmarks._torch import large_models, large_runs  # noqa: E402
from benchmarks.large_models import PROTOCOL  # noqa: E402
from cruxy_torch import AXIOM, state_bytes  # noqa: E402

SHAPES = {torch.Size((48, 64)): 3, torch.Size((64,)): 2}


def ways(*labels):
    return [way for way in large_models.WAYS if way.label in labels]


@pytest.mark.parametrize("way", ways("AdamW", "Adafactor", "AXIOM"), ids=lambda way: way.label)
def test_one_tensor_of_each_shape_tells_of_all(way):
    params = [
        torch.nn.Parameter(torch.ones(shape, dtype=way.dtype))
        for shape, count in SHAPES.items()
        for _ in range(count)
    ]
    optimizer = way.make(params, 16)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    found = large_models.held(way, SHAPES, 16)
    assert found["state"] == state_bytes(optimizer)
    assert found["weights"] == found["gradients"] == sum(p.nbytes for p in params)


def test_what_is_projected_counts_with_its_projection():
    (galore,) = ways("GaLore")
    found = large_models.held(galore, {torch.Size((48, 64)): 2}, 16)
    # Two moments of 64 by 16 or 48 by 16, and the basis that they are in, all bfloat16.
    assert found["state"] in (2 * 2 * (2 * 64 * 16 + 48 * 16), 2 * 2 * (2 * 48 * 16 + 64 * 16))


def test_released_gradients_count_with_the_largest():
    released = ways("AXIOM, gradients released")[0]
    assert large_models.held(released, SHAPES, 16)["gradients"] == 2 * 48 * 64
    assert isinstance(released.make([torch.nn.Parameter(torch.ones(2))], 1), AXIOM)


def test_published_counts_are_met_and_the_table_compares_with_adamw():
    shapes = large_models.shapes_of(large_models.MODELS["TinyLlama, 1.1B"])
    assert sum(shape.numel() * count for shape, count in shapes.items()) == 1_100_048_384
    found = {"weights": 4, "gradients": 4, "state": 8}
    less = {"weights": 2, "gradients": 1, "state": 1}
    model = {"parameters": 1, "rank": 1, "ways": {"AdamW": found, "other": less}}
    rows = PROTOCOL.rows({"models": {"m": model}}).rows
    assert rows[1][-2:] == ("6.0 x", "4.0 x")


def test_what_is_measured_is_what_is_counted():
    found = large_runs.measured("llama-tiny", "AXIOM, gradients released", 8, 64, 2)
    shapes = large_models.shapes_of(large_runs.SHAPES["llama-tiny"])
    counted = large_models.held(large_runs.way_of("AXIOM, gradients released"), shapes, 16)
    for kind, size in counted.items():
        assert found[kind] == pytest.approx(size, rel=0.02), kind
    assert found["losses"][1] < found["losses"][0]
    assert found["peak"] > found["libraries"] > 0
    assert found["activations"] > 0


def test_what_does_not_fit_is_left_out_and_the_rest_is_shown(monkeypatch):
    free = 2_000_000  # AdamW's 2.2 MB do not fit, all others do
    monkeypatch.setattr(large_runs, "available", lambda: free)
    seen = {
        "libraries": 10, "peak": 10 + 10**9, "weights": 1, "gradients": 1, "state": 1,
        "activations": 10**6, "losses": [2.0, 1.0],
    }  # fmt: skip
    monkeypatch.setattr(large_runs, "measured", lambda *_: seen)
    parser = argparse.ArgumentParser()
    PROTOCOL.arguments(parser)
    options = parser.parse_args(["--measure", "llama-tiny"])
    result = PROTOCOL.measure(options, Console(quiet=True))
    rows = PROTOCOL.rows(result).rows
    assert result["part"] == "measured-llama-tiny"
    assert rows[0][:2] == ("AdamW", "does not fit")
    assert rows[-1][0] == "AXIOM, gradients released, activations in 8 bits"
    assert rows[-1][4:7] == ("0.001", "0.001", "1.000")
    assert PROTOCOL.draw(result).axes
