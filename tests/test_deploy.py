"""`python -m selfkd.deploy`: what it refuses before anything starts, and once as a user runs it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from selfkd.config import load_config, to_tree
from selfkd.deploy import _again, _network_of, main, make_parser
from selfkd.execution.jobs import InProcess, run_one
from selfkd.experiments.arms import Run
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import DeploySummary, Facts
from selfkd.storage.rows import load_row, save_row
from selfkd.worker.jobs import run_job

TINY = (
    "model={name: selfkd_mlp, args: {width: 8, depth: 1}}",
    *("data.train_size=100", "data.val_size=50", "train.epochs=1"),
    *("search.trials=1", "confirm.seeds=0", "rounds=0", "tracking=none", "resources.cpu=1.5"),
)


def make_run(folder: Path, *, trained: bool = True) -> Path:
    config = load_config(settings=TINY)
    run = RunFolder.create(folder, config)
    if trained:
        born_again(
            Run(config=config, folder=run, executor=InProcess(run_job), events=lambda event: None)
        )
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a")


def test_a_user_deploys_a_run(trained: Path) -> None:
    command = [sys.executable, "-m", "selfkd.deploy", "--from", str(trained)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for words in ("torch", "ONNX float", "ONNX int8", "agreement", "int8.onnx"):
        assert words in done.stdout
    summary = load_row(DeploySummary, trained / "deploy" / "deploy.json")
    assert summary.row("int8").operators["MatMul"] == 2
    assert "Deployed" in (trained / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--from must be given"),
        (["--from", "nowhere"], "--from must be a run folder"),
        (["--checkpoint", "nowhere.safetensors"], "--checkpoint must be a file of weights"),
        (["--checkpoint", "{trained}"], "--from {trained}"),
        (["--from", "{trained}", "--prune", "1"], "deploy.prune"),
        (["--from", "{trained}", "--bits", "5"], "deploy.bits"),
        (["--from", "{trained}", "--max-drop", "-1"], "deploy.max_drop"),
        (["--from", "{trained}", "--set", "deploy.calibration=31"], "deploy.calibration"),
        (["--from", "{trained}", "--generation", "3"], "generation must be one of"),
        (["--from", "{trained}", "--make-model", "a.py:f"], "--make-model must be left out"),
        (["--from", "{trained}", "--set", "train.epochs=3"], "train.epochs"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    trained: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(trained=trained) for word in arguments]) == 2
    assert said.format(trained=trained) in capsys.readouterr().err


def test_a_run_without_a_finished_generation_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "a", trained=False)
    assert main(["--from", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "must have a finished generation" in said
    assert f"--resume {folder}" in said


def test_a_run_of_another_network_needs_the_function_that_makes_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "a")
    save_row(folder / "data.json", Facts(function="/nowhere/train.py:train"))
    assert main(["--from", str(folder)]) == 2
    assert "--make-model FILE.py:FUNCTION" in capsys.readouterr().err
    given = ["--make-model", f"{tmp_path}/net.py:make"]
    assert main(["--from", str(folder), *given]) == 2
    assert "with a file that is there, got" in capsys.readouterr().err
    (tmp_path / "net.py").touch()
    assert main(["--from", str(folder), *given, "--prune", "0.5"]) == 2
    assert "--prune must be left out with --make-model" in capsys.readouterr().err


WEIGHTS = ["--checkpoint", "{trained}/best.safetensors"]


@pytest.mark.parametrize(
    ("flag", "arguments"),
    [
        ("--generation", [*WEIGHTS, "--generation", "1"]),
        ("--ensemble", [*WEIGHTS, "--ensemble"]),
        ("--make-model", [*WEIGHTS, "--make-model", "a.py:f"]),
        ("--checkpoint", [*WEIGHTS, "--from", "{trained}"]),
    ],
)
def test_what_only_a_run_has_is_refused_beside_weights(
    trained: Path, flag: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(trained=trained) for word in arguments]) == 2
    assert f"{flag} must be left out" in capsys.readouterr().err


def test_a_file_that_selfkd_wrote_names_its_network(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(next(trained.rglob("student.safetensors")))
    assert main(["--checkpoint", file, "--plan"]) == 0
    found = _network_of(file, [])
    assert found == {"name": "selfkd_mlp", "args": {"width": 8, "depth": 1}}
    assert _network_of(file, ["model.name=selfkd_cnn"]) is None
    assert _network_of(trained / "config.yaml", []) is None


def test_what_continues_a_deployment_repeats_what_the_run_has_nothing_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--from a b --generation 1 --prune 0.5 --ensemble --make-model n.py:f --labels 9"
    given = ["--from", "a b", *words.split()[3:], "--set", "deploy.seeds=2"]
    again = shlex.split(_again(make_parser().parse_args(given)))
    assert again == [
        *("--prune", "0.5", "--ensemble", "--generation", "1"),
        *("--make-model", f"{tmp_path}/n.py:f"),
        *("--set", "deploy.seeds=2", "--set", "data.train_size=9"),
    ]


def test_without_the_extra_it_says_how_to_get_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["--from", str(trained), "--ensemble"]) == 2
    assert "pip install 'selfkd[deploy]'" in capsys.readouterr().err
    (row,) = run_job("deploy_time", {"config": {}, "forms": {}, "reference": "float"})
    assert "needs onnxruntime, not installed here" in row["fault"]  # on a worker


def test_a_network_of_a_users_own_is_exported(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from selfkd.models import make_model\n"
        "def make(classes=10):\n"
        "    args = {'width': 8, 'depth': 1}\n"
        "    shape = {'in_chans': 1, 'image_size': 8}\n"
        "    return make_model('selfkd_mlp', args, num_classes=classes, **shape)\n"
        "def other():\n"
        "    return make(3)\n"
        "def fails():\n"
        "    return {}['key']\n"
        "def after(work):\n"
        "    network = make()\n"
        "    network.register_forward_hook(lambda module, inputs, logits: work(logits))\n"
        "    return network\n"
        "def broken():\n"
        "    return after(lambda logits: logits * float('nan'))\n"
        "def alone():\n"
        "    return after(lambda logits: logits[0])\n"
    )
    model = RunFolder(trained).results()[0].models[0]
    payload = {
        "config": to_tree(load_config(settings=TINY)),
        "members": [{"checkpoint": str(trained / model.checkpoint)}],
        "make_model": f"{tmp_path / 'net.py'}:make",
        "path": str(tmp_path / "float.onnx"),
    }
    row = run_one(InProcess(run_job), "deploy_export", **payload)
    assert row["inputs"] == 50
    assert row["difference"] < 1e-5
    assert (tmp_path / "float.onnx").stat().st_size == row["bytes"]
    for name, said in {
        "other": "--make-model must make the network of",
        "fails": "without arguments, got .*: KeyError",
        "broken": "must give logits that are numbers, got NaN",
        "alone": r"must give 10 logits for each of 3 inputs of data.name digits, got \[10\]",
    }.items():
        payload["make_model"] = f"{tmp_path / 'net.py'}:{name}"
        row = run_one(InProcess(run_job), "deploy_export", **payload)
        assert re.search(said, row["fault"])
