"""Files of events that TensorBoard reads, written without it: it would bring torch to the driver.

A file is a sequence of records: length, its checksum, message, its checksum. A message is a
`tensorflow.Event` of protobuf: wall time (1), step (2), version of the file (3), summary (5); a
summary has values (1), each of a tag (1) and a number (2).
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Mapping
from pathlib import Path

VERSION = b"brain.Event:2"


class EventFile:
    """A file of events; each row is in it when `add` returns.

    Args:
        folder: Folder of the file, which TensorBoard shows as one run.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{int(time.time())}.selfkd").open("wb")
        self._write(_field(3, VERSION))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step, by their tags."""
        numbers = (_field(1, tag.encode()) + _single(2, float(v)) for tag, v in values.items())
        summary = b"".join(_field(1, number) for number in numbers)
        self._write(b"\x10" + _varint(step) + _field(5, summary))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


def _varint(number: int) -> bytes:
    """Return a number of at least 0 in protobuf's variable length.

    >>> _varint(300).hex()
    'ac02'
    """
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _single(number: int, value: float) -> bytes:
    try:
        content = struct.pack("<f", value)
    except OverflowError:  # beyond single precision
        content = struct.pack("<f", math.copysign(math.inf, value))
    return bytes([number << 3 | 5]) + content


def _table() -> list[int]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return table


_TABLE = _table()


def _checksum(content: bytes) -> bytes:
    """Return the masked CRC-32C of a record.

    >>> _checksum(b"123456789").hex()
    'e5b08ac7'
    """
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
