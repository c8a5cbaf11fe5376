"""An interrupted trial ends as an uninterrupted one: the same rows and weights, bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from selfkd.config import load_config, to_tree
from selfkd.config.space import Points
from selfkd.execution.jobs import Executor, InProcess, Outcome
from selfkd.experiments.arms import Run
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import Stage, run_stages
from selfkd.results import CHECKPOINT, Epoch, Event, Message, Row, TrialProgressed, from_row
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import load_json
from selfkd.training.fit import Training
from selfkd.training.optimizers import make_average, make_optimizer, make_scheduler
from selfkd.training.progress import Progress
from selfkd.training.ranks import Ranks
from selfkd.training.trial import Trial, run_function
from selfkd.worker.jobs import run_job

EVERY_EPOCH = "checkpoint={seconds: null, epochs: 1}"
ALL = (
    "model={name: selfkd_resnet8, args: {drop_rate: 0.3}}",
    "data={train_size: 60, val_size: 40, crop: 0.6, flip: true, jitter: 1, views: 3}",
    "train={epochs: 5, batch_size: 25, optimizer: adamw, lr: 0.01, warmup_epochs: 1, ema: 0.9, "
    "clip_grad: 1.0, label_smoothing: 0.1}",
)
SMALL = (
    "model={name: selfkd_mlp, args: {width: 12, depth: 1}}",
    "data.train_size=100",
    "train={epochs: 6, batch_size: 40, lr: 0.1}",
)


def payload(folder: Path, *settings: str, **more: Any) -> dict[str, Any]:
    config = to_tree(load_config(settings=[EVERY_EPOCH, *settings]))
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


def train(folder: Path, *settings: str, **more: Any) -> Iterator[Row]:
    return run_job("train", json.loads(json.dumps(payload(folder, *settings, **more))))


def plain(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def students(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_tensors(path)[0] for path in folder.glob("student*.safetensors")}


def assert_same_students(one: Path, two: Path) -> None:
    ours, theirs = students(one), students(two)
    assert ours.keys() == theirs.keys() != set()
    for name in ours:
        assert ours[name].keys() == theirs[name].keys()
        assert all(torch.equal(ours[name][key], theirs[name][key]) for key in ours[name])


def disturb() -> None:
    """Change all random states, as a new process does."""
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)


def interrupted(start: Callable[[], Iterator[Row]], epochs: int) -> list[Row]:
    """Stop after some epochs and start again; return the rows of the second start."""
    rows = start()
    first = list(islice(rows, epochs))
    assert [row["epoch"] for row in first] == list(range(1, epochs + 1))
    rows.close()  # type: ignore[attr-defined]
    disturb()
    return list(start())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


# --- the built-in training function ---


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (ALL, {}),
        ((*SMALL, "train.schedule=step", "train.momentum=0.5"), {}),
        ((*SMALL, "train.optimizer=muon"), {}),
        ((*SMALL, "train.amp=bfloat16"), {}),
        (SMALL, {"cycles": 3}),
        ((*SMALL, "train.ema=0.8"), {"specialist": [1, 4, 7]}),
        ((*SMALL, "data.augment=strong", "data.repeats=2"), {"specialist": [1, 4, 7]}),
        (SMALL, {"start": {"seed": 3}}),
    ],
    ids=["all", "steps", "muon", "amp", "snapshots", "specialist", "mixed", "start"],
)
@pytest.mark.parametrize("epochs", [1, 4])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, settings: tuple[str, ...], more: dict[str, Any], epochs: int
) -> None:
    whole = list(train(tmp_path / "whole", *settings, **more))
    again = interrupted(lambda: train(tmp_path / "again", *settings, **more), epochs)
    assert plain(again) == plain(whole)
    assert_same_students(tmp_path / "again", tmp_path / "whole")
    seconds = [row["seconds"] for row in again]
    assert seconds == sorted(seconds)


def test_resumed_equals_uninterrupted_on_streamed_images(tmp_path: Path, pictures: Path) -> None:
    settings = [
        "data={name: folder, image_size: 8, in_memory: false, workers: 2, flip: true, views: 2}",
        "data.augment={preset: strong, color: 0.4, hue: 0.1}",
        f"data.root={pictures}",
        "model={name: selfkd_cnn, args: {width: 4}}",
        "train={epochs: 3, batch_size: 10}",
    ]
    whole = list(train(tmp_path / "whole", *settings))
    again = interrupted(lambda: train(tmp_path / "again", *settings), 2)
    assert plain(again) == plain(whole)
    assert_same_students(tmp_path / "again", tmp_path / "whole")


def test_resumed_equals_uninterrupted_with_a_teacher(tmp_path: Path) -> None:
    teacher = {
        "hash": list(train(tmp_path / "teacher", *SMALL))[-1]["hash"],
        "checkpoint": str(tmp_path / "teacher" / "student.safetensors"),
    }
    config = payload(tmp_path, *SMALL)["config"]
    place = {"targets": str(tmp_path / "targets"), "view": 0, "shard": 0, "run": str(tmp_path)}
    list(
        run_job(
            "cache_teacher_logits", {"config": config, "checkpoint": teacher["checkpoint"], **place}
        )
    )
    more = {"teachers": [teacher], "stage": "generation-1", "targets": place["targets"]}
    whole = list(train(tmp_path / "whole", *SMALL, **more))
    again = interrupted(lambda: train(tmp_path / "again", *SMALL, **more), 3)
    assert plain(again) == plain(whole)
    assert_same_students(tmp_path / "again", tmp_path / "whole")


def test_completed_epochs_are_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr("selfkd.training.fit.descend", _counted(steps))
    interrupted(lambda: train(tmp_path, *SMALL), 4)
    assert len(steps) == 6 * 3  # three batches an epoch: none of them twice


def _counted(steps: list[int]) -> Any:
    from selfkd.training.fit import descend

    def counted(training: Training, *arguments: Any) -> None:
        steps.append(training.step)
        descend(training, *arguments)

    return counted


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    whole = list(train(tmp_path / "whole", *SMALL))
    for epochs in range(1, 6):
        rows = train(tmp_path / "again", *SMALL)
        list(islice(rows, epochs))
        rows.close()  # type: ignore[attr-defined]
        disturb()
    assert plain(list(train(tmp_path / "again", *SMALL))) == plain(whole)
    assert_same_students(tmp_path / "again", tmp_path / "whole")


def test_seconds_are_summed_over_all_starts(tmp_path: Path) -> None:
    rows = train(tmp_path, *SMALL)
    first = [next(rows), next(rows)]
    rows.close()  # type: ignore[attr-defined]
    path = tmp_path / CHECKPOINT
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state"]["seconds"] = checkpoint["rows"][-1]["seconds"] = 1000.0
    torch.save(checkpoint, path)
    again = list(train(tmp_path, *SMALL))
    assert again[0]["seconds"] == first[0]["seconds"]
    assert [row["seconds"] > 1000 for row in again[2:]] == [True] * 4


# --- checkpoints that are not used ---


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4  # in the weights: torch itself would read it
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    torch.save({"made_from": Path("a")}, path)  # would run code


def other(path: Path) -> None:
    torch.save([1, 2], path)


@pytest.mark.parametrize("harm", [flip_a_bit, cut, empty, pickled, other])
def test_a_damaged_checkpoint_is_not_used_and_reported(tmp_path: Path, harm: Any) -> None:
    whole = list(train(tmp_path / "whole", *SMALL))
    rows = train(tmp_path / "again", *SMALL)
    list(islice(rows, 3))
    rows.close()  # type: ignore[attr-defined]
    harm(tmp_path / "again" / CHECKPOINT)
    again = list(train(tmp_path / "again", *SMALL))
    assert "checkpoint.pt is damaged, the trial restarts at epoch 1" in again[0].pop("note")
    assert plain(again) == plain(whole)
    assert_same_students(tmp_path / "again", tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (("train.lr=0.2",), {}),
        (("train.label_smoothing=0.1",), {}),
        ((), {"seed": 8}),
        ((), {"stage": "generation-1"}),
        ((), {"cycles": 2}),
        ((), {"model": {"name": "selfkd_mlp", "args": {"width": 12, "depth": 2}}}),
    ],
)
def test_the_checkpoint_of_another_trial_is_not_used_and_reported(
    tmp_path: Path, settings: tuple[str, ...], more: dict[str, Any]
) -> None:
    rows = train(tmp_path / "again", *SMALL)
    list(islice(rows, 3))
    rows.close()  # type: ignore[attr-defined]
    again = list(train(tmp_path / "again", *SMALL, *settings, **more))
    assert "is of another config, seed or teacher" in again[0].pop("note")
    assert plain(again) == plain(list(train(tmp_path / "whole", *SMALL, *settings, **more)))


def test_what_may_change_on_resume_changes_nothing(tmp_path: Path) -> None:
    whole = list(train(tmp_path / "whole", *SMALL))
    rows = train(tmp_path / "here", *SMALL)
    list(islice(rows, 3))
    rows.close()  # type: ignore[attr-defined]
    (tmp_path / "here").rename(tmp_path / "moved")
    again = train(tmp_path / "moved", *SMALL, "rounds=9", "checkpoint.seconds=1", "tracking=none")
    assert plain(list(again)) == plain(whole)


def test_a_checkpoint_that_cannot_be_written_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, write: object, *, patience: float) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfkd.training.progress.replace", full)
    rows = list(train(tmp_path, *SMALL))
    assert len(rows) == 6
    assert "could not be written, training continues: [Errno 28]" in rows[0]["note"]


def test_a_checkpoint_that_cannot_be_read_back_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is checked instead, and still has to be plain data."""
    faults = iter([OSError(5, "Input/output error")])

    def away(path: Path) -> Path:
        for fault in faults:
            raise fault
        return path

    monkeypatch.setattr("selfkd.training.progress.fetch", away)
    progress = Progress(tmp_path / CHECKPOINT, made_from={}, ranks=Ranks(), seconds=0.0, epochs=1)
    row: Row = {"epoch": 1}
    progress.reached(row, {"a": torch.zeros(1)})
    assert row["note"] == (
        "checkpoint.pt could not be read back, training continues: [Errno 5] Input/output error"
    )
    with pytest.raises(TypeError, match="must hold tensors"):
        progress.reached({"epoch": 2}, {"a": Path()})


