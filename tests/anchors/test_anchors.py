"""The published results: what is stored is judged again; a tenth of it is run again (slow)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from selfkd.config import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "tune_configs" / "anchors").glob("*.yaml"))
FOLDER = ROOT / "examples" / "anchors"


def module(name: str) -> ModuleType:
    """Import a file of examples/anchors, which is no package."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded
        spec.loader.exec_module(loaded)
    finally:
        sys.path.pop(0)
    return loaded


module("a17_ridge")
anchors, run = module("anchors"), module("run")
STORED = [anchor for anchor in anchors.ANCHORS if (anchors.RESULTS / f"{anchor.run}.json").exists()]
MISSED = {("A14", "a14_mnist_mlp")}
"""What is known to miss its band: RESULTS.md says why."""


def recheck(name: str) -> None:
    """Judge what is stored of a run again."""
    for anchor in (anchor for anchor in STORED if anchor.run == name):
        outcome = anchor.judge(anchors.load(name)).outcome
        assert outcome != "missed" or (anchor.key, anchor.run) in MISSED, anchor.key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_command(path: Path) -> None:
    head = re.sub(r"\\?\n#\s*", " ", path.read_text())
    known = {row.name: row for row in anchors.RUNS}
    assert f"--config tune_configs/anchors/{path.name}" in head
    if path.stem in known:
        assert f"python -m selfkd.{known[path.stem].command} " in head
        teacher = known[path.stem].teacher
        assert (f"--from runs/{teacher} " in head) == ("--from" in head) == bool(teacher)
    assert re.search(r"Expected: .*minute", head)


def test_every_run_has_a_config_and_every_anchor_a_run() -> None:
    names = {row.name for row in anchors.RUNS}
    assert names <= {path.stem for path in CONFIGS}
    assert {anchor.run for anchor in anchors.ANCHORS} <= names


@pytest.mark.parametrize("name", sorted({anchor.run for anchor in STORED}))
def test_a_stored_result_is_of_the_config_as_it_stands(name: str) -> None:
    config = run.settings(load_config(run.CONFIGS / f"{name}.yaml"))
    assert anchors.load(name)["config"] == json.loads(json.dumps(config))


@pytest.mark.parametrize("name", sorted({anchor.run for anchor in STORED}))
def test_a_stored_result_is_what_was_accepted(name: str) -> None:
    recheck(name)


def test_the_page_says_what_the_stored_results_say() -> None:
    assert (FOLDER / "RESULTS.md").read_text() == run.results_page()


def test_a_band_can_be_missed() -> None:
    result = anchors.load("a02_a03_student")
    for arm in result["summary"]["arms"]:
        for row in arm["runs"]:
            row["test_errors"] += 100
    judged = {a.key: a.judge(result).outcome for a in STORED if a.run == "a02_a03_student"}
    assert judged == {"A2": "missed", "A3": "missed"}


def test_a_wrong_name_and_a_failed_command_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["a99"])
    assert stopped.value.code == 2
    assert "got a99" in capsys.readouterr().err
    missing = ["a02_a03_student", "--tenth", "--runs", str(tmp_path), "--data", str(tmp_path)]
    assert run.main(missing) == 2  # there is no teacher


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anchors")


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.name for row in anchors.RUNS])
def test_a_tenth_runs_and_can_be_judged(name: str, runs: Path) -> None:
    config = load_config(run.CONFIGS / f"{name}.yaml")
    if config.data.name == "mnist" and not os.environ.get("SELFKD_DATA"):
        pytest.skip("SELFKD_DATA must hold MNIST")
    recheck(name)
    teacher = next(row for row in anchors.RUNS if row.name == name).teacher
    names = [*([teacher] if teacher else []), name]
    assert run.main([*names, "--tenth", "--runs", str(runs)]) == 0
    result = json.loads((runs / f"{name}.json").read_text())
    for anchor in (a for a in anchors.ANCHORS if a.run == name and a.key != "A3b"):
        assert anchor.judge(result).measured
    arms = result["summary"].get("arms", [])
    assert all(
        row["test_errors"] < 0.95 * result["test_items"] for arm in arms for row in arm["runs"]
    )
