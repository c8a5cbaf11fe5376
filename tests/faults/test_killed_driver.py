"""The driver is killed at any moment of a run: resumed, it ends as if it had not been.

The command itself is killed in `test_generations.py` and by `benchmarks/soak.py`; here the same
loop runs without Ray, so that the moment of a kill is exact.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from drive import Driver
from record import record

SETTINGS = [
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train={epochs: 2, batch_size: 64}",
    "search.trials=2",
    "rounds=1",
    "targets.shard_size=80",
    "confirm.seeds=1",
]
WORK = {  # what counts as work, by the event that it begins with or ends in
    "check of the data": "doing check",
    "trial": "doing train",
    "evaluation": "doing evaluate",
    "shard": "writing .*/shard_",
    "ensemble": "doing average",
}
CHECK = "check of the data"  # a resumed run is checked again, whatever has been done

MOMENTS = {  # when the driver is killed: the event, and what is done a second time
    "run folder made, config not yet": ("writing config.yaml", ()),
    "data not yet checked": ("doing check", (CHECK,)),
    "data checked, not yet written down": ("writing data.json", (CHECK,)),
    "start of generation 0": ("^StageStarted generation 0", (CHECK,)),
    "mid-trial": ("^TrialProgressed generation-0 1 epoch 1", (CHECK, "trial")),
    "student written beside": ("writing .*000/trial_000/student", (CHECK, "trial")),
    "between student and its result": ("writing .*000/trial_000/result", (CHECK, "trial")),
    "trial's result just renamed": ("wrote .*000/trial_000/result", (CHECK,)),
    "between trials": ("^TrialFinished generation-0 0", (CHECK,)),
    "chosen student linked beside": ("writing generation_000/student", (CHECK,)),
    "while measuring": ("doing evaluate", (CHECK, "evaluation")),
    "between predictions and metrics": ("writing predictions/.*json", (CHECK, "evaluation")),
    "between metrics and result": ("writing generation_000/result", (CHECK,)),
    "generation's result just renamed": ("wrote generation_000/result", (CHECK,)),
    "between generations": ("^GenerationFinished .*0$", (CHECK,)),
    "caching begins": ("^TaskStarted generation 1", (CHECK,)),
    "caching, shard written beside": ("writing .*/shard_00001", (CHECK, "shard")),
    "caching, first shard done": ("^TaskProgressed written", (CHECK,)),
    "mid-trial of a distilled trial": ("^TrialProgressed generation-1 0 epoch 1", (CHECK, "trial")),
    "before the students are pruned": ("wrote generation_001/student", (CHECK,)),
    "mid-trial of a confirmation": ("^TrialProgressed confirm-1 0 epoch 1", (CHECK, "trial")),
    "before confirming students go": ("wrote generation_001/confirmation", (CHECK,)),
    "ensemble of all generations": ("doing average", (CHECK, "ensemble")),
    "summary written beside": ("writing summary.json", (CHECK, "ensemble")),
}
TEXT = [
    "task=text",
    "data={name: arithmetic, train_size: 200, val_size: 20}",
    "model.args={width: 16, depth: 1, heads: 2, dropout: 0.1}",
    "train={steps: 12, epochs: 3, batch_size: 8, warmup_steps: 2}",
    "checkpoint.seconds=0",
    "search.trials=1",
    "rounds=1",
    "targets.shard_size=1000",
    "confirm.seeds=1",
]
IN_TEXT = {  # when the driver is killed, in this order, each start in the next of them
    "traces": (
        "distill.mode=traces",
        *("^TrialProgressed generation-0 0 epoch 1", "writing generation_000/pretrained/model"),
        *("writing .*/shard_00001.jsonl", "wrote .*/shard_00001.jsonl", "wrote .*/shard_00002"),
        *("^TrialProgressed generation-1 0 epoch 2", "wrote generation_001/result"),
        *("writing generation_001/pretrained/README", "^TrialProgressed confirm-1 0 epoch 1"),
    ),
    "on-policy": (
        "distill={live: true, on_policy: 0.5}",
        *("^TrialProgressed generation-1 0 epoch 1", "^TrialProgressed generation-1 0 epoch 2"),
    ),
}


@pytest.fixture(scope="module")
def whole(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert driver.run(folder, SETTINGS) == (0, "")
    return folder


def work(events: Sequence[str]) -> Counter[str]:
    return Counter(
        name for event in events for name, pattern in WORK.items() if re.search(pattern, event)
    )


@pytest.mark.parametrize(("moment", "lost"), MOMENTS.values(), ids=MOMENTS)
def test_killed_and_resumed_equals_undisturbed(
    driver: Driver, whole: Path, tmp_path: Path, moment: str, lost: Sequence[str]
) -> None:
    folder = tmp_path / "run"
    code, _ = driver.run(folder, SETTINGS, die=moment)
    assert code == -signal.SIGKILL, "the moment never came"
    assert driver.run(folder, SETTINGS) == (0, "")
    assert record(folder) == record(whole)
    assert work(driver.events(folder)) == work(driver.events(whole)) + Counter(lost)


def test_killed_again_and_again(driver: Driver, whole: Path, tmp_path: Path) -> None:
    """Every start gets a little further; some die while they resume."""
    folder = tmp_path / "run"
    for moment in (
        "writing command",
        "writing data.json",
        "wrote config.yaml",  # which a resumed run writes again
        "TrialProgressed generation-0 0",
        "TrialProgressed generation-0 0",
        "TrialFinished generation-0 1",
        "writing config.yaml",
        "doing cache",
        "TrialProgressed generation-1 1",
        "writing summary.json",
    ):
        assert driver.run(folder, SETTINGS, die=moment)[0] == -signal.SIGKILL, moment
    assert driver.run(folder, SETTINGS) == (0, "")
    assert record(folder) == record(whole)


@pytest.mark.slow
def test_killed_at_every_event_of_a_run(driver: Driver, whole: Path, tmp_path: Path) -> None:
    events = driver.events(whole)
    assert len(events) > 70
    for number, event in enumerate(events, start=1):
        folder = tmp_path / str(number)
        assert driver.run(folder, SETTINGS, die=".", number=number)[0] == -signal.SIGKILL
        assert driver.run(folder, SETTINGS) == (0, ""), event
        assert record(folder) == record(whole), event


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "moments"), [(s, m) for s, *m in IN_TEXT.values()], ids=IN_TEXT
)
def test_language_models_killed_again_and_again(
    driver: Driver, tmp_path: Path, setting: str, moments: Sequence[str]
) -> None:
    settings, whole, folder = [*TEXT, setting], tmp_path / "whole", tmp_path / "run"
    assert driver.run(whole, settings) == (0, "")
    for moment in moments:
        assert driver.run(folder, settings, die=moment)[0] == -signal.SIGKILL, moment
    assert driver.run(folder, settings) == (0, "")
    assert record(folder) == record(whole)
    assert len(record(whole)["others"]) > 10
