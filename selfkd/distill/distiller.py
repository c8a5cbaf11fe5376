"""The loss of a user's own training loop, by a teacher that is asked or by its stored answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfkd.distill.teacher import Teacher
from selfkd.distill.terms import (
    FeatureTerm,
    FeatureTerms,
    LogitTerm,
    Term,
    check_paths,
    parse_terms,
)
from selfkd.losses import Average, distillation_terms
from selfkd.losses.distillation import check_settings, hard_loss
from selfkd.losses.sparse import SparseLogits, sparse_terms


class StoredLogits(Protocol):
    """What a store of soft targets does, such as `selfkd.soft_targets.store.SoftTargets`."""

    def __call__(self, index: Tensor, view: int) -> Tensor | SparseLogits:
        """Return `[batch, classes]` or `[members, batch, classes]` for images `[batch]`."""


class Loss(Protocol):
    """What a training loop asks of a `Distiller`."""

    def __call__(
        self,
        student_logits: Tensor,
        labels: Tensor,
        *,
        inputs: Any = None,
        index: Tensor | None = None,
        view: int = 0,
    ) -> dict[str, Tensor]:
        """Return the terms of a batch's loss by name; `loss` has the graph."""


class Distiller:
    """Loss terms for a training loop: of a live teacher, of stored soft targets, or of labels only.

        loss = (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T)

    It is no `nn.Module` and holds nothing that is trained, so it never enters the state of a model.
    The loss is a mean over the batch: the mean over micro-batches of equal size is the loss of the
    whole, and with `normalizer` the sum over any. The settings may be changed between steps, as a
    schedule of `alpha` does.

    Where several processes train (`torch.distributed`), what the terms learn starts from the first
    one's and has the mean of their gradients, as `DistributedDataParallel` does for the student:
    make the distiller on each of them, after `init_process_group`.

    Args:
        teacher: maps inputs to logits `[batch, classes]`, or `[members, batch, classes]` of an
            ensemble; called without gradients. Of an `nn.Module`, a frozen copy is taken
            (`selfkd.distill.teacher.Teacher`).
        targets: maps `(index, view)` to stored logits of either shape, or to the largest of them
            (`SparseLogits`).
        temperature: T, above 0.
        alpha: weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`. At 0 the teacher
            is not asked.
        average: of an ensemble's `probabilities` or `logits`.
        weights: of the ensemble's members in that average, with sum 1; all the same where not
            given.
        label_smoothing: of the hard term, in [0, 1].
        terms: further terms of the loss by name, each added with its weight: `LogitTerm`, or
            `FeatureTerm` for what submodules return, also written as a mapping
            `{"student": "layer2", "teacher": "layer3", "weight": 0.1}`.
        student: the model that is trained, in whatever wrapper, where there are feature terms. Its
            last forward pass before each call is the one that counts.

    Raises:
        ValueError: both `teacher` and `targets`, a setting out of range, a path of no submodule,
            or feature terms without a live teacher and a student.
        TypeError: `teacher` or `targets` cannot be called.

    >>> model, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> distiller = Distiller(teacher, temperature=4.0, alpha=0.9)
    >>> inputs, labels = torch.ones(2, 4), torch.tensor([0, 2])
    >>> terms = distiller(model(inputs), labels, inputs=inputs)
    >>> terms["loss"].backward()
    >>> sorted(terms)
    ['hard_loss', 'loss', 'soft_loss']

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770
    """

    def __init__(
        self,
        teacher: Callable[[Any], Tensor] | None = None,
        *,
        targets: StoredLogits | None = None,
        temperature: float = 4.0,
        alpha: float = 0.9,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        terms: Mapping[str, Term | Mapping[str, Any]] | None = None,
        student: nn.Module | None = None,
    ) -> None:
        check_settings(temperature, alpha, average, label_smoothing)
        if teacher is not None and targets is not None:
            raise ValueError(
                "teacher must be None where targets are given, got "
                f"{type(teacher).__name__}: give one of the two"
            )
        for name, source in (("teacher", teacher), ("targets", targets)):
            if source is not None and not callable(source):
                raise TypeError(f"{name} must be callable, got {type(source).__name__}")
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.targets = targets
        self.temperature = temperature
        self.alpha = alpha
        self.average: Average = average
        self.weights = weights
        self.label_smoothing = label_smoothing
        self.terms = parse_terms(terms or {})
        self._features: FeatureTerms | None = None
        self._means: list[RemovableHandle] = []
        self.projections = nn.ModuleDict()
        if self.teacher is not None or self.targets is not None:
            self.attach(student)
        elif student is not None:  # a wrong path is not to wait for a teacher
            check_paths(self._feature_terms(), student)

    def _feature_terms(self) -> dict[str, FeatureTerm]:
        return {name: term for name, term in self.terms.items() if isinstance(term, FeatureTerm)}

    def attach(self, student: nn.Module | None) -> None:
        """Capture the features of `student` from now on, as after a copy, which captures none."""
        wanted = self._feature_terms()
        if not wanted:
            return
        if not isinstance(self.teacher, Teacher):
            raise ValueError(
                f"terms of features ({', '.join(wanted)}) need a live teacher, a torch.nn.Module "
                f"or Teacher, got {type(self.teacher or self.targets).__name__}"
            )
        if student is None:
            raise ValueError(f"student must be given for terms of features ({', '.join(wanted)})")
        self.detach()
        self._features = FeatureTerms(wanted, student, self.teacher.module)
        if not len(self.projections):
            device = next(student.parameters()).device
            self.projections = self._features.make_projections().to(device)
        self._keep_in_step()

    def _keep_in_step(self) -> None:
        """Learn the same in all processes: they start from the first, with mean gradients."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        for parameter in self.parameters():
            dist.broadcast(parameter.detach(), 0)
            hook = parameter.register_hook(_mean_over_processes)  # type: ignore[no-untyped-call]
            self._means.append(hook)

    @property
    def in_step(self) -> bool:
        """Whether what the terms learn is kept the same in several processes."""
        return bool(self._means)

    def detach(self) -> None:
        """Take what captures features off the student."""
        if self._features is not None:
            self._features.close()
        for handle in self._means:
            handle.remove()
        self._features, self._means = None, []

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what the terms learn, their projections: give them to your optimiser too."""
        return self.projections.parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return what the terms have learnt, to be saved apart from the student."""
        return self.projections.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.projections.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the student's hooks to the student."""
        return {**self.__dict__, "_features": None, "_means": []}

    def __call__(
        self,
        student_logits: Tensor,
        labels: Tensor,
        *,
        inputs: Any = None,
        index: Tensor | None = None,
        view: int = 0,
        normalizer: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms of a batch, by name.

        Over micro-batches of unlike sizes, give the number of images of all of them as `normalizer`
        and add the losses up: the sum is the loss of the whole. That holds for what is a mean over
        images, not for what compares or weighs the images of a batch: similarity-preserving, PKT,
        RKD, `dist_loss`, `confidence_weighted_loss`, and batch normalisation in the student.

        Args:
            student_logits: `[batch, classes]`.
            labels: class indices `[batch]`.
            inputs: what the teacher is asked; needed with `teacher`.
            index: numbers of the images `[batch]`; needed with `targets`.
            view: number of the images' augmentation, for `targets`.
            normalizer: what takes the place of the batch's number of images in each mean, above 0.

        Returns:
            `loss`, with the graph, `hard_loss`, where a teacher was asked `soft_loss`, and the
            further terms by name: scalars, the first three in nats. The parts are unweighted and
            detached, for logging.

        Raises:
            ValueError: `inputs` or `index` is needed and missing, mean logits are asked of sparse
                ones, a normalizer of 0 or less, or as `distillation_terms`.
            TypeError: as `distillation_terms`.
        """
        if isinstance(normalizer, int | float) and not 0 < normalizer < math.inf:
            raise ValueError(f"normalizer must be > 0 and finite, got {normalizer}")
        terms = self._terms(student_logits, labels, inputs, index, view)
        if normalizer is None:
            return terms
        return {name: term * (len(labels) / normalizer) for name, term in terms.items()}

    def _terms(
        self,
        student_logits: Tensor,
        labels: Tensor,
        inputs: Any,
        index: Tensor | None,
        view: int,
    ) -> dict[str, Tensor]:
        # further terms ask the teacher at any alpha
        unasked = self.alpha == 0 and not self.terms
        teacher_logits = None if unasked else self._ask(inputs, index, view)
        if teacher_logits is None:
            loss = hard_loss(student_logits, labels, label_smoothing=self.label_smoothing)
            return {"loss": loss, "hard_loss": loss.detach()}
        teacher_logits = teacher_logits.to(student_logits.device)
        if isinstance(teacher_logits, SparseLogits):
            if self.average == "logits" and teacher_logits.values.ndim == 3:
                raise ValueError(
                    "average must be 'probabilities' where targets are SparseLogits of several "
                    "members, got 'logits'"
                )
            terms = sparse_terms(
                student_logits,
                teacher_logits,
                labels,
                temperature=self.temperature,
                alpha=self.alpha,
                label_smoothing=self.label_smoothing,
                weights=self.weights,
            )
        else:
            terms = distillation_terms(
                student_logits,
                teacher_logits,
                labels,
                temperature=self.temperature,
                alpha=self.alpha,
                average=self.average,
                label_smoothing=self.label_smoothing,
                weights=self.weights,
            )
        named = terms._asdict()
        for name, value in self._further(student_logits, teacher_logits, labels).items():
            named["loss"] = named["loss"] + self.terms[name].weight * value
            named[name] = value.detach()
        return named

    def _further(
        self, student_logits: Tensor, teacher_logits: Tensor | SparseLogits, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the further terms, unweighted."""
        values: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if isinstance(term, LogitTerm):
                if isinstance(teacher_logits, SparseLogits):
                    raise ValueError(f"{name} needs all logits of the teacher, got the largest")
                values[name] = term.loss(student_logits, teacher_logits, labels)
        if self._features is not None:
            values |= self._features.losses(self.projections)
        elif len(values) < len(self.terms):
            raise ValueError("terms of features must have a student: distiller.attach(student)")
        return values

    @torch.no_grad()
    def _ask(self, inputs: Any, index: Tensor | None, view: int) -> Tensor | SparseLogits | None:
        if self.teacher is not None:
            if inputs is None:
                raise ValueError(
                    "inputs must be given where there is a teacher to ask, got None: "
                    "distiller(student_logits, labels, inputs=inputs)"
                )
            if self._features is not None:
                return self._features.ask(self.teacher, inputs)
            return self.teacher(inputs)
        if self.targets is not None:
            if index is None:
                raise ValueError(
                    "index must be given where targets are stored, got None: "
                    "distiller(student_logits, labels, index=index)"
                )
            return self.targets(index, view)
        return None

    def __repr__(self) -> str:
        source = self.targets if self.teacher is None else self.teacher
        return f"Distiller({source}, temperature={self.temperature}, alpha={self.alpha})"


def _mean_over_processes(gradient: Tensor) -> Tensor:
    mean = gradient / dist.get_world_size()
    dist.all_reduce(mean)
    return mean
