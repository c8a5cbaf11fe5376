"""The command, as a user runs it: real Ray, real W&B, real kills."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from wandb_server import KEY, WandbServer

from selfkd.experiments.run_folder import RunFolder
from selfkd.generations import main

TINY = [
    "model.args={width: 4}",
    "train.epochs=3",
    "search.trials=3",
    "confirm.seeds=2",
    "tracking=offline",
    "resources.cpu=1.5",  # one worker of one thread: two would start, or wait for each other
]


def command(*arguments: str, settings: list[str] = TINY) -> list[str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "selfkd.generations", *arguments, *sets]


def run(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, **options), cwd=folder, capture_output=True, text=True, timeout=600
    )


def ledger(folder: Path) -> list[dict[str, Any]]:
    """A run's results without what a clock measured, its weights by their hash."""
    timed = ("seconds", "train_seconds", "history")
    paths = sorted(folder.glob("generation_*/result.json"))
    return [
        {k: v for k, v in json.loads(path.read_text()).items() if k not in timed} for path in paths
    ]


def running(driver: int) -> list[str]:
    """Return the names of all processes that a driver has started."""
    names = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(process.name())
    return names


@dataclass(frozen=True)
class Online:
    """An undisturbed run with a W&B server, and with secrets in its environment."""

    folder: Path
    done: subprocess.CompletedProcess[str]
    server: WandbServer
    planted: dict[str, str]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    folder, home = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("home")
    names = ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    planted = {name: secrets.token_hex(20) for name in names} | {"WANDB_API_KEY": KEY}
    own = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
    with WandbServer() as server, own as ray:  # a cluster of its own
        given = {"WANDB_BASE_URL": server.url, "HOME": str(home)}
        done = subprocess.run(
            command("--rounds", "2", "--name", "whole", settings=[*TINY, "tracking=auto"]),
            cwd=folder,
            env=os.environ | planted | given | {"RAY_AUTH_MODE": "token", "RAY_TMPDIR": ray},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        yield Online(folder / "runs" / "whole", done, server, planted)


@pytest.fixture(scope="module")
def whole(online: Online) -> tuple[Path, str]:
    """Two born-again generations, undisturbed: the folder and what was printed."""
    assert "Traceback" not in online.done.stderr
    return online.folder, online.done.stdout


def test_prints_what_it_does_a_table_and_what_to_type_next(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    assert "generation 0 on labels, then 2 born-again (3 in all), 3 trials each" in printed
    for column in ("test acc, 2 seeds", "gain, points", "T", "alpha"):
        assert re.search(rf"\s{column}\s", printed), column
    for result in ledger(folder)[1:]:
        row = rf"\n {result['generation']} .* {result['temperature']:.2f} +{result['alpha']:.2f}"
        assert re.search(row, printed)
    assert re.search(r"\n ensemble of all ", printed)
    assert re.search(r"\nmodel:   generation \d, the best of 3 on validation\n", printed)
    assert f'model = selfkd.load("{folder}")' in printed
    assert re.search(r"\ntime:    \d+\.\d s on 1 worker\n", printed)
    assert f"--resume {folder} --rounds 3" in printed
    assert "NLL" not in printed
    assert printed.count("  trial 0: val") == 3  # plain lines where there is no terminal
    assert printed.count("  confirm 2, trial") == 2


def test_prints_what_fresh_seeds_confirm_and_all_of_it_when_asked(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, printed = whole
    assert "3 trials each, confirmed on 2 fresh seeds" in printed
    summary = json.loads((folder / "summary.json").read_text())
    rows = summary["confirmations"]
    for row in rows:
        line = rf"\n {row['generation']} +{row['mean']['value']:.2%}"
        assert re.search(line, printed)
    assert main(["--resume", str(folder), "--verbose"]) == 0
    printed = capsys.readouterr().out
    for column in ("val acc", "test acc", "NLL", "ECE", "agreement", "seconds"):
        assert re.search(rf"\s{column}\s", printed), column
    for result in ledger(folder):
        row = rf"\n {result['generation']} .*{result['test_accuracy']:.2%}"
        assert re.search(row, printed)
    assert f" {rows[2]['mcnemar']['p']:.2g} " in printed
    assert all(sentence in printed.splitlines() for sentence in summary["verdict"]["sentences"])
    assert re.search(r"\nmean test accuracy by generation:  [▁-█]{3}  \(", printed)
    tables = [line for line in printed.splitlines() if line.startswith(" ")]
    assert max(len(line.rstrip()) for line in tables if "trial" not in line) <= 80


def test_run_folder(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    assert (folder / "config.yaml").exists()
    for generation in range(3):
        path = folder / f"generation_{generation:03d}"
        assert (path / "student.safetensors").exists()
        assert json.loads((path / "result.json").read_text())["generation"] == generation
    stored = list((folder / "targets").rglob("shard_00000.safetensors"))
    assert len(stored) == 2  # of each teacher once, for all trials
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["generations"]) == 3
    assert (summary["controls"], summary.get("stopped")) == ([], None)
    assert 0 < summary["ensemble"]["test_accuracy"] <= 1
    report = (folder / "report.html").read_text()
    assert "unfinished" not in report
    assert all(result["hash"] in report for result in ledger(folder))
    (start,) = json.loads((folder / "environment.json").read_text())
    assert start["versions"]["ray"]


def test_each_generation_is_distilled_from_the_one_before(whole: tuple[Path, str]) -> None:
    first, second, third = ledger(whole[0])
    assert first["teachers"] == []
    assert [t["hash"] for t in second["teachers"]] == [first["hash"]]
    assert [t["hash"] for t in third["teachers"]] == [second["hash"]]
    assert len({first["hash"], second["hash"], third["hash"]}) == 3


def test_wandb_has_a_run_a_trial_and_the_lineage(online: Online) -> None:
    folder, server = online.folder, online.server
    assert "W&B: online, project selfkd, group whole\n" in online.done.stdout
    run_id = RunFolder(folder).run_id
    trials = [f"{run_id}-g{generation}-t{trial}" for generation in range(3) for trial in range(3)]
    trials += [f"{run_id}-confirm-{generation}-t{n}" for generation in range(3) for n in range(2)]
    assert sorted(server.runs) == sorted([*trials, f"{run_id}-lineage"])
    lineage = server.runs[f"{run_id}-lineage"]
    every = lineage.history
    assert [row["generation"] for row in every] == [0, 1, 2, 0, 1, 2]
    rows, confirmed = every[:3], every[3:]
    assert all("confirmed/test_accuracy" in row for row in confirmed)
    assert [row["test_accuracy"] for row in rows] == pytest.approx(
        [result["test_accuracy"] for result in ledger(folder)]
    )
    assert "generation" in lineage.summary["verdict"]
    assert lineage.summary["test_accuracy_over_generation_0"]["_type"] == "html-file"
    models = [version for version in server.versions if version.type == "model"]
    first = next(model for model in models if "generation-0" in model.aliases)
    students = {name for name in server.runs if "-g1-t" in name or "-confirm-1-t" in name}
    assert len(students) == 5
    assert first.consumers == students
    assert not server.unknown


def test_no_secret_of_its_environment_is_in_what_it_writes_prints_or_sends(
    online: Online,
) -> None:
    folder = online.folder.parents[1]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {".wandb", ".safetensors", ".html"} <= {path.suffix for path in files}
    contents = {str(path): path.read_bytes() for path in files} | {"sent": online.server.seen}
    contents |= {"stdout": online.done.stdout.encode(), "stderr": online.done.stderr.encode()}
    found = [
        (name, where)
        for name, value in online.planted.items()
        for where, content in contents.items()
        if value.encode() in content
    ]
    assert found == []


def test_finished_run_is_only_reported_again(whole: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = whole
    before = ledger(folder)
    done = run(tmp_path, "--resume", str(folder), settings=[])
    assert done.returncode == 0, done.stdout + done.stderr
    assert ledger(folder) == before
    tables = [
        re.findall(r"generation +test acc.*ensemble[^\n]*", text, re.DOTALL)[0]
        for text in (printed, done.stdout)
    ]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        pytest.param(  # test_resume has a kill too, and faults have many
            signal.SIGKILL, "generation_001/trial_001/result.json", marks=pytest.mark.slow
        ),
        pytest.param(  # test_pseudo_terminal presses Ctrl-C, test_killed_driver compares the bits
            signal.SIGINT, "generation_000/trial_000/result.json", marks=pytest.mark.slow
        ),
        pytest.param(  # a job that is stopped, in test_submit, gets this
            signal.SIGTERM, "generation_001/result.json", marks=pytest.mark.slow
        ),
    ],
    ids=["kill", "ctrl-c", "terminate"],
)
def test_stopped_and_resumed_equals_undisturbed(
    whole: tuple[Path, str], tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    """The same weights and figures, bit for bit, wherever the driver was stopped."""
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command("--rounds", "2", "--name", "stopped"),
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        folder = tmp_path / "runs" / "stopped"
        deadline = time.monotonic() + 600
        while not (folder / moment).exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        names = running(process.pid)
        process.send_signal(number)
        code = process.wait(timeout=600)
    assert any(name.startswith("ray::") for name in names)
    assert not any(name.startswith("ray-dashboard") for name in names)  # but with --verbose
    assert len(ledger(folder)) < 3, "it was done before it was stopped"
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        assert f"--resume {folder}" in log.read_text()
        assert "Traceback" not in log.read_text()
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    done = run(tmp_path, "--resume", str(folder), settings=[])
    assert done.returncode == 0, done.stdout + done.stderr
    assert ledger(folder) == ledger(whole[0])
    assert all(path.stat().st_mtime_ns == moment for path, moment in finished.items())
    runs = [path.name.split("-", 3)[-1] for path in folder.glob("wandb/offline-run-*")]
    assert len(runs) == len(set(runs)), "a resumed run doubled in W&B"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "trian.lr=1"], "--set: trian: unknown key: did you mean train"),
        (
            ["--set", "train.epochs=many"],
            "--set: train.epochs: must be a valid integer, got 'many'",
        ),
        (["--set", "distill.alpha=1.5"], "distill.alpha: must be less than or equal to 1, got 1.5"),
        (["--set", "distill.temperature=0"], "distill.temperature: must be greater than 0, got 0"),
        (["--set", "distill.temperature=.nan"], "must be a finite number, got nan"),
        (["--rounds", "-1"], "rounds: must be a whole number of at least 0, or auto, got -1"),
        (["--set", "search.space={x.y: {uniform: [0, 1]}}"], "x.y: is no config key"),
        (
            ["--set", "search.space.distill.alpha={uniform: [1, 0]}"],
            "uniform must have low < high, got [1, 0]",
        ),
        (["--config", "nowhere.yaml"], "--config must be a readable file, got nowhere.yaml"),
        (["--resume", "nowhere"], "--resume must be a run folder"),
        (["--set", "storage=/dev/null"], "must be writable"),
        (["--rounds", "some"], "rounds: must be a whole number of at least 0, or auto, got 'some'"),
        (
            ["--rounds", "auto", "--set", "confirm.seeds=2"],
            "confirm.seeds: must be at least 3 with",
        ),
        (
            ["--train", __file__ + ":main", "--set", "controls=[dkpp]"],
            "controls must be empty with --train",
        ),
        (["--name", "a/b"], "name: must match"),
        (["--set", "tracking=online"], "tracking.mode must be offline where there is no key"),
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


def test_an_existing_run_is_not_overwritten(
    whole: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = whole
    monkeypatch.chdir(folder.parents[1])
    before = ledger(folder)
    assert main(["--name", "whole"]) == 2
    assert "exists already: continue it with --resume" in capsys.readouterr().err
    assert ledger(folder) == before


def test_resume_with_a_changed_config_says_what_differs(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(whole[0]), "--set", "train.lr=0.3", "--seed", "4"]) == 2
    error = capsys.readouterr().err
    assert "train.lr: 0.05 -> 0.3" in error
    assert "seed: 0 -> 4" in error


@pytest.mark.slow  # test_submit has the last as a job, execution/test_cluster the others
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["resources.gpu=1"], r"asked for 1 CPU and 1 GPU a trial, .* has \d+ CPU and 0 GPU"),
        (["resources.workers=999"], r"resources.workers must be at most \d+, .* got 999"),
        (["model.name=selfkd_cmn"], r"timm model name, got 'selfkd_cmn': did you mean selfkd_cnn"),
    ],
)
def test_what_only_the_workers_can_know_is_code_2_too(
    tmp_path: Path, settings: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run(tmp_path, "--name", "a", settings=settings)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "a").exists()  # so that the name is free again


