"""All text files are UTF-8, whatever the locale: each call that opens one says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("selfkd", "examples", "scripts", "tests/benchmarks")
TEXT = ("read_text", "write_text")


def unspecified(file: Path) -> Iterator[str]:
    """Yield the calls of a file whose text would be in the encoding of the locale."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg for keyword in node.keywords}
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        own = isinstance(node.func, ast.Name)  # a function of that name, which knows the encoding
        text = any(
            keyword.arg in ("text", "universal_newlines") and ast.unparse(keyword.value) == "True"
            for keyword in node.keywords
        )
        if (text or (name in TEXT and not own)) and "encoding" not in named:
            yield f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_no_text_is_in_the_encoding_of_the_locale() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 150
    assert [call for file in files for call in unspecified(file)] == []
