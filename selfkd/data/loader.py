"""Reading of streamed images batch by batch, by processes that may go on from pass to pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .stream import Stream

_AHEAD = 2  # batches that are read ahead from a file
_SMALL = 2**20  # bytes of a batch that is read sooner than a thread is asked for it

_kept: list[_Loaders] = []


@dataclass(eq=False)
class _Chunks:
    """Images of each batch of a pass, which is another for each pass of a loader."""

    chunks: list[list[int]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


@dataclass(eq=False)
class _Loader:
    """A loader whose processes wait for the next pass."""

    chunks: _Chunks
    loader: DataLoader[Tensor]
    busy: bool = False


class _Loaders:
    """The loaders of a training, one for each stream that is read."""

    def __init__(self) -> None:
        self._loaders: dict[tuple[Stream, int, str], _Loader] = {}

    def read(
        self, images: Stream, chunks: list[list[int]], workers: int, device: torch.device
    ) -> Iterator[Tensor]:
        key = (images, workers, device.type)
        found = self._loaders.get(key)
        if found is None:
            waiting = _Chunks()
            found = _Loader(waiting, _loader(images, waiting, workers, device, persistent=True))
            self._loaders[key] = found
        elif found.busy:  # by a pass that is not over yet
            yield from _loader(images, _Chunks(chunks), workers, device)
            return
        found.busy, found.chunks.chunks = True, chunks
        try:
            yield from found.loader
        except Exception:  # its processes may have ended
            self._loaders.pop(key, None)
            raise
        finally:
            found.busy = False

    def end(self) -> None:
        """End all processes: they do when nothing refers to their loaders any more."""
        self._loaders.clear()


@contextmanager
def kept_processes() -> Iterator[None]:
    """Let the processes that decode streamed images go on from pass to pass, to the end of this."""
    loaders = _Loaders()
    _kept.append(loaders)
    try:
        yield
    finally:
        _kept.remove(loaders)
        loaders.end()


def read_stream(
    images: Stream, chunks: Sequence[Tensor], workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield the images of each batch.

    Args:
        images: Stream.
        chunks: Images of each batch, int64.
        workers: Number of processes that decode.
        device: Device that the batches will be copied to.
    """
    if images.kept is not None and images.rows is not None:
        return _mapped(images.kept, [images.rows[chunk] for chunk in chunks], device)
    numbers = [chunk.tolist() for chunk in chunks]
    if workers and _kept:
        return _kept[-1].read(images, numbers, workers, device)
    return iter(_loader(images, _Chunks(numbers), workers, device))


def _loader(
    images: Stream,
    chunks: _Chunks,
    workers: int,
    device: torch.device,
    *,
    persistent: bool = False,
) -> DataLoader[Tensor]:
    return DataLoader(
        images,
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=torch.stack,
        pin_memory=device.type == "cuda",
        persistent_workers=persistent,
        generator=torch.Generator(),  # or DataLoader would draw from the global one
    )


def _mapped(images: Tensor, chunks: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield rows of a file that is mapped into memory, large batches read ahead by a thread."""

    def read(chunk: Tensor) -> Tensor:
        rows = images.index_select(0, chunk)
        return rows.pin_memory() if device.type == "cuda" else rows

    if not chunks or len(chunks[0]) * images[0].numel() < _SMALL:
        yield from map(read, chunks)
        return
    thread = ThreadPoolExecutor(1, "images")
    try:
        ahead: list[Future[Tensor]] = []
        for chunk in chunks:
            ahead.append(thread.submit(read, chunk))
            if len(ahead) > _AHEAD:
                yield ahead.pop(0).result()
        while ahead:
            yield ahead.pop(0).result()
    finally:
        thread.shutdown(cancel_futures=True)