@pytest.mark.parametrize(
    ("often", "written"),
    [
        ({"seconds": None, "epochs": 2}, [False, True, False, True, False]),
        ({"seconds": 0.0, "epochs": None}, [True] * 5),
        ({"seconds": 1000.0, "epochs": None}, [False] * 5),
        ({"seconds": None, "epochs": None}, [False] * 5),
        ({"seconds": 1000.0, "epochs": 3}, [False, False, True, False, False]),
    ],
)
def test_how_often(tmp_path: Path, often: dict[str, Any], written: list[bool]) -> None:
    path = tmp_path / CHECKPOINT
    progress = Progress(path, made_from={}, ranks=Ranks(), **often)
    seen = []
    for epoch in range(1, 6):
        progress.reached({"epoch": epoch, "seconds": 0.0}, {"a": torch.zeros(1)})
        seen.append(path.exists())
        path.unlink(missing_ok=True)
    assert seen == written


# --- all of the state ---


def test_the_state_of_every_part_comes_back(tmp_path: Path) -> None:
    def make() -> Training:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        optimizer = make_optimizer(student, name="sgd", lr=0.1, momentum=0.9, weight_decay=0.0)
        schedule = {"schedule": "cosine", "epochs": 4, "warmup_epochs": 1, "steps_per_epoch": 2}
        training = Training(
            student=student,
            optimizer=optimizer,
            scheduler=make_scheduler(optimizer, **schedule),  # type: ignore[arg-type]
            average=make_average(student, decay=0.5),
            generator=torch.Generator().manual_seed(1),
        )
        training.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return training

    def advance(training: Training, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            assert training.scheduler is not None
            training.scheduler.step_update(training.step)
            inputs = torch.randn(4, 3, generator=training.generator)
            loss = training.student(inputs).square().mean()
            training.optimizer.zero_grad()
            training.scaler.scale(loss).backward()
            training.scaler.step(training.optimizer)
            training.scaler.update()
            assert training.average is not None
            training.average.update_parameters(training.student)
            training.step += 1
            lr = training.optimizer.param_groups[0]["lr"]
            found += [loss.item(), lr, training.scaler.get_scale()]
            found += [float(value.sum()) for value in training.best.state_dict().values()]
        return found

    whole = make()
    expected = advance(whole, 7)
    stopped = make()
    first = advance(stopped, 3)
    torch.save({"state": stopped.state_dict(), "random": torch.get_rng_state()}, tmp_path / "a")
    disturb()
    checkpoint = torch.load(tmp_path / "a", weights_only=True)
    resumed = make()
    resumed.load_state_dict(checkpoint["state"])
    torch.set_rng_state(checkpoint["random"])
    assert first + advance(resumed, 4) == expected
    assert len({expected[2], expected[-5]}) == 2 or whole.scaler.get_scale() > 8


# --- user training functions ---


def make_trial(folder: Path, *settings: str) -> Trial:
    config = load_config(settings=[EVERY_EPOCH, *settings])
    return Trial(config=config, stage="generation-0", seed=3, path=folder / "student.safetensors")


def users(trial: Trial, until: int = 5) -> None:
    """Training function that draws from all random generators."""
    torch.manual_seed(trial.seed)
    random.seed(trial.seed)
    np.random.seed(trial.seed)
    model = nn.Linear(2, 2)
    epoch = 0
    if (state := trial.checkpoint) is not None:
        model.load_state_dict(state["model"])
        epoch = state["epoch"]
    while epoch < until:
        with torch.no_grad():
            model.weight += torch.rand(2, 2) + random.random() + np.random.rand()
        epoch += 1
        state = {"model": model.state_dict(), "epoch": epoch}
        metrics = {"val_accuracy": float(model.weight.sum())}
        trial.report(metrics, student=model, checkpoint=state)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_user_function_resumes_from_its_checkpoint(tmp_path: Path, epochs: int) -> None:
    whole = list(run_function(users, make_trial(tmp_path / "whole")))
    again = interrupted(lambda: run_function(users, make_trial(tmp_path / "again")), epochs)
    assert plain(again) == plain(whole)
    assert [row["seconds"] for row in again] == sorted(row["seconds"] for row in again)
    assert_same_students(tmp_path / "again", tmp_path / "whole")


def test_a_function_that_reads_no_checkpoint_starts_again(tmp_path: Path) -> None:
    def forgets(trial: Trial) -> None:
        for epoch in range(1, 4):
            metrics = {"val_accuracy": epoch / 10}
            trial.report(metrics, student=nn.Linear(1, 1), checkpoint={"epoch": epoch})

    again = interrupted(lambda: run_function(forgets, make_trial(tmp_path)), 2)
    assert [row["val_accuracy"] for row in again] == [0.1, 0.2, 0.3]
    assert [row["epoch"] for row in again] == [1, 2, 3]


def test_a_checkpoint_is_plain_data(tmp_path: Path) -> None:
    def objects(trial: Trial) -> None:
        trial.report({"val_accuracy": 0.1}, student=nn.Linear(1, 1), checkpoint={"a": Path()})

    with pytest.raises(TypeError, match=r"must hold tensors, .* text, got \S*pathlib"):
        list(run_function(objects, make_trial(tmp_path)))
    assert not (tmp_path / CHECKPOINT).exists()


# --- in a stage ---


def run_one_trial(folder: Path, executor: Executor) -> list[Event]:
    """Run a stage of one trial; return its events."""
    config = load_config(settings=[EVERY_EPOCH, *SMALL])
    stage = Stage(
        name="generation-0",
        folder=folder,
        seeds=[5],
        proposer=Points([{}]),
        payload=lambda number, point: {
            "config": to_tree(config),
            "point": point,
            "model": to_tree(config)["model"],
            "teachers": [],
            "targets": str(folder / "targets"),
        },
        metric="val_accuracy",
        mode="max",
    )
    events: list[Event] = []
    run_stages(executor, events.append, [stage], title="")
    return events


def test_a_stage_reports_notes_and_removes_the_checkpoint_at_the_end(tmp_path: Path) -> None:
    trial = tmp_path / "trial_000"
    trial.mkdir()
    (trial / CHECKPOINT).write_bytes(b"nonsense")
    events = run_one_trial(tmp_path, InProcess(run_job))
    assert [event.text for event in events if isinstance(event, Message)] == [
        "generation 0, trial 0: checkpoint.pt is damaged, the trial restarts at epoch 1: "
        "File is not a zip file"
    ]
    assert all("note" not in row for row in load_json(trial / "result.json")["history"])
    assert sorted(path.name for path in trial.iterdir()) == ["result.json", "student.safetensors"]


def test_a_resumed_trial_reports_each_epoch_once(tmp_path: Path) -> None:
    """As after the death of its worker: repeated rows are in the history, but no second event."""

    class Dies(InProcess):
        def run(self, jobs: Any, **_: Any) -> None:
            job = jobs.ask()
            for row in islice(run_job(job.kind, job.payload), 4):
                jobs.report(job, [row])
            disturb()
            for row in run_job(job.kind, job.payload):
                jobs.report(job, [row])
            jobs.tell(Outcome(job, row))

    events = run_one_trial(tmp_path, Dies(run_job))
    reported = [event.epochs for event in events if isinstance(event, TrialProgressed)]
    assert [row.epoch for epochs in reported for row in epochs] == [1, 2, 3, 4, 5, 6]
    history = load_json(tmp_path / "trial_000" / "result.json")["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]


# --- with Ray ---


@pytest.mark.slow  # faults have it: the driver killed in one process, workers by the command
def test_trials_of_a_killed_driver_resume(tmp_path: Path) -> None:
    """As if uninterrupted, and the epochs before the kill are not trained again."""
    settings = [
        "checkpoint={seconds: null, epochs: 1}",
        "model={name: selfkd_cnn, args: {width: 8}}",
        "train={epochs: 40, ema: 0.9}",
        "data={jitter: 1, views: 2}",
        "search.trials=2",
        "confirm.seeds=0",
        "tracking=none",
    ]
    whole = load_config(settings=settings, flags={"rounds": 0, "storage": str(tmp_path)})
    undisturbed = RunFolder.create(tmp_path / "whole", whole)
    events: list[Event] = []
    executor = InProcess(run_job)
    born_again(Run(config=whole, folder=undisturbed, executor=executor, events=events.append))

    sets = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "selfkd.generations"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--rounds", "0", "--name", "killed", *sets],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        folder = tmp_path / "runs" / "killed"
        path = folder / "generation_000" / "trial_000" / CHECKPOINT
        deadline = time.monotonic() + 600
        while not (path.exists() and len(checkpoint_rows(path)) >= 3):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        process.kill()
        process.wait(timeout=600)
    before = checkpoint_rows(path)
    assert 3 <= len(before) < 40
    assert not path.with_name("result.json").exists(), "the trial ended before the kill"
    done = subprocess.run(
        [*command, "--resume", str(folder)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for trial in (0, 1):
        place = f"generation_000/trial_00{trial}/result.json"
        one, two = load_json(folder / place), load_json(undisturbed.path / place)
        assert plain(one["history"]) == plain(two["history"])
        assert one["hash"] == two["hash"]
    result = load_json(path.with_name("result.json"))
    history = [from_row(Epoch, row) for row in result["history"]]
    assert history[: len(before)] == [from_row(Epoch, row) for row in before]  # with their seconds
    assert result["train_seconds"] == result["history"][-1]["seconds"] > before[-1]["seconds"]
    assert not list(folder.rglob(CHECKPOINT))


def checkpoint_rows(path: Path) -> list[Row]:
    rows: list[Row] = torch.load(path, weights_only=True)["rows"]
    return rows
