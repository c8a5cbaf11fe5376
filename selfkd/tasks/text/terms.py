"""Further terms of the loss of a batch of tokens: of logits, and of layers of models run live."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.config import Config
from selfkd.distill.named_terms import make_terms
from selfkd.distill.outputs import take_logits
from selfkd.distill.terms import FeatureTerm, FeatureTerms, LogitTerm
from selfkd.losses.moving import send, valid_rows
from selfkd.losses.sequences import TokenTeacher
from selfkd.tasks.common import teacher_weights, try_each_term
from selfkd.tasks.text.batches import Batch
from selfkd.tasks.text.networks import TextNetworks
from selfkd.training.predict import autocast
from selfkd.training.trial import Trial

Targets = Callable[[Batch], TokenTeacher]
"""Function from a batch to the teacher's logits of it."""


class FurtherTerms:
    """Further terms of a student's loss, over the tokens that count.

    Args:
        task: Text and networks.
        config: Config of the student.
        student: Network that is trained.
        teachers: Networks that are run live; none where their logits are cached.
        weights: Weight of each teacher in their average; equal when None.
        seed: Seed of the projections.
    """

    teachers: Sequence[nn.Module]
    """Networks that are run live."""
    projections: nn.ModuleDict
    """Projections of the terms, which the optimiser trains."""

    def __init__(
        self,
        task: TextNetworks,
        config: Config,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        *,
        weights: Sequence[float] | None,
        seed: int,
    ) -> None:
        distill = config.distill
        terms = make_terms(
            distill.terms,
            temperature=distill.temperature,
            average=distill.average,
            weights=weights,
            seed=seed,
        )
        self.teachers = teachers
        self._logits = {name: t for name, t in terms.items() if isinstance(t, LogitTerm)}
        layers = {name: t for name, t in terms.items() if isinstance(t, FeatureTerm)}
        self._weights = {name: term.weight for name, term in terms.items()}
        self._layers: FeatureTerms | None = None
        self.projections = nn.ModuleDict()
        if layers:
            if any(term.masked for term in layers.values()):
                for network in (student, *teachers):
                    return_attention(network)
            self._layers = FeatureTerms(layers, student, teachers, weights=weights)
            example = task.data.splits["train"].inputs(torch.arange(1)).to(task.device)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made = self._layers.make_projections(example, _runs(teachers))
            self.projections = made.to(task.device)

    def run(self, targets: Targets, batch: Batch) -> TokenTeacher:
        """Return the teacher's logits of a batch, with what terms of layers read of the teacher."""
        if self._layers is None:
            return targets(batch)
        found: Any = self._layers.run_teacher(targets, batch)  # type: ignore[arg-type]
        return found  # type: ignore[no-any-return]

    def close(self) -> None:
        """Stop to capture the student's layers."""
        if self._layers is not None:
            self._layers.close()

    def __call__(self, student: Tensor, teacher: TokenTeacher, batch: Batch) -> dict[str, Tensor]:
        """Return the terms, unweighted, as means over the tokens that count.

        Args:
            student: Logits of the student, `[batch, length, vocabulary]`.
            teacher: Logits of the teacher, or of several, `[members, batch, …]`.
            batch: Windows that are trained on.

        Raises:
            ValueError: Only some of the teacher's logits are cached.
        """
        mask = batch.valid
        if batch.weights is not None:
            mask = mask & (batch.weights > 0)
        values: dict[str, Tensor] = {}
        if self._logits:
            if not isinstance(teacher, Tensor):
                raise ValueError(f"{next(iter(self._logits))} needs all logits of the teacher")
            rows = valid_rows(teacher, mask, teacher.ndim - 3)
            own, labels = valid_rows(student, mask), send(batch.labels[mask], student.device)
            for name, term in self._logits.items():
                values[name] = term.loss(own, rows, labels)
        if self._layers is not None:
            trains = torch.is_grad_enabled()
            values |= self._layers.losses(self.projections, trains=trains, mask=mask)
        return values

    def added(
        self, terms: Mapping[str, Tensor], values: Mapping[str, Tensor], share: float
    ) -> dict[str, Tensor]:
        """Return terms of a loss with the further ones, of a part of a step.

        Args:
            terms: `loss` and its terms.
            values: Further terms.
            share: Share of the step's tokens that are in the batch.
        """
        found = dict(terms)
        for name, value in values.items():
            found["loss"] = found["loss"] + self._weights[name] * share * value
            found[name] = share * value.detach()
        return found


def make_further(task: TextNetworks, trial: Trial, student: nn.Module) -> FurtherTerms | None:
    """Return the further terms of a trial's loss; None without teachers or terms.

    Args:
        task: Text and networks.
        trial: Student and its teachers.
        student: Network that is trained.
    """
    distill, teachers = task.config.distill, trial.teachers
    if not teachers or not distill.terms:
        return None
    return FurtherTerms(
        task,
        task.config,
        student,
        load_teachers(task, trial) if distill.runs_teacher else [],
        weights=teacher_weights(teachers),
        seed=trial.seed,
    )


def load_teachers(task: TextNetworks, trial: Trial) -> list[nn.Module]:
    """Return the networks of a trial's teachers, to be run live."""
    checkpoints = [row["checkpoint"] for row in trial.teachers]
    with torch.random.fork_rng(devices=[]):  # a resumed training has restored its state
        return [task.load(path)[0].eval().requires_grad_(False) for path in checkpoints]


def return_attention(network: nn.Module) -> None:
    """Let a model of transformers compute its attention so that there are matrices to compare."""
    setting = getattr(network, "set_attn_implementation", None)
    if setting is not None:
        setting("eager")


def _runs(networks: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def run(inputs: Tensor) -> Tensor:
        found = [take_logits(network(inputs), "teacher") for network in networks]
        return torch.stack(found)

    return run


def _of_batch(network: nn.Module) -> Targets:
    return lambda batch: take_logits(network(batch.inputs), "teacher")


@torch.enable_grad()  # as in training, where each term must have a gradient
def try_terms(
    task: TextNetworks,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    choices: Iterable[Sequence[Mapping[str, Any]]],
) -> None:
    """Compute terms, one after the other, of two windows of the training text.

    Args:
        task: Text and networks.
        student: Network that is trained.
        teachers: Networks that may teach it.
        choices: Lists of terms that it may have.

    Raises:
        ValueError: One cannot be computed; names it.
    """
    data = task.data.splits["train"]
    windows = torch.arange(min(2, data.windows))
    batch = Batch(data.inputs(windows), data.labels_of(windows)).to(task.device)

    def compute(own: Config, teacher: nn.Module) -> None:
        further = FurtherTerms(task, own, student, [teacher], weights=None, seed=0)
        with autocast(task.device, task.precision):
            logits = take_logits(student(batch.inputs), "student")
            found = further.run(_of_batch(teacher), batch)
        further(logits, found, batch)
        further.close()

    try_each_term(task.config, choices, [teacher.eval() for teacher in teachers], compute)
