"""Folders of transfer sets are places like that of the data: absolute, and may move."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.config import Config, load_config
from selfkd.config.load import resume_invariant
from selfkd.config.paths import relative_paths, transfer_places, with_absolute_paths

SET = "{name: folder, root: more}"
GIVEN = {
    "run": f"data.transfer={SET}",
    "arm": f"study.arms={{a: {{set: {{data.transfer: {SET}}}}}}}",
    "key of an arm": "study.arms={a: {set: {data.transfer.root: more}}}",
}


def roots(config: Config) -> list[str]:
    return [place for key, place in transfer_places(config) if key.endswith(".root")]


@pytest.mark.parametrize("setting", GIVEN.values(), ids=GIVEN.keys())
def test_workers_get_absolute_folders_and_ray_jobs_refuse_others(setting: str) -> None:
    config = load_config(settings=[setting, "storage=/runs"])
    assert any(fault.endswith("got 'more'") for fault in relative_paths(config))
    found = with_absolute_paths(config)
    assert roots(found) == [str(Path("more").absolute())]
    assert relative_paths(found) == []
    assert roots(with_absolute_paths(load_config(settings=["data.transfer={name: digits}"]))) == [
        None
    ]


def test_the_folder_of_a_transfer_set_may_move_and_nothing_else_of_it_may_change() -> None:
    config = load_config(settings=[GIVEN["run"]])
    kept = resume_invariant(config)
    assert resume_invariant(config.at({"data.transfer.root": "/elsewhere"})) == kept
    for change in ({"name": "digits"}, {"weight": 0.25}, {"size": 3}, {"labels": True}):
        (key, value), *_ = change.items()
        assert resume_invariant(config.at({f"data.transfer.{key}": value})) != kept
