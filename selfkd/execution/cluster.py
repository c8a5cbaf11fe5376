"""Ray cluster of a run, an existing one or this machine, and the checks before the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selfkd.errors import ConfigError, RayLostError, cut_text, describe_error
from selfkd.execution.group import fitting
from selfkd.execution.ray_private import (
    DEBUG_AUTOSCALING_STATUS,
    GcsClient,
    canonicalize_bootstrap_address,
    ensure_token_if_auth_enabled,
    internal_kv,
    start_by_itself,
)
from selfkd.execution.start import Session, abandon, start
from selfkd.execution.watch import Watch
from selfkd.storage.files import remove_file
from selfkd.storage.remote import RemotePath, as_path

CONNECT_SECONDS = 3.0  # limit for the connection to the head's port
ANSWER_SECONDS = 5.0  # limit for a response of Ray at that port
LOOK_SECONDS = 7.5  # limit for an autoscaler, which looks every 5 s, to start a node
NODE_SECONDS = 8.0  # limit for all nodes to check the storage
STORAGE_SECONDS = 4.0  # limit for the storage to respond to a node
SAY_SECONDS = 30.0  # between two messages while waiting for a node

Node = Mapping[str, Any]


@contextmanager
def connect(
    *, verbose: bool = False, stuck: Callable[[RayLostError], object] | None = None
) -> Iterator[bool]:
    """Join an existing cluster, else start Ray on this machine; yield whether one was joined.

    Args:
        verbose: Whether Ray and its workers may print.
        stuck: Callback of a process that ends with its run: called from another thread where Ray
            has died and this one hangs in a call of it. Such a process does not wait for Ray's own
            way out where the run is interrupted or Ray has died, which may take a minute; Ray then
            remains initialized, and the process must end by `os._exit`.

    Raises:
        ConfigError: RAY_ADDRESS does not lead to a cluster, or the cluster refuses this process.
        RayLostError: Ray did not start, or has died.
    """
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
        # a traceback where its state cannot be written, which no run needs
        logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    address = _find_address()
    if address is not None:
        _check_address(address)
    session = Session() if address is None else None
    by_itself = start_by_itself(False)  # a thread that still calls Ray after the end starts none
    watch = Watch(address, stuck)
    try:
        try:
            start(session, verbose=verbose, address=address)
            watch.begin()
            yield address is not None
            watch.check()
        except Exception as error:
            watch.check()  # what has led to it
            # of a call of this process: those of jobs are caught, and Ray alone raises the latter
            if isinstance(error, RayError) or type(error) is Exception:
                raise RayLostError(lost_message(error)) from error
            if not isinstance(error, RayLostError):
                watch.end()  # before its processes end
                ray.shutdown()
            raise
        watch.end()
        ray.shutdown()
    except (KeyboardInterrupt, RayLostError) as end:
        watch.end()
        abandon(leave=stuck is not None, lost=isinstance(end, RayLostError))
        raise
    finally:
        watch.end()
        if session is not None:
            session.folder.remove()
        if not ray.is_initialized():
            start_by_itself(by_itself)


def _find_address() -> str | None:
    """Return `host:port` of the cluster that `ray.init()` would join; None where it starts one."""
    given = os.environ.get("RAY_ADDRESS", "")
    if "://" in given:
        raise ConfigError(
            "RAY_ADDRESS must be HOST:PORT of the head (its port is 6379 by default), "
            f"got {given}: from outside the cluster submit a job instead, "
            "python -m selfkd.submit --address http://HEAD:8265 -- …"
        )
    try:
        address: str | None = canonicalize_bootstrap_address(None)
    except (ConnectionError, ValueError, OSError) as error:
        raise ConfigError(f"RAY_ADDRESS must lead to a Ray cluster, got {given}: {error}") from None
    if address is None and given == "auto":
        raise ConfigError("RAY_ADDRESS must lead to a Ray cluster, got auto, and none runs here")
    return address


def _check_address(address: str) -> None:
    """Check within seconds that Ray listens at an address; Ray itself waits for minutes."""
    source = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "the cluster started here"
    way_out = "is the cluster up, and the port open? RAY_ADDRESS=local starts Ray on this machine"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} must answer, got {address}: {error}; {way_out}") from None
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
    except AuthenticationError:
        raise ConfigError(token_message(f"{source} {address}")) from None
    failures: list[Exception] = []

    def open_client() -> None:
        try:
            GcsClient(address=address)
        except Exception as error:  # noqa: BLE001 - raised as a ConfigError below
            failures.append(error)

    thread = threading.Thread(target=open_client, name="open_client", daemon=True)
    thread.start()
    thread.join(timeout=ANSWER_SECONDS)
    if failures and isinstance(failures[0], AuthenticationError):
        raise ConfigError(token_message(f"{source} {address}")) from None
    if failures or thread.is_alive():
        raise ConfigError(
            f"{source} must be a Ray cluster, got {address}, where something else answers: "
            f"{failures[0] if failures else 'not as Ray does'}; {way_out}"
        )


def token_message(source: str) -> str:
    """Return a message that Ray's token is missing or wrong, and how to set it.

    Args:
        source: What requires the token, such as the cluster with its address.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    name = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(file)
    known = name == "RAY_AUTH_TOKEN" or file.is_file()
    if mode != "token":
        state = f"RAY_AUTH_MODE must be token here, got {mode or 'none'}"
        state += f" (a token lies in {name})" if known else ""
    elif known:
        state = f"the token in {name} must be the cluster's, and it is another"
    else:
        state = f"there is no token in {name} or in RAY_AUTH_TOKEN"
    return (
        f"{source} requires Ray's token: {state}.\n"
        "Put the cluster's token (on its head: ray get-auth-token) into ~/.ray/auth_token or "
        "RAY_AUTH_TOKEN, and export RAY_AUTH_MODE=token"
    )


