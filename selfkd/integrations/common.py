"""Placement of a distiller on devices and processes, which no module does for the adapters."""

from __future__ import annotations

import torch

from selfkd.distill.distiller import Distiller


def place(distiller: Distiller, device: torch.device) -> None:
    """Move the teacher, if it can be moved, and the projections to `device` in place."""
    move = getattr(distiller.teacher, "to", None)
    if move is not None:
        move(device)
    distiller.projections.to(device)


def check_processes(distiller: Distiller, processes: int) -> None:
    """Raise ValueError if the distiller's projections would differ between processes."""
    if processes > 1 and len(distiller.projections) and not distiller.in_step:
        raise ValueError(
            "distiller must be attached to its student after init_process_group, or its "
            f"projections would differ between processes, got {len(distiller.projections)} in "
            f"{processes} processes: distiller.attach(student)"
        )
