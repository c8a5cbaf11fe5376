"""What language models write: own NLL, distinct n-grams, exact match, by hand and by NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax
from torch import nn

from selfkd.config import load_config, to_tree
from selfkd.results import Evaluation, find_main, from_row, key_on_test
from selfkd.tasks.text import evaluate
from selfkd.tasks.text.data import TextData, Tokens, encode_examples
from selfkd.tasks.text.documents import Example
from selfkd.tasks.text.models import make_gpt
from selfkd.tasks.text.task import TextTask
from selfkd.tasks.text.tokenizer import make_tokenizer
from selfkd.worker import evaluate as worker


def make_examples(examples: Sequence[Example], context: int = 8) -> TextData:
    tokenizer, end = make_tokenizer("chars", ["abcdefgh"])
    tokens = encode_examples(tokenizer, end, examples, context)
    return TextData(
        name="text",
        context=context,
        tokenizer=tokenizer.to_str(),
        vocabulary=tokenizer.get_vocab_size(),
        end=end,
        splits={"test": tokens},
        fingerprints={},
        examples={"test": list(examples)},
        note="",
    )


def test_fidelity_is_that_of_the_formulas() -> None:
    student, teacher = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    found = evaluate.fidelity(student, teacher)
    q, p = (softmax(z.double().numpy(), axis=1) for z in (student, teacher))
    assert list(found) == ["agreement", "test_kl", "test_draft_acceptance"]
    assert found["agreement"] == pytest.approx((q.argmax(1) == p.argmax(1)).mean())
    assert found["test_kl"] == pytest.approx(rel_entr(p, q).sum(1).mean())
    variation = np.abs(p - q).sum(1).mean() / 2
    assert found["test_draft_acceptance"] == pytest.approx(1 - variation)


def test_own_nll_is_of_the_written_tokens_in_their_contexts() -> None:
    torch.manual_seed(0)
    teachers = [make_gpt(20, 8, width=8).eval() for _ in range(2)]
    prompts = [torch.tensor([0, 1, 2]), torch.tensor([0, 3]), torch.tensor([0])]
    written = [torch.tensor([4, 5, 0]), torch.tensor([6]), torch.tensor([], dtype=torch.int64)]
    total = 0.0
    for prompt, text in zip(prompts, written, strict=True):
        for place, token in enumerate(text):
            before = torch.cat([prompt, text[:place]])[None]
            with torch.no_grad():
                p = torch.stack([t(before).logits[0, -1].softmax(dim=0) for t in teachers])
            total -= math.log((torch.tensor([0.25, 0.75]) @ p)[token])
    for batch in (1, 2, 3):
        found = evaluate.own_nll(teachers, prompts, written, weights=[0.25, 0.75], batch=batch)
        assert found == pytest.approx(total / 4, rel=1e-5)
    assert evaluate.own_nll(teachers, prompts[2:], written[2:]) is None


def test_what_a_model_writes_it_finds_as_probable_as_its_entropy() -> None:
    torch.manual_seed(0)
    network = make_gpt(20, 8, width=8)
    ids = torch.arange(1601) % 20
    data = make_examples([Example("a", "b")])
    data = TextData(**{**vars(data), "splits": {"test": Tokens(ids, 8, 9)}, "vocabulary": 20})
    found = evaluate.measure_samples(network, [network], data, seed=1)
    assert found == evaluate.measure_samples(network, [network], data, seed=1)
    assert found != evaluate.measure_samples(network, [network], data, seed=2)
    other = evaluate.measure_samples(network, [make_gpt(20, 8, width=8)], data, seed=1)
    assert other["test_own_nll"] > found["test_own_nll"]  # cross-entropy, entropy
    assert found["test_own_nll"] < math.log(20)
    assert found["test_distinct_1"] < found["test_distinct_2"] < found["test_distinct_3"]


def test_text_that_repeats_itself_has_few_distinct_pairs() -> None:
    rich, poor = torch.arange(12), torch.tensor([3, 4] * 6)
    assert evaluate.distinct([rich], 2) == 1
    assert evaluate.distinct([poor], 2) == pytest.approx(2 / 11)
    assert evaluate.distinct([rich, rich], 2) == pytest.approx(1 / 2)  # pooled
    assert evaluate.distinct([rich[:1]], 2) is None


def test_exact_match_is_of_greedy_text_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example("a", "bc"), Example("b", "cd"), Example("c", "de"), Example("d", "e")]
    data = make_examples(examples)
    texts = [[3, 4, 0], [3, 4, 0], [5, 6], [2, 6, 0]]  # right, wrong, without an end, no word
    monkeypatch.setattr(
        evaluate, "generate", lambda *args, **options: [torch.tensor(text) for text in texts]
    )
    model = nn.Linear(1, 1)
    model.generate = None  # it is one that writes
    found = evaluate.measure_matches(data, "test", model)
    assert found == {"test_exact_match": 0.25, "test_unended": 0.25}
    texts[2] = [5, 6, 0]
    assert evaluate.measure_matches(data, "test", model) == {
        "test_exact_match": 0.5,
        "test_unended": 0.0,
    }


@pytest.mark.parametrize(
    ("completion", "text", "right"),
    [
        *((" 3", text, True) for text in ("3", "1, 3", "0061 3", "x=3", "(3", "a\n3")),
        *((" 3", text, False) for text in ("13", "-3", "2.3", ".3", "1,3", "x3", "3 4", "−3")),
        *(("-3", text, right) for text, right in (("so -3", True), ("5-3", False), ("3", False))),
        *(("cat", text, right) for text, right in (("a tom-cat", True), ("scat", False))),
    ],
)
def test_what_ends_in_the_completion_is_right(completion: str, text: str, right: bool) -> None:
    assert Example("p", completion).is_right(text) is right


def test_one_model_and_its_average_with_itself_write_the_same() -> None:
    torch.manual_seed(0)
    network = make_gpt(10, 8, width=8).eval()
    data = make_examples([Example("ab", "cd"), Example("h", ""), Example("abcde", "f")])
    prompts = data.splits["test"].prompts(range(3))
    alone = evaluate.generate(network, prompts, end=0, context=8, seed=0, greedy=True)
    both = evaluate._follow([network] * 2, prompts, data, "probabilities", [0.5, 0.5])
    for own, other in zip(alone, both, strict=True):
        assert torch.equal(own, other)


def test_large_logits_are_measured_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from selfkd.analysis import metrics

    logits, teacher = torch.randn(2, 100, 9, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.randint(9, (100,))
    tokens = Tokens(torch.cat([labels[:1], labels]), 10, 100)

    def measure() -> list[float]:
        found = evaluate.diagnosis(logits, labels, teacher).metrics
        found |= evaluate.measure("test", logits, tokens) | evaluate.fidelity(logits, teacher)
        return list(found.values())

    whole = measure()
    monkeypatch.setattr(metrics, "LARGE", 9 * 99)
    monkeypatch.setattr(metrics, "CHUNK", 9 * 7)
    assert measure() == pytest.approx(whole, rel=1e-6)
    assert float(F.cross_entropy(logits, labels)) in [pytest.approx(value) for value in whole]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTask, list[dict[str, str]]]:
    """Two networks of problems of arithmetic."""
    settings = ["data={name: arithmetic, train_size: 40, val_size: 20}", "model.args.width=8"]
    task = TextTask(to_tree(load_config(settings=settings, flags={"task": "text"})))
    folder, rows = tmp_path_factory.mktemp("models"), []
    for seed in range(2):
        torch.manual_seed(seed)
        path = folder / f"{seed}.safetensors"
        digest = task.save(path, task.make(task.config.model), task.config.model, {})
        predictions = str(folder / f"{seed}.predictions")
        rows.append({"hash": digest, "checkpoint": str(path), "predictions": predictions})
    return task, rows


def test_a_chosen_model_is_measured_by_what_it_writes(
    models: tuple[TextTask, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, (first, second) = models
    monkeypatch.setattr(Example, "is_right", lambda example, text: "7" in text)
    tree, facts, found = to_tree(task.config), task.check(), []
    assert (facts.metric, facts.mode, facts.counts) == (
        "exact_match",
        "max",
        {"val": 20, "test": 20},
    )
    for own, teachers in ((first, []), (second, [first])):
        files = own["checkpoint"], own["predictions"]
        (row,) = worker.evaluate(tree, *files, teachers, diagnose=True)
        found.append(from_row(Evaluation, row))
    zero, born_again = found
    assert find_main(zero.metrics) == facts.metric
    fidelity = {"agreement", "test_kl", "test_draft_acceptance"}
    assert born_again.metrics.keys() - zero.metrics.keys() == fidelity
    assert born_again.metrics.keys() >= {f"val_{facts.metric}", *map(key_on_test, facts.further)}
    assert born_again.mcnemar is not None
    assert zero.mcnemar is None
    # of itself, which knows best what it writes
    assert zero.metrics["test_own_nll"] < math.log(task.data.vocabulary)
    replica = from_row(Evaluation, next(worker.evaluate(tree, first["checkpoint"])))
    assert replica.metrics == {
        name: value
        for name, value in zero.metrics.items()
        if name.removeprefix("test_") not in ("own_nll", "distinct_1", "distinct_2", "distinct_3")
    }


def test_averages_write_too(models: tuple[TextTask, list[dict[str, str]]]) -> None:
    task, rows = models
    tree = to_tree(task.config)
    for row in rows:
        list(worker.evaluate(tree, row["checkpoint"], row["predictions"]))
    average = {"members": rows, "average": "probabilities"}
    (found,) = next(worker.average(tree, [average]))["rows"]
    assert "test_exact_match" in found
    values = next(worker.contrast(tree, [rows, rows[:1]]))["values"]
    assert values[0]["value"] == found["test_exact_match"]


def test_a_student_is_compared_with_the_weighted_average_of_its_teachers(
    models: tuple[TextTask, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, (first, second) = models
    monkeypatch.setattr(Example, "is_right", lambda example, text: "7" in text)
    averages = []

    def follow(
        networks: Sequence[nn.Module], prompts: Sequence[torch.Tensor], *options: Any
    ) -> Any:
        averages.append(options[1:])
        return [torch.tensor([0])] * len(prompts)

    monkeypatch.setattr(evaluate, "_follow", follow)
    teachers = [{**first, "weight": 1.0}, {**second, "weight": 0.0}]
    tree = to_tree(task.config)
    tree["distill"]["average"] = "logits"
    next(worker.evaluate(tree, first["checkpoint"], teachers=teachers))
    assert averages == [("logits", [1.0, 0.0])]


@pytest.mark.parametrize(("name", "metric"), [("pydoc", "val_exact_match"), ("arithmetic", "f1")])
def test_what_is_chosen_by_must_be_measured(name: str, metric: str) -> None:
    settings = [f"data.name={name}", f"search.metric={metric}"]
    task = TextTask(to_tree(load_config(settings=settings, flags={"task": "text"})))
    with pytest.raises(ValueError, match=rf"search.metric must be one of val_nll.*, got {metric}"):
        task.check()
