"""W&B: real offline runs, read back with W&B's own command; and what happens without a network."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import wandb
from wandb_files import history, records

from selfkd.config import Config, load_config
from selfkd.errors import ConfigError
from selfkd.tracking import NoTracker, WandbTracker, make_tracker
from selfkd.tracking import tracker as tracking

TRIAL = {
    "stage": "generation-1",
    "trial": 2,
    "seed": 7,
    "point": {"distill.alpha": 0.25},
    "teachers": ["abc"],
}
EPOCHS = [
    {"epoch": e, "loss": 1.0 / e, "val_accuracy": e / 10, "val_nll": 1.0, "seconds": e * 0.5}
    for e in (1, 2, 3)
]
RESULT = {
    "generation": 0,
    "trial": 1,
    "val_accuracy": 0.9,
    "test_accuracy": 0.8,
    "temperature": None,
    "point": {},
    "history": EPOCHS,
    "models": [{"hash": "abc"}],
    "predictions": "x",
    "hash": "abc",
    "teachers": [],
}


RANKED = {"status": "completed", "error": None, "train_seconds": 1.5}


def finished(**changes: Any) -> dict[str, Any]:
    return {
        **TRIAL,
        "status": "completed",
        "error": None,
        "val_accuracy": 0.3,
        "train_seconds": 1.5,
        **changes,
    }


def offline(folder: Path, *settings: str) -> WandbTracker:
    config = load_config(settings=["tracking=offline", *settings])
    tracker = make_tracker(config, name="run-a", run_id="run-a-0", folder=folder)
    assert isinstance(tracker, WandbTracker)
    return tracker


def test_a_trial_is_a_run_with_its_config_epochs_and_summary(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker.trial_reported(TRIAL, EPOCHS[:2])
    tracker.trial_reported(TRIAL, EPOCHS[2:])
    tracker.trial_finished(finished())
    tracker.close()
    found = records(tmp_path, "run-a-0-g1-t2")
    run = next(r["run"] for r in found if r["type"] == "run")
    assert (run["run_group"], run["job_type"], run["run_id"]) == (
        "run-a",
        "generation-1",
        "run-a-0-g1-t2",
    )
    config = run["config"]["update"]
    assert config["distill"]["alpha"] == 0.25
    assert (config["generation"], config["teachers"], config["trial_seed"]) == (1, ["abc"], 7)
    assert config["seed"] == 0
    rows = history(tmp_path, "run-a-0-g1-t2")
    assert [(row["epoch"], row["val_accuracy"]) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    axes = {r["metric"].get("step_metric") for r in found if r["type"] == "metric"}
    assert "epoch" in axes
    summary: dict[str, Any] = {}
    for record in found:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    assert (summary["status"], summary["train_seconds"]) == ("completed", 1.5)


def test_the_lineage_is_a_run_with_a_step_a_generation(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    for generation in range(3):
        tracker.generation_finished({**RESULT, "generation": generation})
    tracker.close()
    rows = history(tmp_path, "run-a-0-lineage")
    assert [row["generation"] for row in rows] == [0, 1, 2]
    assert all(row["val_accuracy"] == 0.9 and row["test_accuracy"] == 0.8 for row in rows)
    assert not {"history", "models", "hash", "temperature"} & set(rows[0])
    metrics = [r["metric"] for r in records(tmp_path, "run-a-0-lineage") if r["type"] == "metric"]
    assert any(m.get("step_metric") == "generation" for m in metrics)


def test_a_failed_trial_is_marked_as_failed(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker.trial_reported(TRIAL, EPOCHS[:1])
    tracker.trial_finished(finished(status="failed", error="loss must be finite"))
    tracker.close()
    exits = [r["exit"] for r in records(tmp_path, "run-a-0-g1-t2") if r["type"] == "exit"]
    assert exits[-1]["exit_code"] == 1


def test_a_resumed_run_does_not_double(tmp_path: Path) -> None:
    for epochs in (EPOCHS[:2], EPOCHS):  # interrupted after two epochs, then from the start
        tracker = offline(tmp_path)
        tracker.generation_finished(RESULT)
        tracker.trial_reported(TRIAL, epochs)
        tracker.close()
    assert [row["epoch"] for row in history(tmp_path, "run-a-0-g1-t2")] == [1, 2, 3]
    assert [row["generation"] for row in history(tmp_path, "run-a-0-lineage")] == [0]


def test_several_trials_are_open_at_once(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    others = [{**TRIAL, "trial": number} for number in range(3)]
    for epoch in EPOCHS:
        for trial in others:
            tracker.trial_reported(trial, [{**epoch, "val_accuracy": trial["trial"] / 10}])
    tracker.close()
    for number in range(3):
        rows = history(tmp_path, f"run-a-0-g1-t{number}")
        assert [row["val_accuracy"] for row in rows] == [number / 10] * 3


def test_none_writes_nothing(tmp_path: Path) -> None:
    tracker = make_tracker(
        load_config(settings=["tracking=none"]), name="a", run_id="a", folder=tmp_path
    )
    assert type(tracker) is NoTracker
    tracker.trial_reported(TRIAL, EPOCHS)
    tracker.trial_finished(finished())
    tracker.generation_finished(RESULT)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_auto_without_a_key_is_offline_and_says_how_to_sync(tmp_path: Path) -> None:
    tracker = make_tracker(Config(), name="a", run_id="a", folder=tmp_path)
    tracker.close()
    assert "offline" in tracker.description
    assert f"wandb sync {tmp_path}" in tracker.description


def test_auto_with_a_key_but_no_host_is_offline_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:  # a port on which nothing listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        start = time.monotonic()
        tracker = make_tracker(Config(), name="a", run_id="a", folder=tmp_path)
        tracker.close()
    assert time.monotonic() - start < 5
    assert "offline" in tracker.description


def test_an_online_run_whose_host_does_not_answer_is_written_to_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A host that accepts and never answers: bounded waiting, nothing lost."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.socket() as mute, caplog.at_level(logging.WARNING):
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        config = load_config(settings=["tracking=online"])
        tracker = make_tracker(config, name="run-a", run_id="run-a-0", folder=tmp_path)
        tracker.trial_reported(TRIAL, EPOCHS)  # returns, though nothing has answered
        tracker.trial_finished(finished(status="stopped"))
        tracker.close()
    assert "does not answer" in caplog.text
    assert f"wandb sync --include-online {tmp_path / 'wandb'}" in tracker.description
    assert [row["epoch"] for row in history(tmp_path, "run-a-0-g1-t2")] == [1, 2, 3]


def test_auto_takes_a_host_that_says_nothing_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        tracker = make_tracker(Config(), name="a", run_id="a", folder=tmp_path)
        tracker.close()
    assert tracker.description.startswith("W&B: offline")


def test_the_chosen_trial_has_the_model_and_those_it_teaches_use_it(tmp_path: Path) -> None:
    """Offline as well: what `wandb sync` sends makes the graph of teachers and students."""
    checkpoint = "generation_000/student.safetensors"
    (tmp_path / "generation_000").mkdir()
    (tmp_path / checkpoint).write_bytes(b"weights")
    first = {**TRIAL, "stage": "generation-0", "trial": 1, "teachers": [], "point": {}}
    result = {**RESULT, "models": [{"hash": "abc", "checkpoint": checkpoint}]}
    tracker = offline(tmp_path)
    for number, accuracy in ((0, 0.1), (1, 0.3), (2, 0.2)):
        trial = {**first, "trial": number}
        tracker.trial_reported(trial, EPOCHS)
        tracker.trial_finished({**trial, **RANKED, "val_accuracy": accuracy})
    tracker.generation_finished(result)
    tracker.trial_reported(TRIAL, EPOCHS)
    tracker.close()

    def artifacts(run_id: str) -> list[dict[str, Any]]:
        return [r["artifact"] for r in records(tmp_path, run_id) if r["type"] == "artifact"]

    (made,) = artifacts("run-a-0-g0-t1")
    (used,) = artifacts("run-a-0-g1-t2")
    assert not [*artifacts("run-a-0-g0-t0"), *artifacts("run-a-0-lineage")]
    assert made["aliases"] == ["latest", "generation-0"]
    assert (made["name"], made["type"]) == ("run-a-student", "model")
    assert used["use_after_commit"]
    assert used["user_created"]
    assert used["digest"] == made["digest"]


def test_a_summary_has_the_gain_and_the_verdict(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker.generation_finished(RESULT)
    tracker.generation_finished({**RESULT, "generation": 1, "test_accuracy": 0.7})
    gain = {"value": 0.02, "low": None, "high": None}
    confirmation = {"generation": 1, "first": gain, "previous": None, "verdict": "one pair"}
    tracker.generation_confirmed(confirmation)
    tracker.close()
    summary: dict[str, Any] = {}
    for record in records(tmp_path, "run-a-0-lineage"):
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    assert (summary["gain"], summary["verdict"]) == (0.02, "one pair")
    assert "gain_low" not in summary
    assert (summary["last_test_accuracy"], summary["best_test_accuracy"]) == (0.7, 0.8)


COMPRESSED = {
    "rows": [
        {"name": "student, labels only", "test_accuracy": 0.93, "runs": [0.92, 0.94]},
        {"name": "student, from its teacher", "test_accuracy": 0.95, "runs": [0.95, 0.95]},
    ],
    "seeds": 2,
    "gain": {"value": 0.02, "low": 0.01, "high": 0.03},
    "share": None,
    "chosen": {},
}


def test_the_run_of_an_ensemble_has_its_report_notes_and_verdict(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>whole</p>")
    tracker = offline(tmp_path, "tracking.alerts=true")
    tracker.compressed(COMPRESSED)
    tracker.close()
    assert [row["row"] for row in history(tmp_path, "run-a-0-ensemble")] == [0, 1]
    found = records(tmp_path, "run-a-0-ensemble")
    summary: dict[str, Any] = {}
    for record in found:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    assert summary["report"]["_type"] == "html-file"
    assert summary["verdict"].startswith("the student is better than labels only: +2.00 %")
    notes = [r["run"].get("notes") for r in found if r["type"] == "run"]
    assert notes[-1] == summary["verdict"]
    (alert,) = (r["alert"] for r in found if r["type"] == "alert")
    assert (alert["title"], alert["text"]) == ("selfkd: run-a has ended", summary["verdict"])
    assert [r["exit"].get("exit_code", 0) for r in found if r["type"] == "exit"] == [0]


def test_there_is_no_alert_unless_asked_for(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker.generation_finished(RESULT)
    tracker.close()
    assert not [r for r in records(tmp_path, "run-a-0-lineage") if r["type"] == "alert"]


@pytest.mark.parametrize("upload", [False, True])
def test_soft_targets_are_a_reference_unless_they_are_to_be_sent(
    tmp_path: Path, upload: bool
) -> None:
    manifest = tmp_path / "targets" / "abc" / "d" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"teacher": "abc", "data": "d"}')
    tracker = offline(tmp_path, f"tracking.upload_targets={str(upload).lower()}")
    tracker.generation_finished(RESULT)
    tracker.trial_reported(TRIAL, EPOCHS)
    tracker.close()
    (targets,) = (
        record["artifact"]
        for record in records(tmp_path, "run-a-0-lineage")
        if record["type"] == "artifact"
    )
    assert targets["type"] == "dataset"
    (entry,) = targets["manifest"]["contents"]
    assert ("local_path" in entry, "ref" in entry) == (upload, not upload)


def test_a_broken_tracker_stops_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = offline(tmp_path)
    with caplog.at_level(logging.WARNING):
        tracker.trial_reported({"stage": "members"}, EPOCHS)  # not a trial
        tracker.trial_reported(TRIAL, EPOCHS)
        tracker.close()
    assert caplog.text.count("training goes on") == 1


def test_no_key_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "5e" * 20
    monkeypatch.setenv("WANDB_API_KEY", secret)
    tracker = offline(tmp_path)
    tracker.trial_reported(TRIAL, EPOCHS)
    tracker.generation_finished(RESULT)
    tracker.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_online_without_a_key_is_refused_and_asks_nothing(tmp_path: Path) -> None:
    config = load_config(settings=["tracking=online"])
    with pytest.raises(ConfigError, match=r"must be offline where there is no key.*WANDB_API_KEY"):
        make_tracker(config, name="a", run_id="a", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (urlsplit(str(wandb.Settings().base_url)).netloc, True),
        ("api.wandb.ai", True),
        ("example.com", False),
    ],
)
def test_the_key_of_wandb_login_is_found(
    machine: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the host that the installed client talks to, or the one it talked to before."""
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {machine}\n  login user\n  password {'0' * 40}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setattr(tracking, "answers", lambda url: True)
    tracker = make_tracker(Config(), name="a", run_id="a", folder=tmp_path)
    tracker.close()
    assert ("online" in tracker.description) == found
