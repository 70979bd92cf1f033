"""A run that stops in one framework goes on in the other with the same bits."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example():
    """`exact_training.py` with a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        main = importlib.import_module("exact_training").main
        yield lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=["gpt", "vit"])
def whole(request, example):
    """The model, and the checksum of three steps in PyTorch without a stop."""
    return request.param, example("--model", request.param, "--steps", 3)


@pytest.mark.parametrize(("first", "then"), [("jax", "torch"), ("torch", "jax"), ("jax", "jax")])
def test_a_run_goes_on_in_the_other_framework(example, whole, first, then, tmp_path):
    model, wanted = whole
    saved = tmp_path / "run.npz"
    example("--framework", first, "--model", model, "--steps", 2, "--save", saved)
    assert example("--framework", then, "--model", model, "--steps", 3, "--load", saved) == wanted
