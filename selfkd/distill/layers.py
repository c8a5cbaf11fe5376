"""Submodules by their paths, what is wrapped around them, and starting them from a teacher's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module")
"""Where `torch.compile` and `FullyShardedDataParallel` keep what they are put around."""


def unwrap(module: nn.Module) -> nn.Module:
    """Return what compiling, (distributed) data parallelism or FSDP were put around.

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
    """Raise ValueError where this process has but a shard of the parameters, as under FSDP."""
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
    """Start layers of a student from a teacher's: copies parameters and buffers, in place.

    Nothing is copied where anything does not fit, and nothing is shared afterwards.

    Args:
        student: is changed.
        teacher: is not.
        mapping: path of a submodule of the student -> path of the teacher's that it starts from.

    Returns:
        Names of the student's parameters and buffers that were copied to.

    Raises:
        TypeError: student or teacher is no `nn.Module`.
        ValueError: a path that no submodule has, or submodules of other names or shapes.

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
        tensors, sources = _tensors(students[path]), _tensors(teachers[source])
        shapes, expected = _shapes(tensors), _shapes(sources)
        if shapes != expected:
            fault = next(
                key for key in {**expected, **shapes} if shapes.get(key) != expected.get(key)
            )
            raise ValueError(
                f"{path!r} of the student must have {fault!r} of shape {expected.get(fault)} as "
                f"{source!r} of the teacher, got {shapes.get(fault)}"
            )
        copies |= {f"{path}.{key}".lstrip("."): (tensors[key], sources[key]) for key in tensors}
    with torch.no_grad():
        for tensor, value in copies.values():
            tensor.copy_(value)
    return list(copies)


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Submodules by path, in order, inside of what is wrapped around `model` and around them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules: dict[str, nn.Module] = {}
    for path, module in unwrap(model).named_modules(remove_duplicate=False):
        # a wrapped submodule before what is in it: its hooks always run
        modules.setdefault(".".join(p for p in path.split(".") if p not in _WRAPPED), module)
    return modules


def check_path(path: str, modules: Iterable[str]) -> None:
    if path not in modules:
        raise ValueError(no_submodule(path, modules))


def no_submodule(path: str, modules: Iterable[str]) -> str:
    names = [name for name in modules if name]
    close = difflib.get_close_matches(path, names) or names[:3]
    return f"path must be that of a submodule ({', '.join(close)}, ...), got {path!r}"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(unwrap(module).named_parameters(remove_duplicate=False))
    return named | dict(unwrap(module).named_buffers(remove_duplicate=False))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
