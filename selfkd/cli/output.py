"""stdout and stderr of a command: no fault of theirs ends the work, whatever they can encode."""

from __future__ import annotations

import codecs
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from selfkd.storage.remote import without_secrets
from selfkd.text import visible

_PLAIN = {
    **dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True)),
    **{"–": "-", "—": "-", "…": "...", "→": "->", "±": "+-", "×": "x", "·": "|", "≥": ">="},
    **{"≤": "<=", "≈": "~", "−": "-", "’": "'", "²": "2"},
}


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    plain = [_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in unknown]
    return "".join(plain), error.end


codecs.register_error("selfkd", _in_plain_characters)


class SafeStream:
    """A stream whose faults are kept, not raised, and that writes what it can of any text.

    Args:
        stream: Text stream, such as stdout: a closed pipe, a full disk or an ASCII terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.fault: Exception | None = None
        """First fault, after which some of the output is lost."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; what the encoding does not have is replaced."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "selfkd").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.fault = self.fault or error
        if isinstance(error, BrokenPipeError):
            self._discard()

    def _discard(self) -> None:
        """Let all that follows, and what is buffered, go nowhere: Python writes it at its exit."""
        with suppress(OSError, ValueError):
            number = self._stream.fileno()
            if number in (1, 2):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)

    def finish(self) -> None:
        """Write what is buffered for the last time."""
        before = self.fault
        self.flush()
        if self.fault is not before or before is not None:
            self._discard()


class _Formatter(logging.Formatter):
    """Formats warnings so that no text in them controls the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(without_secrets(super().format(record)))


@contextmanager
def safe_output() -> Iterator[None]:
    """Guard stdout, stderr and warnings while a command works; also the decorator of its `main`."""
    if isinstance(sys.stdout, SafeStream):
        yield
        return
    before = sys.stdin, sys.stdout, sys.stderr
    _open_closed()
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    if not logging.root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter("%(message)s"))
        logging.root.addHandler(handler)
    try:
        yield
    finally:
        out.finish()
        if out.fault is not None and not isinstance(out.fault, BrokenPipeError):
            print_error(f"not all of the output could be written: {out.fault}", kind="warning")
        err.finish()
        sys.stdin, sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Open the streams that the process was started without; else the next file is one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is it
            if null != number:
                os.dup2(null, number)
                os.close(null)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - as long as the process
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def print_data(text: str) -> int:
    """Print what a program reads; return the exit code, 1 where not all of it could be written."""
    sys.stdout.write(text)
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", None)
    return 1 if fault is not None and not isinstance(fault, BrokenPipeError) else 0


def print_error(text: str, *, kind: str = "error") -> None:
    """Print a message on stderr."""
    print(f"{kind}: {visible(without_secrets(text))}", file=sys.stderr, flush=True)  # noqa: T201
