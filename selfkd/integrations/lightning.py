"""Distillation in Lightning: a callback for a module as it is, a mixin for one that you edit.

    trainer = Trainer(callbacks=[DistillationCallback(Distiller(Teacher(model), alpha=0.9))])
    trainer.fit(module, loader)  # `module` computes cross-entropy, and knows of no teacher

For the next generation make a fresh module, a fresh `Trainer`, and a `Teacher` of the last module:
`examples/lightning_callback.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfkd.distill.distiller import Distiller
from selfkd.integrations.common import check_processes, place

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "lightning must be installed for selfkd.integrations.lightning: "
        "pip install 'selfkd[lightning]'"
    ) from error


class DistillationCallback(Callback):
    """Distils a LightningModule that knows nothing of it.

        loss = (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T)

    While a fit runs, `training_step` is wrapped: it runs as it is, logs what it logs, and the
    logits it computed are caught by a forward hook. The loss it returned is replaced, whole, by the
    distiller's, and the teacher is asked what the student was asked. The distiller's terms are
    logged as `distill/loss`, `distill/hard_loss` and so on. After the fit, or an error in it, the
    module is as before.

    The batch must be `(inputs, labels)`, or `(inputs, labels, index)` where targets are stored.
    `training_step` must run the student once and leave the optimisation to Lightning; where it
    does otherwise, or its loss has parts to keep, use `DistillationMixin`. Checkpoints hold nothing
    of the teacher. What the distiller's terms learn, projections, joins the first group of the
    first optimiser.

    Args:
        distiller: with a teacher, with an `Ensemble`, with stored targets, or with none of them
            (generation 0).
        path: of the submodule that maps inputs to logits, as `named_modules` has it; the
            LightningModule itself, called as `self(inputs)`, where not given.

    Attributes:
        view: number of the images' augmentation for stored targets, 0 at first; set it as the fit
            goes on.

    >>> callback = DistillationCallback(Distiller(nn.Linear(4, 3), alpha=0.9), path="model")

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770
    """

    def __init__(self, distiller: Distiller, *, path: str = "") -> None:
        self.distiller = distiller
        self.path = path
        self.view = 0
        self._calls: list[tuple[Any, Any]] | None = None  # of the student, in one training step
        self._handle: RemovableHandle | None = None
        self._replaced: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap `training_step` and listen to the student.

        Raises:
            ValueError: `path` is of no submodule, the module optimises by itself, or several
                processes train and the distiller learns projections that are not in step.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True, got False: a loss that the module goes down "
                "by itself cannot be replaced, use DistillationMixin"
            )
        check_processes(self.distiller, trainer.world_size)
        place(self.distiller, pl_module.device)
        learnt = list(self.distiller.parameters())
        if learnt:  # a group of their own would not fit the schedule, nor a checkpoint
            trainer.optimizers[0].param_groups[0]["params"].extend(learnt)
        student = self._student(pl_module)
        self._handle = student.register_forward_hook(self._catch, with_kwargs=True)
        self._wrap(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        self._restore(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the module as it was."""
        self._restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What the distiller's terms have learnt, for the checkpoint."""
        return self.distiller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.distiller.load_state_dict(state_dict)

    def _student(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.path)
        except AttributeError as error:
            raise ValueError(f"path must be that of a submodule, got {self.path!r}") from error

    def _catch(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._calls is not None:
            inputs = args[0] if args else next(iter(kwargs.values()), None)
            self._calls.append((inputs, output))

    def _wrap(self, pl_module: LightningModule) -> None:
        step = pl_module.training_step
        # a compiled LightningModule has its own, which is to come back
        self._replaced = {k: v for k, v in vars(pl_module).items() if k == "training_step"}

        @functools.wraps(step)  # Lightning reads the signature
        def training_step(batch: Any, *args: Any) -> Any:
            self._calls = []
            try:
                output = step(batch, *args)
                return output if output is None else self._distil(pl_module, batch, output)
            finally:
                self._calls = None

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def _restore(self, pl_module: LightningModule) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            del pl_module.training_step
            vars(pl_module).update(self._replaced)

    def _distil(self, pl_module: LightningModule, batch: Any, output: Any) -> Any:
        labels, index = _labels_and_index(batch)
        inputs, logits = self._call()
        terms = self.distiller(logits, labels, inputs=inputs, index=index, view=self.view)
        _log(pl_module, terms, len(labels))
        return {**output, "loss": terms["loss"]} if isinstance(output, dict) else terms["loss"]

    def _call(self) -> tuple[Any, Tensor]:
        name = f"submodule {self.path!r}" if self.path else "LightningModule"
        if self._calls is None or len(self._calls) != 1:
            raise RuntimeError(
                f"the {name} must be called once in training_step, got {len(self._calls or [])} "
                "calls: give the path of the submodule that maps inputs to logits, or use "
                "DistillationMixin"
            )
        inputs, logits = self._calls[0]
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the {name} must return a tensor of logits, got {type(logits).__name__}: give the "
                "path of the submodule that does, or use DistillationMixin"
            )
        return inputs, logits


class DistillationMixin:
    """`distillation_loss` for a LightningModule of your own; set `distiller` in its `__init__`.

        class Student(DistillationMixin, LightningModule):
            def training_step(self, batch, batch_idx):
                inputs, labels = batch
                return self.distillation_loss(self(inputs), labels, inputs=inputs)

    The distiller is in no `state_dict`; where the module calls `save_hyperparameters`, give it
    `ignore=["distiller"]`, or the teacher is in every checkpoint. What its terms learn is for
    `configure_optimizers` to take, `self.distiller.parameters()`, and for you to save.
    """

    distiller: Distiller
    _placed: torch.device | None = None

    def distillation_loss(
        self,
        student_logits: Tensor,
        labels: Tensor,
        *,
        inputs: Any = None,
        index: Tensor | None = None,
        view: int = 0,
    ) -> Tensor:
        """The loss of a batch; all its terms are logged as `distill/loss`, `distill/hard_loss`, …

        Args:
            student_logits: `[batch, classes]`.
            labels: class indices `[batch]`.
            inputs: what the teacher is asked; needed with a teacher.
            index: numbers of the images `[batch]`; needed with stored targets.
            view: number of the images' augmentation, for stored targets.

        Returns:
            Scalar in nats, with the graph.

        Raises:
            TypeError: the class is no LightningModule, or as `Distiller`.
            ValueError: as `Distiller`.
        """
        if not isinstance(self, LightningModule):
            raise TypeError(f"self must be a LightningModule, got {type(self).__name__}")
        if self._placed != student_logits.device:
            self._placed = student_logits.device
            place(self.distiller, self._placed)
        terms = self.distiller(student_logits, labels, inputs=inputs, index=index, view=view)
        _log(self, terms, len(labels))
        return terms["loss"]


def _log(pl_module: LightningModule, terms: dict[str, Tensor], batch_size: int) -> None:
    values = {f"distill/{name}": term.detach() for name, term in terms.items()}
    pl_module.log_dict(values, batch_size=batch_size)


def _labels_and_index(batch: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            "batch must be (inputs, labels) or (inputs, labels, index), got "
            f"{type(batch).__name__}{size}: use DistillationMixin"
        )
    labels, *index = batch[1:]
    return labels, index[0] if index else None
