"""What models of transformers take and return: inputs, labels, classes, vocabularies, teachers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from selfkd import Ensemble, Teacher  # noqa: E402
from selfkd.integrations.transformers.batches import targets_of  # noqa: E402
from selfkd.integrations.transformers.inputs import (  # noqa: E402
    as_teachers,
    bare,
    column_names,
    gathered_labels,
    match_classes,
    match_vocabularies,
    must_stay,
    run_teacher,
    select_inputs,
    task_of,
    with_labels,
)

NAMES = ["ant", "bee", "cat"]


def make_bert(names: list[str] | None = None, **changes: Any) -> Any:
    if names is not None:
        changes |= {
            "id2label": dict(enumerate(names)),
            "label2id": {n: i for i, n in enumerate(names)},
        }
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes | changes, intermediate_size=8)
    return transformers.BertForSequenceClassification(config)


def make_distilbert() -> Any:
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    return transformers.DistilBertForSequenceClassification(config)


def make_llama(vocabulary: int = 9, **changes: Any) -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, intermediate_size=8, **sizes, **changes
    )
    return transformers.LlamaForCausalLM(config)


class Keywords(nn.Module):
    """Wrapper that gives any inputs to the model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class Named(nn.Module):
    def forward(self, input_ids: Tensor, *, scale: float = 1.0) -> Tensor:
        return input_ids * scale


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [lambda m: m, compiled, nn.DataParallel, Keywords])
def test_columns_are_found_in_any_wrapper(wrap: Any) -> None:
    names = set(column_names([wrap(make_distilbert()), wrap(make_bert())]))
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= names
    assert "token_type_ids" not in set(column_names([wrap(make_distilbert())]))


