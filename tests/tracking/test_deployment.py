"""W&B: what was deployed, read back from a real offline run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from deployments import deployment
from wandb_files import history, records

from selfkd.config import load_config
from selfkd.results import GenerationResult, Model, RunFinished
from selfkd.storage.rows import save_row
from selfkd.tracking import make_tracker

MODEL = "generation_000/student.safetensors"


def test_a_deployment_is_a_run_of_its_own_with_its_table_and_its_files(tmp_path: Path) -> None:
    summary = replace(deployment(), model="abc", sentences=("served as int8", "on a processor"))
    result = GenerationResult(generation=0, trial=0, models=(Model("abc", MODEL),), hash="abc")
    save_row(tmp_path / "generation_000" / "result.json", result)
    (tmp_path / MODEL).write_bytes(b"weights")
    save_row(tmp_path / "deploy" / "deploy.json", summary)
    for name in ("float.onnx", "int8.onnx"):
        (tmp_path / "deploy" / name).write_text(name)
    config = load_config(settings=["tracking=offline"])
    tracker = make_tracker(config, name="run-a", run_id="run-a-0", folder=tmp_path)
    tracker(RunFinished(summary))
    tracker.close()

    found = records(tmp_path, "run-a-0-deploy")
    run = next(r["run"] for r in found if r["type"] == "run")
    assert (run["run_group"], run["display_name"], run["job_type"]) == ("run-a", "deploy", "deploy")
    values: dict[str, object] = {}
    for record in found:
        values |= record["summary"].get("update", {}) if record["type"] == "summary" else {}
    assert (values["served"], values["drop"], values["verdict"]) == ("int8", 0.2, "served as int8")
    assert (values["int8/bytes"], values["int8/speed_128"]) == (27_000, 3.2)
    rows = [row for row in history(tmp_path, "run-a-0-deploy") if "name" in row]
    assert [row["name"] for row in rows] == ["torch", "ONNX float", "ONNX int8"]
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    table = json.loads(media.read_text())
    assert len(table["data"]) == 3
    assert "difference_low" in table["columns"]
    artifacts = [r["artifact"] for r in found if r["type"] == "artifact"]
    used, made = (artifact for artifact in artifacts if artifact["type"] == "model")
    assert (used["name"], used["user_created"]) == ("run-a-student", True)
    assert (made["name"], made["type"], made["aliases"]) == (
        "run-a-deployed",
        "model",
        ["latest", "deployed"],
    )
    assert sorted(entry["path"] for entry in made["manifest"]["contents"]) == [
        "deploy.json",
        "float.onnx",
        "int8.onnx",
    ]


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    config = load_config(settings=["tracking=none"])
    tracker = make_tracker(config, name="run-a", run_id="run-a-0", folder=tmp_path)
    tracker(RunFinished(deployment()))
    tracker.close()
    assert list(tmp_path.iterdir()) == []
