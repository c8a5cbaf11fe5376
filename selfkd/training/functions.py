"""User training functions by reference, `path/file.py:name`."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfkd.errors import describe_error


def load_function(reference: str, *, flag: str = "--train") -> Callable[..., Any]:
    """Import a function of the user's.

    Args:
        reference: File and name of the function, `path/file.py:name`.
        flag: Flag that names it, for messages.

    Raises:
        ValueError: The file or the function does not exist, or the file cannot be imported.
    """
    file, colon, name = reference.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py" or not path.is_file():
        absent = ", a file that is not there" if colon and path.suffix == ".py" else ""
        raise ValueError(f"{flag} must be path/file.py:function, got {reference!r}{absent}")
    module_name = f"selfkd_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{flag} must be a Python file, got {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    folder = str(path.parent.absolute())
    if folder not in sys.path:
        sys.path.append(folder)  # so that the file can import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise ValueError(
            f"{flag} must name a file that can be imported, got {file}: {describe_error(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{flag} must name a function of {file}, got {name!r}")
    found: Callable[..., Any] = function
    return found


def _way_out(name: str) -> str:
    """Return what to do with a function that was defined at a prompt or in a notebook's cell."""
    if not name.isidentifier():
        return ""
    return (
        ": in a notebook, make %%writefile my_train.py the first line of its cell, and pass "
        f'"my_train.py:{name}"'
    )


def function_reference(function: Callable[..., object]) -> str:
    """Return the reference `path/file.py:name` by which workers import a function.

    Args:
        function: Function at the top level of a file.

    Raises:
        ValueError: The function has no source file, or is not at the top level of it.
    """
    file = inspect.getsourcefile(function) if inspect.isfunction(function) else None
    name = getattr(function, "__qualname__", "")
    if file is None or not Path(file).is_file() or not name.isidentifier():
        raise ValueError(
            "train_fn must be a function at the top level of a .py file, so that workers can "
            f"import it, got {name or function!r}{_way_out(name)}"
        )
    return f"{Path(file).absolute()}:{name}"
