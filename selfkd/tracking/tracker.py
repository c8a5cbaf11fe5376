"""W&B: each trial a run, and one run with a step a generation. No fault here stops a training."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from selfkd.analysis.verdicts import count, sentences_of
from selfkd.config import Config, to_tree
from selfkd.errors import describe_error
from selfkd.results import (
    DEPLOYED,
    STUDENT,
    Confirmation,
    DeploySummary,
    EnsembleSummary,
    Epoch,
    Event,
    GenerationConfirmed,
    GenerationFinished,
    GenerationResult,
    GenerationsSummary,
    RunFinished,
    Trial,
    TrialFinished,
    TrialProgressed,
    TrialResult,
    best_generation,
    find_main,
    to_row,
)
from selfkd.storage.files import fetch
from selfkd.storage.rows import load_row
from selfkd.text import shell_quote
from selfkd.tracking.base import NoTracker, end_of_tracking
from selfkd.tracking.host import base_url
from selfkd.tracking.rows import (
    best_and_last,
    confirmation_row,
    confirmation_summary,
    deploy_rows,
    deploy_summary,
    epoch_row,
    generation_row,
    intervals,
    short_id,
    short_name,
    trial_config,
    trial_rank,
    trial_summary,
    validation_summaries,
)
from selfkd.tracking.surroundings import LONGEST
from selfkd.tracking.temporary import import_wandb

if TYPE_CHECKING:
    from selfkd.tracking.run import LoggedRun

log = logging.getLogger(__name__)
Plots = Callable[[Path], Mapping[str, str]]
SHOW_SECONDS = 5.0
"""Time after which it is said what is still to be written at the end."""
LEDGER = "done.txt"
"""File in W&B's folder that lists the runs that are whole."""


