"""Further terms of a distiller's loss, between features or between logits of the networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.distill.features import Features
from selfkd.distill.layers import unwrap
from selfkd.distill.outputs import check_graph
from selfkd.distill.teacher import set_eval
from selfkd.losses.distillation import is_nan
from selfkd.losses.features import Projection, hint_loss, reconcile
from selfkd.losses.moving import valid_rows
from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits


@dataclass(frozen=True)
class FeatureTerm:
    """A loss between the outputs of submodules of student and teacher.

    Args:
        student: Path of the student's submodule, as in `named_modules`; `*` between dots matches
            several.
        teacher: Path of the teacher's submodule; the student's path if not given.
        weight: Weight of this term in the loss, at least 0.
        loss: Function of the student's and the teacher's features; with several submodules, the
            mean over pairs is taken. For `hint_loss`, feature maps of different sizes are pooled to
            the smaller (`reconcile`).
        project: Channels of the student and of the teacher between which a trained `Projection` is
            put, as hints need if they differ, or True for those that an example's features have.
            Its parameters are `distiller.parameters()`.
        masked: Whether `loss` compares attention matrices, and takes the `mask` of valid tokens;
            else it is given features of these alone.

    Raises:
        ValueError: A weight below 0.

    >>> FeatureTerm("layer2", "layer3", weight=0.5).loss.__name__
    'hint_loss'
    """

    student: str
    teacher: str | None = None
    weight: float = 1.0
    loss: Callable[..., Tensor] = hint_loss
    project: tuple[int, int] | bool | None = None
    masked: bool = False

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    @property
    def of_teacher(self) -> str:
        """Path of the teacher's submodule."""
        return self.student if self.teacher is None else self.teacher

    def make_projection(self, student: int, teacher: int) -> nn.Module:
        """Return what is trained between features of so many channels."""
        return Projection(student, teacher)

    def compare(
        self,
        student: Tensor,
        teacher: Tensor,
        module: nn.Module | None,
        *,
        index: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Return the loss of a pair of features.

        Args:
            student: Features of the student.
            teacher: Features of the teacher.
            module: What `make_projection` has made, if anything.
            index: Indices of the items `[batch]`.
            mask: Validity of each token `[batch, tokens]`; the others are left out.
        """
        if module is not None:
            student = module(student.to(next(module.parameters()).dtype))
        if mask is not None and self.masked:
            return self.loss(student, teacher, mask=mask)
        if mask is not None:
            student, teacher = _valid_rows(student, mask), _valid_rows(teacher, mask)
        if self.loss is hint_loss and student.ndim == teacher.ndim == 4:
            student, teacher = reconcile(student, teacher)
        return self.loss(student, teacher)


@dataclass(frozen=True)
class LogitTerm:
    """A loss between the logits of student and teacher, such as those of `selfkd.losses.logits`.

    Args:
        loss: Function of student logits, teacher logits and labels.
        weight: Weight of this term in the loss, at least 0.

    Raises:
        ValueError: A weight below 0.

    >>> from selfkd.losses.logits import dist_loss
    >>> term = LogitTerm(lambda z_s, z_t, y: dist_loss(z_s, z_t, temperature=4.0), weight=2.0)
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)


Term = LogitTerm | FeatureTerm


def parse_terms(terms: Mapping[str, Term | Mapping[str, Any]]) -> dict[str, Term]:
    """Return the terms by name, with mappings turned into feature terms.

    Args:
        terms: Terms by name; a mapping has the arguments of a `FeatureTerm`.

    Raises:
        ValueError: A name that another term of the loss has.
    """
    reserved = [name for name in terms if name in ("loss", "hard_loss", "soft_loss")]
    if reserved:
        raise ValueError(f"terms must have names of their own, got {reserved[0]!r}")
    return {
        name: FeatureTerm(**term) if isinstance(term, Mapping) else term
        for name, term in terms.items()
    }


def logit_losses(
    terms: Mapping[str, Term],
    student_logits: Tensor,
    teacher_logits: Tensor | SparseLogits | SampledTargets,
    labels: Tensor | None,
) -> dict[str, Tensor]:
    """Return the loss of each term of logits, unweighted, with its graph.

    Args:
        terms: Terms by name; those of features are left out.
        student_logits: Logits `[batch, classes]`.
        teacher_logits: Logits of the same shape, or of an ensemble, `[members, batch, classes]`.
        labels: Labels of the batch; None suits the losses that do not read them.

    Raises:
        ValueError: Not all logits of the teacher are there, or a loss needs labels.
    """
    values: dict[str, Tensor] = {}
    for name, term in terms.items():
        if not isinstance(term, LogitTerm):
            continue
        if not isinstance(teacher_logits, Tensor):
            kind = "samples" if isinstance(teacher_logits, SampledTargets) else "the largest"
            raise ValueError(f"{name} needs all logits of the teacher, got {kind}")
        try:
            values[name] = term.loss(student_logits, teacher_logits, labels)  # type: ignore[arg-type]
        except (AttributeError, TypeError, ValueError) as error:
            if labels is not None or "None" not in str(error):
                raise
            raise ValueError(
                f"labels must be given for the term {name!r}, got None: {error}"
            ) from error
    return values


