"""Ray jobs from outside the cluster: submit, follow the log, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from selfkd.errors import ConfigError
from selfkd.execution.cluster import token_message

ANSWER_SECONDS = 5.0  # limit for a response of the dashboard
PENDING_SECONDS = 10.0  # between two messages about a pending job
STOP_SECONDS = 60.0  # limit for a job to stop
RETRIES = 20  # of a lost connection, a second apart
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOO_LARGE = "413"
STARTING = "No available agent"  # of a cluster whose nodes are just starting
START_SECONDS, PAUSE_SECONDS = 60.0, 1.0
LOST = (aiohttp.ClientError, requests.RequestException, RuntimeError, OSError)

Say = Callable[[str], object]
"""Callback for text to a person."""


@dataclass(frozen=True, kw_only=True)
class End:
    """End of a job."""

    status: str
    """Ray's status: SUCCEEDED, FAILED, STOPPED, or that of a job that is no longer followed."""
    code: int | None
    """Exit code of the job's command; None where it did not run to its end."""
    message: str
    """Ray's message about the job."""


def open_client(address: str) -> JobSubmissionClient:
    """Connect to the dashboard of a cluster's head.

    Args:
        address: URL of the dashboard, `http://HOST:PORT`.

    Raises:
        ConfigError: There is no Ray dashboard at the address, or it requires another token.
    """
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"--address must be http://HOST:PORT of the dashboard, got {address}")
    way_out = (
        "is it the head's dashboard (port 8265 by default)? It listens on the head's loopback "
        "only, unless asked: ray dashboard examples/cluster.yaml, ssh -L 8265:localhost:8265 HEAD "
        "or kubectl port-forward brings it here"
    )
    try:  # Ray's own request has no timeout
        response = requests.get(f"{address}/api/version", timeout=ANSWER_SECONDS)
    except requests.RequestException as error:
        raise ConfigError(
            f"--address must answer, got {address}: {_short(error)}; {way_out}"
        ) from None
    if response.status_code not in (200, 401, 403):
        raise ConfigError(
            f"--address must be a Ray dashboard, got {address}, which answers "
            f"{response.status_code}; {way_out}"
        )
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ConfigError(token_message(f"the cluster at {address}")) from None
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"--address must be a Ray dashboard, got {address}: {_short(error)}; {way_out}"
        ) from None


def submit(
    client: JobSubmissionClient, *, job: str, entrypoint: str, runtime_env: Mapping[str, Any]
) -> None:
    """Upload the files of a job, and submit it; a cluster that is starting is waited for.

    Args:
        client: Client of the cluster.
        job: Submission id, new on the cluster.
        entrypoint: Command line of the job.
        runtime_env: Runtime environment of the job.

    Raises:
        ConfigError: The submission id exists, the files are too large, or the runtime environment
            is invalid.
    """
    retrying = Retrying(
        retry=retry_if_exception(lambda error: STARTING in str(error)),
        wait=wait_fixed(PAUSE_SECONDS),
        stop=stop_after_delay(START_SECONDS),
        reraise=True,
    )
    try:
        retrying(
            client.submit_job,
            entrypoint=entrypoint,
            submission_id=job,
            runtime_env=dict(runtime_env),
        )
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        if f"status code {TOO_LARGE}" in str(error):
            raise ConfigError(
                "--working-dir must be at most 100 MiB as a zip file, which is Ray's limit: list "
                "what need not travel in its .rayignore, and put data where every node sees it"
            ) from None
        if "already exists" in str(error):
            raise ConfigError(
                f"--name must be new on the cluster, got {job}, a job of its"
            ) from None
        raise ConfigError(f"the job was refused: {_short(error)}") from None