class WandbTracker(NoTracker):
    """Logs a run to W&B from a thread of its own, so that training never waits for it.

    Args:
        mode: `online` or `offline`.
        name: Name of the run: the group of its trials.
        run_id: Start of the stable ids of its W&B runs.
        folder: Folder that W&B writes to, on this machine.
        config: Config of the run.
        run: Run folder, with the results and models; `folder` when not given.
        plots: Maker of the figures of a run folder, pages in HTML by their names.
    """

    def __init__(
        self,
        mode: Literal["online", "offline"],
        *,
        name: str,
        run_id: str,
        folder: Path,
        config: Config,
        run: Path | None = None,
        plots: Plots | None = None,
    ) -> None:
        # imported here: wandb takes half a second
        import_wandb()
        from selfkd.tracking import artifacts
        from selfkd.tracking import run as logged
        from selfkd.tracking import session as runs

        self._show = logged
        self._start_seconds = runs.START_SECONDS
        self._folder, self._run_folder = folder, folder if run is None else run
        self._name, self._run_id, self._config = name[:LONGEST], short_id(run_id), config
        self._plots = plots
        self._session = runs.Session(
            online=mode == "online",
            url=base_url() if mode == "online" else "",
            project=config.tracking.project,
            entity=config.tracking.entity,
            group=self._name,
            folder=folder,
            wait=config.tracking.wait,
        )
        self._artifacts = artifacts.Artifacts(config, name=name, folder=self._run_folder)
        self._done = self._session.done()
        self._trials: dict[str, LoggedRun] = {}
        self._epochs: dict[str, int] = {}
        self._kept: set[tuple[str, ...]] = set()
        self._best: dict[str, tuple[tuple[float, float, int], LoggedRun]] = {}
        self._results: list[GenerationResult] = []
        self._verdict: str | None = None
        self._whole: LoggedRun | None = None  # the run of the lineage, or of the ensemble
        self._stopped: str | None = None  # why, and from when
        self._closed = False
        self._handled = 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
        self._thread.start()
        self._work.put(self._replay)

    @property
    def description(self) -> str:  # type: ignore[override]
        """Where the run can be seen, what has not been sent yet, and what could not be logged."""
        return f"W&B: {self._where()}{self._missing()}"

    def _where(self) -> str:
        session, folder = self._session, self._folder / "wandb"
        torn = self._closed and not self._whole_in_files
        if not session.wanted_online:
            if torn:
                whole = session.done()
                listed = f", listed in {folder / LEDGER}" if whole else ""
                return f"not all could be logged; {count(len(whole), 'run')} whole{listed}"
            if self._closed and not folder.is_dir():
                return "offline, nothing was logged"
            again = f"wandb sync {shell_quote(str(folder))}"
            return f"offline, in {folder}; send it with: {again}"
        place = session.page or f"project {self._config.tracking.project}, group {self._name}"
        if self._closed and session.unsent:
            again = f"wandb sync --include-online {shell_quote(str(folder))}"
            number = len(session.torn)
            lost = f" ({number} of them not whole in their files)" if number else ""
            unsent = f"{count(len(session.unsent), 'run')} could not be sent whole to {place}{lost}"
            return f"{unsent}; send the rest with: {again}"
        return f"not all could be logged to {place}" if torn else f"online, {place}"

    def _missing(self) -> str:
        """Return what could not be logged, and why, as the end of a sentence."""
        stopped = f"; nothing is logged since {self._stopped}" if self._stopped else ""
        lost = (
            f"; {count(number, what)} could not be logged ({reason})"
            for what, (number, reason) in self._session.lost.items()
        )
        torn = len(self._session.torn) if self._closed and not self._session.wanted_online else 0
        files = (
            f"; {count(torn, 'run')} not whole in the files, as where the disk is full"
            if torn
            else ""
        )
        return stopped + "".join(lost) + files

    @property
    def incomplete(self) -> bool:  # type: ignore[override]
        """Whether something could not be logged or sent."""
        unsent = self._closed and bool(self._session.unsent)
        return unsent or not self._whole_in_files or bool(self._session.lost)

    @property
    def _whole_in_files(self) -> bool:
        alive = self._closed and self._thread.is_alive()
        return not (self._stopped or self._session.torn or alive)

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            self._handled += 1
            if self._stopped is not None:
                continue
            try:
                work()
            except Exception as error:  # noqa: BLE001 - tracking must never stop a training
                self._stopped = end_of_tracking(error)
                log.warning("W&B tracking stops, training goes on: %s", describe_error(error))

    def _replay(self) -> None:
        """Log the trials that a killed start left done, and not logged whole."""
        for path in sorted(self._run_folder.glob("generation_*/result.json")):
            self._artifacts.models(load_row(GenerationResult, path))  # the teachers of those trials
        trials = self._config.tracking.runs == "all"
        for path in sorted(self._run_folder.glob("*/**/result.json")) if trials else ():
            if path.parent.name.startswith("trial_"):
                trial = load_row(TrialResult, path)
                done = self._id(trial.stage, trial.trial) in self._done
                if trial.status != "failed" and not done:
                    self._report(trial, trial.history)
                    self._finish(trial)

    def _id(self, stage: str, trial: int) -> str:
        return f"{self._run_id}-{short_name(stage, trial)}"

    def _tags(self, *more: str) -> list[str]:
        return [tag[:64] for tag in (self._config.data.name, self._config.model.name, *more)]

    def _trial(self, trial: Trial) -> LoggedRun:
        run_id = self._id(trial.stage, trial.trial)
        if run_id not in self._trials:
            search = self._config.search
            run = self._session.open(
                run_id,
                name=short_name(trial.stage, trial.trial),
                axis="epoch",
                job_type=trial.stage,
                config=trial_config(self._config, trial),
                tags=self._tags(trial.stage),
                summaries={"loss": "min", **validation_summaries(search.metric, search.mode)},
            )
            self._artifacts.use(run, trial.teachers, self._whole)
            self._trials[run_id] = run
            self._epochs[run_id] = -1
        return self._trials[run_id]

    def _open_whole(self, kind: str, *, axis: str, name: str | None = None) -> LoggedRun:
        if self._whole is None:
            search = self._config.search
            self._whole = self._session.open(
                f"{self._run_id}-{kind}",
                name=name or self._name,
                axis=axis,
                job_type=kind,
                config=to_tree(self._config),
                tags=self._tags(kind),
                summaries=validation_summaries(search.metric, search.mode),
                left_code=0,
                packages=True,
            )
        return self._whole

    def settle(self, config: Config) -> None:
        """Take the config with what its workers have decided, before any event of a trial."""
        self._config = replace(config, tracking=self._config.tracking)

    def __call__(self, event: Event) -> None:
        """Log an event, from the tracker's own thread."""
        match event:
            case TrialProgressed(trial) if self._config.tracking.runs == "lineage":
                self._work.put(lambda: self._keep_targets(trial.teachers))
            case TrialFinished() if self._config.tracking.runs == "lineage":
                pass
            case TrialProgressed(trial, epochs):
                self._work.put(lambda: self._report(trial, epochs))
            case TrialFinished(result):
                self._work.put(lambda: self._finish(result))
            case GenerationFinished(generation):
                self._work.put(lambda: self._generation(generation))
            case GenerationConfirmed(confirmation):
                self._work.put(lambda: self._confirm(confirmation))
            case RunFinished(GenerationsSummary() as of_generations):
                self._work.put(lambda: self._judge(of_generations))
            case RunFinished(EnsembleSummary() as summary):
                self._work.put(lambda: self._ensemble(summary))
            case RunFinished(DeploySummary() as deployed):
                self._work.put(lambda: self._deploy(deployed))

    def _report(self, trial: Trial, epochs: Sequence[Epoch]) -> None:
        run, run_id = self._trial(trial), self._id(trial.stage, trial.trial)
        for epoch in epochs:
            if epoch.epoch > self._epochs[run_id]:  # a trial whose worker died begins again
                self._epochs[run_id] = epoch.epoch
                run.log(epoch_row(epoch))

    def _keep_targets(self, teachers: tuple[str, ...]) -> None:
        """Log the cached logits that a trial without a run of its own reads."""
        if self._whole is not None and teachers not in self._kept:
            self._kept.add(teachers)
            self._artifacts.use(None, teachers, self._whole)

    def _finish(self, trial: TrialResult) -> None:
        """Log the summary of a trial and close its run.

        The run of a generation's best trial so far stays open, as that of the chosen one has the
        model as its artifact.
        """
        run, stage = self._trial(trial), trial.stage
        run.summarise(trial_summary(trial))
        run.left_code = 1 if trial.status == "failed" else 0
        del self._trials[run.run_id], self._epochs[run.run_id]
        if trial.status == "completed" and stage.startswith("generation-"):
            search = self._config.search
            rank = trial_rank(trial, metric=search.metric, mode=search.mode)
            before = self._best.get(stage)
            if before is None or rank < before[0]:
                run.whole = False
                self._best[stage] = rank, run
                if before is None:
                    return
                run = before[1]
                run.whole = True
        elif trial.status == "completed" and stage == "members" and trial.hash:
            path = self._run_folder / "members" / f"trial_{trial.trial:03d}"
            facts = {"hash": trial.hash, "member": trial.trial}
            model = self._artifacts.model(path / STUDENT, facts, kind="member")
            if model is not None:
                run.add_artifact(model, aliases=[f"member-{trial.trial}"])
        self._session.finish(run, run.left_code)

    def _generation(self, result: GenerationResult) -> None:
        """Log a generation as a step of the lineage, with its models."""
        lineage = self._open_whole("lineage", axis="generation")
        self._results.append(result)
        lineage.log(generation_row(result))
        search = self._config.search
        best = best_generation(self._results, metric=search.metric, mode=search.mode)
        lineage.summarise(best_and_last(self._results, best, search.metric))
        stage = f"generation-{result.generation}"
        _, run = self._best.pop(stage, (None, None))
        chosen = self._id(stage, result.trial)
        for rank, (alias, model) in enumerate(self._artifacts.models(result)):
            if model is None:
                continue
            if rank == 0 and run is not None and run.run_id == chosen:
                run.add_artifact(model, aliases=[alias])
            elif rank or chosen not in self._done:  # else an earlier start has logged it
                lineage.add_artifact(model, aliases=[alias])
        if run is not None:
            run.whole = True
            self._session.finish(run, 0)

    def _confirm(self, confirmation: Confirmation) -> None:
        """Log a replicated generation as a step of the lineage."""
        if self._whole is not None:
            self._whole.log(confirmation_row(confirmation))

    def _judge(self, summary: GenerationsSummary) -> None:
        """Log what is said of the generations: the gain of the best, the headline, all of it."""
        if self._whole is None:
            return
        for best in summary.generations:
            if best.generation == summary.best:
                found = best_and_last(summary.generations, best, self._config.search.metric)
                self._whole.summarise(found)
        for confirmation in summary.confirmations:
            if confirmation.generation == summary.best:
                self._whole.summarise(confirmation_summary(confirmation))
        self._say(self._whole, sentences_of(summary))

    def _say(self, run: LoggedRun, sentences: Sequence[str]) -> None:
        """Log a verdict: the headline in the summary, all of it as notes."""
        if sentences:
            self._verdict = sentences[0]
            run.summarise({"verdict": self._verdict})
            run.note("\n".join(sentences))

    def _ensemble(self, summary: EnsembleSummary) -> None:
        """Log the table of an ensemble and its student, a step a row, and the gain."""
        run = self._open_whole("ensemble", axis="row")
        for number, row in enumerate(summary.rows):
            plain = {k: v for k, v in to_row(row).items() if k != "runs" and v is not None}
            run.log({"row": number, **plain})
        gains = {"gain": summary.gain, "transfer_gain": summary.transfer_gain}
        found = intervals({**gains, "share_kept": summary.share})
        student = summary.rows[-1]
        if (tested := f"test_{find_main(student.metrics)}") in student.metrics:
            found[f"student_{tested}"] = student.metric(tested)
        run.summarise(found)
        self._say(run, sentences_of(summary))
        path = self._run_folder / STUDENT
        model = self._artifacts.model(path, to_row(summary.chosen))
        if model is not None:
            run.add_artifact(model)

    def _deploy(self, summary: DeploySummary) -> None:
        """Log the table of a deployment, and its files as one artifact."""
        run = self._open_whole("deploy", axis="row", name="deploy")
        rows = deploy_rows(summary)
        for number, row in enumerate(rows):
            run.log({"row": number, **{k: v for k, v in row.items() if v is not None}})
        run.do(lambda run: run.log({"forms": self._show.make_table(rows)}), extra="table")
        run.summarise(deploy_summary(summary))
        self._say(run, summary.sentences)
        made, used = self._artifacts.deployed(summary, self._run_folder / DEPLOYED)
        if used is not None:
            run.add_artifact(used, used=True)
        run.add_artifact(made, aliases=["deployed"])

    def _end(self) -> None:
        """Log the report of the run folder and its plots; send an alert where one is wanted."""
        whole = self._whole
        if whole is None:
            return
        report = self._run_folder / "report.html"
        if report.exists():
            self._show_page(whole, "report", fetch(report).read_text(encoding="utf-8"))
        figures = self._plots(self._run_folder) if self._plots is not None else {}
        for name, figure in figures.items():
            self._show_page(whole, name, figure)
        if self._config.tracking.alerts:
            text = self._verdict or f"{len(self._results)} generations"
            whole.do(lambda run: run.alert(f"selfkd: {self._name} has ended", text), extra="alert")

    def _show_page(self, run: LoggedRun, name: str, page: str) -> None:
        # made anew where the run is opened again: a page belongs to one run
        run.do(lambda run: run.summary.update({name: self._show.make_html(page)}), extra="page")

    def close(self) -> None:
        """Finish what is open; wait for it, within bounds."""
        if self._closed:
            return
        self._closed = True
        self._work.put(self._end)
        self._work.put(None)
        handled, since = self._handled, time.monotonic()
        while self._thread.is_alive():
            self._thread.join(timeout=SHOW_SECONDS)
            if handled != self._handled:
                handled, since = self._handled, time.monotonic()
            elif time.monotonic() - since > 2 * self._start_seconds + 10:
                late = TimeoutError("W&B does not respond")
                self._stopped = self._stopped or end_of_tracking(late)
                break
            left = self._work.qsize() - 1
            if left > 0:
                log.warning("W&B: %s to write yet", count(left, "event"))
        try:
            self._session.close()
        except Exception as error:  # noqa: BLE001 - tracking must never stop a training
            self._stopped = self._stopped or end_of_tracking(error)
            log.warning("W&B could not be left in order: %s", describe_error(error))
