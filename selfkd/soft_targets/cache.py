"""Teacher logits of a data set of any training loop, cached in one call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from selfkd.distill.outputs import describe_output
from selfkd.distill.signature import bare, config_of, is_encoder_decoder
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.soft_targets.manifest import (
    DEFAULT_SHARD,
    Manifest,
    data_key,
    load_manifest,
    row_bytes,
    rows_of_shard,
)
from selfkd.soft_targets.reading import Collate, Reader, SeededView, check_integer
from selfkd.soft_targets.shards import check_shard, write_shard
from selfkd.soft_targets.store import SoftTargets, open_store
from selfkd.soft_targets.token_cache import (
    SHARD_ROWS,
    TokenReader,
    fill_shards,
    fingerprint,
    is_tokenised,
    model_inputs,
)
from selfkd.soft_targets.tokens import TokenTargets, open_logits
from selfkd.storage.checkpoint import tensors_hash
from selfkd.storage.remote import as_path

_SHARD_BYTES = 256 * 2**20  # logits of a teacher that are held in memory until they are written


def cache_logits(
    teacher: nn.Module | Teacher | Ensemble | Sequence[nn.Module | Teacher],
    dataset: Any,
    path: str | Path,
    *,
    views: int = 1,
    top_k: int | None = None,
    samples: int | None = None,
    exact: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int = 0,
    collate: Collate | None = None,
    inputs: Callable[[Any], Any] | None = None,
) -> SoftTargets | TokenTargets:
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

    Of a language model, or another one with logits `[batch, length, classes]`, the logits of each
    token are cached, where items have `input_ids` (of one length or of several, as lists or
    tensors; also those of `datasets`). Padding, which is on the right, is left out; all tokens
    are in the hash of the data. `DistillationTrainer(targets=…)` reads them, and checks that each
    item has the tokens whose logits are cached.

    Args:
        teacher: Network from inputs to logits `[batch, classes]` or `[batch, length, classes]`, on
            its device; several, or an `Ensemble`, for the logits of each member. It is copied;
            `Teacher(network, copy=False)` is run as it is.
        dataset: Map-style data set; an item is the inputs, a tuple that starts with them, or a
            mapping, of which labels and indices are left out.
        path: Folder of the cached logits, also a URI such as `s3://bucket/logits`.
        views: Number of augmented views of each item.
        top_k: Number of largest logits cached of an item or token; all when None.
        samples: Number of tokens drawn for each from the softmax at T = 1, in place of logits: of
            large vocabularies, for students at T = 1.
        exact: Whether logits are kept as they are, in single precision: for several labels and for
            numbers. Half precision, less the largest of a row, does for classes.
        seed: Seed of the views.
        batch_size: Items a batch of the teacher; 256 when None, and of token logits as many as
            have at most 256 MB of them.
        workers: Processes that read the data set.
        collate: Function from a list of items to a batch; PyTorch's own when None, or padding on
            the right of items that have `input_ids`.
        inputs: Function from a batch, with its labels, to the teacher's inputs; see `dataset` when
            None.

    Returns:
        Cached logits by `(index, view)`, for `Distiller(targets=…)`; of tokens `TokenTargets`.

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
    views = check_integer("views", views, least=1)
    if batch_size is not None:
        batch_size = check_integer("batch_size", batch_size, least=1)
    workers = check_integer("workers", workers)
    root = as_path(path).expanduser()
    read = Reader(dataset, seed, batch_size or 256, workers, collate, inputs)
    forms = {"top_k": top_k, "samples": samples, "exact": exact}
    item, _ = SeededView(dataset, seed=seed)[0]
    if is_tokenised(item):
        modules = [member.module for member in members]
        column = "labels" if is_encoder_decoder(modules[0]) else "input_ids"
        given = inputs or model_inputs(modules)
        tokens = TokenReader(dataset, column, workers, collate, given)
        batch = tokens.inputs_of(item)
        if _logits(members, batch, Teacher.any_logits)[0].ndim == 3:
            _check_views(views)
            return _cache_tokens(
                members, batch, read, tokens, root, forms=forms, batch_size=batch_size
            )
    if samples is not None:
        raise ValueError(f"samples must be None where the logits are not of tokens, got {samples}")
    hashed = read.fingerprint()
    recipe = {"seed": seed, **({"exact": True} if exact else {})}
    key = data_key(hashed, recipe, top_k=top_k)
    names = [_digest(member, lambda m: _logits([m], read.first())[0]) for member in members]
    classes = _classes(root, names, key) or _count_classes(members, read.first(), exact=exact)
    manifests = [
        Manifest(
            teacher=name,
            data=key,
            fingerprint=hashed,
            recipe=recipe,
            views=views,
            images=len(dataset),
            classes=classes,
            top_k=top_k,
            exact=exact,
            shard_size=max(1, min(DEFAULT_SHARD, _SHARD_BYTES // (4 * classes))),
            origin=_class_names(member),
        )
        for name, member in zip(names, members, strict=True)
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


def _cache_tokens(
    members: Sequence[Teacher],
    first: Any,
    read: Reader,
    tokens: TokenReader,
    root: Path,
    *,
    forms: Mapping[str, Any],
    batch_size: int | None,
) -> SoftTargets | TokenTargets:
    """Cache logits of tokens; `first` is a batch of the first item."""
    classes = _same_classes([member.any_logits(first).shape[-1] for member in members])
    index = tokens.measure()
    hashed = fingerprint(index, read.fingerprint())
    recipe = {"tokens": index.column, **({"exact": True} if forms["exact"] else {})}
    key = data_key(hashed, recipe, top_k=forms["top_k"], samples=forms["samples"])
    longest = int(index.lengths.max())
    whole = longest if (index.lengths == longest).all() else 1  # shards of whole items
    size = rows_of_shard(SHARD_ROWS, row_bytes(classes, **forms), multiple=whole)
    manifests = [
        Manifest(
            teacher=_digest(member, lambda m: m.any_logits(first)),
            data=key,
            fingerprint=hashed,
            recipe=recipe,
            views=1,
            images=int(index.offsets[-1]),
            classes=classes,
            shard_size=size,
            origin=_class_names(member),
            **forms,
        )
        for member in members
    ]
    if batch_size is None:
        batch_size = max(1, min(256, _SHARD_BYTES // (4 * classes * longest)))
    fill_shards(root, manifests, members, tokens, index, batch_size)
    return open_logits(root, [manifest.teacher for manifest in manifests], key)


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


def _check_views(views: int) -> None:
    if views != 1:
        raise ValueError(f"views must be 1 where the logits of tokens are cached, got {views}")


def _digest(member: Teacher, first: Callable[[Teacher], Tensor]) -> str:
    """Return the hash of a teacher: of its structure, its weights and what it does to inputs.

    A teacher whose weights are no tensors of its state (packed by quantisation, or constants of
    TorchScript) is told apart by its logits of the first item.
    """
    state = member.module.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if len(tensors) < max(1, len(state)):
        tensors["logits"] = first(member)
    parts = f"{member.module!r} {member.facts} {tensors_hash(tensors)}"
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _class_names(member: Teacher) -> dict[str, Any]:
    """Return the names of the classes of a model of transformers, in order."""
    names = getattr(config_of(member.module), "id2label", None) or {}
    if "Classification" not in type(bare(member.module)).__name__:
        return {}
    return {"id2label": [str(names[key]) for key in sorted(names, key=int)]}


def _classes(root: Path, teachers: Sequence[str], key: str) -> int | None:
    """Return the number of classes of the teachers' stores; None if one is not there."""
    try:
        found = {load_manifest(root, teacher, key).classes for teacher in teachers}
    except (FileNotFoundError, ValueError):
        return None
    return found.pop() if len(found) == 1 else None


def _logits(
    members: Sequence[Teacher], batch: Any, run: Callable[[Teacher, Any], Tensor] = Teacher.__call__
) -> list[Tensor]:
    """Run teachers on a first batch; raise ValueError where they do not take it."""
    try:
        return [run(member, batch) for member in members]
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
    classes = _same_classes([_columns(member_logits).shape[1] for member_logits in logits])
    if classes == 1 and not exact:
        raise ValueError("teacher must return at least 2 classes, or exact be given, got 1")
    return classes


def _same_classes(classes: Sequence[int]) -> int:
    if len(set(classes)) > 1:
        raise ValueError(f"teacher must have members of the same classes, got {classes}")
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
