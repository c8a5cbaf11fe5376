"""Files of weights from elsewhere: read without running code, and described."""

from __future__ import annotations

import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from selfkd.storage.files import parse_json, read_text

NAMED, LISTED = 3, 8
"""Names of a kind, and keys, in a message."""
SAVE_ALONE = "save the weights alone, by torch.save(model.state_dict(), 'weights.pt')"
"""Way out of a file that has no weights which can be read."""
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
_UNKNOWN = re.compile(r"GLOBAL (\S+) was not an allowed global")
MOST = 1000  # unknown classes in a file
_PARAMETERS = ("_parameters", "_buffers", "_modules")  # of a pickled module


class Inert(dict[Any, Any]):
    """Stands for an object of an unknown class: it keeps attributes and items, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update((str(name), value) for name, value in state.items())

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


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


def is_module(value: Any) -> bool:
    """Say whether an object is a pickled module."""
    return isinstance(value, Inert) and all(
        isinstance(vars(value).get(name), Mapping) for name in _PARAMETERS
    )


def state_of(module: Inert, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict of a pickled module."""
    own = vars(module)
    passing = own.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in own[kind].items():
            if isinstance(tensor, Tensor) and name not in passing:
                yield f"{prefix}{name}", tensor.detach()
    for name, part in own["_modules"].items():
        if is_module(part) and depth < 100:
            yield from state_of(part, f"{prefix}{name}.", depth + 1)


# --- formats ---


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, KeyError):  # KeyError: of a type that this version does not know
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
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            raise ValueError("it is a NumPy archive that is damaged, or has no numbers") from None
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
        while True:
            try:
                with safe_globals([*map(_stub, unknown)]), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return torch.load(path, map_location="cpu", weights_only=True)
            except UnpicklingError as error:  # of a file before PyTorch 1.6 it names one at a time
                found = _UNKNOWN.search(str(error))
                if found is None or len(unknown) > MOST:
                    raise
                name = found[1] if "." in found[1] else f"builtins.{found[1]}"
                if name in unknown:
                    raise
                unknown.append(name)
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - what is no checkpoint may end in any error
        few = f" ({', '.join(sorted(unknown)[:NAMED])})" if unknown else ""
        raise ValueError(
            f"it is no file of weights, or holds objects that cannot be read without running code"
            f"{few}: {SAVE_ALONE}"
        ) from None


def _stub(name: str) -> Any:
    """Return an empty class that goes by the name of another."""
    module, _, own = name.rpartition(".")
    return type(own, (Inert,), {"__module__": module})


# --- words ---


def describe_content(tree: Any) -> str:
    """Return the keys of what a file holds, with types and shapes.

    >>> describe_content({"net": {"a": torch.zeros(2, 3)}, "epoch": 3})
    "the file has 'net' (1 tensor: a [2, 3]), 'epoch' (int)"
    """
    if isinstance(tree, Inert) and not vars(tree):
        return f"the file has {_describe(tree)}"
    items = vars(tree) if isinstance(tree, Inert) else tree
    if not isinstance(items, Mapping) or is_module(tree):
        return f"the file has {_describe(tree)}"
    if items and all(isinstance(value, Tensor) for value in items.values()):
        return f"the file has {_tensors(items)}"
    keys = [f"{key!r} ({_describe(value)})" for key, value in list(items.items())[:LISTED]]
    more = f" and {len(items) - LISTED:,} more" if len(items) > LISTED else ""
    return f"the file has {', '.join(keys) or 'no keys'}{more}"


def _tensors(items: Mapping[Any, Tensor]) -> str:
    few = [f"{name} {list(tensor.shape)}" for name, tensor in list(items.items())[:NAMED]]
    more = ", …" if len(items) > NAMED else ""
    return f"{len(items)} tensor{'s' * (len(items) != 1)}: {', '.join(few)}{more}"


def _describe(value: Any) -> str:
    """Return type and size of a value."""
    if is_module(value):
        return f"a module {type(value).__name__} of {_tensors(dict(state_of(value, '', 0)))}"
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Inert):
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
