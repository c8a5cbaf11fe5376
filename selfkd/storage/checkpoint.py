"""Tensors on disk with their metadata: safetensors files, verified by a hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfkd.storage.files import fetch, parse_json, replace, retry_io


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 over names, dtypes, shapes and bytes.

    Args:
        tensors: Tensors by name, on any device; their order and strides do not matter.

    >>> tensors_hash({"a": torch.zeros(2)}) == tensors_hash({"a": torch.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Write tensors and metadata to a safetensors file, atomically.

    Args:
        path: File to write.
        tensors: Tensors by name, on any device; views and shared memory are saved by value.
        facts: JSON metadata, returned by `load_tensors`.

    Returns:
        Hash of tensors and facts, which is saved with them.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(dict(facts), sort_keys=True)
    digest = _hash(own, text)

    def write(temporary: str) -> None:
        try:
            save_file(own, temporary, metadata={"facts": text, "hash": digest})
        except SafetensorError as error:  # carries the errno of the system in its text only
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else 0, str(error), str(path)) from None

    replace(path, write)
    return digest


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata; the tensors are memory-mapped, so treat them as constant.

    Args:
        path: File written by `save_tensors`.

    Returns:
        Tensors by name, and the facts with `hash`, the hash of both, added.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or was not written by selfkd; the message names it.
    """
    if not retry_io(path, path.exists):
        raise FileNotFoundError(f"no such file: {path}")
    try:
        local = fetch(path)
        if not local.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} must be a file, and is a folder, pipe or device")
        with safe_open(local, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None
    if not {"facts", "hash"} <= metadata.keys():
        raise ValueError(
            f"{path} was not written by selfkd: it has no hash or facts (weights from elsewhere "
            "are for `generations --from` and members.checkpoints)"
        )
    facts, digest = metadata["facts"], metadata["hash"]
    if _hash(tensors, facts) != digest:
        raise ValueError(f"{path} is damaged (its hash differs): remove it and resume")
    try:
        found = {**parse_json(facts), "hash": digest}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None
    return tensors, found


def _hash(tensors: Mapping[str, Tensor], facts: str) -> str:
    return hashlib.sha256(f"{tensors_hash(tensors)} {facts}".encode()).hexdigest()[:16]
