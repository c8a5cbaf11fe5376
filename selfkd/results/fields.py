"""Types of the fields of a row that a run acts on: files, hashes, counts, settings."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

MOST = 2**40
_SEARCHABLE = re.compile(
    r"(model|student|train|distill|write|params)(\.[\w.-]+)?|members\.(source|use)"
    r"|data\.(train_size|classes|label_noise|crop|flip|jitter|views|rationales|rationale_weight)"
    r"|data\.((transfer|augment)(\.\w+)?|repeats)"
)


def _within(name: str) -> str:
    """Return the name of a file of the run folder."""
    parts = posixpath.normpath(name).split("/")
    if name.startswith("/") or parts[0] == ".." or re.search(r"[\0\\]|://", name):
        raise ValueError(f"must be a file within the run folder, got {name!r}")
    return name


def _settings(point: dict[str, Any]) -> dict[str, Any]:
    for key in point:
        if not _SEARCHABLE.fullmatch(key):
            raise ValueError(f"must have keys that can be searched, got {key!r}")
    return point


FileName = Annotated[str, Field(max_length=4096), AfterValidator(_within)]
"""File within the run folder, relative to it."""
Digest = Annotated[str, Field(pattern=r"^[\w+-]*$", max_length=4096)]
"""Hash of tensors, which names files; empty where there are none."""
StageName = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$", max_length=200)]
"""Name of a stage, which names folders and runs of W&B."""
Count = Annotated[int, Field(ge=0, le=MOST)]
"""Number of something."""
Point = Annotated[dict[str, Any], AfterValidator(_settings)]
"""Values of a search space by dotted config key."""
