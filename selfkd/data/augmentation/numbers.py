"""Random numbers of a view: a hash of seed, image index and view number."""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants, as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def random_bits(seed: int, index: Tensor, stream: int | Tensor, draws: int) -> Tensor:
    """Uniform random integers that depend on the arguments alone (splitmix64).

    Args:
        seed: Random seed, any integer; taken modulo 2**64.
        index: Indices that the numbers belong to, int64 `[batch]`.
        stream: Number of an independent sequence, such as a view; or one for each index, int64
            `[batch]`.
        draws: Number of random integers for each index.

    Returns:
        Integers in [0, 2**32), int64 `[batch, draws]`, on the device of `index`. With more draws
        the rows are extended.

    Example:
        >>> random_bits(0, torch.tensor([7, 8]), stream=0, draws=2)[1].tolist()
        [3931604886, 1694181164]
        >>> random_bits(0, torch.tensor([8]), stream=0, draws=1).tolist()
        [[3931604886]]

    Reference:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
        https://doi.org/10.1145/2660193.2660195
    """
    if isinstance(stream, Tensor):
        key: int | Tensor = _mix(stream.to(index.device, non_blocking=True) + _seed_key(seed))
    else:
        key = _stream_key(seed, stream)
    keys = _mix(index * _GOLDEN + key)
    numbers = torch.arange(1, draws + 1, device=index.device) * _GOLDEN
    return _mix(keys[:, None] + numbers) >> 32 & 0xFFFFFFFF


def _stream_key(seed: int, stream: int) -> int:
    return _mixed(_seed_key(seed) + stream)


def _seed_key(seed: int) -> int:
    return _mixed(seed)


def _mixed(value: int) -> int:
    """Finaliser of splitmix64 of one number, as a signed 64-bit integer."""
    value %= 1 << 64
    value = (value ^ value >> 30) * _MIX_1 % (1 << 64)
    value = (value ^ value >> 27) * _MIX_2 % (1 << 64)
    return _signed(value ^ value >> 31)


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x: Tensor) -> Tensor:
    """Finaliser of splitmix64. Products wrap; masks clear the sign that a right shift copies."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _MIX_1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _MIX_2
    return x ^ (x >> 31 & (1 << 33) - 1)


def below(bits: Tensor, bound: int | Tensor) -> Tensor:
    """Return random integers in [0, bound) of 32 random bits each.

    >>> below(torch.tensor([0, 2**31, 2**32 - 1]), 10)
    tensor([0, 5, 9])
    """
    return bits * bound >> 32


def happens(bits: Tensor, probability: float) -> Tensor:
    """Return whether an event of this probability happens, of 32 random bits each.

    >>> happens(torch.tensor([0, 2**31, 2**32 - 1]), 0.5)
    tensor([ True, False, False])
    """
    return bits < round(probability * (1 << 32))
