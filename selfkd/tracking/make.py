"""The tracker of a config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from selfkd.config import Config
from selfkd.errors import ConfigError
from selfkd.tracking.base import BothTrackers, NoTracker
from selfkd.tracking.files import FileTracker
from selfkd.tracking.host import answers, base_url, has_key
from selfkd.tracking.surroundings import settings, split_project, wanted_mode
from selfkd.tracking.tracker import Plots, WandbTracker


def make_tracker(
    config: Config,
    *,
    name: str,
    run_id: str,
    folder: Path,
    run: Path | None = None,
    plots: Plots | None = None,
) -> NoTracker:
    """Return the tracker of a config: W&B, files, both or none.

    Args:
        config: Config of the run.
        name: Name of the run.
        run_id: Start of the ids of its W&B runs.
        folder: Folder that is written to, on this machine.
        run: Run folder, where that is another.
        plots: Maker of the figures of a run folder, pages in HTML by their names.

    Raises:
        ConfigError: `tracking.mode` is online, and there is no key; W&B has no such project; or it
            refuses a variable.
    """
    mode = _mode(config)
    files = config.tracking.writers
    if mode == "none" and not files:
        return NoTracker()
    if mode == "none":
        return FileTracker(files, folder=folder, run=run or folder)
    settings()  # refused before the run, and not by a thread of it
    tracking = config.tracking
    entity, project = split_project(tracking.project, tracking.entity)
    config = replace(config, tracking=replace(tracking, entity=entity, project=project))
    wandb = WandbTracker(
        mode, name=name, run_id=run_id, folder=folder, config=config, run=run, plots=plots
    )
    if not files:
        return wandb
    return BothTrackers(FileTracker(files, folder=folder, run=run or folder), wandb)


def _mode(config: Config) -> Literal["online", "offline", "none"]:
    """Return the mode of W&B; `auto` is online only where that will work."""
    mode = config.tracking.mode
    if mode == "auto":
        mode = wanted_mode() or "auto"
    if mode == "auto":
        url = base_url()
        mode = "online" if has_key(url) and answers(url) else "offline"
    if mode == "online" and not has_key(base_url()):
        raise ConfigError(
            "tracking.mode must be offline where there is no key, got online"
            f"{'' if config.tracking.mode == mode else ' by WANDB_MODE'}: "
            "run wandb login or set WANDB_API_KEY"
        )
    return mode
