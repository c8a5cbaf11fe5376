"""Losses of logits, and those of tokens without full logits: from the inputs of linear heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.distill.outputs import take_logits
from selfkd.distill.tasks import Task, as_outputs, hard_term, task_terms
from selfkd.distill.teacher import Teacher
from selfkd.integrations.transformers.inputs import bare, is_encoder_decoder, virtual_tokens
from selfkd.losses.moving import send
from selfkd.losses.sequences import (
    LinearLogits,
    SampledTargets,
    TokenTeacher,
    linear_sequence_terms,
    sequence_terms,
)
from selfkd.losses.sparse import SparseLogits

_PLAIN: WeakSet[nn.Linear] = WeakSet()
"""Heads whose outputs have been seen to be the logits."""

_CHUNK = 2**18
"""Logits computed at once."""


def logits_of(outputs: Any, model: nn.Module, name: str) -> Tensor:
    """Return the logits of a model's outputs, of the tokens of its inputs.

    Args:
        outputs: Outputs of the model.
        model: Model in any wrapper.
        name: Name of the model for the message.

    Raises:
        TypeError: Outputs of which it is not clear what the logits are, or that have none.
    """
    logits = take_logits(outputs, name)
    if logits.ndim < 2:
        raise TypeError(
            f"{name} must return logits [batch, classes] or [batch, length, vocabulary], got "
            f"{list(logits.shape)}: a loss alone cannot be distilled"
        )
    return logits[:, virtual_tokens(model) :] if logits.ndim == 3 else logits


def teacher_logits(outputs: Sequence[Any], teachers: Sequence[Teacher]) -> list[Tensor]:
    """Return the logits of each teacher's outputs."""
    pairs = zip(outputs, teachers, strict=True)
    return [logits_of(output, teacher.module, "teacher") for output, teacher in pairs]


def check_linear_head(model: nn.Module, name: str) -> nn.Linear:
    """Return the linear head of a model of token logits.

    Args:
        model: Model of transformers in any wrapper.
        name: Name of the model for the message.

    Raises:
        ValueError: A head that is not exactly `nn.Linear`, as quantised or adapted ones, or none.
    """
    inside = bare(model)
    head = getattr(inside, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"full_logits must be True where the {name} has no plain linear head, got "
            f"{type(head).__name__} of {type(inside).__name__}"
        )
    return head


def run_to_head(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, LinearLogits]:
    """Return a model's outputs, with logits of the first token only, and its logits as linear ones.

    Args:
        model: Model of transformers in any wrapper, through which it is called.
        inputs: Keywords of its forward.

    Raises:
        ValueError: Logits that are not those of the linear head, but scaled or capped.
    """
    head = check_linear_head(model, "model")
    given = dict(inputs)
    if is_encoder_decoder(model) and given.get("labels") is not None:
        # its own loss of the labels needs all logits
        labels = given.pop("labels")
        if given.get("decoder_input_ids") is None:
            prepare = bare(model).prepare_decoder_input_ids_from_labels
            given["decoder_input_ids"] = prepare(labels=labels)
    with _first_token(head) as states:
        outputs = model(**given)
    (hidden,) = states
    logits = take_logits(outputs, "model")
    with torch.no_grad():
        expected = F.linear(hidden[:, :1], head.weight, head.bias)
    if head not in _PLAIN and not torch.equal(logits.detach().to(expected.dtype), expected):
        raise ValueError(
            f"full_logits must be True for {type(bare(model)).__name__}, whose logits are not "
            "those of its linear head alone (scaled or capped)"
        )
    _PLAIN.add(head)  # once is enough, as a GPU is waited for
    return outputs, LinearLogits(hidden[:, virtual_tokens(model) :], head.weight, head.bias)


