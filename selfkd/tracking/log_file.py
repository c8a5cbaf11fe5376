"""Files of W&B's runs: whether all of a run is in its file."""

from __future__ import annotations

from pathlib import Path

HEADER, FRAME, BLOCK = 7, 7, 2**15
"""Bytes of a file's header, of that of a frame (checksum, length, type), and of a block."""
_ENDS = (1, 4)  # types of a frame: whole, first, middle, last
_LAST = 5  # records among which is that of the end


def has_end(path: Path) -> bool:
    """Return whether the file of a run has its end: it does not where the disk was full.

    Args:
        path: File of the run, in the format of LevelDB's logs.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    try:
        content = path.read_bytes()
    except OSError:
        return False
    records: list[bytes] = []
    record, place = b"", HEADER
    while place < len(content):
        if (left := BLOCK - place % BLOCK) < FRAME:  # too short for a frame: filled with zeros
            place += left
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        if place + FRAME + length > len(content):
            return False
        kind = content[place + 6] if place + 6 < len(content) else 0
        place += FRAME
        record += content[place : place + length]
        place += length
        if kind in _ENDS:
            records, record = [*records[1 - _LAST :], record], b""
    try:
        kinds = {Record.FromString(found).WhichOneof("record_type") for found in records}
    except Exception:  # noqa: BLE001 - no record of W&B's
        return False
    return "exit" in kinds
