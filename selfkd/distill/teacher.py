"""Frozen teachers: copies of networks, always in eval mode, whose logits carry no graph."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from inspect import getclosurevars, isfunction, signature
from inspect import unwrap as unwrap_function
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from selfkd.distill.features import drop_hooks
from selfkd.distill.input_stats import Stats, renormalisation, renormalise
from selfkd.distill.layers import check_whole, unwrap
from selfkd.distill.outputs import map_tensors, take_logits
from selfkd.distill.signature import without_cache


class Teacher:
    """A frozen copy of a network, in eval mode at every call, whose logits carry no graph.

    It is no `nn.Module`, so that `parameters()`, `state_dict()`, `train()` and `to()` of a parent
    module do not affect it; call `to` on the teacher itself. The copy shares no memory with
    `module`, which is not changed and may be trained further. Wrappers of `torch.compile`,
    `DataParallel` or `DistributedDataParallel` and the hooks of a distiller's feature terms are
    removed from the copy; to compile the teacher is up to the caller.

    With `copy=False` the module is run as it is: wrapped, quantised, offloaded or sharded, without
    further memory. It is never moved or unwrapped, no parameter gets a gradient from a call, and
    the mode of each of its parts (train or eval) is put back after it. It is not frozen beyond
    that: if it is trained elsewhere, as a moving average is, the logits follow.

    Inputs are detached, moved to the device of the module's parameters and, if floating point, cast
    to their dtype, leaf by leaf in nested inputs. A mapping is given as keyword arguments, as many
    of them as `forward` takes, unless it takes the mapping itself; a list or tuple as positional
    ones if `forward` needs more than one.

    If the teacher was trained on inputs of another normalisation than those of the calls, inputs
    are normalised again, channel by channel:

        x' = (x * std_in + mean_in - mean_trained) / std_trained

    Args:
        module: Network from inputs `[batch, ...]` to logits `[batch, classes]`, or to an output in
            which it is clear which tensor they are, such as one with `logits`.
        input_stats: Mean and standard deviation with which the inputs of each call are
            normalised, one value a channel.
        trained_stats: Mean and standard deviation of the inputs that `module` was trained on; the
            same as `input_stats` if not given.
        columns: Index of the module's logit for each class; the same order if not given.
        copy: Whether to copy and freeze the module rather than run it as it is.

    Raises:
        TypeError: A module that is no `nn.Module`.
        ValueError: Trained statistics without input statistics, statistics of different lengths, a
            standard deviation that is not positive, or, with `copy`, a module that cannot be
            copied: of which each process has only a shard (FSDP), offloaded, or otherwise.

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770

    >>> import torch
    >>> student = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    >>> teacher = Teacher(student)
    >>> logits = teacher(torch.ones(2, 4))
    >>> logits.shape, logits.requires_grad, student.training
    (torch.Size([2, 3]), False, True)
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        input_stats: Stats | None = None,
        trained_stats: Stats | None = None,
        columns: Sequence[int] | None = None,
        copy: bool = True,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.copied = copy
        self.module = _frozen_copy(module) if copy else module
        self._affine = renormalisation(input_stats, trained_stats)
        in_order = columns is None or list(columns) == list(range(len(columns)))
        self._columns = None if in_order else torch.tensor(columns)

    @classmethod
    def from_timm(
        cls, module: nn.Module, *, input_stats: Stats | None = None, copy: bool = True
    ) -> "Teacher":
        """Make a teacher from a timm model with its published pretrained weights.

        `trained_stats` is read from `module.pretrained_cfg`. For a model fine-tuned on inputs of
        another normalisation, call `Teacher` with their statistics.

        Args:
            module: Model from `timm.create_model(..., pretrained=True)`.
            input_stats: Mean and standard deviation with which the inputs of each call are
                normalised, one value a channel.
            copy: Whether to copy and freeze the module rather than run it as it is.

        Raises:
            ValueError: A module without a `pretrained_cfg` that has weights.

        >>> import timm
        >>> model = timm.create_model("resnet10t", num_classes=2)  # pretrained=True in earnest
        >>> teacher = Teacher.from_timm(model, input_stats=([0.5] * 3, [0.25] * 3))
        >>> teacher(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 2])
        """
        cfg = getattr(unwrap(module), "pretrained_cfg", None) or {}
        if not any(cfg.get(key) for key in ("url", "file", "hf_hub_id", "state_dict")):
            raise ValueError(
                "module must be a timm model with pretrained weights, got "
                f"{type(unwrap(module)).__name__}: give its statistics to Teacher as trained_stats"
            )
        trained_stats = None if input_stats is None else (cfg["mean"], cfg["std"])
        return cls(module, input_stats=input_stats, trained_stats=trained_stats, copy=copy)

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Tensor:
        """Compute the teacher logits.

        Args:
            inputs: Inputs `[batch, ...]`, or a mapping, list or tuple with such tensors; with
                `trained_stats`, `[batch, channels, height, width]`.

        Returns:
            Logits `[batch, classes]`, or numbers `[batch]`, without a graph even if `inputs`
            require a gradient.

        Raises:
            TypeError: A result of the module in which it is not clear which tensor the logits are.
            ValueError: Logits that are not `[batch, classes]`, or inputs whose channels are not
                those of `input_stats`.
        """
        logits = self.any_logits(inputs)
        if logits.ndim not in (1, 2):  # one number each, of a regression
            raise ValueError(f"teacher must return [batch, classes], got {list(logits.shape)}")
        return logits

    def any_logits(self, inputs: Any) -> Tensor:
        """Compute logits `[batch, ..., classes]` of any shape, as those of tokens; as a call does.

        Args:
            inputs: Inputs `[batch, ...]`, or nested ones.
        """
        inputs = _as_for(self.module, inputs)
        if self._affine is not None:
            inputs = renormalise(inputs, *self._affine)
        training = set_eval(self.module)
        try:
            logits = take_logits(_run(self.module, inputs), "teacher")
        finally:
            for part in [] if self.copied else training:
                part.training = True
        if self._columns is not None:
            columns = self._columns.to(logits.device, non_blocking=True)
            logits = logits.index_select(-1, columns)
        return logits.detach()

    @property
    def facts(self) -> dict[str, Any]:
        """Scale and shift of the inputs, and column of each class; None where unchanged."""
        affine = None if self._affine is None else [part.tolist() for part in self._affine]
        columns = None if self._columns is None else self._columns.tolist()
        return {"affine": affine, "columns": columns}

    def to(self, device: torch.device | str | int) -> "Teacher":
        """Move the teacher to `device` in place, as `nn.Module.to` does, and return self.

        A module that is not copied stays where it is, and inputs are moved to it.
        """
        if self.copied:
            self.module.to(device)
        if self._affine is not None:
            scale, shift = self._affine
            self._affine = (scale.to(device), shift.to(device))
        return self

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        note = "" if self._affine is None else ", renormalised"
        return f"Teacher({type(self.module).__name__}, {parameters} parameters{note})"


