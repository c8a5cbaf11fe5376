"""Which trials of a stage can be chosen: those whose metric is finite at their last epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from selfkd.config.space import Distribution, Optuna, Points, Proposer
from selfkd.errors import RunError
from selfkd.execution.jobs import InProcess, Outcome
from selfkd.experiments.stages import Stage, run_stages
from selfkd.results import Row, TrialResult
from selfkd.storage.rows import load_row, save_row

LOSSES = {"nan": [0.5, math.nan], "inf": [math.inf], "-inf": [-math.inf], "late": [math.nan, 0.4]}


def make_stage(folder: Path, mode: Literal["max", "min"], proposer: Proposer, n: int) -> Stage:
    return Stage(
        name="generation-0",
        folder=folder,
        seeds=range(n),
        proposer=proposer,
        payload=lambda number, point: {"point": point, "teachers": [], "number": number},
        metric="loss",
        mode=mode,
    )


def run(stage: Stage, losses: Sequence[Sequence[float]], **more: float) -> list[TrialResult]:
    def train(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        for epoch, loss in enumerate(losses[payload["number"]], start=1):
            yield {"epoch": epoch, "loss": loss, "hash": f"{payload['number']}-{epoch}", **more}

    (results,) = run_stages(InProcess(train), lambda event: None, [stage], title="a search")
    return results


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_metric_that_is_not_finite_at_the_end_is_a_failed_trial(
    tmp_path: Path, mode: Literal["max", "min"]
) -> None:
    losses = [*LOSSES.values(), [0.3], [0.6]]
    stage = make_stage(tmp_path, mode, Points([{}] * 6), 6)
    results = run(stage, losses, absent=math.nan)
    assert [row.status for row in results] == ["failed"] * 3 + ["completed"] * 3
    end = "search.metric must be finite at the last epoch"
    assert [row.error for row in results[:4]] == [
        f"loss is nan at epoch 2: {end}",
        f"loss is inf at epoch 1: {end}",
        f"loss is -inf at epoch 1: {end}",
        None,
    ]
    order = [4, 3, 5] if mode == "min" else [5, 3, 4]
    assert [row.trial for row in stage.ranked(results)] == order
    assert math.isnan(results[4].metrics["absent"])
    again = run(make_stage(tmp_path, mode, Points([{}] * 6), 6), [[0.1]] * 6)
    assert [row.status for row in again] == ["completed"] * 6  # as after any failure
    assert [row.metrics["loss"] for row in again] == [0.1, 0.1, 0.1, 0.4, 0.3, 0.6]


def test_results_of_such_trials_are_not_kept(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, "min", Points([{}]), 1)
    (result,) = run(stage, [[0.5]])
    path = tmp_path / "trial_000" / "result.json"
    for metrics in ({"loss": math.nan}, {}):
        save_row(path, TrialResult(**{**vars(result), "metrics": metrics}))
        (again,) = run(make_stage(tmp_path, "min", Points([{}]), 1), [[0.25]])
        assert again.metrics == {"loss": 0.25}
        assert load_row(TrialResult, path) == again


def test_where_no_trial_can_be_chosen_the_first_one_says_why(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, "min", Points([{}] * 2), 2)
    with pytest.raises(RunError, match=r"all 2 trials .* the first: loss is nan at epoch 2"):
        run(stage, [[0.5, math.nan], [math.inf]])


@pytest.mark.parametrize("mode", ["max", "min"])
def test_optuna_is_told_of_failures_as_such(tmp_path: Path, mode: Literal["max", "min"]) -> None:
    proposer = Optuna({"train.lr": Distribution("uniform", (0.1, 1.0))}, seed=0)
    run(make_stage(tmp_path, mode, proposer, 5), [*LOSSES.values(), [0.3]])
    told = [trial.value for trial in proposer._study.trials]
    sign = 1 if mode == "max" else -1
    assert told == [None, None, None, sign * 0.4, sign * 0.3]


def test_the_student_is_the_last_one_that_was_saved(tmp_path: Path) -> None:
    def train(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        yield {"epoch": 1, "loss": 0.5, "hash": "first"}
        yield {"epoch": 2, "loss": 0.4}

    stage = make_stage(tmp_path, "min", Points([{}]), 1)
    ((result,),) = run_stages(InProcess(train), lambda event: None, [stage], title="a search")
    assert result.hash == "first"


def test_of_two_rows_of_an_epoch_the_last_one_stands(tmp_path: Path) -> None:
    """What a training function returns comes as another row of its last epoch."""

    class AtOnce:
        def run(self, jobs: Any, **_: Any) -> None:
            job = jobs.ask()
            first = {"epoch": 1, "loss": 0.5, "hash": "0-1"}
            jobs.report(job, [first, first | {"loss": 0.4, "more": 1.0}])
            jobs.tell(Outcome(job, first))

    stage = make_stage(tmp_path, "min", Points([{}]), 1)
    ((result,),) = run_stages(AtOnce(), lambda event: None, [stage], title="a search")
    assert [row.metrics for row in result.history] == [{"loss": 0.4, "more": 1.0}]
    assert result.metrics == {"loss": 0.4, "more": 1.0}
