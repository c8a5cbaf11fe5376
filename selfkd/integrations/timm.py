"""Distillation in timm's training loop: a task with the loss of a `Distiller`.

In timm's `train.py`, after `task` has been made (and in place of its `--kd-*` arguments):

    from selfkd import Distiller, Teacher
    from selfkd.integrations.timm import DistillationTask

    teacher = timm.create_model(args.model, num_classes=args.num_classes, checkpoint_path=PATH)
    distiller = Distiller(Teacher(teacher), alpha=0.9, label_smoothing=args.smoothing)
    task = DistillationTask(model, distiller, device=device)

Nothing else changes: `train_one_epoch`, gradient accumulation, AMP, EMA, `--torchcompile`,
checkpoints and validation use the task as they use timm's. Run it with `--mixup 0 --cutmix 0`,
because the distiller needs class indices; `--smoothing` is the distiller's `label_smoothing`. For
the next generation run the script again with the checkpoint of the last one as PATH, or see
`examples/timm_task.py`, which trains all of them in one process. With cached targets, wrap the
training set of the loader in `WithIndex`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from selfkd.distill.distiller import Distiller
from selfkd.integrations.common import check_processes, place

try:
    from timm.task import ClassificationTask
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
    (`create_optimizer_v2(task, ...)`), not from the model.

    Args:
        student: Network from inputs to logits `[batch, classes]`.
        distiller: Distiller with a teacher, an `Ensemble`, cached targets, or none of them
            (generation 0).
        device: Device of the student.

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
        self, student: nn.Module, distiller: Distiller, *, device: torch.device | None = None
    ) -> None:
        super().__init__(student, criterion=distiller, device=device, verbose=False)
        self.distiller = distiller
        self.view = 0
        self.projections = distiller.projections
        place(distiller, self.device)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the student's logits and the terms of its loss.

        Args:
            input: Inputs `[batch, ...]`.
            target: Labels `[batch]`, or labels and indices of the images `[batch, 2]`, as from
                `WithIndex`.

        Returns:
            Tensors by name: `output`, the logits `[batch, classes]`; `loss`, with the graph; and
            the distiller's other terms, for logging, of which `hard_loss` and `soft_loss` also by
            timm's names `task_loss` and `kd_loss`.

        Raises:
            TypeError: A target that is not of integers, such as that of Mixup.
            ValueError: A target of another shape.
        """
        labels, index = _labels_and_index(target)
        logits = self.trainable_module(input)
        terms = self.distiller(logits, labels, inputs=input, index=index, view=self.view)
        aliases = {alias: terms[name] for alias, name in _TIMM_NAMES.items() if name in terms}
        return {"output": logits, **aliases, **terms}

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
        check_processes(self.distiller, torch.distributed.get_world_size())
        super().prepare_distributed(device_ids, **ddp_kwargs)
        return self

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters whose gradients are clipped: timm's and the projections'."""
        return [*super().get_clip_parameters(exclude_head), *self.distiller.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the distiller's projections, for the checkpoint; empty for EMA."""
        return {} if ema else self.distiller.state_dict()

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load the result of `get_task_state`."""
        if state and not ema:
            self.distiller.load_state_dict(state)

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


def _labels_and_index(target: Tensor) -> tuple[Tensor, Tensor | None]:
    if target.is_floating_point():
        raise TypeError(
            f"target must be class indices, got {target.dtype} of shape {list(target.shape)}: "
            "turn off what mixes labels (Mixup, CutMix)"
        )
    if target.ndim == 1:
        return target, None
    if target.ndim == 2 and target.shape[1] == 2:
        return target[:, 0], target[:, 1]
    raise ValueError(
        "target must be labels [batch], or [batch, 2] of label and index (WithIndex), got "
        f"{list(target.shape)}"
    )
