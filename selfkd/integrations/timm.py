"""Distillation in timm's training loop: a task with the loss of a `Distiller`.

In timm's `train.py`, after `task` has been made, without its `--kd-*` arguments:

    from selfkd import Distiller, Teacher
    from selfkd.integrations.timm import DistillationTask

    teacher = timm.create_model(args.model, num_classes=args.num_classes, checkpoint_path=PATH)
    distiller = Distiller(Teacher(teacher), alpha=0.9)
    task = DistillationTask(model, distiller, task.criterion, device=device)

Nothing else changes: Mixup, CutMix, label smoothing, BCE and JSD, `train_one_epoch`, gradient
accumulation, AMP, `--model-dtype`, EMA, `--torchcompile`, layer decay, checkpoints and validation
use the task as they use timm's. For the next generation run the script again with the checkpoint of
the last one as PATH, or see `examples/timm_task.py`, which trains all of them in one process. With
cached targets, wrap the training set of the loader in `WithIndex` and turn off Mixup and CutMix,
whose images the teacher has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from selfkd.distill.distiller import Distiller
from selfkd.distill.outputs import check_graph, take_logits
from selfkd.integrations.common import attach, place
from selfkd.losses.distillation import hard_loss

try:
    from timm.models import group_parameters
    from timm.optim import auto_group_layers
    from timm.task import ClassificationTask, MultiLabelClassificationEvaluator
    from timm.utils import unwrap_model
except ImportError as error:
    raise ImportError(
        "timm must be 1.0.31 or newer for selfkd.integrations.timm: "
        "pip install --upgrade 'timm>=1.0.31'"
    ) from error


_TIMM_NAMES = {"task_loss": "hard_loss", "kd_loss": "soft_loss"}
"""Terms of a distiller's loss by their names in timm."""


