"""Docstrings of Python's standard library, read from its sources without running them."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
)


def read_docstrings(folder: Path | None = None) -> list[str]:
    """Return the docstrings of each module, in the order of the modules' paths.

    Args:
        folder: Folder of the sources; that of the standard library when not given.

    Raises:
        ValueError: No sources with docstrings.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    found = [_docstrings(root / name) for name in names if _LEFT_OUT.isdisjoint(name.parts)]
    texts = ["\n\n".join(own) for own in found if own]
    if not texts:
        raise ValueError(
            f"data.name docstrings must have the sources of Python's standard library, got none "
            f"in {root}: set data.name=pydoc"
        )
    return texts


def _docstrings(file: Path) -> list[str]:
    """Return the docstrings of a module, its classes and functions in their order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the sources' own literals
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # a template, or a file in another encoding
        return []
    return list(_walk([tree]))


def _walk(nodes: Sequence[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.strip():
                yield text
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            inner = getattr(node, name, None)
            if isinstance(inner, list):
                yield from _walk(inner)
