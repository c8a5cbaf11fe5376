"""What a person sees of a command, on terminals of 80 and 120 columns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pseudo_terminal import Terminal
from run_folders import capacity_run, ensemble_run, generations_run, study_run

WIDTHS = pytest.mark.parametrize("width", [80, 120])
STUCK = """
import sys, time
from contextlib import contextmanager
from selfkd.execution import cluster
from selfkd.generations import main

@contextmanager
def connect(**options):
    time.sleep(600)  # as Ray takes seconds
    yield False

cluster.connect = connect
sys.exit(main(sys.argv[1:]))
"""
"""A run whose Ray never comes up."""
TINY = (
    *("--rounds", "0", "--set", "model={name: selfkd_mlp, args: {width: 8}}"),
    *("--set", "train.epochs=100", "--set", "data.train_size=100", "--set", "search.trials=1"),
    *("--set", "confirm.seeds=0", "--set", "tracking=none"),
)


@WIDTHS
def test_ctrl_c_while_ray_starts_leaves_how_to_continue(tmp_path: Path, width: int) -> None:
    words = ["--name", "a", "--set", "tracking=none"]
    with Terminal([sys.executable, "-c", STUCK, *words], tmp_path, width) as terminal:
        terminal.until(lambda screen: "starting Ray … 0:00:0" in screen.text)
        assert "━" not in terminal.screen.text  # no bar of nothing
        terminal.press("\x03")
        assert terminal.end() == 130
        said = "stopped; continue with:\n  python -m selfkd.generations --resume "
        assert said in terminal.screen.text
        assert "starting Ray" not in terminal.screen.text
        assert terminal.screen.cursor


def test_a_run_is_stopped_and_continued_to_its_end(tmp_path: Path) -> None:
    """With the real Ray: stopped on a narrow terminal, continued on a wide one."""
    command = [sys.executable, "-m", "selfkd.generations"]
    with Terminal([*command, "--name", "a", *TINY], tmp_path, 80) as terminal:
        terminal.until(lambda screen: "generation 0 of 0\n━" in screen.text)
        assert "starting Ray, 1 worker …" in terminal.raw
        terminal.press("\x03")
        assert terminal.end() == 130
        assert "stopped; continue with:" in terminal.screen.text
        assert "━" not in terminal.screen.text
        assert terminal.screen.cursor
    run = tmp_path / "runs" / "a"
    with Terminal([*command, "--resume", str(run)], tmp_path, 120) as terminal:
        assert terminal.end() == 0
        lines = terminal.screen.lines
        assert f'load:    model = selfkd.load("{run}")' in lines
        assert f"report:  {run / 'report.html'}" in "".join(lines)
        assert f"next:    python -m selfkd.generations --resume {run} --rounds 1" in "".join(lines)
        assert terminal.screen.cursor


FINISHED = {
    "generations": ("test acc, 3 seeds", "gain, points", "T", "alpha"),
    "ensemble": ("test acc", "parameters", "ms, 1", "ms, 128"),
    "capacity": ("labels only", "distilled", "difference, points", "distillation"),
    "study": ("test acc", "seeds", "test errors"),
}
"""Columns of each command."""
AGAIN = f"""
from selfkd import capacity, ensemble, generations, study

for command in ({", ".join(FINISHED)}):
    command.main(["--resume", command.__name__.removeprefix("selfkd.")])
    print("====")
"""


@WIDTHS
def test_a_finished_run_is_whole_on_a_terminal(tmp_path: Path, width: int) -> None:
    for make in (generations_run, ensemble_run, capacity_run, study_run):
        make(tmp_path / make.__name__.removesuffix("_run"))
    with Terminal([sys.executable, "-c", AGAIN], tmp_path, width) as terminal:
        assert terminal.end() == 0, terminal.screen.text
        *parts, _ = terminal.screen.text.split("====\n")
    for text, (command, columns) in zip(parts, FINISHED.items(), strict=True):
        assert "hidden" not in text
        for column in columns:
            assert f" {column}" in text
        lines = text.splitlines()
        rule = next(number for number, line in enumerate(lines) if line.startswith(" ──"))
        after = [line.partition(":")[0] for line in lines[rule:] if ":  " in line]
        loaded = command in ("generations", "ensemble")
        assert after == [*(["model", "load"] if loaded else ["models"]), "report", "next"]
        assert len([line for line in lines if line]) < 30
