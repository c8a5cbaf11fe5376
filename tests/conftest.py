"""What all tests share: nothing outside the tests' own folders is read or written."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# a script's background job ignores Ctrl-C, and so would all processes that tests start and stop
signal.signal(signal.SIGINT, signal.default_int_handler)
# before torch is imported: threads that wait for each other spin, which slows other tests down
os.environ["OMP_NUM_THREADS"] = "1"
# a process that keeps no bytecode compiles the package and the tests anew: half a second each
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# before ray or wandb is imported: workers and sub-processes inherit it
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# by default 15: workers that starve beside the tests of another process, which are not that nice
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
# any `ray.init()` joins the cluster that Ray's folder names, a user's own or one of another test
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it holds sockets
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)
os.environ["SELFKD_CACHE"] = os.path.join(os.environ["RAY_TMPDIR"], "cache")
os.environ["SELFKD_PATIENCE"] = "5"  # seconds: tests have disks that stay full
for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "RAY_ADDRESS"):
    os.environ.pop(name, None)
os.environ["NETRC"] = os.devnull
os.environ["PYTHONPATH"] = os.pathsep.join(  # of workers: the jobs that tests give them
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)


LONG = (  # first, so that none of them is left to one process at the end
    *("test_submit", "test_pool", "test_examples", "test_group", "test_pseudo_terminal"),
    *("test_online", "test_generations", "test_ensemble", "test_cluster", "test_remote"),
    *("test_capacity", "test_killed_driver", "test_nodes", "test_fuzz", "test_study"),
    "test_tune_configs",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """End a test on one thread: a job in its process sets as many as its config has CPUs."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what drivers that tests have killed left behind, such as Ray's log monitor."""
    if session.config.getoption("numprocesses", None):
        return  # the controller runs no tests: its workers do, each with a folder of its own
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # its service ends itself
    left = [process for process in psutil.process_iter() if _is_ours(process)]
    for process in left:
        process.kill()
    psutil.wait_procs(left)


def _is_ours(process: psutil.Process) -> bool:
    try:
        folder = process.environ().get("RAY_TMPDIR")
    except psutil.Error:
        return False
    return folder == os.environ["RAY_TMPDIR"] and process.pid != os.getpid()
