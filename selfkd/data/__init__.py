"""Labelled images: loading data sets, splitting them, and iterating over batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .batches import Data as Data
from .batches import Split as Split
from .batches import batches as batches

if TYPE_CHECKING:
    from .load import fingerprint as fingerprint
    from .load import load_data as load_data


def __getattr__(name: str) -> object:
    """Import what loads data sets where it is asked for: a training loop does not need it."""
    if name in ("fingerprint", "load_data"):
        return getattr(importlib.import_module("selfkd.data.load"), name)
    raise AttributeError(f"module 'selfkd.data' has no attribute {name!r}")
