"""Tokenizers: what they make of long texts, and of folders that others have saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from selfkd.tasks.text import tokenizer as module
from selfkd.tasks.text.tokenizer import encode_texts, make_tokenizer, vocabulary_of

WORDS = "Don't  stop: naïve\n\n\nwords, 12,345\tof 1 ''s. \n日本語 are 'cut' \r\n here?!\x1c é \n"
TEXTS = [WORDS * 20, "", "one", "日本語" * 200, " " * 300, "\n" * 300, "a" * 300]
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make(kind: str) -> Any:
    name = "chars" if kind == "chars" else "bpe:400"
    tokenizer, _ = make_tokenizer(name, TEXTS[:1])
    if kind == "llama":
        split = pre_tokenizers.Split(Regex(LLAMA), "isolated")
        of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, of_bytes])
    if kind == "prefix":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize("kind", ["chars", "bpe", "llama", "prefix"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_long_texts_are_encoded_as_whole(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    monkeypatch.setattr(module, "PIECE", size)
    monkeypatch.setattr(module, "BATCH", 3 * size)
    tokenizer = make(kind)
    found = encode_texts(tokenizer, TEXTS)
    for text, own in zip(TEXTS, found, strict=True):
        assert own.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
        assert own.dtype == np.int64
    assert encode_texts(tokenizer, []) == []
    assert (
        encode_texts(tokenizer, ["q\U0010ffff"])[0].tolist() == tokenizer.encode("q\U0010ffff").ids
    )


def test_pieces_are_of_whole_words(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [make_tokenizer("bpe:400", TEXTS)[0].to_str() for _ in range(2)]
    monkeypatch.setattr(module, "PIECE", 5)
    assert before == [make_tokenizer("bpe:400", TEXTS)[0].to_str()] * 2
    monkeypatch.setattr(module, "SAMPLE", 100)  # some of them only
    assert before[0] != make_tokenizer("bpe:400", TEXTS)[0].to_str()


def save(folder: Path, **files: object) -> str:
    tokenizer, _ = make_tokenizer("bpe:260", ["abc"])
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return str(folder)


HUGE = {"model_max_length": 10**30}


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({}, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": "<end>", **HUGE}}, "<end>"),
        ({"tokenizer_config": {"eos_token": {"content": "<end>"}}}, "<end>"),
        ({"tokenizer_config": HUGE, "special_tokens_map": {"eos_token": "<end>"}}, "<end>"),
        ({"tokenizer_config": {"eos_token": None}}, "<|endoftext|>"),
    ],
)
def test_the_end_token_is_that_of_the_folder(
    tmp_path: Path, files: dict[str, object], end: str
) -> None:
    tokenizer, number = make_tokenizer(save(tmp_path, **files), [])
    assert number == tokenizer.token_to_id(end)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "</none>"}}, r"eos_token must be one of .*'</none>'"),
        ({"tokenizer_config": "{"}, r"tokenizer_config\.json must be JSON"),
        ({"tokenizer": "{}"}, r"tokenizer\.json must be a tokenizer"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, files: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tokenizer(save(tmp_path, **files), [])


def test_a_folder_without_tokenizer_json_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without one: AutoTokenizer\..*save_pretrained"):
        make_tokenizer(str(tmp_path), [])
    with pytest.raises(ValueError, match=r"got /no/such, which is no folder here"):
        make_tokenizer("/no/such", [])


def test_ids_may_have_gaps() -> None:
    tree = json.loads(make_tokenizer("chars", ["abc"])[0].to_str())
    tree["model"]["vocab"]["c"] = 9
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    assert vocabulary_of(tokenizer) == 10
    assert encode_texts(tokenizer, ["c"])[0].tolist() == [9]
