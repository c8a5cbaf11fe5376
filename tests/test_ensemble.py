"""`python -m selfkd.ensemble`, as a user runs it: real Ray, real offline W&B, a real kill."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from wandb_files import history

from selfkd.ensemble import main
from selfkd.experiments.run_folder import RunFolder
from selfkd.storage.files import load_json

TINY = ["model.args={width: 4}", "train.epochs=3", "search.trials=2", "confirm.seeds=2"]
TINY += ["tracking=offline"]
TINY += ["resources.cpu=1.5"]  # one worker of one thread: two would start, or wait for each other


def command(*arguments: str, settings: list[str]) -> list[str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "selfkd.ensemble", *arguments, *sets]


def run(
    folder: Path, *arguments: str, settings: list[str] = TINY
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, settings=settings),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def found(folder: Path) -> dict[str, Any]:
    """A run's summary without what a clock measured."""
    summary: dict[str, Any] = load_json(folder / "summary.json")
    for row in (*summary["rows"], summary["teacher"]):
        row.pop("ms_1"), row.pop("ms_128")
    return summary


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three members, undisturbed: the folder and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, "--members", "3", "--name", "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return folder / "runs" / "whole", done.stdout


def test_prints_what_it_does_a_table_and_a_verdict(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    assert "3 members on labels, then 2 trials of one student, selfkd_cnn on digits" in printed
    for title in ("members on labels: 3", "student from the teachers: 2", "confirmation on fresh"):
        assert f"{title}" in printed
    rows = found(folder)["rows"]
    assert len(rows) == 6
    for row in rows:
        assert re.search(rf"{re.escape(row['name'])} .*{row['test_accuracy']:.2%}", printed)
    assert re.search(r"share of the teacher's gain kept: (none|-?\d+\.\d\d %)", printed)
    (said,) = found(folder)["verdict"]["sentences"]
    assert said in printed
    assert said.endswith(" points over 2 fresh seeds, too few for an interval")
    assert f"model:   {folder}/student.safetensors" in printed
    assert "wandb sync" in printed


def test_an_ensemble_costs_its_members_together(whole: tuple[Path, str]) -> None:
    rows = load_json(whole[0] / "summary.json")["rows"]
    single, _, ensemble, _, _, student = rows
    assert ensemble["parameters"] == 3 * single["parameters"]
    assert student["parameters"] == single["parameters"]
    for row in (single, ensemble, student):  # a busy machine tells no more of times
        assert row["ms_1"] > 0
        assert row["ms_128"] > 0


def test_wandb_has_a_run_a_trial_and_the_table(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    run_id = RunFolder(folder).run_id
    runs = sorted(path.name.split("-", 3)[-1] for path in folder.glob("wandb/offline-run-*"))
    stages = [("members", 3), ("student", 2), ("confirm_labels", 2), ("confirm_student", 2)]
    trials = [f"{run_id}-{stage}-t{n}" for stage, count in stages for n in range(count)]
    assert runs == sorted([*trials, f"{run_id}-ensemble"])
    rows = history(folder, f"{run_id}-ensemble")
    expected = [row["test_accuracy"] for row in found(folder)["rows"]]
    assert [row["test_accuracy"] for row in rows] == pytest.approx(expected)


def test_finished_run_is_only_reported_again(whole: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = whole
    done = run(tmp_path, "--resume", str(folder), settings=[])
    assert done.returncode == 0, done.stdout + done.stderr
    tables = [
        re.findall(r"single member.*its teacher[^\n]*", text, re.DOTALL)
        for text in (printed, done.stdout)
    ]
    assert len(tables[0]) == 1
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGKILL, "targets/*/*/view_000/*.safetensors"),
        (signal.SIGINT, "members/trial_001/result.json"),
        (signal.SIGTERM, "student.safetensors"),
    ],
    ids=["kill while caching", "ctrl-c", "terminate"],
)
@pytest.mark.slow  # experiments/test_ensemble has it in one process
def test_stopped_and_resumed_equals_undisturbed(
    whole: tuple[Path, str], tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command("--members", "3", "--name", "stopped", settings=TINY),
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        folder = tmp_path / "runs" / "stopped"
        deadline = time.monotonic() + 600
        while not list(folder.glob(moment)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        process.send_signal(number)
        code = process.wait(timeout=600)
    assert not (folder / "summary.json").exists(), "it was done before it was stopped"
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    done = run(tmp_path, "--resume", str(folder), settings=[])
    assert done.returncode == 0, done.stdout + done.stderr
    assert found(folder) == found(whole[0])


@pytest.mark.slow  # experiments/test_ensemble has it in one process
def test_members_come_from_an_earlier_run(whole: tuple[Path, str], tmp_path: Path) -> None:
    settings = [*TINY, "confirm.seeds=1", "tracking=none"]
    done = run(tmp_path, "--from", str(whole[0]), "--name", "a", settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "members on labels" not in done.stdout
    assert "one pair, no interval" not in done.stdout
    assert "ensemble of 3, logits" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere"], "--from must be a run folder"),
        (["--members", "0"], "members.count: must be greater than or equal to 1, got 0"),
        (["--set", "members=[]", "--set", "members.use=0"], "members.use: must be greater than"),
        (["--set", "members.source=voting"], "members.source: must be 'members', 'snapshots'"),
        (["--set", "targets.top_k=0"], "targets.top_k: must be greater than or equal to 1, got 0"),
        (
            ["--set", "targets.top_k=3", "--set", "distill.average=logits"],
            "targets.top_k: cannot go with distill.average logits",
        ),
        (
            ["--set", "members.checkpoints=[{path: gone.pt, model: resnet18}]"],
            "members.checkpoints must be files, got",
        ),
        (
            ["--set", "members.checkpoints=[{path: a, model: resnet18, mean: [0]}]"],
            "members.checkpoints: must have mean and std or neither",
        ),
        (["--set", "members.checkpoints=[{path: a}]"], "model: "),
    ],
)
def test_bad_input_is_one_message_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("runs/*"))


def test_a_run_is_continued_by_its_own_command(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from selfkd.generations import main as generations

    assert generations(["--resume", str(whole[0])]) == 2
    assert "was started by selfkd.ensemble: continue it with" in capsys.readouterr().err
