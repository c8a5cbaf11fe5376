"""What an interrupted trial goes on from: one file, whole and its own, or not used."""

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

from selfkd.results import CHECKPOINT, Row
from selfkd.storage.files import fetch, replace, retry_io
from selfkd.training.ranks import Ranks

DAMAGED: tuple[type[Exception], ...] = (
    *(OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError),
    *(zipfile.BadZipFile, pickle.UnpicklingError),
)  # what reading such a file may raise


class Progress:
    """The rows of a trial so far, and what it goes on from if it is interrupted.

    Where several ranks train one student, each makes one of these, at the same time; the first
    writes.

    Args:
        path: of the file.
        made_from: JSON data: all that the trial depends on. What another trial left is not used.
        seconds: write at the first end of an epoch that comes so long after the last time.
        epochs: write after so many epochs.
        ranks: this process among those that train the student.
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
        self.state: dict[str, Any] | None = None
        self._path, self._ranks = path, ranks
        self._seconds, self._epochs = seconds, epochs
        text = json.dumps(made_from, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._kept, self._note = _read(path, self._key)
        ranks.agree(None)  # all have read it before one writes
        if self._kept is not None:
            self.state = self._kept["state"]
        self._written, self._written_at = 0, time.monotonic()
        self._readable = False

    def resume(self) -> Iterator[Row]:
        """Yield the rows so far; random numbers go on as they did after the last of them."""
        kept, self._kept = self._kept, None
        if kept is None or self.rows:
            return
        self.rows = kept["rows"]
        self._written = len(self.rows)
        if self._ranks.rank < len(kept["random"]):
            _restore_rng_state(kept["random"][self._ranks.rank])
        yield from (dict(row) for row in self.rows)

    @property
    def spent(self) -> float:
        """Seconds that the rows so far took."""
        return float(self.rows[-1]["seconds"]) if self.rows else 0.0

    def reached(self, row: Row, state: Mapping[str, Any] | None, *, together: bool = True) -> None:
        """Take in the row of an epoch; write, where it is time.

        What a user should know is put into the row, as `note`.

        Args:
            row: of the epoch.
            state: tensors, state dicts, numbers and text to go on from; none at the end.
            together: every rank calls this; else the first rank's random numbers alone are kept.
        """
        self.rows.append(dict(row))
        ranks = self._ranks if together else Ranks()
        if state is not None and ranks.agree(self._is_due()):
            self._write(state, ranks.collect(_rng_state()))
        if self._note is not None:
            row["note"], self._note = self._note, None

    def _is_due(self) -> bool:
        by_epochs = self._epochs is not None and len(self.rows) - self._written >= self._epochs
        waited = time.monotonic() - self._written_at
        return by_epochs or (self._seconds is not None and waited >= self._seconds)

    def _write(self, state: Mapping[str, Any], drawn: list[dict[str, Any]]) -> None:
        kept = {
            "made_from": self._key,
            "rows": self.rows,
            "random": drawn,
            "state": dict(state),
        }
        self._written, self._written_at = len(self.rows), time.monotonic()
        if self._ranks.first:
            try:
                replace(self._path, lambda beside: torch.save(kept, beside), patience=0)
            except (OSError, RuntimeError) as error:  # the latter by torch's writer: a full disk
                self._note = f"{CHECKPOINT} could not be written, training goes on: {error}"
            else:
                self._check_readable()

    def _check_readable(self) -> None:
        """Read the first one back: what is not plain data could never be gone on from.

        Where that fails by the storage, the next one is read.
        """
        if self._readable:
            return
        try:
            torch.load(fetch(self._path), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:
            self._note = f"{CHECKPOINT} could not be read back, training goes on: {error}"
        except pickle.UnpicklingError as error:
            with contextlib.suppress(OSError):
                self._path.unlink()
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise TypeError(
                "checkpoint must hold tensors, state dicts, numbers and text, "
                f"got {found[1] if found else error}"
            ) from None
        else:
            self._readable = True


def _read(path: Path, key: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return what was kept, or why it is not used."""
    if not retry_io(path, path.exists):
        return None, None
    try:
        local = fetch(path)
        with zipfile.ZipFile(local) as archive:
            if (part := archive.testzip()) is not None:  # torch does not look at the checksums
                raise zipfile.BadZipFile(f"{part} differs from its checksum")
        kept: dict[str, Any] = torch.load(local, map_location="cpu", weights_only=True)
        made_from = kept["made_from"]
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        return None, f"{CHECKPOINT} is damaged, the trial began again at epoch 1: {reason}"
    if made_from != key:
        return None, (
            f"{CHECKPOINT} is of another config, seed or teacher, the trial began again at epoch 1"
        )
    return kept, None


def _rng_state() -> dict[str, Any]:
    """Return the states of all random numbers that training may draw."""
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
