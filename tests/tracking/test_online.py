"""W&B online, against a server on loopback: what is sent, and that its faults lose nothing."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from wandb_server import KEY, WandbServer

from selfkd.config import load_config
from selfkd.results import (
    Confirmation,
    Epoch,
    GenerationConfirmed,
    GenerationFinished,
    GenerationResult,
    GenerationsSummary,
    Interval,
    Model,
    RunFinished,
    Trial,
    TrialFinished,
    TrialProgressed,
    TrialResult,
    Verdict,
)
from selfkd.storage.files import save_json
from selfkd.tracking import WandbTracker, make_tracker, session

SECRETS = ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(session, "TRANSMIT_SECONDS", 0.5)
    monkeypatch.setattr(session, "PROBE_SECONDS", 0.5)
    wandb.teardown()  # which has kept the environment of tests before
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        server.mute = False
        wandb.teardown()


def draw(folder: Path) -> dict[str, str]:
    """Return the figures of a run folder."""
    return {"Accuracy": f"<svg><title>{folder.name}</title></svg>"}


def online(folder: Path, *settings: str, wait: float = 20.0) -> WandbTracker:
    texts = ["tracking=online", f"tracking.wait={wait}", "confirm.seeds=3", *settings]
    config = load_config(settings=texts)
    tracker = make_tracker(config, name="a", run_id="a-0", folder=folder, plots=draw)
    assert isinstance(tracker, WandbTracker)
    return tracker


def trial(generation: int, number: int = 0) -> Trial:
    return Trial(
        stage=f"generation-{generation}",
        trial=number,
        seed=number,
        point={"distill.alpha": 0.25} if generation else {},
        teachers=(f"hash-{generation - 1}-0",) if generation else (),
    )


def epochs(count: int = 3) -> tuple[Epoch, ...]:
    return tuple(
        Epoch(
            epoch=e,
            seconds=e * 0.5,
            metrics={"loss": 1.0 / e, "val_accuracy": e / 10, "val_nll": 1.0},
        )
        for e in range(1, count + 1)
    )


def ended(generation: int, number: int = 0) -> TrialResult:
    return TrialResult(
        **vars(trial(generation, number)),
        status="completed",
        metrics={"val_accuracy": 0.3 - number / 100, "val_nll": 1.0},
        hash=f"hash-{generation}-{number}",
        train_seconds=1.5,
        history=epochs(),
    )


def chosen(folder: Path, generation: int) -> GenerationResult:
    """The result of a generation whose model's file is in the run folder, with its targets."""
    checkpoint = f"generation_{generation:03d}/student.safetensors"
    (folder / checkpoint).parent.mkdir(parents=True, exist_ok=True)
    (folder / checkpoint).write_bytes(b"weights" * (generation + 1))
    teachers = (Model(f"hash-{generation - 1}-0", ""),) if generation else ()
    for teacher in teachers:
        manifest = {"teacher": teacher.hash, "data": "d", "views": 1, "images": 9, "classes": 2}
        save_json(folder / "targets" / teacher.hash / "d" / "manifest.json", manifest)
    digest = f"hash-{generation}-0"
    return GenerationResult(
        generation=generation,
        trial=0,
        metrics={"val_accuracy": 0.3, "test_accuracy": 0.25 + generation / 100},
        temperature=4.0 if generation else None,
        alpha=0.25 if generation else None,
        history=epochs(),
        models=(Model(digest, checkpoint),),
        teachers=teachers,
        hash=digest,
    )


def follow(tracker: WandbTracker, folder: Path, generation: int, trials: int = 2) -> None:
    """Send a tracker the events of a generation."""
    result = chosen(folder, generation)
    for number in range(trials):
        for epoch in epochs():
            tracker(TrialProgressed(trial(generation, number), (epoch,)))
        tracker(TrialFinished(ended(generation, number)))
    tracker(GenerationFinished(result))


