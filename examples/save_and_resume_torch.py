"""Saves a run in PyTorch and goes on with it: the same bits as if it had never stopped.

`state_dict` holds moments, controller and average, and loads with `weights_only=True`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from _spirals import spirals
from cruxy_torch import CruxyOptimizer


def start() -> tuple[nn.Module, CruxyOptimizer]:
    """A network with a hidden layer of 32, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))
    return model, CruxyOptimizer(model.parameters(), mode="self_driving")


def train(model: nn.Module, optimizer: CruxyOptimizer, steps: int) -> None:
    """Takes as many steps more."""
    points, labels = map(torch.from_numpy, spirals())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(points), labels)
        loss.backward()
        optimizer.step(loss=loss)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains 100 steps, saves, goes on for 100 in two ways, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to keep the file (default: not)")
    output = parser.parse_args(argv).output
    model, optimizer = start()
    train(model, optimizer, 100)
    with TemporaryDirectory() as scratch:
        path = output or Path(scratch) / "run.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        saved = torch.load(path, weights_only=True)
    train(model, optimizer, 100)

    resumed, its_optimizer = start()
    resumed.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, its_optimizer, 100)

    pairs = list(zip(model.parameters(), resumed.parameters(), strict=True))
    with optimizer.averaged(), its_optimizer.averaged():
        pairs += [
            (a.detach().clone(), b.detach().clone())
            for a, b in zip(model.parameters(), resumed.parameters(), strict=True)
        ]
    same = [torch.equal(a, b) for a, b in pairs]
    print(f"step {its_optimizer.telemetry()['step']}")
    print(f"{sum(same)} of {len(same)} parameters and averages are equal, bit for bit")


if __name__ == "__main__":
    main()
