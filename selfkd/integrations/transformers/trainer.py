"""The Trainer of transformers with a teacher."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.distill.outputs import check_graph
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.integrations.transformers.batches import shares_of, sizes_of, targets_of
from selfkd.integrations.transformers.card import describe_distillation
from selfkd.integrations.transformers.host import follow_host, on_host
from selfkd.integrations.transformers.inputs import (
    LABEL_COLUMNS,
    Teachers,
    as_teachers,
    bare,
    column_names,
    gathered_labels,
    is_encoder_decoder,
    match_classes,
    match_vocabularies,
    output_options,
    predictions_of,
    require_labels,
    run_teacher,
    select_inputs,
    task_of,
    with_labels,
)
from selfkd.integrations.transformers.layers import (
    check_weights,
    feature_terms,
    resolve_layer_map,
    text_config,
)
from selfkd.integrations.transformers.logits import (
    averaged,
    check_linear_head,
    logits_of,
    loss_terms,
    run_to_head,
    teacher_logits,
)
from selfkd.losses import Average
from selfkd.losses.distillation import check_settings
from selfkd.losses.divergences import Divergence, SoftTerm
from selfkd.losses.sequences import LinearLogits

try:
    from transformers import PreTrainedModel, TrainingArguments
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.utils.generic import find_labels

    from selfkd.integrations.transformers.cached import ROWS, Targets
    from selfkd.integrations.transformers.terms import TermsTrainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"transformers cannot be imported ({error}): pip install 'selfkd[transformers]'",
        name=error.name,
    ) from error


class DistillationTrainer(TermsTrainer):
    """Trainer of transformers with the distillation loss of a teacher, live or cached.

        loss = (1 - alpha) hard_loss + alpha soft_loss
               + hidden_weight hidden_loss + cosine_weight cosine_loss
               + attention_weight attention_loss

        hard_loss = CE(y, p_s)        soft_loss = T^2 D(p_t^T, p_s^T)        p^T = softmax(z / T)

    Logits are `[batch, classes]` with one label a row, or `[batch, length, vocabulary]` with labels
    `[batch, length]`, which are shifted by one for causal models, as in their own loss. Labels of
    -100 are left out; at alpha = 1 there need be no labels, and all tokens count that the attention
    mask shows. hard_loss and soft_loss are means over labels, hidden_loss and cosine_loss over
    tokens, attention_loss over pairs of tokens, each over the whole batch of an optimiser step, and
    in evaluation over the whole data set. They do not depend on the split into micro-batches, nor
    into processes unless `average_tokens_across_devices` is off. `label_smoothing_factor` of `args`
    applies to hard_loss. Several labels a row and numbers (`problem_type` of the student, as
    transformers reads it) have the terms of `selfkd.losses.multi_label_terms` and
    `regression_terms`.

    Each model is given the inputs that its own forward takes; the columns of all are kept. Classes
    are matched by `id2label` and `label2id`. Vocabularies of one tokenizer that are padded to
    different sizes are compared over their common part; hard_loss is over all of the student's.

    The terms are logged by name, before weighting, as means over the steps since the last log. In
    evaluation the loss is the same sum, and `exp(eval_hard_loss)` is the perplexity.

    With `targets`, which `selfkd.cache_logits` has made of `train_dataset`, no teacher is in
    memory: each item or token has its cached logits, whatever the seed, order, batch size, workers
    and padding on the right, also after a resume. Evaluation is then by hard_loss alone, unless
    `eval_dataset` is `train_dataset`.

    It is a mixin too: `class Mine(DistillationTrainer, Seq2SeqTrainer)` distils in another trainer,
    whose further keywords it passes on.

    Args:
        model: Student; None with `model_init`.
        args: Arguments of `Trainer`.
        teacher: Teacher, or several as an ensemble. Frozen copies are made, which are in no
            checkpoint; quantised, offloaded and sharded models and a `selfkd.Teacher` are taken as
            they are. Of an ensemble only logits are compared.
        targets: Cached logits of `train_dataset` in place of a teacher, from `selfkd.cache_logits`,
            `load_logits` or `import_logprobs`: all logits, the largest, or samples.
        temperature: Temperature T, above 0. 2 stands between tokens, which want 1, and classes,
            which want 2 to 10 (docs/choosing.md), as this trainer takes both.
        alpha: Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`. 0.5 keeps the
            labels in, which fine-tuning is for. At 0 the teacher is still run, to log soft_loss.
        average: Whether an ensemble's `probabilities` or `logits` are averaged.
        divergence: Divergence D of the soft term: `forward_kl`, `reverse_kl` or `js`.
        beta: Weight of the teacher in the mixture of `js`, in [0, 1].
        full_logits: Whether logits of all tokens are computed at once. If not, losses are computed
            from the inputs of linear heads (`selfkd.losses.linear_sequence_terms`).
        hidden_weight: Weight of the mean squared error of hidden states, at least 0.
        cosine_weight: Weight of the cosine distance of the last hidden states, at least 0.
        attention_weight: Weight of the mean squared error of attention probabilities, at least 0.
            Both models must be made with `attn_implementation="eager"`.
        layer_map: Index of the teacher's layer for each layer of the student, from 0, without
            embeddings; `selfkd.losses.features.every_other` if not given.
        shift_labels: Whether logits are those of the next token; as in the student's own loss if
            not given.
        further: Further keywords of `Trainer`, or of the trainer mixed in, such as `peft_config`.

    Attributes:
        projection: Map from the student's hidden states to the teacher's width, shared by all
            layers; None if the widths are equal. It is trained without weight decay and clipping.

    Raises:
        ValueError: A setting out of range, an impossible map, models that do not match, both a
            teacher and targets or neither, or targets of another data set or vocabulary; in a step,
            inputs without labels, or a model that returns no graph, states or attention.
        TypeError: In a step, outputs of which it is not clear what the logits are.

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
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes", 2024, https://arxiv.org/abs/2306.13649
    """

    # compute_loss divides by the sizes of the whole batch
    loss_is_scaled_for_ga: bool | None = True
    teacher: Teacher | Ensemble | None = None
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: Teachers | Sequence[Teachers] | None = None,
        targets: Targets | None = None,
        temperature: float = 2.0,
        alpha: float = 0.5,
        average: Average = "probabilities",
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        full_logits: bool = True,
        hidden_weight: float = 0.0,
        cosine_weight: float = 0.0,
        attention_weight: float = 0.0,
        layer_map: Sequence[int] | None = None,
        shift_labels: bool | None = None,
        **further: Any,
    ) -> None:
        check_settings(temperature, alpha, average, 0.0)
        SoftTerm(divergence, beta).checked()
        if (teacher is None) == (targets is None):
            both = "neither" if teacher is None else "both"
            raise ValueError(f"teacher or targets must be given, one of the two, got {both}")
        members = as_teachers(teacher) if teacher is not None else []
        self.weights = {
            "hidden": hidden_weight, "cosine": cosine_weight, "attention": attention_weight
        }  # fmt: skip
        check_weights(self.weights, len(members))
        if further.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func must be None, as the loss is this trainer's, got one"
            )
        if not full_logits and len(members) > 1:
            raise ValueError(f"full_logits must be True with {len(members)} teachers, got False")
        self.temperature, self.alpha, self.shift_labels = temperature, alpha, shift_labels
        self.average, self.full_logits = average, full_logits
        self._settings: dict[str, Any] = {
            "temperature": temperature, "alpha": alpha, "average": average,
            "divergence": divergence, "beta": beta,
        }  # fmt: skip
        self._given_map = layer_map
        self.layer_map: list[int] | None = None
        self._output_options = {
            "return_dict": True,
            "output_hidden_states": bool(hidden_weight or cosine_weight),
            "output_attentions": bool(attention_weight),
        }
        self.start_sums()
        self.targets = targets
        super().__init__(model=model, args=args, **further)
        self.check_devices(full_logits=full_logits)
        self.check_targets(temperature, divergence)
        self._members = [member.to(self.args.device) for member in members]
        if members:
            self.teacher = members[0] if len(members) == 1 else Ensemble(members)
        self.label_names = (
            self.args.label_names or find_labels(type(bare(self.model))) or ["labels"]
        )
        self._match_student(self.model)

    def _match_student(self, model: nn.Module) -> None:
        """Match a student with the teachers: layers, classes and vocabulary."""
        self.match_targets(model)
        teachers = [member.module for member in self._members]
        if any(self.weights.values()):
            self.layer_map = resolve_layer_map(bare(model), bare(teachers[0]), self._given_map)
        self._columns = [match_classes(model, teacher) for teacher in teachers]
        if teachers:
            self._compared = match_vocabularies(model, teachers, self.processing_class)
        if not self.full_logits:
            check_linear_head(model, "student")
            for teacher in teachers:
                check_linear_head(teacher, "teacher")
        if self.weights["hidden"] or self.weights["cosine"]:
            widths = [text_config(bare(each)).hidden_size for each in (model, teachers[0])]
            self.make_projection(*widths)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a student by `model_init`, and match it with the teacher."""
        model: nn.Module = super().call_model_init(trial)
        if hasattr(self, "_members"):  # not yet while `Trainer` is made
            self._match_student(model)
        return model

    def _set_signature_columns_if_needed(self) -> None:
        made = self._signature_columns is not None
        super()._set_signature_columns_if_needed()
        if not made:
            models = [self.model, *(member.module for member in self._members)]
            own = self._signature_columns or []
            self._signature_columns = [*own, *column_names(models), *LABEL_COLUMNS]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return the micro-batches of a step, and their labels, tokens, pairs and rows `[4]`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            follow_host(batch)
        batches = [self._with_labels(batch) for batch in batches]
        if not batches:
            return batches, None
        sizes = [sizes_of(on_host(batch), shift=self._shifts()) for batch in batches]
        totals = torch.stack(sizes).sum(dim=0)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.reduce(totals.to(device), "sum")
        if self.projection is not None:
            self.projection.zero_grad()  # Trainer does this only for the model
        self._steps += 1
        return batches, totals

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a micro-batch, as its part of the loss of the whole batch.

        Args:
            model: Student, in any wrapper.
            inputs: Inputs of student and teacher, with `labels`.
            return_outputs: Whether to return the student's outputs too.
            num_items_in_batch: Sizes of the whole batch `[4]`, as from `get_batch_samples`, or its
                number of labels; those of `inputs` if not given, and in evaluation.

        Returns:
            Scalar, and the outputs without hidden states and attention if `return_outputs`.

        Raises:
            ValueError: Inputs without labels, logits without a graph, or a model that returns no
                hidden states or attention.
            TypeError: Outputs of which it is not clear what the logits are.
        """
        inputs = self._with_labels(inputs)
        full = self.full_logits or return_outputs
        outputs, student = self._run_student(model, inputs, full=full)
        logits = student.hidden if isinstance(student, LinearLogits) else student
        if model.training:
            check_graph(logits, "student_logits")
        known = on_host(inputs)
        sizes = sizes_of(known, shift=self._shifts())
        whole = num_items_in_batch if model.training else None
        labels = inputs.get("labels")
        task = task_of(self.model, labels)
        rows = logits.ndim == 2 and (task != "single_label" or labels is None)
        if task == "single_label":
            labels = targets_of(known, shift=self._shifts(), rows=rows)
        teachers, teacher = self._teacher_logits(inputs, logits, labels, full=full)
        count, token_share, pair_share = shares_of(sizes, whole, rows=rows)
        terms = loss_terms(
            task,
            student,
            teacher,
            labels,
            vocabulary=self._compared,
            normalizer=count,
            label_smoothing=self.args.label_smoothing_factor,
            **self._settings,
        )
        loss = terms.pop("loss")
        if "labels" not in inputs:
            del terms["hard_loss"]
        units = dict.fromkeys(terms, sizes[3 if rows else 0])
        if self.layer_map is not None:
            for name, term in feature_terms(
                outputs,
                teachers[0] if full else teachers[0][0],
                self.weights,
                self.layer_map,
                project=self.project,
                mask=inputs.get("attention_mask"),
                trained=bare(model) if model.training else None,
            ):
                part = term * (pair_share if name == "attention" else token_share)
                loss = loss + self.weights[name] * part
                terms[f"{name}_loss"] = part
                units[f"{name}_loss"] = sizes[2 if name == "attention" else 1]
        if whole is not None and self.args.average_tokens_across_devices:
            # DistributedDataParallel averages the gradients, but their sum is needed
            loss = loss * self.args.world_size
        if model.training:
            self._sums.add(terms, dict.fromkeys(terms, 1))
        else:
            self._eval_sums.add(terms, units)
        if not return_outputs:
            return loss
        outputs = outputs if isinstance(outputs, Mapping) else {"logits": student}
        return loss, {k: v for k, v in outputs.items() if k not in ("hidden_states", "attentions")}

    def _run_student(
        self, model: nn.Module, inputs: Mapping[str, Any], *, full: bool = True
    ) -> tuple[Any, Tensor | LinearLogits]:
        """Return outputs and logits of the student."""
        given = select_inputs(model, inputs, self.label_names)
        given |= output_options(model, self._output_options)
        if not full:
            return run_to_head(model, given)
        outputs = model(**given)
        return outputs, logits_of(outputs, model, "student")

    def _teacher_logits(
        self, inputs: Mapping[str, Any], logits: Tensor, labels: Any, *, full: bool
    ) -> tuple[list[Any], Any]:
        """Return the outputs of live teachers, and the logits, None where none are cached."""
        if self.targets is None:
            outputs = self._run_teacher(inputs) if full else self._run_teacher(inputs, run_to_head)
            if not full:
                return outputs, outputs[0][1]
            members = teacher_logits(outputs, self._members)
            return outputs, averaged(members, self._columns, logits)
        known, training = on_host(inputs), self.model.training
        return [], self.cached_teacher(known, logits, labels, training=training)

    def _run_teacher(self, inputs: Mapping[str, Any], run: Any = None) -> list[Any]:
        """Return the outputs of the teacher, or of each member."""
        with self.accelerator.autocast():
            return [
                run_teacher(member.module, inputs, self._output_options, self.label_names, run=run)
                for member in self._members
            ]

    def _with_labels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return require_labels(inputs, self.model, self.label_names, optional=self.alpha == 1)

    def _shifts(self) -> bool:
        if self.shift_labels is not None:
            return self.shift_labels
        loss_function = getattr(bare(self.model), "loss_function", None)
        return loss_function is ForCausalLMLoss and not is_encoder_decoder(self.model)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **further: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return loss, predictions and labels of a batch; no loss without labels if alpha < 1."""
        inputs = self._prepare_inputs(self.without_repeats(with_labels(inputs, self.label_names)))
        generates = getattr(self.args, "predict_with_generate", False) and not prediction_loss_only
        has_labels = "labels" in inputs
        loss, outputs = None, None
        with torch.no_grad(), self.compute_loss_context_manager():
            if has_labels or (self.alpha == 1 and (self.targets is None or ROWS in inputs)):
                loss = self.compute_loss(model, inputs, not (prediction_loss_only or generates))
                loss, outputs = loss if isinstance(loss, tuple) else (loss, None)
                loss = loss.detach().mean()
            elif not generates:
                outputs, logits = self._run_student(model, inputs)
                outputs = outputs if isinstance(outputs, Mapping) else {"logits": logits}
        if generates:
            given = select_inputs(model, inputs, self.label_names)
            given |= {"labels": inputs["labels"]} if has_labels else {}
            _, *rest = super().prediction_step(model, given, False, ignore_keys, **further)
            return loss, *rest
        if prediction_loss_only or outputs is None:
            return loss, None, None
        labels = gathered_labels(inputs, self.label_names)
        return loss, predictions_of(outputs, self.model, ignore_keys), labels

    def create_model_card(self, *args: Any, **further: Any) -> None:
        """Write the card of the student, with its teachers and the settings of the loss."""
        super().create_model_card(*args, **further)
        if self.is_world_process_zero():
            teachers = [member.module for member in self._members]
            weights = {f"{name}_weight": weight for name, weight in self.weights.items()}
            cached = 0 if self.targets is None else self.targets.members
            text = describe_distillation(teachers, self._settings | weights, cached=cached)
            with open(
                os.path.join(self.args.output_dir, "README.md"), "a", encoding="utf-8"
            ) as file:
                file.write(text)
