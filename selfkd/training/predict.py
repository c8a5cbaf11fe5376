"""`predict` and `evaluate`: loops over batches without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfkd.analysis import metrics
from selfkd.data import Data
from selfkd.data.augmentation import Views
from selfkd.distill.outputs import take_logits
from selfkd.distill.teacher import Teacher
from selfkd.training.ranks import ALONE, Ranks

Precision = Literal["none", "bfloat16", "float16"]
EVAL_BATCH = 1000  # images
EVAL_VALUES = 2**22  # most input values a batch, which bounds batches of large images


def autocast(device: str, precision: Precision) -> AbstractContextManager[Any]:
    """Return a context of mixed precision for a forward pass."""
    if precision == "none":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, precision))


def predict(
    model: nn.Module | Teacher,
    data: Data,
    split: Literal["train", "val", "test"],
    *,
    views: Views | None = None,
    view: int = 0,
    device: str = "cpu",
    workers: int = 0,
    precision: Precision = "none",
    rows: range | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Return the logits of a model for a split.

    The model predicts in eval mode and is then put back into its previous mode.

    Args:
        model: Network or teacher.
        data: Data set.
        split: Split to predict.
        views: Augmented views of the images.
        view: Number of the view.
        device: Device of the model.
        workers: Processes that decode streamed images.
        precision: Mixed precision of the forward pass.
        rows: Images of the split to predict; all when not given.
        channels_last: Whether images have their channels last in memory, as the model's weights.

    Returns:
        Logits `[images, classes]`, float32 on the CPU.
    """
    batches = predict_batches(
        model, data, split, views=views, view=view, device=device, workers=workers,
        precision=precision, rows=rows, channels_last=channels_last,
    )  # fmt: skip
    return torch.cat(list(batches))


@torch.no_grad()
def predict_batches(
    model: nn.Module | Teacher,
    data: Data,
    split: Literal["train", "val", "test"],
    *,
    views: Views | None = None,
    view: int = 0,
    device: str = "cpu",
    workers: int = 0,
    precision: Precision = "none",
    rows: range | None = None,
    channels_last: bool = False,
) -> Iterator[Tensor]:
    """Yield the logits of a model for a split batch by batch; arguments are those of `predict`."""
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    values = data.in_chans * getattr(data, split).image_size ** 2
    batches = data.batches(
        split,
        batch_size=min(EVAL_BATCH, max(1, EVAL_VALUES // values)),
        views=views,
        view=view,
        device=device,
        workers=workers,
        rows=rows,
        channels_last=channels_last,
    )
    for inputs, _, _ in batches:
        with autocast(device, precision):
            logits = take_logits(model(inputs), "model")
        yield logits.float().cpu()
    if isinstance(model, nn.Module):
        model.train(training)


def evaluate(
    model: nn.Module,
    data: Data,
    split: Literal["train", "val", "test"] = "val",
    *,
    device: str = "cpu",
    workers: int = 0,
    precision: Precision = "none",
    ranks: Ranks = ALONE,
    channels_last: bool = False,
) -> dict[str, float]:
    """Return `accuracy` (fraction) and `nll` (nats) of a model on a split.

    Args:
        model: Network to evaluate.
        data: Data set.
        split: Split to evaluate on.
        device: Device of the model.
        workers: Processes that decode streamed images.
        precision: Mixed precision of the forward pass.
        ranks: Processes that share the predictions; all of them must call this.
        channels_last: Whether images have their channels last in memory.
    """
    labels = getattr(data, split).labels.cpu()
    ranks = ranks if len(labels) >= ranks.size else ALONE
    logits = predict(
        model,
        data,
        split,
        device=device,
        workers=workers,
        precision=precision,
        rows=ranks.share(len(labels)) if ranks.size > 1 else None,
        channels_last=channels_last,
    )
    logits = ranks.gather(logits, len(labels), device=device)
    return {"accuracy": metrics.accuracy(logits, labels), "nll": metrics.nll(logits, labels)}
