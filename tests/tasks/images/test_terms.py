"""Further terms of the loss on images: trained, resumed, in no saved model, tried beforehand."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from selfkd.config import load_config, to_tree
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.tasks.images.task import ImageTask
from selfkd.tasks.images.train import train_classifier
from selfkd.training.trial import Trial

TINY = [
    "model={name: selfkd_cnn, args: {width: 4}}",
    "student={name: selfkd_cnn, args: {width: 2, drop_rate: 0.5}}",
    "data.train_size=40",
    "train={epochs: 2, batch_size: 20, clip_grad: 1}",
    "checkpoint={seconds: null, epochs: 1}",
]
HINT = "{name: hint, student: features.2, project: true, weight: 0.1}"
CRD = "{name: crd, student: features.4, weight: 0.1, args: {dim: 4, negatives: 8}}"
RELATIONS = "{name: rkd_distance, student: head.global_pool}"
LOGITS = "{name: logit_mse, weight: 0.1}"


def start(terms: str, *settings: str) -> ImageTask:
    given = [*TINY, f"distill.terms={terms}", *settings]
    return ImageTask(to_tree(load_config(settings=given)))


def make_teachers(task: ImageTask, tmp_path: Path, *, count: int = 1) -> list[Row]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        path = tmp_path / f"teacher_{seed}.safetensors"
        digest = task.save(path, task.make(task.config.model), task.config.model, {})
        found.append({"hash": digest, "checkpoint": str(path)})
    return found


def make_trial(task: ImageTask, path: Path, teachers: list[Row]) -> Trial:
    path.parent.mkdir(exist_ok=True)
    assert task.config.student is not None
    return Trial(
        config=task.config,
        stage="generation-1",
        seed=3,
        model=task.config.student,
        teachers=teachers,
        path=path,
    )


@pytest.mark.parametrize(("teachers", "average"), [(1, "null"), (2, "0.5")])
def test_a_trial_resumes_with_its_terms_which_no_model_has(
    tmp_path: Path, teachers: int, average: str
) -> None:
    task = start(f"[{HINT}, {CRD}, {RELATIONS}, {LOGITS}]", f"train.ema={average}")
    rows = make_teachers(task, tmp_path, count=teachers)
    found = []
    for name, stopped in (("whole", False), ("stopped", True)):
        path = tmp_path / name / "student.safetensors"
        if stopped:
            with closing(train_classifier(task, make_trial(task, path, rows))) as epochs:
                next(epochs)
        last = list(train_classifier(task, make_trial(task, path, rows)))[-1]
        assert last["epoch"] == 2
        found.append({key: value for key, value in last.items() if key != "seconds"})
        student = task.make(task.config.student).state_dict()  # type: ignore[arg-type]
        assert load_tensors(path)[0].keys() == student.keys()
    assert found[0] == found[1]
    assert {"hint", "crd", "rkd_distance", "logit_mse", "soft_loss"} <= found[0].keys()


def test_what_is_drawn_does_not_depend_on_terms(tmp_path: Path) -> None:
    hashes = []
    for number, terms in enumerate([f"[{HINT.replace('0.1', '0')}, {LOGITS}]", f"[{LOGITS}]"]):
        task = start(terms, "distill.live=true")
        rows = make_teachers(task, tmp_path)
        trial = make_trial(task, tmp_path / str(number) / "student.safetensors", rows)
        last = list(train_classifier(task, trial))[-1]
        hashes.append((last["loss"], last["logit_mse"]))
    assert hashes[0] == pytest.approx(hashes[1], rel=1e-5)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ("[{name: hint, student: features.9}]", r"hint: student's path must be .*features\.4"),
        (
            "[{name: hint, student: features.2, teacher: stem, project: true}]",
            "hint: teacher's path must be that of a submodule",
        ),
        (
            "[{name: pkt}, {name: hint, student: features.2}]",
            r"hint: .*one shape, got \[4, 4, 4\] .*\[8, 4, 4\] .*project: true",
        ),
        (
            "[{name: rkd_angle, student: features.1}]",
            "rkd_angle: feature 'features.1' of the student.* must have a graph.*first weight",
        ),
        ("[{name: cosine, student: features.4, project: true}]", r"cosine: .*\[batch, tokens"),
        ("[{name: dkd, args: {temperature: -1}}]", "dkd: temperature must be > 0 .* got -1"),
        ("[{name: crd, student: features.4, args: {dim: 0}}]", "crd: .*dim >= 1, got 40 and 0"),
    ],
)
def test_terms_are_tried_before_training(terms: str, said: str) -> None:
    mlp = ["model={name: selfkd_mlp, args: {width: 8}}", "student=null"]
    task = start(terms, *(mlp if "features.1" in terms else []))
    model = {"name": task.config.model.name, "args": task.config.model.args}
    with pytest.raises(ValueError, match=rf"distill\.terms: {said}"):
        task.check([model])
    assert task.check().outputs == 10  # without a teacher there is nothing to try


def test_each_choice_of_a_search_is_tried() -> None:
    space = "{distill.terms: {choice: [[{name: pkt}], [{name: hint, student: features.9}]]}}"
    task = start("[]", f"search.space={space}")
    with pytest.raises(ValueError, match=r"distill\.terms: hint: student's path"):
        task.check([{"name": "selfkd_cnn", "args": {"width": 4}}])
