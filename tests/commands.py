"""Commands in the process of the tests: another one would import torch and Ray for them anew."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess


def run_here(main: Callable[[list[str]], int], folder: Path, *words: str) -> CompletedProcess[str]:
    """Run a command with a working folder; return its exit code and what it printed."""
    said, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(errors),
    ):
        code = main(list(words))
    return CompletedProcess(words, code, said.getvalue(), errors.getvalue())
