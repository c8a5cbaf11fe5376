"""Features of any kind, as the inputs of a classifier that was trained on arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfkd.data.normalise import standardised


def feature_inputs(
    items: Any, *, names: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Return features as inputs `[N, F]`, standardised as in training.

    Args:
        items: One row `[F]` or several `[N, F]`: an array, a tensor, nested lists, or a DataFrame,
            whose columns are taken by name. Of features that were flattened, `[N, ...]` as well.
        names: Names of the features.
        mean: Mean of each feature in training.
        std: Standard deviation of each.

    Raises:
        TypeError: Items of another type.
        ValueError: Features of another number or names, or that are not finite.

    Example:
        >>> feature_inputs([3, 10], names=["x0", "x1"], mean=[1, 10], std=[2, 1])
        tensor([[1., 0.]])
    """
    if isinstance(items, str | os.PathLike):
        raise TypeError(f"features must be an array, a tensor or a DataFrame, got the file {items}")
    values = _values(items, names)
    width = len(names)
    if values.numel() == width and math.prod(values.shape[1:]) != width:
        values = values[None]
    if values.ndim < 2 or math.prod(values.shape[1:]) != width:
        raise ValueError(f"features must be [N, {width}], got {list(values.shape)}")
    values = values.reshape(len(values), width)
    if not bool(values.isfinite().all()):
        row, column = (int(n) for n in (~values.isfinite()).nonzero()[0])
        raise ValueError(
            f"features must be finite, got {values[row, column].item()} in row {row + 1}, column "
            f"{names[column]}"
        )
    return standardised(values, mean, std)


def _values(items: Any, names: Sequence[str]) -> Tensor:
    columns = getattr(items, "columns", None)
    if columns is not None:
        found = [str(name) for name in columns]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"features must have a column {missing[0]!r}, got {', '.join(found)}")
        items = items.iloc[:, [found.index(name) for name in names]].to_numpy()
    if isinstance(items, Tensor):
        return items.detach().cpu().double()
    try:
        return torch.from_numpy(np.asarray(items, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise TypeError(f"features must be rows of numbers, got {error}") from None
