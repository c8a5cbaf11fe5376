"""A training function, the built-in one or a user's own: what it is given, and how it is run."""

from __future__ import annotations

import copy
import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfkd.checkpoint import load_tensors, save_tensors
from selfkd.config import Config, ModelConfig
from selfkd.distiller import Distiller
from selfkd.files import replace
from selfkd.jobs import OWN, Row
from selfkd.models import parameters_count
from selfkd.teacher import Ensemble, Teacher


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

    A training function may also be a generator that yields metrics and calls `save`, as the
    built-in one does.
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
    _rows: list[Row] = field(default_factory=list)
    _tell: Callable[[Row], None] | None = None
    _start: float = field(default_factory=time.perf_counter)

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
        self, student: nn.Module, *, make_teacher: Callable[[], nn.Module] | None = None
    ) -> Distiller:
        """Return the loss of this trial: of labels in generation 0, then of its teachers too.

        T, alpha and the average are those of the trial's config.

        Args:
            student: of which the teachers have the architecture; it is not changed.
            make_teacher: makes a network of the teachers' architecture where it is another.
        """
        distill, smoothing = self.config.distill, self.config.train.label_smoothing
        if not self.teachers:
            return Distiller(label_smoothing=smoothing)
        members = []
        for row in self.teachers:
            tensors, _ = load_tensors(Path(row["checkpoint"]))
            network = make_teacher() if make_teacher else copy.deepcopy(student)
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
            student: what has been trained so far.
            checkpoint: what `checkpoint` gives back if the trial is interrupted here: tensors,
                state dicts, numbers and text.
        """
        row: Row = {"epoch": len(self._rows) + 1}
        row |= {name: float(value) for name, value in metrics.items()}
        row["seconds"] = time.perf_counter() - self._start
        if student is not None:
            facts = {"stage": self.stage, "seed": self.seed}
            facts["parameters"] = parameters_count(student)
            row["hash"] = save_tensors(self.path, student.state_dict(), facts)
        self._rows.append(row)
        if checkpoint is not None:
            kept = {"rows": self._rows, "state": dict(checkpoint)}
            replace(self._resume_from, lambda beside: torch.save(kept, beside))
        if self._tell is not None:
            self._tell(row)

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """What this trial reported as its checkpoint before it was interrupted, if it was."""
        if not self._resume_from.exists():
            return None
        kept = torch.load(self._resume_from, weights_only=True)
        state: dict[str, Any] = kept["state"]
        return state

    @property
    def _resume_from(self) -> Path:
        return self.path.with_name("checkpoint.pt")


TrainFunction = Callable[[Trial], Iterator[Row] | None]


def run_function(function: TrainFunction, trial: Trial) -> Iterator[Row]:
    """Run a training function; yield the row of each epoch.

    Raises:
        ValueError: it reported no student, or not the metric that the choice is made by.
    """
    if inspect.isgeneratorfunction(function):
        yield from function(trial)
        return
    kept = trial._resume_from
    if kept.exists():
        trial._rows = torch.load(kept, weights_only=True)["rows"]
        yield from trial._rows
    rows = _in_thread(function, trial)
    metric = trial.config.search.metric
    for row in rows:
        if metric not in row:
            known = ", ".join(name for name in row if name not in OWN) or "none"
            raise ValueError(f"train_fn must report {metric} (search.metric), got {known}")
        yield row
    if not any("hash" in row for row in trial._rows):
        raise ValueError(
            "train_fn must report its student, as in trial.report(metrics, student=model), got none"
        )
    kept.unlink(missing_ok=True)


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
        torch.set_num_threads(max(1, int(trial.config.resources.cpu)))
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
