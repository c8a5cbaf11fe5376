"""Splits of a data set and iteration over their batches, in memory or streamed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from selfkd.data.augmentation import Views
from selfkd.data.augmentation.reading import read_views

from .loader import read_stream
from .normalise import KEPT_VALUES, kept_inputs, normalisation
from .stream import Stream

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels. The index of an image is its position, from 0 to N-1."""

    images: Tensor | Stream
    """Images in memory, uint8 `[N, channels, height, width]`, or a stream that decodes them; or
    features, floating point `[N, F]`."""
    labels: Tensor
    """Class indices, int64 `[N]`."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels; 1 of features."""
        if not isinstance(self.images, Tensor):
            return self.images.image_size
        return self.images.shape[-1] if self.images.ndim == 4 else 1

    @property
    def index(self) -> Tensor:
        """Indices 0, 1, …, N-1 of the images, int64 `[N]`."""
        return torch.arange(len(self))

    def take(self, index: Tensor) -> "Split":
        """Return a split of the images at `index` alone, in that order."""
        images = self.images
        selected = images[index] if isinstance(images, Tensor) else images.take(index)
        return Split(selected, self.labels[index])

    def to(self, device: torch.device | str) -> "Split":
        """Return the split with its tensors on `device`; streamed images are not affected."""
        images = self.images
        moved = images.to(device) if isinstance(images, Tensor) else images
        return Split(moved, self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in three disjoint splits, with its classes, image size and normalisation."""

    name: str
    """Name of the data set."""
    train: Split
    """Training split."""
    val: Split
    """Validation split, for selection and early stopping."""
    test: Split
    """Test split."""
    class_names: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    image_size: int
    """Height and width of the training images in pixels."""
    mean: tuple[float, ...]
    """Mean of each channel, of pixels in [0, 1]; inputs are (pixel - mean) / std."""
    std: tuple[float, ...]
    """Standard deviation of each channel, of pixels in [0, 1]."""
    fingerprint: str
    """Hash of the training split and its normalisation, 16 hexadecimal digits."""
    note: str = ""
    """What was read of folders, at which size, and what was left out, where that is to be said."""
    features: tuple[str, ...] | None = None
    """Names of the features, where the items are vectors of them: each is a channel of one pixel,
    whose mean and std are those of its own values."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def test_size(self) -> int:
        """Height and width of the images of validation and test in pixels."""
        return self.val.image_size

    @property
    def in_chans(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)

    def to(self, device: torch.device | str) -> "Data":
        """Return the data with its tensors on `device`, so that batches are made there."""
        train, val, test = (split.to(device) for split in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test)

    def batches(
        self,
        split: Literal["train", "val", "test"],
        *,
        batch_size: int,
        generator: torch.Generator | None = None,
        views: Views | None = None,
        view: int = 0,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        workers: int = 0,
        rows: range | None = None,
        share: Callable[[int], range] | None = None,
        smallest: int = 1,
        repeats: int = 1,
        channels_last: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over the batches of a split given by name, as `selfkd.data.batches` does."""
        if split not in ("train", "val", "test"):
            raise ValueError(f"split must be train, val or test, got {split!r}")
        return batches(
            getattr(self, split),
            mean=self.mean,
            std=self.std,
            batch_size=batch_size,
            generator=generator,
            views=views,
            view=view,
            device=device,
            drop_last=drop_last,
            workers=workers,
            rows=rows,
            share=share,
            smallest=smallest,
            repeats=repeats,
            classes=self.num_classes,
            channels_last=channels_last,
        )


def batches(
    split: Split,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    generator: torch.Generator | None = None,
    views: Views | None = None,
    view: int = 0,
    device: torch.device | str = "cpu",
    drop_last: bool = False,
    workers: int = 0,
    rows: range | None = None,
    share: Callable[[int], range] | None = None,
    smallest: int = 1,
    repeats: int = 1,
    classes: int | None = None,
    channels_last: bool = False,
) -> Iterator[Batch]:
    """Iterate once over a split, or over some of its images.

    The only random numbers are those of the order, drawn from `generator` at the call.

    Args:
        split: Images and labels to read.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel, of pixels in [0, 1].
        batch_size: Number of images in a batch; the last batch may have fewer, or more by
            `smallest`.
        generator: Random generator of the order; without one the order is 0, 1, …, N-1.
        views: Augmentation, applied to whole batches on `device`.
        view: Number of the view of each image, in [0, views.count).
        device: Device of the inputs and labels.
        drop_last: Whether to leave out a last batch that is not full.
        workers: Number of processes that decode streamed images; not used for images in memory.
        rows: Indices of the images to read; all if not given.
        share: Function from the size of a batch to the positions in it that this process reads,
            where several processes share each batch; a process without any reads the first image.
        smallest: Number of images that a last batch has at least; one of fewer is merged into the
            batch before.
        repeats: Number of views of an image that follow each other, the first of them `view`: as
            many inputs as without, of a part of the images.
        classes: Number of classes, needed where views mix images.
        channels_last: Whether images have their channels last in memory.

    Returns:
        Iterator over (inputs, labels, index): normalised float32 `[batch, channels, height,
        width]` and int64 `[batch]` on `device`, and each image's index int64 `[batch]` on the
        CPU, where it can pick rows of a tensor on any device. Labels of views that mix images are
        probabilities, float32 `[batch, classes]`.

    Raises:
        ValueError: A batch size below 1, or a view out of range.

    Example:
        >>> images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1) * 51
        >>> split = Split(images, torch.tensor([5, 6, 7]))
        >>> for inputs, labels, index in batches(split, mean=[0.0], std=[0.5], batch_size=2):
        ...     print(inputs.flatten(), labels, index)
        tensor([0.0000, 0.4000]) tensor([5, 6]) tensor([0, 1])
        tensor([0.8000]) tensor([7]) tensor([2])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if views is not None and not 0 <= view < views.count:
        raise ValueError(f"view must be in [0, {views.count}), got {view}")
    order = split.index if rows is None else torch.arange(rows.start, rows.stop, rows.step)
    if generator is not None:
        shuffle = torch.randperm(len(order), generator=generator, device=generator.device)
        order = order[shuffle.cpu()]
    if repeats > 1:
        order = order[torch.arange(len(order)) // repeats]
    if drop_last:
        order = order[: len(order) - len(order) % batch_size]
    return read_batches(
        split,
        order,
        batch_sizes(len(order), batch_size, smallest),
        mean=mean,
        std=std,
        views=views,
        view=view,
        device=device,
        workers=workers,
        share=share,
        repeats=repeats,
        classes=classes,
        channels_last=channels_last,
    )


def read_batches(
    split: Split,
    order: Tensor,
    sizes: list[int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    views: Views | None = None,
    view: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
    share: Callable[[int], range] | None = None,
    repeats: int = 1,
    classes: int | None = None,
    channels_last: bool = False,
) -> Iterator[Batch]:
    """Iterate over images of a split in a given order, in batches of given sizes.

    Args:
        split: Images and labels to read.
        order: Indices of the images, int64, as many as the sizes together.
        sizes: Number of images in each batch.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel, of pixels in [0, 1].
        views: Augmentation, applied to whole batches on `device`.
        view: Number of the view of each image.
        device: Device of the inputs and labels.
        workers: Number of processes that decode streamed images.
        share: Function from the size of a batch to the positions in it that this process reads.
        repeats: Number of views of an image that follow each other in the order.
        classes: Number of classes, needed where views mix images.
        channels_last: Whether images have their channels last in memory.

    Returns:
        Iterator over (inputs, labels, index), as of `batches`.
    """
    images, device = split.images, torch.device(device)
    chunks = _chunks(order, sizes, share)
    plain = views is None or views.is_identity
    read: Callable[[Sequence[Tensor]], Iterable[Tensor]]
    if isinstance(images, Tensor):
        plain, values = plain or images.ndim == 2, images[0].numel() if len(images) else 1
        read = partial(_gathered, images)
    else:
        values = None  # of several batches at a time, the first would wait for all
        read = partial(read_stream, images, workers=workers, device=device)
    if plain or views is None:
        if isinstance(images, Tensor) and images.numel() <= KEPT_VALUES and images.device == device:
            inputs = kept_inputs(split, images, mean, std, channels_last=channels_last)
            return _taken(inputs, split.labels.to(device), chunks)
        parts = _plain(read(chunks), chunks, split.labels, device)
    else:
        parts = read_views(
            read,
            chunks,
            split.labels,
            views,
            view,
            repeated=_repeated(views, view, len(order), sizes, share, repeats),
            classes=classes,
            device=device,
            values=values,
        )
    normalise = normalisation(mean, std, device, channels_last=channels_last)
    return ((normalise(raw), own, i) for (raw, own), i in zip(parts, chunks, strict=True))


def _repeated(
    views: Views,
    view: int,
    images: int,
    sizes: list[int],
    share: Callable[[int], range] | None,
    repeats: int,
) -> list[Tensor] | None:
    """Return the view of each image of each batch, where an image has several."""
    found = views.repeated(view, torch.arange(images), repeats)
    return _chunks(found, sizes, share) if isinstance(found, Tensor) else None


def batch_sizes(images: int, batch_size: int, smallest: int = 1) -> list[int]:
    """Return the number of images in each batch of an epoch.

    Args:
        images: Number of images.
        batch_size: Number of images in a batch.
        smallest: Number of images that a last batch has at least; one of fewer is merged into the
            batch before.

    Example:
        >>> batch_sizes(7, 3), batch_sizes(7, 3, smallest=2), batch_sizes(8, 3, smallest=2)
        ([3, 3, 1], [3, 4], [3, 3, 2])
    """
    whole, rest = divmod(images, batch_size)
    sizes = [batch_size] * whole + [rest] * (rest > 0)
    if whole and 0 < rest < smallest:
        sizes[-2:] = [batch_size + rest]
    return sizes


def _chunks(order: Tensor, sizes: list[int], share: Callable[[int], range] | None) -> list[Tensor]:
    chunks = list(torch.split(order, sizes)) if sizes else []
    if share is None:
        return chunks
    parts = [share(len(chunk)) for chunk in chunks]
    return [
        chunk[part.start : part.stop] if part else chunk[:1]
        for chunk, part in zip(chunks, parts, strict=True)
    ]


def _places(chunks: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Return the positions of batches on a device, sent to a GPU at once."""
    if device.type == "cpu" or not chunks:
        return chunks
    return torch.split(torch.cat(list(chunks)).to(device), [len(own) for own in chunks])


def _rows(images: Tensor, place: Tensor) -> Tensor:
    """Return images by their position; those that have channels last keep them there."""
    if images.ndim != 4 or images.is_contiguous():
        return images.index_select(0, place)
    return images.permute(0, 2, 3, 1).index_select(0, place).permute(0, 3, 1, 2)


def _gathered(images: Tensor, chunks: Sequence[Tensor]) -> Iterable[Tensor]:
    return (_rows(images, place) for place in _places(chunks, images.device))


def _taken(inputs: Tensor, labels: Tensor, chunks: Sequence[Tensor]) -> Iterator[Batch]:
    """Yield batches of inputs that are kept, on their device."""
    for place, index in zip(_places(chunks, inputs.device), chunks, strict=True):
        yield _rows(inputs, place), labels.index_select(0, place), index


def _plain(
    raw: Iterable[Tensor], chunks: Sequence[Tensor], labels: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images of batches as they are, and their labels, on the device."""
    for images, own in zip(raw, _gathered(labels, chunks), strict=True):
        yield images.to(device, non_blocking=True), own.to(device, non_blocking=True)
