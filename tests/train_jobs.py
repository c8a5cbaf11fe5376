"""Jobs that train a tiny student, for tests with several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfkd.config import load_config, to_tree
from selfkd.worker.jobs import run_job

PLAIN = (
    "model={name: selfkd_mlp, args: {width: 12, depth: 1}}",
    "data.train_size=41",  # batches of 20, 20 and 1: of the last, two of three ranks have no share
    "train={epochs: 2, batch_size: 20, lr: 0.05, label_smoothing: 0.1}",
)


def payload(folder: Path, *settings: str, **more: Any) -> dict[str, Any]:
    often = "checkpoint={seconds: null, epochs: 1}"
    config = to_tree(load_config(settings=[often, *settings]))
    return {
        "config": config,
        "stage": "generation-0",
        "seed": 7,
        "model": config["model"],
        "teachers": [],
        "targets": str(folder / "targets"),
        "student": str(folder / "student.safetensors"),
        **more,
    }


def born_again(root: Path) -> dict[str, Any]:
    """Train a teacher and cache its logits; return what a payload of its student needs."""
    rows = list(run_job("train", payload(root / "teacher", *PLAIN)))
    teacher = str(root / "teacher" / "student.safetensors")
    place = {"targets": str(root / "targets"), "view": 0, "shard": 0, "run": str(root)}
    config = payload(root, *PLAIN)["config"]
    list(run_job("cache_teacher_logits", {"config": config, "checkpoint": teacher, **place}))
    teachers = [{"hash": rows[-1]["hash"], "checkpoint": teacher}]
    return {"stage": "generation-1", "teachers": teachers, "targets": place["targets"]}
