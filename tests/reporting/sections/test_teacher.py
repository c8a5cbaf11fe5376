"""The report's section on what a teacher knows."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import capacity_run, ensemble_run, generations_run, study_run

from selfkd.reporting.page import write_report
from selfkd.reporting.read import read_run
from selfkd.reporting.sections.teacher import teacher_sections
from selfkd.results import Disagreement, NearClass, SecondChoice, Softness, TeacherTargets
from selfkd.storage.rows import save_row

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n and so on").decode()
EVIL = "<b>cat</b>"
FOUND = TeacherTargets(
    teacher="generation 0",
    students="generation 1",
    items=90,
    of=120,
    softness=(Softness(temperature=2.0, entropy=0.5, wrong_entropy=0.25, largest=0.9),),
    near=(
        NearClass(label=EVIL, other="dog", share=0.75, probability=0.02),
        NearClass(label=EVIL, other="automobile", share=0.25, probability=0.01),
    ),
    shares=((0, 0.75, 0.25), (0.5, 0, 0.5), (0, 0, 0)),
    names=(EVIL, "dog", "automobile"),
    seconds=(
        SecondChoice(
            item=3, label="dog", classes=("dog", EVIL), probabilities=(0.6, 0.3), picture=PIXEL
        ),
        SecondChoice(
            item=4,
            label="dog",
            classes=("dog", EVIL),
            probabilities=(0.7, 0.2),
            picture=f'{PIXEL}" onerror="alert(1)',
        ),
    ),
    disagreement=Disagreement(pairs=0.125, information=0.0625, agreement=(0.95, 0.9)),
    notes=("the rest is spread evenly",),
)


@pytest.mark.parametrize("make", [generations_run, ensemble_run, capacity_run, study_run])
def test_the_report_of_any_run_shows_what_its_teacher_knows(make, tmp_path: Path) -> None:
    path = make(tmp_path / "run")
    assert "What the teacher knows" not in write_report(path).read_text()
    save_row(path / "teacher.json", FOUND)
    text = write_report(path).read_text()
    for part in (
        '">What the teacher knows</h2>',
        "on 90 training images (of 120, evenly spaced). The rest is spread evenly.",
        "<title>dog → automobile: 50.0%</title>",
        "<td>0.500</td><td>0.250</td><td>0.900</td>",
        "predict different classes on 12.50%",
        "<td>90.00%</td>",
        'alt="Training image of dog"',
        f'src="data:image/png;base64,{PIXEL}"',
        "first: dog (60.0%)",
    ):
        assert part in text, part
    assert EVIL not in text
    assert text.count("Training image of") == 1


def test_of_many_classes_the_pairs_are_a_table(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    pairs = TeacherTargets(near=FOUND.near, pairs=True, items=9, of=9)
    save_row(path / "teacher.json", pairs)
    (section,) = teacher_sections(read_run(path))
    (panel,) = section.panels
    assert panel.figure is None
    assert panel.table.rows[0] == ("<b>cat</b> → dog", "75.00%", "0.02")
    assert section.gallery is None


@pytest.mark.parametrize(
    "edited", [{"names": ()}, {"shares": ((0.5,),), "names": ("cat",)}, {"shares": ((), ())}]
)
def test_shares_that_do_not_fit_their_names_are_not_drawn(
    edited: dict[str, Any], tmp_path: Path
) -> None:
    path = generations_run(tmp_path / "run")
    save_row(path / "teacher.json", replace(FOUND, **edited))
    (section,) = teacher_sections(read_run(path))
    assert section.panels[0].figure is None
    assert section.panels[0].table is not None


def test_a_damaged_row_is_named_and_left_out(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    (path / "teacher.json").write_text('{"format": 1, "items": -1}')
    run = read_run(path)
    assert any("teacher.json" in problem for problem in run.problems)
    assert list(teacher_sections(run)) == []