def lost_message(error: Exception) -> str:
    """Return why Ray cannot be worked with any more, and the way out.

    Args:
        error: What a call of it has raised, as where the machine is too busy for it to respond.
    """
    reason = cut_text(" ".join(describe_error(error).split()), 500)
    return f"Ray does not respond as it should: {reason}\nContinue when the machine is less busy"


def open_message(*, joined: bool) -> str | None:
    """Return a warning that Ray asks nobody for its token, by which others run code; None else.

    Args:
        joined: Whether an existing cluster was joined, whose ports other machines may reach.
    """
    if os.environ.get("RAY_AUTH_MODE") != "disabled":
        return None
    who = "whoever reaches the cluster's ports" if joined else "any user of this machine"
    return f"warning: RAY_AUTH_MODE=disabled, so that {who} can run code as you; unset it"


def find_slots(
    *,
    cpu: float,
    gpu: float,
    workers: int = 1,
    storage: Path,
    joined: bool,
    wait: float | None = None,
    say: Callable[[str], None],
) -> int:
    """Check that the cluster can run the trials; return how many fit on it now.

    Args:
        cpu: CPUs of one worker.
        gpu: GPUs of one worker.
        workers: Workers of one trial; they may be on several nodes.
        storage: Folder that every node must see.
        joined: Whether an existing cluster was joined, to which nodes may be added.
        wait: Seconds to wait for a node that a worker fits on; when not given, as long as an
            autoscaler is starting nodes.
        say: Callback for messages to the user.

    Raises:
        ConfigError: No node has the resources of a worker, a node does not see the storage, or a
            node has another version of selfkd.
    """
    slots = _count_slots(cpu, gpu, workers)
    if slots == 0 and joined:
        slots = _wait_for_nodes(cpu, gpu, workers, wait, say)
    nodes = _nodes()
    if slots == 0:
        most = [
            max((node["Resources"].get(kind, 0.0) for node in nodes), default=0.0)
            for kind in ("CPU", "GPU")
        ]
        later = "" if not joined else ", or resources.wait to the seconds until there is more"
        if found := _count_slots(cpu, gpu, 1):
            raise ConfigError(
                f"resources.workers must be at most {found}, as many with {cpu:g} CPU and {gpu:g} "
                f"GPU each as the nodes hold, got {workers}: set it to that{later}"
            )
        raise ConfigError(
            f"resources must fit on a node: asked for {cpu:g} CPU and {gpu:g} GPU a trial, "
            f"but the largest node has {most[0]:g} CPU and {most[1]:g} GPU: "
            f"set resources.cpu and resources.gpu to what there is{later}"
        )
    if len(nodes) > 1:
        _check_nodes(nodes, storage, say)
    return slots


def _nodes() -> list[Node]:
    return [node for node in ray.nodes() if node["Alive"]]


def _count_slots(cpu: float, gpu: float, workers: int) -> int:
    return sum(fitting(node["Resources"], cpu, gpu) for node in _nodes()) // workers


