"""Cached teacher logits of tokens: a row of a store for each token of each item of a data set."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from selfkd.soft_targets.manifest import Manifest, load_manifest, shard_path, store_path
from selfkd.soft_targets.store import SoftTargets, open_store
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.files import retry_io
from selfkd.storage.remote import as_path

IGNORED = -100
"""Label of tokens that enter no loss, as in transformers."""
NO_ROW = -1
"""Row of a token without cached logits, such as padding."""
_FILE = "tokens.safetensors"
_ARRAYS = ("lengths", "first", "counts", "checks")


@dataclass(frozen=True)
class TokenIndex:
    """Rows of the tokens of a data set, one item after the other.

    >>> index = TokenIndex.of([3, 2], checks=[0, 0])
    >>> index.rows([1, 0], 4)
    array([[ 3,  4, -1, -1],
           [ 0,  1,  2, -1]])
    """

    lengths: NDArray[np.int64]
    """Number of tokens of each item, without padding."""
    first: NDArray[np.int64]
    """Position of the first token of each item that has logits."""
    counts: NDArray[np.int64]
    """Number of tokens of each item that have logits, one after the other."""
    checks: NDArray[np.int64]
    """CRC-32 of the tokens of each item."""
    column: str = "input_ids"
    """Column whose positions are those of the logits: `labels` of an encoder-decoder."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], *, checks: Sequence[int], column: str = "input_ids"
    ) -> TokenIndex:
        """Return the index of a data set whose tokens all have logits."""
        sizes = np.asarray(lengths, np.int64)
        return cls(sizes, np.zeros_like(sizes), sizes, np.asarray(checks, np.int64), column)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """First row of each item, and last the number of all rows."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def rows(self, items: Sequence[int] | NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Return the row of each token, `[items, length]`; `NO_ROW` of those without.

        Args:
            items: Numbers of the items.
            length: Number of positions, from 0.
        """
        chosen = np.asarray(items, np.int64)
        place = np.arange(length) - self.first[chosen, None]
        there = (place >= 0) & (place < self.counts[chosen, None])
        return np.where(there, self.offsets[chosen, None] + place, NO_ROW)

    def check(self, number: int, item: Any) -> NDArray[np.int64]:
        """Return the tokens of an item; raise ValueError for others than those cached."""
        tokens, check = read_tokens(item, self.column)
        if check != self.checks[number] or len(tokens) != self.lengths[number]:
            raise ValueError(
                "dataset must be the one whose logits are cached, in its order, got another text "
                f"as item {number}, of {len(tokens)} tokens where {self.lengths[number]} are "
                "cached: cache_logits of this data set"
            )
        return tokens

    def has_rows_of(self, other: TokenIndex) -> bool:
        """Say whether each row is of the same token as in another index."""
        return all(np.array_equal(getattr(self, n), getattr(other, n)) for n in _ARRAYS)

    def save(self, root: Path, manifest: Manifest) -> None:
        """Write the index beside the shards of a store."""
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in _ARRAYS}
        save_tensors(_path(root, manifest), tensors, {"column": self.column})

    @classmethod
    def load(cls, root: Path, manifest: Manifest) -> TokenIndex | None:
        """Return the index of a store; None of a store of items without tokens.

        Raises:
            ValueError: A damaged file.
        """
        path = _path(root, manifest)
        if not retry_io(path, path.exists):
            return None
        tensors, facts = load_tensors(path)
        lengths, first, counts, checks = (tensors[name].numpy().copy() for name in _ARRAYS)
        index = cls(lengths, first, counts, checks, facts["column"])
        if index.offsets[-1] != manifest.images:
            raise ValueError(
                f"{path} must be of {manifest.images} rows, got {index.offsets[-1]}: remove it and "
                "cache the logits again"
            )
        return index


def _path(root: Path, manifest: Manifest) -> Path:
    return store_path(root, manifest.teacher, manifest.data) / _FILE


