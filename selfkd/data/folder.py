"""Loading of image files in folders: root/train/<class>/<image>, root/val/…, root/test/…"""

from pathlib import Path

import torch

from .batches import Split
from .sources import Source
from .stream import Files, Pictures, Stream

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
LARGEST_DEFAULT = 64
"""Largest image size in pixels that is chosen if none is given."""


def open_folder(root: Path, image_size: int | None) -> Source:
    """Open a folder of images as a source; without a test folder, val is the test split."""
    if not (root / "train").is_dir():
        raise FileNotFoundError(
            f"data.root must hold train/<class>/<image>, got {root}, which has no folder 'train'"
        )
    held_out = [part for part in ("val", "test") if (root / part).is_dir()]
    if not held_out:
        raise FileNotFoundError(
            f"data.root must hold a folder 'test' or 'val' beside 'train', got {root}"
        )
    class_names = _class_names(root / "train")
    parts = {part: _list_images(root, part, class_names) for part in ("train", *held_out)}
    size = image_size or default_size(parts["train"][0])
    splits = {
        part: Split(Stream(files, torch.arange(len(files)), size, "RGB"), torch.tensor(labels))
        for part, (files, labels) in parts.items()
    }
    val = splits.get("val") if "test" in splits else None
    pool = splits["train"]
    return Source(
        pool,
        class_names,
        val_size=default_val_size(len(pool), len(class_names)) if val is None else len(val),
        test=splits.get("test", splits.get("val")),
        val=val,
    )


def default_size(pictures: Pictures) -> int:
    """Default image size: the shorter side of the first picture, at most 64 pixels."""
    return min(LARGEST_DEFAULT, *pictures[0].size)


def default_val_size(images: int, classes: int) -> int:
    """Default size of the validation split: a tenth of the images, at least one for each class."""
    return max(classes, images // 10)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not names:
        raise ValueError(f"data.root must hold train/<class>/<image>, got no class in {folder}")
    return tuple(names)


def _list_images(root: Path, part: str, class_names: tuple[str, ...]) -> tuple[Files, list[int]]:
    """List the image files of a part in the order of their paths, and their labels."""
    unknown = sorted(set(_class_names(root / part)) - set(class_names))
    if unknown:
        raise ValueError(
            f"every class must have a training image, got none of {unknown[0]!r}, which is in "
            f"{root / part}"
        )
    paths, labels = [], []
    for label, name in enumerate(class_names):
        for path in sorted((root / part / name).rglob("*")):
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                paths.append(path.relative_to(root).as_posix())
                labels.append(label)
    if not paths:
        raise ValueError(f"data.root must hold images, got none in {root / part}")
    return Files(root, paths), labels
