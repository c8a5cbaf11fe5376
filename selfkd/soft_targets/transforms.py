"""Transforms of cached teacher logits, for controls: what of the teacher a student is left with."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from selfkd.losses import Average, ensemble_logits
from selfkd.losses.distillation import hard_loss
from selfkd.losses.logits import confidence_weighted_loss, permute_nontarget, teacher_free_logits
from selfkd.losses.moving import send
from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits

Transform = Literal["none", "permuted", "confidence", "virtual", "hard", "class_mean"]
"""Transform of teacher logits: none, permuted (DKPP), confidence (CWTM), virtual (teacher-free),
hard (the arg max), class_mean (one mean soft target a class)."""
Targets = Callable[[Tensor, Any], Tensor | SparseLogits | SampledTargets]
"""Cached logits of one teacher, or of the members of an ensemble, by index and view."""
OF_LABELS: tuple[Transform, ...] = ("confidence", "virtual", "class_mean")
"""Transforms that need the label of each item, which leave a transfer set out."""
IMPOSSIBLE = -1e4
"""Logit of a class of no probability, in single precision too, at which losses are finite."""
MOST_MEANS = 2**26
"""Most values of the mean soft targets of all classes, `classes` squared."""
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
        targets: Targets,
        *,
        temperature: float,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
        seed: int,
    ) -> None:
        self._logits = partial(
            _of_one_teacher, targets, temperature=temperature, average=average, weights=weights
        )
        self._seed = seed

    def __call__(self, index: Tensor, view: int | Tensor) -> Tensor:
        """Return permuted logits `[batch, classes]`.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Number of the view, or of that of each image.

        Raises:
            ValueError: Only the largest logits or samples are cached.
        """
        logits = self._logits(index, view)
        at = view.tolist() if isinstance(view, Tensor) else view
        # 32 bits, as torch's generator on the CPU uses no more of a seed
        seed = zlib.crc32(index.cpu().numpy().tobytes(), zlib.crc32(f"{self._seed}/{at}".encode()))
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
        targets: Targets,
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        mean: Callable[[Tensor], Tensor] = torch.mean,
    ) -> None:
        self._logits = partial(
            _of_one_teacher, targets, temperature=1.0, average=average, weights=weights
        )
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
        teacher_logits = self._logits(index, view)
        loss = confidence_weighted_loss(
            student_logits,
            send(teacher_logits, student_logits.device),
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


class HardTargets:
    """The teacher's arg max as the soft target, of all probability: for a loss at T = 1.

    The soft term is then the cross-entropy with the class that the teacher predicts, as in
    `hard_teacher_loss`.

    Args:
        targets: Cached logits of one teacher, or of the members of an ensemble.
        average: Whether the members' `probabilities` or `logits` are averaged.
        weights: Weights of the members in the average; equal when None.

    >>> cached = torch.tensor([[1.0, 9.0, 2.0]])
    >>> HardTargets(lambda index, view: cached[index])(torch.tensor([0]), 0).softmax(dim=-1)
    tensor([[0., 1., 0.]])
    """

    def __init__(
        self,
        targets: Targets,
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> None:
        self._logits = partial(
            _of_one_teacher, targets, temperature=1.0, average=average, weights=weights
        )

    def __call__(self, index: Tensor, view: int) -> Tensor:
        """Return logits `[batch, classes]`: 0 of the class that is predicted, else -10,000.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Number of the view.

        Raises:
            ValueError: Only the largest logits or samples are cached.
        """
        logits = self._logits(index, view)
        found = torch.full(logits.shape, IMPOSSIBLE, device=logits.device)
        return found.scatter_(-1, logits.argmax(dim=-1, keepdim=True), 0.0)


class ClassMeanTargets:
    """One soft target a class: the mean of the teacher's over the training items of the class.

        q_y = mean of softmax(z_i / T) over the items i of label y

    in the first view. What the teacher knows of the single image is gone, what it knows of the
    classes is left.

    Args:
        targets: Cached logits of one teacher, or of the members of an ensemble.
        labels: Class of each training item, int64; below 0 of an item that is never trained on.
        classes: Number of classes.
        temperature: Temperature T of the loss.
        average: Whether the members' `probabilities` or `logits` are averaged.
        weights: Weights of the members in the average; equal when None.

    Raises:
        ValueError: Only the largest logits or samples are cached, or classes are too many.

    >>> cached = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]]).log()
    >>> labels = torch.tensor([0, 0, 1])
    >>> targets = ClassMeanTargets(
    ...     lambda index, view: cached[index], labels, classes=2, temperature=1.0
    ... )
    >>> targets(torch.tensor([1]), 0).softmax(dim=-1)
    tensor([[0.8000, 0.2000]])
    """

    def __init__(
        self,
        targets: Targets,
        labels: Tensor,
        *,
        classes: int,
        temperature: float,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> None:
        if fault := class_mean_fault(classes):
            raise ValueError(fault)
        self._labels = labels.cpu()
        sums = torch.zeros(classes, classes, dtype=torch.float64)
        known = (self._labels >= 0).nonzero()[:, 0]
        logits_of = partial(
            _of_one_teacher, targets, temperature=temperature, average=average, weights=weights
        )
        for index in torch.split(known, max(1, 2**20 // classes)):
            logits = logits_of(index, 0)
            p = (logits.double().cpu() / temperature).softmax(dim=-1)
            sums.index_add_(0, self._labels[index], p)
        counts = self._labels[known].bincount(minlength=classes)
        means = sums / counts.clamp(min=1)[:, None]
        self._logits = (means.log() * temperature).clamp(min=IMPOSSIBLE).float()

    def __call__(self, index: Tensor, view: int) -> Tensor:
        """Return logits `[batch, classes]` on the CPU, whose softmax at T is the mean of the class.

        Args:
            index: Indices of the images, int64 `[batch]`.
            view: Ignored.
        """
        return self._logits[self._labels[index.cpu()].clamp(min=0)]


def class_mean_fault(classes: int) -> str | None:
    """Return why there is no mean soft target of each class; None where there is one.

    >>> class_mean_fault(50_000)
    'class_mean must be of at most 8,192 classes, got 50,000: leave it out'
    """
    most = math.isqrt(MOST_MEANS)
    if classes <= most:
        return None
    return f"class_mean must be of at most {most:,} classes, got {classes:,}: leave it out"


def transform_targets(
    targets: Targets,
    transform: Transform,
    labels: Tensor,
    *,
    classes: int,
    temperature: float,
    average: Average = "probabilities",
    weights: Sequence[float] | None = None,
    seed: int,
) -> tuple[Callable[[Tensor, int], Tensor], float]:
    """Return transformed targets of one teacher, and the temperature of their loss.

    Args:
        targets: Cached logits of one teacher, or of the members of an ensemble.
        transform: Transform that leaves soft targets: permuted, hard or class_mean.
        labels: Class of each training item, int64.
        classes: Number of classes.
        temperature: Temperature T of the config.
        average: Whether the members' `probabilities` or `logits` are averaged.
        weights: Weights of the members in the average; equal when None.
        seed: Random seed of the permutations.

    Raises:
        ValueError: The transform is another, or not all logits are cached.
    """
    if transform == "hard":
        return HardTargets(targets, average=average, weights=weights), 1.0
    if transform == "class_mean":
        mean = ClassMeanTargets(
            targets,
            labels,
            classes=classes,
            temperature=temperature,
            average=average,
            weights=weights,
        )
        return mean, temperature
    if transform != "permuted":
        raise ValueError(f"transform must be permuted, hard or class_mean, got {transform}")
    permuted = PermutedTargets(
        targets, temperature=temperature, average=average, weights=weights, seed=seed
    )
    return permuted, temperature


def _of_one_teacher(
    targets: Targets,
    index: Tensor,
    view: Any,
    *,
    temperature: float,
    average: Average,
    weights: Sequence[float] | None,
) -> Tensor:
    """Return logits `[batch, classes]`; those of members are averaged at a temperature.

    Raises:
        ValueError: Only the largest logits or samples are cached.
    """
    logits = targets(index, view)
    if not isinstance(logits, Tensor):
        found = "the largest" if isinstance(logits, SparseLogits) else "samples"
        raise ValueError(f"targets must hold all logits of the teacher, got {found} only")
    if logits.ndim == 2:
        return logits
    softened = logits.float() / temperature
    return ensemble_logits(softened, average=average, weights=weights) * temperature
