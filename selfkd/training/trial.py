"""`Trial`, the API of training functions, and how they are run."""

from __future__ import annotations

import inspect
import operator
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, set_num_threads

from selfkd.config import Config, ModelConfig, resume_invariant
from selfkd.distill.distiller import Distiller
from selfkd.distill.layers import check_whole, unwrap
from selfkd.distill.named_terms import make_terms
from selfkd.distill.teacher import Ensemble, Teacher, copy_module
from selfkd.distill.terms import Term
from selfkd.errors import cut_text, describe_error
from selfkd.models import parameters_count
from selfkd.results import CHECKPOINT, OWN, Row
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.remote import as_path
from selfkd.training.progress import Progress
from selfkd.training.ranks import Ranks


@dataclass(kw_only=True)
class Trial:
    """Argument of a training function: `train_fn(trial)` trains one student.

    The function takes its loss from `distiller` and calls `report` after each epoch:

        def train_fn(trial):
            torch.manual_seed(trial.seed)
            student = make_my_model(width=trial.params["width"])
            distiller = trial.distiller(student)  # generation 0: labels alone
            for epoch in range(10):
                ...
                trial.report({"val_accuracy": accuracy}, student=student)

    With `resources.workers` above 1 the function runs on every rank, with `torch.distributed`
    initialised; it divides its batches and wraps its student itself. Only the reports of rank 0
    count. `checkpoint` is the same on all ranks, and restores the random states of rank 0.

    Numbers that the function returns by their names, as in `return {"test_accuracy": …}`, are added
    to the metrics of its last epoch.

    A training function may also be a generator of rows, as the built-in one is: mappings with the
    number of the `epoch`, metrics, and the `hash` of the student once it is saved to `path`.
    """

    config: Config
    """Config of the run, with this trial's values of the search space."""
    stage: str
    """Name of the trial's stage, such as generation-3."""
    seed: int
    """Random seed of the trial, for initialisation, order and all other draws."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network named by the config, for functions that create their student from it."""
    teachers: Sequence[Mapping[str, Any]] = ()
    """`hash`, `checkpoint` and optional `weight` of each teacher; empty to train on labels."""
    targets: Path = Path()
    """Folder of the cached teacher logits, or of text that teachers have written."""
    path: Path
    """File that the student is saved to."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON data that the training depends on."""
    ranks: Ranks = field(default_factory=Ranks.here)
    """Ranks that train the student."""
    _report_row: Callable[[Row], None] | None = None
    _start: float = field(default_factory=time.perf_counter)
    _spent: float = 0.0

    @property
    def params(self) -> dict[str, Any]:
        """Settings of the user: `--set params.width=64`, or searched as `params.width`."""
        return self.config.params

    @property
    def generation(self) -> int:
        """Number of the generation: 0 is trained on labels, k >= 1 distilled from earlier ones."""
        number = self.stage.partition("-")[2]  # of generation-3 or confirm-3
        return int(number) if number else 0

    def distiller(
        self,
        student: nn.Module,
        *,
        make_teacher: Callable[[], nn.Module] | None = None,
        terms: Mapping[str, Term | Mapping[str, Any]] | None = None,
        inputs: Any = None,
        labels: Tensor | None = None,
    ) -> Distiller:
        """Return the loss of this trial: cross-entropy in generation 0, then distillation.

        Temperature, alpha, the average of teachers and further terms (`distill.terms`) are those
        of the trial's config.

        Args:
            student: Student, in any wrapper; the teachers are copies of it with their own weights.
            make_teacher: Function that returns a network of the teachers' architecture, where it
                differs from the student's.
            terms: Further terms of the loss, as in `Distiller`, beside those of the config.
            inputs: Some inputs of the student, which terms with `project: true` and `crd` need; the
                optimiser is then given `distiller.parameters()`, too.
            labels: Class of each training item `[items]`, which `crd` needs, and calls with the
                `index` of their items.

        Returns:
            The loss, to be called with the student's batch.

        Raises:
            ValueError: A teacher's weights do not fit the network, or a student that cannot be
                copied without `make_teacher`.
        """
        distill, smoothing = self.config.distill, self.config.train.label_smoothing
        if not self.teachers:
            return Distiller(label_smoothing=smoothing, terms=terms, student=student)
        members = []
        for row in self.teachers:
            tensors, _ = load_tensors(as_path(row["checkpoint"]))
            network = unwrap(make_teacher()) if make_teacher else _copied(student)
            try:
                network.load_state_dict(tensors)
            except RuntimeError as error:
                first = str(error).splitlines()[0]
                raise ValueError(
                    f"student must have the architecture of its teacher {row['checkpoint']}, "
                    f"or make_teacher must be given: {first}"
                ) from None
            members.append(Teacher(network))
        own = make_terms(
            distill.terms,
            temperature=distill.temperature,
            average=distill.average,
            labels=labels,
            seed=self.seed,
        )
        # projections of the config's terms do not change what is drawn after them
        with torch.random.fork_rng(devices=[], enabled=bool(own)):
            if own:
                torch.manual_seed(self.seed)
            return Distiller(
                members[0] if len(members) == 1 else Ensemble(members),
                temperature=distill.temperature,
                alpha=distill.alpha,
                average=distill.average,
                label_smoothing=smoothing,
                terms={**own, **(terms or {})},
                student=student,
                example=inputs,
            )

    def report(
        self,
        metrics: Mapping[str, float],
        *,
        student: nn.Module | None = None,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        """Report an epoch; the last reported student becomes the model of the trial.

        Args:
            metrics: Numbers by name, among them `search.metric`, by which the best trial is
                chosen; it must be finite at the last epoch, others may be NaN.
            student: Student as trained so far, in any wrapper, but not sharded.
            checkpoint: Tensors, state dicts, numbers and text that the property `checkpoint`
                returns after an interruption; written as often as `checkpoint` of the config says.

        Raises:
            TypeError: A metric is no number, or the checkpoint contains other objects.
            ValueError: The student is sharded over the ranks (FSDP), or a metric has a name of
                selfkd's own: epoch, seconds, hash, checkpoint, note.
        """
        taken = [name for name in OWN if isinstance(metrics, Mapping) and name in metrics]
        if taken:
            raise ValueError(
                f"metrics must not be named {', '.join(OWN)}, which selfkd sets itself, "
                f"got {', '.join(taken)}"
            )
        row: Row = {"epoch": len(self.progress.rows) + 1, **_numbers(metrics)}
        row["seconds"] = self._spent + time.perf_counter() - self._start
        if student is not None and self.ranks.first:
            facts = {"stage": self.stage, "seed": self.seed}
            facts["parameters"] = parameters_count(student)
            check_whole("student", student)
            row["hash"] = save_tensors(self.path, unwrap(student).state_dict(), facts)
        self.progress.reached(row, checkpoint, together=False)
        if self._report_row is not None:
            self._report_row(row)

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """Last checkpoint reported before an interruption; None for a fresh trial.

        Read it when model and optimiser exist: it adds the epochs reported before to this trial,
        and restores the random states of torch, NumPy and Python.
        """
        for row in self.progress.resume():
            if self._report_row is not None:
                self._report_row(row)
            self._spent = self.progress.spent
        return self.progress.state

    @cached_property
    def progress(self) -> Progress:
        """Rows and checkpoint of the trial."""
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


def _copied(student: nn.Module) -> nn.Module:
    try:
        return copy_module(student)
    except ValueError as error:
        raise ValueError(
            f"make_teacher must be given for a student that cannot be copied: {error}"
        ) from None


TrainFunction = Callable[[Trial], object]
Rows = Generator[Row, None, None]


def run_function(function: TrainFunction, trial: Trial) -> Iterator[Row]:
    """Run a training function; yield the row of each epoch.

    Args:
        function: Training function, or a generator of rows.
        trial: Argument of the function.

    Raises:
        RuntimeError: The function tried to end its process, as by `sys.exit`.
        TypeError: A generator's row is no mapping, or a metric no number.
        ValueError: The function reported no student, or reported without `search.metric`.
    """
    _ = trial.progress  # all ranks read the checkpoint before one of them continues
    generator = inspect.isgeneratorfunction(function)
    made = _yielded(function(trial)) if generator else _in_thread(function, trial)
    student = False
    try:
        with closing(_with_metric(made, trial.config.search.metric)) as rows:
            for row in rows:
                student = student or "hash" in row
                yield row
    except (Exception, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"train_fn must return, got {describe_error(error)}") from error
    if trial.ranks.first and not student:
        how = (
            "yield the hash of its student, as saved to trial.path"
            if generator
            else "report its student, as in trial.report(metrics, student=model)"
        )
        raise ValueError(f"train_fn must {how}, got none")


def _with_metric(rows: Iterator[Row], metric: str) -> Rows:
    """Yield rows, each of which must have a metric."""
    with _closing(rows):
        for row in rows:
            if metric not in row:
                known = ", ".join(name for name in row if name not in OWN) or "none"
                raise ValueError(
                    f"train_fn must report {metric} (search.metric), got {cut_text(known, 400)}"
                )
            yield row


def _closing(rows: Any) -> AbstractContextManager[Any]:
    return closing(rows) if hasattr(rows, "close") else nullcontext()


def _yielded(rows: Any) -> Rows:
    """Yield the rows of a user's generator as plain data."""
    epoch = 0
    with _closing(rows):
        for row in rows:
            if not isinstance(row, Mapping):
                raise TypeError(
                    "train_fn must yield rows such as {'epoch': 1, 'val_accuracy': 0.5}, "
                    f"got {_shown(row)}"
                )
            try:
                number = operator.index(row.get("epoch"))  # type: ignore[arg-type]
            except TypeError:
                number = 0
            if not epoch < number < 2**53:
                raise ValueError(
                    f"epoch of a row must be a whole number above {epoch}, "
                    f"got {_shown(row.get('epoch'))}"
                )
            epoch = number
            texts = {name: row[name] for name in ("hash", "checkpoint", "note") if name in row}
            for name, text in texts.items():
                if not isinstance(text, str):
                    raise TypeError(f"{name} of a row must be text, got {_shown(text)}")
            numbers = _numbers({k: v for k, v in row.items() if k != "epoch" and k not in texts})
            texts |= {"note": cut_text(texts["note"])} if "note" in texts else {}
            yield {"epoch": epoch, **numbers, **texts}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as plain numbers."""
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be numbers by name, got {_shown(metrics)}")
    found = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"names of metrics must be text, got {_shown(name)}")
        try:
            found[name] = float("" if isinstance(value, str | bytes | bytearray) else value)
        except Exception:  # noqa: BLE001 - a number of the user's own class may raise anything
            raise TypeError(
                f"metrics must be numbers, got {cut_text(name, 200)} = {_shown(value)}"
            ) from None
    return found


def _returned(value: object, reported: Sequence[Row]) -> Row:
    """Return the last reported row with the numbers that a function has returned by name.

    >>> _returned({"test_accuracy": 0.5, "model": "a"}, [{"epoch": 2, "val_accuracy": 0.25}])
    {'epoch': 2, 'val_accuracy': 0.25, 'test_accuracy': 0.5}
    """
    if not isinstance(value, Mapping) or not reported:
        return {}
    found: Row = {}
    for name, number in value.items():
        if isinstance(name, str) and name not in OWN:
            with suppress(TypeError):  # what is no number is the user's alone
                found |= _numbers({name: number})
    return {**reported[-1], **found} if found else {}


def _shown(value: object) -> str:
    """Return a value of the user's for a message, on one line."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - as in `_numbers`
        text = type(value).__name__
    return cut_text(" ".join(text.split()), 200)


class _Stopped(BaseException):
    """Raised in a training function whose trial is stopped early."""


def _in_thread(function: TrainFunction, trial: Trial) -> Rows:
    """Yield the rows that a function reports; closing the generator ends the function."""
    rows: queue.Queue[Row | BaseException | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def report_row(row: Row) -> None:
        rows.put(row)
        if stopped.is_set():
            raise _Stopped

    def work() -> None:
        end: BaseException | None = None
        set_num_threads(max(1, int(trial.config.resources.cpu)))
        try:
            if numbers := _returned(function(trial), trial.progress.rows):
                rows.put(numbers)
        except BaseException as error:  # noqa: BLE001 - raised again by the consumer
            end = error
        rows.put(end)

    trial._report_row = report_row
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
