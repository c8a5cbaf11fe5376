"""Trained classifiers without their data: images of any kind become inputs as in evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.config import ModelConfig
from selfkd.data.batches import Split, batches
from selfkd.data.pictures import read_or_raise, read_picture, square
from selfkd.distill.teacher import Teacher
from selfkd.losses import Average
from selfkd.models import make_model
from selfkd.tasks.common import Averaged, open_checkpoint
from selfkd.tasks.images.features import feature_inputs
from selfkd.tasks.images.networks import NetworkFacts, parts_of, rebuild
from selfkd.tasks.images.specialists import Specialist, combine

MakeModel = Callable[[], nn.Module]


@dataclass(frozen=True)
class ImagePredictor:
    """A classifier, and what its inputs are made by; see `selfkd.tasks.task.Predictor`."""

    network: nn.Module
    facts: NetworkFacts

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(map(str, self.facts.classes))

    def inputs(self, items: Any, *, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        """Yield the inputs of images, scaled and normalised as those of the evaluation.

        Args:
            items: One image or several: files, Pillow images, NumPy arrays `[height, width]` or
                `[height, width, channels]`, or tensors `[channels, height, width]`; pixels are
                uint8, or floating and in [0, 1]. A tensor or an array may have a batch in front.
                Of arrays: rows of features; see `selfkd.tasks.images.features`.
            batch_size: Number of images in a batch.
            device: Device of the inputs.

        Raises:
            TypeError: An image of another type.
            ValueError: An image of other channels or pixels, or one that cannot be read.
        """
        size, mean, std = self.facts.image_size, self.facts.mean, self.facts.std
        if self.facts.features is not None:
            rows = feature_inputs(items, names=self.facts.features, mean=mean, std=std)
            yield from (part.to(device) for part in torch.split(rows, batch_size))
            return
        found = _listed(items)
        for start in range(0, len(found), batch_size):
            images = torch.stack(
                [_pixels(image, size, len(mean)) for image in found[start : start + batch_size]]
            )
            split = Split(images, torch.zeros(len(images), dtype=torch.int64))
            made = batches(split, mean=mean, std=std, batch_size=batch_size, device=device)
            yield from (inputs for inputs, _, _ in made)

    def example(self) -> Tensor:
        """Return inputs of one image, or of one row of features."""
        width, size = len(self.facts.mean), self.facts.image_size
        if self.facts.features is not None:
            return torch.zeros(1, width)
        return torch.zeros(1, width, size, size)


def load_classifier(checkpoint: str, make: MakeModel | None = None) -> ImagePredictor:
    """Return a classifier in eval mode.

    Args:
        checkpoint: Its file.
        make: Function that makes the network, where it is of none that is known by its name.

    Raises:
        ValueError: It is damaged, or its network cannot be made.
    """
    tensors, facts = open_checkpoint(checkpoint, NetworkFacts)
    if not facts.image_size or len(facts.mean) != len(facts.std) or not min(facts.std) > 0:
        raise ValueError(
            f"{checkpoint} must say the size and the normalisation of its images, got "
            f"image_size {facts.image_size}, mean {facts.mean}, std {facts.std}"
        )
    if facts.features is not None and len(facts.features) != len(facts.mean):
        raise ValueError(
            f"{checkpoint} must say the normalisation of its {len(facts.features)} features, got "
            f"{len(facts.mean)} means"
        )
    network = rebuild(checkpoint, tensors, facts, make or (lambda: _make(facts)))
    return ImagePredictor(network.eval(), facts)


def load_average(
    checkpoints: Sequence[str], *, average: Average, weights: Sequence[float] | None
) -> ImagePredictor:
    """Return the average of classifiers, as one network of the first one's inputs and classes.

    Args:
        checkpoints: File of each, or the JSON file of a generalist with its specialists.
        average: What is averaged.
        weights: Weight of each; all alike when not given.

    Raises:
        ValueError: One is damaged, of other classes, or its network cannot be made.
    """
    parts = [parts_of(checkpoint) for checkpoint in checkpoints]
    loaded = [[load_classifier(part) for part in each] for each in parts]
    facts = loaded[0][0].facts
    for other in (one.facts for each in loaded for one in each):
        if sorted(map(str, other.classes)) != sorted(map(str, facts.classes)):
            raise ValueError(f"{checkpoints[0]} must have the classes of all others of its average")
    members = [_Member(facts, each) for each in loaded]
    return ImagePredictor(Averaged(members, average, weights).eval(), facts)


class _Member(nn.Module):
    """A classifier on inputs and classes of another, perhaps with its specialists."""

    def __init__(self, to: NetworkFacts, parts: Sequence[ImagePredictor]) -> None:
        super().__init__()
        first, *others = parts
        self.teacher = Teacher(
            first.network,
            input_stats=(to.mean, to.std),
            trained_stats=(first.facts.mean, first.facts.std),
            columns=[first.facts.classes.index(name) for name in to.classes],
        )
        self.network = self.teacher.module
        self.specialists = nn.ModuleList(
            Specialist(part.network, part.facts.specialist) for part in others
        )
        self._facts = [part.facts for part in others]

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.teacher(inputs)
        found = []
        for specialist, facts in zip(self.specialists, self._facts, strict=True):
            own = specialist(inputs)
            own[:, -1] += facts.dustbin_shift
            found.append((facts.specialist, own))
        return combine(logits, found) if found else logits


def _make(facts: NetworkFacts) -> nn.Module:
    model = ModelConfig(**facts.model)
    return make_model(
        model.name,
        model.args,
        num_classes=len(facts.classes),
        in_chans=len(facts.mean),
        image_size=facts.image_size,
    )


# --- images ---


def _listed(items: Any) -> Sequence[Any]:
    """Return one image or several as a sequence."""
    if isinstance(items, Tensor | np.ndarray):
        # of an array without a batch the channels are last, or there are none
        single = items.ndim == 2 or (items.ndim == 3 and _has_channels(items))
        return [items] if single else list(items)
    if isinstance(items, str | os.PathLike) or hasattr(items, "convert"):
        return [items]
    return list(items) if isinstance(items, Iterable) else [items]


def _has_channels(image: Any) -> bool:
    return isinstance(image, Tensor) or image.shape[-1] in (1, 3) or _has_alpha(image)


def _has_alpha(image: Any) -> bool:
    return image.ndim >= 3 and image.shape[-1] in (2, 4)


def _pixels(image: Any, size: int, channels: int) -> Tensor:
    """Return an image as pixels of 0 to 255, `[channels, size, size]`."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and _has_alpha(image):
        from PIL import Image

        image = Image.fromarray(image)
    if isinstance(image, str | os.PathLike) or hasattr(image, "convert"):
        where = str(image) if isinstance(image, str | os.PathLike) else "an image of Pillow's"
        image = read_or_raise(partial(read_picture, image), where)
        pixels = np.array(square(image.convert("L" if channels == 1 else "RGB"), size))
        return _channels_first(pixels)
    if isinstance(image, np.ndarray):
        image = _channels_first(image)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"images must be files, Pillow images, arrays or tensors, got {type(image).__name__}"
        )
    return _scaled(_checked(image, channels), size)


def _channels_first(pixels: np.ndarray[Any, Any]) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def _checked(image: Tensor, channels: int) -> Tensor:
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or len(image) not in (1, channels) or not image.numel():
        raise ValueError(
            f"images must be [{channels}, height, width], got a tensor {list(image.shape)}"
        )
    if image.is_floating_point():
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError(
                "floating images must be pixels in [0, 1], which are normalised here, got "
                f"{image.min():.4g} to {image.max():.4g}: inputs that are normalised already go to "
                "`.model`"
            )
        image = image.float() * 255
    elif image.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, or floating in [0, 1], got {image.dtype}")
    return image.expand(channels, *image.shape[1:])


def _scaled(image: Tensor, size: int) -> Tensor:
    """Scale the shorter side to `size` pixels and cut the centre out, as `square` does."""
    height, width = image.shape[1:]
    if width <= height:
        new = int(size * height / width), size
    else:
        new = size, int(size * width / height)
    if (height, width) != new:
        image = F.interpolate(image[None], new, mode="bilinear", antialias=True)[0]
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return image[:, top : top + size, left : left + size]
