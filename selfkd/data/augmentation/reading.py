"""Views of the batches of an epoch, with the labels that they then have."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .views import Views

BLOCK = 2**16
"""Most values of the images that are augmented together, where they are in memory."""


def read_views(
    read: Callable[[Sequence[Tensor]], Iterable[Tensor]],
    chunks: Sequence[Tensor],
    labels: Tensor,
    views: Views,
    view: int,
    *,
    repeated: Sequence[Tensor] | None = None,
    classes: int | None = None,
    device: torch.device,
    values: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the views of the images of batches, and their labels.

    A view is a pure function of an image, so that those in memory are augmented several batches
    at a time: small batches take a tenth of the time, and all bits are the same.

    Args:
        read: Function from lists of indices to the images of each, uint8
            `[images, channels, height, width]`.
        chunks: Indices of the images of each batch, on the CPU.
        labels: Labels of the whole split.
        views: Augmentation.
        view: Number of the view of each image.
        repeated: Number of the view of each image of each batch, where they differ.
        classes: Number of classes, needed for images that are mixed.
        device: Device of the views.
        values: Values of an image, where several batches may be read together.

    Returns:
        Iterator over (images, labels), on `device`: the views, and class indices `[batch]` or, of
        images that are mixed, probabilities float32 `[batch, classes]`.

    Raises:
        ValueError: Images that are mixed, without `classes`.
    """
    if views.mixes and classes is None:
        raise ValueError("classes must be given for images that are mixed, got None")
    sizes = [len(chunk) for chunk in chunks]
    groups = _groups(sizes, values)
    blocks = [torch.cat(list(chunks[group.start : group.stop])) for group in groups]
    numbers: list[int | Tensor] = [view] * len(blocks)
    if repeated is not None:
        numbers = [torch.cat(list(repeated[group.start : group.stop])) for group in groups]
    partners = None
    if views.mixes:
        pairs = zip(blocks, numbers, strict=True)
        partners = [views.partners(index, number, len(labels)) for index, number in pairs]
    wanted = blocks
    if partners is not None:
        wanted = [torch.cat(pair) for pair in zip(blocks, partners, strict=True)]
    for place, raw in enumerate(read(wanted)):
        index, number, group = blocks[place], numbers[place], groups[place]
        raw = raw.to(device, non_blocking=True)
        count = len(index)
        found = views(raw[:count], index, number)
        own = _picked(labels, index, device)
        if partners is not None and classes is not None:
            other = partners[place]
            others = views(raw[count:], other, number)
            theirs = _picked(labels, other, device)
            found, own = views.mixed(found, others, own, theirs, index, number, classes=classes)
        parts = sizes[group.start : group.stop]
        yield from zip(torch.split(found, parts), torch.split(own, parts), strict=True)


def _picked(labels: Tensor, index: Tensor, device: torch.device) -> Tensor:
    at = index.to(labels.device, non_blocking=True)
    return labels.index_select(0, at).to(device, non_blocking=True)


def _groups(sizes: Sequence[int], values: int | None) -> list[range]:
    """Return ranges of batches that are augmented together.

    >>> _groups([20, 20, 20, 5], 2**10)
    [range(0, 3), range(3, 4)]
    """
    groups, start, together = list[range](), 0, 0
    for number, size in enumerate(sizes):
        if number > start and (values is None or (together + size) * values > BLOCK):
            groups.append(range(start, number))
            start, together = number, 0
        together += size
    return [*groups, range(start, len(sizes))] if sizes else []
