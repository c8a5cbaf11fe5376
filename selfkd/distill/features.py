"""Submodules by their paths: what they return in a forward pass, and starting from a teacher's."""

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

from selfkd.distill.layers import check_path, modules_by_path, no_submodule


class Features:
    """Captures what named submodules return, while it is entered.

    The hooks sit on the modules inside what `torch.compile`, `DataParallel`,
    `DistributedDataParallel` or `FullyShardedDataParallel` put around them, and are gone after the
    block. Each forward pass of
    `model` forgets what the one before returned; of a submodule that runs twice in one, the last
    output is kept. Of a tuple or list, the first tensor is taken.

    What in-place modules (`nn.ReLU(inplace=True)`) would overwrite is cloned just before. Other
    code that overwrites it (`out += identity`) is noticed when the feature is read: use `clone`.

    `torch.compile` looks at hooks only when it compiles. A compiled model works that runs in one
    mode (train or eval, gradient or none) inside of the block only; once it has run outside, it
    captures nothing in that mode, and reading the feature says so. To run it in one mode inside
    and outside, set `torch._dynamo.config.skip_nnmodule_hook_guards = False` before its first run.
    Compiled, each feature is cloned. `DataParallel` over several devices is refused: replicas would
    overwrite each other's features.

    Args:
        model: whose forward pass is called inside the block, in whatever wrapper.
        paths: of submodules, as `named_modules` has them. Between dots, `*`, `?` and `[...]` are
            wildcards: `blocks.*` is every block, without what is inside the blocks.
        detach: leave out the graph, as for a teacher.
        clone: keep copies, at the price of their memory.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: no paths, a path that no submodule has, or several devices.

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
    ) -> None:
        if isinstance(paths, str) or not paths:
            raise ValueError(f"paths must be a list of at least one path, got {paths!r}")
        modules = modules_by_path(model)
        devices = _devices(model)
        if devices > 1:
            raise ValueError(f"model must be on one device of DataParallel, got {devices}")
        self._wrapped, self._modules = model, modules
        self._found = {path: _match(path, modules) for path in paths}
        self._detach, self._clone = detach, clone
        self._outputs: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Features:
        if self._handles:
            raise RuntimeError("Features must be entered once at a time, got a second time")
        self._forget()
        self._handles = [self._wrapped.register_forward_pre_hook(_Hook(self._forget))]
        for name in dict.fromkeys(name for names in self._found.values() for name in names):
            hook = _Hook(self._keep, (name,))
            self._handles.append(self._modules[name].register_forward_hook(hook))
        for module in set(self._modules.values()):
            if getattr(module, "inplace", False):
                self._handles.append(module.register_forward_pre_hook(_Hook(self._save_from)))
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
        """The output of the submodule at `path`: a tensor, or with wildcards a list of them, in
        the order of the modules.

        Raises:
            KeyError: `path` is none of `paths`.
            RuntimeError: the submodule did not run, or its output was overwritten.
        """
        if path not in self._found:
            raise KeyError(f"path must be one of {list(self._found)}, got {path!r}")
        features = [self._read(name) for name in self._found[path]]
        return features if _is_pattern(path) else features[0]

    def __getstate__(self) -> dict[str, Any]:
        """Of one that captures nothing: what a copy of the hooked model gets, pickled or not."""
        nothing: dict[str, Any] = {"_wrapped": None, "_modules": {}, "_handles": []}
        return {**self.__dict__, **nothing, "_outputs": {}, "_versions": {}}

    def count(self, path: str) -> int:
        """How many submodules a path of `paths` names."""
        return len(self._found[path])

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

    def _forget(self, module: nn.Module | None = None, *_: object) -> None:
        if module not in (None, self._wrapped):
            return  # a copy of the model, which has the hooks too
        self._outputs.clear()
        self._versions.clear()

    def _keep(self, name: str, module: nn.Module, _inputs: object, output: object) -> None:
        if module is not self._modules.get(name):
            return
        tensor = _first_tensor(name, output)
        if self._detach:
            tensor = tensor.detach()
        # a compiler gives no version to go by, nor does inference mode
        if self._clone or torch.compiler.is_compiling() or tensor.is_inference():
            tensor = tensor.clone()
        else:
            self._versions[name] = tensor._version
        self._outputs[name] = tensor

    def _save_from(self, _module: nn.Module, inputs: tuple[object, ...]) -> None:
        """Clone what shares memory with the input that is about to be overwritten."""
        if torch.compiler.is_compiling():
            return
        places = {_place(value) for value in inputs if isinstance(value, Tensor)}
        for name in [name for name in self._versions if _place(self._outputs[name]) in places]:
            self._outputs[name] = self._read(name).clone()
            del self._versions[name]


@dataclass(frozen=True)
class _Hook:
    """A hook of `Features`: it can be pickled with its module, and told from those of others."""

    act: Callable[..., None]
    first: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> None:
        self.act(*self.first, *args)


def drop_hooks(model: nn.Module) -> nn.Module:
    """Take off what `Features` left on a copy of a model that it was looking at; return it."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
    return model


def _devices(model: nn.Module) -> int:
    """Of the first `DataParallel` around the model."""
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
        raise ValueError(no_submodule(path, modules))
    return found


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _first_tensor(name: str, output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        for value in output:
            if isinstance(value, Tensor):
                return value
    raise TypeError(
        f"{name!r} must return a tensor, or a tuple with one, got {type(output).__name__}"
    )


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
