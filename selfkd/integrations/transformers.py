"""Distillation in the Trainer of transformers: of logits, hidden states and attention.

Needs `pip install 'selfkd[transformers]'`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.integrations.transformers_layers import resolve_layer_map, text_config
from selfkd.integrations.transformers_layers import start_from_teacher as start_from_teacher
from selfkd.losses import Average
from selfkd.losses.distillation import check_settings
from selfkd.losses.features import (
    Projection,
    attention_matrices,
    cosine_embedding,
    hidden_state_loss,
)
from selfkd.losses.sequences import sequence_terms

try:
    from transformers import PreTrainedModel, Trainer, TrainingArguments
    from transformers.loss.loss_utils import ForCausalLMLoss
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "transformers is not installed: pip install 'selfkd[transformers]'", name=error.name
    ) from error

IGNORED = -100
"""Label of ignored tokens in transformers, which enter no term."""
PROJECTION_FILE = "projection.safetensors"
"""File of the projection in the folder of a checkpoint, beside the student's weights."""


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trainer of transformers with the distillation loss of a teacher.

        loss = (1 - alpha) hard_loss + alpha soft_loss
               + hidden_weight hidden_loss + cosine_weight cosine_loss
               + attention_weight attention_loss

        hard_loss = CE(y, p_s)        soft_loss = T^2 KL(p_t^T || p_s^T)        p^T = softmax(z / T)

    Logits are `[batch, classes]` with one label a row, or `[batch, length, vocabulary]` with labels
    `[batch, length]`, which are shifted by one for causal models, as in their own loss. Labels of
    -100 are left out. hard_loss and soft_loss are means over labels, hidden_loss and cosine_loss
    over tokens, attention_loss over pairs of tokens, each over the whole batch of an optimiser
    step. They do not depend on the split into micro-batches, nor into processes unless
    `average_tokens_across_devices` is off. `label_smoothing_factor` of `args` applies to hard_loss.

    It is a mixin too: `class Mine(DistillationTrainer, Seq2SeqTrainer)` distils in another trainer.

    The terms are logged by name, before weighting, as means over the steps since the last log. In
    evaluation the loss is the same sum.

    Args:
        model: Student.
        args: Arguments of `Trainer`.
        teacher: Teacher, or several as an ensemble, run on the student's inputs. Frozen copies are
            made (`selfkd.Teacher`), which are in no checkpoint. The logits of an ensemble are
            averaged; its hidden states and attention are not compared.
        temperature: Temperature T, above 0.
        alpha: Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`. At 0 the teacher
            is still run, to log soft_loss.
        average: Whether an ensemble's `probabilities` or `logits` are averaged.
        hidden_weight: Weight of the mean squared error of hidden states, at least 0.
        cosine_weight: Weight of the cosine distance of the last hidden states, at least 0.
        attention_weight: Weight of the mean squared error of attention probabilities, at least 0.
            Both models must be made with `attn_implementation="eager"`.
        layer_map: Index of the teacher's layer for each layer of the student, from 0, without
            embeddings; `selfkd.losses.features.every_other` if not given.
        shift_labels: Whether logits are those of the next token; as in the student's own loss if
            not given.
        data_collator: Collator of `Trainer`, whose further arguments follow.

    Attributes:
        projection: Map from the student's hidden states to the teacher's width, shared by all
            layers; None if the widths are equal. It is trained without weight decay and clipping,
            and saved beside the student.

    Raises:
        ValueError: A setting out of range or an impossible map; in a training step, inputs without
            labels, or a model that returns no hidden states or attention.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = dict(vocab_size=9, num_attention_heads=2, intermediate_size=8, num_labels=2)
    >>> teacher, student = (
    ...     BertForSequenceClassification(
    ...         BertConfig(hidden_size=width, num_hidden_layers=layers, **sizes)
    ...     )
    ...     for width, layers in [(16, 4), (8, 2)]
    ... )
    >>> args = TrainingArguments("unused", use_cpu=True, report_to="none")
    >>> trainer = DistillationTrainer(student, args, teacher=teacher, hidden_weight=1.0)
    >>> trainer.projection, trainer.layer_map
    (Projection(
      (linear): Linear(in_features=8, out_features=16, bias=True)
    ), [1, 3])

    Reference:
        Sanh et al., "DistilBERT, a distilled version of BERT", 2019,
        https://arxiv.org/abs/1910.01108
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020,
        https://arxiv.org/abs/1909.10351
    """

    # compute_loss divides by the sizes of the whole batch
    loss_is_scaled_for_ga: bool | None = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        teacher: PreTrainedModel | Sequence[PreTrainedModel],
        temperature: float = 2.0,
        alpha: float = 0.5,
        average: Average = "probabilities",
        hidden_weight: float = 0.0,
        cosine_weight: float = 0.0,
        attention_weight: float = 0.0,
        layer_map: Sequence[int] | None = None,
        shift_labels: bool | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        check_settings(temperature, alpha, average, 0.0)
        teachers = list(teacher) if isinstance(teacher, Sequence) else [teacher]
        self.weights = {
            "hidden": hidden_weight, "cosine": cosine_weight, "attention": attention_weight
        }  # fmt: skip
        _check_weights(self.weights, len(teachers))
        self.temperature, self.alpha, self.shift_labels = temperature, alpha, shift_labels
        self.average = average
        self.layer_map = None
        if any(self.weights.values()):
            self.layer_map = resolve_layer_map(model, teachers[0], layer_map)
        self.projection: Projection | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._check_devices()
        self.teacher: Teacher | Ensemble = (
            Ensemble(teachers) if len(teachers) != 1 else Teacher(teachers[0])
        ).to(self.args.device)
        if hidden_weight or cosine_weight:
            self._make_projection(teachers[0])
        self._output_options = {
            "return_dict": True,
            "output_hidden_states": bool(hidden_weight or cosine_weight),
            "output_attentions": bool(attention_weight),
        }
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def _check_devices(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu must be 1 a process, got {self.args.n_gpu}: start with torchrun, or set "
                "CUDA_VISIBLE_DEVICES"
            )
        shards = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        if shards > 1:
            raise ValueError(f"sequences must be whole on each device, got {shards} parts of them")

    def _make_projection(self, teacher: PreTrainedModel) -> None:
        width, expected = (text_config(m).hidden_size for m in (self.model, teacher))
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

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return the micro-batches of a step, and their total labels, tokens and pairs `[3]`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        totals = torch.stack([self._sizes(batch) for batch in batches]).sum(dim=0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        if self.projection is not None:
            self.projection.zero_grad()  # Trainer does this only for the model
        self._steps += 1
        return batches, totals

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a micro-batch, as its part of the loss of the whole batch.

        Args:
            model: Student, in any wrapper.
            inputs: Inputs of student and teacher, with `labels`.
            return_outputs: Whether to return the student's outputs too.
            num_items_in_batch: Numbers of labels, tokens and pairs of the whole batch `[3]`, as
                from `get_batch_samples`, or of labels only; those of `inputs` if not given, and in
                evaluation.

        Returns:
            Scalar, and the outputs without hidden states and attention if `return_outputs`.

        Raises:
            ValueError: Inputs without labels, or a model that returns no hidden states or
                attention.
        """
        if "labels" not in inputs:
            raise ValueError(f"inputs must have 'labels', got {sorted(inputs)}")
        model_inputs = {
            name: value
            for name, value in inputs.items()
            # an encoder-decoder makes its inputs from the labels
            if name not in ("labels", "shift_labels") or text_config(self.model).is_encoder_decoder
        }
        outputs = model(**model_inputs, **self._output_options)
        teacher_outputs = self._run_teacher(model_inputs)
        whole = num_items_in_batch if model.training else None
        labels, token_share, pair_share = self._shares(inputs, whole)
        targets = self._targets(inputs)
        teacher_logits = teacher_outputs[0].logits
        if len(teacher_outputs) > 1:
            teacher_logits = torch.stack([member.logits for member in teacher_outputs])
        student_logits = outputs.logits
        if targets.ndim == 1:  # a row with one label is a sequence of one token
            student_logits, targets = student_logits[:, None], targets[:, None]
            teacher_logits = teacher_logits.unsqueeze(-2)
        terms = sequence_terms(
            student_logits,
            teacher_logits,
            targets,
            temperature=self.temperature,
            alpha=self.alpha,
            label_smoothing=self.args.label_smoothing_factor,
            average=self.average,
            normalizer=labels,
        )._asdict()
        loss = terms.pop("loss")
        mask = inputs.get("attention_mask")
        for name, term in self._feature_terms(outputs, teacher_outputs[0], mask):
            terms[f"{name}_loss"] = term * (pair_share if name == "attention" else token_share)
            loss = loss + self.weights[name] * terms[f"{name}_loss"]
        if whole is not None and self.args.average_tokens_across_devices:
            # DistributedDataParallel averages the gradients, but their sum is needed
            loss = loss * self.args.world_size
        if model.training:
            self._accumulate(terms)
        if not return_outputs:
            return loss
        left_out = ("hidden_states", "attentions")
        return loss, {name: value for name, value in outputs.items() if name not in left_out}

    def _run_teacher(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Return the outputs of the teacher, or of each member."""
        members = self.teacher.members if isinstance(self.teacher, Ensemble) else [self.teacher]
        with torch.no_grad(), self.accelerator.autocast():
            return [member.module.eval()(**inputs, **self._output_options) for member in members]

    def _targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the labels `[batch]` or `[batch, length]`, aligned with the logits."""
        labels: Tensor = inputs.get("shift_labels", inputs["labels"])
        if "shift_labels" in inputs or labels.ndim == 1 or not self._shifts():
            return labels
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def _shifts(self) -> bool:
        if self.shift_labels is not None:
            return self.shift_labels
        loss_function = getattr(self.model, "loss_function", None)
        return loss_function is ForCausalLMLoss and not text_config(self.model).is_encoder_decoder

    def _sizes(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the numbers of labels, tokens and pairs of tokens of a micro-batch, `[3]`."""
        labels = (self._targets(inputs) != IGNORED).sum()
        mask = inputs.get("attention_mask")
        if mask is None:
            rows = inputs.get("input_ids", inputs["labels"])
            mask = torch.ones_like(rows if rows.ndim == 2 else rows[:, None])
        lengths = (mask != 0).sum(dim=1)
        return torch.stack([labels, lengths.sum(), lengths.square().sum()])

    def _shares(self, inputs: Mapping[str, Any], whole: Tensor | int | None) -> list[Tensor]:
        """Return the number of labels of the whole batch, and the inputs' shares of the rest."""
        sizes = self._sizes(inputs)
        totals = sizes.clone()
        if whole is not None:
            whole = torch.as_tensor(whole, device=sizes.device).flatten()
            totals[: len(whole)] = whole
        totals = totals.clamp_min(1)
        return [totals[0], *(sizes[1:] / totals[1:])]

    def _feature_terms(
        self, outputs: Any, teacher_outputs: Any, mask: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        if self.layer_map is None:
            return
        if self._output_options["output_hidden_states"]:
            students, teachers = (_layers(m, "hidden_states") for m in (outputs, teacher_outputs))
            states = [self._project(state) for state in students[1:]]
            teachers = teachers[1:]  # the first are embeddings
            if self.weights["hidden"]:
                yield (
                    "hidden",
                    hidden_state_loss(states, teachers, layer_map=self.layer_map, mask=mask),
                )
            if self.weights["cosine"]:
                last = teachers[self.layer_map[-1]]
                yield "cosine", cosine_embedding(states[-1], last, mask=mask)
        if self._output_options["output_attentions"]:
            students, teachers = (_layers(m, "attentions") for m in (outputs, teacher_outputs))
            losses = [
                attention_matrices(student, teachers[layer], mask=mask)
                for student, layer in zip(students, self.layer_map, strict=True)
            ]
            yield "attention", torch.stack(losses).mean()

    def _project(self, state: Tensor) -> Tensor:
        if self.projection is None:
            return state
        mapped: Tensor = self.projection(state.to(self.projection.linear.weight.dtype))
        return mapped

    def _accumulate(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + term.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the terms with the training loss, as means over the steps since the last log."""
        if "loss" in logs and self._sums and self._steps:
            means = torch.stack(list(self._sums.values())) / self._steps
            if self.args.world_size > 1:
                reduction = "sum" if self.args.average_tokens_across_devices else "mean"
                means = self.accelerator.reduce(means, reduction)
            logs = {**logs, **dict(zip(self._sums, means.tolist(), strict=True))}
            self._sums, self._steps = {}, 0
        super().log(logs, start_time)

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
        if self.projection is not None:
            file = os.path.join(resume_from_checkpoint, PROJECTION_FILE)
            self.projection.load_state_dict(load_file(file))


def _check_weights(weights: Mapping[str, float], teachers: int) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}_weight must be >= 0 and finite, got {weight}")
    if any(weights.values()) and teachers != 1:
        raise ValueError(
            "teacher must be one model where hidden states or attention are compared, got "
            f"{teachers}"
        )


def _layers(outputs: Any, name: str) -> tuple[Tensor, ...]:
    layers: tuple[Tensor, ...] | None = getattr(outputs, name, None)
    if layers and all(layer is not None for layer in layers):
        return layers
    hint = ': make both models with attn_implementation="eager"' if name == "attentions" else ""
    raise ValueError(f"{name} must be returned by both models, got {layers}{hint}")
