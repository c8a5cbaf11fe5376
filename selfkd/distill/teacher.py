"""Frozen teachers: copies of networks, always in eval mode, whose logits carry no graph."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.distill.features import drop_hooks
from selfkd.distill.layers import check_whole, unwrap

Stats = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel, of images scaled to [0, 1]."""


class Teacher:
    """A frozen copy of a network, in eval mode at every call, whose logits carry no graph.

    It is no `nn.Module`, so that `parameters()`, `state_dict()`, `train()` and `to()` of a parent
    module do not affect it; call `to` on the teacher itself. The copy shares no memory with
    `module`, which is not changed and may be trained further. Wrappers of `torch.compile`,
    `DataParallel` or `DistributedDataParallel` and the hooks of a distiller's feature terms are
    removed from the copy; to compile the teacher is up to the caller.

    If the teacher was trained on inputs of another normalisation than those of the calls, inputs
    are normalised again, channel by channel:

        x' = (x * std_in + mean_in - mean_trained) / std_trained

    Args:
        module: Network from inputs `[batch, ...]` to logits `[batch, classes]`.
        input_stats: Mean and standard deviation with which the inputs of each call are
            normalised, one value a channel.
        trained_stats: Mean and standard deviation of the inputs that `module` was trained on; the
            same as `input_stats` if not given.
        columns: Index of the module's logit for each class; the same order if not given.

    Raises:
        TypeError: A module that is no `nn.Module`.
        ValueError: Trained statistics without input statistics, statistics of different lengths, a
            standard deviation that is not positive, or a module of which each process has only a
            shard (FSDP).

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
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        check_whole("module", module)
        self.module = drop_hooks(copy.deepcopy(unwrap(module))).requires_grad_(False).eval()
        self._affine = _renormalisation(input_stats, trained_stats)
        in_order = columns is None or list(columns) == list(range(len(columns)))
        self._columns = None if in_order else torch.tensor(columns)

    @classmethod
    def from_timm(cls, module: nn.Module, *, input_stats: Stats | None = None) -> "Teacher":
        """Make a teacher from a timm model with its published pretrained weights.

        `trained_stats` is read from `module.pretrained_cfg`. For a model fine-tuned on inputs of
        another normalisation, call `Teacher` with their statistics.

        Args:
            module: Model from `timm.create_model(..., pretrained=True)`.
            input_stats: Mean and standard deviation with which the inputs of each call are
                normalised, one value a channel.

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
        return cls(module, input_stats=input_stats, trained_stats=trained_stats)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Compute the teacher logits.

        Args:
            inputs: Inputs `[batch, ...]`; with `trained_stats`, `[batch, channels, height, width]`.

        Returns:
            Logits `[batch, classes]`, without a graph even if `inputs` require a gradient.

        Raises:
            TypeError: A result of the module that is not a tensor.
            ValueError: Logits that are not `[batch, classes]`, or inputs whose channels are not
                those of `input_stats`.
        """
        self.module.eval()
        inputs = inputs.detach()
        if self._affine is not None:
            inputs = _renormalise(inputs, *self._affine)
        logits = self.module(inputs)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"teacher must return a tensor of logits, got {type(logits).__name__}: "
                "wrap it in a module that takes them out"
            )
        if logits.ndim != 2:
            raise ValueError(f"teacher must return [batch, classes], got {list(logits.shape)}")
        if self._columns is not None:
            logits = logits.index_select(1, self._columns.to(logits.device))
        return logits.detach()

    @property
    def facts(self) -> dict[str, Any]:
        """Scale and shift of the inputs, and column of each class; None where unchanged."""
        affine = None if self._affine is None else [part.tolist() for part in self._affine]
        columns = None if self._columns is None else self._columns.tolist()
        return {"affine": affine, "columns": columns}

    def to(self, device: torch.device | str | int) -> "Teacher":
        """Move the teacher to `device` in place, as `nn.Module.to` does, and return self."""
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

    def __call__(self, inputs: Tensor) -> Tensor:
        """Compute the logits of each member.

        Args:
            inputs: Inputs `[batch, ...]`, the same for every member.

        Returns:
            Logits `[members, batch, classes]`, without a graph.

        Raises:
            ValueError: Members with different numbers of classes.
        """
        logits = [member(inputs) for member in self.members]
        classes = [member_logits.shape[1] for member_logits in logits]
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


def _renormalisation(given: Stats | None, trained: Stats | None) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift of inputs, `[channels, 1, 1]` each; None if they do not change."""
    if given is None and trained is not None:
        raise ValueError("input_stats must be given with trained_stats, got None")
    for name, stats in (("input_stats", given), ("trained_stats", trained)):
        if stats is not None:
            _check_stats(name, stats)
    if given is None or trained is None:
        return None
    mean_in, std_in, mean, std = (
        torch.tensor([float(value) for value in values], dtype=torch.float64)
        for values in (*given, *trained)
    )
    if len(mean_in) != len(mean):
        raise ValueError(
            f"trained_stats must have as many channels as input_stats ({len(mean_in)}), "
            f"got {len(mean)}"
        )
    if torch.equal(mean_in, mean) and torch.equal(std_in, std):
        return None
    affine = torch.stack([std_in / std, (mean_in - mean) / std]).float()
    scale, shift = affine[:, :, None, None]
    return scale, shift


def _check_stats(name: str, stats: Stats) -> None:
    mean, std = stats
    if len(mean) != len(std) or len(mean) == 0:
        raise ValueError(f"{name} must be a mean and a std for each channel, got {stats}")
    if not all(math.isfinite(value) for value in mean):
        raise ValueError(f"{name} must have finite means, got {tuple(mean)}")
    if not all(0 < value < math.inf for value in std):
        raise ValueError(f"{name} must have a std above 0 in every channel, got {tuple(std)}")


def _renormalise(inputs: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if inputs.ndim != 4 or inputs.shape[1] != len(scale):
        raise ValueError(
            f"inputs must be [batch, {len(scale)}, height, width], as many channels as input_stats "
            f"has, got {list(inputs.shape)}"
        )
    return (inputs * scale + shift).to(inputs.dtype)
