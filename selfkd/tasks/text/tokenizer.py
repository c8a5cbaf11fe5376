"""Tokenizers: trained on the training split, or read from a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfkd.config.schema import TRAINED_TOKENIZER
from selfkd.storage.files import read_text
from selfkd.storage.remote import as_path

END = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
BYTES = 256
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
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer, 0


def _characters(texts: Sequence[str]) -> tuple[Any, int]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    known = [END, UNKNOWN, *sorted({letter for text in texts for letter in text})]
    vocabulary = {letter: number for number, letter in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer, 0


def _load(folder: Path) -> tuple[Any, int]:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"data.tokenizer must be bpe:N, chars or a folder with a tokenizer.json, got {folder}"
            + (": AutoTokenizer.from_pretrained(…).save_pretrained(…) writes one" * folder.is_dir())
        )
    try:
        tokenizer = Tokenizer.from_str(read_text(file))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exceptions
        raise ValueError(f"{file} must be a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    named, more = [], folder / "tokenizer_config.json"
    if more.is_file():
        found = json.loads(read_text(more)).get("eos_token")
        named = [found["content"] if isinstance(found, dict) else found]
    ids = [tokenizer.token_to_id(str(token)) for token in (*named, *_ENDS)]
    end = next((number for number in ids if number is not None), None)
    if end is None:
        raise ValueError(f"{folder} must have an end token (eos_token), got none")
    return tokenizer, end


def read_tokenizer(text: str) -> Any:
    """Return the tokenizer of a tokenizer.json's text."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(text)


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
