"""The views of a config's images: its presets for images of this size and colour, and in words."""

from __future__ import annotations

from dataclasses import replace

from selfkd.config import AUGMENTED_VIEWS, DataConfig
from selfkd.data.augmentation import Mixing, Operations, Views

FRESH = 2**31
"""Number of views that are never used up."""
PHOTOGRAPH = 64
"""Side in pixels from which a preset crops images rather than shifting them."""
CROP = 0.35
"""Smallest share of the area that a preset's crop keeps."""


def make_views(config: DataConfig, *, seed: int, channels: int, size: int) -> Views:
    """Return the views of a config.

    Args:
        config: Dataset, splits and augmentation.
        seed: Random seed of the views.
        channels: Channels of the images.
        size: Height and width of the images in pixels.

    >>> from selfkd.config import from_tree
    >>> config = from_tree({"data": {"augment": {"preset": "light"}}}).data
    >>> views = make_views(config, seed=0, channels=1, size=8)
    >>> views.flip, views.jitter, views.count
    (False, 1, 8)
    """
    own = config.augment
    crop, jitter, flip = config.crop, config.jitter, config.flip
    if own.preset != "none" and crop is None and not jitter:
        shift = min(max(1, size // 8), size - 1)  # none would leave small grey images as they are
        crop, jitter = (CROP, 0) if size >= PHOTOGRAPH else (None, shift)
    if own.flip is not None:
        flip = own.flip
    elif own.preset != "none":
        flip = flip or channels == 3
    operations = own.value("operations")
    mixing = Mixing(
        mixup=own.value("mixup"),
        cutmix=own.value("cutmix"),
        probability=own.value("mix_probability"),
    )
    views = Views(
        crop=crop,
        flip=flip,
        jitter=jitter,
        seed=seed,
        operations=(
            None
            if operations == "none"
            else Operations(operations, count=own.count, magnitude=own.magnitude)
        ),
        color=own.color,
        hue=own.hue,
        erase=own.value("erase"),
        mixing=mixing if own.mixes else None,
    )
    if views.is_identity:  # of which further views would be the same again
        return views
    count = FRESH if config.views == "fresh" else config.views
    return replace(views, count=count or AUGMENTED_VIEWS)


def describe_views(views: Views, *, repeats: int = 1) -> str:
    """Return in words how images are augmented.

    >>> describe_views(Views(flip=True, jitter=4, mixing=Mixing(mixup=0.2), count=8), repeats=2)
    'flip, shift of 4 pixels, mixup 0.2; 8 views of each image, 2 in a batch'
    """
    parts = [f"crop to {views.crop:g} of the area"] if views.crop not in (None, 1) else []
    parts += ["flip"] if views.flip else []
    parts += [f"shift of {views.jitter} {'pixel' if views.jitter == 1 else 'pixels'}"] * bool(
        views.jitter
    )
    if (own := views.operations) is not None:
        each = f" {own.count} x {own.magnitude}" if own.kind == "randaugment" else ""
        parts.append(f"{own.kind}{each}")
    parts += [f"{name} {getattr(views, name):g}" for name in ("color", "hue", "erase")
              if getattr(views, name)]  # fmt: skip
    if views.mixes and (mixing := views.mixing) is not None:
        named = [f"{name} {getattr(mixing, name):g}" for name in ("mixup", "cutmix")
                 if getattr(mixing, name)]  # fmt: skip
        share = f" of {mixing.probability:.0%}" if mixing.probability < 1 else ""
        parts.append(f"{' or '.join(named)}{share}")
    count = "views of each epoch's own"
    if views.count != FRESH:
        count = f"{views.count:,} {'view' if views.count == 1 else 'views'} of each image"
    return f"{', '.join(parts)}; {count}{f', {repeats} in a batch' if repeats > 1 else ''}"
