"""Tests of the integrations."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def imported_modules_are_not_collected() -> Iterator[None]:
    """Leave out what was imported when Trainer collects garbage, which it does in each training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
