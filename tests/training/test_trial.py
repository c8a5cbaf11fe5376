"""User training functions: their argument, how they are run, and their mistakes."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import selfkd
from selfkd import Ensemble, Teacher
from selfkd.config import load_config
from selfkd.distill.terms import LogitTerm
from selfkd.generations import main, run_generations
from selfkd.losses.logits import logit_mse
from selfkd.results import OWN, Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import load_json
from selfkd.training.fit import fit
from selfkd.training.functions import function_reference, load_function
from selfkd.training.trial import Trial, _Stopped, run_function


def make_trial(folder: Path, *settings: str, **changes: Any) -> Trial:
    options: dict[str, Any] = {"stage": "generation-0", "seed": 3, **changes}
    return Trial(
        config=load_config(settings=list(settings)), path=folder / "student.safetensors", **options
    )


def steps(trial: Trial, count: int = 3) -> None:
    """Report three epochs without training."""
    torch.manual_seed(trial.seed)
    model = nn.Linear(2, 2)
    for epoch in range(count):
        trial.report({"val_accuracy": epoch / 10}, student=model)


def plain(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_reports_become_rows_epoch_by_epoch(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    rows = list(run_function(steps, trial))
    assert [(row["epoch"], row["val_accuracy"]) for row in rows] == [(1, 0.0), (2, 0.1), (3, 0.2)]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    tensors, facts = load_tensors(trial.path)
    assert facts["hash"] == rows[-1]["hash"]
    torch.manual_seed(3)
    assert torch.equal(tensors["weight"], nn.Linear(2, 2).weight)


def test_numbers_that_a_function_returns_are_metrics_of_its_last_epoch(tmp_path: Path) -> None:
    def returning(trial: Trial) -> dict[str, Any]:
        steps(trial)
        return {"test_accuracy": torch.tensor(0.25), "val_accuracy": 1, "model": "a", "epoch": 9}

    *rows, last = run_function(returning, make_trial(tmp_path))
    assert len(rows) == 3
    assert last == rows[-1] | {"test_accuracy": 0.25, "val_accuracy": 1.0}


@pytest.mark.parametrize("value", [None, 3, {}, {"model": "a"}, nn.Linear(1, 1)])
def test_what_else_a_function_returns_is_its_own(tmp_path: Path, value: Any) -> None:
    def returning(trial: Trial) -> Any:
        steps(trial)
        return value

    assert len(list(run_function(returning, make_trial(tmp_path)))) == 3


def test_a_generator_is_a_training_function_too(tmp_path: Path) -> None:
    def generator(trial: Trial) -> Iterator[Row]:
        yield {"epoch": 1, "val_accuracy": 0.5, "hash": "0"}

    assert list(run_function(generator, make_trial(tmp_path))) == [
        {"epoch": 1, "val_accuracy": 0.5, "hash": "0"}
    ]


def test_exceptions_of_a_function_are_raised(tmp_path: Path) -> None:
    def broken(trial: Trial) -> None:
        trial.report({"val_accuracy": 0.5}, student=nn.Linear(1, 1))
        raise ZeroDivisionError("by zero")

    rows = run_function(broken, make_trial(tmp_path))
    assert next(rows)["epoch"] == 1
    with pytest.raises(ZeroDivisionError, match="by zero"):
        next(rows)


def test_stopping_a_trial_early_ends_its_function(tmp_path: Path) -> None:
    before = threading.active_count()
    ends = []

    def endless(trial: Trial) -> None:
        try:
            while True:
                trial.report({"val_accuracy": 0.5}, student=nn.Linear(1, 1))
        finally:
            ends.append("ended")

    rows = run_function(endless, make_trial(tmp_path))
    next(rows), next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert ends == ["ended"]
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("metrics", "student", "message"),
    [
        ({"val_accuracy": 0.5}, None, r"train_fn must report its student, .* got none"),
        ({"loss": 0.5}, nn.Linear(1, 1), r"train_fn must report val_accuracy .*, got loss"),
    ],
)
def test_missing_reports_are_named(
    tmp_path: Path, metrics: dict[str, float], student: nn.Module | None, message: str
) -> None:
    def function(trial: Trial) -> None:
        trial.report(metrics, student=student)

    with pytest.raises(ValueError, match=message):
        list(run_function(function, make_trial(tmp_path)))


OWN_CLASS = type("Odd", (), {"__float__": lambda self: 1 / 0, "__repr__": lambda self: 1 / 0})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0.5", "'0.5'"),
        (b"1", "b'1'"),
        (None, "None"),
        (torch.tensor([0.5, 0.25]), "tensor([0.5000, 0.2500])"),
        (np.array([0.5, 0.25]), "array([0.5 , 0.25])"),
        (10**400, "1000000000"),
        (1 + 2j, "(1+2j)"),
        ([0.5], "[0.5]"),
        (OWN_CLASS(), "Odd"),
    ],
)
def test_metrics_are_numbers(tmp_path: Path, value: Any, shown: str) -> None:
    def report(trial: Trial) -> None:
        trial.report({"val_accuracy": 0.5, "top5": value}, student=nn.Linear(1, 1))

    def generate(trial: Trial) -> Iterator[Row]:
        yield {"epoch": 1, "val_accuracy": 0.5, "top5": value, "hash": "0"}

    for function in (report, generate):
        with pytest.raises(TypeError, match="metrics must be numbers, got top5 = ") as found:
            list(run_function(function, make_trial(tmp_path)))
        assert shown in str(found.value)
        assert len(str(found.value)) < 500


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([2], dtype=torch.int8), 2.0),
        (Decimal("0.25"), 0.25),
        (Fraction(1, 2), 0.5),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
    ],
)
def test_numbers_of_any_library_are_metrics(tmp_path: Path, value: Any, number: float) -> None:
    trial = make_trial(tmp_path)
    trial.report({"val_accuracy": value, "absent": math.nan}, student=nn.Linear(1, 1))
    (row,) = trial.progress.rows
    assert type(row["val_accuracy"]) is float
    assert row["val_accuracy"] == number
    assert math.isnan(row["absent"])


@pytest.mark.parametrize("name", OWN)
def test_names_of_selfkd_itself_are_refused(tmp_path: Path, name: str) -> None:
    trial = make_trial(tmp_path)
    message = f"must not be named epoch, seconds, hash, checkpoint, note, .* got {name}$"
    with pytest.raises(ValueError, match=message):
        trial.report({"val_accuracy": 0.5, name: "text"}, student=nn.Linear(1, 1))  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="names of metrics must be text, got 1"):
        trial.report({1: 0.5})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"metrics must be numbers by name, got 0\.5"):
        trial.report(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must yield the hash of its student"),
        ([{"epoch": 1, "val_accuracy": 0.5}], "must yield the hash of its student"),
        ([{"epoch": 1, "loss": 0.5}], "must report val_accuracy .*, got loss"),
        ([{"val_accuracy": 0.5}], "epoch of a row must be a whole number above 0, got None"),
        ([{"epoch": 1.5, "val_accuracy": 0.5}], "whole number above 0, got 1.5"),
        ([{"epoch": 10**400, "val_accuracy": 0.5}], "whole number above 0, got 1000"),
        ([{"epoch": 1, "val_accuracy": 0.5, "hash": "0"}] * 2, "whole number above 1, got 1"),
        ([0.5], "must yield rows such as .*, got 0.5"),
        ([None], "must yield rows such as .*, got None"),
        ([{"epoch": 1, "val_accuracy": 0.5, "hash": 5}], "hash of a row must be text, got 5"),
        ([{"epoch": 1, "val_accuracy": 0.5, "seconds": "2 s"}], "numbers, got seconds = '2 s'"),
    ],
)
def test_a_generator_yields_rows_and_a_student(
    tmp_path: Path, rows: list[Any], message: str
) -> None:
    def generator(trial: Trial) -> Iterator[Any]:
        yield from rows

    with pytest.raises((ValueError, TypeError), match=message):
        list(run_function(generator, make_trial(tmp_path)))


class Abort(BaseException):
    """Raised by libraries that mean to end the process."""


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), Abort("now"), _Stopped()])
def test_ending_the_process_ends_the_trial_alone(tmp_path: Path, error: BaseException) -> None:
    def function(trial: Trial) -> None:
        raise error

    def generator(trial: Trial) -> Iterator[Row]:
        raise error
        yield {}

    for each in (function, generator):
        with pytest.raises(RuntimeError, match=f"must return, got {type(error).__name__}"):
            list(run_function(each, make_trial(tmp_path)))


@pytest.mark.parametrize("body", ["exit(3)", "raise KeyboardInterrupt", "raise BaseException('x')"])
def test_a_file_that_ends_the_process_cannot_be_imported(tmp_path: Path, body: str) -> None:
    (tmp_path / "main.py").write_text(f"def train(trial): ...\n{body}\n")
    with pytest.raises(ValueError, match=r"can be imported, got .*main.py: \w+"):
        load_function(f"{tmp_path}/main.py:train")


def test_generation_0_has_no_teacher_and_the_next_a_copy_of_its_model(tmp_path: Path) -> None:
    trial = make_trial(tmp_path / "one")
    list(run_function(steps, trial))
    assert trial.distiller(nn.Linear(2, 2)).teacher is None
    row = {"hash": "x", "checkpoint": str(trial.path)}
    settings = ["distill.temperature=2", "distill.alpha=0.25"]
    born_again = make_trial(tmp_path / "two", *settings, stage="generation-1", teachers=[row])
    assert (trial.generation, born_again.generation) == (0, 1)
    student = nn.Linear(2, 2)
    before = student.weight.detach().clone()
    distiller = born_again.distiller(student)
    assert (distiller.temperature, distiller.alpha) == (2, 0.25)
    assert isinstance(distiller.teacher, Teacher)
    saved = load_tensors(trial.path)[0]
    assert torch.equal(distiller.teacher.module.weight, saved["weight"])  # type: ignore[arg-type]
    assert torch.equal(student.weight, before)
    both = make_trial(tmp_path / "three", stage="generation-2", teachers=[row, row])
    assert isinstance(both.distiller(student).teacher, Ensemble)


def test_a_student_of_another_architecture_needs_make_teacher(tmp_path: Path) -> None:
    trial = make_trial(tmp_path / "one")
    list(run_function(steps, trial))
    row = {"hash": "x", "checkpoint": str(trial.path)}
    born_again = make_trial(tmp_path / "two", stage="generation-1", teachers=[row])
    student = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"student must have the architecture of its teacher"):
        born_again.distiller(student)
    distiller = born_again.distiller(student, make_teacher=lambda: nn.Linear(2, 2))
    assert distiller(student(torch.ones(1, 2)), torch.tensor([0]), inputs=torch.ones(1, 2))


class NotCopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> None:
        raise RuntimeError("no copy of me")


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_student_that_is_hard_to_copy(tmp_path: Path) -> None:
    student = nn.utils.weight_norm(nn.Linear(2, 2))  # deepcopy refuses it
    trial = make_trial(tmp_path / "one")
    trial.report({"val_accuracy": 0.5}, student=student)
    row = {"hash": "x", "checkpoint": str(trial.path)}
    born_again = make_trial(tmp_path / "two", stage="generation-1", teachers=[row])
    teacher = born_again.distiller(student).teacher
    assert isinstance(teacher, Teacher)
    assert torch.equal(teacher(torch.ones(1, 2)), student(torch.ones(1, 2)))
    with pytest.raises(ValueError, match="make_teacher must be given for a student that cannot be"):
        born_again.distiller(NotCopied(2, 2))


def compile_eagerly(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend="eager")
    return compiled


@pytest.mark.parametrize("wrap", [compile_eagerly, DataParallel])
def test_wrapped_and_bare_models_are_teachers_of_each_other(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    trial, model = make_trial(tmp_path / "one"), nn.Linear(2, 2)
    trial.report({"val_accuracy": 0.5}, student=wrap(model))
    assert sorted(load_tensors(trial.path)[0]) == ["bias", "weight"]
    row = {"hash": "x", "checkpoint": str(trial.path)}
    born_again = make_trial(tmp_path / "two", stage="generation-1", teachers=[row])
    for student in (nn.Linear(2, 2), wrap(nn.Linear(2, 2))):
        for make_teacher in (None, lambda: wrap(nn.Linear(2, 2))):
            teacher = born_again.distiller(student, make_teacher=make_teacher).teacher
            assert isinstance(teacher, Teacher)
            torch.testing.assert_close(teacher.module.state_dict(), model.state_dict())


def test_a_sharded_student_is_refused(tmp_path: Path) -> None:
    sharded = nn.Sequential()
    sharded.add_module("_fsdp_wrapped_module", nn.Linear(2, 2))  # as FSDP has it
    trial = make_trial(tmp_path)
    with pytest.raises(ValueError, match="student must have its parameters whole, got shards of"):
        trial.report({"val_accuracy": 0.5}, student=sharded)
    assert not trial.path.exists()


def test_further_terms_from_the_first_generation_on(tmp_path: Path) -> None:
    inputs, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    terms = {
        "hint": {"student": "0", "weight": 0.5},
        "mse": LogitTerm(lambda z_s, z_t, _: logit_mse(z_s, z_t)),
    }
    teachers: list[dict[str, str]] = []
    for generation in range(3):
        stage = f"generation-{generation}"
        trial = make_trial(tmp_path / stage, stage=stage, teachers=teachers)
        student = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        found = trial.distiller(student, terms=terms)(student(inputs), labels, inputs=inputs)
        assert ({"hint", "mse"} <= set(found)) == (generation > 0)
        found["loss"].backward()
        trial.report({"val_accuracy": 0.5}, student=student)
        teachers = [{"hash": "x", "checkpoint": str(trial.path)}]
    with pytest.raises(ValueError, match=r"path must be that of a submodule .* got 'typo'"):
        make_trial(tmp_path).distiller(student, terms={"hint": {"student": "typo"}})


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("train.py", r"--train must be path/file.py:function, got 'train.py'"),
        ("nowhere.py:train", r"--train must be path/file.py:function, got 'nowhere.py:train'"),
        ("{}/broken.py:train", r"can be imported, got .*broken.py: SyntaxError"),
        ("{}/fine.py:missing", r"must name a function of .*fine.py, got 'missing'"),
        ("{}/fine.py:number", r"must name a function of .*fine.py, got 'number'"),
    ],
)
def test_missing_functions_are_named(tmp_path: Path, reference: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("def train(:\n")
    (tmp_path / "fine.py").write_text("number = 3\n")
    with pytest.raises(ValueError, match=message):
        load_function(reference.replace("{}", str(tmp_path)))


def test_a_function_is_referenced_by_its_file(tmp_path: Path) -> None:
    reference = function_reference(steps)
    assert reference == f"{__file__}:steps"
    found = load_function(reference)
    assert found.__name__ == "steps"
    with pytest.raises(ValueError, match=r"top level of a \.py file"):
        function_reference(lambda trial: None)
    with pytest.raises(ValueError, match=r"top level of a \.py file"):
        function_reference(fit.__class__)


def test_a_function_of_a_notebooks_cell_is_told_the_way_out() -> None:
    names: dict[str, Any] = {}
    exec(compile("def fit(trial): ...", "/tmp/ipykernel_1/2.py", "exec"), names)
    said = r'%%writefile my_train.py the first line .* and pass "my_train.py:fit"'
    with pytest.raises(ValueError, match=said):
        run_generations(names["fit"])


def test_params_are_set_and_searched(tmp_path: Path) -> None:
    config = load_config(
        settings=["params.width=8", "search.space={params.lr: {loguniform: [0.001, 0.1]}}"]
    )
    assert config.params == {"width": 8}
    assert config.at({"params.lr": 0.01}).params == {"width": 8, "lr": 0.01}


# --- by the command and from Python, with Ray ---

USERS = """
import torch
from torch import nn

