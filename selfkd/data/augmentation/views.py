"""Views of images: a recipe of augmentation and how many views there are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .draws import OPERATION
from .erasing import erased
from .mixing import Mixing, blended, mixed_labels
from .numbers import random_bits
from .operations import Operations, jittered
from .spatial import cropped, flipped, shifted


@dataclass(frozen=True)
class Views:
    """Augmentation recipe with a number of views of each image; calling it makes a view of a batch.

    Images are cropped first, then flipped, shifted, changed by `operations` and in colour, and
    erased in part; then, by `mixed`, mixed with views of others. For uint8 images all arithmetic on
    pixels is in integers, so that a view has the same bits on every device.

    Example:
        >>> views = Views(flip=True, jitter=2, seed=0, count=4)
        >>> images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
        >>> batch = views(images, torch.arange(8), view=3)
        >>> alone = views(images[5:6], torch.tensor([5]), view=3)
        >>> torch.equal(batch[5:6], alone)
        True
    """

    crop: float | None = None
    """Smallest share of the area kept by a random resized crop, in (0, 1]; None for no crop."""
    flip: bool = False
    """Whether half of the images are flipped left to right."""
    jitter: int = 0
    """Largest shift in x and in y, in pixels, filled with 0 (the same as pad and crop)."""
    seed: int = 0
    """Random seed of all views."""
    count: int = 1
    """Number of different views V of an image; epoch e uses view e mod V."""
    operations: Operations | None = None
    """RandAugment or TrivialAugment, of uint8 images."""
    color: float = 0.0
    """Largest change of brightness, contrast and saturation, in [0, 1]: factors of 1 - color to
    1 + color."""
    hue: float = 0.0
    """Largest turn of the hue, as a share of the circle, in [0, 0.5]."""
    erase: float = 0.0
    """Probability that a box of an image is filled with zeros, in [0, 1]."""
    mixing: Mixing | None = None
    """Mixup and cutmix; calling `mixed` mixes views."""

    def __post_init__(self) -> None:
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"crop must be in (0, 1], got {self.crop}")
        if self.jitter < 0:
            raise ValueError(f"jitter must be at least 0, got {self.jitter}")
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        for name, most in (("color", 1), ("hue", 0.5), ("erase", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be in [0, {most}], got {getattr(self, name)}")

    @property
    def is_identity(self) -> bool:
        """Whether every view of an image is the image itself."""
        plain = not self.flip and self.jitter == 0 and self.crop in (None, 1)
        return plain and not self._further and not self.mixes

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others, so that labels are probabilities."""
        return self.mixing is not None and not self.mixing.is_identity

    @property
    def _further(self) -> dict[str, Any]:
        """What is on of the augmentations of uint8 images alone."""
        values = {"operations": self.operations and self.operations.recipe}
        values |= {name: getattr(self, name) for name in ("color", "hue", "erase")}
        return {name: value for name, value in values.items() if value}

    @property
    def recipe(self) -> dict[str, Any]:
        """JSON-serialisable recipe that determines the views, for the keys of cached logits.

        `count` is left out: raising it keeps the existing views. So are augmentations that are off.
        """
        seed = 0 if self.is_identity else self.seed
        crop = None if self.crop == 1 else self.crop
        known = {"crop": crop, "flip": self.flip, "jitter": self.jitter, "seed": seed, "version": 1}
        mixing = {} if self.mixing is None or not self.mixes else {"mixing": self.mixing.recipe}
        return known | self._further | mixing

    def at(self, epoch: int, repeats: int = 1) -> int:
        """View that an epoch uses: 0 if every view is the image itself, else e r mod V.

        Args:
            epoch: Number e of the epoch, from 0.
            repeats: Number r of views of an image in one epoch; this is the first of them.

        Example:
            >>> [Views(flip=True, count=3).at(epoch) for epoch in range(5)]
            [0, 1, 2, 0, 1]
        """
        return 0 if self.is_identity else epoch * repeats % self.count

    def repeated(self, view: int, places: Tensor, repeats: int) -> int | Tensor:
        """View of each place in the order of an epoch where an image has `repeats` of them.

        Of one view an image it is that number itself.

        Args:
            view: First view of the epoch.
            places: Places in the order of the epoch, or in a batch whose size is a multiple of
                `repeats`, int64.
            repeats: Number of views of each image, which follow each other.

        Example:
            >>> Views(flip=True, count=3).repeated(2, torch.arange(4), 2)
            tensor([2, 0, 2, 0])
        """
        return view if repeats == 1 else (view + places % repeats) % self.count

    def __call__(self, images: Tensor, index: Tensor, view: int | Tensor) -> Tensor:
        """Make one view of each image, which is not mixed with another yet.

        Args:
            images: Images `[batch, channels, height, width]`, uint8 or floating point.
            index: Index of each image in its split, int64 `[batch]`.
            view: Number of the view, in [0, count); or one for each image, int64 `[batch]`.

        Returns:
            Augmented images of the same shape, dtype and device. The input is never changed.

        Raises:
            ValueError: A view outside [0, count), an index of another shape, or a jitter not below
                the images' size.
            TypeError: Images that are neither uint8 nor floating point, or floating point where
                the augmentation is of uint8.
        """
        if isinstance(view, int) and not 0 <= view < self.count:
            raise ValueError(f"view must be in [0, {self.count}), got {view}")
        if not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
        if index.shape != images.shape[:1]:
            raise ValueError(f"index must be of shape [{len(images)}], got {list(index.shape)}")
        if self.is_identity:
            return images
        further = self._further
        if (further or self.mixes) and images.dtype != torch.uint8:
            names = ", ".join([*further, *(["mixing"] if self.mixes else [])])
            raise TypeError(f"images must be uint8 for {names}, got {images.dtype}")
        bits = self._bits(index.to(images.device, non_blocking=True), view)
        if self.crop is not None:
            images = cropped(images, bits, self.crop)
        if self.flip:
            images = flipped(images, bits)
        if self.jitter:
            images = shifted(images, bits, self.jitter)
        if self.operations is not None:
            images = self.operations(images, bits)
        if self.color or self.hue:
            images = jittered(images, bits, color=self.color, hue=self.hue)
        if self.erase:
            images = erased(images, bits, self.erase)
        return images

    def _bits(self, index: Tensor, view: int | Tensor) -> Tensor:
        draws = OPERATION if self.operations is None else self.operations.draws
        return random_bits(self.seed, index, view, draws)

    def partners(self, index: Tensor, view: int | Tensor, images: int) -> Tensor:
        """Return the index of the image that each is mixed with, int64 `[batch]`.

        Args:
            index: Index of each image in its split, int64 `[batch]`.
            view: Number of the view, or one for each image.
            images: Number of images of the split.
        """
        return self._mixing.partners(self._bits(index, view), images)

    def are_whole(self, index: Tensor, view: int, size: tuple[int, int]) -> Tensor:
        """Return whether each image is mixed with no other, bool `[batch]`.

        Args:
            index: Index of each image in its split, int64 `[batch]`.
            view: Number of the view.
            size: Height and width of the images in pixels.
        """
        if not self.mixes:
            return torch.ones(len(index), dtype=torch.bool, device=index.device)
        return self._mixing.label_weights(self._bits(index, view), *size) == 1

    def mixed(
        self,
        images: Tensor,
        others: Tensor,
        labels: Tensor,
        other_labels: Tensor,
        index: Tensor,
        view: int | Tensor,
        *,
        classes: int,
    ) -> tuple[Tensor, Tensor]:
        """Mix views of images with the same views of their partners.

        Args:
            images: Views of the images, uint8 `[batch, channels, height, width]`.
            others: Views of their partners.
            labels: Class indices of the images, int64 `[batch]`.
            other_labels: Those of their partners.
            index: Index of each image in its split, int64 `[batch]`.
            view: Number of the view, or one for each image.
            classes: Number of classes.

        Returns:
            Mixed images, uint8, and their labels: probabilities, float32 `[batch, classes]`.

        Example:
            >>> views = Views(mixing=Mixing(mixup=1.0))
            >>> images = torch.full((2, 1, 4, 4), 200, dtype=torch.uint8)
            >>> labels, index = torch.tensor([0, 1]), torch.arange(2)
            >>> found = views.mixed(images, images * 0, labels, 1 - labels, index, 0, classes=2)
            >>> found[0][:, 0, 0, 0].tolist(), found[1][:, 0].tolist()
            ([169, 16], [0.84375, 0.91796875])
        """
        bits = self._bits(index.to(images.device, non_blocking=True), view)
        pixels, weight = self._mixing.weights(bits, *images.shape[2:])
        found = mixed_labels(labels, other_labels, weight.to(labels.device), classes)
        return blended(images, others, pixels), found

    @property
    def _mixing(self) -> Mixing:
        if self.mixing is None:
            raise ValueError("mixing must be given for images that are mixed, got None")
        return self.mixing
