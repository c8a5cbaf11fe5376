"""A pseudo-terminal for commands, and what a person sees on it."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

LIMIT = 300.0  # seconds without output after which a test fails


class Screen:
    """What a terminal shows of what is written to it: text, and the few controls of rich.

    Args:
        width: Number of columns.
    """

    def __init__(self, width: int) -> None:
        self.width, self.row, self.column = width, 0, 0
        self.cells: list[list[str]] = [[]]
        self.cursor = True
        self._rest = ""

    def feed(self, text: str) -> None:
        text = self._rest + text
        self._rest = ""
        place = 0
        while place < len(text):
            found = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])").match(text, place)
            if found:
                self._control(*found.groups())
                place = found.end()
            elif text[place] == "\x1b":
                self._rest = text[place:]  # its end has not been read yet
                return
            else:
                self._put(text[place])
                place += 1

    def _control(self, number: str, letter: str) -> None:
        count = int(number) if number.isdigit() else 1
        if letter == "A":
            self.row = max(self.row - count, 0)
        elif letter == "K":
            self.cells[self.row] = [] if number == "2" else self.cells[self.row][: self.column]
        elif number == "?25":
            self.cursor = letter == "h"
        elif letter != "m":
            raise NotImplementedError(f"{number}{letter}")

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._go_down()
        elif character >= " ":
            if self.column == self.width:
                self.column = 0
                self._go_down()
            line = self.cells[self.row]
            line.extend(" " * (self.column + 1 - len(line)))
            line[self.column] = character
            self.column += 1

    def _go_down(self) -> None:
        self.row += 1
        if self.row == len(self.cells):
            self.cells.append([])

    @property
    def lines(self) -> list[str]:
        """Lines on the screen, and those that have scrolled out of it."""
        return ["".join(line).rstrip() for line in self.cells]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Terminal:
    """A command on a pseudo-terminal.

    Args:
        command: Words of the command.
        folder: Working folder.
        width: Number of columns.
    """

    def __init__(self, command: Sequence[str], folder: Path, width: int) -> None:
        self._own, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        hidden = ("COLUMNS", "LINES", "NO_COLOR", "CI")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "TERM": "xterm"},
            stdin=other,
            stdout=other,
            stderr=other,
            preexec_fn=_take_terminal,
            start_new_session=True,
        )
        os.close(other)
        self.screen = Screen(width)
        self.raw = ""
        self._decode = codecs.getincrementaldecoder("utf-8")()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._own)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def until(self, seen: Callable[[Screen], bool]) -> None:
        """Read until something is on the screen."""
        while not seen(self.screen):
            assert self._read(), self.screen.text

    def end(self) -> int:
        """Read to the end; return the exit code."""
        while self._read():
            pass
        return self.process.wait(timeout=LIMIT)

    def press(self, keys: str) -> None:
        os.write(self._own, keys.encode())

    def _read(self) -> bool:
        ready, _, _ = select.select([self._own], [], [], LIMIT)
        assert ready, self.screen.text
        try:
            found = os.read(self._own, 65536)
        except OSError:  # as Linux says that the other end is closed
            return False
        text = self._decode.decode(found)
        self.raw += text
        self.screen.feed(text)
        return bool(found)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
