"""Students of teachers that are trained on a transfer set as well, job by job in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfkd.config import load_config, to_tree
from selfkd.errors import ConfigError
from selfkd.results import Row
from selfkd.soft_targets.manifest import load_manifest
from selfkd.storage.checkpoint import load_tensors
from selfkd.tasks.images.networks import ImageNetworks
from selfkd.worker.jobs import run_job

TINY = (
    "data={train_size: 60, val_size: 100}",
    "data.transfer={name: digits, size: 90, weight: 0.5}",
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train={epochs: 3, lr: 0.1, batch_size: 20}",
)
VIEWS = ("data.jitter=1", "data.views=2")


class Jobs:
    """Jobs in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.targets = folder, folder / "targets"

    def job(self, kind: str, *settings: str, **payload: Any) -> Iterator[Row]:
        config = to_tree(load_config(settings=[*TINY, *settings]))
        return run_job(kind, json.loads(json.dumps({"config": config, **payload})))

    def train(
        self, name: str, *settings: str, teachers: list[Row] | None = None, **options: Any
    ) -> Iterator[Row]:
        return self.job(
            "train",
            *settings,
            stage="one",
            model=to_tree(load_config(settings=[*TINY, *settings]))["model"],
            seed=1,
            teachers=teachers or [],
            targets=str(self.targets),
            student=str(self.folder / name / "student.safetensors"),
            **options,
        )

    def teacher(self, name: str) -> Row:
        path = self.folder / name / "student.safetensors"
        return {"hash": load_tensors(path)[1]["hash"], "checkpoint": str(path)}

    def cache(self, teacher: Row, *settings: str, views: int = 1) -> list[str]:
        place = {"targets": str(self.targets), "run": str(self.folder), "shard": 0}
        return [
            row["state"]
            for of in ("train", "transfer")
            for view in range(views)
            for row in self.job(
                "cache_teacher_logits",
                *settings,
                checkpoint=teacher["checkpoint"],
                view=view,
                of=of,
                **place,
            )
        ]

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self.folder / name / "student.safetensors")[0]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    made = Jobs(tmp_path_factory.mktemp("transfer"))
    list(made.train("teacher"))
    made.cache(made.teacher("teacher"), *VIEWS, views=2)
    made.cache(made.teacher("teacher"))
    return made


def test_facts_and_cache_have_the_transfer_set(jobs: Jobs) -> None:
    """It has a key and shards of its own, which are kept from run to run."""
    (row,) = jobs.job("check")
    facts = row["facts"]
    assert (facts["items"]["train"], facts["transfer"]) == (60, 90)
    assert "90 images without labels" in facts["notes"][0]
    config = to_tree(load_config(settings=TINY))
    task = ImageNetworks(config)
    teacher = jobs.teacher("teacher")
    keys = [task.data_key, task.key_of(facts["fingerprints"]["transfer"])]
    sizes = [load_manifest(jobs.targets, teacher["hash"], key).images for key in keys]
    assert sizes == [60, 90]
    assert jobs.cache(teacher) == ["kept", "kept"]
    (row,) = jobs.job("check", "data.transfer.weight=0")
    assert row["facts"]["transfer"] == 0
    assert row["facts"]["items"] == facts["items"]


def test_students_without_teachers_have_none(jobs: Jobs) -> None:
    *_, row = jobs.train("plain", "data.transfer.weight=0")
    assert row["hash"] == jobs.teacher("teacher")["hash"]


@pytest.mark.parametrize(
    "settings",
    [
        VIEWS,
        ("train.ema=0.9", "data.transfer.weight=0.8"),
        ("train.label_smoothing=0.1", "data.transfer.labels=true"),
        ("distill.live=true",),
        ("distill.terms=[{name: rkd_distance}, {name: hint, student: features.3}]",),
    ],
)
def test_a_resumed_training_ends_like_an_undisturbed_one(
    jobs: Jobs, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: with views, an average of weights, labels, and a live teacher."""
    teachers, name = [jobs.teacher("teacher")], "-".join(settings).replace("/", "")
    settings = (*settings, "checkpoint.epochs=1", "checkpoint.seconds=null")
    rows = list(jobs.train(f"{name}-whole", *settings, teachers=teachers))
    assert len(list(islice(jobs.train(f"{name}-resumed", *settings, teachers=teachers), 2))) == 2
    again = list(jobs.train(f"{name}-resumed", *settings, teachers=teachers))
    drop = ("seconds", "checkpoint")
    assert [{k: v for k, v in row.items() if k not in drop} for row in again] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows
    ]
    assert {"hard_loss", "soft_loss"} <= rows[0].keys()


def test_a_student_is_trained_on_the_transfer_set(jobs: Jobs) -> None:
    """With it, at another share and with its labels the student is another one each time."""
    teachers = [jobs.teacher("teacher")]
    found = []
    for number, settings in enumerate(
        (
            ["data.transfer.weight=0"],
            [],
            ["data.transfer.weight=0.8"],
            ["data.transfer.labels=true"],
            ["distill.alpha=1"],
        )
    ):
        *_, row = jobs.train(f"share-{number}", *settings, teachers=teachers)
        found.append(row["hash"])
    assert len(set(found)) == 5


@pytest.mark.parametrize("transform", ["permuted", "hard", "confidence", "class_mean", "virtual"])
def test_transforms_of_the_teacher_logits(jobs: Jobs, transform: str) -> None:
    """Those that need labels leave the transfer set out, and a virtual one its teachers as well."""
    teachers = [jobs.teacher("teacher")]
    found = []
    for weight in ("0.5", "0"):
        *_, row = jobs.train(
            f"{transform}-{weight}",
            f"data.transfer.weight={weight}",
            teachers=teachers,
            transform=transform,
        )
        found.append(row["hash"])
    assert len(set(found)) == (2 if transform in ("permuted", "hard") else 1)


def test_faults_are_facts_of_a_check(jobs: Jobs, tmp_path: Path) -> None:
    """What is wrong with a transfer set is known before any work."""
    for settings, fault in (
        (["data.transfer={name: folder, root: null}"], "data.transfer.root must be given"),
        ([f"data.transfer={{name: folder, root: {tmp_path}}}"], "must hold images, got none"),
        (["data.transfer.size=1700"], "data.transfer.size must be at most 1,636"),
        (["data.transfer.name=digit"], "data.transfer.name must be one of"),
        (
            ["data.transfer={name: mnist, root: /nowhere, size: null}"],
            "data.transfer.root must be an existing folder",
        ),
    ):
        (row,) = jobs.job("check", *settings)
        assert fault in row["fault"]


def test_terms_that_need_labels_are_refused() -> None:
    for term, labels, refused in (
        ("dkd", "false", True),
        ("dkd", "true", False),
        ("crd, student: features.3", "true", True),
    ):
        settings = [f"distill.terms=[{{name: {term}}}]", f"data.transfer.labels={labels}"]
        if not refused:
            load_config(settings=[*TINY, *settings])
            continue
        with pytest.raises(ConfigError, match=f"must be without {term[:3]} with data.transfer"):
            load_config(settings=[*TINY, *settings])


def test_live_teachers_give_about_what_is_cached(jobs: Jobs) -> None:
    teachers = [jobs.teacher("teacher")]
    list(jobs.train("cached", teachers=teachers))
    list(jobs.train("live", "distill.live=true", teachers=teachers))
    for name, weight in jobs.weights("cached").items():
        torch.testing.assert_close(weight, jobs.weights("live")[name], rtol=1e-2, atol=1e-3)
