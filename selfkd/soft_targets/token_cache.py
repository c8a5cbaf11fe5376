"""Caching of a teacher's logits of tokens, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from selfkd.distill.signature import is_encoder_decoder, signature_of
from selfkd.distill.teacher import Teacher
from selfkd.soft_targets.manifest import Manifest
from selfkd.soft_targets.shards import check_shard, write_shard
from selfkd.soft_targets.tokens import TokenIndex, check_padding, pad_tokens, read_tokens

SHARD_ROWS = 2**17
"""Largest number of tokens a shard."""
_MEASURED = 256  # items read at once for their lengths

Inputs = Callable[[Any], Any]


def is_tokenised(first: Any) -> bool:
    """Whether an item has `input_ids`."""
    return isinstance(first, Mapping) and "input_ids" in first


def model_inputs(modules: Sequence[nn.Module]) -> Inputs:
    """Return the function from a batch to the inputs that a forward of the modules takes.

    Labels are kept for an encoder-decoder, which makes inputs from them.
    """
    return _Inputs(modules)


class _Inputs:
    """Picklable function from a batch to the inputs of models."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        signatures = [signature_of(module) for module in modules]
        self._names = frozenset().union(*(signature.names for signature in signatures))
        self._takes_any = any(signature.takes_any for signature in signatures)
        self._labels = any(map(is_encoder_decoder, modules))

    def __call__(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return batch
        found = {
            name: value
            for name, value in batch.items()
            if isinstance(value, Tensor)
            and (self._takes_any or name in self._names)
            and (self._labels or name != "labels")
        }
        # a forward without the names of transformers is given the tokens alone
        return found or batch["input_ids"]


class TokenReader:
    """Batches of a tokenised data set, checked to be padded on the right only.

    Args:
        dataset: Map-style data set whose items have `input_ids`.
        column: Column whose positions are those of the logits.
        workers: Processes that read the data set.
        collate: Function from a list of items to a batch; `pad_tokens` when None.
        inputs: Function from a batch to the teacher's inputs.
    """

    def __init__(
        self,
        dataset: Any,
        column: str,
        workers: int,
        collate: Callable[[list[Any]], Any] | None,
        inputs: Inputs,
    ) -> None:
        self._dataset, self._column, self._workers = dataset, column, workers
        self._collate = _Collate(collate or pad_tokens, inputs, column)

    def inputs_of(self, item: Any) -> Any:
        """Return the inputs of an item, as a batch."""
        return self._collate([item])[0]

    def measure(self) -> TokenIndex:
        """Read all tokens, and return their rows."""
        found = [
            pair
            for pairs in self._loader(range(len(self._dataset)), _MEASURED, _Measure(self._column))
            for pair in pairs
        ]
        lengths, checks = zip(*found, strict=True)
        return TokenIndex.of(lengths, checks=checks, column=self._column)

    def batches(self, items: range, size: int) -> Iterator[tuple[Any, list[int]]]:
        """Yield the inputs of items one after the other, and the lengths of these items."""
        yield from self._loader(items, size, self._collate)

    def _loader(self, items: range, size: int, collate: Any) -> Any:
        return DataLoader(
            Subset(self._dataset, items),
            batch_size=size,
            num_workers=self._workers,
            collate_fn=collate,
            generator=torch.Generator(),  # or DataLoader would draw from the global one
        )


class _Measure:
    def __init__(self, column: str) -> None:
        self._column = column

    def __call__(self, items: list[Any]) -> list[tuple[int, int]]:
        read = (read_tokens(item, self._column) for item in items)
        return [(len(tokens), check) for tokens, check in read]


class _Collate:
    def __init__(self, collate: Any, inputs: Inputs, column: str) -> None:
        self._collate, self._inputs, self._column = collate, inputs, column

    def __call__(self, items: list[Any]) -> tuple[Any, list[int]]:
        tokens = [read_tokens(item, self._column)[0] for item in items]
        batch = self._collate(items)
        check_padding(batch, tokens, self._column)
        return self._inputs(batch), [len(each) for each in tokens]


def fill_shards(
    root: Path,
    manifests: Sequence[Manifest],
    members: Sequence[Teacher],
    read: TokenReader,
    index: TokenIndex,
    batch_size: int,
) -> None:
    """Run teachers on the items of the shards that are not whole, and write these.

    Args:
        root: Folder of all stores.
        manifests: Manifest of each teacher's store.
        members: Teachers.
        read: Batches of the data set.
        index: Rows of the tokens.
        batch_size: Items a batch.
    """
    missing = {
        number: [
            shard
            for shard in range(manifest.shards)
            if check_shard(root, manifest, view=0, shard=shard) != "whole"
        ]
        for number, manifest in enumerate(manifests)
    }
    total = sum(len(manifests[n].rows(shard)) for n, shards in missing.items() for shard in shards)
    with Progress(console=Console(stderr=True), disable=not total) as progress:
        task = progress.add_task("caching teacher logits", total=total)
        for number, shards in missing.items():
            manifest = manifests[number]
            index.save(root, manifest)
            for run in _runs(shards):
                rows = range(manifest.rows(run[0]).start, manifest.rows(run[-1]).stop)
                source = _Cutter(_logits(members[number], read, index, rows, batch_size))
                for shard in run:
                    count = len(manifest.rows(shard))
                    write_shard(root, manifest, view=0, shard=shard, logits=source.take(count))
                    progress.advance(task, count)


def _runs(shards: Sequence[int]) -> Iterator[list[int]]:
    """Yield shards that follow each other."""
    for _, run in groupby(enumerate(shards), lambda pair: pair[1] - pair[0]):
        yield [shard for _, shard in run]


def _logits(
    member: Teacher, read: TokenReader, index: TokenIndex, rows: range, batch_size: int
) -> Iterator[Tensor]:
    """Yield the logits of some rows, batch by batch."""
    first = int(np.searchsorted(index.offsets, rows.start, side="right")) - 1
    last = int(np.searchsorted(index.offsets, rows.stop, side="left"))
    skipped = rows.start - int(index.offsets[first])
    for inputs, lengths in read.batches(range(first, last), batch_size):
        logits = token_logits(member, inputs, max(lengths))
        places = torch.arange(logits.shape[1], device=logits.device)
        there = places < torch.tensor(lengths, device=logits.device)[:, None]
        yield logits[there][skipped:]
        skipped = 0


def token_logits(member: Teacher, inputs: Any, length: int) -> Tensor:
    """Return the logits `[batch, length, classes]` of a batch.

    Raises:
        ValueError: Logits of fewer tokens than the longest item has.
    """
    logits = member.any_logits(inputs)
    if logits.ndim != 3 or logits.shape[1] < length:
        raise ValueError(
            f"teacher must return [batch, length, classes] of at least {length} tokens, got "
            f"{list(logits.shape)}"
        )
    return logits


class _Cutter:
    """Rows of batches, in parts of given sizes."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self._batches, self._left = batches, torch.empty(0)

    def take(self, count: int) -> Iterator[Tensor]:
        """Yield parts of as many rows together."""
        while count:
            if not len(self._left):
                self._left = next(self._batches)
            part, self._left = self._left[:count], self._left[count:]
            count -= len(part)
            yield part


def fingerprint(index: TokenIndex, inputs: str) -> str:
    """Return the hash of all tokens, and of the other inputs of some items."""
    digest = hashlib.sha256(f"{len(index)} {index.column} {inputs}".encode())
    digest.update(index.lengths.astype("<i8").tobytes())
    digest.update(index.checks.astype("<i8").tobytes())
    return digest.hexdigest()[:16]
