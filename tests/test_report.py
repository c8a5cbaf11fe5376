"""`python -m selfkd.report`, as a user runs it."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import (
    DATA,
    add_deployment,
    capacity_run,
    deploy_run,
    ensemble_run,
    generations_run,
    study_run,
)

from selfkd import report
from selfkd.storage.remote import PLAIN_URI

BASE, OTHER = ("run-a", {}), ("run-b", {"lift": 0.01, "settings": ("train.lr=0.1",)})


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs that can be compared; the working folder is theirs."""
    for name, options in (BASE, OTHER):
        generations_run(tmp_path / name, **options)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_run_gets_its_page_and_its_table(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["run-a"]) == 0
    printed = capsys.readouterr().out
    assert "Born-again generations 1 and 2, taken together, are better than gen" in printed
    assert "vs gen. 0, points" in printed
    assert f"report:  {runs / 'run-a' / 'report.html'}" in printed
    assert 20_000 < (runs / "run-a" / "report.html").stat().st_size < 1_000_000


def test_several_runs_get_one_page_and_a_verdict(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["run-a", "run-b"]) == 0
    printed = capsys.readouterr().out
    assert "run-b is better than run-a: +" in printed
    assert "3 paired seeds" in printed
    assert "run-b is better than run-a" in (runs / "comparison.html").read_text()


def test_different_data_are_compared_unpaired_and_it_says_why(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(DATA, fingerprints={"train": "eeee", "val": "", "test": "ffff"})
    generations_run(runs / "run-c", data=other)
    assert report.main(["run-a", "run-c", "--format", "table"]) == 0
    printed = capsys.readouterr().out
    assert (
        "unpaired (Welch, 3 and 3 seeds), their data differ (train/test digits eeee/ffff" in printed
    )
    assert not (runs / "comparison.html").exists()


def test_repeats_over_seeds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generations_run(runs / "run-d", seed=1)
    assert report.main(["run-a", "run-d", "--format", "table"]) == 0
    printed = capsys.readouterr().out
    assert "paired in 2 runs that differ in their seed alone" in printed


def test_csv_has_a_row_a_generation(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["run-a", "run-b", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["run"], row["row"]) for row in rows[:4]] == [
        *(("run-a", f"generation {k}") for k in range(3)),
        ("run-a", "ensemble of all"),
    ]
    result = json.loads((runs / "run-b" / "generation_002" / "result.json").read_text())
    assert float(rows[6]["test_accuracy"]) == result["test_accuracy"]
    assert rows[6]["seeds"] == "3"


def test_json_is_whole_and_valid(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "run-a" / "generation_001" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "test_nll": float("nan")}))
    assert report.main(["run-a", "run-b", "--format", "json"]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(name)

    tree = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [run["name"] for run in tree["runs"]] == ["run-a", "run-b"]
    assert tree["runs"][0]["rows"][1]["test_nll"] is None
    assert tree["comparisons"][0]["paired"] is True


@pytest.mark.parametrize("form", ["html", "table", "csv", "json"])
def test_output_goes_where_it_is_sent(
    runs: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    assert report.main(["run-a", "--format", form, "--output", "deep/out"]) == 0
    assert len((runs / "deep" / "out").read_text()) > 200
    assert not (runs / "run-a" / "report.html").exists()
    assert len(capsys.readouterr().out.splitlines()) <= 1


def test_a_run_that_goes_on_is_marked(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generations_run(runs / "going", rounds=4, done=2)
    assert report.main(["going"]) == 0
    assert "unfinished: 2 of 5 generations done" in capsys.readouterr().out
    assert report.main(["run-a", "going", "--format", "table"]) == 0
    printed = capsys.readouterr().out
    assert "going is unfinished" in printed
    assert "generation 1 against generation 2" in printed


def test_what_was_deployed_of_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_deployment(ensemble_run(runs / "many"))
    assert report.main(["many", "--format", "table"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("Share of the teacher's gain kept") < printed.index("beside float")
    assert "Generation 3 is served as ONNX int8" in printed
    assert report.main(["many", "run-a"]) == 0
    assert report.main(["many", "--format", "csv"]) == 0
    assert 'many,ensemble,True,"deployed, ONNX int8"' in capsys.readouterr().out.replace("'", "")


def test_a_run_of_an_ensemble(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensemble_run(runs / "many")
    assert report.main(["many"]) == 0
    assert "Share of the teacher's gain kept: 72.00 % [31.00, 420.00]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "verdict"),
    [
        (capacity_run, "Distilled students of 3 sizes, taken together, are better"),
        (study_run, "Distilled is better than labels"),
        (deploy_run, "Generation 3 is served as ONNX int8"),
    ],
)
def test_what_stands_side_by_side_is_not_compared(
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Path],
    verdict: str,
) -> None:
    make(runs / "own")
    assert report.main(["own"]) == 0
    assert verdict in capsys.readouterr().out
    assert report.main(["run-a", "own"]) == 2
    assert f"stands alone, got {runs / 'own'}" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["html", "table", "csv", "json"])
def test_a_damaged_file_is_named_and_the_rest_reported(
    runs: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    damaged = runs / "run-a" / "generation_001" / "result.json"
    damaged.write_text("{")
    assert report.main(["run-a", "run-b", "--format", form]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"warning: {damaged} is damaged")
    text = (runs / "comparison.html").read_text() if form == "html" else captured.out
    assert (
        "run-b,generations,True,generation 2," if form == "csv" else "run-b is better than run-a"
    ) in text


def test_runs_of_the_same_name_are_called_by_their_paths(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generations_run(runs / "elsewhere" / "run-a", lift=0.01, settings=("train.lr=0.1",))
    assert report.main(["run-a", "elsewhere/run-a", "run-a/", "--format", "json"]) == 0
    names = [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert names == [str(runs / "run-a"), str(runs / "elsewhere" / "run-a")]


FAULTS = [
    (["nothing"], "error: RUN must be a run folder (with a config.yaml), got {}/nothing"),
    (["empty"], "error: RUN must have a result, got {}/empty, where no trial has ended yet"),
    (["s3://key:secret@bucket/a"], f"error: a path {PLAIN_URI}"),
    (["run-a", "nothing"], "error: RUN must be a run folder (with a config.yaml), got {}/nothing"),
]


@pytest.mark.parametrize(("arguments", "message"), FAULTS)
def test_a_mistake_is_one_message(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (runs / "empty").mkdir()
    (runs / "empty" / "config.yaml").write_text("format: 1\nrounds: 1\n")
    assert report.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == message.format(runs) + "\n"
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["run-a", "--format", "pdf"]])
def test_usage(runs: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        report.main(arguments)
    assert caught.value.code == 2


def test_a_place_that_cannot_be_written_is_named(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "file").write_text("")
    assert report.main(["run-a", "--format", "html", "--output", "file/report.html"]) == 1
    assert "choose an --output" in capsys.readouterr().err


def test_the_commands_start_without_torch_and_jinja() -> None:
    code = (
        "import sys, selfkd.report, selfkd.generations, selfkd.ensemble, selfkd.reporting.watch;"
        "print([m for m in ('torch', 'jinja2', 'scipy', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_report_needs_no_torch(runs: Path) -> None:
    code = (
        "import sys, selfkd.report; code = selfkd.report.main(['run-a', 'run-b']);"
        "print(code, [m for m in ('torch', 'ray', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