class FeatureTerms:
    """Feature terms of a distiller: captures the features of the networks and computes the losses.

    Of several teachers, a term is the mean of its losses to each of them.

    Args:
        terms: Feature terms by name.
        student: Model whose features are captured in each forward pass, until `close`.
        teachers: Modules of the teachers, whose features are captured in `run_teacher`.
        weights: Weights of the teachers in that mean, with sum 1; equal if not given.

    Raises:
        ValueError: A path of no submodule, or paths that match different numbers of submodules of
            student and teacher.
    """

    def __init__(
        self,
        terms: Mapping[str, FeatureTerm],
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module],
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        teachers = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
        self._terms = terms
        self._weights = weights or [1 / len(teachers)] * len(teachers)
        self.student = unwrap(student)
        self._model = student
        of_student = [(name, term.student, term.masked) for name, term in terms.items()]
        of_teacher = [(name, term.of_teacher, term.masked) for name, term in terms.items()]
        self._student = _Captured(student, of_student, "student")
        self._teachers = [
            _Captured(module, of_teacher, "teacher", detach=True) for module in teachers
        ]
        for term in terms.values():
            self._check_count(term)
        self._student.__enter__()

    def close(self) -> None:
        """Remove the hooks from the student."""
        self._student.__exit__(None, None, None)

    def make_projections(
        self, example: Any = None, teacher: Callable[[Any], Tensor] | None = None
    ) -> nn.ModuleDict:
        """Make the projections of the terms, one for each pair of submodules.

        Args:
            example: Inputs on which student and teacher are run once, so that channels are known;
                needed where a term does not say them.
            teacher: Function that runs the teachers.

        Raises:
            ValueError: A term does not say its channels, and there is no example.
        """
        unknown = [name for name, term in self._terms.items() if term.project is True]
        if unknown and (example is None or teacher is None):
            raise ValueError(
                f"example must be given for the channels of {', '.join(unknown)}: some inputs of "
                "student and teacher"
            )
        if unknown and teacher is not None:
            self._run(example, teacher)
        modules = nn.ModuleDict()
        for name, term in self._terms.items():
            for of in range(len(self._teachers)):
                for number in range(self._student.count(term.student, attention=term.masked)):
                    found = self._channels(term, of, number)
                    if found is not None:
                        modules[self._key(name, number, of)] = term.make_projection(*found)
        return modules

    @torch.no_grad()
    def _run(self, inputs: Any, teacher: Callable[[Any], Tensor]) -> None:
        """Run student and teachers on inputs, in eval mode."""
        training = set_eval(self._model)
        self._model(inputs)
        for part in training:
            part.training = True
        self.run_teacher(teacher, inputs)

    def _channels(self, term: FeatureTerm, teacher: int, number: int) -> tuple[int, int] | None:
        """Return the channels between which a term has a projection, if it has one."""
        if term.project is not True:
            return term.project or None
        student, other = self._pairs(term, teacher)[number]
        return channels(student), channels(other)

    def run_teacher(self, teacher: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        """Return the teacher logits and capture the teachers' features."""
        with ExitStack() as stack:
            for features in self._teachers:
                stack.enter_context(features)
            return teacher(inputs)

    def losses(
        self,
        projections: nn.ModuleDict,
        *,
        trains: bool,
        index: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of each term, unweighted, with its graph.

        Args:
            projections: Result of `make_projections`.
            trains: Whether the student is trained by this batch, so that its features must have a
                graph.
            index: Indices of the items `[batch]`, which contrastive terms need.
            mask: Validity of each token `[batch, tokens]`, where features are of tokens.

        Raises:
            ValueError: NaN in a feature of the teacher (checked on the CPU only), or a feature of
                the student without a graph, of a term with a weight.
        """
        return {
            name: self._loss(name, term, projections, trains, index, mask)
            for name, term in self._terms.items()
        }

    def _loss(
        self,
        name: str,
        term: FeatureTerm,
        projections: nn.ModuleDict,
        trains: bool,
        index: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        losses, modules = [], dict(projections.items())
        for of, weight in enumerate(self._weights):
            each = []
            for number, (student, teacher) in enumerate(self._pairs(term, of)):
                if term.weight and trains:
                    check_graph(student, f"feature {term.student!r} of the student, of {name!r},")
                key = self._key(name, number, of)
                loss = term.compare(student, teacher, modules.get(key), index=index, mask=mask)
                each.append(loss)
                if is_nan(each[-1].detach()):
                    _check_no_nan(name, term.of_teacher, teacher)
            mean = torch.stack(each).mean()
            losses.append(mean if len(self._weights) == 1 else weight * mean)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _pairs(self, term: FeatureTerm, of: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the pairs of features of student and a teacher that are compared."""
        students = self._student.of(term.student, attention=term.masked)
        teachers = self._teachers[of].of(term.of_teacher, attention=term.masked)
        pairs = zip(students, teachers, strict=True)
        return [(student, teacher.to(student.device)) for student, teacher in pairs]

    def _check_count(self, term: FeatureTerm) -> None:
        count = self._student.count(term.student, attention=term.masked)
        for teacher in self._teachers:
            expected = teacher.count(term.of_teacher, attention=term.masked)
            if count != expected:
                raise ValueError(
                    f"{term.student!r} must name as many submodules as {term.of_teacher!r} "
                    f"({expected}), got {count}"
                )

    def _key(self, name: str, number: int, teacher: int) -> str:
        several = f"_{teacher}" if len(self._teachers) > 1 else ""
        return f"{name.replace('.', '_')}_{number}{several}"


def channels(features: Tensor) -> int:
    """Return the number of channels of maps `[batch, channels, height, width]`, or the width.

    >>> channels(torch.zeros(2, 3, 8, 8)), channels(torch.zeros(2, 5, 16))
    (3, 16)
    """
    return features.shape[1 if features.ndim == 4 else -1]


def pooled(features: Tensor) -> Tensor:
    """Return one vector an item: the mean over positions of maps, over tokens of sequences.

    >>> pooled(torch.ones(2, 3, 4, 4)).shape, pooled(torch.ones(2, 5, 16)).shape
    (torch.Size([2, 3]), torch.Size([2, 16]))
    """
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features


class _Captured:
    """Features of a model by the paths of its terms; of some, attention matrices.

    Args:
        model: Model whose features are captured.
        paths: Name and path of each term, and whether it is of attention matrices.
        whose: Whose model it is, for messages.
        detach: Whether to leave out the graph.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[tuple[str, str, bool]],
        whose: str,
        *,
        detach: bool = False,
    ) -> None:
        for name, path, _ in paths:
            try:
                Features(model, [path])
            except ValueError as error:
                raise ValueError(f"{name}: {whose}'s {error}") from None
        self._features = {
            kind: Features(model, list(dict.fromkeys(own)), detach=detach, attention=kind)
            for kind in (False, True)
            if (own := [path for _, path, of in paths if of == kind])
        }

    def __enter__(self) -> None:
        for features in self._features.values():
            features.__enter__()

    def __exit__(self, *error: Any) -> None:
        for features in self._features.values():
            features.__exit__(None, None, None)

    def of(self, path: str, *, attention: bool) -> list[Tensor]:
        """Return the features of a path, one for each submodule."""
        found = self._features[attention][path]
        return found if isinstance(found, list) else [found]

    def count(self, path: str, *, attention: bool) -> int:
        """Return the number of submodules of a path."""
        return self._features[attention].count(path)


def check_paths(terms: Mapping[str, FeatureTerm], student: nn.Module) -> None:
    """Raise ValueError if a term's path is that of no submodule of the student."""
    if terms:
        Features(student, [term.student for term in terms.values()])


def _valid_rows(features: Tensor, mask: Tensor) -> Tensor:
    """Return the features of valid tokens, `[tokens, …]`."""
    if features.shape[:2] != mask.shape:
        expected = ", ".join(map(str, mask.shape))
        raise ValueError(
            f"features must be of tokens, [{expected}, …], got {list(features.shape)}: another "
            "layer"
        )
    return valid_rows(features, mask)


def _check_no_nan(name: str, path: str, features: Tensor) -> None:
    rows = features.flatten(1).isnan().any(dim=1).nonzero()
    if len(rows):
        raise ValueError(
            f"features {path!r} of the teacher must be numbers for {name}, got nan in row "
            f"{int(rows[0])}"
        )


def _check_weight(weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be at least 0 and finite, got {weight}")
