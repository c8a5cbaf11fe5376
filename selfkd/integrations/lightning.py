"""Distillation in Lightning: a callback for an unchanged module, a mixin for your own.

    trainer = Trainer(callbacks=[DistillationCallback(Distiller(Teacher(model), alpha=0.9))])
    trainer.fit(module, loader)  # `module` computes cross-entropy, without a teacher

In the YAML of a `LightningCLI`:

    trainer:
      callbacks:
        - class_path: selfkd.integrations.lightning.DistillationCallback
          init_args:
            path: model
            distiller:
              class_path: selfkd.Distiller
              init_args:
                teacher: {class_path: mynets.Net, init_args: {width: 64}}
                alpha: 0.9
                terms: {hint: {student: layer2, teacher: layer3}}

For the next generation make a new module, a new `Trainer`, and a `Teacher` of the last module:
`examples/lightning_callback.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfkd.distill.distiller import Distiller
from selfkd.distill.outputs import check_graph, describe_output, take_logits
from selfkd.integrations.common import attach, place

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "lightning must be installed for selfkd.integrations.lightning: "
        "pip install 'selfkd[lightning]'"
    ) from error


class DistillationCallback(Callback):
    """Callback that distils into an unchanged LightningModule.

        loss = (1 - alpha) CE(y, p_s) + alpha T^2 KL(p_t^T || p_s^T)

    During a fit, `training_step` is wrapped: it runs and logs as usual, a forward hook records the
    student's inputs and logits, and the returned loss is replaced by the distiller's, with the
    teacher run on the same inputs. The distiller's terms are logged as `distill/loss`,
    `distill/hard_loss` and so on. After the fit, or an error in it, the module is restored.

    The batch must be `(inputs, labels)`, or `(inputs, labels, index)` with cached targets, or a
    mapping with one of the keys `label`, `labels`, `target`, `targets`, `y`, and for cached targets
    one of `index`, `indices`, `idx`, or either without an index in a pair with it, as a
    `selfkd.SeededView` gives them. Without labels, at `alpha` 1, the student is distilled on
    unlabelled data. `training_step` must run the student once and use automatic optimisation;
    otherwise, or if parts of its loss are to be kept, use `DistillationMixin`. Checkpoints have
    nothing of the teacher. The projections of the distiller's terms are added to the first
    parameter group of the first optimiser, and kept equal in all processes.

    Args:
        distiller: Distiller with a teacher, an `Ensemble`, cached targets, or none of them
            (generation 0). Feature terms that have no student yet are attached to that of `path`.
        path: Path of the submodule from inputs to logits, as in `named_modules`; if not given, the
            LightningModule itself, called as `self(inputs)`. It may return more than logits.

    Attributes:
        view: Number of the images' augmentation for cached targets, 0 at first; to be set during
            the fit.

    >>> callback = DistillationCallback(Distiller(nn.Linear(4, 3), alpha=0.9), path="model")

    Reference:
        Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770
    """

    def __init__(self, distiller: Distiller, *, path: str = "") -> None:
        self.distiller = distiller
        self.path = path
        self.view = 0
        self._calls: list[_Call] | None = None
        self._state: dict[str, Any] = {}  # of projections that are not made yet
        self._handle: RemovableHandle | None = None
        self._replaced: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap `training_step` and register a hook on the student.

        Raises:
            ValueError: A path of no submodule, manual optimisation, or projections that would
                differ between processes.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True, got False: with manual optimisation the loss "
                "cannot be replaced, use DistillationMixin"
            )
        student = self._student(pl_module)
        place(self.distiller, pl_module.device, _floating_dtype(student))
        attach(self.distiller, student, trainer.world_size)
        if self._state:  # of a checkpoint that was read before there were projections
            self.distiller.load_state_dict(self._state)
            self._state = {}
        projections = list(self.distiller.parameters())
        if projections:  # a separate group would not fit the schedule, nor a checkpoint
            trainer.optimizers[0].param_groups[0]["params"].extend(projections)
        self._handle = student.register_forward_hook(self._record_call, with_kwargs=True)
        self._wrap(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the module."""
        self._restore(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the module."""
        self._restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the distiller's projections, for the checkpoint."""
        return self.distiller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`, when the fit starts if there is no student yet."""
        if self.distiller.attached:
            self.distiller.load_state_dict(state_dict)
        else:
            self._state = state_dict

    def _student(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.path)
        except AttributeError as error:
            raise ValueError(f"path must be that of a submodule, got {self.path!r}") from error

    def _record_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._calls is not None:
            self._calls.append(_Call(module, args, kwargs, output))

    def _wrap(self, pl_module: LightningModule) -> None:
        step = pl_module.training_step
        # a compiled LightningModule has one of its own, which is restored afterwards
        self._replaced = {k: v for k, v in vars(pl_module).items() if k == "training_step"}

        @functools.wraps(step)  # Lightning reads the signature
        def training_step(batch: Any, *args: Any) -> Any:
            self._calls = []
            try:
                output = step(batch, *args)
                return output if output is None else self._replace_loss(pl_module, batch, output)
            finally:
                self._calls = None

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def _restore(self, pl_module: LightningModule) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            del pl_module.training_step
            vars(pl_module).update(self._replaced)

    def _replace_loss(self, pl_module: LightningModule, batch: Any, output: Any) -> Any:
        labels, index = _labels_and_index(batch, self.distiller)
        call = self._recorded_call()
        logits = self._logits(call.output)
        check_graph(logits, "student_logits")
        inputs = call.inputs(labels)
        terms = self.distiller(logits, labels, inputs=inputs, index=index, view=self.view)
        _log(pl_module, terms, len(logits))
        return {**output, "loss": terms["loss"]} if isinstance(output, dict) else terms["loss"]

    @property
    def _name(self) -> str:
        return f"submodule {self.path!r}" if self.path else "LightningModule"

    def _recorded_call(self) -> _Call:
        if self._calls is None or len(self._calls) != 1:
            raise RuntimeError(
                f"the {self._name} must be called once in training_step, got "
                f"{len(self._calls or [])} calls: give the path of the submodule that maps inputs "
                "to logits, or use DistillationMixin"
            )
        return self._calls[0]

    def _logits(self, output: Any) -> Tensor:
        try:
            return take_logits(output, "student")
        except TypeError as error:
            raise TypeError(
                f"the {self._name} must return a tensor of logits, or an output in which it is "
                f"clear which tensor they are, got {describe_output(output)}: give the path of "
                "the submodule that does, or use DistillationMixin"
            ) from error


@dataclass(frozen=True)
class _Call:
    """A recorded call of the student."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def inputs(self, labels: Tensor | None) -> Any:
        """Return the inputs of the teacher: the only argument, or several by name.

        The student's own labels, which models of transformers take, are none of them.
        """
        arguments = self.kwargs
        if self.args:
            arguments = (
                inspect.signature(self.module.forward).bind(*self.args, **self.kwargs).arguments
            )
        arguments = {
            name: value
            for name, value in arguments.items()
            if value is not None and (labels is None or value is not labels)
        }
        return arguments if len(arguments) > 1 else next(iter(arguments.values()), None)


class DistillationMixin:
    """Mixin with `distillation_loss` for your own LightningModule; set `distiller` in `__init__`.

        class Student(DistillationMixin, LightningModule):
            def training_step(self, batch, batch_idx):
                inputs, labels = batch
                return self.distillation_loss(self(inputs), labels, inputs=inputs)

    The distiller is in no `state_dict`. If the module calls `save_hyperparameters`, give it
    `ignore=["distiller"]`, or every checkpoint has the teacher. Add the projections of its terms,
    `self.distiller.parameters()`, to the optimiser in `configure_optimizers`, and save them.
    """

    distiller: Distiller
    """Distiller with a teacher, an `Ensemble`, cached targets, or none of them."""
    _teacher_device: torch.device | None = None

    def distillation_loss(
        self,
        student_logits: Tensor,
        labels: Tensor,
        *,
        inputs: Any = None,
        index: Tensor | None = None,
        view: int = 0,
    ) -> Tensor:
        """Compute the loss of a batch and log its terms as `distill/loss`, `distill/hard_loss`, …

        Args:
            student_logits: Logits `[batch, classes]`.
            labels: Class indices `[batch]`.
            inputs: Inputs of the teacher; needed with a teacher.
            index: Indices of the images `[batch]`; needed with cached targets.
            view: Number of the images' augmentation, for cached targets.

        Returns:
            Scalar in nats, with the graph.

        Raises:
            TypeError: A class that is no LightningModule; otherwise as `Distiller`.
            ValueError: Same as `Distiller`.
        """
        if not isinstance(self, LightningModule):
            raise TypeError(f"self must be a LightningModule, got {type(self).__name__}")
        logits = take_logits(student_logits, "student_logits")
        if self.training:
            check_graph(logits, "student_logits")
        if self._teacher_device != logits.device:
            self._teacher_device = logits.device
            place(self.distiller, logits.device, _floating_dtype(self))
            self.distiller.synchronize()
        terms = self.distiller(logits, labels, inputs=inputs, index=index, view=view)
        _log(self, terms, len(logits))
        return terms["loss"]


def _log(pl_module: LightningModule, terms: dict[str, Tensor], batch_size: int) -> None:
    values = {f"distill/{name}": term.detach() for name, term in terms.items()}
    pl_module.log_dict(values, batch_size=batch_size)


_LABELS = ("label", "labels", "target", "targets", "y")
_INDICES = ("index", "indices", "idx")


def _labels_and_index(batch: Any, distiller: Distiller) -> tuple[Tensor | None, Tensor | None]:
    """Return labels, None of unlabelled data, and indices where targets are cached."""
    if distiller.targets is not None and isinstance(batch, tuple | list) and len(batch) == 2:
        item, place = batch
        if isinstance(item, tuple | list | Mapping):  # of `SeededView`
            return _labels_and_index(item, distiller)[0], place
    labels: Tensor | None = None
    index: Tensor | None = None
    known = True
    if isinstance(batch, Mapping):
        labels = _only(batch, _LABELS)
        index = _only(batch, _INDICES) if distiller.targets is not None else None
    elif isinstance(batch, tuple | list) and len(batch) in (1, 2, 3):
        labels, index = (*batch[1:], None, None)[:2]
    else:
        known = isinstance(batch, Tensor)
    if not known or (labels is None and distiller.alpha != 1):
        raise TypeError(
            "batch must be (inputs, labels) or (inputs, labels, index), or a mapping with one of "
            f"{', '.join(_LABELS)}, got {describe_output(batch)}: use DistillationMixin, or alpha "
            "1 for unlabelled data"
        )
    return labels, index


def _only(batch: Mapping[Any, Any], names: tuple[str, ...]) -> Tensor | None:
    found = [name for name in names if name in batch]
    if len(found) > 1:
        raise ValueError(
            f"batch must have one key of {', '.join(names)}, got {', '.join(found)}: use "
            "DistillationMixin"
        )
    value: Tensor | None = batch[found[0]] if found else None
    return value


def _floating_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the data type of the first floating-point parameter."""
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floating, None)
