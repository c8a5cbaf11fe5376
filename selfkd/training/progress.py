"""Checkpoint of an interrupted trial: one file, used only where it is intact and its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import random
import re
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfkd.results import CHECKPOINT, Epoch, Row, from_row
from selfkd.storage.files import fetch, remove_file, replace, retry_io
from selfkd.training.ranks import Ranks

DAMAGED: tuple[type[Exception], ...] = (
    *(OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError),
    *(zipfile.BadZipFile, pickle.UnpicklingError),
)
"""Exceptions that reading a damaged checkpoint may raise."""


class Progress:
    """Rows of a trial so far, and its checkpoint, from which it resumes after an interruption.

    Where several ranks train one student, each of them creates one at the same time; rank 0 writes
    the file.

    Args:
        path: File of the checkpoint.
        made_from: JSON data that the trial depends on; a checkpoint of other data is not used.
        seconds: Seconds after which the next checkpoint is due, at the end of an epoch; None to
            disregard time.
        epochs: Epochs after which the next checkpoint is due; None to disregard their number.
        ranks: Ranks that train the student.
    """

    def __init__(
        self,
        path: Path,
        *,
        made_from: Mapping[str, Any],
        seconds: float | None,
        epochs: int | None,
        ranks: Ranks,
    ) -> None:
        self.rows: list[Row] = []
        """Rows of the epochs so far."""
        self.state: dict[str, Any] | None = None
        """State to resume from; None for a fresh trial."""
        self._path, self._ranks = path, ranks
        self._seconds, self._epochs = seconds, epochs
        text = json.dumps(made_from, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._checkpoint, self._note = _read(path, self._key)
        ranks.agree(None)  # all ranks have read it before rank 0 writes
        if self._checkpoint is not None:
            self.state = self._checkpoint["state"]
        self._written, self._written_at = 0, time.monotonic()
        self._readable = False

    def resume(self) -> Iterator[Row]:
        """Yield the rows of the checkpoint; restore the random states after the last of them."""
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None or self.rows:
            return
        self.rows = checkpoint["rows"]
        self._written = len(self.rows)
        if self._ranks.rank < len(checkpoint["random"]):
            _restore_rng_state(checkpoint["random"][self._ranks.rank])
        yield from (dict(row) for row in self.rows)

    @property
    def spent(self) -> float:
        """Training time of the rows so far in seconds."""
        return float(self.rows[-1]["seconds"]) if self.rows else 0.0

    def reached(self, row: Row, state: Mapping[str, Any] | None, *, together: bool = True) -> None:
        """Add the row of an epoch; write a checkpoint where one is due.

        Problems with the checkpoint are added to the row as `note`.

        Args:
            row: Row of the epoch.
            state: Tensors, state dicts, numbers and text to resume from; None after the last
                epoch.
            together: Whether every rank calls this; else only the random state of rank 0 is saved.

        Raises:
            TypeError: The state contains other objects.
        """
        self.rows.append(dict(row))
        ranks = self._ranks if together else Ranks()
        if state is not None and ranks.agree(self._is_due()):
            self._write(state, ranks.collect(_rng_state()))
        if self._note is not None:
            row["note"], self._note = self._note, None

    def _is_due(self) -> bool:
        by_epochs = self._epochs is not None and len(self.rows) - self._written >= self._epochs
        elapsed = time.monotonic() - self._written_at
        return by_epochs or (self._seconds is not None and elapsed >= self._seconds)

    def _write(self, state: Mapping[str, Any], rng_states: list[dict[str, Any]]) -> None:
        checkpoint = {
            "made_from": self._key,
            "rows": self.rows,
            "random": rng_states,
            "state": dict(state),
        }
        self._written, self._written_at = len(self.rows), time.monotonic()
        if self._ranks.first:
            try:
                replace(self._path, lambda file: torch.save(checkpoint, file), patience=0)
            except (OSError, RuntimeError) as error:  # RuntimeError: torch on a full disk
                self._note = f"{CHECKPOINT} could not be written, training continues: {error}"
            else:
                self._check_readable()

    def _check_readable(self) -> None:
        """Read the first checkpoint back: one that is not plain data could not be resumed from.

        Where the storage fails, the next checkpoint is checked instead.
        """
        if self._readable:
            return
        try:
            torch.load(fetch(self._path), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:
            self._note = f"{CHECKPOINT} could not be read back, training continues: {error}"
        except pickle.UnpicklingError as error:
            with contextlib.suppress(OSError):
                remove_file(self._path)
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise TypeError(
                "checkpoint must hold tensors, state dicts, numbers and text, "
                f"got {found[1] if found else error}"
            ) from None
        else:
            self._readable = True


def _read(path: Path, key: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return a checkpoint, or None and the reason why an existing one is not used."""
    if not retry_io(path, path.exists):
        return None, None
    try:
        local = fetch(path)
        if not local.is_file():  # a pipe would be waited for
            raise OSError(f"{path} is a folder, pipe or device")
        with zipfile.ZipFile(local) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise zipfile.BadZipFile("its parts are compressed, as torch does not")
            if (part := archive.testzip()) is not None:  # torch does not verify the checksums
                raise zipfile.BadZipFile(f"{part} differs from its checksum")
        checkpoint: dict[str, Any] = torch.load(local, map_location="cpu", weights_only=True)
        made_from = checkpoint["made_from"]
        from_row(list[Epoch], checkpoint["rows"])
        if not isinstance(checkpoint["state"], dict) or not isinstance(checkpoint["random"], list):
            raise TypeError("state and random must be a mapping and a list")
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        return None, f"{CHECKPOINT} is damaged, the trial restarts at epoch 1: {reason}"
    if made_from != key:
        return None, (
            f"{CHECKPOINT} is of another config, seed or teacher, the trial restarts at epoch 1"
        )
    return checkpoint, None


def _rng_state() -> dict[str, Any]:
    """Return the states of the random generators of torch, CUDA, Python and NumPy."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if _on_cuda() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def _on_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _restore_rng_state(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
