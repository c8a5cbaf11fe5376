"""Runs from Python: settings of any form, and what is made of a summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import capacity_run, deploy_run, ensemble_run, generations_run, study_run

import selfkd
from selfkd.cli.command import Command, Options
from selfkd.cli.result import Result, Table
from selfkd.config import Config, load_config
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    CapacitySummary,
    DeploySummary,
    EnsembleSummary,
    GenerationsSummary,
    StudySummary,
    Verdict,
)
from selfkd.storage.files import load_json, save_json
from selfkd.storage.rows import load_row

KINDS: list[tuple[Any, type[Any]]] = [
    (generations_run, GenerationsSummary),
    (ensemble_run, EnsembleSummary),
    (capacity_run, CapacitySummary),
    (study_run, StudySummary),
    (deploy_run, DeploySummary),
]


def result(path: Path, kind: type[Any] = GenerationsSummary) -> Result[Any]:
    file = "deploy/deploy.json" if kind is DeploySummary else "summary.json"
    return Result(path, load_row(kind, path / file))


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_every_recipe_has_a_table_and_what_fresh_seeds_say(
    make: Any, kind: type[Any], tmp_path: Path
) -> None:
    found = result(make(tmp_path / "run"), kind)
    assert len(found.table) >= 2
    assert all(tuple(row) == found.table.columns for row in found.table)
    assert found.table.columns[0] == "name"
    assert len(found.confirmation) >= 2
    frame = found.table.to_pandas()
    assert list(frame.index) == [row["name"] for row in found.table]
    for row in found.table:
        assert row["name"] in repr(found)
        assert row["name"] in found._repr_html_()
    assert f"run folder: {tmp_path / 'run'}" in repr(found)


def test_the_table_has_the_summarys_numbers(tmp_path: Path) -> None:
    found = result(generations_run(tmp_path / "run"))
    summary = found.summary
    row = found.table[2]
    assert row["test_accuracy"] == summary.generations[2].metrics["test_accuracy"]
    assert row["temperature"] == summary.generations[2].temperature
    mean, gain = summary.confirmations[2].mean, summary.confirmations[2].first
    assert (row["mean"], row["mean_low"], row["mean_high"]) == (mean.value, mean.low, mean.high)
    assert (row["gain"], row["gain_low"], row["gain_high"]) == (gain.value, gain.low, gain.high)
    assert found.table[0]["gain"] is None
    assert found.table[3]["name"] == "ensemble of all"
    assert found.confirmation == summary.confirmations


def test_what_is_printed_fits_a_page_and_says_which_model_to_take(tmp_path: Path) -> None:
    run = generations_run(tmp_path / "run")
    found = Result(run, replace(load_row(GenerationsSummary, run / "summary.json"), best=2))
    _, head, *rows = repr(found).splitlines()
    assert head.split("  ")[-1] == "alpha"
    assert "test accuracy" in head
    assert max(map(len, [head, *rows[:4]])) <= 100
    row, own = found.table[1], rows[1]
    assert f"{row['test_accuracy']:.2%}" in own
    gain, low, high = (100 * row[f"gain{end}"] for end in ("", "_low", "_high"))
    assert f"{gain:+.2f} points [{low:+.2f}, {high:+.2f}]" in own
    assert rows[-2] == "best on validation: generation 2; .load() loads it"


def test_the_metric_is_that_of_the_means(tmp_path: Path) -> None:
    """A training function's own metric is on validation, whatever else it returns."""
    run = generations_run(tmp_path / "run")
    summary = load_row(GenerationsSummary, run / "summary.json")
    own = tuple(replace(row, metric="val_accuracy") for row in summary.confirmations)
    printed = repr(Result(run, replace(summary, confirmations=own)))
    assert "validation accuracy" in printed
    assert f"{summary.generations[0].metrics['val_accuracy']:.2%}" in printed


def test_the_headline_is_the_verdicts_first_sentence(tmp_path: Path) -> None:
    run = generations_run(tmp_path / "run")
    found = Result(run, replace(result(run).summary, verdict=None))
    assert (found.headline, found.verdict) == ("", None)
    summary = load_json(run / "summary.json")
    said = ["<Born again> is better.", "And more."]
    save_json(
        run / "summary.json", summary | {"verdict": {"name": "a", "to": "b", "sentences": said}}
    )
    found = result(run)
    assert isinstance(found.verdict, Verdict)
    assert found.headline == said[0]
    assert repr(found).splitlines()[0] == said[0]
    assert "<p>&lt;Born again&gt; is better.</p>" in found._repr_html_()


def test_a_deployment_has_its_headline_its_files_and_its_times(tmp_path: Path) -> None:
    run = deploy_run(tmp_path / "run")
    found = result(run, DeploySummary)
    assert found.headline.startswith("generation 3 is served as ONNX int8: 0.27 of")
    assert found.verdict is None
    assert repr(found).splitlines()[0] == found.headline
    (int8,) = (row for row in found.table if row["name"] == "ONNX int8")
    assert (int8["bytes"], int8["ms_128"], int8["speed_128"]) == (27_000, 0.6, 3.2)
    assert found.models == {}
    (run / "deploy" / "int8.onnx").touch()
    assert found.models == {"int8.onnx": run / "deploy" / "int8.onnx"}
    with pytest.raises(ConfigError, match="deploy, which chooses no model"):
        found.load()


def test_models_are_files_that_are_there(tmp_path: Path) -> None:
    run = generations_run(tmp_path / "run")
    found = result(run)
    assert found.models == {}
    for name in ("best.safetensors", "generation_001/student.safetensors"):
        (run / name).touch()
    assert found.models == {
        "best": run / "best.safetensors",
        "generation 1": run / "generation_001" / "student.safetensors",
    }
    with pytest.raises(ConfigError, match="generation 0 must have its file"):
        found.load(generation=0)


def test_without_pandas_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pandas must be installed .* a sequence of mappings"):
        Table([{"name": "a"}]).to_pandas()


@pytest.mark.parametrize("run", ["generations", "ensemble", "capacity", "study"])
@pytest.mark.parametrize(
    "given",
    [
        {"settings": {"train.lr": 0.125, "data.train_size": 50}},
        {"settings": ["train.lr=0.125", "data.train_size=50"]},
        {"config": {"train": {"lr": 0.125}, "data": {"train_size": 50}}},
        {"config": load_config(settings=["train.lr=0.125", "data.train_size=50"])},
        {"config": {"train": {"lr": 1}, "data.train_size": 50}, "settings": {"train.lr": 0.125}},
    ],
)
def test_settings_of_any_form(
    run: str, given: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []

    def finish(self: Any, options: Options) -> Any:
        seen.append(load_config(options.config, settings=options.settings, flags=options.flags))
        path = generations_run(tmp_path / "run")
        return RunFolder(path), seen[0], load_row(GenerationsSummary, path / "summary.json")

    monkeypatch.setattr(Command, "run", finish)
    found = getattr(selfkd, f"run_{run}")(**given, seed=7)
    assert (seen[0].train.lr, seen[0].data.train_size, seen[0].seed) == (0.125, 50, 7)
    assert found.folder == tmp_path / "run"


def test_a_config_that_is_wrong_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.lrr: unknown key: did you mean train\.lr"):
        selfkd.run_generations(config={"train": {"lrr": 1}, "storage": str(tmp_path)})
