"""Initial weights of a student from the layers of a deeper teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from torch import nn

from selfkd.distill.layers import (
    check_shapes,
    copy_layers,
    modules_by_path,
    shapes_of,
    tensors_of,
)
from selfkd.losses.features import every_other

Choose = Callable[[int, int], Sequence[int]]
"""Indices of the teacher's layers, by the number of the student's layers and of the teacher's."""


def first_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """Return the first layers of the teacher, one for each layer of the student.

    Args:
        student_layers: Number of the student's layers.
        teacher_layers: Number of the teacher's layers, at least as many.

    Raises:
        ValueError: A teacher of fewer layers.

    >>> first_layers(2, 5)
    [0, 1]
    """
    if student_layers > teacher_layers:
        raise ValueError(
            f"teacher_layers must be at least student_layers ({student_layers}), got "
            f"{teacher_layers}"
        )
    return list(range(student_layers))


CHOICES: dict[str, Choose] = {"every_other": every_other, "first": first_layers}
"""Choices of a teacher's layers by their names in `train.init`."""


def match_layers(
    student: nn.Module, teacher: nn.Module, choose: Choose = every_other
) -> dict[str, str]:
    """Return the teacher's layer for each layer of a student, by path.

    Layers are the children of the lists (`nn.ModuleList`, `nn.Sequential`) that both models have at
    one path, such as the blocks of a transformer, of its encoder and its decoder, or of each stage
    of a residual network. Where the layers of a list differ in shape, as the first block of a stage
    does, the teacher's are chosen among those of the same shapes in the same place of the order.

    Args:
        student: Model with fewer layers, or as many.
        teacher: Model with more layers, or as many.
        choose: Choice among layers of the same shapes, by the numbers of both.

    Raises:
        ValueError: Models without such lists, a teacher with fewer layers than the student, or
            layers of unlike shapes.

    >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> student, teacher = (nn.Sequential(*(block() for _ in range(n))) for n in (2, 4))
    >>> match_layers(student, teacher)
    {'0': '1', '1': '3'}
    """
    students, teachers = modules_by_path(student), modules_by_path(teacher)
    mapping: dict[str, str] = {}
    for path, module in students.items():
        if not _is_list(module) or any(_is_inside(path, layer) for layer in mapping):
            continue
        other = teachers.get(path)
        if other is None or not _is_list(other):
            raise ValueError(
                f"teacher must have a list of layers {path!r} as the student has, got "
                f"{type(other).__name__}: give a map of paths"
            )
        mapping |= {
            _join(path, key): _join(path, source)
            for key, source in _match(path, module, other, choose).items()
        }
    if not mapping:
        raise ValueError(
            f"student must have a list of layers (nn.ModuleList or nn.Sequential), got "
            f"{type(student).__name__} without: give a map of paths"
        )
    return mapping


def layer_lists(model: nn.Module) -> list[str]:
    """Return the paths of a model's lists of layers that stand in no other such list.

    >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> layer_lists(nn.Sequential(nn.ModuleDict({"blocks": nn.Sequential(block(), block())})))
    ['']
    """
    found: list[str] = []
    for path, module in modules_by_path(model).items():
        if _is_list(module) and not any(_is_inside(path, outer) for outer in found):
            found.append(path)
    return found


def start_from_layers(
    student: nn.Module, teacher: nn.Module, mapping: Mapping[str, str]
) -> list[str]:
    """Initialise a student from its teacher: mapped layers, and all else that fits.

    What has a name and a shape in both models is copied too, such as embeddings, norms and the
    head; but not what stands in one list (`nn.ModuleList`, `nn.Sequential`) with a mapped layer.

    Args:
        student: Model whose weights are overwritten.
        teacher: Model whose weights are copied; it is not changed.
        mapping: Path of the teacher's submodule for each path of a submodule of the student, as of
            `match_layers`.

    Returns:
        Names of the student's parameters and buffers that are now the teacher's.

    Raises:
        ValueError: A map that does not fit, see `copy_layers`.

    >>> teacher = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    >>> student = nn.Sequential(*(nn.Linear(2, 2) for _ in range(2)))
    >>> start_from_layers(student, teacher, {"0": "3"})
    ['0.weight', '0.bias']

    Reference:
        Sanh et al., "DistilBERT, a distilled version of BERT", 2019,
        https://arxiv.org/abs/1910.01108
    """
    copied = copy_layers(student, teacher, mapping)
    modules = modules_by_path(student)
    above = {path.rpartition(".")[0] for path in mapping if path}
    kept = [path for path in above if isinstance(modules[path], nn.ModuleList | nn.Sequential)]
    ours, theirs = tensors_of(student), tensors_of(teacher)
    with torch.no_grad():
        for name, tensor in ours.items():
            own = not any(_is_inside(name, path) for path in (*mapping, *kept))
            if own and name in theirs and theirs[name].shape == tensor.shape:
                tensor.copy_(theirs[name])
                copied.append(name)
    return copied


def _is_inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _is_list(module: nn.Module | None) -> bool:
    """Say whether a module is a list of layers rather than of single operations."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    return any(
        next(layer.children(), None) is not None and next(layer.parameters(), None) is not None
        for layer in module
    )


def _match(path: str, student: nn.Module, teacher: nn.Module, choose: Choose) -> dict[str, str]:
    """Return the teacher's layer for each layer of a list, by their names in it."""
    ours, theirs = dict(student.named_children()), dict(teacher.named_children())
    if len(ours) == len(theirs):
        pairs = dict(zip(ours, theirs, strict=True))
        unlike = [
            ours[key]
            for key, own in pairs.items()
            if shapes_of(ours[key]) != shapes_of(theirs[own])
        ]
        if all(any(map(_is_list, layer.modules())) for layer in unlike):
            return {} if unlike else pairs  # stages, whose own lists are matched
    found: dict[str, str] = {}
    left = _alike(theirs)
    for keys in _alike(ours):
        shapes = shapes_of(ours[keys[0]])
        places = (n for n, other in enumerate(left) if shapes_of(theirs[other[0]]) == shapes)
        if (place := next(places, None)) is None:
            source = left[0][0] if left else next(reversed(theirs))
            named = (_join(path, keys[0]), ours[keys[0]], _join(path, source), theirs[source])
            check_shapes(*named)
            raise ValueError(f"{path!r} of the teacher must have as many layers like {named[0]!r}")
        sources, left = left[place], left[place + 1 :]
        try:
            chosen = choose(len(keys), len(sources))
        except ValueError as error:
            raise ValueError(f"layers of {path!r}: {error}") from None
        found |= {key: sources[number] for key, number in zip(keys, chosen, strict=True)}
    return found


def _alike(layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return the names of layers in groups of neighbours of the same shapes."""
    return [list(keys) for _, keys in groupby(layers, lambda key: shapes_of(layers[key]))]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")