class TokenTargets:
    """Cached teacher logits of the tokens of a data set, gathered by row.

    Made by `selfkd.cache_logits` and `selfkd.load_logits`; read by `DistillationTrainer`, and by
    `Distiller` in any loop:

        rows = targets.rows(index, labels.shape[1])
        valid = (labels != -100) & (rows >= 0)         # of aligned logits and labels
        terms = distiller(logits[valid], labels[valid], index=rows[valid])

    Args:
        stored: Cached logits by row.
        index: Rows of the tokens.
    """

    def __init__(self, stored: SoftTargets, index: TokenIndex) -> None:
        self._stored = stored
        self.index = index
        self.items = len(index)
        self.classes, self.members, self.views = stored.classes, stored.members, 1
        self.shifted, self.origin = stored.shifted, stored.origin

    def __call__(self, index: Tensor, view: int = 0) -> Any:
        """Return the cached logits of tokens, as `SoftTargets` does of images.

        Args:
            index: Rows of the tokens, int64 `[tokens]`.
            view: 0, as there is one view.
        """
        return self._stored(index, view)

    def rows(self, index: Tensor, length: int) -> Tensor:
        """Return the row of each token of items, int64 `[batch, length]`; -1 of those without.

        Args:
            index: Numbers of the items, int64 `[batch]`.
            length: Number of tokens of the padded items.
        """
        found = torch.from_numpy(self.index.rows(index.cpu().numpy(), length))
        return found.to(index.device)


def read_tokens(item: Any, column: str = "input_ids") -> tuple[NDArray[np.int64], int]:
    """Return the tokens of a column of an item without padding, and the CRC-32 of its tokens.

    Raises:
        ValueError: An item without one list of tokens, or padded on the left.

    >>> read_tokens({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]})[0]
    array([5, 6])
    """
    ids = _sequence(item, "input_ids")
    mask = np.asarray(item["attention_mask"]) if "attention_mask" in item else None
    if mask is not None and mask.ndim == 1 and len(mask) == len(ids) and len(ids):
        if not mask[0]:
            raise ValueError(
                "dataset must be padded on the right, so that a token has the same position in "
                f"any batch, got attention_mask {mask[:8].tolist()}: padding_side='right'"
            )
        ids = ids[: int(np.flatnonzero(mask)[-1]) + 1]
    check = zlib.crc32(ids.astype("<i8").tobytes())
    if column == "input_ids":
        return ids, check
    values = _sequence(item, column)
    return values, zlib.crc32(values.astype("<i8").tobytes(), check)


def _sequence(item: Any, column: str) -> NDArray[np.int64]:
    values = np.asarray(item[column]) if isinstance(item, Mapping) and column in item else None
    if values is None or values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        kind = list(item) if isinstance(item, Mapping) else type(item).__name__
        raise ValueError(
            f"dataset must have items with {column} as one list of token ids, got {kind}"
        )
    return values.astype(np.int64)


