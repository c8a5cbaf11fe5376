"""Text as tokens: a stream for each split, divided into windows of the model's context."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from selfkd.config import DataConfig
from selfkd.tasks.task import Split
from selfkd.tasks.text.documents import Example, load_documents
from selfkd.tasks.text.tokenizer import make_tokenizer

IGNORED = -100
"""Label of positions beyond the end of a split."""


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
            if self.weights is None:
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
    tokenizer, end = make_tokenizer(
        config.tokenizer,
        [str(text) for text in documents.splits["train"]],  # with rationales: one tokenizer for all
    )
    as_json = tokenizer.to_str()
    splits, fingerprints = dict[Split, Tokens](), dict[Split, str]()
    examples_of = dict[Split, list[Example]]()
    for split, texts in documents.splits.items():
        examples = [each for each in texts if isinstance(each, Example)]
        if not config.rationales:
            examples = [replace(each, rationale="") for each in examples]
        examples_of[split] = examples
        if examples:
            tokens = encode_examples(
                tokenizer, end, examples, config.context, rationale_weight=config.rationale_weight
            )
        else:
            tokens = _encode(tokenizer, end, [str(text) for text in texts], config.context)
        if not examples and len(tokens) < config.context:
            raise ValueError(
                f"data.context must be at most the tokens of each split, got {config.context} and "
                f"{len(tokens)} of {split}"
            )
        splits[split] = tokens
        digest = hashlib.sha256(f"{config.context} {as_json} ".encode())
        digest.update(tokens.ids.numpy().tobytes())
        if tokens.starts is not None:
            digest.update(tokens.starts.numpy().tobytes())
            digest.update(tokens.scored.numpy().tobytes())
        fingerprints[split] = digest.hexdigest()[:16]
    return TextData(
        name=config.name,
        context=config.context,
        tokenizer=as_json,
        vocabulary=tokenizer.get_vocab_size(),
        end=end,
        splits=splits,
        examples=examples_of,
        fingerprints=fingerprints,
        note=documents.note,
    )


def _encode(tokenizer: Any, end: int, texts: list[str], context: int) -> Tokens:
    ids = [end]
    for own in _encode_all(tokenizer, texts):
        ids += own
        ids.append(end)
    size = sum(len(text.encode()) for text in texts)
    return Tokens(torch.tensor(ids, dtype=torch.int64), context, size)


def _encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text, without special ones."""
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [each.ids for each in found]


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
    ids, starts, weights, size = list[int](), list[int](), list[float](), 0
    texts = [(each.prompt, each.rationale, each.completion) for each in examples]
    parts = _encode_all(tokenizer, [part for parts in texts for part in parts])
    for number, example in enumerate(examples):
        prompt, rationale, completion = parts[3 * number : 3 * number + 3]
        own = [end, *prompt, *rationale, *completion]
        if len(own) > context:
            where = example.place or f"example {number}"
            raise ValueError(
                f"data.context must be at least {len(own)}, the tokens of {where}, got {context}: "
                f"{example.prompt[:60]!r}"
            )
        starts.append(len(ids))
        ids += own
        weights += [0.0] * len(prompt) + [rationale_weight] * len(rationale)
        weights += [1.0] * (len(completion) + 1)  # and the end token
        size += len((example.rationale + example.completion).encode())
    return Tokens(
        torch.tensor([*ids, end], dtype=torch.int64),
        context,
        size,
        torch.tensor(starts, dtype=torch.int64),
        torch.tensor(weights, dtype=torch.float32),
    )
