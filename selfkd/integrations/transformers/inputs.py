"""What each model of a distillation takes and returns: inputs, labels, classes and vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.distill.layers import check_whole, unwrap
from selfkd.distill.outputs import map_tensors
from selfkd.distill.signature import bare as bare
from selfkd.distill.signature import config_of as config_of
from selfkd.distill.signature import is_encoder_decoder as is_encoder_decoder
from selfkd.distill.signature import signature_of as signature_of
from selfkd.distill.signature import without_cache
from selfkd.distill.tasks import Task
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.integrations.transformers.host import HOST
from selfkd.soft_targets.tokens import IGNORED as IGNORED

LABEL_COLUMNS = ("labels", "label", "label_ids")
"""Names under which labels are found, beside `label_names` of the arguments."""
PADDING = 0.01
"""Share by which the vocabularies of one tokenizer differ at most where they are padded."""

Teachers = nn.Module | Teacher | Ensemble
"""What is taken as a teacher."""
_TASKS: dict[str, Task] = {"regression": "regression", "multi_label_classification": "multi_label"}


def select_inputs(
    model: nn.Module, inputs: Mapping[str, Any], label_names: Sequence[str]
) -> dict[str, Any]:
    """Return the inputs that a model's forward takes, without labels.

    Labels are kept for an encoder-decoder, which makes inputs from them.
    """
    names, takes_any = signature_of(model)
    labels = {*LABEL_COLUMNS, "shift_labels", "soft_target_rows", HOST, *label_names}
    if is_encoder_decoder(model):
        labels.discard("labels")
    return {
        name: value
        for name, value in inputs.items()
        if name not in labels and (takes_any or name in names)
    }


def output_options(model: nn.Module, options: Mapping[str, bool]) -> dict[str, bool]:
    """Return the options of outputs that a model takes."""
    if config_of(model) is not None:
        return dict(options)
    names, takes_any = signature_of(model)
    asked = {name for name, value in options.items() if value and name != "return_dict"}
    taken = names | asked if takes_any else names
    return {name: value for name, value in options.items() if name in taken}


def with_labels(inputs: Mapping[str, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """Return the inputs with their labels as `labels`, or without where they are None.

    >>> with_labels({"input_ids": 1, "label": 2}, ["labels"])["labels"]
    2
    """
    found = dict(inputs)
    names = (*LABEL_COLUMNS[:1], *(label_names if len(label_names) == 1 else ()), *LABEL_COLUMNS)
    label = next((found[name] for name in names if found.get(name) is not None), None)
    if label is None:
        return {name: value for name, value in found.items() if name not in names}
    return {**found, "labels": label}


def require_labels(
    inputs: Mapping[str, Any], model: nn.Module, label_names: Sequence[str], *, optional: bool
) -> dict[str, Any]:
    """Return the inputs with their labels as `labels`.

    Args:
        inputs: Inputs of a batch.
        model: Student.
        label_names: Names of labels.
        optional: Whether there may be none, but for an encoder-decoder.

    Raises:
        ValueError: Inputs without labels.
    """
    named = with_labels(inputs, label_names)
    decodes = is_encoder_decoder(model)
    if "labels" not in named and (decodes or not optional):
        way_out = "alpha=1 distils without, label_names of the arguments says their name"
        if decodes:
            way_out = "an encoder-decoder makes its inputs from them"
        raise ValueError(f"inputs must have 'labels', got {sorted(named)}: {way_out}")
    return named


def task_of(model: nn.Module, labels: Tensor | None) -> Task:
    """Return the kind of a student's labels, as transformers reads it of a classifier.

    Args:
        model: Student.
        labels: Labels of a batch; floating-point ones `[batch, classes]` are several labels a row.
    """
    config = config_of(model)
    if config is None or has_token_logits(model):
        return "single_label"
    kind = getattr(config, "problem_type", None)
    if kind is not None:
        return _TASKS.get(kind, "single_label")
    if _class_count(model) == 1:
        return "regression"
    several = labels is not None and labels.ndim == 2 and labels.is_floating_point()
    return "multi_label" if several else "single_label"


@torch.no_grad()
def run_teacher(
    module: nn.Module,
    inputs: Mapping[str, Any],
    options: Mapping[str, bool],
    names: Sequence[str],
    *,
    run: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None,
) -> Any:
    """Return the outputs of a teacher in eval mode, for the inputs that it takes.

    Inputs are moved to the device of its weights and, if floating point, cast to their dtype. The
    mode of its parts is put back.

    Args:
        module: Teacher.
        inputs: Inputs of student and teacher.
        options: Options of outputs, as keywords of its forward.
        names: Names of labels.
        run: Function that runs the teacher on the keywords of its forward; a call if not given.
    """
    weights = list(module.parameters())
    device = next((weight.device for weight in weights if not weight.is_meta), None)
    # weights in 8 bits are computed with in another dtype
    wide = (
        weight.dtype for weight in weights if weight.is_floating_point() and weight.itemsize > 1
    )
    dtype = next(wide, None)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if tensor.is_floating_point() else None)

    training = [part for part in module.modules() if getattr(part, "training", False)]
    if training:
        module.eval()
    try:
        given = map_tensors(select_inputs(module, inputs, names), cast)
        given = without_cache(module) | given | output_options(module, options)
        return module(**given) if run is None else run(module, given)
    finally:
        for part in training:
            part.training = True


def must_stay(model: nn.Module) -> bool:
    """Whether a teacher is run as it is: quantised, offloaded, or in shards or on several devices.

    Such a model can be neither copied nor moved, or only at the price of its size in memory.
    """
    inside = bare(model)
    places = getattr(inside, "hf_device_map", None) or {}
    try:
        check_whole("teacher", model)
    except ValueError:
        return True
    return (
        getattr(inside, "quantization_method", None) is not None
        or bool(getattr(inside, "is_quantized", False))
        or len(set(map(str, places.values()))) > 1
        or "disk" in places.values()
        or any(parameter.is_meta for parameter in model.parameters())
    )


def has_token_logits(model: nn.Module) -> bool:
    """Whether a model of transformers returns logits over a vocabulary."""
    head = getattr(bare(model), "get_output_embeddings", None)
    return head is not None and head() is not None


def match_classes(student: nn.Module, teacher: nn.Module) -> list[int] | None:
    """Return the teacher's logit for each class of the student; None where the order is the same.

    Classes are matched by their names in `id2label`, or in `label2id` where that alone was set;
    names of default (`LABEL_0`, ...) say nothing.

    Raises:
        ValueError: Other classes, or another number of them.
    """
    counts = [_class_count(model) for model in (student, teacher)]
    if None in counts:
        return None
    names, given = (_class_names(config_of(model)) for model in (student, teacher))
    if names is not None and given is not None:
        order = _order(names, given)
        if order is None:
            raise ValueError(
                f"teacher must have the student's classes {names}, got {given}: set id2label and "
                "label2id of both configurations to the same names where the classes are the same"
            )
        return None if order == list(range(len(order))) else order
    if counts[0] != counts[1]:
        raise ValueError(
            f"teacher must have as many classes as the student, {counts[0]} ({names or 'unnamed'})"
            f", got {counts[1]} ({given or 'unnamed'})"
        )
    return None


def match_vocabularies(
    student: nn.Module, teachers: Sequence[nn.Module], tokenizer: Any = None
) -> int | None:
    """Return the number of tokens common to vocabularies padded to different sizes, else None.

    Vocabularies are taken as those of one tokenizer where their sizes differ by at most 1 percent
    and the tokens of `tokenizer`, if given, are within all of them. Models that are given the same
    tokens must have one tokenizer even where they do not return logits of tokens.

    Raises:
        ValueError: Vocabularies of other sizes.
    """
    sizes = [_vocabulary(model) for model in (student, *teachers)]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    common = _common(known, tokenizer, "teacher")
    return common if all(map(has_token_logits, (student, *teachers))) else None


def match_cached_classes(
    student: nn.Module, classes: int, tokenizer: Any = None, names: Sequence[str] = ()
) -> int | None:
    """Return the number of tokens common to a padded vocabulary and cached logits, else None.

    Args:
        student: Student.
        classes: Number of classes of the cached logits.
        tokenizer: Tokenizer, whose tokens must be common; None if unknown.
        names: Names of the classes of the cached logits; none if unknown.

    Raises:
        ValueError: Cached logits of other classes, in another order, or of another vocabulary.
    """
    count = _class_count(student)
    if count not in (None, classes):
        raise ValueError(
            f"targets must have as many classes as the student, {count}, got {classes}"
        )
    given = _named(list(names)) if count is not None else None
    own = _class_names(config_of(student)) if given else None
    if own and given and _order(own, given) != list(range(classes)):
        raise ValueError(
            f"targets must have the student's classes in their order {own}, got {given}: set "
            "id2label and label2id of the student's configuration to those of the teacher"
        )
    size = _vocabulary(student)
    if count is not None or size is None:
        return None
    return _common([size, classes], tokenizer, "targets")


def _common(sizes: Sequence[int], tokenizer: Any, given: str) -> int | None:
    """Return the least of the student's and other vocabularies, None where all are as large."""
    if len(set(sizes)) == 1:
        return None
    common, largest = min(sizes), max(sizes)
    try:
        tokens = len(tokenizer)
    except TypeError:
        tokens = 0
    if largest - common > PADDING * largest or tokens > common:
        others = sizes[1] if len(sizes) == 2 else list(sizes[1:])
        of = f" and the tokenizer {tokens}" if tokens > common else ""
        raise ValueError(
            f"{given} must have the student's vocabulary, up to padding of {PADDING:.0%}, got "
            f"{others} tokens where the student has {sizes[0]}{of}: with one tokenizer, "
            "resize_token_embeddings of either model; of different tokenizers, tokens cannot be "
            "compared"
        )
    return common


