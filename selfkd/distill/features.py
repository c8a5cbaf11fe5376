"""Capturing the outputs of submodules, given by their paths, in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.utils.hooks import RemovableHandle

from selfkd.distill.layers import check_path, modules_by_path, unknown_path_message


class Features:
    """Context manager that captures the outputs of submodules.

    Hooks are registered on the modules inside `torch.compile`, `DataParallel`,
    `DistributedDataParallel` or `FullyShardedDataParallel`, and removed after the block. Each
    forward pass of `model` replaces the features of the previous one; of a submodule that runs
    twice in a pass, the last output is kept. Of a tuple, list or `ModelOutput`, the first tensor is
    taken, of another mapping its only one.

    Features that in-place modules (`nn.ReLU(inplace=True)`) would overwrite are cloned just before.
    If other code overwrites a feature (`out += identity`), reading it raises an error: use `clone`.

    `torch.compile` reads hooks only when it compiles. A compiled model works if it runs in one mode
    (train or eval, with or without gradient) inside the block only; once it has run outside, it
    captures nothing in that mode, and reading the feature raises an error. To run it in one mode
    inside and outside, set `torch._dynamo.config.skip_nnmodule_hook_guards = False` before its
    first run. In a compiled model each feature is cloned. `DataParallel` over several devices is
    refused: replicas would overwrite each other's features.

    Args:
        model: Model whose forward pass is called inside the block, in any wrapper.
        paths: Paths of submodules, as in `named_modules`. Between dots, `*`, `?` and `[...]` are
            wildcards: `blocks.*` is every block, without the submodules of the blocks.
        detach: Whether to leave out the graph, as for a teacher.
        clone: Whether to keep copies, at the cost of their memory.
        attention: Whether to capture attention matrices `[batch, heads, tokens, tokens]` where a
            submodule returns them with its output, as those of transformers do.

    Raises:
        TypeError: A model that is no `nn.Module`.
        ValueError: No paths, a path of no submodule, or several devices.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> with Features(model, ["1", "[02]"]) as captured:
    ...     logits = model(torch.ones(2, 4))
    >>> captured["1"].shape, [feature.shape for feature in captured["[02]"]]
    (torch.Size([2, 8]), [torch.Size([2, 8]), torch.Size([2, 3])])
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        *,
        detach: bool = False,
        clone: bool = False,
        attention: bool = False,
    ) -> None:
        if isinstance(paths, str) or not paths:
            raise ValueError(f"paths must be a list of at least one path, got {paths!r}")
        modules = modules_by_path(model)
        devices = _devices(model)
        if devices > 1:
            raise ValueError(f"model must be on one device of DataParallel, got {devices}")
        self._wrapped, self._modules = model, modules
        self._matched = {path: _match(path, modules) for path in paths}
        self._detach, self._clone, self._attention = detach, clone, attention
        self._outputs: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Features:
        if self._handles:
            raise RuntimeError("Features must be entered once at a time, got a second time")
        self._clear()
        self._handles = [self._wrapped.register_forward_pre_hook(_Hook(self._clear))]
        for name in dict.fromkeys(name for names in self._matched.values() for name in names):
            hook = _Hook(self._capture, (name,))
            self._handles.append(self._modules[name].register_forward_hook(hook))
        for module in set(self._modules.values()):
            if getattr(module, "inplace", False):
                hook = _Hook(self._clone_input_features)
                self._handles.append(module.register_forward_pre_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getitem__(self, path: str) -> Any:
        """Output of the submodule at `path`, or with wildcards the list of all in module order.

        Raises:
            KeyError: A path that is none of `paths`.
            RuntimeError: A submodule that did not run, or whose output was overwritten.
        """
        if path not in self._matched:
            raise KeyError(f"path must be one of {list(self._matched)}, got {path!r}")
        features = [self._read(name) for name in self._matched[path]]
        return features if _is_pattern(path) else features[0]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without model and features, so that a copy captures nothing."""
        empty: dict[str, Any] = {"_wrapped": None, "_modules": {}, "_handles": []}
        return {**self.__dict__, **empty, "_outputs": {}, "_versions": {}}

    def count(self, path: str) -> int:
        """Number of submodules that a path of `paths` matches."""
        return len(self._matched[path])

    def _read(self, name: str) -> Tensor:
        if name not in self._outputs:
            raise RuntimeError(
                f"{name!r} must have run in the block, got no output: either the forward pass "
                "leaves it out, or it was compiled without hooks, as it ran in this mode outside "
                "of Features: set torch._dynamo.config.skip_nnmodule_hook_guards = False before"
            )
        output = self._outputs[name]
        if name in self._versions and output._version != self._versions[name]:
            raise RuntimeError(
                f"{name!r} must keep its output, got it overwritten in place: use clone=True"
            )
        return output

    def _clear(self, module: nn.Module | None = None, *_: object) -> None:
        if module not in (None, self._wrapped):
            return  # a copy of the model, which has the hooks too
        self._outputs.clear()
        self._versions.clear()

    def _capture(self, name: str, module: nn.Module, _inputs: object, output: object) -> None:
        if module is not self._modules.get(name):
            return
        tensor = (_attention_of if self._attention else _first_tensor)(name, output)
        if self._detach:
            tensor = tensor.detach()
        # versions of tensors exist neither in a compiled graph nor in inference mode
        if self._clone or torch.compiler.is_compiling() or tensor.is_inference():
            tensor = tensor.clone()
        else:
            self._versions[name] = tensor._version
        self._outputs[name] = tensor

    def _clone_input_features(self, _module: nn.Module, inputs: tuple[object, ...]) -> None:
        """Clone the features that share memory with an input that is about to be overwritten."""
        if torch.compiler.is_compiling():
            return
        storages = {_storage(value) for value in inputs if isinstance(value, Tensor)}
        for name in [name for name in self._versions if _storage(self._outputs[name]) in storages]:
            self._outputs[name] = self._read(name).clone()
            del self._versions[name]


@dataclass(frozen=True)
class _Hook:
    """Hook of `Features`, of its own type so that `drop_hooks` finds it; can be pickled."""

    function: Callable[..., None]
    first_args: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> None:
        self.function(*self.first_args, *args)


def drop_hooks(model: nn.Module) -> nn.Module:
    """Remove the hooks of `Features` from a copy of a hooked model, and return the copy."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
    return model


def _devices(model: nn.Module) -> int:
    """Return the number of devices of the outermost `DataParallel` around the model, else 1."""
    while not isinstance(model, DataParallel):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            return 1
        model = inner
    return len(model.device_ids)


def _match(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    if not _is_pattern(path):
        check_path(path, modules)
        return [path]
    parts = path.split(".")
    found = [
        name
        for name in modules
        if name
        and name.count(".") == len(parts) - 1
        and all(map(fnmatchcase, name.split("."), parts))
    ]
    if not found:
        raise ValueError(unknown_path_message(path, modules))
    return found


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _first_tensor(name: str, output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values: list[object] = []
    if isinstance(output, Mapping):
        values = list(output.values())
    elif isinstance(output, tuple | list):
        values = list(output)
    tensors = [value for value in values if isinstance(value, Tensor)]
    ordered = not isinstance(output, Mapping) or hasattr(output, "to_tuple")  # of transformers
    if len(tensors) == 1 or (tensors and ordered):
        return tensors[0]
    raise TypeError(
        f"{name!r} must return a tensor, a tuple with one, or a mapping with one only, got "
        f"{type(output).__name__}"
    )


def _attention_of(name: str, output: object) -> Tensor:
    values = list(output) if isinstance(output, tuple | list) else [output]
    for value in values:
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] == value.shape[3]:
            return value
    raise TypeError(
        f"{name!r} must return attention matrices [batch, heads, tokens, tokens], got "
        f"{type(output).__name__}: a model of transformers is made with "
        'attn_implementation="eager"'
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
