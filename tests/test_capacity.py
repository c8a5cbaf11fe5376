"""`python -m selfkd.capacity`, as a user runs it: real Ray, real offline W&B; and its table."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_here

from selfkd.capacity import main
from selfkd.report import main as report
from selfkd.response import main as response
from selfkd.storage.files import load_json

TINY = [
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train.epochs=2",
    "confirm.seeds=2",
    "capacity.search=true",
    "search.trials=5",
    "tracking=offline",
    "resources.cpu=1.5",  # one worker of one thread: two would start, or wait for each other
]


def run(folder: Path, *arguments: str, settings: list[str]) -> subprocess.CompletedProcess[str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    return run_here(main, folder, *arguments, *sets)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    arguments = ["--members", "1", "--values", "2", "8", "--name", "whole"]
    done = run(folder, *arguments, settings=TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return folder / "runs" / "whole", done.stdout


def table(printed: str) -> list[list[str]]:
    """Return the rows of the table of sizes."""
    return [line.split() for line in printed.splitlines() if re.match(r" \d+ ", line)]


def test_prints_what_it_does_a_table_and_a_verdict(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, printed = whole
    summary = load_json(folder / "summary.json")
    assert (
        "1 member on labels, then students with model.args.width 2, 8 on digits, from labels only "
        "and distilled (5 trials for each), 2 paired seeds each"
    ) in printed
    assert all(sentence in printed for sentence in summary["verdict"]["sentences"])
    assert [row[0] for row in table(printed)] == ["2", "8"]
    assert main(["--resume", str(folder), "--verbose"]) == 0
    assert "test accuracy, mean ± half of a 95 % interval over 2 seeds" in capsys.readouterr().out


def test_every_student_is_tracked_with_its_size(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1 + 2 * 5 + 2 * 2 * 2


def test_a_finished_run_prints_its_table_again(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    again = run(folder.parents[1], "--resume", str(folder), settings=[])
    assert again.returncode == 0
    assert table(again.stdout) == table(printed)


def test_the_curve_is_drawn(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = whole
    assert "Accuracy over parameters" in (folder / "report.html").read_text()
    assert report([str(folder), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    sizes = load_json(folder / "summary.json")["sizes"]
    arms = {f"{size['value']}, distilled": size["distilled"] for size in sizes}
    arms |= {f"{size['value']}, labels only": size["labels"] for size in sizes}
    assert {row["row"]: float(row["mean"]) for row in rows} == pytest.approx(
        {name: arm["value"] for name, arm in arms.items()}
    )
    assert {row["seeds"] for row in rows} == {"2"}


def test_t_and_alpha_against_size_are_read_from_it(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert response([str(whole[0])]) == 0
    printed = capsys.readouterr().out
    assert "student 2" in printed
    assert "with the student's size, for ten times the parameters: " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--key", "train.lr"], "command line: capacity.key: must match"),
        (["--key", "student.args.width"], "capacity.key must begin with model., as student is not"),
        (["--values", "4", "4"], "capacity.values must be different ones, got [4, 4]"),
        (["--from", "nowhere"], "must be a run folder"),
        (["--set", "confirm.seeds=0"], "confirm.seeds must be at least 1, got 0"),
        (["--values", "[4"], "--set capacity.values: must be YAML"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from selfkd.capacity import main; "
        "assert main(['--set', 'confirm.seeds=0']) == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=600)


def test_flags_and_file_make_the_same_config(tmp_path: Path) -> None:
    from selfkd.config import load_config

    (tmp_path / "c.yaml").write_text(json.dumps({"capacity": {"values": [2, 8]}}))
    by_flag = load_config(flags={"capacity.values": [2, 8]})
    assert load_config(tmp_path / "c.yaml") == by_flag
