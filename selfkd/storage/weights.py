"""Weights in files from elsewhere: read without running code, found by a network's own names."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from selfkd.storage.files import parse_json, read_text

Shapes = Mapping[str, Sequence[int]]
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments of names that `torch.compile`, data parallelism and sharding put into them."""
COUNTERS = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")
"""Ends of names that are no weights: they may be missing, or left over."""
NAMED, LISTED, DEEPEST = 3, 8, 4  # names of a kind and keys in a message; levels of keys
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?)([._\d]|$)|(^|[._])ema", re.IGNORECASE)
_PART = re.compile(r"\d+-of-\d+$")
_FORMATS = {
    b"\x89HDF": "HDF5, as Keras writes it",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"(\xb5/\xfd": "compressed by zstd: unpack it first",
    b"GGUF": "GGUF, of quantised language models",
    b"\x93NUMPY": "a single NumPy array",
    b"version https://git-lfs": "a pointer of Git LFS in place of the weights: run `git lfs pull`",
    b"<": "a web page or XML in place of the weights: download it again",
}
"""What files begin with that hold no weights which can be read."""
_PARAMETERS = ("_parameters", "_buffers", "_modules")  # of a pickled module


@dataclass(frozen=True)
class Weights:
    """The weights of a network, found in a file."""

    tensors: Mapping[str, Tensor]
    """Tensors by the network's own names."""
    note: str | None = None
    """What is to be said: which of several were taken."""


def find_weights(path: Path, wanted: Shapes, *, key: str | None = None, outputs: int) -> Weights:
    """Return a network's weights from a file of any make.

    They may stand under any key, at most four levels deep, and their names may have any prefix.
    Where there are several sets an average (EMA, SWA) is taken before what it is of.

    Args:
        path: Safetensors file, or one of `torch.save`: a state dict, a checkpoint around it or a
            whole module; `.npz`; or the index (JSON) of a sharded checkpoint.
        wanted: Shapes of the network's tensors by name.
        key: Name of the set to take, where there are several.
        outputs: Number of the network's classes, for messages.

    Raises:
        ValueError: It has none for this network: says what it has, and the way out.
    """
    tree = read_weights(path)
    groups = list(_groups(tree, ()))
    if not groups:
        raise ValueError(f"it has no tensors by name; {describe_content(tree)}")
    sets = {label: found for group in groups for label, found in _complete(*group, wanted)}
    if not sets:
        part = " (it is one part of several: give their index, ….index.json)"
        why = _describe_misfit(groups, wanted, outputs) + part * bool(_PART.search(path.stem))
        raise ValueError(f"{why}; {describe_content(tree)}")
    if key is not None:
        named = [label for label in sets if _is_named(label, key)]
        if len(named) != 1:
            raise ValueError(f"weights must be one of {_listed(sets)}, got {key!r}")
        return Weights(sets[named[0]])
    averages = [label for label in sets if _AVERAGE.search(label)]
    others = [label for label in sets if label not in averages]
    among = averages or others
    if len(among) > 1 and not _same([sets[label] for label in among]):
        raise ValueError(
            f"it has several sets of weights for this network, {_listed(among)}: choose one by "
            f"`weights`, such as weights: {among[0] or others[-1]}"
        )
    note = None
    if averages and others:
        note = (
            f"has the average {averages[0]!r} beside the weights {_listed(others)}: the average is "
            f"taken, and `weights: {others[0] or 'raw'}` takes the latter"
        )
    return Weights(sets[among[0]], note)


def read_weights(path: Path) -> Any:
    """Return what a file of weights holds; no code in it is run.

    Objects of unknown classes become empty ones, of which the attributes are kept.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is of no format that can be read; says of which.
    """
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir())
        raise ValueError(f"it is a folder, of {', '.join(names[:LISTED]) or 'nothing'}")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError("it is empty")
    for start, what in _FORMATS.items():
        if head.startswith(start):
            raise ValueError(f"it must be safetensors or of torch.save, and is {what}")
    if head[:1] in b"{[" and path.suffix == ".json":
        return _shards(path)
    if head[8:9] == b"{":
        return _safetensors(path)
    if head.startswith(b"PK"):
        return _archive(path)
    return _pickle(path)


