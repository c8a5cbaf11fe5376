"""Files of cached teacher logits: encoded, written whole, verified and mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from selfkd.losses.sparse import REST_TEMPERATURES, SparseLogits, rest_mass
from selfkd.soft_targets.manifest import (
    Manifest,
    check_same,
    index_bytes,
    load_manifest,
    save_manifest,
    shard_path,
)
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.files import fetch, retry_io

ShardState = Literal["absent", "whole", "damaged"]
_GRID = "rest_grid"
_CHECKED: set[tuple[object, ...]] = set()  # identities of verified shards


def write_shard(
    root: Path,
    manifest: Manifest,
    *,
    view: int,
    shard: int,
    logits: Tensor | Iterable[Tensor],
) -> Path:
    """Write a teacher's logits for the images of one shard and view, with the manifest.

    Half precision is enough: the softmax is invariant to a shift of a row, so each row is shifted
    to a largest logit of 0, near which half precision is finest, but for those of an `exact`
    manifest, which are kept in single precision as they are. With `top_k`, the log-sum-exp of
    the other logits at 7 temperatures is written as well, in single precision. With `samples`,
    classes are drawn from the softmax at T = 1 and written alone, as 16-bit numbers where these
    are enough; the draws depend on teacher, data, view and image only, so that a shard that is
    made again has the same bits.

    Args:
        root: Folder of all stores.
        manifest: Manifest of the store.
        view: Number of the view, in [0, views).
        shard: Number of the shard, in [0, shards).
        logits: Teacher logits `[rows, classes]` of the images `manifest.rows(shard)`, on any
            device, or batches of them one after the other, of which one at a time is held.

    Returns:
        File of the shard.

    Raises:
        ValueError: A logit is not finite, or an argument does not fit the manifest.
        OSError: The file cannot be written; a previous shard is unchanged.
    """
    rows = _check_position(manifest, view, shard)
    batches = [logits] if isinstance(logits, Tensor) else logits
    layout = shard_layout(manifest, shard).items()
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in layout}
    done = 0
    for batch in batches:
        shape = [done + count for count in batch.shape[:1]] + list(batch.shape[1:])
        _check_shape(shape, manifest, range(len(rows) + 1))
        start, end = rows.start + done, rows.start + shape[0]
        for name, tensor in _encode(batch.detach(), manifest, view, range(start, end)).items():
            tensors[name][done : shape[0]] = tensor
        done = shape[0]
    _check_shape([done, manifest.classes], manifest, range(len(rows), len(rows) + 1))
    save_manifest(root, manifest)
    path = shard_path(root, manifest, view=view, shard=shard)
    save_tensors(path, tensors, _facts(manifest, view, shard))
    return path


def check_shard(root: Path, manifest: Manifest, *, view: int, shard: int) -> ShardState:
    """Read a shard and return its state.

    A shard that is not listed in the manifest on disk is absent; where that manifest is damaged,
    the shard is.

    Args:
        root: Folder of all stores.
        manifest: Expected manifest of the store.
        view: Number of the view, in [0, views).
        shard: Number of the shard, in [0, shards).

    Returns:
        `absent`, `whole` or `damaged`.

    Raises:
        ValueError: The store has other images, classes or shard size than `manifest`.
    """
    _check_position(manifest, view, shard)
    try:
        stored = load_manifest(root, manifest.teacher, manifest.data)
    except FileNotFoundError:
        return "absent"
    except ValueError:
        return "damaged"
    check_same(root, stored, manifest)
    if view >= stored.views:
        return "absent"
    path = shard_path(root, manifest, view=view, shard=shard)
    try:
        _check_file(path, manifest, view, shard)
    except FileNotFoundError:
        return "absent"
    except ValueError:
        return "damaged"
    return "whole"


def write_sparse(root: Path, manifest: Manifest, *, shard: int, sparse: SparseLogits) -> None:
    """Write the largest logits of the first rows of a shard, without its manifest.

    Args:
        root: Folder of all stores.
        manifest: Manifest of the store, with `top_k`, which the caller saves last.
        shard: Number of the shard.
        sparse: Logits of its rows, shifted to a largest one of 0; `rest_grid` may be None.
    """
    dtypes = {name: dtype for name, (dtype, _) in shard_layout(manifest, shard).items()}
    tensors = {
        name: tensor.to(dtypes[name])
        for name, tensor in sparse._asdict().items()
        if tensor is not None
    }
    path = shard_path(root, manifest, view=0, shard=shard)
    save_tensors(path, tensors, _facts(manifest, 0, shard))


def _check_position(manifest: Manifest, view: int, shard: int) -> range:
    if not 0 <= view < manifest.views:
        raise ValueError(f"view must be in [0, {manifest.views}), got {view}")
    return manifest.rows(shard)


def _facts(manifest: Manifest, view: int, shard: int) -> dict[str, Any]:
    return {"teacher": manifest.teacher, "data": manifest.data, "view": view, "shard": shard}


def _check_shape(found: list[int], manifest: Manifest, rows: range) -> None:
    if len(found) != 2 or found[0] not in rows or found[1] != manifest.classes:
        raise ValueError(f"logits must be [{rows[-1]}, {manifest.classes}], got {found}")


def _encode(logits: Tensor, manifest: Manifest, view: int, rows: range) -> dict[str, Tensor]:
    """Return what is cached of the logits of images of a view."""
    wrong = (~torch.isfinite(logits)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"teacher logits must be finite, got {float(logits[row, column])} "
            f"in row {rows.start + row}"
        )
    if manifest.exact:
        return {"logits": logits.float()}
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = wide - wide.amax(dim=1, keepdim=True)
    shifted = shifted.clamp(min=torch.finfo(torch.float16).min)
    if manifest.samples is not None:
        return {"indices": _sample(shifted, manifest, view, rows)}
    if manifest.top_k is None:
        return {"logits": shifted}
    indices = wide.topk(
        manifest.top_k, dim=1
    ).indices  # of the given logits, as clamping makes ties
    values = shifted.gather(1, indices)
    rest, grid = rest_mass(shifted, indices)
    return {"values": values, "indices": indices, "rest": rest, _GRID: grid}


def _sample(shifted: Tensor, manifest: Manifest, view: int, rows: range) -> Tensor:
    """Draw classes `[rows, samples]` of images from the softmax of their logits."""
    cumulative = shifted.double().exp_().cumsum(dim=1)
    uniform = draws(manifest, view, rows).to(shifted.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def draws(manifest: Manifest, view: int, rows: range) -> Tensor:
    """Return uniform random numbers of images `[rows, samples]`, in [0, 1), float64.

    Those of an image are the same whatever the batch and the shard: of a counter-based generator
    whose key is the hash of teacher, data and view, and whose counter is the image.

    Args:
        manifest: Manifest of a store with `samples`.
        view: Number of the view.
        rows: Images.
    """
    samples = manifest.samples or 0
    name = f"{manifest.teacher}/{manifest.data}/{view}"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    blocks = -(-samples // 4)  # of 4 numbers
    generator = np.random.Philox(key=key, counter=rows.start * blocks)
    drawn = generator.random_raw(len(rows) * blocks * 4).reshape(len(rows), -1)[:, :samples]
    return torch.from_numpy((drawn >> 12) * 2.0**-52)  # times the total of a row, below it


def shard_layout(manifest: Manifest, shard: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each tensor of a shard."""
    rows = len(manifest.rows(shard))
    integer = torch.uint16 if index_bytes(manifest.classes) == 2 else torch.int32
    if manifest.samples is not None:
        return {"indices": (integer, (rows, manifest.samples))}
    if manifest.top_k is None:
        dtype = torch.float32 if manifest.exact else torch.float16
        return {"logits": (dtype, (rows, manifest.classes))}
    return {
        "values": (torch.float16, (rows, manifest.top_k)),
        "indices": (integer, (rows, manifest.top_k)),
        "rest": (torch.float32, (rows,)),
        _GRID: (torch.float32, (rows, len(REST_TEMPERATURES))),
    }


