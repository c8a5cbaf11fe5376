"""Reading of a data set of any training loop: seeded views, and batches of a teacher's inputs."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from selfkd.distill.outputs import map_tensors
from selfkd.soft_targets.tokens import pad_tokens
from selfkd.storage.checkpoint import tensors_hash

_PROBES = 32  # items whose bytes tell one data set from another
_LABELS = ("label", "labels", "label_ids", "target", "targets", "y")
_INDICES = ("index", "indices", "idx")

Collate = Callable[[list[Any]], Any]


class SeededView(Dataset[tuple[Any, int]]):
    """Map-style data set whose random augmentation is the same at each reading of a view.

    Python's, NumPy's and PyTorch's generators are seeded by seed, view and index while an item is
    read, and restored after it. Items are `(item, index)`, with the index that `Distiller` needs.

    Args:
        dataset: Map-style data set.
        view: Number of the view; may be changed between epochs, also with `persistent_workers`.
        seed: Seed of the views.

    Raises:
        ValueError: A view or a seed that is no integer of at least 0.

    >>> view = SeededView([torch.zeros(2), torch.ones(2)])
    >>> view[1]
    (tensor([1., 1.]), 1)
    """

    def __init__(self, dataset: Any, view: int = 0, *, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = check_integer("seed", seed)
        # shared with the workers of a loader, which copy the data set at their start
        shared = torch.tensor(check_integer("view", view))
        self._view = shared.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def view(self) -> int:
        """Number of the view."""
        return int(self._view)

    @view.setter
    def view(self, value: int) -> None:
        self._view.fill_(check_integer("view", value))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with _seeded(self.seed, self.view, int(index)):
            return self.dataset[index], index


class Reader:
    """Inputs of a teacher from a data set, batch by batch."""

    def __init__(
        self,
        dataset: Any,
        seed: int,
        batch_size: int,
        workers: int,
        collate: Collate | None,
        inputs: Callable[[Any], Any] | None,
    ) -> None:
        self._dataset, self._seed = dataset, seed
        self._batch_size, self._workers = batch_size, workers
        if collate is None and inputs is None:  # labels need not make a batch
            self._batch = _Batch(_collate_inputs, None)
        else:
            self._batch = _Batch(collate or default_collate, inputs or _find_inputs)

    def batches(self, rows: range, view: int) -> Iterator[Any]:
        items = Subset(SeededView(self._dataset, view, seed=self._seed), rows)
        yield from DataLoader(
            items,
            batch_size=self._batch_size,
            num_workers=self._workers,
            collate_fn=self._batch,
            generator=torch.Generator(),  # or DataLoader would draw from the global one
        )

    def first(self) -> Any:
        """Return the inputs of the first item, as a batch."""
        return next(self.batches(range(1), 0))

    def fingerprint(self) -> str:
        """Return the hash of the data set's length and of some items' inputs in the first view."""
        count = len(self._dataset)
        rows = np.unique(np.linspace(0, count - 1, min(_PROBES, count)).round().astype(int))
        found = self._hash(rows)
        if self._hash(rows) != found:
            raise ValueError(
                "dataset must give the same item each time it is read with the same seeds of "
                "random, numpy.random and torch, got another: seed its augmentation by index"
            )
        return hashlib.sha256(f"{count} {found}".encode()).hexdigest()[:16]

    def _hash(self, rows: Iterable[int]) -> str:
        view = SeededView(self._dataset, seed=self._seed)
        digest = hashlib.sha256()
        for row in rows:
            batch = self._batch([view[int(row)]])
            tensors: dict[str, Tensor] = {}

            def keep(tensor: Tensor, found: dict[str, Tensor] = tensors) -> Tensor:
                return found.setdefault(f"{len(found)}", tensor)

            map_tensors(batch, keep)
            # texts and other inputs without tensors are told apart by their bytes
            digest.update(tensors_hash(tensors).encode() if tensors else pickle.dumps(batch))
        return digest.hexdigest()


class _Batch:
    """Function from items of a `SeededView` to a teacher's inputs, for the workers of a loader."""

    def __init__(self, collate: Collate, inputs: Callable[[Any], Any] | None) -> None:
        self._collate, self._inputs = collate, inputs

    def __call__(self, items: list[tuple[Any, int]]) -> Any:
        try:
            batch = self._collate([item for item, _ in items])
        except (TypeError, RuntimeError) as error:
            kind = type(items[0][0]).__name__
            raise ValueError(
                f"dataset must give items that make a batch, got {kind} ({error}): transform them "
                "to tensors of one size, or give collate"
            ) from None
        return batch if self._inputs is None else self._inputs(batch)


def _find_inputs(item: Any) -> Any:
    """Return the inputs of an item or a batch, of a mapping without text beside other values."""
    if isinstance(item, Mapping):
        others = _LABELS + _INDICES
        found = {name: value for name, value in item.items() if name not in others}
        plain = {name: value for name, value in found.items() if not isinstance(value, str | None)}
        found = plain or found
        return next(iter(found.values())) if len(found) == 1 else found
    return item[0] if isinstance(item, list | tuple) else item


def _collate_inputs(items: list[Any]) -> Any:
    if isinstance(items[0], Mapping) and "input_ids" in items[0]:
        return _find_inputs(pad_tokens(items))
    return default_collate([_find_inputs(item) for item in items])


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch within, and restore them."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def check_integer(name: str, value: Any, *, least: int = 0) -> int:
    """Return an integer; raise ValueError for another value, or one below the least."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
