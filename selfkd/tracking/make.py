"""The tracker of a config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from selfkd.config import Config, TrackingConfig
from selfkd.errors import ConfigError
from selfkd.tracking.base import BothTrackers, NoTracker
from selfkd.tracking.files import FileTracker
from selfkd.tracking.host import answers, base_url, has_key
from selfkd.tracking.surroundings import (
    is_named,
    is_set_up,
    settings,
    split_project,
    wanted_mode,
)
from selfkd.tracking.tracker import Plots, WandbTracker

UNASKED = "as there is no key for it: wandb login, or --set tracking=offline"
"""Why a run is not in W&B, and what to do about it."""


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
    begun = (folder / "wandb").exists()  # a run that is resumed goes on with W&B
    mode, why = _mode(config, begun=begun)
    files = config.tracking.writers
    if mode == "none" and not files:
        return NoTracker(why)
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


def _mode(config: Config, *, begun: bool) -> tuple[Literal["online", "offline", "none"], str]:
    """Return the mode of W&B, and why it is none; `auto` is that where nobody asks for W&B.

    Args:
        config: Config of the run.
        begun: Whether the run is in W&B already.
    """
    mode = config.tracking.mode
    if mode == "auto":
        asked = begun or _names_wandb(config.tracking)
        if not (asked or is_set_up()):  # W&B, which takes half a second, is not even imported
            return "none", UNASKED
        mode = wanted_mode() or "auto"
        if mode == "auto":
            url = base_url()
            key = has_key(url)
            if not (key or asked or is_named()):
                return "none", UNASKED
            mode = "online" if key and answers(url) else "offline"
    if mode == "online" and not has_key(base_url()):
        raise ConfigError(
            "tracking.mode must be offline where there is no key, got online"
            f"{'' if config.tracking.mode == mode else ' by WANDB_MODE'}: "
            "run wandb login or set WANDB_API_KEY"
        )
    return mode, ""


def _names_wandb(tracking: TrackingConfig) -> bool:
    """Return whether a config has some setting of W&B's."""
    usual = TrackingConfig(mode=tracking.mode, writers=tracking.writers)
    return tracking != usual
