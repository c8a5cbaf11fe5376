"""Born-again generations of an unmodified LightningModule, on scikit-learn's digits.

    pip install 'selfkd[lightning]'
    python examples/lightning_callback.py --rounds 2

`Classifier` knows of labels only; `DistillationCallback` puts the distiller's loss in the place of
its own.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from selfkd import Distiller, Teacher, make_model
from selfkd.data import load_data
from selfkd.integrations.lightning import DistillationCallback

EPOCHS, BATCH_SIZE = 12, 32

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")


class Classifier(LightningModule):
    """A module such as anyone has."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model("selfkd_cnn", num_classes=10, in_chans=1, image_size=8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        self.log("accuracy", (self(inputs).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def make_loaders() -> tuple[DataLoader, DataLoader]:
    """Return batches to train on and to validate by."""
    data = load_data("digits")
    train, val = (
        TensorDataset(*next(data.batches(split, batch_size=len(getattr(data, split))))[:2])
        for split in ("train", "val")
    )
    order = torch.Generator().manual_seed(0)
    return (
        DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=order),
        DataLoader(val, 400),
    )


def make_trainer(distiller: Distiller) -> Trainer:
    """Return a trainer that distils and says nothing."""
    return Trainer(
        max_epochs=EPOCHS,
        callbacks=[DistillationCallback(distiller)],
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        limit_val_batches=1,
        check_val_every_n_epoch=EPOCHS,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    """Train generation 0 on labels, then each generation on the one before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="generations after generation 0")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)  # the network is too small for more
    train_loader, val_loader = make_loaders()
    distiller = Distiller()  # generation 0: labels only
    for generation in range(rounds + 1):
        torch.manual_seed(generation)
        begun = time.perf_counter()
        model, trainer = Classifier(), make_trainer(distiller)
        trainer.fit(model, train_loader, val_loader)
        accuracy, loss = (
            float(trainer.callback_metrics[name]) for name in ("accuracy", "distill/loss")
        )
        seconds = time.perf_counter() - begun
        print(f"generation {generation}: val {accuracy:.2%}, loss {loss:.3f}, {seconds:.1f} s")
        distiller = Distiller(Teacher(model), temperature=4.0, alpha=0.7)


if __name__ == "__main__":
    main()
