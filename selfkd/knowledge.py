"""Stored answers with the teacher's knowledge taken out: what controls learn from."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from selfkd.losses.logits import permute_nontarget, teacher_free_logits
from selfkd.losses.sparse import SparseLogits
from selfkd.metrics import ensemble_logits

Knowledge = Literal["whole", "permuted", "virtual"]
"""Of a teacher: all of it, its doubts in random order, or that of a virtual teacher."""
CONFIDENCE = 0.9  # of a virtual teacher, as Yuan et al. have it at least


class PermutedTargets:
    """A teacher's answers with all but the largest logit of each image in random order: DKPP.

    What is drawn depends on the seed, the view and the images of the batch alone, so a trial that
    is resumed sees what it would have seen.

    Args:
        targets: stored logits of one teacher, or of the members of an ensemble.
        temperature: T of the loss, at which the probabilities of members are averaged.
        average: of the members' `probabilities` or `logits`.
        weights: of the members in that average.
        seed: of the draws.

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770

    >>> stored = torch.tensor([[1.0, 9.0, 2.0, 3.0]])
    >>> targets = PermutedTargets(lambda index, view: stored[index], temperature=2.0, seed=0)
    >>> sorted(targets(torch.tensor([0]), 0)[0].tolist())
    [1.0, 2.0, 3.0, 9.0]
    """

    def __init__(
        self,
        targets: Callable[[Tensor, int], Tensor | SparseLogits],
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
        """Return logits `[batch, classes]` of images, permuted.

        Raises:
            ValueError: only the largest logits are stored.
        """
        logits = self._targets(index, view)
        if isinstance(logits, SparseLogits):
            raise ValueError("targets must hold all logits to be permuted, got the largest only")
        if logits.ndim == 3:
            softened = logits.float() / self._temperature
            mean = ensemble_logits(softened, average=self._average, weights=self._weights)
            logits = mean * self._temperature
        # 32 bits: torch's generator on the CPU takes no more of a seed
        mark = zlib.crc32(
            index.cpu().numpy().tobytes(), zlib.crc32(f"{self._seed}/{view}".encode())
        )
        generator = torch.Generator(logits.device).manual_seed(mark)
        return permute_nontarget(logits, generator=generator)


class VirtualTargets:
    """The answers of a virtual teacher that is always right and knows nothing else: teacher-free.

    Args:
        labels: of all training images.
        classes: how many.
        confidence: the probability that it gives the label, in (0, 1).

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
        """Return log-probabilities `[batch, classes]` of images; all views have the same."""
        labels = self._labels[index.to(self._labels.device)]
        return teacher_free_logits(labels, classes=self._classes, confidence=self._confidence)
