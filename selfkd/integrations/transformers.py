"""Distillation in the Trainer of transformers: logits, hidden states, attention.

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

from selfkd.distill.layers import copy_layers
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.losses.distillation import Average, check_settings
from selfkd.losses.features import (
    Projection,
    attention_matrices,
    cosine_embedding,
    every_other,
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
"""The label of transformers that no term is taken of."""
PROJECTION_FILE = "projection.safetensors"
"""Where the projection stands, in the folder of each checkpoint beside the student's weights."""


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` whose student also learns from a teacher.

        loss = (1 - alpha) hard_loss + alpha soft_loss
               + hidden_weight hidden_loss + cosine_weight cosine_loss
               + attention_weight attention_loss

        hard_loss = CE(y, p_s)        soft_loss = T^2 KL(p_t^T || p_s^T)        p^T = softmax(z / T)

    Logits are `[batch, classes]` of one label a row, or `[batch, length, vocabulary]` of labels
    `[batch, length]`, which causal models shift by one, as their own loss does. Labels of -100 are
    left out. hard_loss and soft_loss are means over labels, hidden_loss and cosine_loss over
    tokens, attention_loss over pairs of tokens, each over the whole batch of an optimiser step:
    the split into micro-batches, and into processes unless `average_tokens_across_devices` is off,
    changes nothing. `label_smoothing_factor` of `args` is that of hard_loss.

    It is a mixin too: `class Mine(DistillationTrainer, Seq2SeqTrainer)` distils in another trainer.

    The terms are logged by name, before weighting, as means over the steps since the last log. In
    evaluation the loss is the same sum.

    Args:
        model: the student.
        args: as for `Trainer`.
        teacher: a frozen copy is taken (`selfkd.Teacher`); its inputs are the student's. It is in
            no checkpoint. Of several, an ensemble, the logits are averaged; their hidden states and
            attention are not compared.
        temperature: T, above 0.
        alpha: weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`. At 0 the teacher
            is still asked, for soft_loss in the log.
        average: of an ensemble's `probabilities` or `logits`.
        hidden_weight: of the mean squared error of hidden states, at least 0.
        cosine_weight: of 1 - cos of the student's last hidden states and the teacher's, at least 0.
        attention_weight: of the mean squared error of attention probabilities, at least 0. Both
            models must be made with `attn_implementation="eager"`.
        layer_map: for each layer of the student the teacher's, from 0, embeddings left out; none
            is every other one (`selfkd.losses.features.every_other`).
        shift_labels: whether logits are of the next token; none is as the student's own loss has
            it.
        data_collator: this and what follows as for `Trainer`.

    `projection` maps the student's hidden states to the teacher's width where they differ, one for
    all layers; else it is None. It is optimised without weight decay and clipping, and saved beside
    the student.

    Raises:
        ValueError: a setting out of range, an impossible map; in a step, inputs without labels, or
            a model that returns no hidden states or attention.

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

    # compute_loss divides by what the whole batch has
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
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}_weight must be >= 0 and finite, got {weight}")
        self.temperature, self.alpha, self.shift_labels = temperature, alpha, shift_labels
        self.average = average
        self.layer_map = None
        if any(self.weights.values()):
            if len(teachers) != 1:
                raise ValueError(
                    "teacher must be one model where hidden states or attention are compared, got "
                    f"{len(teachers)}"
                )
            self.layer_map = _layer_map(model, teachers[0], layer_map)
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
        self._wanted = {
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
        width, expected = (_config(m).hidden_size for m in (self.model, teacher))
        if width == expected:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                f"hidden_size must be the teacher's {expected} under DeepSpeed and FSDP, which "
                f"would not train a projection, got {width}"
            )
        self.projection = Projection(width, expected).to(self.args.device)
        if self.args.world_size > 1:
            # it is outside of what DistributedDataParallel averages
            for parameter in self.projection.parameters():
                parameter.register_hook(self._mean_over_processes)  # type: ignore[no-untyped-call]

    def _mean_over_processes(self, tensor: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(tensor, "mean")
        return mean

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return the micro-batches of a step, and how many labels, tokens and pairs they have."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        totals = torch.stack([self._sizes(batch) for batch in batches]).sum(dim=0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        if self.projection is not None:
            self.projection.zero_grad()  # Trainer does so only for the model
        self._steps += 1
        return batches, totals

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch, as its part of the whole batch's.

        Args:
            model: the student, in whatever wrapper.
            inputs: of student and teacher, with `labels`.
            return_outputs: whether to return what the student returned too.
            num_items_in_batch: of the whole batch the number of labels, tokens and pairs `[3]`, as
                `get_batch_samples` has them, or of labels only; none is what `inputs` have, as it
                is in evaluation.

        Returns:
            Scalar, and the outputs without hidden states and attention if `return_outputs`.
        """
        if "labels" not in inputs:
            raise ValueError(f"inputs must have 'labels', got {sorted(inputs)}")
        asked = {
            name: value
            for name, value in inputs.items()
            # an encoder-decoder makes its inputs of them
            if name not in ("labels", "shift_labels") or _config(self.model).is_encoder_decoder
        }
        outputs, answers = model(**asked, **self._wanted), self._ask(asked)
        whole = num_items_in_batch if model.training else None
        labels, tokens_part, pairs_part = self._parts(inputs, whole)
        targets = self._targets(inputs)
        teacher_logits = answers[0].logits
        if len(answers) > 1:
            teacher_logits = torch.stack([answer.logits for answer in answers])
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
        for name, term in self._feature_terms(outputs, answers[0], inputs.get("attention_mask")):
            terms[f"{name}_loss"] = term * (pairs_part if name == "attention" else tokens_part)
            loss = loss + self.weights[name] * terms[f"{name}_loss"]
        if whole is not None and self.args.average_tokens_across_devices:
            # DistributedDataParallel takes the mean of gradients, here their sum is right
            loss = loss * self.args.world_size
        if model.training:
            self._add_up(terms)
        if not return_outputs:
            return loss
        left_out = ("hidden_states", "attentions")
        return loss, {name: value for name, value in outputs.items() if name not in left_out}

    def _ask(self, inputs: Mapping[str, Any]) -> list[Any]:
        members = self.teacher.members if isinstance(self.teacher, Ensemble) else [self.teacher]
        with torch.no_grad(), self.accelerator.autocast():
            return [member.module.eval()(**inputs, **self._wanted) for member in members]

    def _targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Labels `[batch]` or `[batch, length]`, each at the place of the logits that give it."""
        labels: Tensor = inputs.get("shift_labels", inputs["labels"])
        if "shift_labels" in inputs or labels.ndim == 1 or not self._shifts():
            return labels
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def _shifts(self) -> bool:
        if self.shift_labels is not None:
            return self.shift_labels
        own = getattr(self.model, "loss_function", None)
        return own is ForCausalLMLoss and not _config(self.model).is_encoder_decoder

    def _sizes(self, inputs: Mapping[str, Any]) -> Tensor:
        """How many labels, tokens and pairs of tokens there are, `[3]`."""
        labels = (self._targets(inputs) != IGNORED).sum()
        mask = inputs.get("attention_mask")
        if mask is None:
            rows = inputs.get("input_ids", inputs["labels"])
            mask = torch.ones_like(rows if rows.ndim == 2 else rows[:, None])
        lengths = (mask != 0).sum(dim=1)
        return torch.stack([labels, lengths.sum(), lengths.square().sum()])

    def _parts(self, inputs: Mapping[str, Any], whole: Tensor | int | None) -> list[Tensor]:
        """Labels of the whole batch, and how much of its tokens and of its pairs is here."""
        sizes = self._sizes(inputs)
        totals = sizes.clone()
        if whole is not None:
            whole = torch.as_tensor(whole, device=sizes.device).flatten()
            totals[: len(whole)] = whole
        totals = totals.clamp_min(1)
        return [totals[0], *(sizes[1:] / totals[1:])]

    def _feature_terms(
        self, outputs: Any, answers: Any, mask: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        if self.layer_map is None:
            return
        if self._wanted["output_hidden_states"]:
            students, teachers = (_layers(m, "hidden_states") for m in (outputs, answers))
            states = [self._project(state) for state in students[1:]]
            teachers = teachers[1:]  # of the embeddings
            if self.weights["hidden"]:
                yield (
                    "hidden",
                    hidden_state_loss(states, teachers, layer_map=self.layer_map, mask=mask),
                )
            if self.weights["cosine"]:
                last = teachers[self.layer_map[-1]]
                yield "cosine", cosine_embedding(states[-1], last, mask=mask)
        if self._wanted["output_attentions"]:
            students, teachers = (_layers(m, "attentions") for m in (outputs, answers))
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

    def _add_up(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + term.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the terms beside the training loss, as means over the steps since the last time."""
        if "loss" in logs and self._sums and self._steps:
            means = torch.stack(list(self._sums.values())) / self._steps
            if self.args.world_size > 1:
                over = "sum" if self.args.average_tokens_across_devices else "mean"
                means = self.accelerator.reduce(means, over)
            logs = {**logs, **dict(zip(self._sums, means.tolist(), strict=True))}
            self._sums, self._steps = {}, 0
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give the projection to the optimiser too."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.projection is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if id(self.projection.linear.weight) not in held:
                group = {"params": list(self.projection.parameters()), "weight_decay": 0.0}
                optimizer.add_param_group(group)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student, and the projection in a file of its own."""
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


def start_from_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, *, layer_map: Sequence[int] | None = None
) -> list[str]:
    """Start a student from some of its teacher's layers and all else that it has.

    Args:
        student: of the teacher's class and sizes, with fewer layers or as many; is changed.
        teacher: is not.
        layer_map: for each layer of the student the teacher's, from 0; none is every other one.

    Returns:
        Names of the student's parameters and buffers that were copied to.

    Raises:
        ValueError: an impossible map, or models that do not fit (see `copy_layers`).

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(vocab_size=9, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    >>> teacher, student = (BertModel(BertConfig(num_hidden_layers=n, **sizes)) for n in (4, 2))
    >>> names = start_from_teacher(student, teacher)
    >>> weights = (student.encoder.layer[0], teacher.encoder.layer[1])
    >>> torch.equal(*(layer.output.dense.weight for layer in weights))
    True

    Reference:
        Sanh et al., "DistilBERT, a distilled version of BERT", 2019,
        https://arxiv.org/abs/1910.01108
    """
    layers = _layer_map(student, teacher, layer_map)
    path = _path_of_layers(student)
    mapping = {f"{path}.{i}": f"{path}.{layer}" for i, layer in enumerate(layers)}
    steps = path.split(".")
    for depth, step in enumerate(steps):
        above = ".".join(steps[:depth])
        for name, _ in student.get_submodule(above).named_children():
            if name != step:
                beside = ".".join([*steps[:depth], name])
                mapping[beside] = beside
    return copy_layers(student, teacher, mapping)


def _layers(outputs: Any, name: str) -> tuple[Tensor, ...]:
    layers: tuple[Tensor, ...] | None = getattr(outputs, name, None)
    if layers and all(layer is not None for layer in layers):
        return layers
    way_out = ': make both models with attn_implementation="eager"' if name == "attentions" else ""
    raise ValueError(f"{name} must be returned by both models, got {layers}{way_out}")


def _config(model: Any) -> Any:
    return model.config.get_text_config()


def _layer_map(
    student: PreTrainedModel, teacher: PreTrainedModel, layer_map: Sequence[int] | None
) -> list[int]:
    counts = [_config(model).num_hidden_layers for model in (student, teacher)]
    if layer_map is None:
        return every_other(*counts)
    if len(layer_map) != counts[0] or not all(0 <= layer < counts[1] for layer in layer_map):
        raise ValueError(
            f"layer_map must be {counts[0]} layers in [0, {counts[1]}), got {list(layer_map)}"
        )
    return list(layer_map)


def _path_of_layers(model: PreTrainedModel) -> str:
    count = _config(model).num_hidden_layers
    paths: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(paths) != 1:
        raise ValueError(
            f"student must have one list of its {count} layers, got {paths}: use "
            "selfkd.distill.layers.copy_layers"
        )
    return paths[0]
