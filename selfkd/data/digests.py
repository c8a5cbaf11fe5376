"""Hashes of the pixels of images, by which the same image is found in two data sets."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from .stream import Stream


def digests(images: Tensor | Stream) -> Iterator[bytes]:
    """Yield a hash of the pixels of each image, or of the features of each row.

    Args:
        images: Images `[N, …]`, or a stream that decodes them.

    >>> import torch
    >>> one, other, same = digests(torch.tensor([[1, 2], [1, 3], [1, 2]]))
    >>> one == same, one == other
    (True, False)
    """
    if isinstance(images, Tensor):
        for image in images.cpu():
            yield _digest(image)
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda number: _digest(images[number]), range(len(images)))


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()
