"""Tensors on disk, with what they were made from: safetensors, checked by hash."""

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

from selfkd.storage.files import fetch, replace, retry_io


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of names, types, shapes and bytes.

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
    """Write tensors as safetensors, atomically, with what they were made from.

    Args:
        path: file to write.
        tensors: what to save, on any device.
        facts: JSON data, read back by `load_tensors`.

    Returns:
        The hash of tensors and facts, which is saved with them.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(dict(facts), sort_keys=True)
    mark = _hash(own, text)

    def write(beside: str) -> None:
        try:
            save_file(own, beside, metadata={"facts": text, "hash": mark})
        except SafetensorError as error:  # it gives the system's error as text only
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else 0, str(error), str(path)) from None

    replace(path, write)
    return mark


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and facts; the tensors are memory-mapped, so treat them as constant.

    Returns:
        The tensors by name, and the facts with the `hash` of both among them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged; names it.
    """
    if not retry_io(path, path.exists):
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(fetch(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None
    if not {"facts", "hash"} <= metadata.keys():
        raise ValueError(f"{path} was not written by selfkd: it has no hash or facts")
    facts, mark = metadata["facts"], metadata["hash"]
    if _hash(tensors, facts) != mark:
        raise ValueError(f"{path} is damaged (its hash differs): remove it and resume")
    return tensors, {**json.loads(facts), "hash": mark}


def _hash(tensors: Mapping[str, Tensor], facts: str) -> str:
    return hashlib.sha256(f"{tensors_hash(tensors)} {facts}".encode()).hexdigest()[:16]
