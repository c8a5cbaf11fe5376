"""What a run computes on, asked of a worker once and written into the run's config."""

from __future__ import annotations

from typing import Any

from selfkd.config import Config, to_tree
from selfkd.errors import ConfigError
from selfkd.execution.jobs import Executor, run_one
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import Events, Message

GIB = 2**30


def settle_device(config: Config, folder: RunFolder, executor: Executor, events: Events) -> Config:
    """Return a config with the precision of its workers' GPUs, as the run's config.yaml has it.

    Every trial has it from there, on whichever GPU it runs and after a resume, as it decides the
    bits.

    Args:
        config: Config of the run.
        folder: Run folder.
        executor: Executor whose workers are asked; not where no GPU is asked for.
        events: Callback that is told what there is.

    Raises:
        ConfigError: A GPU is asked for, and a worker has none.
    """
    found: dict[str, Any] = {"amp": "none"}
    if config.resources.gpu > 0:
        found = run_one(executor, "describe_device", config=to_tree(config))
        if "fault" in found:
            raise ConfigError(found["fault"])
        events(Message(describe_share(found, config.resources.gpu)))
    settled: dict[str, Any] = {}
    if config.train.amp == "auto":
        settled["train.amp"] = found["amp"]
    if config.train.tf32 is None and config.resources.gpu > 0:
        settled["train.tf32"] = True
    if not settled:
        return config
    config = config.at(settled)
    folder.save_config(config)
    return config


def describe_share(found: dict[str, Any], share: float) -> str:
    """Return in words what a worker's GPU is, and what each trial has of it.

    >>> gpu = {"gpu": "NVIDIA L4", "memory": 24 * 2**30, "free": 22 * 2**30}
    >>> describe_share(gpu, 0.25)
    'NVIDIA L4 with 24.0 GiB, 22.0 GiB free: 4 trials share one, each with at most 6.0 GiB'
    >>> describe_share(gpu, 1)
    'NVIDIA L4 with 24.0 GiB, 22.0 GiB free: one a trial'
    """
    memory = found["memory"] / GIB
    words = f"{found['gpu']} with {memory:.1f} GiB, {found['free'] / GIB:.1f} GiB free"
    if share >= 1:
        return f"{words}: {'one' if share == 1 else f'{share:g}'} a trial"
    return f"{words}: {int(1 / share)} trials share one, each with at most {memory * share:.1f} GiB"
