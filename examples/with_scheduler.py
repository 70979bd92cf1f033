"""A plain PyTorch loop with a scheduler, under Meta3 and under self-driving.

Under Meta3 the scheduler moves the rate as it always does, and the controller multiplies it.
Self-driving finds its rate and obeys the scheduler where that lowers it: a schedule that cannot be
taken out of a loop does no harm.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from _spirals import spirals
from cruxy_torch import CruxyOptimizer

STEPS = 400

RUNS: dict[str, dict[str, Any]] = {
    "Meta3 from 1e-2": {"lr": 1e-2},
    "self-driving": {"mode": "self_driving"},
}
"""What each optimizer is given."""


def classifier() -> nn.Sequential:
    """Two hidden layers of 32, with the same weights at each call."""
    torch.manual_seed(0)
    layers = (nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    return nn.Sequential(*layers, nn.Flatten(0))


def train(model: nn.Module, optimizer: CruxyOptimizer, points: Tensor, labels: Tensor) -> float:
    """Trains under a linear decay to 0; returns the rate that was applied halfway."""
    loss_fn = nn.BCEWithLogitsLoss()
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=STEPS)
    halfway = 0.0
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = loss_fn(model(points), labels)
        loss.backward()
        optimizer.step(loss=loss)
        scheduler.step()
        if step == STEPS // 2:
            halfway = optimizer.telemetry()["learning_rate"]
    return halfway


def main() -> None:
    """Trains twice, and prints rates and losses on points that were not trained on."""
    points, labels = map(torch.from_numpy, spirals())
    unseen, classes = map(torch.from_numpy, spirals(seed=1))
    for name, options in RUNS.items():
        model = classifier()
        optimizer = CruxyOptimizer(model.parameters(), **options)
        halfway = train(model, optimizer, points, labels)
        last = optimizer.telemetry()["learning_rate"]
        with torch.no_grad():
            loss = nn.functional.binary_cross_entropy_with_logits(model(unseen), classes)
        print(f"{name:16} rate halfway {halfway:.1e}, at the end {last:.1e}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