def _vocabulary(model: nn.Module) -> int | None:
    config = config_of(model)
    if config is None or "input_ids" not in signature_of(model).names:
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def virtual_tokens(model: nn.Module) -> int:
    """Return the number of tokens that prompt tuning of peft puts before those of the inputs."""
    config = getattr(unwrap(model), "active_peft_config", None)
    if config is None or not getattr(config, "is_prompt_learning", False):
        return 0
    prefixed = str(getattr(config.peft_type, "value", config.peft_type)) == "PREFIX_TUNING"
    return 0 if prefixed else int(config.num_virtual_tokens)


def _class_count(model: nn.Module) -> int | None:
    classifies = "Classification" in type(bare(model)).__name__
    if not classifies or has_token_logits(model):
        return None
    return getattr(config_of(model), "num_labels", None)


def _class_names(config: Any) -> list[str] | None:
    """Return the names of classes in order, None if they are those of default."""
    by_id = {int(key): str(name) for key, name in (getattr(config, "id2label", None) or {}).items()}
    by_name = getattr(config, "label2id", None) or {}
    swapped = {int(key): str(name) for name, key in by_name.items()}
    for names in (by_id, swapped):
        known = _named([names[key] for key in sorted(names)])
        if sorted(names) == list(range(len(names))) and known:
            return known
    return None


