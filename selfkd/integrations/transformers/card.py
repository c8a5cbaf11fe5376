"""Description of a distillation in the card of its student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from selfkd.integrations.transformers.inputs import bare


def describe_distillation(
    teachers: Sequence[nn.Module], settings: Mapping[str, float | str], *, cached: int = 0
) -> str:
    """Return a section of a model card: the teacher, or each member of an ensemble, and the loss.

    Args:
        teachers: Teachers.
        settings: Settings of the loss by name; those of 0 are left out.
        cached: Number of teachers whose logits were cached, in place of `teachers`.

    >>> print(describe_distillation([nn.Linear(2, 3)] * 2, {"alpha": 0.5, "hidden": 0.0}))
    <BLANKLINE>
    ### Distillation
    <BLANKLINE>
    The student was distilled with selfkd from an ensemble of 2 teachers:
    <BLANKLINE>
    - Linear, 9 parameters
    - Linear, 9 parameters
    <BLANKLINE>
    The loss had alpha 0.5.
    <BLANKLINE>
    """
    count = cached or len(teachers)
    of = "a teacher" if count == 1 else f"an ensemble of {count} teachers"
    of = f"the cached logits of {of}." if cached else f"{of}:"
    lines = [f"- {_describe(teacher)}" for teacher in teachers]
    loss = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
    parts = [
        f"The student was distilled with selfkd from {of}",
        *(["\n".join(lines)] if lines else []),
    ]
    return "\n### Distillation\n\n" + "\n\n".join([*parts, f"The loss had {loss}."]) + "\n"


def _describe(teacher: nn.Module) -> str:
    inside = bare(teacher)
    name = getattr(getattr(inside, "config", None), "_name_or_path", "")
    count = sum(parameter.numel() for parameter in teacher.parameters())
    return f"{f'`{name}`, ' if name else ''}{type(inside).__name__}, {count:,} parameters"