def follow_without_waiting(tracker: WandbTracker, folder: Path, generation: int) -> None:
    """Send a tracker a generation, and see that no call waits for its thread or the network.

    The thread is held, and W&B out of reach, until the last call has returned.
    """
    held, sent = threading.Event(), threading.Event()
    tracker._work.put(lambda: (held.set(), sent.wait()))
    assert held.wait(120)
    wandb_session, tracker._session = tracker._session, None
    try:
        follow(tracker, folder, generation)
    finally:
        tracker._session = wandb_session
        sent.set()


def settled(tracker: WandbTracker) -> None:
    """Wait until a tracker has logged all its events."""
    done = threading.Event()
    tracker._work.put(done.set)
    assert done.wait(120)


def assert_whole(server: WandbServer, generations: int, trials: int = 2) -> None:
    """The server has each run once, with each step once and in order, and each model."""
    names = [f"a-0-g{g}-t{t}" for g in range(generations) for t in range(trials)]
    assert sorted(server.runs) == sorted([*names, "a-0-lineage"])
    for name in names:
        run = server.runs[name]
        assert [row["epoch"] for row in run.history] == [1, 2, 3], name
        assert (run.summary["status"], run.exit_code) == ("completed", 0), name
    lineage = server.runs["a-0-lineage"]
    own = [row["generation"] for row in lineage.history if "test_accuracy" in row]
    assert own == list(range(generations))
    models = [version for version in server.versions if version.type == "model"]
    assert {tuple(sorted(m.aliases - {"latest"})) for m in models} == {
        (f"generation-{g}",) for g in range(generations)
    }
    assert all(m.state == "COMMITTED" and m.files for m in models)


def sync(folder: Path) -> None:
    """Do what the tracker says at the end of a run that could not be sent."""
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(folder / "wandb")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_what_an_online_run_sends(tmp_path: Path, server: WandbServer) -> None:
    tracker = online(tmp_path)
    for generation in range(3):
        follow(tracker, tmp_path, generation)
    confirmation = Confirmation(
        generation=2,
        seeds=(1, 2),
        metric="test_accuracy",
        values=(0.9, 0.9),
        mean=Interval(0.9),
        first=Interval(0.02, 0.01, 0.03),
        previous=Interval(0.02, 0.01, 0.03),
    )
    tracker(GenerationConfirmed(confirmation))
    verdict = Verdict(name="b", to="a", sentences=("so",))
    summary = {"best": 2, "confirmations": (confirmation,), "verdict": verdict}
    tracker(RunFinished(GenerationsSummary(generations=(), **summary)))
    (tmp_path / "report.html").write_text("<p>whole</p>")
    tracker.close()
    assert tracker.description == f"W&B: online, {server.url}/tester/selfkd/groups/a"
    assert_whole(server, generations=3)

    run = server.runs["a-0-g1-t1"]
    assert (run.values["groupName"], run.values["jobType"]) == ("a", "generation-1")
    assert run.values["tags"] == ["digits", "selfkd_cnn", "generation-1"]
    assert (run.config["generation"], run.config["distill"]["alpha"]) == (1, 0.25)

    lineage = server.runs["a-0-lineage"]
    summary = lineage.summary
    assert (summary["best_test_accuracy"], summary["last_test_accuracy"]) == (0.25, 0.27)
    assert (summary["gain"], summary["gain_low"], summary["gain_high"]) == (0.02, 0.01, 0.03)
    assert (summary["verdict"], lineage.values["notes"]) == ("so", "so")
    assert lineage.files[summary["report"]["path"]] == b"<p>whole</p>"
    plot = lineage.files[summary["Accuracy"]["path"]].decode()
    assert plot == f"<svg><title>{tmp_path.name}</title></svg>"

    # the chosen trial made the model, the trials of the next generation were distilled from it
    models = {min(v.aliases - {"latest"}): v for v in server.versions if v.type == "model"}
    for generation in range(3):
        model = models[f"generation-{generation}"]
        assert model.producer == f"a-0-g{generation}-t0"
        students = {f"a-0-g{generation + 1}-t{t}" for t in range(2)} if generation < 2 else set()
        assert model.consumers == students
        assert model.files == {"student.safetensors": b"weights" * (generation + 1)}
        assert model.metadata["hash"] == f"hash-{generation}-0"
    assert models["generation-1"].metadata["temperature"] == 4.0
    targets = [v for v in server.versions if v.type == "dataset"]
    assert [(v.producer, v.files) for v in targets] == [("a-0-lineage", {})] * 2
    assert [v.consumers for v in targets] == [{f"a-0-g{g}-t{t}" for t in range(2)} for g in (1, 2)]
    (entry,) = targets[0].manifest["contents"].values()
    assert entry["ref"] == (tmp_path / "targets/hash-0-0/d/manifest.json").as_uri()

    assert not server.unknown
    assert KEY.encode() not in server.seen
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    print(json.dumps(server.kinds(), indent=1))


