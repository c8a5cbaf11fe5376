"""The quick loss of a distiller: soft targets that are computed once, and few calls a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selfkd.losses import Average
from selfkd.losses.distillation import is_nan, soft_targets
from selfkd.losses.few_classes import HOTTEST, MOST, few_classes_terms
from selfkd.losses.moving import send

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
        index: Tensor | None,
        view: int,
        temperature: float,
        average: Average,
        weights: Sequence[float] | None,
    ) -> Tensor | None:
        """Return soft targets `[batch, classes]` on the CPU; None where there are none to be read.

        They are not kept of large views, nor of a view of each image's own; an index that is wrong
        is left to the cached logits, which say how.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Number of their view.
            temperature: Temperature T.
            average: What of several teachers is averaged.
            weights: Weights of the teachers.
        """
        if index is None or not isinstance(view, int):
            return None
        made_with = (temperature, average, weights if weights is None else tuple(weights))
        if made_with != self._made_with:
            self._views, self._made_with = {}, made_with
        if view not in self._views:
            self._views[view] = self._computed(view, temperature, average, weights)
        rows = self._views[view]
        try:
            return None if rows is None else rows.index_select(0, index.cpu())
        except (IndexError, RuntimeError):
            return None

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
    """Return the soft targets of logits; None of what is refused, or not all logits.

    Args:
        logits: Logits of one teacher or of several, or what is cached of the largest.
        temperature: Temperature T.
        average: What of several teachers is averaged.
        weights: Weights of the teachers.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        return None
    if logits.ndim not in (2, 3) or not logits.numel():
        return None
    return soft_targets(logits, temperature=temperature, average=average, weights=weights)


def is_quick(student_logits: Tensor, temperature: float) -> bool:
    """Return whether `few_classes_terms` is the quicker loss of these logits, and as exact."""
    shape = student_logits.shape
    return len(shape) == 2 and shape[1] <= MOST and temperature <= HOTTEST


def quick_terms(
    student_logits: Tensor,
    rows: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float,
) -> dict[str, Tensor] | None:
    """Return the terms by name; None where the shapes differ or the loss is NaN, and why is asked.

    Args:
        student_logits: Logits `[batch, classes]`.
        rows: Soft targets `[batch, classes]`, on any device.
        labels: Class indices `[batch]`, or probabilities `[batch, classes]`.
        temperature: Temperature T.
        alpha: Weight of the soft term.
        label_smoothing: Share of the labels' mass spread over all classes.
    """
    if rows.shape != student_logits.shape:
        return None
    terms = few_classes_terms(
        student_logits,
        send(rows, student_logits.device),
        labels,
        temperature=temperature,
        alpha=alpha,
        label_smoothing=label_smoothing,
    )
    return None if is_nan(terms.soft_loss) else terms._asdict()