def test_each_model_gets_what_its_forward_takes() -> None:
    inputs = dict.fromkeys(
        ["input_ids", "token_type_ids", "labels", "label", "mine", "scale", "cu_seq_lens_q"], 1
    )

    def given(model: nn.Module) -> set[str]:
        return set(select_inputs(model, inputs, ["mine"]))

    assert given(make_bert()) == {"input_ids", "token_type_ids", "cu_seq_lens_q"}
    assert given(compiled(make_distilbert())) == {"input_ids", "cu_seq_lens_q"}
    assert given(Named()) == {"input_ids", "scale"}
    assert given(Keywords(Named())) == {"input_ids", "token_type_ids", "scale", "cu_seq_lens_q"}
    traced = torch.jit.trace(Scaled(), (torch.ones(2), torch.ones(2)))
    assert given(traced) == {"input_ids", "scale"}
    config = transformers.T5Config(
        vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    t5 = transformers.T5ForConditionalGeneration(config)
    assert given(t5) == {"input_ids", "labels", "cu_seq_lens_q"}  # it makes inputs from labels


class Scaled(nn.Module):
    def forward(self, input_ids: Tensor, scale: Tensor) -> Tensor:
        return input_ids * scale


def test_a_model_behind_adapters_is_found() -> None:
    peft = pytest.importorskip("peft")
    model = make_bert()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    assert bare(compiled(adapted)) is model
    assert "token_type_ids" in set(column_names([adapted]))


@pytest.mark.parametrize(
    ("inputs", "names", "label"),
    [
        ({"labels": 1, "label": 2}, ["labels"], 1),
        ({"label": 2}, ["labels"], 2),
        ({"label_ids": 3, "labels": None}, ["labels"], 3),
        ({"mine": 4, "label": 2}, ["mine"], 4),
        ({"start_positions": 5}, ["start_positions", "end_positions"], None),
        ({"labels": None}, ["labels"], None),
    ],
)
def test_labels_are_found_under_their_names(inputs: Any, names: list[str], label: Any) -> None:
    assert with_labels(inputs, names).get("labels") == label


def test_labels_of_several_names_are_gathered_as_a_tuple() -> None:
    inputs = {"labels": torch.tensor([1]), "more": torch.tensor([2])}
    assert gathered_labels(inputs, ["labels", "more"]) == (inputs["labels"], inputs["more"])
    assert gathered_labels(inputs, ["labels", "none"]) is not None
    assert gathered_labels({}, ["labels"]) is None


@pytest.mark.parametrize(
    ("teacher", "order"),
    [
        (["cat", "ant", "bee"], [1, 2, 0]),
        (["CAT", " Ant", "bee"], [1, 2, 0]),
        (NAMES, None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None),
        (["0", "1", "2"], None),
    ],
)
def test_classes_are_matched_by_name(teacher: list[str], order: list[int] | None) -> None:
    assert match_classes(make_bert(NAMES), compiled(make_bert(teacher))) == order


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (["dog", "ant", "bee"], r"\['ant', 'bee', 'cat'\], got \['dog', 'ant', 'bee'\]: set id2"),
        (["ant", "bee"], r"must have the student's classes \['ant', 'bee', 'cat'\], got \['ant', "),
        (
            ["LABEL_0", "LABEL_1"],
            r"as many classes as the student, 3 \(\['ant', .* got 2 \(unnamed",
        ),
    ],
)
def test_other_classes_are_refused_with_both_lists(teacher: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_classes(make_bert(NAMES), make_bert(teacher))


def test_names_in_label2id_alone_count() -> None:
    student, teacher = make_bert(NAMES), make_bert(num_labels=3)
    teacher.config.label2id = {"cat": 0, "ant": 1, "bee": 2}
    assert match_classes(student, teacher) == [1, 2, 0]


def test_names_of_classes_are_nothing_to_language_models() -> None:
    student, teacher = make_llama(), make_llama()
    student.config.id2label, teacher.config.id2label = {0: "a", 1: "b"}, {0: "x"}
    assert match_classes(student, teacher) is None


class Tokenizer:
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens


@pytest.mark.parametrize(
    ("sizes", "tokens", "common"),
    [
        ([151_936, 152_064], None, 151_936),  # of Qwen 2.5, 3B and 7B
        ([152_064, 151_936], 151_665, 151_936),
        ([50_304, 50_432, 50_688], 50_277, 50_304),  # of Pythia
        ([32_000, 32_000], 40_000, None),
    ],
)
def test_padded_vocabularies_have_a_common_part(
    sizes: list[int], tokens: int | None, common: int | None
) -> None:
    with torch.device("meta"):
        student, *teachers = (make_llama(size) for size in sizes)
    tokenizer = None if tokens is None else Tokenizer(tokens)
    assert match_vocabularies(student, teachers, tokenizer) == common


@pytest.mark.parametrize(
    ("sizes", "tokens", "message"),
    [
        ([32_000, 50_257], None, "got 50257 tokens where the student has 32000: with one"),
        ([50_257, 51_200], None, "up to padding of 1%, got 51200 tokens where the student has"),
        ([151_936, 152_064], 152_000, "where the student has 151936 and the tokenizer 152000"),
        ([100, 100, 200], None, r"got \[100, 200\] tokens where the student has 100"),
    ],
)
def test_other_vocabularies_are_refused(sizes: list[int], tokens: Any, message: str) -> None:
    with torch.device("meta"):
        student, *teachers = (make_llama(size) for size in sizes)
    with pytest.raises(ValueError, match=message):
        match_vocabularies(student, teachers, Tokenizer(tokens) if tokens else None)


@pytest.mark.parametrize(
    ("attribute", "value", "stays"),
    [
        ("quantization_method", "bitsandbytes", True),
        ("hf_device_map", {"bert": 0, "classifier": 1}, True),
        ("hf_device_map", {"": "disk"}, True),
        ("hf_device_map", {"": "cpu"}, False),
        ("hf_device_map", {"": 0}, False),
        ("training", True, False),
    ],
)
def test_quantised_and_spread_teachers_stay(attribute: str, value: Any, stays: bool) -> None:
    model = make_bert()
    setattr(model, attribute, value)
    assert must_stay(model) == stays
    (teacher,) = as_teachers(model)
    assert (teacher.module is model) == stays


def test_teachers_are_taken_as_they_are_given() -> None:
    given = Teacher(make_bert(), copy=False)
    ensemble = Ensemble([make_bert(), make_bert()])
    members = as_teachers([ensemble, given])
    assert members == [*ensemble.members, given]
    with pytest.raises(ValueError, match="teacher must be at least one model, got none"):
        as_teachers([])
    with pytest.raises(ValueError, match="teacher must have no trained_stats or columns"):
        as_teachers(Teacher(make_bert(), columns=[1, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_are_cast_to_the_teacher(dtype: torch.dtype) -> None:
    config = transformers.ViTConfig(
        image_size=4, patch_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).to(dtype)
    frozen = [part for part in model.modules() if part is not model]
    for part in frozen:
        part.training = False
    model.training = True
    outputs = run_teacher(model, {"pixel_values": torch.ones(2, 3, 4, 4)}, {}, ["labels"])
    assert outputs.logits.dtype == dtype
    assert not outputs.logits.requires_grad
    assert [part.training for part in (model, *frozen)] == [True] + [False] * len(frozen)


def test_models_that_read_the_same_tokens_have_one_tokenizer() -> None:
    student, teacher = make_bert(vocab_size=100), make_bert(vocab_size=200)
    with pytest.raises(ValueError, match="got 200 tokens where the student has 100"):
        match_vocabularies(student, [teacher])
    assert match_vocabularies(student, [Keywords(teacher)]) is None  # not known


def test_an_offloaded_teacher_runs_where_it_is() -> None:
    from accelerate import cpu_offload

    model, inputs = make_bert(), {"input_ids": torch.tensor([[1, 2]]), "idx": 3}
    expected = run_teacher(model, inputs, {}, ["labels"]).logits
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert must_stay(offloaded)
    torch.testing.assert_close(run_teacher(offloaded, inputs, {}, ["labels"]).logits, expected)


@pytest.mark.parametrize(
    ("changes", "labels", "task"),
    [
        ({}, torch.tensor([0]), "single_label"),
        ({}, torch.tensor([[0.0, 1.0]]), "multi_label"),
        ({"problem_type": "multi_label_classification"}, None, "multi_label"),
        ({"num_labels": 1}, torch.tensor([0.5]), "regression"),
        ({"problem_type": "regression"}, torch.tensor([[0.0, 1.0]]), "regression"),
    ],
)
def test_tasks_are_those_of_transformers(changes: Any, labels: Tensor | None, task: str) -> None:
    assert task_of(make_bert(**changes), labels) == task
    assert task_of(make_llama(), labels) == "single_label"


@pytest.mark.parametrize("shift", [False, True])
def test_tokens_without_labels_are_those_of_the_mask(shift: bool) -> None:
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [1, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    labelled = inputs | {"labels": torch.where(mask == 1, 0, -100)}
    expected = targets_of(labelled, shift=shift)
    assert torch.equal(targets_of(inputs, shift=shift), expected)
    assert (expected == -100).sum() == (3 if shift else 1)
    assert targets_of({"pixel_values": torch.ones(2, 3, 4, 4)}, shift=False, rows=True).shape == (
        2,
    )
    embedded = targets_of({"inputs_embeds": torch.ones(2, 3, 8)}, shift=shift)
    assert (embedded == -100).sum() == (2 if shift else 0)