def pad_tokens(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return a batch of tokenised items, padded on the right; texts and nested lists are left out.

    Labels are padded with -100, others with 0, which the attention mask tells.

    >>> batch = pad_tokens([{"input_ids": [1, 2], "text": "a b"}, {"input_ids": [3]}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[1, 2], [3, 0]], [[1, 1], [1, 0]])
    """
    columns: dict[str, list[Tensor]] = {}
    for name in items[0]:
        if all(_is_numbers(item.get(name)) for item in items):
            columns[name] = [torch.as_tensor(item[name]) for item in items]
    lengths = {len(ids) for ids in columns["input_ids"]}
    if len(lengths) > 1 and "attention_mask" not in columns:
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    batch = {}
    for name, values in columns.items():
        filling = IGNORED if name == "labels" else 0
        if values[0].ndim == 1:
            batch[name] = pad_sequence(values, batch_first=True, padding_value=filling)
        else:
            batch[name] = torch.stack(values)
    return batch


def _is_numbers(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray | int | float):
        return True
    return isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value)


def check_padding(batch: Any, tokens: Sequence[NDArray[np.int64]], column: str) -> None:
    """Raise ValueError for a batch that is not the items' tokens, padded on the right.

    Args:
        batch: Batch of a collate.
        tokens: Tokens of each item, without padding.
        column: Column of the tokens.
    """
    found = batch.get(column) if isinstance(batch, Mapping) else None
    rows = None if found is None else np.asarray(found)
    for number, each in enumerate(tokens):
        if rows is None or rows.ndim != 2 or len(rows) != len(tokens):
            got = type(batch).__name__ if rows is None else f"{column} {list(rows.shape)}"
        elif np.array_equal(rows[number, : len(each)], each):
            continue
        else:
            got = f"{rows[number, :8].tolist()} of {each[:8].tolist()}"
        raise ValueError(
            f"collate must keep the {column} of {len(tokens)} items as they are and pad on the "
            f"right only (padding_side='right', no random mask), got {got}"
        )


def load_logits(
    path: str | Path, *, teachers: Sequence[str] = (), data: str | None = None
) -> SoftTargets | TokenTargets:
    """Open what `cache_logits` or `import_logprobs` has written, without a teacher.

    Args:
        path: Folder of the cached logits, also a URI.
        teachers: Hash of each teacher; the only one when not given.
        data: Key of the data; the only one of these teachers when None.

    Returns:
        Cached logits by `(index, view)`, for `Distiller(targets=…)` and `DistillationTrainer`.

    Raises:
        FileNotFoundError: No cached logits in `path`, or not all of them.
        ValueError: Several teachers or data sets of which none is chosen, or a damaged file.

    >>> import tempfile
    >>> import selfkd
    >>> rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [2, 0]}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = selfkd.cache_logits(torch.nn.Embedding(4, 4), rows, folder)
    ...     targets = selfkd.load_logits(folder)
    >>> targets.rows(torch.tensor([1]), 3)
    tensor([[ 3,  4, -1]])
    """
    root = as_path(path).expanduser()
    files = sorted(root.glob("*/*/manifest.json"))
    found = [(file.parent.parent.name, file.parent.name) for file in files]
    chosen = [
        (teacher, key)
        for teacher, key in found
        if (not teachers or teacher in teachers) and data in (None, key)
    ]
    if not chosen:
        raise FileNotFoundError(f"no cached logits in {root}: cache_logits makes them")
    keys = {key for _, key in chosen}
    names = list(teachers) or sorted({teacher for teacher, _ in chosen})
    if len(keys) > 1 or (len(names) > 1 and not teachers):
        listed = ", ".join(f"{teacher}/{key}" for teacher, key in chosen)
        raise ValueError(
            f"{root} must have the logits of one teacher and data set, got {listed}: "
            "teachers=[…] and data=… choose"
        )
    (key,) = keys
    return open_logits(root, names, key)


def open_logits(root: Path, teachers: Sequence[str], data: str) -> SoftTargets | TokenTargets:
    """Open the cached logits of teachers, of tokens where there is an index of them.

    Raises:
        FileNotFoundError: A store or a shard that is not there.
        ValueError: A damaged file, or teachers whose logits are of other tokens.
    """
    found = []
    for teacher in teachers:
        manifest = load_manifest(root, teacher, data)
        paths = [shard_path(root, manifest, view=0, shard=n) for n in range(manifest.shards)]
        missing = sum(not retry_io(path, path.exists) for path in paths)
        if missing:
            raise FileNotFoundError(
                f"{store_path(root, teacher, data)} must have {manifest.shards} files of logits, "
                f"got {manifest.shards - missing}: cache_logits with the same arguments goes on"
            )
        found.append(TokenIndex.load(root, manifest))
    stored = open_store(root, teachers, data=data)
    index = found[0]
    if index is None:
        return stored
    for teacher, other in zip(teachers, found, strict=True):
        if other is None or not index.has_rows_of(other):
            raise ValueError(
                f"{store_path(root, teacher, data)} must be of the tokens of {teachers[0]}, got "
                "logits of others: import log-probabilities of the same tokens"
            )
    return TokenTargets(stored, index)


def gathered(found: Any, shape: Sequence[int]) -> Any:
    """Return what a store gave of flattened rows, in the shape of the rows.

    Args:
        found: Logits `[rows, classes]` or `[members, rows, classes]`, sparse, or sampled.
        shape: Shape of the rows.
    """
    first = found if isinstance(found, Tensor) else found[0]
    axis = first.ndim - 2  # that of the rows

    def reshape(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:axis], *shape, *tensor.shape[axis + 1 :])

    return reshape(found) if isinstance(found, Tensor) else found.map(reshape)
