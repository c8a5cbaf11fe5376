"""Names that Ray keeps private, in one place: each Ray version may move them."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from ray._common.utils import get_default_ray_temp_dir
from ray._private import auto_init_hook, node, parameter, ray_constants, utils
from ray._private import worker as _worker
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled as ensure_token_if_auth_enabled,
)
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS as DEBUG_AUTOSCALING_STATUS
from ray._private.services import canonicalize_bootstrap_address as canonicalize_bootstrap_address
from ray._private.services import get_webui_url_from_internal_kv as get_webui_url_from_internal_kv
from ray._raylet import GcsClient as GcsClient  # type: ignore[attr-defined]
from ray._raylet import NodeID
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
from ray.experimental import internal_kv as internal_kv

# isort: split
import psutil  # type: ignore[import-untyped]  # where it is not installed, Ray brings it

SERVERS = {"raylet": "raylet", "gcs_server": "GCS server"}  # without which nothing can be trained
SOCKET_BYTES = 103  # longest path of a socket, on any system
_SOCKETS = Path("/proc/net/unix")
_DEATHS = ("Raylet is terminated", "has been marked dead", "Some workers of the worker process")
_SOCKET = "session_0000-00-00_00-00-00_000000_0000000/sockets/plasma_store"


def keep_registered() -> None:
    """Let Tune's registry remember what this process has read of it.

    Tune asks the head for the class of its workers several times a trial, a quarter of its time.
    """
    from ray.tune.registry import _global_registry  # slow to import: while Ray starts, by the pool

    if "get" in vars(_global_registry):
        return
    register, contains, get = (
        getattr(_global_registry, name) for name in ("register", "contains", "get")
    )
    known: dict[tuple[str, str], Any] = {}

    def register_anew(category: str, key: str, value: Any) -> None:
        register(category, key, value)
        known.pop((category, key), None)

    def get_once(category: str, key: str) -> Any:
        if (category, key) not in known:
            known[category, key] = get(category, key)
        return known[category, key]

    def contains_or_asks(category: str, key: str) -> bool:
        return (category, key) in known or contains(category, key)

    methods = {"register": register_anew, "contains": contains_or_asks, "get": get_once}
    vars(_global_registry).update(methods)


def temporary_folder() -> Path:
    """Return the folder for the sessions of all Rays that are started here.

    Ray takes an empty variable for the working folder.
    """
    given = [os.environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR")]
    if "" in given:
        return Path(given[0] or given[1] or "/tmp", "ray").absolute()  # noqa: S108 - as Ray's own
    return Path(usual_of_ray()).absolute()


def usual_of_ray() -> str:
    """Return that folder as Ray names it."""
    return str(get_default_ray_temp_dir())


def session_name() -> str:
    """Return the name of a session that this process starts, as Ray gives it."""
    return f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"


def sockets_fit(folder: Path) -> bool:
    """Return whether the paths of Ray's sockets in a folder are short enough for the system."""
    return len(os.fsencode(folder / _SOCKET)) <= SOCKET_BYTES


@contextmanager
def on_loopback(session: str, *, whole: bool) -> Iterator[None]:
    """Let a Ray that starts meanwhile listen on loopback only, under a name of its session.

    Ray replaces a loopback address by one that others reach, unless it is told that it runs where
    it does not build clusters.

    Args:
        session: Name of the session.
        whole: Whether all processes of a cluster are started. One machine has nothing to scale, and
            where nobody looks needs neither a dashboard nor a process that forwards what workers
            print: each takes half a second of the processor to start. Nor does it wait for the
            dashboard's agent, which starts last of all, as where the dashboard is not installed.
    """
    clusters, params = ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams
    server, missing = node.Node.start_api_server, utils.get_dashboard_dependency_error
    ray_constants.ENABLE_RAY_CLUSTER = False
    more = {} if whole else {"no_monitor": True, "include_log_monitor": False}
    parameter.RayParams = partial(params, session_name=session, **more)
    if not whole:
        node.Node.start_api_server = lambda self, **_: None
        utils.get_dashboard_dependency_error = lambda: ImportError("the dashboard is not needed")
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams = clusters, params
        node.Node.start_api_server, utils.get_dashboard_dependency_error = server, missing


@contextmanager
def own_handlers() -> Iterator[None]:
    """Leave this process its handler of SIGTERM, which Ray replaces where it starts.

    It is set again at the end, as Ray's C++ part has a handler, too, that prints a stack.
    """
    replaces = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = replaces
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def say_no_deaths() -> None:
    """Let Ray print no reports of deaths, of many lines each: selfkd says what matters."""
    prints = _worker.print_to_stdstream

    def print_others(data: dict[str, Any], ignore_prefix: bool) -> None:
        if not any(death in line for line in data["lines"] for death in _DEATHS):
            prints(data, ignore_prefix)

    if prints.__module__ == _worker.__name__:
        _worker.print_to_stdstream = print_others


def start_by_itself(may: bool) -> bool:
    """Set whether calls of Ray start one where none runs; return whether they did before.

    Args:
        may: Whether they may.
    """
    before = bool(auto_init_hook.enable_auto_connect)
    auto_init_hook.enable_auto_connect = may
    return before


def started() -> dict[str, list[subprocess.Popen[bytes]]]:
    """Return the processes of the Ray that this process has started, by their type."""
    node = _worker._global_node
    found: dict[str, Any] = {} if node is None else dict(node.all_processes)
    return {name: [one.process for one in processes] for name, processes in found.items()}


def dead_children() -> Iterator[tuple[str, int, int]]:
    """Yield what has died of a Ray that is being started here: name, process id and exit code.

    They are left to Ray to be waited for. The exit code is negative after a signal.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.name() in SERVERS:
                flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
                if (end := os.waitid(os.P_PID, child.pid, flags)) is not None:
                    exited = end.si_code == os.CLD_EXITED
                    yield child.name(), child.pid, end.si_status if exited else -end.si_status


def raylet_listens() -> bool:
    """Return whether the raylet that this process is attached to is seen to listen on its socket.

    It is not where the system has no such table, or the raylet runs in a namespace of its own.
    """
    with contextlib.suppress(OSError, AttributeError):
        return str(_worker._global_node.raylet_socket_name) in _SOCKETS.read_text(encoding="utf-8")
    return False


def attached_node_lives(client: Any, timeout: float) -> bool:
    """Return whether the node that this process is attached to lives; a dead one never returns.

    Args:
        client: Client of the cluster's GCS.
        timeout: Seconds to wait for the response.
    """
    own = NodeID.from_hex(_worker._global_node.node_id).binary()
    selector = GetAllNodeInfoRequest.NodeSelector(node_id=own)
    alive = GcsNodeInfo.GcsNodeState.ALIVE
    found = client.get_all_node_info(timeout=timeout, node_selectors=[selector], state_filter=alive)
    return bool(found)


def kill_started(*, everything: bool = False) -> None:
    """Kill what this process has started of Ray, with all workers.

    Args:
        everything: Whether all descendants of this process are killed but W&B's service, which ends
            by itself once it has written its files: also those of a Ray that is being started.
    """
    roots = {process.pid for several in started().values() for process in several}
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children():
            if child.pid in roots or (everything and not _is_wandb(child)):
                with contextlib.suppress(psutil.Error):
                    found += child.children(recursive=True)
                found.append(child)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=0.7)


def _is_wandb(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "wandb" in process.name() or "wandb" in " ".join(process.cmdline()[:2])
    return False
