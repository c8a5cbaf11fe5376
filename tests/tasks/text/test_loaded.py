"""Trained language models without their data: what comes after texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfkd.config import load_config, to_tree
from selfkd.loading.model import LoadedModel, load
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.tasks import load_ensemble
from selfkd.tasks.text.task import TextTask

TEXT = "one two three four five six seven. " * 30


@pytest.fixture
def saved(tmp_path: Path) -> tuple[TextTask, Path]:
    (tmp_path / "a.txt").write_text(TEXT)
    settings = [
        f"data={{name: text, root: {tmp_path}, context: 8, tokenizer: chars}}",
        "model.args={depth: 1, width: 8, heads: 2}",
    ]
    config = load_config(settings=settings, flags={"task": "text"})
    task = TextTask(to_tree(config))
    torch.manual_seed(0)
    path = tmp_path / "student.safetensors"
    task.save(path, task.make(config.model), config.model, {})
    return task, path


def test_texts_become_probabilities_of_the_next_token(saved: tuple[TextTask, Path]) -> None:
    task, path = saved
    model = load(path)
    found = model.predict(["one", "one two three four"], batch_size=2)
    assert model.classes[:4] == ("<|endoftext|>", "<|unknown|>", " ", ".")
    network = task.load(str(path))[0].eval()
    letters = [model.classes.index(letter) for letter in "one"]
    logits = network(torch.tensor([[0, *letters]])).logits[0, -1]
    torch.testing.assert_close(found.probabilities[0], logits.softmax(dim=0).detach())
    letters = [model.classes.index(letter) for letter in "ree four"]  # the end of a long one
    logits = network(torch.tensor([letters])).logits[0, -1]
    torch.testing.assert_close(found.probabilities[1], logits.softmax(dim=0).detach())
    torch.testing.assert_close(model.predict("one").probabilities[0], found.probabilities[0])
    for items, kind in ((3, "int"), ([3], "int"), (b"a", "bytes")):
        with pytest.raises(TypeError, match=f"items must be texts, got {kind}"):
            model.predict(items)
    with pytest.raises(ValueError, match="in Unicode, got half a character"):
        model.predict("a\ud800")


def test_text_is_written_by_its_seed(saved: tuple[TextTask, Path]) -> None:
    model = load(saved[1])
    found = [model.generate("one", seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len(set(found)) > 1
    found += [model.generate("one", greedy=True, most=2) * 2]
    # the context has room for four letters, and a fifth is not read again
    assert all(len(text.replace("<|unknown|>", "?")) <= 5 for text in found)
    with pytest.raises(ValueError, match=r"prompt must have at most 7 tokens.*, got 8"):
        model.generate("one two ")
    with pytest.raises(TypeError, match="prompt must be text, got list"):
        model.generate(["one"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"most must be a whole number, got 1\.5"):
        model.generate("one", most=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        model.generate("one", most=0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        model.generate("one", temperature=0)
    several = load_ensemble([str(saved[1])] * 2, average="probabilities", weights=None)
    averaged = LoadedModel(several, checkpoint={}, card="", title="all")
    with pytest.raises(TypeError, match="must be a single one to write text"):
        averaged.generate("one")


def test_an_exported_folder_is_loaded_back(saved: tuple[TextTask, Path], tmp_path: Path) -> None:
    model = load(saved[1])
    again = load(model.save(tmp_path / "own"))
    assert torch.equal(again.predict("two").probabilities, model.predict("two").probabilities)


def test_models_are_averaged(saved: tuple[TextTask, Path]) -> None:
    one = load(saved[1])
    several = load_ensemble([str(saved[1])] * 2, average="probabilities", weights=None)
    (inputs,) = several.inputs("two", batch_size=4, device=torch.device("cpu"))
    found = several.network(inputs).softmax(dim=1)
    torch.testing.assert_close(found, one.predict("two").probabilities)


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": 10**9},
        {"model": {"name": "selfkd_gpt", "args": {"depth": 10**9}}},
        {"context": 7},
        {"context": 0, "model": {"name": "hf", "args": {}}, "architecture": {}},
        {"end": -1},
        {"end": 10**6},
        {"tokenizer": "{}"},
        {"vocabulary": 1},
    ],
)
def test_metadata_that_are_not_of_the_tensors_are_refused(
    saved: tuple[TextTask, Path], change: dict[str, object]
) -> None:
    tensors, facts = load_tensors(saved[1])
    save_tensors(saved[1], tensors, {**facts, **change})
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        load(saved[1])
