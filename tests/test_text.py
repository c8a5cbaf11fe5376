"""Texts from elsewhere as a terminal may show them."""

from __future__ import annotations

import subprocess

import pytest

from selfkd.text import one_line, shell_quote, visible

HOSTILE = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F]
HOSTILE += [*range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDCFF]


@pytest.mark.parametrize("code", HOSTILE, ids=hex)
def test_no_control_character_or_bidirectional_mark_is_left(code: int) -> None:
    text = f"a{chr(code)}b"
    shown = visible(text)
    assert shown == text if chr(code) in "\n\t" else shown.isprintable()
    assert one_line(text).isprintable()
    assert one_line(text).startswith("a\\")


@pytest.mark.parametrize("text", ["plain", "a b", "naïve – ±1 ×", "日本語", "C:\\n", "+x"])
def test_other_texts_stay(text: str) -> None:
    assert one_line(text) == visible(text) == text


@pytest.mark.parametrize(
    "name", [b"a b", b"a\xffb", b"\x1b[2J", b"it's\n", b"\\x41\xff", b"\xc3\xa9\xff'$HOME`ls`"]
)
def test_a_shell_reads_a_quoted_name_as_it_is(name: bytes) -> None:
    word = shell_quote(name.decode(errors="surrogateescape"))
    assert word.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert done.stdout == name
