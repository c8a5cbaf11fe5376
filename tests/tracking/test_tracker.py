"""W&B: real offline runs, read back with W&B's own command; and what happens without a network."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import wandb
from wandb_files import history, records

from selfkd.config import Config, load_config
from selfkd.errors import ConfigError
from selfkd.results import (
    Chosen,
    Confirmation,
    EnsembleSummary,
    Epoch,
    GenerationConfirmed,
    GenerationFinished,
    GenerationResult,
    GenerationsSummary,
    Interval,
    Model,
    RunFinished,
    TableRow,
    TeacherRow,
    Trial,
    TrialFinished,
    TrialProgressed,
    TrialResult,
    Verdict,
)
from selfkd.tracking import NoTracker, WandbTracker, make, make_tracker
from selfkd.tracking import tracker as tracking
from selfkd.tracking.log_file import has_end

TRIAL = Trial(
    stage="generation-1", trial=2, seed=7, point={"distill.alpha": 0.25}, teachers=("abc",)
)
EPOCHS = tuple(
    Epoch(
        epoch=e,
        seconds=e * 0.5,
        hash="abc",
        metrics={"loss": 1.0 / e, "val_accuracy": e / 10, "val_nll": 1.0},
    )
    for e in (1, 2, 3)
)
RESULT = GenerationResult(
    generation=0,
    trial=1,
    metrics={"val_accuracy": 0.9, "test_accuracy": 0.8},
    history=EPOCHS,
    models=(Model("abc", ""),),
    predictions="x",
    hash="abc",
)


def ended(trial: Trial, accuracy: float = 0.3, **changes: Any) -> TrialFinished:
    result = TrialResult(
        **vars(trial), status="completed", metrics={"val_accuracy": accuracy}, train_seconds=1.5
    )
    return TrialFinished(replace(result, **changes))


def summary_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of each key of a summary, from the records of a run."""
    summary: dict[str, Any] = {}
    for record in found:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    return summary


def offline(folder: Path, *settings: str) -> WandbTracker:
    config = load_config(settings=["tracking=offline", *settings])
    tracker = make_tracker(config, name="run-a", run_id="run-a-0", folder=folder)
    assert isinstance(tracker, WandbTracker)
    return tracker


