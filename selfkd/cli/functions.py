"""Training functions of a user, named on the command line or given in Python."""

from __future__ import annotations

from pathlib import Path

from selfkd.cli.signals import inside_job
from selfkd.errors import ConfigError
from selfkd.storage.remote import secret_fault


def absolute_reference(reference: str) -> str:
    """Return `FILE.py:FUNCTION` with the file's absolute path, but for one that is refused.

    Args:
        reference: Reference of a training function, as of `--train`.
    """
    path, colon, name = reference.rpartition(":")
    if secret_fault(path) is not None:
        return reference
    if colon and not inside_job():  # workers have other folders, but for a job's own
        return f"{Path(path).expanduser().absolute()}:{name}"
    return reference


def check_reference(reference: str) -> None:
    """Raise ConfigError for a reference whose file is not there."""
    path, colon, _ = reference.rpartition(":")
    if fault := secret_fault(path):
        raise ConfigError(f"--train {fault}")
    if not colon or not Path(path).expanduser().is_file():
        raise ConfigError(f"--train must be path/file.py:function, got {reference!r}")


def stem_of(reference: str) -> str:
    """Return how the run folder of a training function begins."""
    path, _, name = reference.rpartition(":")
    return f"{Path(path).stem}-{name}"
