"""Listings of folders, kept for all processes of a machine while no folder has changed."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from selfkd.results import from_row, to_row
from selfkd.results.row import ROW
from selfkd.storage.machine_cache import load_kept, save_kept

from .stream import FRESH_NS

FORMAT = 1
"""Number that is raised where the same folders would be listed otherwise."""
LEAST_FILES = 1000
"""Number of files from which on a listing is kept."""

FolderState = tuple[str, int, int, int]


@dataclass(frozen=True, config=ROW)
class ListedFiles:
    """Files of a part of a folder, and their labels."""

    paths: list[str]
    """Paths, relative to the folder."""
    labels: list[int]
    """Class of each."""


@dataclass(frozen=True, config=ROW)
class Listing:
    """What is read of a folder."""

    classes: tuple[str, ...]
    """Names of the classes."""
    parts: dict[str, ListedFiles]
    """Files of train, val and test."""
    left_out: dict[str, int]
    """Number of files that are not read, by type."""


@dataclass(frozen=True, config=ROW)
class _Kept:
    """A listing with the states of all folders that it is of."""

    folders: list[FolderState]
    listing: Listing


def keep_listing(
    root: Path, names: Collection[str], kinds: Collection[str], make: Callable[[], Listing]
) -> Listing:
    """Return the listing of a folder: the one that is kept, unless a folder has changed since.

    It is made anew each time where there is a link, whose target may change elsewhere.

    Args:
        root: Folder.
        names: Names of the folders in it that are listed.
        kinds: Suffixes of the files that are listed.
        make: Function that makes the listing.
    """
    place = os.path.realpath(root)
    facts = [FORMAT, place, sorted(names), sorted(kinds)]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    try:
        kept = from_row(_Kept, load_kept(name))
        if kept.folders and all(_state(state[0]) == state for state in kept.folders):
            return kept.listing
    except (OSError, ValueError, ValidationError):
        pass
    states = _states(place, names)  # before the listing, so that a change meanwhile is seen later
    listing = make()
    if (
        states is not None
        and sum(len(part.paths) for part in listing.parts.values()) >= LEAST_FILES
    ):
        save_kept(name, to_row(_Kept(states, listing)))
    return listing


def _state(folder: str) -> FolderState:
    """Return what changes when a file of a folder is added, removed or renamed."""
    found = os.lstat(folder)
    return folder, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _states(root: str, names: Collection[str]) -> list[FolderState] | None:
    """Return the states of a folder and all in it; None where they do not tell of all changes."""
    states, waiting = [], [root]
    while waiting:
        folder = waiting.pop()
        states.append(_state(folder))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    return None
                listed = entry.name in names if folder == root else entry.name[0] != "."
                if listed and entry.is_dir():
                    waiting.append(entry.path)
    newest = max(changed for _, changed, *_ in states)
    return states if newest < time.time_ns() - FRESH_NS else None
