"""What tests of the recipes share: runs in one process, what they tell, how they are stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfkd.config import Config
from selfkd.execution.jobs import InProcess, Job
from selfkd.experiments.arms import Run
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    Event,
    GenerationConfirmed,
    GenerationFinished,
    Message,
    Row,
    StageStarted,
    TaskProgressed,
    TrialFinished,
)
from selfkd.worker.jobs import run_job

Payload = Mapping[str, Any]
Fault = Callable[[str, Payload], str | None]


class Recorder:
    """Remembers the events of a run."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def stages(self) -> list[tuple[str, int, int]]:
        return [(event.title, event.trials, event.done) for event in self.of(StageStarted)]

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.of(Message)]

    @property
    def states(self) -> list[str]:
        return [event.state for event in self.of(TaskProgressed) if event.state]

    @property
    def finished(self) -> list[tuple[str, int, str]]:
        trials = [event.trial for event in self.of(TrialFinished)]
        return [(trial.stage, trial.trial, trial.status) for trial in trials]

    @property
    def chosen(self) -> list[int]:
        return [event.result.generation for event in self.of(GenerationFinished)]

    @property
    def confirmed(self) -> list[int]:
        return [event.confirmation.generation for event in self.of(GenerationConfirmed)]


class Count:
    """Does jobs for real, and remembers them.

    Args:
        fail: Returns why a job fails, or None.
        stop: Number of the job at which the run is interrupted.
    """

    def __init__(self, fail: Fault | None = None, *, stop: int | None = None) -> None:
        self.jobs: list[tuple[str, Payload]] = []
        self.fail, self.stop = fail, stop

    def __call__(self, kind: str, payload: Payload) -> Iterator[Row]:
        if self.stop is not None and len(self.jobs) >= self.stop:
            raise KeyboardInterrupt
        self.jobs.append((kind, payload))
        if self.fail and (error := self.fail(kind, payload)):
            raise OSError(error)
        if kind == "time":  # half a second each: timed where it is what is tested
            row = {"parameters": 1, "ms_1": 1.0, "ms_128": 0.1}
            yield {"rows": [row] * len(payload["models"])}
        else:
            yield from run_job(kind, payload)

    def kinds(self, kind: str) -> list[Payload]:
        return [payload for name, payload in self.jobs if name == kind]

    def trained(self, stage: str) -> list[Payload]:
        return [job for job in self.kinds("train") if job["stage"] == stage]


class StopAfter:
    """An executor that is interrupted after so many jobs, as by Ctrl-C or a kill."""

    def __init__(self, do: Callable[[str, Payload], Iterator[Row]], jobs: int) -> None:
        self.do, self.left = do, jobs

    def run(self, jobs: Any, **options: Any) -> None:
        class Counted:
            def ask(_) -> Job | None:  # noqa: N805 - `self` is the executor
                job = jobs.ask()
                if job is not None:
                    self.left -= 1
                    if self.left < 0:
                        raise KeyboardInterrupt
                return job  # type: ignore[no-any-return]

            report, tell = jobs.report, jobs.tell

        InProcess(self.do).run(Counted(), **options)  # type: ignore[arg-type]


def make_run(
    config: Config,
    folder: RunFolder,
    do: Any = run_job,
    events: Callable[[Event], None] | None = None,
    *,
    function: str | None = None,
) -> Run:
    """Return a run whose jobs are done in this process, by an executor or by a function."""
    executor = do if hasattr(do, "run") else InProcess(do)
    return Run(
        config=config,
        folder=folder,
        executor=executor,
        events=events or Recorder(),
        function=function,
    )


def predictions(folder: RunFolder, mark: str) -> Path:
    """Return the file of a model's logits."""
    return folder.path / "predictions" / f"{mark}.safetensors"


def without_clock(row: Any) -> Any:
    """Return a result without what a clock measured."""
    timed = {name: 0.0 for name in ("seconds", "train_seconds") if hasattr(row, name)}
    return replace(row, **timed)
