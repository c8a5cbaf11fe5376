"""The distillation loss of any training loop, with a live teacher or with cached logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfkd.distill.layers import unwrap
from selfkd.distill.outputs import check_graph, take_logits
from selfkd.distill.protocols import CachedLogits as CachedLogits
from selfkd.distill.protocols import Loss as Loss
from selfkd.distill.quick import SoftTargetRows, is_quick, quick_terms, soft_targets_of
from selfkd.distill.tasks import Task, as_outputs, hard_term, masked_hard_term, task_terms
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.distill.terms import (
    FeatureTerm,
    FeatureTerms,
    Term,
    check_paths,
    logit_losses,
    parse_terms,
)
from selfkd.losses import Average
from selfkd.losses.distillation import check_settings, check_tensor, detached, hard_loss
from selfkd.losses.fused import weighted_sum
from selfkd.losses.moving import send
from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits


class Distiller:
    """Loss terms of a training loop, with a live teacher, with cached logits, or with labels only.

        loss = (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T)

    It is no `nn.Module`, so its teacher and projections never enter the state of a model. The loss
    is a mean over the batch: the mean of the losses of micro-batches of equal size is the loss of
    the whole batch; for other sizes, see `normalizer`. The settings may be changed between steps,
    for example by a schedule of `alpha`.

    In distributed training (`torch.distributed`), projections start from those of the first process
    and their gradients are averaged, as `DistributedDataParallel` does for the student: make the
    distiller in each process, after `init_process_group`.

    Args:
        teacher: Function or module from inputs to logits `[batch, classes]`, or
            `[members, batch, classes]` of an ensemble, or to an output with them; called without
            gradients. An `nn.Module` is copied and frozen (`selfkd.distill.teacher.Teacher`);
            `Teacher(module, copy=False)` is run as it is.
        targets: Function from `(index, view)` to cached logits of either shape, to the k largest of
            them (`SparseLogits`), or to samples (`SampledTargets`).
        temperature: Temperature T, above 0. 3.5 and an alpha of 0.65, as in the config, lose least
            on five unlike tasks of images (docs/choosing.md); tokens want T = 1.
        alpha: Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`. At 0, and without
            further terms, the teacher is not run.
        average: Whether an ensemble's `probabilities` or `logits` are averaged.
        weights: Weights of the ensemble's members in that average, with sum 1; equal if not given.
        label_smoothing: Label smoothing of the hard term, in [0, 1].
        terms: Further terms of the loss by name, each added with its weight: `LogitTerm`, or
            `FeatureTerm` for outputs of submodules, also written as a mapping
            `{"student": "layer2", "teacher": "layer3", "weight": 0.1}`.
        student: Model that is trained, in any wrapper, if there are feature terms. Its last forward
            pass before each call is the one whose features are used. If not given, `attach` it
            before the first call, as timm's task and Lightning's callback do.
        example: Inputs of student and teacher, run once in eval mode, from which terms with
            `project=True` know the channels of their layers.
        task: Kind of label. `single_label`: one class of several, the loss above. `multi_label`:
            labels `[batch, labels]` of which each may hold, with a sigmoid in the place of the
            softmax (`selfkd.losses.multi_label_terms`). `regression`: numbers `[batch, ...]`, with
            squared errors and no temperature (`selfkd.losses.regression_terms`).
        margin: Margin by which the student must be better than a regression's teacher for an item
            to be trained on its label alone, in squared units of the labels; None for never.
        quick: Whether of few classes the soft targets are computed once, where logits are cached,
            and the loss by least calls (`selfkd.losses.few_classes`); it rounds otherwise.

    Raises:
        ValueError: Both `teacher` and `targets`, a setting out of range, a path of no submodule,
            or feature terms without a live teacher.
        TypeError: A teacher or targets that cannot be called.

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
        teacher: Callable[[Any], Any] | None = None,
        *,
        targets: CachedLogits | Callable[..., Any] | None = None,
        temperature: float = 3.5,
        alpha: float = 0.65,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        terms: Mapping[str, Term | Mapping[str, Any]] | None = None,
        student: nn.Module | None = None,
        example: Any = None,
        task: Task = "single_label",
        margin: float | None = 0.0,
        quick: bool = False,
    ) -> None:
        check_settings(temperature, alpha, average, label_smoothing)
        if task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
        if task != "single_label" and getattr(targets, "shifted", False):
            raise ValueError(
                f"targets must be cached with exact=True for {task}: these are logits less the "
                "largest of a row, which only a softmax does not change"
            )
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
        self.task: Task = task
        self.margin = margin
        self._quick = SoftTargetRows(targets) if quick and task == "single_label" else None
        self.terms = parse_terms(terms or {})
        self._features: FeatureTerms | None = None
        self._sync_hooks: list[RemovableHandle] = []
        self.projections = nn.ModuleDict()
        if isinstance(self.teacher, Teacher | Ensemble) and student is None:
            pass  # attached later, if there are feature terms
        elif self.teacher is not None or self.targets is not None:
            self.attach(student, example=example)
        elif student is not None:  # a wrong path is reported before there is a teacher
            check_paths(self._feature_terms(), student)

    def _feature_terms(self) -> dict[str, FeatureTerm]:
        return {name: term for name, term in self.terms.items() if isinstance(term, FeatureTerm)}

    def attach(self, student: nn.Module | None, *, example: Any = None) -> None:
        """Start to capture the features of `student`; needed again after a copy of the distiller.

        Args:
            student: Model that is trained, in any wrapper; needed if there are feature terms.
            example: Inputs of student and teacher, for terms with `project=True`.

        Raises:
            ValueError: Feature terms without a live teacher and a student, or a path of no
                submodule.
        """
        terms = self._feature_terms()
        if not terms:
            return
        if not isinstance(self.teacher, Teacher | Ensemble):
            raise ValueError(
                f"terms of features ({', '.join(terms)}) need a live teacher, a torch.nn.Module "
                f"or Teacher, got {type(self.teacher or self.targets).__name__}"
            )
        members = self.teacher.members if isinstance(self.teacher, Ensemble) else [self.teacher]
        if student is None:
            raise ValueError(f"student must be given for terms of features ({', '.join(terms)})")
        if any(unwrap(student) is unwrap(member.module) for member in members):
            raise ValueError(
                "teacher must be another module than the student, got the same, not copied: "
                "Teacher(module) copies it"
            )
        self.detach()
        modules = [member.module for member in members]
        self._features = FeatureTerms(terms, student, modules, weights=self.weights)
        if not len(self.projections):
            like = next(student.parameters())
            dtype = like.dtype if like.is_floating_point() else None
            made = self._features.make_projections(example, self.teacher)
            self.projections = made.to(like.device, dtype)
        self.synchronize()

    def synchronize(self) -> None:
        """Keep projections equal in all processes: same initial values, averaged gradients.

        `attach` does so where the process group exists by then; otherwise call it once it does.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        if self.in_step:
            return
        for parameter in self.parameters():
            dist.broadcast(parameter.detach(), 0)
            hook = parameter.register_hook(_mean_over_processes)  # type: ignore[no-untyped-call]
            self._sync_hooks.append(hook)

    @property
    def attached(self) -> bool:
        """Whether there is nothing to attach: a student is, or no term needs its features."""
        return self._features is not None or not self._feature_terms()

    @property
    def in_step(self) -> bool:
        """Whether the projections are kept equal across several processes."""
        return bool(self._sync_hooks)

    def detach(self) -> None:
        """Remove the hooks that capture features of the student."""
        if self._features is not None:
            self._features.close()
        for handle in self._sync_hooks:
            handle.remove()
        self._features, self._sync_hooks = None, []

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the terms' projections, to be given to the optimiser as well."""
        return self.projections.parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the terms' projections, to be saved apart from the student."""
        return self.projections.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self.projections.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the hooks, which belong to the student."""
        return {**self.__dict__, "_features": None, "_sync_hooks": []}

    def __call__(
        self,
        student_logits: Any,
        labels: Tensor | None,
        *,
        inputs: Any = None,
        index: Tensor | None = None,
        view: int = 0,
        normalizer: float | Tensor | None = None,
        hard_loss: Tensor | None = None,
        unlabelled: int = 0,
        labelled_share: float | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms of the loss of a batch, by name.

        For micro-batches of different sizes, give their total number of images as `normalizer` and
        add the losses up: the sum is the loss of the whole batch. This holds for terms that are
        means over images, not for those that compare or weight the images of a batch:
        similarity-preserving, PKT, RKD, `dist_loss`, `confidence_weighted_loss`, and batch
        normalisation in the student.

        Args:
            student_logits: Logits `[batch, classes]`, or an output of the student in which it is
                clear which tensor they are, such as one with `logits`.
            labels: Class indices `[batch]`, or probabilities `[batch, classes]`; those of the task
                otherwise; None of unlabelled data, at `alpha` 1 with a teacher.
            inputs: Inputs of the teacher; needed with `teacher`.
            index: Indices of the images `[batch]`; needed with `targets`.
            view: Number of the images' augmentation, for `targets`.
            normalizer: Divisor in place of the batch's number of images in each mean, above 0.
            hard_loss: Hard term of the caller's own, a scalar with the graph, in place of the
                cross-entropy; the labels are given to the further terms only.
            unlabelled: Number of images at the end without a label: `labels` are of the others,
                over which the hard term is a mean; further terms get none.
            labelled_share: Fraction with a label of all micro-batches or processes together.

        Returns:
            Scalars by name: `loss`, with the graph; `hard_loss`, if there are labels; `soft_loss`,
            if a teacher was used; and the further terms. The first three are in nats. All but
            `loss` are unweighted and detached, for logging.

        Raises:
            ValueError: Missing `inputs`, `index` or `labels`, an average of logits that are sparse,
                labels of too many or few images, a normalizer of 0 or less, a `hard_loss` that is
                no scalar, or with feature terms, logits or features without a graph of a student
                that trains; otherwise as `distillation_terms`.
            TypeError: An output in which it is not clear which tensor the logits are, or a
                `hard_loss` that is no tensor; otherwise as `distillation_terms`.
        """
        if isinstance(normalizer, int | float) and not 0 < normalizer < math.inf:
            raise ValueError(f"normalizer must be > 0 and finite, got {normalizer}")
        logits = take_logits(student_logits, "student_logits")
        if hard_loss is not None:
            check_tensor("hard_loss", hard_loss)
            if hard_loss.ndim:
                raise ValueError(f"hard_loss must be a scalar, got shape {list(hard_loss.shape)}")
        if (unlabelled or labelled_share is not None) and labels is not None:
            if hard_loss is None:
                smoothing, parts = self.label_smoothing, (unlabelled, labelled_share)
                hard_loss = masked_hard_term(self.task, logits, labels, *parts, smoothing)
            labels = None
        terms = None
        if self._quick is not None and labels is not None and hard_loss is None and not self.terms:
            terms = self._quick_terms(logits, labels, inputs, index, view)
        if terms is None:
            terms = self._terms(logits, labels, inputs, index, view, hard_loss)
        if normalizer is None:
            return terms
        return {name: term * (len(logits) / normalizer) for name, term in terms.items()}

    def _terms(
        self,
        student_logits: Tensor,
        labels: Tensor | None,
        inputs: Any,
        index: Tensor | None,
        view: int,
        own_hard_loss: Tensor | None,
    ) -> dict[str, Tensor]:
        has_teacher = self.teacher is not None or self.targets is not None
        if labels is None and own_hard_loss is None and has_teacher and self.alpha != 1:
            raise ValueError(
                f"labels must be given at alpha {self.alpha}, got None: alpha must be 1 for "
                "unlabelled data, or the loss has a term of the labels"
            )
        if self.task != "single_label":
            labels = as_outputs(labels, student_logits)
        # further terms need the teacher at any alpha
        labels_only = self.alpha == 0 and not self.terms
        teacher_logits = None if labels_only else self._teacher_logits(inputs, index, view)
        if teacher_logits is None:
            loss = own_hard_loss
            if loss is None:
                loss = hard_term(
                    self.task, student_logits, labels, label_smoothing=self.label_smoothing
                )
            return _of_labels(loss)
        device = student_logits.device
        if isinstance(teacher_logits, SparseLogits | SampledTargets):
            teacher_logits = teacher_logits.to(device).map(detached)
        else:
            teacher_logits = detached(send(teacher_logits, device))
        if self.task != "single_label":
            teacher_logits = as_outputs(teacher_logits, student_logits)
        terms = task_terms(
            self.task,
            student_logits,
            teacher_logits,
            labels if own_hard_loss is None else None,
            temperature=self.temperature,
            alpha=self.alpha if own_hard_loss is None else 1.0,
            average=self.average,
            label_smoothing=self.label_smoothing,
            weights=self.weights,
            margin=self.margin,
        )
        named = terms._asdict()
        if own_hard_loss is not None:
            named["loss"] = weighted_sum(own_hard_loss, terms.loss, self.alpha)
            named["hard_loss"] = own_hard_loss.detach().clone()
        elif labels is None:
            del named["hard_loss"]
        further = self._further_terms(student_logits, teacher_logits, labels, index)
        for name, value in further.items():
            named["loss"] = named["loss"] + self.terms[name].weight * value
            named[name] = value.detach()
        return named

    def _quick_terms(
        self,
        student_logits: Tensor,
        labels: Tensor,
        inputs: Any,
        index: Tensor | None,
        view: int,
    ) -> dict[str, Tensor] | None:
        """Return the terms of labels alone or of few classes; None where others are computed."""
        if not self.alpha or (self.teacher is None and self.targets is None):
            smoothing = self.label_smoothing
            return _of_labels(hard_loss(student_logits, labels, label_smoothing=smoothing))
        if self._quick is None or not is_quick(student_logits, self.temperature):
            return None
        made_with = self.temperature, self.average, self.weights
        if self.teacher is None:
            rows = self._quick(index, view, *made_with)
        else:
            rows = soft_targets_of(self._teacher_logits(inputs, index, view), *made_with)
        settings = self.temperature, self.alpha, self.label_smoothing
        return None if rows is None else quick_terms(student_logits, rows, labels, *settings)

    def _further_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | SparseLogits | SampledTargets,
        labels: Tensor | None,
        index: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the further terms, unweighted."""
        values = logit_losses(self.terms, student_logits, teacher_logits, labels)
        if self._features is not None:
            trains = self._features.student.training or student_logits.requires_grad
            if trains:
                check_graph(student_logits, "student_logits")
            values |= self._features.losses(self.projections, trains=trains, index=index)
        elif len(values) < len(self.terms):
            raise ValueError("terms of features must have a student: distiller.attach(student)")
        return values

    @torch.no_grad()
    def _teacher_logits(
        self, inputs: Any, index: Tensor | None, view: int
    ) -> Tensor | SparseLogits | SampledTargets | None:
        if self.teacher is not None:
            if inputs is None:
                raise ValueError(
                    "inputs must be given where there is a teacher, got None: "
                    "distiller(student_logits, labels, inputs=inputs)"
                )
            if self._features is not None:
                return self._features.run_teacher(self.teacher, inputs)
            return take_logits(self.teacher(inputs), "teacher")
        if self.targets is not None:
            if index is None:
                raise ValueError(
                    "index must be given where targets are cached, got None: "
                    "distiller(student_logits, labels, index=index)"
                )
            logits = self.targets(index, view)
            if isinstance(logits, SparseLogits | SampledTargets):
                return logits
            return take_logits(logits, "targets")
        return None

    def __repr__(self) -> str:
        source = self.targets if self.teacher is None else self.teacher
        return f"Distiller({source}, temperature={self.temperature}, alpha={self.alpha})"


def _of_labels(loss: Tensor) -> dict[str, Tensor]:
    """Return the terms of a loss of labels alone."""
    return {"loss": loss, "hard_loss": loss.detach().clone()}


def _mean_over_processes(gradient: Tensor) -> Tensor:
    mean = gradient / dist.get_world_size()
    dist.all_reduce(mean)
    return mean
