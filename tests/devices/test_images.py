"""Training, caching and evaluation of classifiers on a GPU that is not there, job by job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import Waits, fake_cuda

from selfkd.config import load_config, to_tree
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.tasks.images import networks
from selfkd.training import fit
from selfkd.worker.jobs import run_job

TINY = (
    "data={train_size: 60, val_size: 100, jitter: 1, flip: true, crop: 0.8, views: 2}",
    "data.transfer={name: digits, size: 30, weight: 0.5}",
    "model={name: selfkd_cnn, args: {width: 4}}",
    "student={name: selfkd_cnn, args: {width: 2, drop_rate: 0.1}}",
    "train={epochs: 2, lr: 0.1, batch_size: 20, fused: true, channels_last: true}",  # as by default
    "checkpoint={seconds: null, epochs: 1}",
)
STEPS = 3


class Steps(list[list[str]]):
    """What each step of training waited for; the first of an epoch is that and its start."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Waits | None = None
        self.epochs = list[int]()

    @property
    def within(self) -> list[str]:
        """What was waited for by all steps but the first of an epoch."""
        firsts = [place == 0 or self.epochs[place - 1] != e for place, e in enumerate(self.epochs)]
        return [w for first, own in zip(firsts, self, strict=True) if not first for w in own]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    found, descend = Steps(), fit.descend

    def watched(training: fit.Training, *arguments: Any) -> None:
        assert all(p.device.type == "cuda" for p in training.student.parameters())
        descend(training, *arguments)
        if found.waits is not None:
            found.append(list(found.waits.found))
            found.epochs.append(training.epoch)
            found.waits.clear()

    monkeypatch.setattr(fit, "descend", watched)
    return found


@contextmanager
def on_gpu(**patches: Any) -> Iterator[Waits]:
    """Run jobs on a GPU that is not there, with no data of another one."""
    networks._load.cache_clear()
    networks._load_transfer.cache_clear()
    with fake_cuda(**patches) as waits:
        yield waits
    networks._load.cache_clear()
    networks._load_transfer.cache_clear()


