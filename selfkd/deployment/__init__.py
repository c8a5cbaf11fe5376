"""Trained networks as files that are served: exported, pruned, in low precision, timed."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from selfkd.errors import ConfigError

_MODULES = {
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "torch_pruning": "torch-pruning",
}


def check_installed() -> None:
    """Check that the packages of the extra `deploy` are installed; none is imported.

    Raises:
        ConfigError: One is missing; names all that are, and the line that installs them.
    """
    missing = [name for module, name in _MODULES.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"selfkd.deploy needs {', '.join(missing)}, not installed here: "
            "pip install 'selfkd[deploy]'"
        )


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a deployment is made with, where installed."""
    found = {}
    for name in ("torch", *_MODULES.values()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the name of this machine's processor, as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
