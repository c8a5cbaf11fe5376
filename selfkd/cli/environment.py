"""Where a run was started: versions, machine, accelerators; imports no library to know it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from selfkd.reporting.read import ENVIRONMENT
from selfkd.storage.files import load_json, save_json

PACKAGES = (
    *("selfkd", "torch", "torchvision", "timm", "ray", "wandb", "numpy", "scipy"),
    *("scikit-learn", "safetensors"),
)


def describe() -> dict[str, Any]:
    """Return what a result may depend on besides its config, as plain data."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def record(folder: Path) -> None:
    """Add this start of a run to its environment.json; a damaged one is begun again."""
    path = folder / ENVIRONMENT
    try:
        starts = load_json(path) if path.exists() else []
    except ValueError:
        starts = []
    save_json(path, [*(starts if isinstance(starts, list) else []), describe()])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    """Return the names of the cards, as NVIDIA's own command gives them."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        found = subprocess.run(  # noqa: S603 - a fixed command
            [command, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]