class Jobs:
    """Jobs in a folder of their own: teachers and their logits made on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.targets = folder, folder / "targets"
        self.teachers = list[Row]()

    def job(self, kind: str, *settings: str, **payload: Any) -> Iterator[Row]:
        config = to_tree(load_config(settings=[*TINY, *settings]))
        return run_job(kind, json.loads(json.dumps({"config": config, **payload})))

    def train(self, name: str, *settings: str, **options: Any) -> Iterator[Row]:
        given: dict[str, Any] = {"teachers": [], "seed": 1, "stage": "generation-1"}
        tree = to_tree(load_config(settings=[*TINY, *settings]))
        student = str(self.folder / name / "student.safetensors")
        model = tree["student"]
        payload = {"model": model, "targets": str(self.targets), "student": student}
        return self.job("train", *settings, **(given | payload | options))

    def add_teacher(self, seed: int) -> None:
        name = f"teacher_{seed}"
        model = {"name": "selfkd_cnn", "args": {"width": 4}}
        list(self.train(name, "train.epochs=1", seed=seed, model=model))
        path = self.folder / name / "student.safetensors"
        self.teachers.append({"hash": load_tensors(path)[1]["hash"], "checkpoint": str(path)})

    def cache(self, teacher: Row, *settings: str, of: str = "train", view: int = 0) -> list[Row]:
        payload = {"checkpoint": teacher["checkpoint"], "of": of, "view": view}
        place = {"targets": str(self.targets), "run": str(self.folder), "shard": 0}
        return list(self.job("cache_teacher_logits", *settings, **payload, **place))

    def cache_all(self, *settings: str) -> None:
        for teacher in self.teachers:
            for of in ("train", "transfer"):
                for view in range(2):
                    self.cache(teacher, *settings, of=of, view=view)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    made = Jobs(tmp_path_factory.mktemp("gpu"))
    made.add_teacher(1)
    made.add_teacher(2)
    made.cache_all()
    made.cache_all("targets.top_k=3")
    return made


GPU = "resources.gpu=1"
ALONE = "data.transfer=null"
HINT = "{name: hint, student: features.2, project: true, weight: 0.1}"
CRD = "{name: crd, student: features.4, weight: 0.1, args: {dim: 4, negatives: 8}}"
LAYERS = (HINT, CRD, "{name: pkt, student: features.2}", "{name: attention, student: features.2}")
RELATIONS = "{name: rkd_distance, student: features.4}, {name: rkd_angle, student: features.4}"
LOGITS = "{name: dkd, weight: 0.1}, {name: dist}, {name: standardized}, {name: reverse_kl}"
WAYS: dict[str, tuple[str, ...]] = {
    "labels": (),
    "cached": (),
    "averaged": ("distill.average=logits",),
    "top_k": ("targets.top_k=3",),
    "live": ("distill.live=true",),
    "layers": (f"distill.terms=[{', '.join(LAYERS)}, {RELATIONS}]", "train.clip_grad=1", ALONE),
    "logits": (f"distill.terms=[{LOGITS}]", ALONE),
    "bfloat16": ("train.amp=bfloat16", "train.ema=0.9", "train.clip_grad=1"),
    "float16": ("train.amp=float16", "train.ema=0.9", "train.clip_grad=1"),
    "adamw": ("train.optimizer=adamw", "train.ema=0.9"),
    "plain": ("train.fused=false", "train.channels_last=false"),
    "smoothing": ("train.label_smoothing=0.1", "train.schedule=step"),
    "strong": ("data.augment=strong", "distill.live=true", ALONE),
    "repeats": ("data.repeats=2", ALONE),
}


def run(jobs: Jobs, steps: Steps | None, name: str, *settings: str, **options: Any) -> list[Row]:
    with on_gpu() as waits:
        if steps is not None:
            steps.waits = waits
        rows = list(jobs.train(name, GPU, *settings, **options))
    assert [row["epoch"] for row in rows] == [1, 2]
    return rows


OF_TWO = ("cached", "live", "layers", "logits")
"""Ways whose arithmetic of two teachers is another; of the rest it is one of these."""


@pytest.mark.parametrize(
    ("way", "count"),
    [
        *((way, 1) for way in WAYS),
        *((way, 2) for way in OF_TWO),
        *(pytest.param(way, 2, marks=pytest.mark.slow) for way in WAYS if way not in OF_TWO),
    ],
)
def test_a_step_waits_for_nothing(jobs: Jobs, steps: Steps, way: str, count: int) -> None:
    teachers = [] if way == "labels" else jobs.teachers[:count]
    if count == 2:
        teachers = [{**row, "weight": 0.5} for row in teachers]

    run(jobs, steps, f"{way}_{count}", *WAYS[way], teachers=teachers)

    assert len(steps) == 2 * STEPS
    assert steps.within == []


@pytest.mark.parametrize(
    "options",
    [
        {"specialist": [0, 3, 4]},
        {"cycles": 2},
        {"bits": 4},
        *({"transform": name} for name in ("permuted", "confidence", "virtual", "hard")),
        {"transform": "class_mean"},
    ],
    ids=str,
)
def test_further_ways_to_train_stay_on_the_gpu(
    jobs: Jobs, steps: Steps, options: dict[str, Any]
) -> None:
    name = "_".join(map(str, options.values())).strip("[]")

    taught = "specialist" not in options and options.get("transform") != "virtual"
    run(jobs, steps, name, teachers=jobs.teachers[:taught], **options)

    assert len(steps) >= 4
    assert steps.within == []


def test_a_job_goes_on_from_its_state_on_the_gpu(jobs: Jobs) -> None:
    settings = (GPU, "train.ema=0.9", f"distill.terms=[{CRD}]", ALONE)
    with on_gpu():
        rows = jobs.train("resumed", *settings, teachers=jobs.teachers[:1])
        assert next(rows)["epoch"] == 1
        next(rows)
    with on_gpu():
        rows = list(jobs.train("resumed", *settings, teachers=jobs.teachers[:1]))

    assert [row["epoch"] for row in rows] == [1, 2]


@pytest.mark.parametrize("of", ["train", "transfer"])
def test_logits_are_cached_from_the_gpu(jobs: Jobs, tmp_path: Path, of: str) -> None:
    jobs.targets, kept = tmp_path, jobs.targets
    try:
        with on_gpu():
            assert jobs.cache(jobs.teachers[0], GPU, of=of) == [{"state": "written"}]
    finally:
        jobs.targets = kept


def test_a_check_tries_the_networks_on_the_gpu(jobs: Jobs) -> None:
    with on_gpu():
        (row,) = jobs.job("check", GPU, ALONE, f"distill.terms=[{', '.join(LAYERS)}]")

    assert "facts" in row, row


def test_a_value_that_is_read_in_a_step_is_seen(
    jobs: Jobs, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfkd.distill.distiller import Distiller

    call = Distiller.__call__

    def reading(self: Distiller, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        terms = call(self, *arguments, **options)
        terms["loss"].item()
        return terms

    monkeypatch.setattr(Distiller, "__call__", reading)
    run(jobs, steps, "read", teachers=jobs.teachers[:1])

    assert len(steps.within) == 2 * (STEPS - 1)
    assert all("_local_scalar_dense at test_images.py" in found for found in steps.within)


def test_a_tensor_left_on_the_cpu_ends_the_job(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    from selfkd.distill import distiller

    monkeypatch.setattr(distiller, "detached", lambda logits: logits.detach().cpu())

    with pytest.raises(RuntimeError, match="same device"):
        run(jobs, None, "left", teachers=jobs.teachers[:1])


def test_the_loss_is_checked_once_in_a_hundred_steps(
    jobs: Jobs, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit.CHECK_STEPS == 100
    monkeypatch.setattr(fit, "CHECK_STEPS", 2)

    run(jobs, steps, "checked")

    places = [found.partition(" at ")[2].partition(":")[0] for found in steps.within]
    assert places == ["fit.py"] * 2


def test_a_model_is_evaluated_on_the_gpu(jobs: Jobs, tmp_path: Path) -> None:
    student, teacher = jobs.teachers
    payload = {"teachers": [teacher], "predictions": str(tmp_path / "own.safetensors")}
    with on_gpu():
        (row,) = jobs.job(
            "evaluate", GPU, student=student["checkpoint"], diagnose=True, validate=True, **payload
        )

    assert row["test_accuracy"] >= 0


def jobs_of(jobs: Jobs, folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return jobs beside training, with their payloads."""
    first, second = (row["checkpoint"] for row in jobs.teachers)
    own, member = {"checkpoint": first}, {"members": [{"checkpoint": first}]}
    (folder / "own.py").write_text(
        "from selfkd import make_model\n\n\ndef make():\n    "
        "return make_model('selfkd_cnn', {'width': 4}, num_classes=10, in_chans=1, image_size=8)\n"
    )
    users = {"make_model": f"{folder / 'own.py'}:make"}
    return {
        "soup": (
            "average_checkpoints",
            {"checkpoints": [first, second], "save": str(folder / "a"), "greedy": True},
        ),
        "weights": ("fit_ensemble_weights", {"checkpoints": [first, second]}),
        "imported": ("import_checkpoint", {"save": first}),
        "timed": ("time", {"models": [[first], [first, second]], "batches": [2]}),
        "pruned": ("prune", {**own, "fraction": 0.5, "save": str(folder / "p")}),
        "rounded": ("round_checkpoint", {**own, "bits": 4, "save": str(folder / "r")}),
        "deployed": ("deploy_measure", {"members": jobs.teachers}),
        "deployed user's": ("deploy_measure", {**member, **users}),
        "timed side by side": ("deploy_time", {"forms": {"a": member}, "reference": "a"}),
    }


