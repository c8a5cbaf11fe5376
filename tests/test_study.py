"""`python -m selfkd.study`, as a user runs it: real Ray, real offline W&B; and its table."""

from __future__ import annotations

import csv
import html
import io
import re
import subprocess
from pathlib import Path

import pytest
from commands import run_here

from selfkd.report import main as report
from selfkd.storage.files import load_json
from selfkd.study import main

STUDY = """
data: {name: digits}
model: {name: selfkd_mlp, args: {width: 16, depth: 1}}
train: {epochs: 2}
confirm: {seeds: 2}
tracking: offline
resources: {cpu: 1.5}  # one worker of one thread: two would start, or wait for each other
study:
  arms:
    labels: {}
    no_three: {teacher: labels, set: {data.classes: [0, 1, 2, 4, 5, 6, 7, 8, 9]}}
    both: {average: [labels, no_three]}
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here(main, folder, *arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "study.yaml").write_text(STUDY)
    done = run(folder, "--config", "study.yaml", "--name", "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder / "runs" / "whole", done.stdout


def test_prints_what_it_does_a_table_and_verdicts(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, printed = whole
    summary = load_json(folder / "summary.json")
    assert "3 arms (labels, no_three, both) on digits, 4 trainings on 2 seeds" in printed
    assert [sentence in printed for sentence in summary["verdict"]["sentences"]] == [True] * 3
    assert [(row["arm"], row["to"]) for row in summary["contrasts"]] == [
        ("no_three", "labels"),
        ("both", "labels"),
    ]
    assert "test errors  unseen acc  with one bias" in re.sub(r" {2,}", "  ", printed)
    assert main(["--resume", str(folder), "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert "test accuracy on the classes that no_three saw no image of; one bias: with" in printed
    assert "report.html" in printed


def test_every_student_is_tracked(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    assert len(list(folder.glob("wandb/offline-run-*"))) == 4


def table(printed: str) -> list[list[str]]:
    """Return the rows of the table of arms."""
    lines = printed.splitlines()
    return [line.split() for line in lines if re.match(" (labels|no_three|both) ", line)]


def test_a_finished_study_prints_its_table_again(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    again = run(folder.parents[1], "--resume", str(folder))
    assert again.returncode == 0
    assert len(table(printed)) == 3
    assert table(again.stdout) == table(printed)


def test_a_study_has_a_report(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, printed = whole
    page = (folder / "report.html").read_text()
    assert f"report:  {folder / 'report.html'}" in " ".join(printed.split("\n"))
    summary = load_json(folder / "summary.json")
    assert "Arms side by side" in page
    for sentence in summary["verdict"]["sentences"]:
        assert sentence[1:40] in html.unescape(page)
    assert report([str(folder), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    means = {arm["name"]: arm["mean"]["value"] for arm in summary["arms"]}
    assert {row["row"]: float(row["mean"]) for row in rows} == pytest.approx(means)
    assert report([str(folder), str(folder.parent)]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "study.arms must have at least one arm"),
        (["--from", "nowhere", "--set", "study.arms={a: {}}"], "must be a run folder"),
        (["--set", "study.arms={a: {teacher: b}}"], "must name arms that stand before it"),
        (["--set", "study.arms={a: {seeds: 0}}"], "study.arms.a.seeds: must be"),
        (["--set", "study.arms={a: {}}", "--set", "confirm.seeds=0"], "must be at least 1, got 0"),
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
