"""`predict_batches` and `evaluate`: loops over batches without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

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
_Found = TypeVar("_Found")


def autocast(device: str, precision: Precision) -> AbstractContextManager[Any]:
    """Return a context of mixed precision for a forward pass."""
    if precision == "none":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, precision))


def halving(
    items: range, size: int, run: Callable[[range, int], Iterator[tuple[int, _Found]]]
) -> Iterator[_Found]:
    """Yield what is found of items in batches; go on in half of them where a GPU has no memory.

    A GPU that has the memory to train by small batches may not have that to predict by large ones.

    Args:
        items: Items, without gaps.
        size: Items a batch.
        run: Function from the items that are left and the size of their batches to batches: the
            number of items of each, and what is found of them.

    Raises:
        torch.OutOfMemoryError: The memory does not do for one item.

    >>> list(halving(range(5), 2, lambda left, size: ((1, n) for n in left)))
    [0, 1, 2, 3, 4]
    """
    start = items.start
    while True:
        try:
            for count, found in run(range(start, items.stop), size):
                yield found
                start += count
            return
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        torch.cuda.empty_cache()  # in blocks of the larger batches


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
    """Yield the logits of a model for a split, batch by batch.

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
        Iterator over logits `[batch, classes]`, float32 on the CPU.
    """
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    images, values = getattr(data, split), data.in_chans * getattr(data, split).image_size ** 2

    def run(left: range, size: int) -> Iterator[tuple[int, Tensor]]:
        batches = data.batches(
            split,
            batch_size=size,
            views=views,
            view=view,
            device=device,
            workers=workers,
            rows=left,
            channels_last=channels_last,
        )
        for inputs, _, _ in batches:
            with autocast(device, precision):
                logits = take_logits(model(inputs), "model")
            yield len(inputs), logits.float().cpu()

    items = range(len(images)) if rows is None else rows
    yield from halving(items, min(EVAL_BATCH, max(1, EVAL_VALUES // values)), run)
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
    batches = predict_batches(
        model,
        data,
        split,
        device=device,
        workers=workers,
        precision=precision,
        rows=ranks.share(len(labels)) if ranks.size > 1 else None,
        channels_last=channels_last,
    )
    logits = ranks.gather(torch.cat(list(batches)), len(labels), device=device)
    return {"accuracy": metrics.accuracy(logits, labels), "nll": metrics.nll(logits, labels)}