@contextmanager
def _first_token(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Let a head compute the first token's logits only, and collect its inputs."""
    states: list[Tensor] = []

    def cut(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states.append(inputs[0])
        return (inputs[0][:, :1], *inputs[1:])

    handle = head.register_forward_pre_hook(cut)
    try:
        yield states
    finally:
        handle.remove()


def averaged(
    teachers: Sequence[Tensor], columns: Sequence[Sequence[int] | None], like: Tensor
) -> Tensor:
    """Return the logits of several teachers as those of members, of one teacher as they are.

    Args:
        teachers: Logits of each teacher.
        columns: Logit of each teacher for each class of the student, None for the same order.
        like: Tensor on the device of the student's logits.
    """
    pairs = zip(teachers, columns, strict=True)
    members = [
        (logits if order is None else logits[..., order]).to(like.device) for logits, order in pairs
    ]
    if len(members) == 1:
        return members[0]
    least = min(logits.shape[-1] for logits in members)  # of padded vocabularies
    return torch.stack([logits[..., :least] for logits in members])


def loss_terms(
    task: Task,
    student: Tensor | LinearLogits,
    teacher: TokenTeacher | None,
    labels: Any,
    *,
    vocabulary: int | None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Return the loss and its terms by name, of rows or tokens.

    Args:
        task: Kind of labels.
        student: Logits `[batch, classes]` or `[batch, length, vocabulary]`.
        teacher: Logits of as many rows and tokens, also those of members, sparse or sampled; None
            for the hard loss alone.
        labels: Labels `[batch]`, `[batch, length]`, or `[batch, classes]` of several labels.
        vocabulary: Number of the first classes compared, None for all.
        settings: Keywords of `selfkd.losses.sequence_terms`.

    Raises:
        ValueError: A divergence or a number of classes that the task does not have.
    """
    logits = student.hidden if isinstance(student, LinearLogits) else student
    if task != "single_label":
        share = len(logits) / settings.pop("normalizer")
        terms = _task_terms(task, logits, teacher, labels, **settings)
        return {name: term * share for name, term in terms.items()}
    if logits.shape[-1] < 2:
        raise ValueError(
            f"student must have at least 2 classes, got logits {list(logits.shape)}: "
            "problem_type='regression' of its configuration is for numbers"
        )
    if teacher is None:  # of which nothing is taken
        rows = torch.zeros(labels.shape, device=logits.device)
        first = torch.zeros_like(rows, dtype=torch.int64)[..., None]
        settings |= {"alpha": 0.0, "divergence": "forward_kl"}
        sparse = SparseLogits(rows[..., None], first, rows)
        terms = loss_terms(task, student, sparse, labels, vocabulary=None, **settings)
        del terms["soft_loss"]
        return terms
    if isinstance(teacher, SparseLogits | SampledTargets):
        vocabulary = None  # other classes are of the rest
    classes = len(student.weight) if isinstance(student, LinearLogits) else logits.shape[-1]
    # tokens at once: of few classes more, as each chunk costs time of its own
    settings |= {"vocabulary": vocabulary, "chunk": min(max(_CHUNK // classes, 64), 256)}
    there = logits.device
    teacher = send(teacher, there) if isinstance(teacher, Tensor) else teacher.to(there)
    if isinstance(student, LinearLogits):
        hidden, weight, bias = student
        return linear_sequence_terms(
            hidden, weight, teacher, labels, bias=bias, **settings
        )._asdict()
    if labels.ndim == 1:  # a row with one label is a sequence of one token
        student, labels, teacher = student[:, None], labels[:, None], _as_tokens(teacher)
    if isinstance(teacher, Tensor):
        teacher = teacher[..., :vocabulary]
    return sequence_terms(student, teacher, labels, **settings)._asdict()


def _task_terms(
    task: Task,
    student: Tensor,
    teacher: Any,
    labels: Any,
    *,
    divergence: str,
    beta: float,
    **settings: Any,
) -> dict[str, Tensor]:
    if divergence != "forward_kl":
        raise ValueError(f"divergence must be 'forward_kl' for {task} labels, got another")
    if teacher is None:
        smoothing = settings["label_smoothing"]
        loss = hard_term(task, student, as_outputs(labels, student), label_smoothing=smoothing)
        return {"loss": loss, "hard_loss": loss.detach()}
    teacher = teacher.to(student.device)
    return task_terms(
        task, student, teacher, labels, weights=None, margin=0.0, **settings
    )._asdict()


def _as_tokens(teacher: Any) -> Any:
    """Return the logits of rows as those of sequences of one token."""
    if isinstance(teacher, Tensor):
        return teacher.unsqueeze(-2)
    if isinstance(teacher, SparseLogits):
        values, indices, rest, grid = teacher
        return SparseLogits(
            values.unsqueeze(-2), indices.unsqueeze(-2), rest.unsqueeze(-1),
            None if grid is None else grid.unsqueeze(-2),
        )  # fmt: skip
    return teacher.map(lambda tensor: tensor.unsqueeze(-2))