def _wait_for_nodes(
    cpu: float, gpu: float, workers: int, wait: float | None, say: Callable[[str], None]
) -> int:
    """Wait until a trial fits on the nodes; return how many do, 0 where none does.

    A placement group requests the nodes from an autoscaler; unlike `request_resources` it ends with
    this process, and does not replace the requests of others.
    """
    bundle = {"CPU": cpu, **({"GPU": gpu} if gpu > 0 else {})}
    request = placement_group([bundle] * workers)
    start = said = time.monotonic()
    end = start + (LOOK_SECONDS if wait is None else wait)
    try:
        while not (slots := _count_slots(cpu, gpu, workers)) and time.monotonic() < end:
            starting = _starts_nodes()
            if starting and wait is None:
                end = time.monotonic() + LOOK_SECONDS
            if said == start or time.monotonic() > said + SAY_SECONDS:
                said = time.monotonic()
                state = "an autoscaler is starting nodes" if starting else "none has it yet"
                say(
                    f"waiting for a node with {cpu:g} CPU and {gpu:g} GPU: {state} "
                    f"({said - start:.0f} s)"
                )
            time.sleep(0.5)
    finally:
        remove_placement_group(request)
    return slots


def _starts_nodes() -> bool:
    """Return whether an autoscaler, of version 1 or 2, is starting nodes."""
    with contextlib.suppress(RayError, OSError, ValueError, KeyError, TypeError):
        report = json.loads(internal_kv._internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
        first = report.get("autoscaler_report", {})
        if first.get("pending_launches") or first.get("pending_nodes"):
            return True
    from ray.autoscaler.v2.sdk import get_cluster_status  # rarely needed, slow to import

    with contextlib.suppress(RayError, OSError, ValueError, AttributeError):
        address = ray.get_runtime_context().gcs_address
        second = get_cluster_status(address, timeout=2)
        return bool(second.pending_launches or second.pending_nodes)
    return False


def _check_nodes(nodes: list[Node], storage: Path, say: Callable[[str], None]) -> None:
    """Check that all nodes see the storage and have the same code; say what else may matter."""
    marker = storage / f".seen-{uuid.uuid4().hex}"
    marker.touch()
    try:
        looks = {
            _look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(marker)): node["NodeManagerAddress"]
            for node in nodes
        }
        ready, late = ray.wait(list(looks), num_returns=len(looks), timeout=NODE_SECONDS)
        seen = [(looks[look], _result(look)) for look in ready]
    finally:
        remove_file(marker)
    faults = [f"{address} {fault}" for address, (fault, _) in seen if fault]
    if faults:
        raise ConfigError(
            f"storage must be a folder that every node sees and writes to, got {storage}: "
            + "; ".join(faults)
        )
    ours = _versions()
    for package in ours:
        others = {
            address: versions[package]
            for address, (_, versions) in seen
            if versions[package] != ours[package]
        }
        listed = ", ".join(f"{found} on {address}" for address, found in others.items())
        if others and package == "selfkd":
            raise ConfigError(
                f"all nodes must have the same selfkd, got {ours[package]} here and {listed}: "
                "python -m selfkd.submit takes it to all of them"
            )
        if others:
            say(
                f"nodes have different versions of {package}, {ours[package]} here and {listed}: "
                "the same seed may not give the same model on each"
            )
    if late:
        say(
            f"{', '.join(looks[look] for look in late)} did not say within {NODE_SECONDS:g} s "
            f"whether {storage} is seen there; the run begins without"
        )


def _result(look: Any) -> tuple[str | None, dict[str, str]]:
    try:
        result: tuple[str | None, dict[str, str]] = ray.get(look)
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        return f"cannot run selfkd ({reason})", {}
    return result


def _versions() -> dict[str, str]:
    """Return versions that must be the same on all nodes; of selfkd a hash of its code."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    return {"selfkd": code, "torch": torch}


@ray.remote(num_cpus=0, max_retries=0)
def _look(path: str) -> tuple[str | None, dict[str, str]]:
    """Return the fault of a file as seen by this node, None where it is fine, and versions."""
    faults: list[str | None] = []

    def try_it() -> None:
        try:
            seen = as_path(path)
            if isinstance(seen, RemotePath):
                seen.stat()
            else:
                with open(path, "r+b"):
                    pass
            faults.append(None)
        except OSError as error:
            faults.append(f"cannot see it ({error.strerror or error})")

    thread = threading.Thread(target=try_it, daemon=True)  # network folders may hang for minutes
    thread.start()
    thread.join(timeout=STORAGE_SECONDS)
    fault = faults[0] if faults else f"has no answer from it within {STORAGE_SECONDS:g} s"
    return fault, _versions()
