"""Offline W&B runs, read back with W&B's own command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def records(folder: Path, run_id: str) -> list[dict[str, Any]]:
    """Return the records of the only offline run of that id in a run folder."""
    (run,) = (folder / "wandb").glob(f"offline-run-*-{run_id}")
    wandb = Path(sys.executable).with_name("wandb")
    output = subprocess.run(
        [str(wandb), "leet", "inspect", "--json", str(run)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [json.loads(line) for line in output.splitlines()]


def history(folder: Path, run_id: str) -> list[dict[str, Any]]:
    """Return what a run logged, step by step."""
    return [r["history"]["item"] for r in records(folder, run_id) if r["type"] == "history"]
