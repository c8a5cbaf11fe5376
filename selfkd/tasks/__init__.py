"""Tasks: one package for each kind of data, behind one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfkd.config import Tree
    from selfkd.tasks.task import Task


def make_task(config: Tree) -> Task:
    """Return the task of a config."""
    from selfkd.tasks.images.task import ImageTask  # torch and timm: only where work is done

    return ImageTask(config)
