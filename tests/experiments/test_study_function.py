"""Arms that a training function of the user trains, in one process: terms by config, own metric."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import make_run

from selfkd.config import load_config
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.study import compare_arms
from selfkd.reporting.tables import study_table
from selfkd.storage.checkpoint import load_tensors
from selfkd.study import _command

FUNCTION = """
import torch
from torch import nn

def train(trial):
    torch.manual_seed(trial.seed)
    inputs, labels = torch.randn(12, 4), torch.arange(12) % 3
    student = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    distiller = trial.distiller(student, inputs=inputs[:2], labels=labels)
    weights = [*student.parameters(), *distiller.parameters()]
    optimizer, index = torch.optim.SGD(weights, lr=0.1), torch.arange(12)
    for _ in range(2):
        terms = distiller(student(inputs), labels, inputs=inputs, index=index)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    found = {name: float(value.detach()) for name, value in terms.items()}
    trial.report({"val_loss": found["hard_loss"], **found}, student=student)
"""
HINT = '{name: hint, student: "0", project: true, weight: 0.1}'
CRD = '{name: crd, student: "1", args: {dim: 2, negatives: 3}}'
ARMS = f"labels: {{}}, terms: {{teacher: labels, set: {{distill.terms: [{HINT}, {CRD}]}}}}"


def test_arms_of_a_function_differ_by_terms_and_are_compared_by_its_metric(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(FUNCTION)
    settings = [f"study.arms={{{ARMS}}}", "confirm.seeds=2", "search={metric: val_loss, mode: min}"]
    config = load_config(settings=settings)
    folder = RunFolder.create(tmp_path / "run", config, command="study")
    summary = compare_arms(make_run(config, folder, function=f"{file}:train"))
    labels, terms = summary.arms
    assert {"hint", "crd"} <= terms.runs[0].metrics.keys()
    assert "hint" not in labels.runs[0].metrics
    values = [run.metrics["val_loss"] for run in labels.runs]
    assert labels.mean.value == pytest.approx(sum(values) / 2)
    assert summary.contrasts[0].difference is not None
    assert study_table(summary).head == ("arm", "seeds", "val_loss")
    (saved,) = (tmp_path / "run" / "arms" / "terms" / "trial_000").glob("*.safetensors")
    assert set(load_tensors(saved)[0]) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["study.arms={a: {}}"], "--train must be path/file.py:function, got"),
        (["study.arms={a: {}, b: {average: [a]}}"], r"arms\.b: average must be left out with --tr"),
        (
            ["study.arms={a: {target_transform: virtual}}"],
            r"study\.arms\.a: target_transform must be left out with --train",
        ),
        (
            ["study.arms={a: {}}", "members.runs=[x]"],
            "--from must not be given.*got x",
        ),
    ],
)
def test_what_a_function_does_not_do_is_refused(
    tmp_path: Path, settings: list[str], said: str
) -> None:
    name = "own.py"
    if "must be path" not in said:
        (tmp_path / name).write_text(FUNCTION)
    command = _command(f"{tmp_path / name}:train")
    with pytest.raises(ConfigError, match=said):
        command.check(load_config(settings=settings))
