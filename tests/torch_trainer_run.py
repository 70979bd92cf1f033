"""A run of `Trainer` that can be killed: everything that draws at random is in it."""

import os
import signal
import sys

import numpy as np
import torch
from torch import nn

from cruxy_torch import AXIOM, CruxyOptimizer, Trainer

STEPS = 20
INTERVAL = 5


class Noisy(torch.utils.data.Dataset):
    """Points with noise that each worker draws when it is asked."""

    def __init__(self, count=26):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, 6, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        return x + 0.1 * torch.randn(6) + 0.1 * float(np.random.rand()), x.sum().reshape(1)


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 64), nn.Tanh(), nn.Dropout(0.3), nn.Linear(64, 64), nn.BatchNorm1d(64),
        nn.Linear(64, 1),
    )  # fmt: skip


OPTIMIZERS = {
    "released": lambda params: AXIOM(params, lr=1e-2, momentum=0.9, averaging=16),
    "self_driving": lambda params: CruxyOptimizer(params, mode="self_driving", state_bits=8),
    "torch": lambda params: torch.optim.AdamW(params, lr=1e-2),
}


def trainer(
    folder, name="released", workers=2, persistent=False, kill_at=None, own_generator=False
):
    """A trainer whose loss kills the process in the step after `kill_at`."""
    generator = torch.Generator().manual_seed(7) if own_generator else None
    loader = torch.utils.data.DataLoader(
        Noisy(),
        batch_size=4,
        shuffle=True,
        num_workers=workers,
        persistent_workers=persistent,
        generator=generator,
    )
    steps = [0]

    def loss_fn(model, batch):
        if model.training:
            steps[0] += 1
            if kill_at is not None and steps[0] == kill_at + 1:
                os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch
        return (model(x) - y).square().mean()

    val = torch.utils.data.DataLoader(Noisy(8), batch_size=4, shuffle=True)
    torch.manual_seed(11)
    np.random.seed(11)
    return Trainer(
        net(),
        loader,
        val,
        OPTIMIZERS[name],
        loss_fn,
        release=name == "released",
        eval_interval=4,
        checkpoint_interval=INTERVAL,
        checkpoint_dir=folder,
        results_prefix=f"{folder}/run",
        save_results=False,
        progress=False,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, name, workers, persistent, kill_at = sys.argv[1:]
    run = trainer(folder, name, int(workers), persistent == "True", int(kill_at))
    run.fit(STEPS, resume="latest")
