"""Terms of a distiller's loss by the names that a config gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from selfkd import losses
from selfkd.distill.contrast import ContrastTerm
from selfkd.distill.loss_names import LOSSES, NamedLoss, check_term
from selfkd.distill.terms import FeatureTerm, LogitTerm, Term, pooled
from selfkd.losses import Average, ensemble_logits, reconcile


class NamedTerm(Protocol):
    """A term as a config has it, `selfkd.config.TermConfig`."""

    @property
    def name(self) -> str:
        """Name of its loss."""

    @property
    def weight(self) -> float:
        """Weight in the loss."""

    @property
    def student(self) -> str | None:
        """Path of the student's layer; its logits when None."""

    @property
    def teacher(self) -> str | None:
        """Path of the teacher's layer; that of the student when None."""

    @property
    def project(self) -> bool:
        """Whether a projection is put between."""

    @property
    def args(self) -> Mapping[str, Any]:
        """Further arguments of the loss."""


def make_terms(
    terms: Iterable[NamedTerm],
    *,
    temperature: float,
    average: Average = "probabilities",
    weights: Sequence[float] | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Term]:
    """Return terms of a `Distiller` by name, of those of a config, as `config.distill.terms`.

    Logits are centred, each row less its mean, in losses that a number added to a row would change:
    no softmax sees it, and cached logits are without it. Layers whose outputs are maps are pooled:
    to the smaller of the two sizes for `hint`, to one vector for `rkd_distance`, `rkd_angle` and
    `crd`.

    Args:
        terms: Terms of a config.
        temperature: Temperature of losses that have one and are given none in `args`.
        average: Whether an ensemble's `probabilities` or `logits` are averaged.
        weights: Weights of the ensemble's members in that average; equal if not given.
        labels: Class of each training item `[items]`, which `crd` needs.
        seed: Seed of what `crd` draws.

    Returns:
        Terms by the name of their loss; where one stands several times, with its number from 0.

    Raises:
        ValueError: An unknown loss, arguments or layers that it does not take, or `crd` without
            `labels`.

    >>> from selfkd.config import Config
    >>> terms = [{"name": "hint", "student": "features.2", "weight": 3.0}, {"name": "logit_mse"}]
    >>> config = Config().at({"distill.terms": terms, "distill.terms.logit_mse.weight": 0.5})
    >>> made = make_terms(config.distill.terms, temperature=4.0)
    >>> [(name, term.weight) for name, term in made.items()]
    [('hint', 3.0), ('logit_mse', 0.5)]
    """
    terms = list(terms)
    found: dict[str, Term] = {}
    for key, term in zip(term_keys([term.name for term in terms]), terms, strict=True):
        check_term(
            term.name,
            student=term.student,
            teacher=term.teacher,
            project=term.project,
            args=term.args,
        )
        loss, args = LOSSES[term.name], dict(term.args)
        if loss.memory:
            found[key] = _contrast(term, labels, seed)
            continue
        if "temperature" in loss.args:
            args.setdefault("temperature", temperature)
        if term.student is None:
            averaging = partial(ensemble_logits, average=average, weights=weights)
            found[key] = LogitTerm(_OfLogits(loss, args, averaging), term.weight)
        else:
            found[key] = FeatureTerm(
                term.student,
                term.teacher,
                weight=term.weight,
                loss=_OfLayers(loss, args),
                project=term.project,
                masked=loss.attention,
            )
    return found


def _contrast(term: NamedTerm, labels: Tensor | None, seed: int) -> ContrastTerm:
    if labels is None or term.student is None:
        raise ValueError("labels must be given for crd: the class of each training item")
    args = dict(term.args)
    own = labels if args.pop("labels", True) else None
    return ContrastTerm(
        term.student,
        term.teacher,
        weight=term.weight,
        images=len(labels),
        labels=own,
        seed=seed,
        **args,
    )


def term_keys(names: Sequence[str]) -> list[str]:
    """Return names by which terms are told apart: their losses', with a number where one repeats.

    >>> term_keys(["hint", "pkt", "hint"])
    ['hint_0', 'pkt', 'hint_2']
    """
    return [
        name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)
    ]


@dataclass(frozen=True)
class _OfLogits:
    """A loss of logits, of several teachers of their average."""

    loss: NamedLoss
    args: Mapping[str, Any]
    average: Callable[[Tensor], Tensor]

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        if teacher.ndim == 3:
            teacher = self.average(teacher)
        if self.loss.shift:
            student, teacher = (
                rows - rows.mean(dim=-1, keepdim=True) for rows in (student, teacher)
            )
        function: Callable[..., Tensor] = getattr(losses, self.loss.function)
        of_labels = (labels,) if self.loss.labels else ()
        return function(student, teacher, *of_labels, **self.args)


@dataclass(frozen=True)
class _OfLayers:
    """A loss of the outputs of layers."""

    loss: NamedLoss
    args: Mapping[str, Any]

    def __call__(self, student: Tensor, teacher: Tensor, **mask: Tensor | None) -> Tensor:
        function: Callable[..., Tensor] = getattr(losses, self.loss.function)
        if self.loss.resized and student.ndim == teacher.ndim == 4:
            student, teacher = reconcile(student, teacher)
        if self.loss.same_shape and student.shape != teacher.shape:
            raise ValueError(
                f"layers must have outputs of one shape, got {list(student.shape[1:])} an item of "
                f"the student and {list(teacher.shape[1:])} of the teacher: other layers, or "
                "project: true for other channels"
            )
        if self.loss.pooled:
            student, teacher = pooled(student), pooled(teacher)
        if self.loss.lists:
            return function([student], [teacher], layer_map=[0], **mask)
        return function(student, teacher, **self.args, **mask)
