"""Lightning with self-driving: it hands the loss over, and a callback does the rest.

`CruxyCallback` tells the optimizer how many steps the run has, so that the rate falls to 0 at its
end, and validates the average of the parameters.
"""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _spirals import spirals
from cruxy_torch import CruxyOptimizer
from cruxy_torch.integrations.lightning import CruxyCallback


class Classifier(pl.LightningModule):
    """Two hidden layers of 32."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.net = nn.Sequential(*layers, nn.Flatten(0))

    def loss(self, batch: list[Tensor]) -> Tensor:
        """The mean cross-entropy."""
        points, labels = batch
        return nn.functional.binary_cross_entropy_with_logits(self.net(points), labels)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The loss, which Lightning hands on to the optimizer."""
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor]) -> None:
        """Logs the loss."""
        self.log("unseen", self.loss(batch))

    def configure_optimizers(self) -> CruxyOptimizer:
        """No rate, no scheduler."""
        return CruxyOptimizer(self.parameters(), mode="self_driving")


def loader(seed: int, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of 64 points of the spirals."""
    points, labels = map(torch.from_numpy, spirals(seed=seed))
    return DataLoader(TensorDataset(points, labels), batch_size=64, shuffle=shuffle)


def main() -> None:
    """Trains, and prints how long the optimizer was told that the run is, and the loss."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=40,
        check_val_every_n_epoch=10,
        accelerator="cpu",
        callbacks=[CruxyCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, loader(0, shuffle=True), loader(1))
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, CruxyOptimizer)
    print(f"told by Lightning: {optimizer.total_steps} steps")
    print(f"rate at the end    {optimizer.telemetry()['learning_rate']:.1e}")
    print(f"unseen points, average  loss {trainer.callback_metrics['unseen']:.4f}")


if __name__ == "__main__":
    main()
