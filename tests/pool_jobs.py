"""Jobs without torch, for tests of the pool and of its nodes."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray


def run_job(kind: str, payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield `epochs` rows, `pause` seconds apart; fail or die where `kind` says so.

    With a file `gate`, rows continue until it exists.
    """
    node, begin = ray.get_runtime_context().get_node_id(), time.time()
    died = Path(payload["died"]) if "died" in payload else None
    gate = Path(payload["gate"]) if "gate" in payload else None
    epoch, epochs = 0, payload.get("epochs", 1)
    while epoch < epochs or (gate is not None and not gate.exists()):
        epoch += 1
        time.sleep(payload.get("pause", 0.0))
        if kind == "fail" and epoch == 2:
            raise ValueError(f"{payload['name']} fails")
        if kind == "lacks" and epoch == 2:
            raise FileNotFoundError(f"{payload['name']} names no file")
        if kind == "away" and died is not None and (payload.get("always") or not died.exists()):
            died.touch()
            raise OSError(errno.EIO, "the storage is away")
        if kind == "die" and died is not None and (payload.get("always") or not died.exists()):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "trap" and died is not None and not died.exists():
            _die_when_handed_over(died)
        yield {
            "epoch": epoch,
            "pid": os.getpid(),
            "name": payload["name"],
            "kind": kind,
            "node": node,
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "time": (begin, time.time()),
            "val_accuracy": payload.get("accuracy", 0.5),
        }


def _die_when_handed_over(died: Path) -> None:
    from selfkd.execution.pool import Worker

    def die(worker: Worker, config: Mapping[str, Any]) -> bool:
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
        return False

    classes: list[type] = [Worker]
    while classes:  # Ray's own subclass of the worker has the method too
        one = classes.pop()
        one.reset_config = die  # type: ignore[attr-defined]
        classes.extend(one.__subclasses__())
