"""Submodules by their paths inside any wrapper, and copying a teacher's layers to a student."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module")
"""Attributes in which `torch.compile` and `FullyShardedDataParallel` hold the wrapped module."""


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers of `torch.compile`, (distributed) data parallelism or FSDP.

    >>> model = nn.Linear(4, 3)
    >>> unwrap(DataParallel(torch.compile(model))) is model
    True
    """
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
            continue
        inner = (getattr(module, name, None) for name in _WRAPPED)
        original = next((found for found in inner if isinstance(found, nn.Module)), None)
        if original is None:
            return module
        module = original


def check_whole(name: str, module: nn.Module) -> None:
    """Raise ValueError if this process has only a shard of the parameters, as under FSDP."""
    sharded = any(hasattr(value, "full_tensor") for value in module.parameters()) or any(
        _WRAPPED[1] in part._modules for part in module.modules()
    )
    if sharded:
        raise ValueError(
            f"{name} must have its parameters whole, got shards of {type(module).__name__}: load "
            "its full state dict into a fresh network on every rank, and give that "
            "(get_model_state_dict of torch.distributed.checkpoint.state_dict, full_state_dict)"
        )


def copy_layers(student: nn.Module, teacher: nn.Module, mapping: Mapping[str, str]) -> list[str]:
    """Initialise layers of a student from a teacher's by copying parameters and buffers in place.

    Nothing is copied if anything does not fit, and no memory is shared afterwards. Of tensors that
    are one in the student, such as tied embeddings, and several in the teacher, the last is copied.

    Args:
        student: Model whose layers are overwritten.
        teacher: Model whose layers are copied; it is not changed.
        mapping: Path of the teacher's submodule for each path of a submodule of the student.

    Returns:
        Names of the student's parameters and buffers that are now the teacher's.

    Raises:
        TypeError: A student or teacher that is no `nn.Module`.
        ValueError: A path of no submodule, or submodules whose names or shapes differ.

    >>> teacher = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    >>> student = nn.Sequential(*(nn.Linear(2, 2) for _ in range(2)))
    >>> copy_layers(student, teacher, {"0": "1", "1": "3"})
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> torch.equal(student[1].weight, teacher[3].weight)
    True

    Reference:
        Sanh et al., "DistilBERT, a distilled version of BERT", 2019,
        https://arxiv.org/abs/1910.01108
    """
    students, teachers = modules_by_path(student), modules_by_path(teacher)
    copies: dict[str, tuple[Tensor, Tensor]] = {}
    for path, source in mapping.items():
        check_path(path, students)
        check_path(source, teachers)
        check_shapes(path, students[path], source, teachers[source])
        tensors, sources = tensors_of(students[path]), tensors_of(teachers[source])
        copies |= {f"{path}.{key}".lstrip("."): (tensors[key], sources[key]) for key in tensors}
    with torch.no_grad():
        for tensor, value in copies.values():
            tensor.copy_(value)
    last = {id(tensor): value for tensor, value in copies.values()}
    return [
        name
        for name, (tensor, value) in copies.items()
        if last[id(tensor)] is value or torch.equal(last[id(tensor)], value)
    ]


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules of a model by path, in order, as if nothing were wrapped.

    Raises:
        TypeError: A model that is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules: dict[str, nn.Module] = {}
    for path, module in unwrap(model).named_modules(remove_duplicate=False):
        # the wrapper of a submodule rather than the submodule inside: its hooks always run
        modules.setdefault(".".join(p for p in path.split(".") if p not in _WRAPPED), module)
    return modules


def check_path(path: str, modules: Iterable[str]) -> None:
    """Raise ValueError for a path that is none of `modules`."""
    if path not in modules:
        raise ValueError(unknown_path_message(path, modules))


def unknown_path_message(path: str, modules: Iterable[str]) -> str:
    """Return the message of the error for a path that no submodule has."""
    names = [name for name in modules if name]
    close = difflib.get_close_matches(path, names) or names[:3]
    return f"path must be that of a submodule ({', '.join(close)}, ...), got {path!r}"


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name, those that are one under each name."""
    named: dict[str, Tensor] = dict(unwrap(module).named_parameters(remove_duplicate=False))
    return named | dict(unwrap(module).named_buffers(remove_duplicate=False))


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of the parameters and buffers of a module by name."""
    return {name: list(tensor.shape) for name, tensor in tensors_of(module).items()}


def check_shapes(path: str, module: nn.Module, source: str, other: nn.Module) -> None:
    """Raise ValueError if a submodule of a student has not the tensors of one of its teacher."""
    shapes, expected = shapes_of(module), shapes_of(other)
    if shapes == expected:
        return
    fault = next(key for key in {**expected, **shapes} if shapes.get(key) != expected.get(key))
    raise ValueError(
        f"{path!r} of the student must have {fault!r} of shape {expected.get(fault)} as "
        f"{source!r} of the teacher, got {shapes.get(fault)}"
    )