class Ensemble:
    """Several teachers run on the same inputs; the loss decides how their logits are averaged.

    Args:
        members: Teachers, or modules from which teachers are made.

    Raises:
        TypeError: A member that is neither.
        ValueError: No members.

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531

    >>> import torch
    >>> ensemble = Ensemble([nn.Linear(4, 3) for _ in range(5)])
    >>> ensemble(torch.ones(2, 4)).shape
    torch.Size([5, 2, 3])
    """

    def __init__(self, members: Sequence[Teacher | nn.Module]) -> None:
        self.members = [
            member if isinstance(member, Teacher) else Teacher(member) for member in members
        ]
        if not self.members:
            raise ValueError("members must be at least one teacher, got none")

    def __call__(self, inputs: Any) -> Tensor:
        """Compute the logits of each member.

        Args:
            inputs: Inputs `[batch, ...]`, the same for every member; nested ones as for a teacher.

        Returns:
            Logits `[members, batch, classes]`, without a graph, on the device of the first.

        Raises:
            ValueError: Members with different numbers of classes.
        """
        logits = [member(inputs) for member in self.members]
        logits = [member_logits.to(logits[0].device) for member_logits in logits]
        classes = [member_logits[0].numel() for member_logits in logits]
        if len(set(classes)) > 1:
            raise ValueError(f"members must have the same number of classes, got {classes}")
        return torch.stack(logits)

    def to(self, device: torch.device | str | int) -> "Ensemble":
        """Move every member to `device` in place and return self."""
        for member in self.members:
            member.to(device)
        return self

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        return f"Ensemble({self.members})"


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module, without wrappers and the hooks of a distiller.

    Tensors that the module computes from its parameters and keeps, such as the weight of the old
    `weight_norm`, are copied without their graph, which `copy.deepcopy` refuses.

    Args:
        module: Module in any wrapper.

    Raises:
        ValueError: A module that is sharded, offloaded, lazy and not yet run, or cannot be copied
            for another reason.
    """
    way_out = "Teacher(module, copy=False) runs it as it is"
    try:
        check_whole("module", module)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from None
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            "module must have its weights in memory to be copied, got some on the meta device "
            f"(offloaded, or never loaded): {way_out}"
        )
    module = unwrap(module)
    parameters = list(module.parameters())
    if any(map(is_lazy, [*parameters, *module.buffers()])):
        raise ValueError(
            "module must have the shapes of its weights to be copied, got some of a lazy module: "
            "run it on a batch first"
        )
    try:
        with ComputedTensors():
            twin = deepcopy(module)
    except Exception as error:  # a module's own way of copying may raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"module must be one that can be copied, got {type(module).__name__} ({first}): "
            f"{way_out}"
        ) from error
    owned = {id(parameter) for parameter in parameters}
    if any(id(parameter) in owned for parameter in twin.parameters()):
        raise ValueError(
            f"module must be one that can be copied, got {type(module).__name__} with a "
            f"__deepcopy__ that keeps parameters of the original: {way_out}"
        )
    _bind_forward(module, twin, way_out)
    return drop_hooks(twin)


def _bind_forward(module: nn.Module, twin: nn.Module, way_out: str) -> None:
    """Bind a copy's `forward` to the copy where it was replaced by a function of the original.

    A function is not copied: with its own `forward`, a teacher would follow the original's weights.
    """
    originals = {id(part) for part in module.modules()}
    for part, copied in zip(module.modules(), twin.modules(), strict=False):
        forward: Callable[..., Any] = vars(part).get("forward", part.forward)
        if not isfunction(forward) or vars(copied).get("forward") is not forward:
            continue
        inner, held = unwrap_function(forward), getclosurevars(forward)
        compiled = hasattr(forward, "_torchdynamo_orig_callable")
        if compiled and isinstance(inner, MethodType) and inner.__self__ is part:
            copied.forward = MethodType(inner.__func__, copied)
            continue
        values = [inner, *held.nonlocals.values(), *held.globals.values()]
        if any(id(getattr(value, "__self__", value)) in originals for value in values):
            raise ValueError(
                "module must be one that can be copied, got the forward of "
                f"{type(part).__name__} replaced by a function of the module itself: {way_out}"
            )


def _frozen_copy(module: nn.Module) -> nn.Module:
    twin = copy_module(module)
    for parameter in twin.parameters():
        # the copied parameters of a ScriptModule have a graph
        parameter.requires_grad_(False) if parameter.is_leaf else parameter.detach_()
    set_eval(twin)
    return twin


class ComputedTensors(TorchFunctionMode):
    """Context in which `copy.deepcopy` copies tensors that have a graph, without their graph.

    It refuses them otherwise. Modules keep such tensors, as the old `weight_norm` does.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def set_eval(module: nn.Module) -> list[nn.Module]:
    """Set a module to eval mode; return those of its parts that were in train mode."""
    # a frozen ScriptModule has no mode, an exported graph one that cannot be set
    training = [part for part in module.modules() if getattr(part, "training", False)]
    if training:
        try:
            module.eval()
        except NotImplementedError:
            for part in training:
                part.training = False
    return training


