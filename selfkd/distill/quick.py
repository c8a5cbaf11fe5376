"""Soft targets that are computed once: of cached logits, at the temperature of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selfkd.losses import Average
from selfkd.losses.distillation import soft_targets

KEPT_BYTES = 64 * 2**20
"""Most bytes of soft targets that are kept."""


class SoftTargetRows:
    """Soft targets of the images of a batch, read from those of a whole view.

    They are computed when a view is first read, and again when a setting changes, from the cached
    logits that a store holds in memory; the oldest views make room.

    Args:
        targets: Cached logits, such as `selfkd.soft_targets.store.SoftTargets`.
    """

    def __init__(self, targets: Any) -> None:
        self._view_logits = getattr(targets, "view_logits", None)
        self._views: dict[int, Tensor | None] = {}
        self._made_with: tuple[Any, ...] = ()

    def __call__(
        self,
        index: Tensor,
        view: int,
        temperature: float,
        average: Average,
        weights: Sequence[float] | None,
    ) -> Tensor | None:
        """Return soft targets `[batch, classes]` on the CPU; None where they are not kept.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Number of their view.
            temperature: Temperature T.
            average: What of several teachers is averaged.
            weights: Weights of the teachers.
        """
        made_with = (temperature, average, weights if weights is None else tuple(weights))
        if made_with != self._made_with:
            self._views, self._made_with = {}, made_with
        if view not in self._views:
            self._views[view] = self._computed(view, temperature, average, weights)
        rows = self._views[view]
        return None if rows is None else rows.index_select(0, index.cpu())

    def _computed(
        self, view: int, temperature: float, average: Average, weights: Sequence[float] | None
    ) -> Tensor | None:
        logits = None if self._view_logits is None else self._view_logits(view)
        rows = 0 if logits is None else 4 * logits.shape[-2] * logits.shape[-1]
        if logits is None or rows > KEPT_BYTES:
            return None
        kept = [number for number, found in self._views.items() if found is not None]
        for oldest in kept[: max(0, len(kept) + 1 - KEPT_BYTES // rows)]:
            del self._views[oldest]
        return soft_targets_of(logits, temperature, average, weights)


def soft_targets_of(
    logits: object, temperature: float, average: Average, weights: Sequence[float] | None
) -> Tensor | None:
    """Return the soft targets of logits; None of what holds the largest or samples of them."""
    if not isinstance(logits, Tensor):
        return None
    return soft_targets(logits, temperature=temperature, average=average, weights=weights)