def test_a_wrong_key_loses_nothing(
    tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.refuse = True
    with caplog.at_level(logging.WARNING, "selfkd"):
        tracker = online(tmp_path, wait=5)
        follow_without_waiting(tracker, tmp_path, 0)
        follow_without_waiting(tracker, tmp_path, 1)
        tracker.close()
    assert caplog.text.count("user is not logged in): tracking goes on offline") == 1
    assert "wandb sync --include-online" in tracker.description
    assert not server.runs
    server.refuse = False
    sync(tmp_path)
    assert_whole(server, generations=2)


@pytest.mark.slow  # others of these tests have servers that are worse than slow
def test_a_slow_server_gets_all_and_holds_up_nothing(tmp_path: Path, server: WandbServer) -> None:
    server.delay = 0.5
    tracker = online(tmp_path)
    follow_without_waiting(tracker, tmp_path, 0)
    tracker.close()
    assert "online" in tracker.description
    server.delay = 0.0
    assert_whole(server, generations=1)


@pytest.mark.slow  # one that falls silent is worse
def test_a_server_that_dies_holds_up_nothing_and_the_rest_can_be_sent(
    tmp_path: Path, server: WandbServer
) -> None:
    tracker = online(tmp_path, wait=5)
    follow(tracker, tmp_path, 0)
    tracker(TrialProgressed(trial(1), epochs(1)))
    assert server.wait_for(lambda: "a-0-g1-t0" in server.runs and server.versions)
    server.stop()
    start = time.monotonic()
    follow_without_waiting(tracker, tmp_path, 1)
    tracker.close()
    assert time.monotonic() - start < 60
    assert f"wandb sync --include-online {tmp_path / 'wandb'}" in tracker.description
    server.start()
    sync(tmp_path)
    assert_whole(server, generations=2)


def test_a_server_that_comes_back_gets_all_without_help(
    tmp_path: Path, server: WandbServer
) -> None:
    tracker = online(tmp_path)
    follow(tracker, tmp_path, 0)
    tracker(TrialProgressed(trial(1), epochs(1)))
    settled(tracker)
    assert server.wait_for(lambda: "a-0-g1-t0" in server.runs)
    server.stop()
    follow(tracker, tmp_path, 1)
    settled(tracker)
    server.start()
    tracker.close()
    assert "could not" not in tracker.description
    assert_whole(server, generations=2)


def test_a_killed_process_of_wandb_loses_nothing_and_says_no_traceback(
    tmp_path: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = online(tmp_path)
    follow(tracker, tmp_path, 0)
    tracker(TrialProgressed(trial(1), epochs(1)))
    settled(tracker)
    assert server.wait_for(lambda: "a-0-g1-t0" in server.runs)
    # what W&B has sent and not yet noted it sends again, after what is there
    assert server.wait_for(lambda: not tracker._session.unsent)
    process = wandb.setup().assert_service()._proc._process  # type: ignore[union-attr]
    process.kill()
    process.wait()
    follow(tracker, tmp_path, 1)
    tracker.close()
    assert "online" in tracker.description
    assert "not" not in tracker.description
    assert_whole(server, generations=2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_server_that_falls_silent_holds_up_nothing(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = online(tmp_path, wait=5)
    follow(tracker, tmp_path, 0)
    settled(tracker)
    assert server.wait_for(lambda: bool(server.versions))
    monkeypatch.setattr(session, "START_SECONDS", 3.0)
    server.mute = True
    start = time.monotonic()
    follow_without_waiting(tracker, tmp_path, 1)
    tracker.close()
    assert time.monotonic() - start < 90
    assert "wandb sync" in tracker.description
    server.mute = False
    sync(tmp_path)
    assert_whole(server, generations=2)


def test_a_driver_that_is_killed_sends_the_rest_when_resumed(
    tmp_path: Path, server: WandbServer
) -> None:
    """What the ledger has and W&B may not: trials that ended just before."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from selfkd.results import TrialFinished, TrialProgressed
        from selfkd.storage.rows import save_row
        from tracking import test_online as t
        folder = Path(sys.argv[1])
        tracker = t.online(folder)
        t.follow(tracker, folder, 0)
        save_row(folder / "generation_000/result.json", t.chosen(folder, 0))
        tracker(TrialProgressed(t.trial(1), t.epochs(2)))
        t.settled(tracker)
        for number in range(2):
            result = t.ended(1, number)
            save_row(folder / f"generation_001/trial_{number:03d}/result.json", result)
            tracker(TrialFinished(result))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=600,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    tracker = online(tmp_path)
    tracker(GenerationFinished(chosen(tmp_path, 0)))
    tracker(GenerationFinished(chosen(tmp_path, 1)))
    tracker.close()
    for number in range(2):
        run = server.runs[f"a-0-g1-t{number}"]
        assert [row["epoch"] for row in run.history] == [1, 2, 3]
        assert run.summary["status"] == "completed"
    assert [row["generation"] for row in server.runs["a-0-lineage"].history] == [0, 1]
    models = [version for version in server.versions if version.type == "model"]
    assert {min(m.aliases - {"latest"}) for m in models} == {"generation-0", "generation-1"}
    (teacher,) = (model for model in models if "generation-0" in model.aliases)
    assert teacher.consumers == {"a-0-g1-t0", "a-0-g1-t1"}


@pytest.mark.slow  # test_generations has such a run, without --verbose
def test_a_real_run_online(tmp_path: Path, server: WandbServer) -> None:
    """And no key or token of its environment is in what it writes, prints or sends."""
    settings = {
        "storage": str(tmp_path),
        "tracking": "auto",
        "search.trials": 2,
        "train.epochs": 2,
        "confirm.seeds": 2,
        "resources.cpu": 1.5,  # one worker of one thread: two would start, or wait for each other
    }
    texts = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "selfkd.generations", "--rounds", "1", "--name", "a", *texts]
    planted = {name: secrets.token_hex(20) for name in SECRETS}
    own = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
    with own as ray:  # a cluster of its own
        done = subprocess.run(
            [*command, "--verbose"],
            env={**os.environ, **planted, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": ray},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"W&B: online, {server.url}/tester/selfkd/groups/a" in " ".join(done.stdout.split())
    assert re.search(r"dashboard at \S*http://127\.0\.0\.1:", done.stderr), done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {".wandb", ".safetensors", ".html"} <= {path.suffix for path in files}
    written = {str(path): path.read_bytes() for path in files}
    written |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    found = [
        (name, where)
        for name, value in (planted | {"WANDB_API_KEY": KEY}).items()
        for where, content in (written | {"sent": server.seen}).items()
        if value.encode() in content
    ]
    assert found == []
    assert not server.unknown
    (lineage,) = [run for name, run in server.runs.items() if name.endswith("-lineage")]
    assert [row["generation"] for row in lineage.history] == [0, 1, 0, 1]  # then confirmed
    assert all("confirmed/test_accuracy" in row for row in lineage.history[2:])
    assert "generation" in lineage.summary["verdict"]
    assert lineage.summary["test_accuracy_over_generation_0"]["_type"] == "html-file"
    models = [version for version in server.versions if version.type == "model"]
    first = next(model for model in models if "generation-0" in model.aliases)
    students = [name for name in server.runs if "-g1-t" in name or "-confirm-1-t" in name]
    assert len(students) == 4
    assert first.consumers == set(students)
    print(json.dumps(server.kinds(), indent=1))
