"""Import of the most probable tokens of a teacher that is run elsewhere, as JSON lines."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from selfkd.losses.sparse import SparseLogits
from selfkd.soft_targets.logprob_rows import TokenStrings, entries_of, largest
from selfkd.soft_targets.manifest import (
    Manifest,
    data_key,
    row_bytes,
    rows_of_shard,
    save_manifest,
    store_path,
)
from selfkd.soft_targets.shards import write_sparse
from selfkd.soft_targets.store import SoftTargets
from selfkd.soft_targets.token_cache import SHARD_ROWS, fingerprint
from selfkd.soft_targets.tokens import TokenIndex, TokenTargets, open_logits, read_tokens
from selfkd.soft_targets.upkeep import remove_store
from selfkd.storage.remote import as_path


def import_logprobs(
    file: str | Path,
    dataset: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    vocabulary: int | None = None,
    top_k: int | None = None,
) -> SoftTargets | TokenTargets:
    """Cache log-probabilities that a teacher gave elsewhere, such as a server of vLLM or an API.

    Each line of `file` is the JSON of an item of `dataset`, in its order, with the most probable
    tokens and their log-probabilities for each of its last tokens, given those before: of the whole
    item, whose first token has none (null), or of a completion alone. It is one of

    - vLLM's `prompt_logprobs`, a list of `{id: {"logprob": …}}`, and `logprobs` of what it wrote;
    - `{"logprobs": {"content": [{"token", "bytes", "top_logprobs": […]}]}}` of a chat API;
    - `{"logprobs": {"tokens": […], "top_logprobs": [{token: logprob}]}}` of a completions API,
      with `echo` of the prompt too;
    - `{"ids": [[…], …], "logprobs": [[…], …]}`;

    also inside of `choices`, `outputs` or a line of a batch (`response.body`). Tokens of the item
    that a line names must be those of the dataset, as `index` must be the item's number. The mass
    of all other tokens is 1 less the sum, so that the loss is exact at T = 1, and refused by
    `DistillationTrainer` at another T. Rows with fewer tokens than `top_k` are filled with tokens
    of an even share of the rest. The log-probabilities must be those of the model at T = 1, before
    top-k, top-p and penalties (`logprobs_mode=raw_logprobs`, vLLM's default).

    Args:
        file: File of JSON lines.
        dataset: Data set whose items have `input_ids`, or are lists of token ids.
        path: Folder of the cached logits, also a URI.
        tokenizer: Tokenizer of `transformers` or `tokenizers`; needed for tokens as text.
        vocabulary: Number of tokens; that of `tokenizer` when None.
        top_k: Number of tokens cached for each; as many as the first line has when None.

    Returns:
        Cached logits, as from `cache_logits`.

    Raises:
        ValueError: A line that is not of these forms, with its number; tokens that are not in the
            vocabulary or not those of the dataset; or another number of lines than of items.
        FileNotFoundError: No such file.

    >>> import tempfile
    >>> line = {"prompt_logprobs": [None, {"3": {"logprob": -0.1}, "1": {"logprob": -2.5}}]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "teacher.jsonl"
    ...     _ = file.write_text(json.dumps(line))
    ...     targets = import_logprobs(file, [[2, 3]], folder, vocabulary=9)
    ...     print(targets(torch.tensor([0]), 0).indices)
    tensor([[3, 1]])

    Reference:
        Peng et al., "Pre-training Distillation for Large Language Models: A Design Space
        Exploration", 2024, https://arxiv.org/abs/2410.16215
    """
    source = Path(file).expanduser()
    strings = None if tokenizer is None else TokenStrings(tokenizer)
    if vocabulary is None:
        if strings is None:
            raise ValueError("vocabulary or tokenizer must be given, got neither")
        vocabulary = strings.size
    root = as_path(path).expanduser()
    if not len(dataset):
        raise ValueError("dataset must have items, got none")
    lengths, checks = zip(*(_measure(item) for item in _items(dataset)), strict=True)
    whole = TokenIndex.of(lengths, checks=checks)
    if top_k is None:
        top_k = _count(source, strings, vocabulary)
    hashed, recipe = fingerprint(whole, ""), {"tokens": "input_ids", "logprobs": True}
    facts: dict[str, Any] = {
        "teacher": _digest(source),
        "data": data_key(hashed, recipe, top_k=top_k),
        "fingerprint": hashed,
        "recipe": recipe,
        "views": 1,
        "classes": vocabulary,
        "top_k": top_k,
        "shard_size": rows_of_shard(SHARD_ROWS, row_bytes(vocabulary, top_k=top_k)),
    }
    try:
        return open_logits(root, [facts["teacher"]], facts["data"])
    except (FileNotFoundError, ValueError):
        pass  # not there, or damaged
    first = Manifest(**facts, images=max(1, int(whole.lengths.sum())))
    try:
        counts = _write(root, first, _Lines(source, dataset, strings, vocabulary), top_k)
    except (TypeError, ValueError):
        remove_store(store_path(root, first.teacher, first.data))
        raise
    index = TokenIndex(
        whole.lengths, whole.lengths - 1 - counts, counts, whole.checks, whole.column
    )
    manifest = Manifest(**facts, images=int(counts.sum()))
    index.save(root, manifest)
    save_manifest(root, manifest)  # the last, so that nothing is seen of half an import
    return open_logits(root, [manifest.teacher], manifest.data)


class _Lines:
    """Rows of each item, from the lines of a file that are checked against the data set."""

    def __init__(
        self, file: Path, dataset: Any, strings: TokenStrings | None, vocabulary: int
    ) -> None:
        self._file, self.dataset = file, dataset
        self._strings, self._vocabulary = strings, vocabulary

    def __iter__(self) -> Iterator[list[dict[int, float]]]:
        count, found = len(self.dataset), 0
        for number, line in _read(self._file):
            if found == count:
                found += 1
                break
            tokens, _ = read_tokens(_mapping(self.dataset[found]))
            try:
                yield self._rows(line, found, tokens)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise ValueError(f"{self._file}: line {number}: {_words(error)}") from None
            found += 1
        if found != count:
            raise ValueError(
                f"{self._file} must have a line for each of the {count} items, got "
                f"{found if found < count else 'more'}"
            )
        if self._strings is not None and self._strings.parts:
            warnings.warn(
                f"{self._strings.parts} tokens in {self._file} that are parts of a character, "
                "without their bytes, are counted with the rest: ask for bytes or ids",
                stacklevel=2,
            )

    def _rows(self, line: Any, item: int, tokens: NDArray[np.int64]) -> list[dict[int, float]]:
        entries = entries_of(line, item, tokens)[-(len(tokens) - 1) or len(tokens) :]
        start = len(tokens) - len(entries)
        return [
            entry.by_id(self._strings, self._vocabulary, int(tokens[start + place]))
            for place, entry in enumerate(entries)
        ]


def _write(root: Path, manifest: Manifest, lines: _Lines, top_k: int) -> NDArray[np.int64]:
    """Write all shards; return the number of rows of each item."""
    parts: list[tuple[NDArray[Any], ...]] = []
    counts: list[int] = []
    kept, shard = 0, 0
    console = Console(stderr=True)

    def flush(rows: int) -> None:
        nonlocal parts, kept, shard
        values, indices, rest = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        sparse = SparseLogits(*(torch.from_numpy(each[:rows]) for each in (values, indices, rest)))
        write_sparse(root, manifest, shard=shard, sparse=sparse)
        parts, kept, shard = [(values[rows:], indices[rows:], rest[rows:])], kept - rows, shard + 1

    total = len(lines.dataset)
    for rows in track(lines, "importing log-probabilities", total=total, console=console):
        counts.append(len(rows))
        if rows:
            parts.append(largest(rows, top_k, manifest.classes))
            kept += len(rows)
        while kept >= manifest.shard_size:
            flush(manifest.shard_size)
    if not sum(counts):
        raise ValueError("log-probabilities must be of at least one token, got none")
    if kept:
        flush(kept)
    return np.asarray(counts, np.int64)


def _count(file: Path, strings: TokenStrings | None, vocabulary: int) -> int:
    """Return the number of tokens that the first line with some gives for each."""
    for number, line in _read(file):
        try:
            entries = entries_of(line, None, None)
            sizes = [len(entry.by_id(strings, vocabulary, None)) for entry in entries]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: line {number}: {_words(error)}") from None
        if sizes:
            return max(1, min(min(sizes), vocabulary - 1))
    raise ValueError(f"{file} must have log-probabilities, got none")


def _read(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line that is not empty, and its JSON."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line.decode())
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{file}: line {number}: must be JSON ({error})") from None
                yield number, row


def _words(error: Exception) -> str:
    return f"must have {error}" if isinstance(error, KeyError) else str(error)


def _items(dataset: Any) -> Iterator[Mapping[str, Any]]:
    for number in range(len(dataset)):
        yield _mapping(dataset[number])


def _mapping(item: Any) -> Mapping[str, Any]:
    return item if isinstance(item, Mapping) else {"input_ids": item}


def _measure(item: Mapping[str, Any]) -> tuple[int, int]:
    tokens, check = read_tokens(item)
    return len(tokens), check


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