def _as_for(module: nn.Module, inputs: Any) -> Any:
    """Return inputs without their graph, on the module's device and, if floating, in its dtype."""
    device, dtype = None, None
    for tensor in chain(module.parameters(), module.buffers()):
        if device is None and not tensor.is_meta:
            device = tensor.device
        # weights in 8 bits are computed with in another dtype
        if dtype is None and tensor.is_floating_point() and tensor.itemsize > 1:
            dtype = tensor.dtype
        if device is not None and dtype is not None:
            break
    if dtype is None and _is_packed(module):
        dtype = torch.float32

    def change(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if tensor.is_floating_point() else None)

    return map_tensors(inputs, change)


def _is_packed(module: nn.Module) -> bool:
    """Whether weights are constants (a frozen ScriptModule) or packed, as in quantised layers."""
    return any(
        isinstance(part, torch.jit.ScriptModule) or hasattr(part, "_packed_params")
        for part in module.modules()
    )


def _run(module: nn.Module, inputs: Any) -> Any:
    """Return a module's output; several inputs are given as arguments where it takes them."""
    more = without_cache(module)
    if not isinstance(inputs, Mapping | list | tuple):
        return module(inputs, **more)
    takes_any = False
    if isinstance(module, torch.jit.ScriptModule):
        _, *arguments = module.forward.schema.arguments  # type: ignore[attr-defined]
        required = [argument.name for argument in arguments if not argument.has_default_value()]
        accepted = {argument.name for argument in arguments}
    else:
        parameters = signature(unwrap(module).forward).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = [parameter.name for parameter in named if parameter.default is parameter.empty]
        accepted = {parameter.name for parameter in named}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not isinstance(inputs, Mapping):
        return module(*inputs) if len(required) > 1 else module(inputs)
    keywords = {key: value for key, value in inputs.items() if takes_any or key in accepted}
    if not keywords or any(name not in keywords for name in required):
        return module(inputs)
    return module(**{**more, **keywords})