OTHER_JOBS = (
    *("soup", "weights", "imported", "timed", "pruned", "rounded"),
    *("deployed", "deployed user's", "timed side by side"),
)


@pytest.mark.parametrize("name", OTHER_JOBS)
def test_further_jobs_run_on_the_gpu(
    jobs: Jobs, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfkd.worker.ensembling.TIMED_SECONDS", 0.001)
    monkeypatch.setattr("selfkd.worker.deploy.time_together", run_once)
    kind, payload = jobs_of(jobs, tmp_path)[name]
    with on_gpu():
        (row,) = jobs.job(kind, GPU, **payload)

    assert "fault" not in row


def run_once(calls: dict[str, Any]) -> dict[str, list[float]]:
    """Stand for timing."""
    return {name: [1.0] for name, call in calls.items() if call() is not None}


def test_a_model_is_exported_from_the_cpu(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def exported(network: torch.nn.Module, inputs: torch.Tensor, *arguments: Any) -> None:
        places = {tensor.device.type for tensor in (inputs, *network.parameters())}
        raise ValueError(f"exported on {places}")

    monkeypatch.setattr("selfkd.worker.deploy.export_onnx", exported)
    with on_gpu():
        (row,) = jobs.job("deploy_export", GPU, path="a.onnx", members=jobs.teachers[:1])

    assert row == {"fault": "exported on {'cpu'}"}


def test_features_of_arrays_train_on_the_gpu(jobs: Jobs, steps: Steps, tmp_path: Path) -> None:
    x, y = torch.arange(400).view(100, 4) % 7, torch.arange(100) % 3
    np.savez(tmp_path / "a.npz", x=x.float().numpy(), y=y.numpy())
    model = {"name": "selfkd_mlp", "args": {"width": 4}}
    arrays = f"data={{name: arrays, root: {tmp_path / 'a.npz'}, jitter: 0, val_size: 20}}"
    settings = (
        f"{arrays}", "model={name: selfkd_mlp, args: {width: 4}}", "student=null", ALONE,
        "data.flip=false", "data.crop=null", "data.views=1", "data.train_size=60",
    )  # fmt: skip

    run(jobs, steps, "arrays", *settings, model=model)

    assert len(steps) == 2 * STEPS
    assert steps.within == []


@pytest.mark.parametrize("large", [False, True])
def test_large_logits_are_sent_pinned_and_small_ones_stay(
    jobs: Jobs, steps: Steps, large: bool
) -> None:
    free = 1000 if large else 2**30
    with on_gpu(mem_get_info=lambda *arguments: (free, 2**30)) as waits:
        steps.waits = waits
        rows = jobs.train(f"large_{large}", GPU, teachers=jobs.teachers[:1])
        assert len(list(rows)) == 2

    assert steps.within == []
