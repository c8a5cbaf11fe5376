"""Trials of language models that tests train."""

from __future__ import annotations

from pathlib import Path

from selfkd.config import Config
from selfkd.results import Row
from selfkd.training.trial import Trial


def make_trial(config: Config, path: Path, teachers: list[Row] | None = None) -> Trial:
    """Return a trial whose student is saved to a file, and whose targets lie beside its folder."""
    path.parent.mkdir(exist_ok=True)
    return Trial(
        config=config,
        stage="generation-1" if teachers else "generation-0",
        seed=5,
        model=config.model,
        path=path,
        targets=path.parents[1] / "targets",
        teachers=teachers or (),
    )
