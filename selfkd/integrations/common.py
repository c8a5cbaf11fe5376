"""Placement of a distiller on devices and processes, which no module does for the adapters."""

from __future__ import annotations

import torch
from torch import nn

from selfkd.distill.distiller import Distiller


def attach(distiller: Distiller, student: nn.Module, processes: int) -> None:
    """Attach a distiller that is not yet, and keep its projections equal in all processes.

    Args:
        distiller: Distiller, also one made without a student or before `init_process_group`.
        student: Model that is trained, to which the paths of feature terms belong.
        processes: Number of processes that train together.

    Raises:
        ValueError: A path of no submodule, or projections that would differ between processes.
    """
    if not distiller.attached and distiller.teacher is not None:
        distiller.attach(student)
    distiller.synchronize()
    check_processes(distiller, processes)


def place(distiller: Distiller, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Move the teacher, if it can be moved, and the projections to `device` in place.

    Args:
        distiller: Distiller.
        device: Device of the student.
        dtype: Data type of the projections, the student's; unchanged if not given.
    """
    move = getattr(distiller.teacher, "to", None)
    if move is not None:
        move(device)
    distiller.projections.to(device, dtype)


def check_processes(distiller: Distiller, processes: int) -> None:
    """Raise ValueError if the distiller's projections would differ between processes."""
    if processes > 1 and len(distiller.projections) and not distiller.in_step:
        raise ValueError(
            "distiller must be attached to its student after init_process_group, or its "
            f"projections would differ between processes, got {len(distiller.projections)} in "
            f"{processes} processes: distiller.attach(student)"
        )
