"""Curves of a run in files: CSV, and what TensorBoard reads."""

from __future__ import annotations

import csv
import logging
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine import Recorder, make_run

from selfkd.config import load_config
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import Epoch, Event, Trial, TrialFinished, TrialProgressed, TrialResult
from selfkd.tracking import NoTracker, WandbTracker, make_tracker
from selfkd.tracking.event_file import EventFile

TINY = (
    *("model={name: selfkd_mlp, args: {width: 8, depth: 1}}", "train.epochs=2", "rounds=1"),
    *("search.trials=2", "confirm.seeds=2", "tracking=none"),
)
TRIAL = Trial(stage="generation-1", trial=2, seed=7, point={"distill.alpha": 0.25})


def epoch(number: int, **metrics: float) -> Epoch:
    return Epoch(epoch=number, seconds=0.5, metrics=metrics or {"val_accuracy": number / 10})


def tracked(folder: Path, *writers: str, settings: tuple[str, ...] = ()) -> NoTracker:
    config = load_config(settings=[*TINY, f"tracking.writers=[{', '.join(writers)}]", *settings])
    return make_tracker(config, name="a", run_id="a-0", folder=folder)


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    with (folder / "tracking" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> Iterator[tuple[int, str, float]]:
    """Read the event files of a folder with the reader of another library, checksums included."""
    crc = pytest.importorskip("tensorboardX.crc32c").crc32c
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")

    def masked(content: bytes) -> int:
        found = crc(content)
        return ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF

    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, versions = path.read_bytes(), []
        while content:
            (length, of_length) = struct.unpack("<QI", content[:12])
            event = content[12 : 12 + length]
            (of_event,) = struct.unpack("<I", content[12 + length : 16 + length])
            assert (of_length, of_event) == (masked(content[:8]), masked(event))
            content = content[16 + length :]
            message = event_pb2.Event.FromString(event)
            versions.append(message.file_version)
            assert message.wall_time > 1.7e9
            for value in message.summary.value:
                yield message.step, value.tag, value.simple_value
        assert versions[0] == "brain.Event:2"


def test_a_run_is_written_as_tables_and_curves(tmp_path: Path) -> None:
    config = load_config(settings=[*TINY, "tracking.writers=[csv, tensorboard]"])
    folder = RunFolder.create(tmp_path / "run", config)
    events = Recorder()
    tracker = make_tracker(config, name="a", run_id="a-0", folder=folder.path)
    assert tracker.description == f"csv and tensorboard: {folder.path / 'tracking'}"

    def follow(event: Event) -> None:
        events(event)
        tracker(event)

    born_again(make_run(config, folder, events=follow))
    tracker.close()
    epochs = table(folder.path, "epochs.csv")
    trials = [(event.trial.stage, event.trial.trial) for event in events.of(TrialFinished)]
    assert [(row["stage"], int(row["trial"])) for row in epochs] == [
        trial for trial in trials for _ in range(2)
    ]
    assert [row["epoch"] for row in epochs] == ["1", "2"] * len(trials)
    assert all(0 < float(row["val_accuracy"]) <= 1 for row in epochs)
    assert {row["distill.alpha"] != "" for row in epochs if "-1" in row["stage"]} == {True}
    assert {row["distill.alpha"] for row in epochs if row["stage"] == "generation-0"} == {""}
    rows = table(folder.path, "generations.csv")
    assert [row["generation"] for row in rows] == ["0", "1"]
    for row, result in zip(rows, folder.results(), strict=True):
        assert float(row["test_accuracy"]) == result.metrics["test_accuracy"]
        assert float(row["confirmed/test_accuracy"]) > 0
    boards = folder.path / "tracking" / "tensorboard"
    names = {"g0-t0", "g0-t1", "g1-t0", "g1-t1", "generations"}
    names |= {f"confirm-{generation}-t{trial}" for generation in (0, 1) for trial in (0, 1)}
    assert {path.name for path in boards.iterdir()} == names
    curve = [(step, value) for step, tag, value in scalars(boards / "g1-t1") if tag == "loss"]
    own = [row for row in epochs if (row["stage"], row["trial"]) == ("generation-1", "1")]
    assert curve == [
        (step, pytest.approx(float(row["loss"]))) for step, row in enumerate(own, start=1)
    ]
    found = [step for step, tag, _ in scalars(boards / "generations") if tag == "test_accuracy"]
    assert found == [0, 1]

    # a finished run that is resumed: the same files, nothing doubled
    again = make_tracker(config, name="a", run_id="a-0", folder=folder.path)
    born_again(make_run(config, folder, events=again))
    again.close()

    def sort(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
        return sorted((row["stage"], row["trial"], row["epoch"], row["loss"]) for row in rows)

    assert sort(table(folder.path, "epochs.csv")) == sort(epochs)
    assert table(folder.path, "generations.csv") == rows
    assert [value for _, tag, value in scalars(boards / "g1-t1") if tag == "loss"] == [
        value for _, value in curve
    ]


def test_a_trial_that_begins_again_is_written_once(tmp_path: Path) -> None:
    tracker = tracked(tmp_path, "csv", "tensorboard")
    tracker(TrialProgressed(TRIAL, (epoch(1), epoch(2))))
    tracker(TrialProgressed(TRIAL, (epoch(1), epoch(2), epoch(3))))
    tracker(TrialFinished(TrialResult(**vars(TRIAL), status="completed", history=(epoch(3),))))
    tracker.close()
    assert [row["epoch"] for row in table(tmp_path, "epochs.csv")] == ["1", "2", "3"]
    steps = [step for step, tag, _ in scalars(tmp_path / "tracking/tensorboard/g1-t2")]
    assert sorted(set(steps)) == [1, 2, 3]
    assert len(steps) == 6  # seconds and val_accuracy


def test_columns_that_come_later_are_added(tmp_path: Path) -> None:
    tracker = tracked(tmp_path, "csv")
    for number, metrics in enumerate(({"a": 1.0}, {"a": 2.0, 'odd, "name"': 3.0}, {"b": math.nan})):
        trial = replace(TRIAL, trial=number)
        tracker(TrialProgressed(trial, (epoch(1, **metrics),)))
    tracker.close()
    rows = table(tmp_path, "epochs.csv")
    assert [row["a"] for row in rows] == ["1.0", "2.0", ""]
    assert [row['odd, "name"'] for row in rows] == ["", "3.0", ""]
    assert [row["b"] for row in rows] == ["", "", "nan"]
    assert not (tmp_path / "tracking" / "tensorboard").exists()


def test_values_beyond_single_precision_are_infinite(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.add(1_000_000, {"large": -1e300, "not": math.nan, "ä": 0.5})
    file.close()
    found = {tag: (step, value) for step, tag, value in scalars(tmp_path)}
    assert found["large"] == (1_000_000, -math.inf)
    assert math.isnan(found["not"][1])
    assert found["ä"] == (1_000_000, 0.5)


def test_a_folder_that_cannot_be_written_stops_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tracking").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        tracker = tracked(tmp_path, "csv", "tensorboard")
        tracker(TrialProgressed(TRIAL, (epoch(1),)))
        tracker(TrialProgressed(TRIAL, (epoch(2),)))
        tracker.close()
    assert caplog.text.count("training goes on") == 1
    told = f"csv and tensorboard: {tmp_path / 'tracking'}, nothing is written since "
    assert tracker.description.startswith(told)
    assert tracker.incomplete


def test_files_beside_wandb(tmp_path: Path) -> None:
    tracker = tracked(tmp_path, "csv", settings=("tracking.mode=offline",))
    assert not isinstance(tracker, WandbTracker)
    tracker(TrialProgressed(TRIAL, (epoch(1),)))
    tracker.close()
    assert tracker.description.startswith(f"csv: {tmp_path / 'tracking'}; W&B: offline, in ")
    assert len(table(tmp_path, "epochs.csv")) == 1
    assert len(list((tmp_path / "wandb").glob("offline-run-*-a-0-g1-t2"))) == 1


def test_the_driver_writes_them_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom selfkd.config import load_config\n"
        "from selfkd.tracking import make_tracker\n"
        "settings = ['tracking=none', 'tracking.writers=[csv, tensorboard]']\n"
        "config = load_config(settings=settings)\n"
        "make_tracker(config, name='a', run_id='a', folder=Path(sys.argv[1])).close()\n"
        "print(sorted({'torch', 'tensorboardX', 'wandb'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
