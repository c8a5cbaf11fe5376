"""The head of a Ray cluster as users start it, with ports, a home and a token of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
START_SECONDS = 120.0


@dataclass(frozen=True)
class Head:
    gcs: str
    dashboard: str
    environment: dict[str, str]
    """Of a client in the head's own home, with its token."""

    def env(self, **changes: str | None) -> dict[str, str]:
        merged = {**self.environment, **changes}
        return {name: value for name, value in merged.items() if value is not None}


def free_ports(count: int) -> list[int]:
    """Return ports that nothing takes by chance before they are used: below the ephemeral ones."""
    first = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    found = []
    for port in range(first, first + 1_000):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no port is free")


@contextmanager
def ray_head(
    folder: Path, *, cpus: int = 2, autoscaling: Mapping[str, object] | None = None
) -> Iterator[Head]:
    """Run `ray start --head` with token authentication on and the dashboard on loopback."""
    port, dashboard, client = free_ports(3)
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "PYTHONPATH", "WANDB"))
    }
    environment |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": os.environ["RAY_worker_niceness"],  # noqa: SIM112 - its own spelling
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WANDB_MODE": "offline",
    }
    extra, head_environment = [], dict(environment)
    if autoscaling is not None:
        config = folder / "autoscaling.json"
        config.write_text(json.dumps({**autoscaling, "provider": _fake_provider(port)}))
        extra = [f"--autoscaling-config={config}"]
        head_environment["RAY_FAKE_CLUSTER"] = "1"
    temporary = tempfile.mkdtemp(prefix="rh", dir="/tmp")  # short: it holds sockets
    head_environment["RAY_TMPDIR"] = temporary  # of nodes that it starts: none else finds them
    command = [
        *("ray", "start", "--head", "--block", f"--port={port}", f"--num-cpus={cpus}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"),
        *("--metrics-export-port=0", f"--ray-client-server-port={client}"),
        *(f"--temp-dir={temporary}", "--object-store-memory=200000000", *extra),
    ]
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=head_environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{dashboard}"
    environment["PYTHONPATH"] = str(ROOT)  # of clients: the head gets the package uploaded
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{port}", url, environment)
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)  # with --block it ends most of what it has started
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        _, left = psutil.wait_procs(started, timeout=1)
        for child in left:  # such as Ray's log monitor
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=2)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True


def _fake_provider(port: int) -> dict[str, object]:
    return {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": f"{socket.gethostbyname(socket.gethostname())}:{port}",
    }
