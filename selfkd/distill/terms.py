"""Further terms of a distiller's loss, between features or between logits of the networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.distill.features import Features
from selfkd.distill.layers import unwrap
from selfkd.distill.outputs import check_graph
from selfkd.losses.distillation import is_nan
from selfkd.losses.features import Projection, hint_loss, reconcile


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
            put, as hints need if they differ. Its parameters are `distiller.parameters()`.

    Raises:
        ValueError: A weight below 0.

    >>> FeatureTerm("layer2", "layer3", weight=0.5).loss.__name__
    'hint_loss'
    """

    student: str
    teacher: str | None = None
    weight: float = 1.0
    loss: Callable[[Tensor, Tensor], Tensor] = hint_loss
    project: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    @property
    def of_teacher(self) -> str:
        """Path of the teacher's submodule."""
        return self.student if self.teacher is None else self.teacher


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


class FeatureTerms:
    """Feature terms of a distiller: captures the features of both networks and computes the losses.

    Args:
        terms: Feature terms by name.
        student: Model whose features are captured in each forward pass, until `close`.
        teacher: Module of the teacher, whose features are captured in `run_teacher`.

    Raises:
        ValueError: A path of no submodule, or paths that match different numbers of submodules of
            student and teacher.
    """

    def __init__(
        self, terms: Mapping[str, FeatureTerm], student: nn.Module, teacher: nn.Module
    ) -> None:
        self._terms = terms
        self.student = unwrap(student)
        paths = list(dict.fromkeys(term.student for term in terms.values()))
        self._student = Features(student, paths)
        of_teacher = list(dict.fromkeys(term.of_teacher for term in terms.values()))
        self._teacher = Features(teacher, of_teacher, detach=True)
        for term in terms.values():
            self._check_count(term)
        self._student.__enter__()

    def close(self) -> None:
        """Remove the hooks from the student."""
        self._student.__exit__(None, None, None)

    def make_projections(self) -> nn.ModuleDict:
        """Make the projections of the terms, one for each pair of submodules."""
        return nn.ModuleDict(
            {
                _key(name, number): Projection(*term.project)
                for name, term in self._terms.items()
                if term.project is not None
                for number in range(self._student.count(term.student))
            }
        )

    def run_teacher(self, teacher: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        """Return the teacher logits and capture the teacher's features."""
        with self._teacher:
            return teacher(inputs)

    def losses(self, projections: nn.ModuleDict, *, trains: bool) -> dict[str, Tensor]:
        """Return the loss of each term, unweighted, with its graph.

        Args:
            projections: Result of `make_projections`.
            trains: Whether the student is trained by this batch, so that its features must have a
                graph.

        Raises:
            ValueError: NaN in a feature of the teacher (checked on the CPU only), or a feature of
                the student without a graph, of a term with a weight.
        """
        return {
            name: self._loss(name, term, projections, trains) for name, term in self._terms.items()
        }

    def _loss(
        self, name: str, term: FeatureTerm, projections: nn.ModuleDict, trains: bool
    ) -> Tensor:
        losses = []
        for number, (student, teacher) in enumerate(self._pairs(term)):
            if term.weight and trains:
                check_graph(student, f"feature {term.student!r} of the student, of {name!r},")
            if term.project is not None:
                projection = projections[_key(name, number)]
                student = projection(student.to(next(projection.parameters()).dtype))
            if term.loss is hint_loss and student.ndim == teacher.ndim == 4:
                student, teacher = reconcile(student, teacher)
            losses.append(term.loss(student, teacher))
            if is_nan(losses[-1].detach()):
                _check_no_nan(name, term.of_teacher, teacher)
        return torch.stack(losses).mean()

    def _pairs(self, term: FeatureTerm) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the pairs of features of student and teacher that are compared."""
        student, teacher = self._student[term.student], self._teacher[term.of_teacher]
        students = student if isinstance(student, list) else [student]
        teachers = teacher if isinstance(teacher, list) else [teacher]
        pairs = zip(students, teachers, strict=True)
        return [(student, teacher.to(student.device)) for student, teacher in pairs]

    def _check_count(self, term: FeatureTerm) -> None:
        count, expected = self._student.count(term.student), self._teacher.count(term.of_teacher)
        if count != expected:
            raise ValueError(
                f"{term.student!r} must name as many submodules as {term.of_teacher!r} "
                f"({expected}), got {count}"
            )


def check_paths(terms: Mapping[str, FeatureTerm], student: nn.Module) -> None:
    """Raise ValueError if a term's path is that of no submodule of the student."""
    if terms:
        Features(student, [term.student for term in terms.values()])


def _key(name: str, number: int) -> str:
    return f"{name.replace('.', '_')}_{number}"


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
