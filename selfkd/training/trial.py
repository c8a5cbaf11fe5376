"""A training function, the built-in one or a user's own: what it is given, and how it is run."""

from __future__ import annotations

import copy
import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn, set_num_threads

from selfkd.config import Config, ModelConfig, resume_invariant
from selfkd.distill.distiller import Distiller
from selfkd.distill.layers import check_whole, unwrap
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.distill.terms import Term
from selfkd.models import parameters_count
from selfkd.results import CHECKPOINT, OWN, Row
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.remote import as_path
from selfkd.training.progress import Progress
from selfkd.training.ranks import Ranks


@dataclass(kw_only=True)
class Trial:
    """What a training function is given: `train_fn(trial)` trains one student.

    It asks for its loss, reports after each epoch, and hands over the student with a report:

        def train_fn(trial):
            torch.manual_seed(trial.seed)
            student = make_my_model(width=trial.params["width"])
            distiller = trial.distiller(student)  # generation 0: labels only
            for epoch in range(10):
                ...
                trial.report({"val_accuracy": accuracy}, student=student)

    With `resources.workers` above 1 it runs on every rank, with `torch.distributed` initialised:
    it divides its batches and wraps its student itself. Only what the first rank reports counts;
    `checkpoint` is the same on all, but the random numbers that it brings back are the first's.

    A training function may also be a generator that yields rows, as the built-in one does.
    """

    config: Config
    """Of the run, with this trial's values of the search space."""
    stage: str
    """What the trial belongs to, such as generation-3."""
    seed: int
    """Its own, for initialisation, order and all else that is drawn."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network that the config names, for functions that make it by that."""
    teachers: Sequence[Mapping[str, Any]] = ()
    """`hash`, `checkpoint` and perhaps `weight` of each; none to learn from labels."""
    targets: Path = Path()
    """Folder of the soft targets."""
    path: Path
    """File that the student is saved to."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """JSON data: what else the training depends on."""
    ranks: Ranks = field(default_factory=Ranks.here)
    """This process among those that train the student."""
    _tell: Callable[[Row], None] | None = None
    _start: float = field(default_factory=time.perf_counter)
    _spent: float = 0.0

    @property
    def params(self) -> dict[str, Any]:
        """The user's own settings: `--set params.width=64`, or searched as `params.width`."""
        return self.config.params

    @property
    def generation(self) -> int:
        """0 learns from labels; k >= 1 from the generations before."""
        number = self.stage.partition("-")[2]  # of generation-3 or confirm-3
        return int(number) if number else 0

    def distiller(
        self,
        student: nn.Module,
        *,
        make_teacher: Callable[[], nn.Module] | None = None,
        terms: Mapping[str, Term | Mapping[str, Any]] | None = None,
    ) -> Distiller:
        """Return the loss of this trial: of labels in generation 0, then of its teachers too.

        T, alpha and the average are those of the trial's config.

        Args:
            student: of which the teachers have the architecture, in whatever wrapper; its weights
                are not changed.
            make_teacher: makes a network of the teachers' architecture where it is another.
            terms: further terms of the loss, as `Distiller` has them; those of features see the
                student, and need a single teacher.
        """
        distill, smoothing = self.config.distill, self.config.train.label_smoothing
        if not self.teachers:
            return Distiller(label_smoothing=smoothing, terms=terms, student=student)
        members = []
        for row in self.teachers:
            tensors, _ = load_tensors(as_path(row["checkpoint"]))
            network = unwrap(make_teacher()) if make_teacher else copy.deepcopy(unwrap(student))
            try:
                network.load_state_dict(tensors)
            except RuntimeError as error:
                first = str(error).splitlines()[0]
                raise ValueError(
                    f"student must have the architecture of its teacher {row['checkpoint']}, "
                    f"or make_teacher must be given: {first}"
                ) from None
            members.append(Teacher(network))
        return Distiller(
            members[0] if len(members) == 1 else Ensemble(members),
            temperature=distill.temperature,
            alpha=distill.alpha,
            average=distill.average,
            label_smoothing=smoothing,
            terms=terms,
            student=student,
        )

    def report(
        self,
        metrics: Mapping[str, float],
        *,
        student: nn.Module | None = None,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        """Report an epoch. The last student that is reported is the trial's.

        Args:
            metrics: by name; with `search.metric` among them, which the choice is made by.
            student: what has been trained so far, in whatever wrapper; whole, not in shards.
            checkpoint: what `checkpoint` gives back if the trial is interrupted: tensors, state
                dicts, numbers and text. It is written as often as the config's `checkpoint` says.

        Raises:
            TypeError: the checkpoint holds other things.
            ValueError: each rank has but a shard of the student (FSDP).
        """
        row: Row = {"epoch": len(self.progress.rows) + 1}
        row |= {name: float(value) for name, value in metrics.items()}
        row["seconds"] = self._spent + time.perf_counter() - self._start
        if student is not None and self.ranks.first:
            facts = {"stage": self.stage, "seed": self.seed}
            facts["parameters"] = parameters_count(student)
            check_whole("student", student)
            row["hash"] = save_tensors(self.path, unwrap(student).state_dict(), facts)
        self.progress.reached(row, checkpoint, together=False)
        if self._tell is not None:
            self._tell(row)

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """What this trial reported as its checkpoint before it was interrupted, if it was.

        Ask for it when all else is made: what had been reported is then part of this trial, and
        the random numbers of torch, NumPy and Python go on from where they were.
        """
        for row in self.progress.resume():
            if self._tell is not None:
                self._tell(row)
            self._spent = self.progress.spent
        return self.progress.state

    @cached_property
    def progress(self) -> Progress:
        """How far the trial is, and what it goes on from."""
        often = self.config.checkpoint
        return Progress(
            self.path.with_name(CHECKPOINT),
            made_from={
                "config": resume_invariant(self.config),
                "stage": self.stage,
                "seed": self.seed,
                "model": asdict(self.model),
                "teachers": [[row["hash"], row.get("weight")] for row in self.teachers],
                **self.more,
            },
            seconds=often.seconds,
            epochs=often.epochs,
            ranks=self.ranks,
        )


TrainFunction = Callable[[Trial], Iterator[Row] | None]


def run_function(function: TrainFunction, trial: Trial) -> Iterator[Row]:
    """Run a training function; yield the row of each epoch.

    Raises:
        ValueError: it reported no student, or not the metric that the choice is made by.
    """
    _ = trial.progress  # all ranks look for what was kept before one of them goes on
    if inspect.isgeneratorfunction(function):
        yield from function(trial)
        return
    rows = _in_thread(function, trial)
    metric = trial.config.search.metric
    for row in rows:
        if metric not in row:
            known = ", ".join(name for name in row if name not in OWN) or "none"
            raise ValueError(f"train_fn must report {metric} (search.metric), got {known}")
        yield row
    if trial.ranks.first and not any("hash" in row for row in trial.progress.rows):
        raise ValueError(
            "train_fn must report its student, as in trial.report(metrics, student=model), got none"
        )


class _Stopped(BaseException):
    """Ends a function whose trial is stopped early."""


def _in_thread(function: TrainFunction, trial: Trial) -> Iterator[Row]:
    """Turn what a function reports into a generator; closing that ends the function."""
    rows: queue.Queue[Row | BaseException | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def tell(row: Row) -> None:
        rows.put(row)
        if stopped.is_set():
            raise _Stopped

    def work() -> None:
        end: BaseException | None = None
        set_num_threads(max(1, int(trial.config.resources.cpu)))
        try:
            function(trial)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            end = error
        rows.put(end)

    trial._tell = tell
    thread = threading.Thread(target=work, name="train_fn", daemon=True)
    thread.start()
    try:
        while (row := rows.get()) is not None:
            if isinstance(row, BaseException):
                raise row
            yield row
    finally:
        stopped.set()
        while thread.is_alive():
            try:
                rows.get(timeout=0.05)
            except queue.Empty:
                continue
