"""Teacher logits of a data set of any training loop, cached in one call."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from selfkd.distill.outputs import describe_output, map_tensors
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.soft_targets.manifest import DEFAULT_SHARD, Manifest, data_key, load_manifest
from selfkd.soft_targets.store import SoftTargets, check_shard, open_store, write_shard
from selfkd.storage.checkpoint import tensors_hash
from selfkd.storage.remote import as_path

_PROBES = 32  # items whose bytes tell one data set from another
_SHARD_BYTES = 256 * 2**20  # logits of a teacher that are held in memory until they are written
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
        self.seed = _check_integer("seed", seed)
        # shared with the workers of a loader, which copy the data set at their start
        shared = torch.tensor(_check_integer("view", view))
        self._view = shared.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def view(self) -> int:
        """Number of the view."""
        return int(self._view)

    @view.setter
    def view(self, value: int) -> None:
        self._view.fill_(_check_integer("view", value))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with _seeded(self.seed, self.view, int(index)):
            return self.dataset[index], index


def cache_logits(
    teacher: nn.Module | Teacher | Ensemble | Sequence[nn.Module | Teacher],
    dataset: Any,
    path: str | Path,
    *,
    views: int = 1,
    top_k: int | None = None,
    exact: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    workers: int = 0,
    collate: Collate | None = None,
    inputs: Callable[[Any], Any] | None = None,
) -> SoftTargets:
    """Cache a teacher's logits for a map-style data set, and return what `Distiller` reads.

    The teacher is run once on each view of each item; any number of students then read its logits
    by index, with any temperature, alpha, order and batch size. What is there already is kept: an
    interrupted call goes on where it ended, further views are added, and a damaged file is made
    again. Logits are stored in half precision, under the hash of the teacher's weights and of the
    data: those of several teachers and data sets may share `path`. Data are told apart by their
    length and by 32 items of the first view, so give another `path` after a change of few items.

    Random augmentation is seeded by view and index: train on
    `selfkd.SeededView(dataset, view, seed=seed)`, which gives the items that the teacher saw, with
    their indices. A data set without random augmentation needs one view, and no `SeededView`.

    Args:
        teacher: Network from inputs to logits `[batch, classes]`, on its device; several, or an
            `Ensemble`, for the logits of each member.
        dataset: Map-style data set; an item is the inputs, a tuple that starts with them, or a
            mapping, of which labels and indices are left out.
        path: Folder of the cached logits, also a URI such as `s3://bucket/logits`.
        views: Number of augmented views of each item.
        top_k: Number of largest logits cached of an item; all when None.
        exact: Whether logits are kept as they are, in single precision: for several labels and for
            numbers. Half precision, less the largest of a row, does for classes.
        seed: Seed of the views.
        batch_size: Items a batch of the teacher.
        workers: Processes that read the data set.
        collate: Function from a list of items to a batch; PyTorch's own when None.
        inputs: Function from a batch, with its labels, to the teacher's inputs; see `dataset` when
            None.

    Returns:
        Cached logits by `(index, view)`, for `Distiller(targets=…)`.

    Raises:
        TypeError: A teacher that is no module, or a data set that is not map-style.
        ValueError: An empty data set, items that differ at each reading of a view, cannot be
            batched or are not what the teacher takes, logits that are not finite, or a number out
            of range.
        OSError: A file cannot be written; what was written before is kept.

    >>> import tempfile
    >>> from selfkd import Distiller
    >>> dataset = torch.utils.data.TensorDataset(torch.randn(10, 4), torch.arange(10) % 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     targets = cache_logits(nn.Linear(4, 3), dataset, folder)
    ...     distiller = Distiller(targets=targets)
    ...     terms = distiller(torch.zeros(2, 3), torch.tensor([0, 2]), index=torch.tensor([3, 5]))
    >>> sorted(terms)
    ['hard_loss', 'loss', 'soft_loss']

    Reference:
        Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", 2021,
        https://arxiv.org/abs/2112.01528
    """
    members = _members(teacher)
    _check_dataset(dataset)
    views = _check_integer("views", views, least=1)
    batch_size = _check_integer("batch_size", batch_size, least=1)
    workers = _check_integer("workers", workers)
    read = _Reader(dataset, seed, batch_size, workers, collate, inputs)
    fingerprint = read.fingerprint()
    recipe = {"seed": seed, **({"exact": True} if exact else {})}
    key = data_key(fingerprint, recipe, top_k=top_k)
    root = as_path(path).expanduser()
    names = [_digest(member, read) for member in members]
    classes = _classes(root, names, key) or _count_classes(members, read.first(), exact=exact)
    manifests = [
        Manifest(
            teacher=name,
            data=key,
            fingerprint=fingerprint,
            recipe=recipe,
            views=views,
            images=len(dataset),
            classes=classes,
            top_k=top_k,
            exact=exact,
            shard_size=max(1, min(DEFAULT_SHARD, _SHARD_BYTES // (4 * classes))),
        )
        for name in names
    ]
    missing = [
        (view, shard, wanting)
        for view in range(views)
        for shard in range(manifests[0].shards)
        if (wanting := _wanting(root, manifests, view, shard))
    ]
    items = sum(len(manifests[0].rows(shard)) for _, shard, _ in missing)
    with Progress(console=Console(stderr=True), disable=not items) as progress:
        task = progress.add_task("caching teacher logits", total=items)
        for view, shard, wanting in missing:
            parts: dict[int, list[Tensor]] = {number: [] for number in wanting}
            for batch in read.batches(manifests[0].rows(shard), view):
                for number, logits in parts.items():
                    logits.append(_columns(members[number](batch)).cpu())
                progress.advance(task, len(logits[-1]))
            for number, logits in parts.items():
                write_shard(
                    root, manifests[number], view=view, shard=shard, logits=torch.cat(logits)
                )
    return open_store(root, names, data=key)


class _Reader:
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


def _members(teacher: Any) -> list[Teacher]:
    if isinstance(teacher, Ensemble):
        return teacher.members
    several = teacher if isinstance(teacher, list | tuple) else [teacher]
    for member in several:
        if not isinstance(member, nn.Module | Teacher):
            raise TypeError(
                f"teacher must be a torch.nn.Module, Teacher or Ensemble, or a list of them, got "
                f"{type(member).__name__}"
            )
    return Ensemble(several).members


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, SeededView):
        raise TypeError("dataset must be that inside of SeededView, got SeededView: view.dataset")
    map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not map_style or isinstance(dataset, IterableDataset | Mapping | str):
        raise TypeError(
            "dataset must be map-style, with a length and items by index, got "
            f"{type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError("dataset must have items, got none")


def _check_integer(name: str, value: Any, *, least: int = 0) -> int:
    """Return an integer; raise ValueError for another value, or one below the least."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def _digest(member: Teacher, read: _Reader) -> str:
    """Return the hash of a teacher: of its structure, its weights and what it does to inputs.

    A teacher whose weights are no tensors of its state (packed by quantisation, or constants of
    TorchScript) is told apart by its logits of the first item.
    """
    state = member.module.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if len(tensors) < max(1, len(state)):
        (tensors["logits"],) = _logits([member], read.first())
    parts = f"{member.module!r} {member.facts} {tensors_hash(tensors)}"
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _classes(root: Path, teachers: Sequence[str], key: str) -> int | None:
    """Return the number of classes of the teachers' stores; None if one is not there."""
    try:
        found = {load_manifest(root, teacher, key).classes for teacher in teachers}
    except (FileNotFoundError, ValueError):
        return None
    return found.pop() if len(found) == 1 else None


def _logits(members: Sequence[Teacher], batch: Any) -> list[Tensor]:
    """Run teachers on a first batch; raise ValueError where they do not take it."""
    try:
        return [member(batch) for member in members]
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"teacher must take the inputs of a batch of dataset, got {describe_output(batch)} "
            f"({error}): give inputs, a function from a batch to them"
        ) from error


def _count_classes(members: Sequence[Teacher], batch: Any, *, exact: bool) -> int:
    logits = _logits(members, batch)
    shapes = [list(member_logits.shape) for member_logits in logits]
    for shape in shapes:
        if len(shape) != 2 and not (exact and len(shape) == 1):
            raise ValueError(f"teacher must return [batch, classes], got {shape}")
    classes = [_columns(member_logits).shape[1] for member_logits in logits]
    if len(set(classes)) > 1:
        raise ValueError(f"teacher must have members of the same classes, got {classes}")
    if classes[0] == 1 and not exact:
        raise ValueError("teacher must return at least 2 classes, or exact be given, got 1")
    return classes[0]


def _columns(logits: Tensor) -> Tensor:
    """Return logits `[batch, classes]`; those of one number an item as `[batch, 1]`."""
    return logits.unsqueeze(-1) if logits.ndim == 1 else logits


def _wanting(root: Path, manifests: Sequence[Manifest], view: int, shard: int) -> list[int]:
    """Return the members whose logits of a shard are not there."""
    return [
        number
        for number, manifest in enumerate(manifests)
        if check_shard(root, manifest, view=view, shard=shard) != "whole"
    ]
