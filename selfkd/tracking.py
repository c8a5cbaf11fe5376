"""W&B: each trial a run, and one run with a step a generation. Nothing here stops a training."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import queue
import shutil
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from selfkd.config import Config, ConfigError, to_tree
from selfkd.jobs import Row

REACH_SECONDS = 3.0
EARLIER_HOST = "api.wandb.ai"  # under which wandb login kept keys before, and still finds them
START_SECONDS = 10.0
DRAIN_SECONDS = 60.0
HIDDEN = ("history", "models", "predictions", "point", "hash")

log = logging.getLogger(__name__)


class NoTracker:
    """Follows a run and writes nothing."""

    description = "W&B: none"

    def working(self, title: str, parts: int) -> None:
        """Nothing."""

    def worked(self, row: Row) -> None:
        """Nothing."""

    def stage_started(self, title: str, trials: int, done: int) -> None:
        """Nothing."""

    def trial_reported(self, trial: Row, rows: Sequence[Row]) -> None:
        """Nothing."""

    def trial_finished(self, trial: Row) -> None:
        """Nothing."""

    def generation_finished(self, result: Row) -> None:
        """Nothing."""

    def generation_confirmed(self, confirmation: Row) -> None:
        """Nothing."""

    def noted(self, text: str) -> None:
        """Nothing."""

    def compressed(self, summary: Row) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class WandbTracker(NoTracker):
    """Writes a run to W&B from a thread of its own, so that training never waits for it.

    Args:
        mode: `online` or `offline`.
        name: of the run: the group of its trials.
        run_id: start of the stable ids of its W&B runs.
        folder: where W&B writes.
        config: of the run.
    """

    def __init__(
        self,
        mode: Literal["online", "offline"],
        *,
        name: str,
        run_id: str,
        folder: Path,
        config: Config,
    ) -> None:
        import wandb  # half a second: only when it is used

        self._wandb = wandb
        self._mode = mode
        self._folder = folder
        self._name, self._run_id, self._config = name, run_id, config
        self._trials: dict[tuple[str, int], Any] = {}
        self._lineage: Any = None
        self._broken = False
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
        self._thread.start()

    @property
    def description(self) -> str:  # type: ignore[override]
        """Say where the run can be seen."""
        if self._mode == "online":
            return f"W&B: online, project {self._config.tracking.project}, group {self._name}"
        return (
            f"W&B: offline, in {self._folder / 'wandb'}; "
            f"send it with: wandb sync {self._folder / 'wandb'}/offline-run-*"
        )

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            if self._broken:
                continue
            try:
                work()
            except Exception as error:  # noqa: BLE001 - tracking must never stop a training
                self._broken = True
                log.warning("W&B tracking stops, training goes on: %s", error)

    def _open(self, run_id: str, axis: str, job_type: str, config: Mapping[str, Any]) -> Any:
        # what is logged again after a resume replaces what an interrupted run left offline
        for left in (self._folder / "wandb").glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(left, ignore_errors=True)
        run = self._start(run_id, job_type, config)
        run.define_metric(axis)
        run.define_metric("*", step_metric=axis)
        return run

    def _start(self, run_id: str, job_type: str, config: Mapping[str, Any]) -> Any:
        settings = self._wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_transaction_log_flush_interval=2,
            init_timeout=START_SECONDS,
        )
        try:
            return self._wandb.init(
                project=self._config.tracking.project,
                entity=self._config.tracking.entity,
                group=self._name,
                job_type=job_type,
                id=run_id,
                name=run_id,
                config=dict(config),
                dir=str(self._folder),
                mode=self._mode,
                resume="allow" if self._mode == "online" else None,
                reinit="create_new",
                settings=settings,
            )
        except self._wandb.errors.Error as error:
            if self._mode == "offline":
                raise
            log.warning("W&B does not answer (%s): tracking goes on offline", error)
            self._wandb.teardown()
            self._mode = "offline"
            self._trials.clear()
            self._lineage = None
            return self._start(run_id, job_type, config)

    def _trial(self, trial: Row) -> Any:
        key = (trial["stage"], trial["trial"])
        if key not in self._trials:
            config = to_tree(self._config.at(trial["point"]))
            config |= {name: trial[name] for name in ("trial", "teachers")}
            config["trial_seed"] = trial["seed"]
            stage, _, generation = trial["stage"].partition("-")
            if generation:
                config["generation"] = int(generation)
            short = f"g{generation}" if stage == "generation" else trial["stage"]
            run_id = f"{self._run_id}-{short}-t{key[1]}"
            self._trials[key] = self._open(run_id, "epoch", trial["stage"], config)
        return self._trials[key]

    def trial_reported(self, trial: Row, rows: Sequence[Row]) -> None:
        """Log epochs."""

        def work() -> None:
            run = self._trial(trial)
            for row in rows:
                if row["epoch"] > _already(run, "epoch"):
                    run.log({name: value for name, value in row.items() if name not in HIDDEN})

        self._work.put(work)

    def trial_finished(self, trial: Row) -> None:
        """Write the summary and close the trial's run."""

        def work() -> None:
            run = self._trial(trial)
            for name in ("status", "error", "val_accuracy", "val_nll", "train_seconds"):
                if trial.get(name) is not None:
                    run.summary[name] = trial[name]
            run.finish(exit_code=1 if trial["status"] == "failed" else 0)
            del self._trials[trial["stage"], trial["trial"]]

        self._work.put(work)

    def generation_finished(self, result: Row) -> None:
        """Log one step of the lineage; after a resume all finished generations come again."""

        def work() -> None:
            if self._lineage is None:
                self._lineage = self._open(
                    f"{self._run_id}-lineage", "generation", "lineage", to_tree(self._config)
                )
            if result["generation"] > _already(self._lineage, "generation"):
                plain = {
                    name: value
                    for name, value in result.items()
                    if name not in HIDDEN
                    and value is not None
                    and not isinstance(value, list | dict)
                }
                self._lineage.log(plain)

        self._work.put(work)

    def compressed(self, summary: Row) -> None:
        """Write the table of an ensemble and its student, a step a row, and what is gained."""

        def work() -> None:
            run = self._open(f"{self._run_id}-ensemble", "row", "ensemble", to_tree(self._config))
            for number, row in enumerate(summary["rows"]):
                plain = {k: v for k, v in row.items() if k != "runs" and v is not None}
                run.log({"row": number, **plain})
            values = {"gain": summary["gain"], "share_kept": summary["share"] or {}}
            for name, interval in values.items():
                for end, value in interval.items():
                    run.summary[name if end == "value" else f"{name}_{end}"] = value
            run.summary["student_test_accuracy"] = summary["rows"][-1]["test_accuracy"]
            run.finish()

        self._work.put(work)

    def close(self) -> None:
        """Finish what is open; wait for it, but not for ever."""

        def work() -> None:
            for run in self._trials.values():
                run.finish(exit_code=1)
            if self._lineage is not None:
                self._lineage.finish()

        self._work.put(work)
        self._work.put(None)
        self._thread.join(timeout=DRAIN_SECONDS)


