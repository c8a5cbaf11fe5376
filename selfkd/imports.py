"""Large imports without garbage collection, which searches each time all that is there already."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection(*, keep: bool = False) -> Iterator[None]:
    """Import what is large, such as torch, a quarter faster: without garbage collection.

    Args:
        keep: Whether what is there afterwards remains to the end of the process, so that later
            collections need not search it.

    >>> with without_collection():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if keep:
            gc.freeze()
        if enabled:
            gc.enable()
