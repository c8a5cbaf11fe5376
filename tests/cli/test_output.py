"""stdout and stderr that are closed, full, or of few characters: the work goes on."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfkd.cli.output import SafeStream, print_data, print_error, safe_output
from selfkd.cli.progress import ProgressReporter
from selfkd.cli.terminal import make_console, print_lines, print_table
from selfkd.config import Config
from selfkd.reporting.tables import Table
from selfkd.results import Message, StageStarted, TaskStarted, TrialFinished, TrialResult

WORK = """
import sys
from selfkd.cli.output import print_error, safe_output
from selfkd.cli.progress import ProgressReporter
from selfkd.cli.terminal import make_console, print_lines
from selfkd.config import Config
from selfkd.results import Message

@safe_output()
def main():
    console = make_console()
    with ProgressReporter(console, Config()) as reporter:
        for number in range(3000):
            reporter(Message(f"{number} ± – ▁ → \\x1b[2J \\udcff"))
    print_lines(console, ["the end"])
    print_error("said")
    open(sys.argv[1], "w").write("done")
    return 0

raise SystemExit(main())
"""
HOSTILE = "a\x1b]0;x\x07\x9b2Jb\u202ec\u2066\udcff\rd"


@pytest.mark.parametrize(
    "streams",
    [
        "| head -1",
        "2>&1 | head -1",
        "| true",
        "> /dev/full",
        "> /dev/full 2> /dev/full",
        "2> /dev/full",
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
    ],
)
def test_the_work_is_done_whatever_becomes_of_the_output(streams: str, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    done = subprocess.run(
        [
            *("bash", "-c"),
            f"PYTHONIOENCODING=ascii {sys.executable} work.py out {streams}; "
            "echo codes ${PIPESTATUS[0]}",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.endswith("codes 0\n")
    assert (tmp_path / "out").read_text() == "done"
    for word in ("Traceback", "Exception ignored", "Error", "\x1b"):
        assert word not in done.stdout + done.stderr


BUDGET = "--teacher 10 --student 1 --items 5 --training 3"


@pytest.mark.parametrize(
    "words", ["selfkd --help", "selfkd.generations --help", f"selfkd.budget {BUDGET}"]
)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_commands_print_in_few_characters(words: str, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words.split()],
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": encoding, "LANG": "C"},
        check=True,
    )
    assert done.stdout.decode(encoding)
    assert done.stderr == b""


def test_what_a_program_reads_is_known_to_be_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk is a failure of `--format csv`; a reader who has seen enough is not."""
    for path, code in (("/dev/full", 1), ("/dev/null", 0)):
        with open(path, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with safe_output():
                assert print_data("x" * 100_000) == code
        assert ("not all of the output" in capsys.readouterr().err) == bool(code)


def test_plain_characters_stand_for_others() -> None:
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("▁█ 1 ± 2 – … é\n")
    stream.flush()
    assert raw.getvalue() == b"18 1 +- 2 - ... \\xe9\n"
    assert stream.fault is None


def test_a_closed_stream_is_no_fault_of_the_work() -> None:
    file = io.StringIO()
    file.close()
    stream = SafeStream(file)
    stream.write("a")
    stream.flush()
    stream.finish()
    assert isinstance(stream.fault, ValueError)


def test_streams_are_what_they_were_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with safe_output(), safe_output():
        assert isinstance(sys.stdout, SafeStream)
        assert isinstance(sys.stderr, SafeStream)
        assert not isinstance(sys.stdout._stream, SafeStream)
    assert (sys.stdout, sys.stderr) == before


def _clean(text: str) -> bool:
    return all(line.isprintable() for line in text.splitlines())


def test_no_text_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console()
    print_lines(console, [HOSTILE, f"{HOSTILE}\nerror: forged"])
    console.print(HOSTILE)
    print_table(console, Table((HOSTILE, "b"), ((HOSTILE, f"c\n{HOSTILE}"),)))
    print_error(HOSTILE)
    said = capsys.readouterr()
    assert _clean(said.out)
    assert _clean(said.err)
    assert said.out.count("\\u202e") >= 5
    assert "\nerror: forged" not in said.out
    assert len(said.out.splitlines()) <= 10


def test_nor_does_a_trial_a_note_or_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter(make_console(), Config()) as progress:
        for event in (
            StageStarted(title=HOSTILE, trials=1, done=0),
            TaskStarted(title=f"{HOSTILE}\nx", parts=2),
            Message(text=f"{HOSTILE}\nselfkd: forged"),
            TrialFinished(
                TrialResult(
                    stage="a", trial=0, seed=0, status="failed", error=f"{HOSTILE}\nselfkd: forged"
                )
            ),
        ):
            progress(event)
    out = capsys.readouterr().out
    assert _clean(out)
    assert "\nselfkd: forged" not in out
    assert "\\x1b]0;x" in out


def test_nor_does_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with safe_output():
        logging.getLogger("selfkd.test").warning("%s is damaged", HOSTILE)
    err = capsys.readouterr().err
    assert _clean(err)
    assert "is damaged" in err


def test_names_are_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines(make_console(), ["runs/a:dog:[red]b[/red]"])
    assert capsys.readouterr().out == "runs/a:dog:[red]b[/red]\n"
