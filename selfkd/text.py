"""Texts from elsewhere (names, errors, paths) as a terminal may show them."""

from __future__ import annotations

import os
import re
import shlex

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and newline, C1: what moves, colours, rings
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # what changes the order or ends a line
    "\ud800-\udfff]"  # bytes of a file name that is no UTF-8
)


def visible(text: str) -> str:
    r"""Return a text with control characters and bidirectional marks as escapes.

    Newlines and tabs stay. What is no UTF-8 in a file name is an escape as well.

    >>> print(visible("a\x1b[2Jb\u202ec\udcff\nd"))
    a\x1b[2Jb\u202ec\udcff
    d
    """
    return _CONTROL.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    r"""Return a text as one line: newlines and tabs are escapes, too.

    >>> print(one_line("a\nerror: b"))
    a\nerror: b
    """
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def shell_quote(text: str) -> str:
    r"""Return a text as one word of a shell's command line, in characters that can be shown.

    >>> shell_quote("runs/a b")
    "'runs/a b'"
    >>> print(shell_quote("a\udcff"))
    $'a\xff'
    """
    if one_line(text) == text:
        return shlex.quote(text)
    kept = (chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in _bytes(text))
    return f"$'{''.join(kept)}'"


def _bytes(text: str) -> bytes:
    return os.fsencode(text.replace("\\", "\\\\").replace("'", "\\'"))
