"""Transforms of cached teacher logits, for controls: DKPP, CWTM and teacher-free distillation."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from selfkd.losses import ensemble_logits
from selfkd.losses.distillation import hard_loss
from selfkd.losses.logits import confidence_weighted_loss, permute_nontarget, teacher_free_logits
from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits

Transform = Literal["none", "permuted", "confidence", "virtual"]
"""Transform of teacher logits: none, permuted (DKPP), confidence (CWTM), virtual (teacher-free)."""
CONFIDENCE = 0.9  # of a virtual teacher; Yuan et al. use at least this


class PermutedTargets:
    """Teacher logits with all but the largest logit of each image in random order: DKPP.

    The permutations depend on the seed, the view and the images of the batch alone, so that a
    resumed trial is trained on the same targets.

    Args:
        targets: Cached logits of one teacher, or of the members of an ensemble.
        temperature: Temperature T of the loss, at which probabilities of members are averaged.
        average: Whether the members' `probabilities` or `logits` are averaged.
        weights: Weights of the members in the average; equal when None.
        seed: Random seed of the permutations.

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770

    >>> cached = torch.tensor([[1.0, 9.0, 2.0, 3.0]])
    >>> targets = PermutedTargets(lambda index, view: cached[index], temperature=2.0, seed=0)
    >>> sorted(targets(torch.tensor([0]), 0)[0].tolist())
    [1.0, 2.0, 3.0, 9.0]
    """

    def __init__(
        self,
        targets: Callable[[Tensor, int], Tensor | SparseLogits | SampledTargets],
        *,
        temperature: float,
        average: Literal["probabilities", "logits"] = "probabilities",
        weights: Sequence[float] | None = None,
        seed: int,
    ) -> None:
        self._targets = targets
        self._temperature = temperature
        self._average = average
        self._weights = weights
        self._seed = seed

    def __call__(self, index: Tensor, view: int) -> Tensor:
        """Return permuted logits `[batch, classes]`.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Number of the view.

        Raises:
            ValueError: Only the largest logits or samples are cached.
        """
        logits = _of_one_teacher(
            self._targets(index, view),
            temperature=self._temperature,
            average=self._average,
            weights=self._weights,
        )
        # 32 bits, as torch's generator on the CPU uses no more of a seed
        seed = zlib.crc32(
            index.cpu().numpy().tobytes(), zlib.crc32(f"{self._seed}/{view}".encode())
        )
        generator = torch.Generator(logits.device).manual_seed(seed)
        return permute_nontarget(logits, generator=generator)


class ConfidenceWeighted:
    """Cross-entropy with the labels, weighted by the teacher's confidence in each image: CWTM.

        mean_i w_i CE(y_i, p_s_i)       w_i = max_k p_t_ik / mean_j max_k p_t_jk

    with means over the batch. It replaces a `Distiller` in a training loop.

    Args:
        targets: Cached logits of one teacher, or of the members of an ensemble.
        average: Whether the members' `probabilities` or `logits` are averaged.
        weights: Weights of the members in the average; equal when None.
        label_smoothing: Fraction of the labels' mass spread over all classes, in [0, 1].
        mean: Mean over j; where ranks share a batch, the mean over the whole batch.

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770

    >>> cached = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()
    >>> loss = ConfidenceWeighted(lambda index, view: cached[index])
    >>> logits, labels = torch.tensor([[0.0, 0.0], [0.0, 50.0]]), torch.tensor([0, 1])
    >>> loss(logits, labels, index=torch.tensor([0, 1]))
    {'loss': tensor(0.4159), 'hard_loss': tensor(0.3466)}
    """

    def __init__(
        self,
        targets: Callable[[Tensor, int], Tensor | SparseLogits | SampledTargets],
        *,
        average: Literal["probabilities", "logits"] = "probabilities",
        weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        mean: Callable[[Tensor], Tensor] = torch.mean,
    ) -> None:
        self._targets = targets
        self._average = average
        self._weights = weights
        self._label_smoothing = label_smoothing
        self._mean = mean

    def __call__(
        self,
        student_logits: Tensor,
        labels: Tensor,
        *,
        inputs: Any = None,
        index: Tensor | None = None,
        view: int = 0,
    ) -> dict[str, Tensor]:
        """Return the terms of the loss of a batch.

        Args:
            student_logits: Student logits `[batch, classes]`.
            labels: Class indices `[batch]`, int64.
            inputs: Ignored; for compatibility with `Distiller`.
            index: Indices of the images, int64 `[batch]`.
            view: Number of the view.

        Returns:
            `loss`, with the graph, and `hard_loss`, the same with all weights 1 and detached.

        Raises:
            ValueError: `index` is missing, only the largest logits are cached, or an argument is
                refused by `hard_loss`.
        """
        if index is None:
            raise ValueError("index must be given where targets are cached, got None")
        teacher_logits = _of_one_teacher(
            self._targets(index, view),
            temperature=1.0,
            average=self._average,
            weights=self._weights,
        )
        loss = confidence_weighted_loss(
            student_logits,
            teacher_logits.to(student_logits.device),
            labels,
            label_smoothing=self._label_smoothing,
            mean=self._mean,
        )
        hard = hard_loss(student_logits.detach(), labels, label_smoothing=self._label_smoothing)
        return {"loss": loss, "hard_loss": hard}


class VirtualTargets:
    """Logits of a virtual teacher: a fixed probability for the label, uniform over other classes.

    Args:
        labels: Class indices of all training images.
        classes: Number of classes.
        confidence: Probability of the label, in (0, 1).

    Reference:
        Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", 2020,
        https://arxiv.org/abs/1909.11723

    >>> targets = VirtualTargets(torch.tensor([2, 0]), classes=3)
    >>> targets(torch.tensor([1]), 0).exp()
    tensor([[0.9000, 0.0500, 0.0500]])
    """

    def __init__(self, labels: Tensor, *, classes: int, confidence: float = CONFIDENCE) -> None:
        self._labels = labels
        self._classes = classes
        self._confidence = confidence

    def __call__(self, index: Tensor, view: int) -> Tensor:
        """Return log-probabilities `[batch, classes]`, the same for all views.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Ignored.
        """
        labels = self._labels[index.to(self._labels.device)]
        return teacher_free_logits(labels, classes=self._classes, confidence=self._confidence)


def _of_one_teacher(
    logits: Tensor | SparseLogits | SampledTargets,
    *,
    temperature: float,
    average: Literal["probabilities", "logits"],
    weights: Sequence[float] | None,
) -> Tensor:
    """Return logits `[batch, classes]`; those of members are averaged at a temperature.

    Raises:
        ValueError: Only the largest logits or samples are cached.
    """
    if not isinstance(logits, Tensor):
        found = "the largest" if isinstance(logits, SparseLogits) else "samples"
        raise ValueError(f"targets must hold all logits of the teacher, got {found} only")
    if logits.ndim == 2:
        return logits
    softened = logits.float() / temperature
    return ensemble_logits(softened, average=average, weights=weights) * temperature
