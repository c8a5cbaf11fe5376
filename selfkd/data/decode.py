"""Decoding of all images of a stream: once for all processes of a machine where that can be."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from selfkd.storage.machine_cache import Pixels, cached_array

from .stream import State, Stream

log = logging.getLogger(__name__)
FORMAT = 1
"""Number that is raised where the same files would be decoded to other pixels."""
LEAST_BYTES = 2**16
"""Bytes of files from which on decoded images are kept."""
PATIENCE = 2.0
"""Seconds of decoding after which it is said how far it is."""
_IMAGES, _BYTES = 2000, 2**25  # images, or their bytes, from which on processes decode them
_CHUNK = 2**20  # bytes that a process decodes at a time, about


def decode(stream: Stream, say: Callable[[str], object] = log.warning) -> Tensor:
    """Decode all images, or map those into memory that are decoded already.

    Args:
        stream: Images.
        say: Function that is told why they are not kept for other processes, where they are not.

    Returns:
        Images, uint8 `[N, channels, size, size]`.
    """
    found = _kept(stream, say)
    if found is not None:
        return torch.from_numpy(found)
    images = torch.empty(stream.shape, dtype=torch.uint8)
    start = 0
    for rows in _decoded(stream):
        images[start : start + len(rows)] = rows
        start += len(rows)
    return images


def keep(stream: Stream, say: Callable[[str], object] = log.warning) -> Stream:
    """Return a stream whose images are decoded once for all processes of a machine, if they can be.

    Args:
        stream: Images.
        say: Function that is told why they are not kept, where they are not.
    """
    found = _kept(stream, say)
    if found is None:
        return stream
    return replace(stream, kept=torch.from_numpy(found), rows=torch.arange(len(stream)))


def _kept(stream: Stream, say: Callable[[str], object]) -> Pixels | None:
    """Return the images from the machine's cache, which they are put into; None if they cannot."""
    numbers = stream.positions.tolist()
    try:
        states = stream.pictures.states(numbers)
    except OSError:  # which names no image; what reads it does
        return None
    if states is None or sum(size for _, size, *_ in states) < LEAST_BYTES:
        return None
    found = cached_array(
        _name(stream, states),
        stream.shape,
        lambda: (rows.numpy() for rows in _decoded(stream)),
        lambda: stream.pictures.states(numbers) == states,
    )
    if not isinstance(found, str):
        return found
    if found:
        say(f"decoded images are not kept for other processes of this machine: {found}")
    return None


def _name(stream: Stream, states: list[State]) -> str:
    import PIL

    facts = [FORMAT, PIL.__version__, stream.mode, stream.image_size, states]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _decoded(stream: Stream) -> Iterator[Tensor]:
    """Yield all images in order, several at a time; say how far it is where it takes long."""
    start, told, done = time.monotonic(), PATIENCE, 0
    for rows in _chunks(stream):
        yield rows
        done += len(rows)
        spent = time.monotonic() - start
        if spent > told and done < len(stream):
            told = 5 * spent
            left = spent * (len(stream) - done) / done
            log.warning(
                "decoding images, %s of %s after %.0f s, about %.0f s more: %s, …",
                *(f"{done:,}", f"{len(stream):,}", spent, left),
                stream.pictures.where(int(stream.positions[0])),
            )


def _chunks(stream: Stream) -> Iterator[Tensor]:
    size = max(1, min(256, _CHUNK * len(stream) // max(1, stream.nbytes)))
    parts = [part.tolist() for part in torch.split(torch.arange(len(stream)), size)]
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    few = len(stream) < _IMAGES and stream.nbytes < _BYTES
    if few or (processes or 1) < 2:
        # threads would take turns: Pillow decodes small images faster than they are exchanged
        yield from (torch.stack([stream[i] for i in part]) for part in parts)
        return
    yield from DataLoader(
        stream,
        batch_sampler=parts,
        num_workers=min(processes or 1, 16),
        collate_fn=torch.stack,
        generator=torch.Generator(),  # or DataLoader would draw from the global one
    )
