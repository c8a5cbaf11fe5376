"""A Trainer with a projection beside its model: optimised, saved and restored with it."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from selfkd.integrations.transformers.inputs import IGNORED
from selfkd.losses.features import Projection

PROJECTION_FILE = "projection.safetensors"
"""File of the projection in the folder of a checkpoint, beside the student's weights."""


class ProjectionTrainer(Trainer):  # type: ignore[misc]
    """Trainer of transformers that trains a projection too.

    Attributes:
        projection: Map from the student's hidden states to the teacher's width; None if the widths
            are equal.
    """

    projection: Projection | None = None

    def check_devices(self, *, full_logits: bool) -> None:
        """Raise ValueError where a distillation cannot run on the devices as they are used.

        Args:
            full_logits: Whether the heads of the models compute the logits.
        """
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu must be 1 a process, got {self.args.n_gpu}: start with torchrun, or set "
                "CUDA_VISIBLE_DEVICES"
            )
        shards = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        if shards > 1:
            raise ValueError(f"sequences must be whole on each device, got {shards} parts of them")
        if not full_logits and (
            self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile
        ):
            raise ValueError("full_logits must be True under FSDP, DeepSpeed and compilation")

    def without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs of evaluation without the labels of rows that fill up the last batch.

        So that each process has as many batches, the first rows of a data set are evaluated again.
        """
        state, labels = self.accelerator.gradient_state, inputs.get("labels")
        integers = isinstance(labels, Tensor) and labels.dtype == torch.int64
        if self.args.world_size == 1 or not integers or not state.end_of_dataloader:
            return inputs
        rows, remainder = len(inputs["labels"]), state.remainder
        if remainder <= 0:
            return inputs
        real = min(max(remainder - rows * self.args.process_index, 0), rows)
        kept = inputs["labels"].clone()
        kept[real:] = IGNORED
        return {**inputs, "labels": kept}

    def make_projection(self, width: int, expected: int) -> None:
        """Make a projection where the widths of student and teacher differ.

        Raises:
            ValueError: Other widths under DeepSpeed or FSDP.
        """
        self.projection = None
        if width == expected:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                f"hidden_size must be the teacher's {expected} under DeepSpeed and FSDP, which "
                f"would not train a projection, got {width}"
            )
        self.projection = Projection(width, expected).to(self.args.device)
        if self.args.world_size > 1:
            # DistributedDataParallel does not average its gradients
            for parameter in self.projection.parameters():
                parameter.register_hook(self._mean_over_processes)  # type: ignore[no-untyped-call]

    def _mean_over_processes(self, tensor: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(tensor, "mean")
        return mean

    def project(self, state: Tensor) -> Tensor:
        """Return a hidden state in the teacher's width."""
        if self.projection is None:
            return state
        mapped: Tensor = self.projection(state.to(self.projection.linear.weight.dtype))
        return mapped

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser, with the projection as a further parameter group."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.projection is not None:
            optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if id(self.projection.linear.weight) not in optimized:
                group = {"params": list(self.projection.parameters()), "weight_decay": 0.0}
                optimizer.add_param_group(group)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student, and the projection in a separate file."""
        super().save_model(output_dir, _internal_call)
        if self.projection is not None and self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_file(self.projection.state_dict(), os.path.join(folder, PROJECTION_FILE))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_projection(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_projection(self.state.best_model_checkpoint)

    def _load_projection(self, folder: str) -> None:
        if self.projection is None:
            return
        file = os.path.join(folder, PROJECTION_FILE)
        if not os.path.isfile(file):
            raise FileNotFoundError(
                f"checkpoint must have {PROJECTION_FILE} beside its student, which was trained "
                f"with a projection, got {folder} without"
            )
        self.projection.load_state_dict(load_file(file))