def describe_content(tree: Any) -> str:
    """Return the keys of what a file holds, with types and shapes.

    >>> describe_content({"net": {"a": torch.zeros(2, 3)}, "epoch": 3})
    "the file has 'net' (1 tensor: a [2, 3]), 'epoch' (int)"
    """
    if isinstance(tree, _Inert) and not vars(tree):
        return f"the file has {_describe(tree)}"
    items = vars(tree) if isinstance(tree, _Inert) else tree
    if not isinstance(items, Mapping) or _is_module(tree):
        return f"the file has {_describe(tree)}"
    if items and all(isinstance(value, Tensor) for value in items.values()):
        return f"the file has {_tensors(items)}"
    keys = [f"{key!r} ({_describe(value)})" for key, value in list(items.items())[:LISTED]]
    more = f" and {len(items) - LISTED:,} more" if len(items) > LISTED else ""
    return f"the file has {', '.join(keys) or 'no keys'}{more}"


# --- files ---


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError:
        raise ValueError("it is a safetensors file that is damaged or cut off") from None
    return tensors


def _shards(path: Path) -> dict[str, Any]:
    """Return the tensors of all files that an index names."""
    try:
        index = parse_json(read_text(path))
    except ValueError:
        raise ValueError("it is JSON that is damaged or cut off") from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("it is JSON, and no index of a sharded checkpoint (`weight_map`)")
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names.values()):
        shard = path.parent / name
        if shard.name != name or not shard.is_file():
            raise ValueError(f"it names the file {name}, which is not beside it")
        part = read_weights(shard)
        found |= part if isinstance(part, dict) else {}
    return found


def _archive(path: Path) -> Any:
    """Return the content of a zip file: of torch.save, or of NumPy."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except zipfile.BadZipFile:
        raise ValueError(
            "it is damaged or cut off, as an upload or a full disk leaves it"
        ) from None
    if names and all(name.endswith(".npy") for name in names):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
        except (ValueError, TypeError):
            raise ValueError("it is a NumPy archive of objects rather than of numbers") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            "it is a TorchScript program, which is not run here: save its weights alone, by "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt')"
        )
    if not any(name.endswith("data.pkl") for name in names):
        few = ", ".join(names[:NAMED])
        raise ValueError(f"it is a zip file without weights of torch.save, of {few or 'nothing'}")
    return _pickle(path)


def _pickle(path: Path) -> Any:
    """Return what torch.save has written, with empty objects for those of unknown classes."""
    unknown: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            unknown = get_unsafe_globals_in_checkpoint(path)
        stubs: list[Any] = [(type(n.rpartition(".")[2], (_Inert,), {}), n) for n in unknown]
        with safe_globals(stubs), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - what is no checkpoint may end in any error
        few = f" ({', '.join(sorted(unknown)[:NAMED])})" if unknown else ""
        raise ValueError(
            f"it is no file of weights, or holds objects that cannot be read without running code"
            f"{few}: save the weights alone, by torch.save(model.state_dict(), 'weights.pt')"
        ) from None


class _Inert(dict[Any, Any]):
    """Stands for an object of an unknown class: it keeps attributes and items, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update((str(name), value) for name, value in state.items())

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


# --- sets of tensors ---