def train_fn(trial):
    torch.manual_seed(trial.seed)
    inputs = torch.randn(200, 4)
    labels = (inputs.sum(dim=1) > 0).long()
    model = nn.Linear(4, 2)
    distiller = trial.distiller(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.params["lr"])
    for epoch in range(3):
        terms = distiller(model(inputs), labels, inputs=inputs)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        trial.report({"val_loss": terms["hard_loss"].item()}, student=model)
"""
SETTINGS = [
    "search.metric=val_loss",
    "search.mode=min",
    "search.trials=2",
    "params.lr=0.5",
    "confirm.seeds=0",
    "tracking=none",
]


@pytest.mark.slow  # test_submit has --train through the command, test_examples a loop
def test_the_command_runs_a_user_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USERS)
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "selfkd.generations", "--rounds", "1", "--name", "a"]
    done = subprocess.run(
        [*command, "--train", "mine.py:train_fn", *sets],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"trained by {tmp_path}/mine.py:train_fn" in done.stdout
    assert f"--train {tmp_path}/mine.py:train_fn --rounds 2" in done.stdout
    results: list[Mapping[str, Any]] = [
        load_json(tmp_path / f"runs/a/generation_00{n}/result.json") for n in (0, 1)
    ]
    for number, result in enumerate(results):
        losses = [
            load_json(tmp_path / f"runs/a/generation_00{number}/trial_00{n}/result.json")
            for n in (0, 1)
        ]
        assert result["val_loss"] == min(row["val_loss"] for row in losses)
        assert f"val_loss {result['val_loss']:.4g}" in done.stdout
    assert results[1]["teachers"] == [results[0]["models"][0]]
    assert results[1]["temperature"] is not None
    assert main(["--resume", str(tmp_path / "runs/a"), "--rounds", "1"]) == 0  # only shown again


def test_a_missing_function_is_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--train", str(tmp_path / "gone.py:f"), "--set", f"storage={tmp_path}"]) == 2
    assert "--train must be path/file.py:function" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_python_api_raises_config_errors(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="rounds: must be a whole number of at least 0, or auto, got -1"
    ):
        selfkd.generations(steps, rounds=-1, settings=[f"storage={tmp_path}"])
    assert not list(tmp_path.iterdir())
