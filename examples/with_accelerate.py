"""Accelerate with self-driving, two micro-batches a step.

Accelerate hands the optimizer nothing but a closure, so that the loop tells it the loss by
`observe` and the end by `total_steps`. Several processes need
`process_group=torch.distributed.group.WORLD` besides.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _spirals import spirals
from cruxy_torch import CruxyOptimizer

EPOCHS, BATCH, ACCUMULATE = 40, 32, 2


def main() -> None:
    """Trains, and prints the loss of the parameters and of their average."""
    torch.manual_seed(0)
    layers = (nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    model = nn.Sequential(*layers, nn.Flatten(0))
    loss_fn = nn.BCEWithLogitsLoss()
    data = TensorDataset(*map(torch.from_numpy, spirals()))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    optimizer = CruxyOptimizer(
        model.parameters(),
        mode="self_driving",
        total_steps=EPOCHS * len(loader) // ACCUMULATE,
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(EPOCHS):
        for points, labels in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model(points), labels)
                accelerator.backward(loss)
                optimizer.observe(loss)
                prepared.step()
                prepared.zero_grad()
    report = optimizer.telemetry()
    print(f"{report['step']} steps, rate at the end {report['learning_rate']:.1e}")
    points, labels = map(torch.from_numpy, spirals(seed=1))
    with torch.no_grad():
        print(f"unseen points, parameters  loss {loss_fn(model(points), labels):.4f}")
        with optimizer.averaged():
            print(f"unseen points, average     loss {loss_fn(model(points), labels):.4f}")


if __name__ == "__main__":
    main()
