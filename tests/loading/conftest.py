"""Small runs in one process, whose models are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import Count, make_run

from selfkd.config import load_config
from selfkd.experiments.ensemble import compress
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder

TINY = (
    "model={name: selfkd_mlp, args: {width: 8, depth: 1}}",
    *("train={epochs: 2, batch_size: 20}", "search.trials=2", "confirm.seeds=2"),
)


@pytest.fixture(scope="session")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two generations."""
    config = load_config(settings=[*TINY, "rounds=1"])
    folder = RunFolder.create(tmp_path_factory.mktemp("loading") / "lineage", config)
    born_again(make_run(config, folder, Count()))
    return folder.path


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an ensemble of two, and its student."""
    config = load_config(settings=[*TINY, "members=2"])
    place = tmp_path_factory.mktemp("loading") / "compressed"
    folder = RunFolder.create(place, config, command="ensemble")
    compress(make_run(config, folder, Count()))
    return folder.path
