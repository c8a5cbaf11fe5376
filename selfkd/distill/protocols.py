"""What a training loop calls, and what a distiller reads: losses and cached logits."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits


class CachedLogits(Protocol):
    """Cached teacher logits by image, such as `selfkd.soft_targets.store.SoftTargets`."""

    def __call__(self, index: Tensor, view: int) -> Tensor | SparseLogits | SampledTargets:
        """Return the logits of images `[batch]` under a view.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Number of the images' augmentation.

        Returns:
            Logits `[batch, classes]`, or `[members, batch, classes]` of an ensemble.
        """


class Loss(Protocol):
    """Loss of a training loop; a `Distiller` is one."""

    def __call__(
        self,
        student_logits: Tensor,
        labels: Tensor,
        *,
        inputs: Any = None,
        index: Tensor | None = None,
        view: int = 0,
    ) -> dict[str, Tensor]:
        """Return the terms of the loss of a batch by name; `loss` has the graph."""
