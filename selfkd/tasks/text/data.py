"""Text as tokens: a stream for each split, divided into windows of the model's context."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfkd.config import DataConfig
from selfkd.soft_targets.tokens import IGNORED as IGNORED
from selfkd.tasks.task import Split
from selfkd.tasks.text.documents import Example, load_documents
from selfkd.tasks.text.tokenizer import encode_texts, make_tokenizer, vocabulary_of

MOST_LOGITS = 2**28
"""Most logits of a split that models are evaluated on, 1 GiB in memory."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Text of a split, piece after piece, an end token before each and at the end.

    Row i is the prediction of token i + 1 from those before it in its window. The windows of
    documents are of `context` tokens, one after the other; an example, which is a prompt and what
    follows it, has a window of its own.

    >>> tokens = Tokens(torch.tensor([0, 5, 6, 7, 0]), context=3, bytes=9)
    >>> len(tokens), tokens.windows
    (4, 2)
    >>> tokens.inputs(torch.tensor([0, 1]))
    tensor([[0, 5, 6],
            [7, 0, 0]])
    >>> tokens.labels_of(torch.tensor([0, 1]))
    tensor([[   5,    6,    7],
            [   0, -100, -100]])
    """

    ids: Tensor
    """Tokens, int64 `[rows + 1]`."""
    context: int
    """Number of tokens of the longest window."""
    bytes: int
    """Number of bytes of the text in UTF-8, of that which is predicted."""
    starts: Tensor | None = None
    """First row of each window, ascending from 0, int64 `[windows]`; windows of `context` rows when
    not given."""
    weights: Tensor | None = None
    """Weight of each row in the loss, float32 `[rows]`, 0 where a prompt goes on; all 1 when not
    given."""

    def __len__(self) -> int:
        return len(self.ids) - 1

    @property
    def labels(self) -> Tensor:
        """Token that each row predicts, `[rows]`; `IGNORED` where that counts for nothing."""
        labels = self.ids[1:]
        return labels if self.weights is None else labels.masked_fill(self.weights == 0, IGNORED)

    @cached_property
    def scored(self) -> Tensor:
        """Rows that are measured, those of a weight above 0, int64 `[scored]`."""
        if self.weights is None:
            return torch.arange(len(self))
        return self.weights.nonzero()[:, 0]

    @cached_property
    def bounds(self) -> Tensor:
        """First row of each window and the number of rows, `[windows + 1]`."""
        starts = self.starts
        if starts is None:
            starts = torch.arange(0, len(self), self.context)
        return torch.cat([starts, torch.tensor([len(self)])])

    @property
    def windows(self) -> int:
        """Number of windows, the last of which may be padded."""
        return len(self.bounds) - 1

    def windows_of(self, rows: range) -> range:
        """Return the windows that hold rows.

        >>> Tokens(torch.arange(9), context=3, bytes=9).windows_of(range(2, 4))
        range(0, 2)
        """
        ends = torch.tensor([rows.start, max(rows.stop - 1, rows.start)])
        first, last = (torch.searchsorted(self.bounds, ends, right=True) - 1).tolist()
        return range(first, last + 1)

    def rows(self, windows: Tensor) -> Tensor:
        """Return the rows of windows, `[batch, longest]`; those of padding are `len(self)`."""
        starts, ends = self.bounds[windows], self.bounds[windows + 1]
        longest = int((ends - starts).max())
        rows = starts[:, None] + torch.arange(longest)
        return rows.where(rows < ends[:, None], len(self))

    def inputs(self, windows: Tensor) -> Tensor:
        """Return the tokens that windows are predicted from, `[batch, longest]`."""
        return self.ids[self.rows(windows)]

    def labels_of(self, windows: Tensor) -> Tensor:
        """Return the tokens that windows predict, `[batch, longest]`; `IGNORED` where none."""
        return self._padded_labels[self.rows(windows)]

    def weights_of(self, windows: Tensor) -> Tensor:
        """Return the weights of windows in the loss, `[batch, longest]`, 0 in the padding."""
        return self._padded_weights[self.rows(windows)]

    def prompts(self, windows: Sequence[int]) -> list[Tensor]:
        """Return the tokens of windows that a model is to go on from, int64 `[length]` each.

        Of an example it is the end token and the prompt; of documents the first quarter of the
        window.

        >>> weights = torch.tensor([0, 0, 1, 0, 1, 1])
        >>> examples = Tokens(
        ...     torch.tensor([0, 5, 6, 7, 9, 8, 0]), 4, 9, torch.tensor([0, 3]), weights.float()
        ... )
        >>> examples.prompts([0, 1])
        [tensor([0, 5, 6]), tensor([7, 9])]
        """
        found = []
        for window in windows:
            start, end = self.bounds[window : window + 2].tolist()
            if self.weights is None or self.weights[start] > 0:  # no prompt begins there
                length = max((end - start) // 4, 1)
            else:
                length = int((self.weights[start:end] > 0).int().argmax()) + 1
            found.append(self.ids[start : start + length])
        return found

    @cached_property
    def _padded_labels(self) -> Tensor:
        return torch.cat([self.labels, torch.tensor([IGNORED])])

    @cached_property
    def _padded_weights(self) -> Tensor:
        weights = torch.ones(len(self)) if self.weights is None else self.weights
        return torch.cat([weights, torch.zeros(1)])


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
    examples: dict[Split, list[Example]]
    """Examples of each split, one a window, without rationales where these are left out; none of
    documents."""
    note: str
    """Where the text comes from and how it is divided, in words."""


@lru_cache(maxsize=1)
def load_text(config: DataConfig, seed: int) -> TextData:
    """Return the text of a config as tokens.

    Raises:
        ValueError: Text, tokenizer or context are not as they must be; says which.
    """
    documents = load_documents(
        config.name, config.root, seed, train_size=config.train_size, val_size=config.val_size
    )
    if isinstance(documents.splits["train"][0], str):
        for key, value, usual in (
            ("rationales", config.rationales, True),
            ("rationale_weight", config.rationale_weight, 1.0),
        ):
            if value != usual:
                raise ValueError(f"data.{key} must be left out with documents, got {value}")
    tokenizer, end = make_tokenizer(
        config.tokenizer,
        [str(text) for text in documents.splits["train"]],  # with rationales: one tokenizer for all
    )
    as_json = tokenizer.to_str()
    vocabulary = vocabulary_of(tokenizer)
    splits, fingerprints = dict[Split, Tokens](), dict[Split, str]()
    examples_of, limits = dict[Split, list[Example]](), list[str]()
    for split, texts in documents.splits.items():
        examples = [each for each in texts if isinstance(each, Example)]
        if not config.rationales:
            examples = [replace(each, rationale="") for each in examples]
        if examples:
            tokens = encode_examples(
                tokenizer, end, examples, config.context, rationale_weight=config.rationale_weight
            )
        else:
            tokens = encode_documents(tokenizer, end, [str(text) for text in texts], config.context)
            if len(tokens) < config.context:
                raise ValueError(
                    f"data.context must be at most the tokens of each split, got {config.context} "
                    f"and {len(tokens)} of {split}"
                )
        most, scored = MOST_LOGITS // vocabulary, len(tokens.scored)
        if split != "train" and scored > most:
            tokens, examples = _sample(tokens, examples, most)
            limits.append(f"{len(tokens.scored):,} of the {scored:,} tokens of {split}")
        examples_of[split] = examples
        splits[split], fingerprints[split] = tokens, fingerprint(tokens, as_json)
    return TextData(
        name=config.name,
        context=config.context,
        tokenizer=as_json,
        vocabulary=vocabulary,
        end=end,
        splits=splits,
        examples=examples_of,
        fingerprints=fingerprints,
        note=f"{documents.note}; measured on {' and '.join(limits)}" if limits else documents.note,
    )


def fingerprint(tokens: Tokens, tokenizer: str) -> str:
    """Return the hash of tokens, their windows and the text of the tokenizer."""
    digest = hashlib.sha256(f"{tokens.context} {tokenizer} ".encode())
    digest.update(tokens.ids.numpy().tobytes())
    if tokens.starts is not None:
        digest.update(tokens.starts.numpy().tobytes())
        digest.update(tokens.scored.numpy().tobytes())
    return digest.hexdigest()[:16]


def encode_documents(tokenizer: Any, end: int, texts: list[str], context: int) -> Tokens:
    """Return documents as tokens, an end token before each and at the end."""
    ends = np.array([end])
    parts = [part for own in encode_texts(tokenizer, texts) for part in (own, ends)]
    size = sum(len(text.encode()) for text in texts)
    return Tokens(torch.from_numpy(np.concatenate([ends, *parts])), context, size)


def _sample(tokens: Tokens, examples: list[Example], most: int) -> tuple[Tokens, list[Example]]:
    """Return evenly spaced windows with about so many scored rows, and their examples."""
    count = max(1, most * tokens.windows // len(tokens.scored))
    numbers = torch.linspace(0, tokens.windows - 1, count).long()
    kept = [examples[number] for number in numbers.tolist()] if examples else []
    found = take_windows(tokens, numbers)
    return (replace(found, bytes=_bytes_after_prompts(kept)) if kept else found), kept


def take_windows(tokens: Tokens, numbers: Tensor) -> Tokens:
    """Return some windows alone.

    The last row of a window of documents is left out: its label is in the window after it.

    Args:
        tokens: Text.
        numbers: Numbers of the windows, ascending.
    """
    ids, starts, weights, length = list[Tensor](), list[int](), list[Tensor](), 0
    for number in numbers.tolist():
        start, end = tokens.bounds[number : number + 2].tolist()
        own = torch.ones(end - start) if tokens.weights is None else tokens.weights[start:end]
        if tokens.weights is None:
            own[-1] = 0
        starts.append(length)
        ids.append(tokens.ids[start:end])
        weights.append(own)
        length += end - start
    ids.append(tokens.ids[end : end + 1])
    rows = torch.cat(weights)
    share = int((rows > 0).sum()) / len(tokens.scored)
    size = round(tokens.bytes * share)
    return Tokens(torch.cat(ids), tokens.context, size, torch.tensor(starts), rows)


def _bytes_after_prompts(examples: Sequence[Example]) -> int:
    return sum(len((each.rationale + each.completion).encode()) for each in examples)


def encode_examples(
    tokenizer: Any,
    end: int,
    examples: Sequence[Example],
    context: int,
    *,
    rationale_weight: float = 1.0,
) -> Tokens:
    """Return examples as tokens, each in a window of its own, whose prompt is not predicted.

    Args:
        tokenizer: Tokenizer of the library `tokenizers`.
        end: Id of the end token.
        examples: Prompts, and what follows them.
        context: Number of tokens of the longest window.
        rationale_weight: Weight of a token of a rationale in the loss.

    Raises:
        ValueError: An example is longer than the context.
    """
    texts = [part for each in examples for part in (each.prompt, each.rationale, each.completion)]
    parts, ends = encode_texts(tokenizer, texts), np.array([end])
    sizes = np.array([len(part) for part in parts], dtype=np.int64).reshape(-1, 3)
    rows = sizes.sum(axis=1) + 1
    if len(longer := np.flatnonzero(rows > context)):
        number = int(rows.argmax())
        raise ValueError(
            f"data.context must be at least {rows[number]}, the tokens of "
            f"{examples[number].place or f'example {number}'} with what follows the prompt, got "
            f"{context}, and {len(longer):,} of {len(examples):,} are longer: raise it, or leave "
            "them out"
        )
    ids = [part for n in range(0, len(parts), 3) for part in (ends, *parts[n : n + 3])]
    sizes[:, 2] += 1  # and the end token
    weights = np.tile(np.array([0, rationale_weight, 1], dtype=np.float32), len(examples))
    return Tokens(
        torch.from_numpy(np.concatenate([*ids, ends])),
        context,
        _bytes_after_prompts(examples),
        torch.from_numpy(np.cumsum(rows) - rows),
        torch.from_numpy(np.repeat(weights, sizes.ravel())),
    )
