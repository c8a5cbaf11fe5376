"""Operations of a run's models, counted by torch as they predict and are trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfkd.distill.outputs import take_logits
from selfkd.loading.choose import Chosen, choose_teachers
from selfkd.loading.costs import FinishedRun
from selfkd.results import EnsembleSummary, GenerationResult, Members, Model, Size
from selfkd.storage.rows import load_row
from selfkd.tasks import load_ensemble, load_predictor
from selfkd.tasks.task import Predictor


def count_operations(network: nn.Module, inputs: Tensor, *, training: bool = False) -> int:
    """Return the operations of a prediction, or of a training step, of one batch.

    Counted are matrix products, convolutions and attention, a multiplication and an addition as
    two, by `torch.utils.flop_counter.FlopCounterMode`; additions of biases, activations and
    normalisations are not. A training step is the forward and the backward pass: the loss and the
    optimiser are not counted, and neither is the gradient of the inputs, which nobody computes.

    Args:
        network: Network from inputs to logits, or to an output with logits.
        inputs: Its inputs.
        training: Whether the backward pass is counted too.

    >>> count_operations(nn.Linear(10, 20), torch.zeros(1, 10))
    400
    >>> count_operations(nn.Linear(10, 20), torch.zeros(1, 10), training=True)
    800
    """
    # attention kernels of the CPU are unknown to the counter, their mathematics are not
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(training), counter:
        logits = take_logits(network(inputs), "model")
        if training:
            torch.autograd.backward(logits.sum())
    network.zero_grad()
    found: int = counter.get_total_flops()
    return found


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations of a run's models, all per item."""

    teacher: float
    """Of a prediction by the teacher, of all its networks."""
    student: float
    """Of a prediction by the student."""
    student_step: float
    """Of training the student on it, forward and backward."""
    teacher_step: float | None
    """Of training the teachers on it, all of them; None where that is not known."""


def operations_of(run: FinishedRun) -> Operations:
    """Return the operations of a run's teacher and student, counted from their checkpoints.

    Raises:
        ValueError: A file is not there, or is of no network that can be made.
    """
    student = _load(run, Chosen(title="the student", models=[Model("", _student(run))]))
    teacher = _load(run, chosen := _teacher(run))
    steps = [
        _count(run, _load(run, Chosen(title="", models=[model])), training=True)
        for model in _trained(run, chosen)
    ]
    return Operations(
        teacher=_count(run, teacher),
        student=_count(run, student),
        student_step=_count(run, student, training=True),
        teacher_step=sum(steps) if steps else None,
    )


def _count(run: FinishedRun, predictor: Predictor, *, training: bool = False) -> float:
    operations = count_operations(predictor.network, predictor.example(), training=training)
    return operations / run.facts.items_an_input


def _student(run: FinishedRun) -> str:
    """Return the file of the student."""
    student = run.student
    if isinstance(student, Size):
        return student.checkpoint
    if isinstance(student, GenerationResult):
        return "".join(model.checkpoint for model in _models(run, student))
    return "student.safetensors"


def _models(run: FinishedRun, row: GenerationResult) -> list[Model]:
    """Return the chosen model of a generation, whose file its own folder names."""
    known = {result.generation: result for result in run.folder.results()}
    return list(known.get(row.generation, row).models[:1])


def _teacher(run: FinishedRun) -> Chosen:
    teacher = run.teacher
    if isinstance(teacher, GenerationResult):
        return Chosen(title="generation 0", models=_models(run, teacher))
    point = run.summary.chosen.point if isinstance(run.summary, EnsembleSummary) else {}
    return choose_teachers(run.folder, run.config.at(point))


def _trained(run: FinishedRun, teacher: Chosen) -> list[Model]:
    """Return the models that this run has trained to be its teacher."""
    trained = {trial.hash for trial in run.teacher_trials if trial.hash}
    members = run.folder.path / "members" / "result.json"
    if members.exists():
        rows = load_row(Members, members).members
        models = [Model(row.hash, row.checkpoint) for row in rows]
    else:
        models = list(teacher.models)
    return [model for model in models if model.hash in trained]


def _load(run: FinishedRun, chosen: Chosen) -> Predictor:
    if not chosen.models:
        raise ValueError(f"{chosen.title} has no file")
    files = [str(_file(run, chosen.title, model.checkpoint)) for model in chosen.models]
    if chosen.average is None:
        return load_predictor(files[0])
    weights = [model.weight for model in chosen.models if model.weight is not None] or None
    return load_ensemble(files, average="probabilities", weights=weights)


def _file(run: FinishedRun, title: str, name: str) -> Path:
    path = run.folder.file(name)
    if not name or not path.exists():
        raise ValueError(f"{title or 'a teacher'} has no file{f' {name}' if name else ''}")
    return path
