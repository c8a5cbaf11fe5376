"""A cluster of several nodes on this machine, with GPUs that are not real ones."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster


@contextmanager
def apart() -> Iterator[None]:
    """Give Ray a folder of its own: else any `ray.init()` of this machine joins the cluster."""
    before = os.environ.get("RAY_TMPDIR")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as own:
        os.environ["RAY_TMPDIR"] = own
        try:
            yield
        finally:
            if before is None:
                del os.environ["RAY_TMPDIR"]
            else:
                os.environ["RAY_TMPDIR"] = before


class Nodes:
    """A head that has nothing to train on, and nodes that come and go.

    Args:
        quick: a lost node is noticed after 2 s, not after about 10 as by default.
    """

    def __init__(self, *, quick: bool = True, cpus: int = 2, gpus: int = 1) -> None:
        system = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "_system_config": system if quick else {},
            },
        )
        self.address = str(self._cluster.address)
        self._nodes: dict[str, Any] = {}

    def join(self) -> None:
        """Connect this process as a driver."""
        ray.init(address=self.address, log_to_driver=False, logging_level="CRITICAL")

    def add(self) -> str:
        """Add a node; return its id."""
        node = self._cluster.add_node(**self._resources)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def lose(self, name: str) -> None:
        """As when its machine is switched off."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def workers(self, name: str) -> list[psutil.Process]:
        """Return the processes of a node that train."""
        (raylet,) = self._nodes[name].all_processes["raylet"]
        children = psutil.Process(raylet.process.pid).children()
        return [child for child in children if "Trainable" in " ".join(child.cmdline())]

    def have(self, count: int) -> list[str]:
        """Add nodes or lose some until there are so many; return their ids."""
        while len(self._nodes) < count:
            self.add()
        while len(self._nodes) > count:
            self.lose(next(iter(self._nodes)))
        return list(self._nodes)

    def close(self) -> None:
        """Stop the driver of this process and all nodes."""
        ray.shutdown()
        self._cluster.shutdown()
