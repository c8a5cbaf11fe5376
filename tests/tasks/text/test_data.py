"""Text of a config: what becomes of prompts, and what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfkd.config import load_config
from selfkd.tasks.text.data import TextData, load_text


def load(name: str, *settings: str) -> TextData:
    load_text.cache_clear()
    config = load_config(settings=[f"data.name={name}", *settings], flags={"task": "text"})
    return load_text(config.data, config.seed)


def write(folder: Path, **more: object) -> str:
    """Write 40 prompts, of which the 31st is the longest."""
    rows = [
        {"prompt": f"{'long ' * (n == 30)}{n}:", "completion": " yes", **more} for n in range(40)
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"data.root={folder}"


def test_prompts_of_a_file_have_windows_of_their_own(tmp_path: Path) -> None:
    root = write(tmp_path, rationale=" thus")
    data = load("text", root, "data.tokenizer=chars")
    train = data.splits["train"]
    assert train.windows == len(data.examples["train"]) == len(train.scored) // len(" thus yes.")
    assert "40 prompts divided whole by the seed" in data.note
    without = load("text", root, "data.tokenizer=chars", "data.rationales=false")
    assert without.tokenizer == data.tokenizer
    assert len(without.splits["train"].scored) == train.windows * len(" yes.")
    assert without.splits["train"].bytes == train.windows * len(" yes")
    assert without.fingerprints != data.fingerprints


def test_a_prompt_beyond_the_context_is_named_by_its_line(tmp_path: Path) -> None:
    message = r"must be at least 13, the tokens of .*a\.jsonl, line 31 .* got 7, and 26 of 32 are"
    with pytest.raises(ValueError, match=message):
        load("text", write(tmp_path), "data.tokenizer=chars", "data.context=7", "seed=1")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.rationales=false", "data.rationales must be left out with documents, got False"),
        ("data.rationale_weight=2", "data.rationale_weight must be left out with documents, got 2"),
    ],
)
def test_documents_have_no_rationales(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("pydoc", setting)


def test_the_manual_of_another_python_has_another_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pydoc_data.topics import topics

    here = load("pydoc").fingerprints
    assert load("pydoc").fingerprints == here
    monkeypatch.setitem(topics, "if", topics["if"].replace("if", "wenn"))
    assert load("pydoc").fingerprints != here  # so that runs of both are not paired
    load_text.cache_clear()
