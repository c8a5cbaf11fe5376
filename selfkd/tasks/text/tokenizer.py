"""Tokenizers: trained on the training split, or read from a folder."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfkd.config.schema import TRAINED_TOKENIZER
from selfkd.storage.files import read_text
from selfkd.storage.remote import as_path

END = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
BYTES = 256
SAMPLE = 2**24
"""Most characters of the training text that byte pairs are trained on, at even distances."""
PIECE, BATCH = 2**14, 2**20  # characters that are encoded at once: each takes up to 400 bytes
_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
"""Where text may be cut before byte pairs are made: within none of their words."""
_ANY = r"[\s\S]"
_BY_CHARACTERS = {
    "type": "Split",
    "pattern": {"Regex": _ANY},
    "behavior": "Isolated",
    "invert": False,
}
_ENDS = (END, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]", "[SEP]")


def make_tokenizer(name: str, texts: Sequence[str]) -> tuple[Any, int]:
    """Return a tokenizer (of the library `tokenizers`) and the id of its end token.

    Args:
        name: `bpe:N`, `chars` or a folder with a tokenizer.json.
        texts: Documents that it is trained on.

    Raises:
        ValueError: Too few tokens, no such file, or a tokenizer without an end token.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    match = TRAINED_TOKENIZER.fullmatch(name)
    if match is None:
        return _load(as_path(name))
    if name == "chars":
        return _characters(texts)
    size = int(match[1])
    if not BYTES < size <= 2**20:
        raise ValueError(
            f"data.tokenizer must be bpe:N with N from {BYTES + 1} (bytes and the end token) to "
            f"{2**20}, got {name}"
        )
    return _byte_pairs(texts, size)


def _byte_pairs(texts: Sequence[str], size: int) -> tuple[Any, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    step = max(-(-sum(map(len, texts)) // SAMPLE), 1)
    pieces = [piece for text in texts for piece in _cut(text)]
    tokenizer.train_from_iterator(pieces[::step], trainer)
    return tokenizer, 0


def _characters(texts: Sequence[str]) -> tuple[Any, int]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    known = [END, UNKNOWN, *sorted({letter for text in texts for letter in text})]
    vocabulary = {letter: number for number, letter in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_ANY), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer, 0


def _load(folder: Path) -> tuple[Any, int]:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        known = "data.tokenizer must be bpe:N, chars or a folder with a tokenizer.json"
        if not folder.is_dir():
            raise ValueError(f"{known}, got {folder}, which is no folder here")
        raise ValueError(
            f"{known}, got {folder} without one: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER) writes it"
        )
    try:
        tokenizer = Tokenizer.from_str(read_text(file))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exceptions
        raise ValueError(f"{file} must be a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, _end_of(tokenizer, folder)


def _end_of(tokenizer: Any, folder: Path) -> int:
    """Return the id of the end token that a folder names; of a usual one where it names none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(read_text(file))
        except (ValueError, RecursionError):
            raise ValueError(f"{file} must be JSON") from None
        token = found.get("eos_token") if isinstance(found, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            number: int | None = tokenizer.token_to_id(str(token))
            if number is None:
                raise ValueError(f"{file}: eos_token must be one of its tokens, got {token!r}")
            return number
    ids = [tokenizer.token_to_id(token) for token in _ENDS]
    end: int | None = next((number for number in ids if number is not None), None)
    if end is None:
        raise ValueError(
            f"{folder} must have an end token, got none: set eos_token in its tokenizer_config.json"
        )
    return end


def vocabulary_of(tokenizer: Any) -> int:
    """Return the number of tokens, up to the largest id."""
    numbers: Mapping[str, int] = tokenizer.get_vocab()
    return max(numbers.values()) + 1


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Return the tokens of each text, without special ones.

    Long texts are encoded in pieces where that makes no difference, so that the memory taken is
    that of a few pieces: characters by a table, byte pairs between words.

    Args:
        tokenizer: Tokenizer of the library `tokenizers`.
        texts: Texts.

    >>> tokenizer, _ = make_tokenizer("chars", ["abc"])
    >>> encode_texts(tokenizer, ["cab", "x"])
    [array([4, 2, 3]), array([1])]
    """
    tree = json.loads(tokenizer.to_str())
    if tree["normalizer"] is None and tree["pre_tokenizer"] == _BY_CHARACTERS:
        return _encode_characters(tree["model"]["vocab"], texts)
    pieces = [list(_cut(text)) if _is_of_bytes(tree) else [text] for text in texts]
    encoded = _encode_pieces(tokenizer, [piece for own in pieces for piece in own])
    return [np.concatenate([next(encoded) for _ in own]) for own in pieces]


def _encode_characters(
    vocabulary: Mapping[str, int], texts: Sequence[str]
) -> list[NDArray[np.int64]]:
    table = np.full(sys.maxunicode + 1, vocabulary[UNKNOWN], dtype=np.int64)
    for letter, number in vocabulary.items():
        if len(letter) == 1:
            table[ord(letter)] = number
    codes = (np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) for text in texts)
    return [table[own] for own in codes]


def _encode_pieces(tokenizer: Any, pieces: Sequence[str]) -> Iterator[NDArray[np.int64]]:
    """Yield the tokens of each piece, about a megabyte of text at a time."""
    batch, size = list[str](), 0
    for number, piece in enumerate(pieces):
        batch.append(piece)
        size += len(piece)
        if size >= BATCH or number == len(pieces) - 1:
            for found in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(found.ids, dtype=np.int64)
            batch, size = [], 0


def _is_of_bytes(tree: Mapping[str, Any]) -> bool:
    """Say whether a tokenizer's words are of bytes, a space before them, whatever stands around."""
    before = tree["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    return (
        (tree["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and parts[-1].get("type") == "ByteLevel"
        and not any(part.get("add_prefix_space") for part in parts)
        and not any(token["lstrip"] or token["rstrip"] for token in tree["added_tokens"])
    )


def _cut(text: str) -> Iterator[str]:
    """Yield pieces of a text, of `PIECE` characters or a few more; whole words each."""
    start = 0
    while (rest := len(text) - start) > PIECE and (found := _CUT.search(text, start + PIECE)):
        yield text[start : found.start()]
        start = found.start()
    if rest or not text:
        yield text[start:]


def read_tokenizer(text: str) -> Any:
    """Return the tokenizer of a tokenizer.json's text.

    Raises:
        ValueError: It is none.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exceptions
        raise ValueError(f"it must have a tokenizer: {error}") from None


def has_tokens_of(folder: str, text: str) -> bool:
    """Say whether a tokenizer has the tokens of the one in a folder, where there is one.

    Args:
        folder: Folder that may have a tokenizer.json.
        text: Text of the tokenizer's own tokenizer.json.
    """
    file = as_path(folder) / "tokenizer.json"
    if not file.is_file():
        return True
    own, other = read_tokenizer(text), read_tokenizer(read_text(file))
    same: bool = own.get_vocab() == other.get_vocab()
    return same
