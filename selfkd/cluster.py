"""A Ray cluster to run on: one that is there, or this machine."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selfkd.config import ConfigError
from selfkd.group import fitting


@contextmanager
def connect(
    *, cpu: float, gpu: float, storage: Path, workers: int = 1, verbose: bool = False
) -> Iterator[int]:
    """Start Ray here, or join the cluster that RAY_ADDRESS names; yield how many trials fit.

    Args:
        cpu: CPUs of one worker.
        gpu: GPUs of one worker.
        storage: folder that every node must see.
        workers: of one trial; they may be on several nodes.
        verbose: let Ray and its workers print.

    Raises:
        ConfigError: no node has what a worker needs, or one does not see the storage.
    """
    joined = "RAY_ADDRESS" in os.environ
    ray.init(
        log_to_driver=verbose,
        logging_level="INFO" if verbose else "ERROR",
        include_dashboard=joined or verbose,
    )
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        found = sum(fitting(node["Resources"], cpu, gpu) for node in nodes)
        if found == 0:
            most = [
                max(node["Resources"].get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")
            ]
            raise ConfigError(
                f"resources must fit on a node: asked for {cpu:g} CPU and {gpu:g} GPU a trial, "
                f"but the largest node has {most[0]:g} CPU and {most[1]:g} GPU: "
                "set resources.cpu and resources.gpu to what there is"
            )
        if found < workers:
            raise ConfigError(
                f"resources.workers must be at most {found}, as many with {cpu:g} CPU and {gpu:g} "
                f"GPU each as the nodes hold, got {workers}"
            )
        if len(nodes) > 1:
            _check_storage(nodes, storage)
        yield found // workers
    finally:
        ray.shutdown()


def _check_storage(nodes: list[dict[str, str]], storage: Path) -> None:
    marker = storage / f".seen-{uuid.uuid4().hex}"
    marker.touch()
    try:
        looks = {
            node["NodeManagerAddress"]: _sees.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(marker))
            for node in nodes
        }
        blind = [address for address, seen in looks.items() if not ray.get(seen)]
    finally:
        marker.unlink()
    if blind:
        raise ConfigError(
            f"storage must be a folder that every node sees, got {storage}, "
            f"which {', '.join(blind)} cannot see"
        )


@ray.remote(num_cpus=0)
def _sees(path: str) -> bool:
    return Path(path).exists()