@contextmanager
def kept(say: Say) -> Iterator[Sequence[int]]:
    """Defer Ctrl-C and SIGTERM while a job is submitted, which may run all the same.

    A second signal raises KeyboardInterrupt.

    Args:
        say: Callback for messages to the user.

    Yields:
        Signals received so far.
    """
    heard: list[int] = []

    def defer(number: int, frame: FrameType | None) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        say("stopping; once more Ctrl-C leaves at once")

    before = [(number, signal.signal(number, defer)) for number in SIGNALS]
    try:
        yield heard
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def follow(
    client: JobSubmissionClient, job: str, *, write: Say, say: Say, heard: Sequence[int] = ()
) -> End:
    """Follow a job to its end; Ctrl-C or SIGTERM stops the job, a second one leaves it running.

    Args:
        client: Client of the cluster.
        job: Submission id.
        write: Callback for new text of the log.
        say: Callback for messages to the user.
        heard: Signals received before; with any, the job is stopped at once.

    Raises:
        ConnectionError: The cluster did not respond `RETRIES` times.
    """
    return asyncio.run(_LogFollower(client, job, write, say).follow(heard))


class _LogFollower:
    def __init__(self, client: JobSubmissionClient, job: str, write: Say, say: Say) -> None:
        self.client, self.job, self.write, self.say = client, job, write, say
        self.stopping = asyncio.Event()
        self.seen = 0  # characters of the log

    async def follow(self, heard: Sequence[int]) -> End:
        tail = asyncio.create_task(self._tail())
        beside = [asyncio.create_task(work) for work in (self._say_pending(), self._stop(tail))]
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            if self.stopping.is_set():
                tail.cancel()
            self.stopping.set()

        before = [(number, signal.getsignal(number)) for number in SIGNALS]
        for number in SIGNALS:
            loop.add_signal_handler(number, interrupt)
        if heard:
            interrupt()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await tail
        finally:
            for task in beside:
                task.cancel()
            for number, handler in before:
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
        return await self._end()

    async def _info(self) -> Any:
        return await asyncio.to_thread(self.client.get_job_info, self.job)

    async def _end(self) -> End:
        info = await self._info()
        return End(status=info.status.value, code=info.driver_exit_code, message=info.message or "")

    async def _tail(self) -> None:
        """Write the log until the job ends; a lost connection resumes at the same character."""
        failures = 0
        while True:
            error = None
            skip = self.seen
            try:
                async for text in self.client.tail_job_logs(self.job):
                    failures = 0
                    fresh, skip = text[skip:], max(0, skip - len(text))
                    self.seen += len(fresh)
                    if fresh:
                        self.write(fresh)
                if (await self._info()).status.is_terminal():
                    return
            except LOST as lost:
                error = lost
                failures += 1
            if failures == 1:
                self.say(f"the cluster does not answer ({_short(error)}): trying again")
            if failures > RETRIES:
                raise ConnectionError(
                    f"the cluster did not answer {RETRIES} times ({_short(error)}); "
                    f"{self.job} may still be running"
                ) from error
            await asyncio.sleep(1)

    async def _say_pending(self) -> None:
        """Say at intervals why a job is pending."""
        start = time.monotonic()
        while True:
            await asyncio.sleep(PENDING_SECONDS)
            with contextlib.suppress(*LOST):
                info = await self._info()
                if info.status.value != "PENDING":
                    return
                passed = time.monotonic() - start
                self.say(f"{self.job} is pending for {passed:.0f} s: {info.message}")

    async def _stop(self, tail: asyncio.Task[None]) -> None:
        """Stop the job on a signal; stop following it where it does not end."""
        await self.stopping.wait()
        self.say(f"stopping {self.job}; once more Ctrl-C leaves without waiting for it")
        try:
            await asyncio.to_thread(self.client.stop_job, self.job)
        except LOST as error:
            self.say(f"{self.job} could not be stopped: {_short(error)}")
        await asyncio.sleep(STOP_SECONDS)
        tail.cancel()


def _short(error: BaseException | None) -> str:
    """Return the innermost cause of an error on one line; HTTP libraries wrap it several times."""
    while error is not None and isinstance(error.args[:1] and error.args[0], BaseException):
        error = error.args[0]
    reason = getattr(error, "reason", None)
    return " ".join(str(reason or error).split())[:500]
