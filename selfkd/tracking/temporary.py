"""W&B's temporary folders, which a killed process leaves: removed by the next one."""

from __future__ import annotations

import sys

from selfkd.storage.temporary import import_with_files

_MAKERS = ("wandb", "wandb.sdk.artifacts.artifact", "wandb.sdk.data_types._private")


def import_wandb() -> None:
    """Import W&B with its temporary folders in one of this process's own."""
    if "wandb" not in sys.modules:
        import_with_files(*_MAKERS, prefix="selfkd-wandb-")