def test_console_script_has_the_same_sub_commands() -> None:
    script = Path(sys.executable).with_name("selfkd")
    listed = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=True)
    assert "generations" in listed.stdout
    helped = subprocess.run(
        [str(script), "generations", "--help"], capture_output=True, text=True, check=True
    )
    assert "--rounds" in helped.stdout
    assert subprocess.run([str(script), "nonsense"], capture_output=True).returncode == 2


def test_import_needs_neither_ray_nor_wandb_nor_torch() -> None:
    code = "import selfkd, sys; print([m for m in ('ray', 'wandb', 'torch') if m in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    assert printed.strip() == "[]"


def test_a_damaged_row_is_one_message(
    whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    (folder / "generation_001" / "result.json").write_text("{")
    assert main(["--resume", str(folder)]) == 2
    assert "generation_001/result.json is damaged" in capsys.readouterr().err


@pytest.mark.slow  # experiments/test_confirm and test_controls have it in one process
def test_auto_stops_and_controls_are_added_to_a_finished_run(tmp_path: Path) -> None:
    """Two epochs are not enough for a gain: it stops; what is asked for later is done alone."""
    settings = [
        *("data.train_size=100", "model={name: selfkd_mlp, args: {width: 8, depth: 1}}"),
        *("train.epochs=2", "search.trials=2", "confirm.seeds=3", "rounds_max=3", "tracking=none"),
        # soft targets of next to no weight change next to nothing
        "search.space={distill.alpha: {uniform: [0, 0.001]}}",
    ]
    done = run(tmp_path, "--rounds", "auto", "--name", "auto", settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "at most 3 born-again, until two in a row show no gain" in done.stdout
    folder = tmp_path / "runs" / "auto"
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["generations"]) == 3
    assert summary["stopped"] in done.stdout.splitlines()
    assert summary["stopped"].startswith("stopped after generation 2: ")
    before = ledger(folder)
    more = ["controls=[seeds, label_smoothing, dkpp, teacher_free]"]
    done = run(tmp_path, "--resume", str(folder), settings=more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ledger(folder) == before
    summary = json.loads((folder / "summary.json").read_text())
    names = ["seeds", "label_smoothing", "dkpp", "teacher_free"]
    assert [row["name"] for row in summary["controls"]] == names
    for row in summary["controls"]:
        assert re.search(rf"\n {row['title']} +{row['mean']['value']:.2%}", done.stdout)
    sentences = summary["verdict"]["sentences"]
    assert sentences[-1] == summary["against_controls"]["sentences"][0]
    assert all(sentence in done.stdout.splitlines() for sentence in sentences)
    again = run(tmp_path, "--resume", str(folder), settings=[])
    assert "no trial was left to run" not in again.stdout  # it did not even start Ray
    assert again.stdout.count("teacher-free") == done.stdout.count("teacher-free") - 1


@pytest.mark.slow  # tests/tasks/text has the parts of it in one process
def test_a_language_model_is_born_again(tmp_path: Path) -> None:
    tiny = [
        "data={context: 16, tokenizer: 'bpe:260'}",
        "model.args={depth: 1, width: 8, heads: 2}",
        "train={steps: 8, epochs: 2, warmup_steps: 2}",
        "search.trials=2",
        "confirm.seeds=2",
    ]
    given = ("--task", "text", "--rounds", "2", "--name", "a", "--set", "tracking=none")
    found = run(tmp_path, *given, settings=tiny)
    assert found.returncode == 0, found.stderr
    assert "pydoc of Python 3." in found.stdout
    assert "test NLL, 2 seeds" in found.stdout
    first, *others = ledger(tmp_path / "runs" / "a")
    assert first.keys() >= {"val_nll", "test_perplexity", "test_bits_per_byte"}
    assert [row["agreement"] > 0 for row in others] == [True, True]
    again = run(tmp_path, *given[:4], "--name", "b", *given[6:], settings=tiny)
    assert again.returncode == 0, again.stderr
    assert ledger(tmp_path / "runs" / "b") == ledger(tmp_path / "runs" / "a")