def _already(run: Any, axis: str) -> int:
    """Return how far an online run had come before it was resumed."""
    return int(run.summary.get(axis, -1)) if getattr(run, "resumed", False) else -1


def make_tracker(config: Config, *, name: str, run_id: str, folder: Path) -> NoTracker:
    """Make the tracker that a config asks for; `auto` is online only where that will work.

    Raises:
        ConfigError: online is asked for, and there is no key.
    """
    mode = config.tracking.mode
    host = urlsplit(_base_url()) if mode in ("auto", "online") else urlsplit("")
    has_key = _has_key(host.netloc)
    if mode == "auto" and os.environ.get("WANDB_MODE") in ("disabled", "dryrun"):
        mode = "none"
    elif mode == "auto" and os.environ.get("WANDB_MODE") == "offline":
        mode = "offline"
    elif mode == "auto":
        mode = "online" if has_key and _answers(host) else "offline"
    if mode == "none":
        return NoTracker()
    if mode == "online" and not has_key:
        raise ConfigError(
            "tracking.mode must be offline where there is no key, got online: "
            "run wandb login or set WANDB_API_KEY"
        )
    return WandbTracker(mode, name=name, run_id=run_id, folder=folder, config=config)


def _base_url() -> str:
    """Return the host that the installed client talks to; its default has changed before."""
    if "WANDB_BASE_URL" in os.environ:
        return os.environ["WANDB_BASE_URL"]
    import wandb

    return str(wandb.Settings().base_url)


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(os.environ.get("NETRC")).hosts
        return host in known or ("WANDB_BASE_URL" not in os.environ and EARLIER_HOST in known)
    return False


def _answers(host: Any) -> bool:
    port = host.port or (443 if host.scheme == "https" else 80)
    try:
        with socket.create_connection((host.hostname, port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False
