"""Soft targets on disk: a teacher answers each view of each image once, all trials read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfkd.checkpoint import load_tensors, save_tensors


def data_key(fingerprint: str, recipe: Mapping[str, Any]) -> str:
    """Return the key of what was labelled: the images and the recipe of their views.

    >>> data_key("abc", {"jitter": 2}) == data_key("abc", {"jitter": 3})
    False
    """
    text = json.dumps([fingerprint, dict(recipe)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def target_path(root: Path, *, teacher: str, data: str, view: int) -> Path:
    """Return where a teacher's answers to one view lie."""
    return root / teacher / data / f"view_{view:03d}.safetensors"


def save_targets(root: Path, logits: Tensor, *, teacher: str, data: str, view: int) -> Path:
    """Store a teacher's answers to one view of all training images.

    Half precision is enough: the softmax does not change when a row is shifted, so each row is
    shifted to a largest logit of 0, near which half precision is finest.

    Args:
        root: folder of all soft targets.
        logits: `[images, classes]`, row i for image i.
        teacher: hash of the teacher's weights.
        data: `data_key` of images and views.
        view: number of the view.

    Raises:
        ValueError: a logit is not finite.
    """
    if not bool(torch.isfinite(logits).all()):
        row, column = (~torch.isfinite(logits)).nonzero()[0].tolist()
        raise ValueError(
            f"teacher logits must be finite, got {float(logits[row, column])} in row {row}"
        )
    shifted = logits.float() - logits.float().amax(dim=1, keepdim=True)
    half = shifted.clamp(min=torch.finfo(torch.float16).min).half()
    path = target_path(root, teacher=teacher, data=data, view=view)
    save_tensors(path, {"logits": half}, {"teacher": teacher, "data": data, "view": view})
    return path


class SoftTargets:
    """Stored logits of one or more teachers, gathered by image index.

    Args:
        members: for each teacher, its views: tensors `[images, classes]`.
    """

    def __init__(self, members: Sequence[Sequence[Tensor]]) -> None:
        self._members = members

    def __call__(self, index: Tensor, view: int) -> Tensor:
        """Return `[batch, classes]` for one teacher, else `[members, batch, classes]`."""
        rows = index.cpu()
        logits = [views[view % len(views)][rows] for views in self._members]
        return logits[0] if len(logits) == 1 else torch.stack(logits)


def load_targets(
    root: Path, teachers: Sequence[str], *, data: str, views: int, images: int
) -> SoftTargets:
    """Open the stored answers of one or more teachers, memory-mapped and checked.

    Raises:
        FileNotFoundError: something has not been labelled.
        ValueError: a file is damaged, or holds other answers than its place says.
    """
    return SoftTargets(
        [
            [_load_view(root, teacher, data, view, images) for view in range(views)]
            for teacher in teachers
        ]
    )


@lru_cache(maxsize=256)
def _load_view(root: Path, teacher: str, data: str, view: int, images: int) -> Tensor:
    path = target_path(root, teacher=teacher, data=data, view=view)
    tensors, facts = load_tensors(path)
    expected = {"teacher": teacher, "data": data, "view": view}
    found = {key: facts.get(key) for key in expected}
    if found != expected:
        raise ValueError(f"{path} must hold {expected}, got {found}: remove it and resume")
    logits = tensors["logits"]
    if len(logits) != images:
        raise ValueError(f"{path} must have {images} rows, got {len(logits)}")
    return logits
