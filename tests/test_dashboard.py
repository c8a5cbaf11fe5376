"""The saved view: its JSON against a golden file, and what is said where it cannot be saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_server import KEY

from selfkd import dashboard
from selfkd.config import load_config
from selfkd.execution.jobs import InProcess
from selfkd.experiments.arms import Run
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.tracking.rows import confirmation_row, generation_row
from selfkd.worker.jobs import run_job

GOLDEN = Path(__file__).with_name("dashboard.json")


def normalised(value: Any) -> Any:
    """Return a view without the ids that are drawn anew each time."""
    if isinstance(value, dict):
        return {k: "" if k in ("__id__", "id") else normalised(v) for k, v in value.items()}
    return [normalised(item) for item in value] if isinstance(value, list) else value


def test_the_view_is_the_golden_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Where it differs on purpose: python tests/test_dashboard.py writes it anew."""
    assert dashboard.main(["--json"]) == 0
    found = normalised(json.loads(capsys.readouterr().out))
    assert found == json.loads(GOLDEN.read_text())


def test_the_view_of_a_task_by_nll(capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main(["--json", "--metric", "nll"]) == 0
    found = capsys.readouterr().out
    for key in ("confirmed/test_nll_low", "trial_val_nll", "best_test_nll", "NLL per generation"):
        assert key in found
    assert "accuracy" not in found


def test_names_and_variables_that_wandb_does_not_take_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dashboard.main(["--json", "--project", "a/b/c"]) == 2
    assert "--project must be PROJECT or OWNER/PROJECT" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_BASE_URL", "example.com")
    assert dashboard.main([]) == 2
    assert "WANDB_BASE_URL must be" in capsys.readouterr().err


def panels() -> list[dict[str, Any]]:
    sections = json.loads(GOLDEN.read_text())["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def test_the_view_shows_what_trials_log() -> None:
    text = GOLDEN.read_text()
    for key in ("config:distill.value.temperature", "summary:trial_val_accuracy"):
        assert f'"{key}"' in text
    kinds = {panel["viewType"] for panel in panels()}
    assert {"Run History Line Plot", "Parallel Coordinates Plot", "Scatter Plot"} <= kinds


def test_the_view_shows_what_a_lineage_logs(tmp_path: Path) -> None:
    tiny = ["model={name: selfkd_mlp, args: {width: 8, depth: 1}}", "train.epochs=1", "rounds=1"]
    config = load_config(settings=[*tiny, "search.trials=1", "confirm.seeds=3"])
    folder = RunFolder.create(tmp_path / "run", config)
    jobs = InProcess(run_job)
    summary = born_again(
        Run(config=config, folder=folder, executor=jobs, events=lambda event: None)
    )
    logged = generation_row(folder.results()[1]) | confirmation_row(summary.confirmations[1])
    drawn = {
        name
        for panel in panels()
        if panel["config"].get("xAxis") == "generation"
        for name in panel["config"]["metrics"]
    }
    assert {"test_accuracy", "test_ece", "confirmed/test_accuracy"} <= drawn
    assert drawn <= set(logged)


def test_project_entity_and_name_are_those_given(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--project", "p", "--entity", "e", "--name", "n"]
    assert dashboard.main(arguments) == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["project"], view["entity"], view["displayName"]) == ("p", "e", "n")


def test_without_a_key_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main([]) == 2
    assert "there is no W&B key: run wandb login" in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert dashboard.main(["--json"]) == 2
    assert "pip install 'selfkd[workspace]'" in capsys.readouterr().err


def test_without_a_network_it_ends_in_one_message(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": KEY,
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "selfkd.dashboard", "--entity", "e"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert KEY not in done.stdout + done.stderr


if __name__ == "__main__":
    view = json.loads(dashboard.to_json(dashboard.make_workspace("", "selfkd")))
    GOLDEN.write_text(json.dumps(normalised(view), indent=1) + "\n")
