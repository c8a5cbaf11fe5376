"""Names of the losses that a config gives as further terms, and what each of them compares."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class NamedLoss:
    """A loss of `selfkd.losses` that has a name in a config."""

    function: str
    """Name of the function in `selfkd.losses`."""
    compares: Literal["logits", "layers", "both"]
    """What it compares: logits, outputs of layers, or either."""
    args: tuple[str, ...] = ()
    """Arguments that a term may give."""
    same_shape: bool = False
    """Whether layers must have outputs of one shape, which a projection can make."""
    shift: bool = False
    """Whether a number added to all logits of a row changes it, so that logits are centred."""
    labels: bool = False
    """Whether it takes the labels, too."""
    memory: bool = False
    """Whether it keeps embeddings of all training items, which is a term of its own."""
    resized: bool = False
    """Whether maps of two sizes are pooled to the smaller."""
    pooled: bool = False
    """Whether maps, and vectors of tokens, are pooled to one vector an item."""
    lists: bool = False
    """Whether it takes lists of layers, and pairs of their places."""
    attention: bool = False
    """Whether it compares attention matrices, and takes the mask of valid tokens."""
    unprojected: str = ""
    """Why no projection goes between layers, if none does."""


LOSSES = {
    "hint": NamedLoss("hint_loss", "both", same_shape=True, shift=True, resized=True),
    "attention": NamedLoss("attention_transfer", "layers", ("power",)),
    "similarity": NamedLoss("similarity_preserving", "both", shift=True),
    "pkt": NamedLoss("pkt", "both", shift=True),
    "rkd_distance": NamedLoss("rkd_distance", "both", shift=True, pooled=True),
    "rkd_angle": NamedLoss("rkd_angle", "both", shift=True, pooled=True),
    "crd": NamedLoss(
        "crd_loss",
        "layers",
        ("dim", "negatives", "temperature", "momentum", "labels"),
        memory=True,
        unprojected="which has projections of its own",
    ),
    "hidden_state": NamedLoss("hidden_state_loss", "layers", same_shape=True, lists=True),
    "cosine": NamedLoss("cosine_embedding", "both", same_shape=True, shift=True),
    "attention_matrices": NamedLoss(
        "attention_matrices", "layers", attention=True, unprojected="of any heads"
    ),
    "logit_mse": NamedLoss("logit_mse", "logits", shift=True),
    "soft_cross_entropy": NamedLoss("soft_cross_entropy", "logits", ("temperature",)),
    "reverse_kl": NamedLoss("reverse_kl", "logits", ("temperature",)),
    "jensen_shannon": NamedLoss("jensen_shannon", "logits", ("temperature", "beta")),
    "dkd": NamedLoss(
        "dkd_loss", "logits", ("temperature", "target_weight", "nontarget_weight"), labels=True
    ),
    "dist": NamedLoss("dist_loss", "logits", ("temperature", "inter_weight", "intra_weight")),
    "standardized": NamedLoss("standardized_loss", "logits", ("temperature",)),
    "hard_teacher": NamedLoss("hard_teacher_loss", "logits"),
}
"""Losses by name."""
_WHOLE = ("dim", "negatives")
"""Arguments that are whole numbers."""


def check_term(
    name: str, *, student: str | None, teacher: str | None, project: bool, args: Mapping[str, Any]
) -> None:
    """Raise ValueError for a term that no loss of that name can be.

    Args:
        name: Name of its loss.
        student: Path of the student's layer, if any.
        teacher: Path of the teacher's layer, if any.
        project: Whether a projection is put between.
        args: Its arguments by name.

    >>> check_term("hints", student=None, teacher=None, project=False, args={})
    Traceback (most recent call last):
    ...
    ValueError: name must be that of a loss, got 'hints': did you mean hint?
    """
    if name not in LOSSES:
        raise ValueError(f"name must be that of a loss, got {name!r}{_nearest(name, LOSSES)}")
    loss = LOSSES[name]
    if loss.compares == "layers" and student is None:
        raise ValueError(f"student must be the path of a layer for {name}, which compares layers")
    if loss.compares == "logits" and student is not None:
        raise ValueError(
            f"student must be left out for {name}, which compares logits, got {student!r}"
        )
    if teacher is not None and student is None:
        raise ValueError(f"student must be given with teacher, got {teacher!r} alone for {name}")
    if project and (student is None or loss.unprojected):
        why = loss.unprojected or "where logits are compared"
        raise ValueError(f"project must be false for {name}, {why}")
    for key, value in args.items():
        if key not in loss.args:
            raise ValueError(f"args must be those of {name}, got {key!r}{_nearest(key, loss.args)}")
        if key == "labels" and not isinstance(value, bool):
            raise ValueError(f"args.labels of {name} must be true or false, got {value!r}")
        if key != "labels" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"args.{key} of {name} must be a number, got {value!r}")
        if key in _WHOLE and not isinstance(value, int):
            raise ValueError(f"args.{key} of {name} must be a whole number, got {value!r}")


def describe_terms(terms: Iterable[Mapping[str, Any]]) -> str:
    """Return terms of a config in words: weight and name of each.

    >>> describe_terms([{"name": "hint", "weight": 0.1}, {"name": "pkt"}]), describe_terms([])
    ('0.1 hint + 1 pkt', 'none')
    """
    return " + ".join(f"{term.get('weight', 1):.3g} {term.get('name')}" for term in terms) or "none"


def _nearest(word: str, known: Collection[str]) -> str:
    """Return the end of a message on an unknown word."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    if close:
        return f": did you mean {', '.join(close)}?"
    return f" (known: {', '.join(known)})" if known else ", and it has none"