def test_a_trial_is_a_run_with_its_config_epochs_and_summary(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker(TrialProgressed(TRIAL, EPOCHS[:2]))
    tracker(TrialProgressed(TRIAL, EPOCHS[2:]))
    tracker(ended(TRIAL))
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
    assert [row["seconds"] for row in rows] == [0.5, 1.0, 1.5]
    assert not {"hash", "checkpoint"} & set(rows[0])
    axes = {r["metric"].get("step_metric") for r in found if r["type"] == "metric"}
    assert "epoch" in axes
    summary = summary_of(found)
    assert (summary["status"], summary["train_seconds"]) == ("completed", 1.5)


def test_runs_have_the_precision_that_workers_have_decided(tmp_path: Path) -> None:
    tracker = offline(tmp_path, "train.amp=auto", "tracking.project=own")
    tracker.settle(load_config(settings=["tracking=offline", "train.amp=bfloat16"]))
    tracker(ended(TRIAL))
    tracker.close()
    run = next(r["run"] for r in records(tmp_path, "run-a-0-g1-t2") if r["type"] == "run")
    config = run["config"]["update"]
    assert (config["train"]["amp"], config["tracking"]["project"]) == ("bfloat16", "own")


def test_the_lineage_is_a_run_with_a_step_a_generation(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    for generation in range(3):
        tracker(GenerationFinished(replace(RESULT, generation=generation)))
    tracker.close()
    rows = history(tmp_path, "run-a-0-lineage")
    assert [row["generation"] for row in rows] == [0, 1, 2]
    assert all(row["val_accuracy"] == 0.9 and row["test_accuracy"] == 0.8 for row in rows)
    assert not {"history", "models", "hash", "temperature"} & set(rows[0])
    metrics = [r["metric"] for r in records(tmp_path, "run-a-0-lineage") if r["type"] == "metric"]
    assert any(m.get("step_metric") == "generation" for m in metrics)


def test_a_failed_trial_is_marked_as_failed(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker(TrialProgressed(TRIAL, EPOCHS[:1]))
    tracker(ended(TRIAL, status="failed", error="loss must be finite"))
    tracker.close()
    exits = [r["exit"] for r in records(tmp_path, "run-a-0-g1-t2") if r["type"] == "exit"]
    assert exits[-1]["exit_code"] == 1


def test_a_resumed_run_does_not_double(tmp_path: Path) -> None:
    for epochs in (EPOCHS[:2], EPOCHS):  # interrupted after two epochs, then from the start
        tracker = offline(tmp_path)
        tracker(GenerationFinished(RESULT))
        tracker(TrialProgressed(TRIAL, epochs))
        tracker.close()
    assert [row["epoch"] for row in history(tmp_path, "run-a-0-g1-t2")] == [1, 2, 3]
    assert [row["generation"] for row in history(tmp_path, "run-a-0-lineage")] == [0]


def test_several_trials_are_open_at_once(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    others = [replace(TRIAL, trial=number) for number in range(3)]
    for epoch in EPOCHS:
        for trial in others:
            own = replace(epoch, metrics={"val_accuracy": trial.trial / 10})
            tracker(TrialProgressed(trial, (own,)))
    tracker.close()
    for number in range(3):
        rows = history(tmp_path, f"run-a-0-g1-t{number}")
        assert [row["val_accuracy"] for row in rows] == [number / 10] * 3


def test_none_writes_nothing(tmp_path: Path) -> None:
    tracker = make_tracker(
        load_config(settings=["tracking=none"]), name="a", run_id="a", folder=tmp_path
    )
    assert type(tracker) is NoTracker
    tracker(TrialProgressed(TRIAL, EPOCHS))
    tracker(ended(TRIAL))
    tracker(GenerationFinished(RESULT))
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_offline_says_how_to_sync(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker(ended(TRIAL))
    tracker.close()
    assert "offline" in tracker.description
    assert f"wandb sync {tmp_path}" in tracker.description


def test_where_nothing_was_logged_there_is_nothing_to_sync(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker.close()
    assert tracker.description == "W&B: offline, nothing was logged"


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
        tracker(TrialProgressed(TRIAL, EPOCHS))  # returns, though nothing has answered
        tracker(ended(TRIAL, status="stopped"))
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


def test_the_chosen_trial_has_the_model_and_its_students_use_it(tmp_path: Path) -> None:
    """Offline as well: what `wandb sync` sends makes the graph of teachers and students."""
    checkpoint = "generation_000/student.safetensors"
    (tmp_path / "generation_000").mkdir()
    (tmp_path / checkpoint).write_bytes(b"weights")
    result = replace(RESULT, models=(Model("abc", checkpoint),))
    tracker = offline(tmp_path)
    for number, accuracy in ((0, 0.1), (1, 0.3), (2, 0.2)):
        trial = Trial(stage="generation-0", trial=number, seed=7)
        tracker(TrialProgressed(trial, EPOCHS))
        tracker(ended(trial, accuracy))
    tracker(GenerationFinished(result))
    tracker(TrialProgressed(TRIAL, EPOCHS))
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
    tracker(GenerationFinished(RESULT))
    worse = {"val_accuracy": 0.9, "test_accuracy": 0.7}
    tracker(GenerationFinished(replace(RESULT, generation=1, metrics=worse)))
    first, second = (confirmed(generation) for generation in (0, 1))
    tracker(GenerationConfirmed(first))
    tracker(GenerationConfirmed(second))
    verdict = Verdict(name="b", to="a", sentences=("one pair", "and so on"))
    results = (RESULT, replace(RESULT, generation=1, metrics=worse))
    tracker(
        RunFinished(
            GenerationsSummary(
                generations=results, best=1, confirmations=(first, second), verdict=verdict
            )
        )
    )
    tracker.close()
    found = records(tmp_path, "run-a-0-lineage")
    summary = summary_of(found)
    assert (summary["gain"], summary["verdict"]) == (0.02, "one pair")
    assert (summary["confirmed"], summary["confirmed_generation"]) == (0.72, 1)
    assert "gain_low" not in summary
    assert summary["best_generation"] == 1
    assert (summary["last_test_accuracy"], summary["best_test_accuracy"]) == (0.7, 0.7)
    notes = [r["run"].get("notes") for r in found if r["type"] == "run"]
    assert notes[-1] == "one pair\nand so on"


def confirmed(generation: int) -> Confirmation:
    mean = 0.7 + 0.02 * generation
    return Confirmation(
        generation=generation,
        seeds=(1, 2),
        metric="test_accuracy",
        values=(mean, mean),
        mean=Interval(mean, mean - 0.01, mean + 0.01),
        first=Interval(0.02) if generation else None,
    )


def test_what_is_confirmed_is_a_curve_over_the_generations(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    for generation in range(3):
        tracker(GenerationFinished(replace(RESULT, generation=generation)))
    for generation in range(3):
        tracker(GenerationConfirmed(confirmed(generation)))
    tracker.close()
    rows = history(tmp_path, "run-a-0-lineage")
    name = "confirmed/test_accuracy"
    curve = {row["generation"]: row for row in rows if name in row}
    assert [curve[g][name] for g in range(3)] == pytest.approx([0.7, 0.72, 0.74])
    for end, shift in (("low", -0.01), ("high", 0.01)):
        ends = [curve[g][f"{name}_{end}"] for g in range(3)]
        assert ends == pytest.approx([0.7 + shift, 0.72 + shift, 0.74 + shift])
    assert [curve[g].get("confirmed/gain") for g in range(3)] == [None, 0.02, 0.02]
    assert [row["generation"] for row in rows if "test_accuracy" in row] == [0, 1, 2]


def test_a_run_without_a_verdict_has_none(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker(GenerationFinished(RESULT))
    tracker(RunFinished(GenerationsSummary(generations=(RESULT,), best=0)))
    tracker.close()
    summary = summary_of(records(tmp_path, "run-a-0-lineage"))
    assert not {"verdict", "gain", "confirmed"} & set(summary)


def test_summaries_are_the_best_values_of_validation_and_the_last_of_others(
    tmp_path: Path,
) -> None:
    tracker = offline(tmp_path, "search={metric: val_nll, mode: min}")
    worse = [
        replace(epoch, metrics={"loss": loss, "val_accuracy": value, "val_nll": nll, "lr": loss})
        for epoch, loss, value, nll in zip(
            EPOCHS, (0.3, 0.1, 0.2), (0.2, 0.9, 0.5), (0.9, 0.4, 0.7), strict=True
        )
    ]
    tracker(TrialProgressed(TRIAL, tuple(worse)))
    tracker(ended(TRIAL, 0.5))
    for generation, accuracy in enumerate((0.7, 0.9, 0.8)):
        metrics = {"val_accuracy": accuracy, "test_accuracy": accuracy, "val_nll": 1.0}
        tracker(GenerationFinished(replace(RESULT, generation=generation, metrics=metrics)))
    tracker.close()
    trial = summary_of(records(tmp_path, "run-a-0-g1-t2"))
    assert trial["val_accuracy"] == {"max": 0.9}
    assert (trial["val_nll"], trial["loss"], trial["lr"]) == ({"min": 0.4}, {"min": 0.1}, 0.2)
    assert trial["trial_val_accuracy"] == 0.5
    lineage = summary_of(records(tmp_path, "run-a-0-lineage"))
    assert (lineage["val_accuracy"], lineage["test_accuracy"]) == ({"max": 0.9}, 0.8)


def test_a_trial_on_labels_alone_has_no_temperature_and_alpha(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker(TrialProgressed(replace(TRIAL, teachers=(), point={"train.lr": 0.5}), EPOCHS))
    virtual = replace(TRIAL, trial=3, teachers=())  # of a virtual teacher: it sets alpha
    tracker(TrialProgressed(virtual, EPOCHS))
    tracker.close()

    def distill(run_id: str) -> dict[str, Any]:
        found = records(tmp_path, run_id)
        config = next(r["run"] for r in found if r["type"] == "run")["config"]["update"]
        return dict(config["distill"])

    assert not {"temperature", "alpha"} & set(distill("run-a-0-g1-t2"))
    assert distill("run-a-0-g1-t3")["alpha"] == 0.25


def test_names_are_short(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker(TrialProgressed(TRIAL, EPOCHS))
    tracker(GenerationFinished(RESULT))
    tracker.close()
    names = {
        run_id: next(
            r["run"]["display_name"] for r in records(tmp_path, run_id) if r["type"] == "run"
        )
        for run_id in ("run-a-0-g1-t2", "run-a-0-lineage")
    }
    assert list(names.values()) == ["g1-t2", "run-a"]


def test_the_lineage_can_be_logged_alone_and_has_what_trials_would(tmp_path: Path) -> None:
    checkpoint = "generation_000/student.safetensors"
    (tmp_path / "generation_000").mkdir()
    (tmp_path / checkpoint).write_bytes(b"weights")
    manifest = tmp_path / "targets" / "abc" / "d" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"teacher": "abc", "data": "d"}')
    tracker = offline(tmp_path, "tracking.runs=lineage")
    tracker(TrialProgressed(Trial(stage="generation-0", trial=1, seed=7), EPOCHS))
    tracker(ended(Trial(stage="generation-0", trial=1, seed=7)))
    tracker(GenerationFinished(replace(RESULT, models=(Model("abc", checkpoint),))))
    for epoch in EPOCHS:
        tracker(TrialProgressed(TRIAL, (epoch,)))
    tracker(ended(TRIAL))
    tracker.close()
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert [name.split("-", 3)[-1] for name in runs] == ["run-a-0-lineage"]
    found = records(tmp_path, "run-a-0-lineage")
    artifacts = [r["artifact"] for r in found if r["type"] == "artifact"]
    assert sorted(a["type"] for a in artifacts) == ["dataset", "model"]
    again = offline(tmp_path, "tracking.runs=lineage")  # a resumed run replays no trial
    again(GenerationFinished(replace(RESULT, models=(Model("abc", checkpoint),))))
    again.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


ENSEMBLE = EnsembleSummary(
    verdict=Verdict(name="student", to="labels", sentences=("no evidence of a gain",)),
    rows=(
        TableRow(name="student, labels only", metrics={"test_accuracy": 0.93}, runs=(0.92, 0.94)),
        TableRow(
            name="student, from its teacher", metrics={"test_accuracy": 0.95}, runs=(0.95, 0.95)
        ),
    ),
    teacher=TeacherRow(source="members", members=2),
    chosen=Chosen(temperature=4.0, alpha=0.5, average="logits", hash="abc"),
    trials=2,
    seeds=2,
    gain=Interval(0.02, 0.01, 0.03),
)


def test_an_ensemble_without_a_baseline_says_so_in_place_of_a_gain(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker(RunFinished(replace(ENSEMBLE, rows=ENSEMBLE.rows[1:], gain=None, verdict=None)))
    tracker.close()
    summary = summary_of(records(tmp_path, "run-a-0-ensemble"))
    assert summary["verdict"].startswith("not compared with labels only")
    assert "gain" not in summary


def test_the_run_of_an_ensemble_has_its_report_notes_and_verdict(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>whole</p>")
    tracker = offline(tmp_path, "tracking.alerts=true")
    (tmp_path / "student.safetensors").write_bytes(b"weights")
    tracker(RunFinished(ENSEMBLE))
    tracker.close()
    rows = history(tmp_path, "run-a-0-ensemble")
    assert [(row["row"], row["test_accuracy"]) for row in rows] == [(0, 0.93), (1, 0.95)]
    assert not {"runs", "low", "metrics"} & set(rows[0])
    found = records(tmp_path, "run-a-0-ensemble")
    (model,) = (record["artifact"] for record in found if record["type"] == "artifact")
    assert (model["name"], model["type"]) == ("run-a-student", "model")
    assert '"temperature":4' in model["metadata"].replace(" ", "")
    summary = summary_of(found)
    assert summary["report"]["_type"] == "html-file"
    assert summary["verdict"] == "no evidence of a gain"
    notes = [r["run"].get("notes") for r in found if r["type"] == "run"]
    assert notes[-1] == summary["verdict"]
    (alert,) = (r["alert"] for r in found if r["type"] == "alert")
    assert (alert["title"], alert["text"]) == ("selfkd: run-a has ended", summary["verdict"])
    assert [r["exit"].get("exit_code", 0) for r in found if r["type"] == "exit"] == [0]


def test_there_is_no_alert_unless_asked_for(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    tracker(GenerationFinished(RESULT))
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
    tracker(GenerationFinished(RESULT))
    tracker(TrialProgressed(TRIAL, EPOCHS))
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
        tracker(TrialProgressed(RESULT, EPOCHS))  # type: ignore[arg-type]  # not a trial
        tracker(TrialProgressed(TRIAL, EPOCHS))
        tracker.close()
    assert caplog.text.count("training goes on") == 1


def kill_service() -> None:
    """Kill W&B's process, as the OOM killer does."""
    process = wandb.setup().assert_service()._proc._process  # type: ignore[union-attr]
    process.kill()
    process.wait()


@pytest.mark.parametrize("moment", ["in a trial", "between trials", "at the end"])
def test_a_killed_process_of_wandb_is_started_again_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    tracker = offline(tmp_path)
    tracker(TrialProgressed(TRIAL, EPOCHS[:2]))
    _written(tracker)
    if moment == "in a trial":
        kill_service()
    tracker(TrialProgressed(TRIAL, EPOCHS[2:]))
    tracker(ended(TRIAL))
    if moment == "between trials":
        _written(tracker)
        kill_service()
    other = replace(TRIAL, trial=3)
    tracker(TrialProgressed(other, EPOCHS))
    _written(tracker)
    if moment == "at the end":
        kill_service()
    tracker.close()
    assert tracker.description.endswith(f"send it with: wandb sync {tmp_path / 'wandb'}")
    assert "is started again" in caplog.text
    for trial in (2, 3):
        rows = history(tmp_path, f"run-a-0-g1-t{trial}")
        assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_one_that_is_killed_again_and_again_is_left_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfkd.tracking import session

    monkeypatch.setattr(session, "MOST_RESTARTS", 0)
    tracker = offline(tmp_path)
    for trial in range(2):
        tracker(TrialProgressed(replace(TRIAL, stage="members", trial=trial), EPOCHS))
        tracker(ended(replace(TRIAL, stage="members", trial=trial)))
    tracker(TrialProgressed(TRIAL, EPOCHS))
    _written(tracker)
    kill_service()
    tracker(ended(TRIAL))
    tracker.close()
    ledger = tmp_path / "wandb" / "done.txt"
    told = (
        f"W&B: not all could be logged; 2 runs whole, listed in {ledger}; nothing is logged since "
    )
    assert tracker.description.startswith(told)
    assert tracker.incomplete
    assert "sync" not in tracker.description
    assert len(ledger.read_text().split()) == 2
    session._forget_ended()  # what its own end does, so that W&B's does not fail
    wandb.setup()


def test_a_process_of_wandb_that_does_not_start_holds_up_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own `setup` would wait for itself, for ever."""
    from wandb.sdk.lib.service import service_process

    wandb.teardown()
    monkeypatch.setattr(service_process, "get_core_path", lambda: "/bin/false")
    tracker = offline(tmp_path)
    tracker(TrialProgressed(TRIAL, EPOCHS))
    tracker.close()
    monkeypatch.undo()
    wandb.teardown()
    told = "W&B: not all could be logged; 0 runs whole; nothing is logged since "
    assert tracker.description.startswith(told)
    assert "wandb-core exited with code 1" in tracker.description


def _written(tracker: WandbTracker) -> None:
    """Wait until all that was logged so far is at W&B's process."""
    done = threading.Event()
    tracker._work.put(done.set)
    assert done.wait(60)


def test_packages_are_listed_once_and_not_for_each_trial(tmp_path: Path) -> None:
    """Which takes 0.2 s: 48 s of silence after 250 small trials."""
    tracker = offline(tmp_path)
    tracker(ended(TRIAL))
    tracker(GenerationFinished(RESULT))
    tracker.close()
    lists = list((tmp_path / "wandb").glob("*-run-*/files/requirements.txt"))
    assert [path.parts[-3].partition("run-a-0-")[2] for path in lists] == ["lineage"]


def test_what_is_left_to_write_is_shown_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "SHOW_SECONDS", 0.01)
    tracker = offline(tmp_path)
    shown = threading.Event()
    monkeypatch.setattr(tracking.log, "warning", lambda *_: shown.set())
    tracker._work.put(lambda: shown.wait(60) and None)
    for trial in range(3):
        tracker(ended(replace(TRIAL, stage="members", trial=trial)))
    tracker.close()
    assert shown.is_set()
    assert len((tmp_path / "wandb" / "done.txt").read_text().split()) == 3


@pytest.mark.parametrize("failing", ["make_artifact", "make_html"])
def test_an_artifact_that_fails_ends_no_metrics_and_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    from selfkd.tracking import artifacts, run

    monkeypatch.setattr(artifacts if failing == "make_artifact" else run, failing, fail)
    (tmp_path / "report.html").write_text("<p>whole</p>")
    (tmp_path / "student.safetensors").write_bytes(b"weights")
    tracker = offline(tmp_path)
    tracker(RunFinished(ENSEMBLE))
    tracker(TrialProgressed(TRIAL, EPOCHS))
    tracker(ended(TRIAL))
    tracker.close()
    what = "2 artifacts" if failing == "make_artifact" else "1 page"
    assert tracker.incomplete
    assert "wandb sync" in tracker.description
    assert f"; {what} could not be logged (OSError: [Errno 28] No space" in tracker.description
    assert caplog.text.count("could not be logged, all else goes on") == 1
    assert [row["row"] for row in history(tmp_path, "run-a-0-ensemble")] == [0, 1]
    assert [row["epoch"] for row in history(tmp_path, "run-a-0-g1-t2")] == [1, 2, 3]
    assert summary_of(records(tmp_path, "run-a-0-ensemble"))["verdict"] == "no evidence of a gain"


def test_a_file_that_is_not_whole_is_told_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the disk is full, which W&B's process says to nobody."""
    from selfkd.tracking import session

    found = iter([False])
    monkeypatch.setattr(session.Session, "_is_written", lambda self, run: next(found, True))
    tracker = offline(tmp_path)
    for trial in range(2):
        tracker(TrialProgressed(replace(TRIAL, stage="members", trial=trial), EPOCHS))
        tracker(ended(replace(TRIAL, stage="members", trial=trial)))
    tracker.close()
    assert "run-a-0-members-t0 is not whole in its file" in caplog.text
    assert not tracker.incomplete
    for trial in range(2):
        assert len(history(tmp_path, f"run-a-0-members-t{trial}")) == 3


@pytest.mark.parametrize(("cut", "whole"), [(0, True), (1, False), (200, False), (10**9, False)])
def test_the_end_of_a_run_is_found_in_its_file(tmp_path: Path, cut: int, whole: bool) -> None:
    tracker = offline(tmp_path)
    many = [replace(EPOCHS[0], epoch=e, metrics={"x" * 500: 1.0}) for e in range(1, 100)]
    tracker(TrialProgressed(TRIAL, tuple(many)))  # of several blocks
    tracker(ended(TRIAL))
    tracker.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-run-a-0-g1-t2.wandb")
    content = file.read_bytes()
    assert len(content) > 2**16
    file.write_bytes(content[: max(len(content) - cut, 0)])
    assert has_end(file) == whole


@pytest.mark.parametrize(
    "project", ["a/b/c", "/b", "a/", "a#b", "a?", "a%20", "a:b", " ", "a" * 129]
)
def test_a_project_that_wandb_cannot_have_is_refused(tmp_path: Path, project: str) -> None:
    config = load_config(settings=["tracking=offline", f"tracking.project='{project}'"])
    with pytest.raises(ConfigError, match=r"^tracking\.project must be PROJECT or OWNER/PROJECT"):
        make_tracker(config, name="a", run_id="a-0", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_project_may_be_written_with_its_owner(tmp_path: Path) -> None:
    tracker = offline(tmp_path, "tracking.project=team/mine")
    tracker(ended(TRIAL))
    tracker.close()
    run = next(r["run"] for r in records(tmp_path, "run-a-0-g1-t2") if r["type"] == "run")
    assert (run["entity"], run["project"]) == ("team", "mine")


@pytest.mark.parametrize("before", [False, True])
def test_variables_of_a_sweep_or_another_run_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Nor where W&B has read them before, as in the function of a sweep's agent."""
    wandb.teardown()
    given = {
        **{"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "x", "WANDB_NAME": "y", "WANDB_TAGS": "z"},
        **{"WANDB_RUN_GROUP": "g", "WANDB_JOB_TYPE": "j", "WANDB_NOTES": "n"},
        **{"WANDB_PROJECT": "p", "WANDB_SWEEP_PARAM_PATH": "nowhere", "WANDB_DIR": "/nowhere"},
    }
    others = {
        **{"WANDB_RESUME": "must", "WANDB_X_SKIP_TRANSACTION_LOG": "true", "WANDB_SERVICE": "x"},
        **{"WANDB_USE_DOT_WANDB": "true", "WANDB_X_FILES_DIR": "/dev/null/x"},
        **{"WANDB_CONFIG_PATHS": "nowhere.yaml", "WANDB_MODE": "disabled"},
    }
    for name, value in (given if before else given | others).items():
        monkeypatch.setenv(name, value)
    if before:
        wandb.setup()
    tracker = offline(tmp_path)
    for trial in range(2):
        tracker(ended(replace(TRIAL, stage="members", trial=trial)))
    tracker.close()
    assert {name: os.environ[name] for name in given} == given  # a user's own function has them
    for name in given | others:
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    for trial in range(2):
        found = records(tmp_path, f"run-a-0-members-t{trial}")
        run = next(record["run"] for record in found if record["type"] == "run")
        assert (run["project"], run["display_name"]) == ("selfkd", f"members-t{trial}")
        assert (run["run_group"], run["job_type"]) == ("run-a", "members")
        assert not {"sweep_id", "notes"} & set(run)


def test_no_key_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "5e" * 20
    monkeypatch.setenv("WANDB_API_KEY", secret)
    tracker = offline(tmp_path)
    tracker(TrialProgressed(TRIAL, EPOCHS))
    tracker(GenerationFinished(RESULT))
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
    monkeypatch.setattr(make, "answers", lambda url: True)
    tracker = make_tracker(Config(), name="a", run_id="a", folder=tmp_path)
    tracker.close()
    assert ("online" in tracker.description) == found
