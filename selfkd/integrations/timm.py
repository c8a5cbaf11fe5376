"""A training task for timm's loop, with any teacher, ensemble or stored targets of a `Distiller`.

In timm's own `train.py`, after `task` has been made (and in place of its `--kd-*` arguments):

    from selfkd import Distiller, Teacher
    from selfkd.integrations.timm import DistillationTask

    teacher = timm.create_model(args.model, num_classes=args.num_classes, checkpoint_path=PATH)
    distiller = Distiller(Teacher(teacher), alpha=0.9, label_smoothing=args.smoothing)
    task = DistillationTask(model, distiller, device=device)

Nothing else changes: `train_one_epoch`, gradient accumulation, AMP, EMA, `--torchcompile`,
checkpoints and validation use the task as they use timm's. Run it with `--mixup 0 --cutmix 0`, for
the distiller wants class indices; `--smoothing` is the distiller's `label_smoothing`. For the next
generation run the script again with the checkpoint of the last as PATH, or see
`examples/timm_task.py`, which has them all in one process. For targets that are stored, wrap the
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


_TIMMS = {"task_loss": "hard_loss", "kd_loss": "soft_loss"}
"""What timm calls a term of the loss -> what it is called here."""


class DistillationTask(ClassificationTask):  # type: ignore[misc]
    """timm's training task with the loss of a `Distiller`.

        loss = (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T)

    This is timm's `LogitDistillationTask` with `task_loss_weight = 1 - alpha` and
    `distill_loss_weight = alpha`. Other than there, inputs are not renormalised for the teacher
    unless it was made to do so: `Teacher.from_timm(model, input_stats=(mean, std))`.

    The teacher moves with the task, is never compiled nor saved, and trains at no time. What the
    distiller's terms learn, their projections, is the task's too: make the optimiser of the task
    (`create_optimizer_v2(task, ...)`), not of the model, where there are any.

    Args:
        student: maps inputs to logits `[batch, classes]`.
        distiller: with a teacher, with an `Ensemble`, with stored targets, or with none of them
            (generation 0).
        device: where the student is.

    Attributes:
        view: number of the images' augmentation for stored targets, 0 at first; set it as the loop
            goes on.

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
        """Logits of the student and the terms of its loss.

        Args:
            input: `[batch, ...]`.
            target: labels `[batch]`, or `[batch, 2]` of `WithIndex`: label and number of the image.

        Returns:
            `output`, the logits `[batch, classes]`; `loss`, with the graph; and the distiller's
            other terms, for logging, of them `hard_loss` and `soft_loss` also by timm's names,
            `task_loss` and `kd_loss`.

        Raises:
            TypeError: `target` is not of integers, as Mixup leaves it.
            ValueError: `target` is of another shape.
        """
        labels, index = _labels_and_index(target)
        logits = self.trainable_module(input)
        terms = self.distiller(logits, labels, inputs=input, index=index, view=self.view)
        theirs = {name: terms[ours] for name, ours in _TIMMS.items() if ours in terms}
        return {"output": logits, **theirs, **terms}

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **ddp_kwargs: Any
    ) -> DistillationTask:
        """As timm's; ValueError where the distiller learns projections that are not in step."""
        check_processes(self.distiller, torch.distributed.get_world_size())
        super().prepare_distributed(device_ids, **ddp_kwargs)
        return self

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """As timm's, with the distiller's parameters."""
        return [*super().get_clip_parameters(exclude_head), *self.distiller.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What the distiller's terms have learnt, for the checkpoint; EMA has none of it."""
        return {} if ema else self.distiller.state_dict()

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load what `get_task_state` returned."""
        if state and not ema:
            self.distiller.load_state_dict(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillationTask:
        super()._apply(fn, recurse)
        place(self.distiller, self.device)
        return self


class WithIndex(Dataset[tuple[Any, Tensor]]):
    """A data set whose labels bring the number of their image, for targets that are stored.

    The label becomes a tensor of two integers, which timm's loaders (`create_loader`, with its
    prefetcher or without) collate to `[batch, 2]` and `DistillationTask` takes apart. Validation
    needs no wrapper. Stored answers are to the images as the teacher saw them: give the loader
    `no_aug=True`, or have the data set make the view that `DistillationTask.view` says.

    Args:
        dataset: items `(image, label)` by number, from 0 on.

    Raises:
        TypeError: `dataset` has no items by number.

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
        """The wrapped data set's, which `create_loader` sets."""
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
