"""Transfer sets of text: further windows that students of teachers are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from selfkd.config import DataConfig
from selfkd.config.schema import TransferConfig
from selfkd.data.augmentation import random_bits
from selfkd.data.transfer import mixed_in
from selfkd.tasks.task import SPLITS
from selfkd.tasks.text import arithmetic
from selfkd.tasks.text.data import (
    TextData,
    Tokens,
    encode_documents,
    encode_examples,
    fingerprint,
    load_text,
    take_windows,
)
from selfkd.tasks.text.documents import Piece, load_documents, load_pool, piece_key
from selfkd.tasks.text.example import Example
from selfkd.tasks.text.tokenizer import read_tokenizer
from selfkd.text import one_line

_STREAM = -5  # of the random numbers by which some of its windows are taken
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers of it keep all bits
_NAMED = 60  # characters of a document that a message names


@dataclass(frozen=True, eq=False)
class TransferText:
    """Windows of text that are mixed into the batches of a training text."""

    tokens: Tokens
    """Its tokens, by the tokenizer of the training text."""
    weight: float
    """Share of the windows of each batch, in (0, 1)."""
    labelled: bool
    """Whether its tokens are trained on as labels too."""
    fingerprint: str
    """Hash of its tokens, the context and the tokenizer."""
    whole: Tokens
    """All tokens of what it is taken from."""
    pieces: Sequence[Piece]
    """Documents or prompts that it is taken from."""
    name: str
    """Where they come from, in words."""


@lru_cache(maxsize=1)
def load_transfer_text(config: DataConfig, seed: int) -> TransferText:
    """Return the transfer set of a config.

    Raises:
        ValueError: There is no text, fewer windows than `size`, or text of `data.name` itself, all
            of which is in its splits.
    """
    own = config.transfer
    if own is None:
        raise ValueError("data.transfer must be given, got none")
    data = load_text(replace(config, transfer=None), seed)
    pieces, name = _pieces(config, own, seed)
    tokenizer = read_tokenizer(data.tokenizer)
    examples = [piece for piece in pieces if isinstance(piece, Example)]
    if examples:
        if not config.rationales:
            examples = [replace(each, rationale="") for each in examples]
        weight = config.rationale_weight
        tokens = encode_examples(
            tokenizer, data.end, examples, config.context, rationale_weight=weight
        )
    else:
        texts = [str(piece) for piece in pieces]
        tokens = encode_documents(tokenizer, data.end, texts, config.context)
    whole = tokens
    if own.size is not None:
        if own.size > tokens.windows:
            raise ValueError(
                f"data.transfer.size must be at most {tokens.windows:,}, the windows of "
                f"{config.context} tokens of {name}, got {own.size:,}"
            )
        bits = random_bits(seed, torch.arange(tokens.windows), _STREAM, 1)[:, 0]
        tokens = take_windows(tokens, bits.argsort(stable=True)[: own.size].sort().values)
    return TransferText(
        tokens=tokens,
        weight=own.weight,
        labelled=own.labels,
        fingerprint=fingerprint(tokens, data.tokenizer),
        whole=whole,
        pieces=pieces,
        name=name,
    )


def _pieces(config: DataConfig, own: TransferConfig, seed: int) -> tuple[list[Piece], str]:
    root = own.root or config.root
    if own.name != config.name or (own.name == "text" and root != config.root):
        return load_pool(own.name, root, seed)
    if own.name != "arithmetic":
        raise ValueError(
            f"data.transfer must be other text than that of data.name, all of which is in its "
            f"splits, got {own.name}: give data.transfer.root, or another name"
        )
    whole, size = config.train_size or arithmetic.TRAIN, own.size or arithmetic.TRAIN
    problems = arithmetic.load(whole + size, config.val_size, seed)[0]["train"]
    return list(problems[whole:]), "further problems of arithmetic"


def check_text_leaks(transfer: TransferText, config: DataConfig, seed: int, data: TextData) -> str:
    """Check that no text of a transfer set stands in validation or test; return what it has.

    A document or prompt of validation or test is looked for among its own, and a whole window of
    their documents at any place of its text.

    Args:
        transfer: Transfer set.
        config: Config of the text.
        seed: Seed of its splits.
        data: Labelled text.

    Returns:
        Its size, and how many of its documents also stand in training, in words.

    Raises:
        ValueError: Text that stands in validation or test; says how much, and names some.
    """
    documents = load_documents(
        config.name, config.root, seed, train_size=config.train_size, val_size=config.val_size
    ).splits
    held = {piece_key(piece): split for split in SPLITS for piece in documents[split]}
    leaks = [piece for piece in transfer.pieces if piece_key(piece) in held]
    what = "prompts" if isinstance(transfer.pieces[0], Example) else "documents"
    if leaks:
        among = len(transfer.pieces)
        many = "all" if len(leaks) == among else f"{len(leaks):,} of {among:,}"
        split = held[piece_key(leaks[0])]
        raise ValueError(_leaked(f"{many} {what} that are", str(leaks[0]), split))
    for split in SPLITS:
        count, place = _windows_within(data.splits[split], transfer.whole)
        if count:
            ids = data.splits[split].ids[place : place + config.context]
            text = read_tokenizer(data.tokenizer).decode(ids.tolist())
            raise ValueError(_leaked(f"{count:,} windows of {split}", text, split))
    known = {piece_key(piece) for piece in documents["train"]}
    twice = sum(piece_key(piece) in known for piece in transfer.pieces)
    also = f", {twice:,} {what} of it also in training" if twice else ""
    labels = "with labels" if transfer.labelled else "without labels"
    share = mixed_in(100, transfer.weight)
    return one_line(
        f"transfer set: {transfer.tokens.windows:,} windows, {len(transfer.tokens):,} tokens "
        f"{labels} ({transfer.name}){also}; {share} windows to 100 of training in each step"
    )


def _leaked(many: str, text: str, split: str) -> str:
    few = text.strip()[:_NAMED]
    return one_line(
        f"data.transfer must have no text of validation or test, got {many} ({few!r} … is in "
        f"{split}): remove it from data.transfer, or name other text"
    )


def _windows_within(held: Tokens, tokens: Tokens) -> tuple[int, int]:
    """Return how many whole windows of documents stand in another text, and the row of one.

    A window is found at any place, by a hash of its tokens.
    """
    length = held.context
    if held.weights is not None or len(tokens.ids) < length:
        return 0, 0
    starts = np.arange(0, len(held.ids) - length + 1, length)
    own = _hashes(held.ids.numpy(), length)[starts]
    found = starts[np.isin(own, _hashes(tokens.ids.numpy(), length))]
    return len(found), int(found[0]) if len(found) else 0


def _hashes(ids: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """Return a hash of the tokens from each position on, modulo 2**64 (Rabin and Karp)."""
    values = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(29)
    total = np.zeros(len(ids) - length + 1, np.uint64)
    with np.errstate(over="ignore"):
        for place in range(length):
            total = total * _BASE + values[place : place + len(total)]
    return total
