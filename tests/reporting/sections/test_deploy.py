"""What was deployed, as sections of a page: whatever the numbers are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from deployments import FLOAT, INT8, deployment
from run_folders import deploy_run

from selfkd.reporting.read import read_run
from selfkd.reporting.sections.deploy import deploy_sections
from selfkd.results import Timing


def test_a_run_without_a_deployment_has_no_section(tmp_path: Path) -> None:
    run = read_run(deploy_run(tmp_path / "run"))
    assert list(deploy_sections(replace(run, deploy_summary=None))) == []


def test_a_deployment_of_a_run_has_words_table_and_figure(tmp_path: Path) -> None:
    run = replace(read_run(deploy_run(tmp_path / "run")), command="generations")
    words, costs = deploy_sections(run)
    assert [section.title for section in (words, costs)] == ["Deployed", "Size and time"]
    assert len(words.findings) > 4
    assert dict(words.links) == {
        "float.onnx": "./deploy/float.onnx",
        "int8.onnx": "./deploy/int8.onnx",
    }
    (panel,) = costs.panels
    assert panel.figure is not None
    size, time = panel.figure.parts
    assert (size.x.title, time.x.title) == ("size, bytes", "ms a batch of 1")


def test_what_cannot_be_drawn_is_left_out_of_the_figure_alone(tmp_path: Path) -> None:
    unknown = replace(
        INT8,
        metrics={"test_accuracy": math.nan},
        timings=(Timing(items=1, ms=math.nan),),
    )
    instant = replace(FLOAT, bytes=0, timings=(Timing(items=1, ms=0.0),))
    run = read_run(deploy_run(tmp_path / "run"))
    for rows in ((FLOAT, unknown), (instant,), (unknown,)):
        made = replace(run, deploy_summary=deployment(*rows))
        (panel,) = next(deploy_sections(made)).panels
        assert len(panel.table.rows) == len(rows)
        assert (panel.figure is None) == (FLOAT not in rows)