class DistillationTask(ClassificationTask):  # type: ignore[misc]
    """Training task of timm with the loss of a `Distiller`.

        loss = (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T)

    This is timm's `LogitDistillationTask` with `task_loss_weight = 1 - alpha` and
    `distill_loss_weight = alpha`. Unlike there, inputs are not renormalised for the teacher, unless
    it was made with `Teacher.from_timm(model, input_stats=(mean, std))`.

    The teacher moves with the task, and is never compiled, saved or trained. The projections of the
    distiller's terms are parameters of the task: if there are any, make the optimiser from the task
    (`create_optimizer_v2(task, ...)`) or from `task.get_trainable_module()`, not from the model.
    Weight decay and layer decay are those of the student's `no_weight_decay` and `group_matcher`;
    projections count as its last layer.

    Args:
        student: Network from inputs to logits `[batch, classes]`, or to an output that has them.
        distiller: Distiller with a teacher, an `Ensemble`, cached targets, or none of them
            (generation 0). Feature terms that have no student yet are attached to this one.
        criterion: Loss of logits and target in the place of the distiller's cross-entropy, such as
            those of `timm.loss.create_classification_loss`. Without it, soft targets are taken as
            they are, because Mixup smooths them, and others with the distiller's `label_smoothing`.
        device: Device of the student.
        dtype: Data type of the task, as in timm's; the student's own is not changed.

    Attributes:
        view: Number of the images' augmentation for cached targets, 0 at first; to be set during
            training.

    >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> task = DistillationTask(student, Distiller(teacher, temperature=4.0, alpha=0.9))
    >>> result = task(torch.ones(2, 4), torch.tensor([0, 2]))
    >>> result["loss"].backward()
    >>> sorted(result)
    ['hard_loss', 'kd_loss', 'loss', 'output', 'soft_loss', 'task_loss']

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770
    """

    def __init__(
        self,
        student: nn.Module,
        distiller: Distiller,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            student, criterion=criterion or distiller, device=device, dtype=dtype, verbose=False
        )
        attach(distiller, student, processes=1)
        self.distiller = distiller
        self.view = 0
        self.projections = distiller.projections
        place(distiller, self.device)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the student's logits and the terms of its loss.

        Args:
            input: Inputs `[batch, ...]`.
            target: Labels `[batch]`; probabilities `[batch, classes]`, as from Mixup; or labels and
                indices of the images `[batch, 2]`, as from `WithIndex`.

        Returns:
            Tensors by name: `output`, the logits `[batch, classes]`; `loss`, with the graph; and
            the distiller's other terms, for logging, of which `hard_loss` and `soft_loss` also by
            timm's names `task_loss` and `kd_loss`.

        Raises:
            TypeError: An output of the student without logits.
            ValueError: A target of another shape, mixed images where targets are cached, or logits
                without a graph in training.
        """
        labels, index = self._labels_and_index(target)
        logits = take_logits(self.trainable_module(input), "student")
        if self.training:
            check_graph(logits, "student_logits")
        terms = self.distiller(
            logits,
            labels,
            inputs=input,
            index=index,
            view=self.view,
            hard_loss=self._hard_loss(logits, labels),
        )
        aliases = {alias: terms[name] for alias, name in _TIMM_NAMES.items() if name in terms}
        return {"output": logits, **aliases, **terms}

    def _labels_and_index(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        if target.ndim == 1 or self.distiller.task != "single_label":
            return target, None
        if target.ndim == 2 and target.is_floating_point():
            if self.distiller.targets is not None:
                raise ValueError(
                    "target must be labels and indices [batch, 2] (WithIndex) where targets are "
                    f"cached, got probabilities {list(target.shape)}: turn off what mixes images "
                    "(Mixup, CutMix)"
                )
            return target, None
        if target.ndim == 2 and target.shape[1] == 2:
            return target[:, 0], target[:, 1]
        raise ValueError(
            "target must be labels [batch], probabilities [batch, classes], or [batch, 2] of label "
            f"and index (WithIndex), got {list(target.shape)}"
        )

    def _hard_loss(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return the hard term where it is not that of the distiller."""
        if self.criterion is not self.distiller:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss: Tensor = self.criterion(wide, labels)
            return loss
        mixed = labels.ndim == 2 and self.distiller.task == "single_label"
        return hard_loss(logits, labels) if mixed else None

    def no_weight_decay(self) -> set[str]:
        """Return the task's names of the parameters that the student keeps from weight decay."""
        return _no_weight_decay(self, self.trainable_module)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the student's layer of each parameter of the task, for layer decay."""
        return _group_matcher(self, self.trainable_module, coarse)

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        """Return the student, with the projections where there are any."""
        module: nn.Module | None = super().get_trainable_module(ema)
        if module is None or ema or not len(self.projections):
            return module
        return _Trainable(module, self.projections)

    def get_eval_model(
        self, module: nn.Module | None = None, ema: bool = False
    ) -> nn.Module | None:
        """Return the model to validate and save, without projections."""
        model: nn.Module | None = super().get_eval_model(module, ema)
        inner = model if model is None else unwrap_model(model)
        return inner.student if isinstance(inner, _Trainable) else model

    def create_evaluator(self, **kwargs: Any) -> Any:
        """Return timm's evaluator of the distiller's kind of label, for validation."""
        if self.distiller.task == "multi_label":
            return MultiLabelClassificationEvaluator(device=self.device, **kwargs)
        return super().create_evaluator(**kwargs)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Return a context in which `DistributedDataParallel` does not average gradients."""
        context: AbstractContextManager[Any] = getattr(
            self.trainable_module, "no_sync", nullcontext
        )()
        return context

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **ddp_kwargs: Any
    ) -> DistillationTask:
        """Prepare for distributed training as timm's task does.

        Args:
            device_ids: Devices of this process, for `DistributedDataParallel`.
            **ddp_kwargs: Further arguments of `DistributedDataParallel`.

        Raises:
            ValueError: Projections that would differ between processes.
        """
        attach(self.distiller, self.trainable_module, torch.distributed.get_world_size())
        super().prepare_distributed(device_ids, **ddp_kwargs)
        return self

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters whose gradients are clipped: timm's and the projections'."""
        student = list(self.trainable_module.parameters())
        return [*(student[:-2] if exclude_head else student), *self.distiller.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the projections, or of their averages, for the checkpoint."""
        return self._projections(ema).state_dict()

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load the result of `get_task_state`."""
        if state:
            self._projections(ema).load_state_dict(state, strict=strict)

    def _projections(self, ema: bool) -> nn.ModuleDict:
        if not ema:
            return self.distiller.projections
        average = getattr(self, "trainable_module_ema", None)
        trainable = None if average is None else unwrap_model(average)
        return trainable.projections if isinstance(trainable, _Trainable) else nn.ModuleDict()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillationTask:
        super()._apply(fn, recurse)
        place(self.distiller, self.device)
        return self


class WithIndex(Dataset[tuple[Any, Tensor]]):
    """A data set whose labels are paired with the index of their image, for cached targets.

    The label becomes a tensor of two integers, which timm's loaders (`create_loader`, with or
    without its prefetcher) collate to `[batch, 2]` and `DistillationTask` splits. Validation needs
    no wrapper. Cached targets are those of the images that the teacher was run on: give the loader
    `no_aug=True`, or let the data set make the view of `DistillationTask.view`.

    Args:
        dataset: Map-style data set of items `(image, label)`.

    Raises:
        TypeError: A data set without a length or items by number.
        ValueError: A label that is no class index, where the item is read.

    >>> WithIndex([("a.png", 7), ("b.png", 3)])[1]
    ('b.png', tensor([3, 1]))
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"dataset must have a length and items by number, got {type(dataset).__name__}"
            )
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        image, label = self.dataset[index]
        if int(label) != label:
            raise ValueError(f"labels must be class indices, got {label} of image {index}")
        return image, torch.tensor([int(label), index])

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def transform(self) -> Any:
        """Transform of the wrapped data set, which `create_loader` sets."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


class _Trainable(nn.Module):
    """Student and projections in one module, for the optimiser."""

    def __init__(self, student: nn.Module, projections: nn.ModuleDict) -> None:
        super().__init__()
        self.student = student
        self.projections = projections
        self.training = student.training

    def forward(self, *inputs: Any) -> Any:
        return self.student(*inputs)

    def no_weight_decay(self) -> set[str]:
        return _no_weight_decay(self, self.student)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        return _group_matcher(self, self.student, coarse)


def _no_weight_decay(module: nn.Module, student: nn.Module) -> set[str]:
    """Return the names in `module` of what `student` keeps from weight decay."""
    student = unwrap_model(student)
    patterns: set[str] = getattr(student, "no_weight_decay", set)()
    names = _names_in_student(module, student)
    return {
        name for name, own in names.items() if any(fnmatch(own, pattern) for pattern in patterns)
    }


def _group_matcher(module: nn.Module, student: nn.Module, coarse: bool) -> Callable[[str], int]:
    """Return the student's layers by names in `module`; parameters of others are in the last."""
    student = unwrap_model(student)
    matcher = getattr(student, "group_matcher", None)
    if matcher is None:
        layers = auto_group_layers(student)
    else:
        layers = group_parameters(student, matcher(coarse=coarse), reverse=True)
    last = max(layers.values(), default=0)
    names = _names_in_student(module, student)
    return lambda name: layers.get(names.get(name, ""), last)


def _names_in_student(module: nn.Module, student: nn.Module) -> dict[str, str]:
    """Return the student's names of its parameters by their names in `module`."""
    own = {id(parameter): name for name, parameter in student.named_parameters()}
    return {
        name: own[id(parameter)]
        for name, parameter in module.named_parameters()
        if id(parameter) in own
    }
