"""A run on mixed images: its cache is read again after a stop, its report and targets are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine import Count, StopAfter, make_run

from selfkd.config import load_config
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.page import write_report
from selfkd.storage.files import load_json
from selfkd.targets import main
from selfkd.worker.jobs import run_job

SETTINGS = (
    "data={train_size: 100, val_size: 60, augment: strong, views: 3}",
    "model={name: selfkd_mlp, args: {width: 12, depth: 1}}",
    "train={epochs: 3, batch_size: 20}",
    "search={trials: 2, space: {distill.alpha: {uniform: [0, 1]}}}",
    "confirm.seeds=0",
    "rounds=1",
    "tracking=none",
)


def start(path: Path) -> RunFolder:
    return RunFolder.create(path, load_config(settings=SETTINGS), command="generations")


def cached(folder: RunFolder) -> list[Path]:
    """Return the files of cached teacher logits."""
    return sorted(folder.targets(load_config(settings=SETTINGS)).rglob("shard_*.safetensors"))


def test_a_run_on_mixed_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, stopped = start(tmp_path / "whole"), start(tmp_path / "stopped")
    config = load_config(settings=SETTINGS)
    jobs = Count()
    born_again(make_run(config, whole, jobs))
    kinds = [kind for kind, _ in jobs.jobs]
    assert kinds.count("cache_teacher_logits") == 3
    assert kinds.count("train") == 4

    last_view = [n for n, kind in enumerate(kinds) if kind == "cache_teacher_logits"][-1]
    with pytest.raises(KeyboardInterrupt):
        born_again(make_run(config, stopped, StopAfter(run_job, last_view)))
    shards = {path: path.stat().st_mtime_ns for path in cached(stopped)}
    assert len(shards) == 2
    born_again(make_run(config, stopped))
    assert len(cached(stopped)) == 3
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    found, expected = stopped.results(), whole.results()
    assert [row.hash for row in found] == [row.hash for row in expected]
    assert [row.metrics for row in found] == [row.metrics for row in expected]

    (manifest,) = whole.targets(config).rglob("manifest.json")
    recipe = load_json(manifest)["recipe"]
    assert recipe["mixing"] == {"mixup": 0.8, "cutmix": 1.0, "probability": 0.5}
    assert recipe["operations"] == {"kind": "randaugment", "count": 2, "magnitude": 9}
    assert "second choice" in write_report(whole.path).read_text().lower()

    capsys.readouterr()
    assert main(["show", str(whole.path), "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert 20 < shown["items"] < 80  # those that the first view has mixed with no other
