"""Text as tokens: a stream for each split, divided into windows of the model's context."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from selfkd.config import DataConfig
from selfkd.tasks.task import Split
from selfkd.tasks.text.documents import load_documents
from selfkd.tasks.text.tokenizer import make_tokenizer

IGNORED = -100
"""Label of positions beyond the end of a split."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Documents of a split, one after the other, an end token before each and at the end.

    Row i is the prediction of token i + 1 from those before it in its window.

    >>> tokens = Tokens(torch.tensor([0, 5, 6, 7, 0]), context=3, bytes=9)
    >>> len(tokens), tokens.windows
    (4, 2)
    >>> tokens.inputs(torch.tensor([1])), tokens.labels_of(torch.tensor([1]))
    (tensor([[7, 0, 0]]), tensor([[   0, -100, -100]]))
    """

    ids: Tensor
    """Tokens, int64 `[rows + 1]`."""
    context: int
    bytes: int
    """Number of bytes of the text in UTF-8."""

    def __len__(self) -> int:
        return len(self.ids) - 1

    @property
    def labels(self) -> Tensor:
        """Token that each row predicts, `[rows]`."""
        return self.ids[1:]

    @property
    def windows(self) -> int:
        """Number of windows, the last of which may be padded."""
        return -(-len(self) // self.context)

    def rows(self, windows: Tensor) -> Tensor:
        """Return the rows of windows, `[batch, context]`; those of padding are `len(self)`."""
        rows = windows[:, None] * self.context + torch.arange(self.context)
        return rows.clamp(max=len(self))

    def inputs(self, windows: Tensor) -> Tensor:
        """Return the tokens that windows are predicted from, `[batch, context]`."""
        return self.ids[self.rows(windows)]

    def labels_of(self, windows: Tensor) -> Tensor:
        """Return the tokens that windows predict, `[batch, context]`; `IGNORED` in the padding."""
        rows = self.rows(windows)
        padded = rows == len(self)
        return self.ids[(rows + 1).clamp(max=len(self))].masked_fill(padded, IGNORED)


@dataclass(frozen=True, eq=False)
class TextData:
    """Text of a config."""

    name: str
    context: int
    tokenizer: str
    """Text of its tokenizer.json."""
    vocabulary: int
    """Number of tokens."""
    end: int
    """Id of the end token."""
    splits: dict[Split, Tokens]
    fingerprints: dict[Split, str]
    """Hash of each split's tokens, the context and the tokenizer."""
    note: str
    """Where the text comes from and how it is divided, in words."""


@lru_cache(maxsize=1)
def load_text(config: DataConfig, seed: int) -> TextData:
    """Return the text of a config as tokens.

    Raises:
        ValueError: Text, tokenizer or context are not as they must be; says which.
    """
    documents = load_documents(config.name, config.root, seed)
    tokenizer, end = make_tokenizer(config.tokenizer, documents.splits["train"])
    as_json = tokenizer.to_str()
    splits, fingerprints = dict[Split, Tokens](), dict[Split, str]()
    for split, texts in documents.splits.items():
        tokens = _encode(tokenizer, end, texts, config.context)
        if len(tokens) < config.context:
            raise ValueError(
                f"data.context must be at most the tokens of each split, got {config.context} and "
                f"{len(tokens)} of {split}"
            )
        splits[split] = tokens
        digest = hashlib.sha256(f"{config.context} {as_json} ".encode())
        digest.update(tokens.ids.numpy().tobytes())
        fingerprints[split] = digest.hexdigest()[:16]
    return TextData(
        name=config.name,
        context=config.context,
        tokenizer=as_json,
        vocabulary=tokenizer.get_vocab_size(),
        end=end,
        splits=splits,
        fingerprints=fingerprints,
        note=documents.note,
    )


def _encode(tokenizer: Any, end: int, texts: list[str], context: int) -> Tokens:
    ids = [end]
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        ids.append(end)
    size = sum(len(text.encode()) for text in texts)
    return Tokens(torch.tensor(ids, dtype=torch.int64), context, size)