def _groups(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield the tensors by name of each mapping and module, with the keys that led to it."""
    if _is_module(value):
        yield ".".join(path), dict(_state(value, "", 0))
        return
    items = {**value, **vars(value)} if isinstance(value, _Inert) else value
    if not isinstance(items, Mapping):
        return
    named = {key: part for key, part in items.items() if isinstance(key, str)}
    tensors = {key: part for key, part in named.items() if isinstance(part, Tensor)}
    if tensors:
        yield ".".join(path), tensors
    if len(path) < DEEPEST:
        for key, part in named.items():
            yield from _groups(part, (*path, key))


def _is_module(value: Any) -> bool:
    return isinstance(value, _Inert) and all(
        isinstance(vars(value).get(name), Mapping) for name in _PARAMETERS
    )


def _state(module: _Inert, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict of a pickled module."""
    own = vars(module)
    passing = own.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in own[kind].items():
            if isinstance(tensor, Tensor) and name not in passing:
                yield f"{prefix}{name}", tensor.detach()
    for name, part in own["_modules"].items():
        if _is_module(part) and depth < 100:
            yield from _state(part, f"{prefix}{name}.", depth + 1)


def _complete(
    label: str, group: Mapping[str, Tensor], wanted: Shapes
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield the sets of a group that are the network's, each with its name in the file."""
    for tensors in _variants(group, wanted):
        found = dict(_fitting(tensors, wanted))
        if found:
            yield from ((_joined(label, prefix), own) for prefix, own in found.items())
            return


def _fitting(
    tensors: Mapping[str, Tensor], wanted: Shapes
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield the network's tensors for each prefix under which there is nothing else."""
    fitting, claimed = [], set[str]()
    for prefix in _prefixes(tensors, wanted):
        missing, _, reshaped = _differences(tensors, wanted, prefix)
        if not missing and not reshaped:
            fitting.append(prefix)
            claimed |= {f"{prefix}{name}" for name in wanted}
    for prefix in fitting:
        _, extra, _ = _differences(tensors, wanted, prefix)
        if not set(extra) - claimed:
            found = {n: tensors[f"{prefix}{n}"] for n in wanted if f"{prefix}{n}" in tensors}
            counters = {n: torch.zeros(tuple(wanted[n])) for n in wanted.keys() - found.keys()}
            yield prefix, {**found, **counters}


def _joined(label: str, prefix: str) -> str:
    return ".".join(part for part in (label, prefix.rstrip(".")) if part)


def _variants(group: Mapping[str, Tensor], wanted: Shapes) -> list[Mapping[str, Tensor]]:
    """Return tensors as they are named, and without wrappers that the network itself has not."""
    own = {part for name in wanted for part in name.split(".")}
    drop = [wrapper for wrapper in WRAPPERS if wrapper not in own]
    names = {key: ".".join(p for p in key.split(".") if p not in drop) for key in group}
    if len(set(names.values())) < len(group) or all(old == new for old, new in names.items()):
        return [group]
    return [group, {names[key]: tensor for key, tensor in group.items()}]


def _prefixes(tensors: Mapping[str, Tensor], wanted: Shapes) -> list[str]:
    """Return what may stand before the network's names, the likeliest first."""
    ends: dict[str, list[str]] = {}
    for key in tensors:
        parts = key.split(".")
        for start in range(min(len(parts), DEEPEST + 2)):
            prefix = "".join(f"{part}." for part in parts[:start])
            ends.setdefault(".".join(parts[start:]), []).append(prefix)
    return [p for p, _ in Counter(p for name in wanted for p in ends.get(name, ())).most_common()]


def _differences(
    tensors: Mapping[str, Tensor], wanted: Shapes, prefix: str
) -> tuple[list[str], list[str], list[str]]:
    """Return the names that are missing, those that are left over, and those of other shapes."""
    missing, reshaped = [], []
    for name, shape in wanted.items():
        found = tensors.get(f"{prefix}{name}")
        if found is None:
            missing.append(name)
        elif list(found.shape) != list(shape):
            reshaped.append(name)
    names = {f"{prefix}{name}" for name in wanted}
    extra = [key for key in tensors if key.startswith(prefix) and key not in names]
    return _weights(missing), _weights(extra), reshaped


def _weights(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.endswith(COUNTERS)]


def _is_named(label: str, key: str) -> bool:
    """Say whether a set goes by a name: its whole name, or one of the keys that lead to it."""
    return label == key or key in label.split(".") or (key == "raw" and not label)


def _same(sets: Sequence[Mapping[str, Tensor]]) -> bool:
    first, *others = sets
    return all(torch.equal(first[name], each[name]) for each in others for name in first)


# --- words ---


def _describe_misfit(
    groups: Sequence[tuple[str, Mapping[str, Tensor]]], wanted: Shapes, outputs: int
) -> str:
    """Return in what the set that is nearest to the network differs, why, and the way out."""
    best, most = None, (0, 0)
    for tensors in (each for _, group in groups for each in _variants(group, wanted)):
        for prefix in _prefixes(tensors, wanted)[:LISTED]:
            found = _differences(tensors, wanted, prefix)
            rank = (len(wanted) - len(found[0]), -len(found[1]))
            if best is None or rank > most:
                best, most = (tensors, prefix, *found), rank
    if best is None:
        few = ", ".join(list(wanted)[:NAMED])
        return (
            f"it is of another network, as none of its tensors has a name of this one's ({few}, "
            "…): give the network that it was saved from by model and args"
        )
    tensors, prefix, missing, extra, reshaped = best
    shapes = [
        f"{name} {list(tensors[prefix + name].shape)} instead of {list(wanted[name])}"
        for name in reshaped
    ]
    parts = [
        _some(f"{len(missing)} of {len(wanted)} tensors missing", missing),
        _some(f"{len(extra)} left over", extra),
        _some(f"{len(reshaped)} of another shape", shapes),
    ]
    pairs = [(list(tensors[prefix + name].shape), list(wanted[name])) for name in reshaped]
    if missing and not extra and not pairs and all(wanted[n][0] == outputs for n in missing):
        why = "it has no last layer: train one for these classes first"
    elif missing or extra:
        why = "it is of another network or depth: give model and args as it was trained with"
    else:
        why = _of_shapes(pairs, outputs)
    return f"{', '.join(filter(None, parts))}: {why}"


def _of_shapes(pairs: Sequence[tuple[list[int], list[int]]], outputs: int) -> str:
    """Return the likely reason for shapes that differ, each as it is and as it should be."""
    heads = [a[0] for a, b in pairs if a and b and b[0] == outputs and a[1:] == b[1:]]
    if len(heads) == len(pairs):
        return (
            f"it was trained for {heads[0]} classes, and the data have {outputs}: give the data "
            "that it was trained on, or train its last layer on these first"
        )
    (found, own), *others = pairs
    if not others and len(own) > 1 and own[:1] + own[2:] == found[:1] + found[2:]:
        return f"it was trained for inputs of {found[1]} channels, and the data have {own[1]}"
    return "it is of another width or size: give model and args as it was trained with"


def _some(text: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"{text} ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})"


def _listed(labels: Mapping[str, Any] | Sequence[str]) -> str:
    """Return names of sets; that without a key is called raw."""
    return ", ".join(repr(label or "raw") for label in labels)


def _tensors(items: Mapping[Any, Tensor]) -> str:
    few = [f"{name} {list(tensor.shape)}" for name, tensor in list(items.items())[:NAMED]]
    more = ", …" if len(items) > NAMED else ""
    return f"{len(items)} tensor{'s' * (len(items) != 1)}: {', '.join(few)}{more}"


def _describe(value: Any) -> str:
    """Return type and size of a value."""
    if _is_module(value):
        return f"a module {type(value).__name__} of {_tensors(dict(_state(value, '', 0)))}"
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, _Inert):
        return f"an object of {type(value).__name__}"
    if isinstance(value, Mapping):
        tensors = {key: part for key, part in value.items() if isinstance(part, Tensor)}
        if tensors:
            return _tensors(tensors)
        keys = ", ".join(map(str, list(value)[:NAMED]))
        return f"mapping of {keys}{', …' if len(value) > NAMED else ''}" if value else "empty"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