def _check_file(path: Path, manifest: Manifest, view: int, shard: int) -> None:
    """Read and verify a shard; raise a ValueError that names the file where it is damaged."""
    if not retry_io(path, path.exists):
        raise FileNotFoundError(f"no such shard: {path}: the teacher logits are not cached")
    tensors, facts = load_tensors(path)
    expected = _facts(manifest, view, shard)
    found = {key: facts.get(key) for key in expected}
    if found != expected:
        raise ValueError(f"{path} must hold {expected}, got {found}: remove it and resume")
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    wanted = shard_layout(manifest, shard)
    if _GRID in wanted and _GRID not in layout:  # exact at T = 1 only
        del wanted[_GRID]
    if layout != wanted:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{path} does not fit its manifest, got {shapes}: remove it and resume")
    if "indices" in tensors:
        indices = tensors["indices"].numpy()  # torch compares no unsigned numbers
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= manifest.classes:
            raise ValueError(
                f"{path} must have indices in [0, {manifest.classes}), got {low} to {high}: "
                "remove it and resume"
            )


def map_shard(root: Path, manifest: Manifest, view: int, shard: int) -> dict[str, NDArray[Any]]:
    """Map a shard; verify it unless this process has done so."""
    path = shard_path(root, manifest, view=view, shard=shard)
    exists = retry_io(path, path.exists)
    path = fetch(path) if exists else path
    stat = path.stat() if exists else None
    sizes = (
        *(manifest.images, manifest.classes, manifest.shard_size),
        *(manifest.top_k, manifest.samples),
    )
    identity = (path, stat and stat.st_size, stat and stat.st_mtime_ns, sizes)
    if identity not in _CHECKED:
        # by a mapping of its own, so that the pages it reads are released
        _check_file(path, manifest, view, shard)
        _CHECKED.add(identity)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