def _named(names: list[str]) -> list[str] | None:
    """Return distinct names of classes, None if they are those of default."""
    unnamed = all(
        re.fullmatch(rf"(label|class)?[_ -]?{i}", name.strip().lower())
        for i, name in enumerate(names)
    )
    return None if unnamed or not _distinct(names) else names


def _order(names: Sequence[str], given: Sequence[str]) -> list[int] | None:
    """Return the place in `given` of each name, None if they are not the same names."""
    for change in (str, _folded):
        ours, theirs = list(map(change, names)), list(map(change, given))
        if sorted(ours) == sorted(theirs) and _distinct(ours):
            return [theirs.index(name) for name in ours]
    return None


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().casefold())


def _distinct(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)


def column_names(models: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the names of columns that any of the models takes.

    Of a forward with `**kwargs` without types, those of the models of transformers inside count.
    """
    for model in models:
        names, takes_any = signature_of(model)
        yield from names
        if takes_any:
            inside = (part for part in bare(model).modules() if config_of(part) is not None)
            first = next(inside, None)
            if first is not None and first is not bare(model):
                yield from column_names([first])


def as_teachers(teacher: Teachers | Sequence[Teachers]) -> list[Teacher]:
    """Return the members of an ensemble, or of a single teacher.

    Models are copied, but for those that must stay as they are.

    Raises:
        ValueError: No teacher, or one that changes inputs or logits.
    """
    given = teacher if isinstance(teacher, Sequence) else [teacher]
    members: list[Teacher] = []
    for each in given:
        if isinstance(each, Ensemble):
            members.extend(each.members)
        elif isinstance(each, Teacher):
            members.append(each)
        else:
            members.append(Teacher(each, copy=False) if must_stay(each) else Teacher(each))
    if not members:
        raise ValueError("teacher must be at least one model, got none")
    if any(member._affine is not None or member._columns is not None for member in members):
        raise ValueError(
            "teacher must have no trained_stats or columns, which only calls of a Teacher apply: "
            "name classes by id2label"
        )
    return members


def predictions_of(
    outputs: Mapping[str, Any], model: nn.Module, ignored: Sequence[str] | None
) -> Any:
    """Return the tensors of outputs that `Trainer` gathers: one, or a tuple of several.

    Args:
        outputs: Outputs of the student by name.
        model: Student, whose configuration names outputs to leave out.
        ignored: Names of outputs to leave out, in place of those.
    """
    if ignored is None:
        config = getattr(bare(model), "config", None)
        ignored = getattr(config, "keys_to_ignore_at_inference", ["cache"])
    left_out = {*ignored, "loss"}
    found = tuple(value for name, value in outputs.items() if name not in left_out)
    detached = map_tensors(found, torch.Tensor.detach)
    return detached[0] if len(detached) == 1 else detached


def gathered_labels(inputs: Mapping[str, Any], label_names: Sequence[str]) -> Any:
    """Return the labels that `Trainer` gathers: those of all names, or `labels`; None without."""
    found = [inputs.get(name) for name in label_names]
    if len(found) > 1 and all(label is not None for label in found):
        return map_tensors(tuple(found), torch.Tensor.detach)
    return map_tensors(inputs.get("labels"), torch.Tensor.detach)
