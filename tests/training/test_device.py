"""The device of a worker: precision, shares of memory, other GPUs, and memory that runs out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda

from selfkd.config import Config, load_config, to_tree
from selfkd.errors import ConfigError, DeviceMemoryError
from selfkd.execution.jobs import Batch, InProcess, Job
from selfkd.experiments.device import settle_device
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import Message, Row
from selfkd.training.device import WORK, precision_of, prepare_device, saying_memory
from selfkd.worker.jobs import _JOBS, run_job

GIB = 2**30


def config_of(*settings: str) -> Config:
    return load_config(settings=settings)


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(kept[0])
    torch.backends.cudnn.allow_tf32 = kept[1]


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_as_the_config_says(tf32: bool) -> None:
    with fake_cuda():
        prepare_device(config_of("resources.gpu=1", f"train.tf32={tf32}"))

        assert torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.backends.cudnn.allow_tf32 == tf32


@pytest.mark.parametrize(("gpu", "share"), [("0.25", 0.25), ("1", None), ("2", None)])
def test_a_fraction_of_a_gpu_is_that_of_its_memory(gpu: str, share: float | None) -> None:
    found = []
    with fake_cuda(set_per_process_memory_fraction=found.append):
        assert prepare_device(config_of(f"resources.gpu={gpu}")) == "cuda"

    assert found == ([] if share is None else [share])


@pytest.mark.parametrize(
    ("bfloat16", "device", "expected"),
    [(True, "cuda", "bfloat16"), (False, "cuda", "float16"), (True, "cpu", "none")],
)
def test_the_best_precision_is_that_of_the_device(
    bfloat16: bool, device: str, expected: str
) -> None:
    with fake_cuda(bfloat16=bfloat16):
        assert precision_of("auto", device) == expected
        assert precision_of("none", device) == "none"


@pytest.mark.parametrize(("name", "maker"), [("mps", "Apple"), ("xpu", "Intel")])
def test_other_gpus_are_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, name: str, maker: str
) -> None:
    monkeypatch.setattr(f"torch.{name}.is_available", lambda: True)

    with pytest.raises(ValueError, match=rf"resources.gpu must be 0 .*{maker}'s \({name}\)") as no:
        prepare_device(config_of("resources.gpu=1"))

    assert "\n" not in str(no.value)


def test_where_there_is_no_gpu_none_can_be_asked_for() -> None:
    with pytest.raises(ValueError, match="must be 0 where torch finds no GPU, got 1"):
        prepare_device(config_of("resources.gpu=1"))


class _Big:
    """A tensor's stand-in whose memory has to be free after the error."""


def run_out(found: list[Any]) -> None:
    big = _Big()
    found.append(weakref.ref(big))
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_memory_that_runs_out_is_named_with_what_else_is_on_the_card() -> None:
    config = to_tree(config_of("resources.gpu=0.25", "train.batch_size=512"))
    found, emptied = list[Any](), list[bool]()
    gpu: dict[str, Any] = {
        "mem_get_info": lambda *args: (GIB, 16 * GIB),
        "memory_reserved": lambda *args: 4 * GIB,
        "get_device_name": lambda *args: "NVIDIA T4",
        "empty_cache": lambda: emptied.append(found[0]() is None),
    }
    with fake_cuda(**gpu), pytest.raises(DeviceMemoryError) as error, saying_memory(config):
        run_out(found)

    assert str(error.value) == (
        "train.batch_size must fit into the memory of the GPU, got 512 on NVIDIA T4 with 16.0 GiB: "
        "this trial held 4.0 GiB, others 11.0 GiB, 1.0 GiB free (resources.gpu 0.25 lets a trial "
        "have 25% of it): lower train.batch_size, or raise resources.gpu, or choose train.amp auto"
    )
    assert emptied == [True]
    assert error.value.__cause__ is None


@pytest.mark.parametrize(
    ("gpu", "way"), [("1", "end what else is on it"), ("0.5", "raise resources.gpu")]
)
def test_memory_that_runs_out_elsewhere_has_the_same_message(
    gpu: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_within(task: _Task, teachers: Any) -> None:
        try:
            run_out([])
        except RuntimeError as error:  # as checks say what a network does not take
            raise ValueError(f"model must take images: {error}") from None

    monkeypatch.setattr("selfkd.worker.jobs.make_task", lambda tree: _Task())
    monkeypatch.setattr(_Task, "check", run_out_within, raising=False)
    tree = to_tree(config_of(f"resources.gpu={gpu}"))

    with fake_cuda(memory_reserved=lambda: GIB), pytest.raises(DeviceMemoryError) as error:
        list(run_job("check", {"config": tree}))

    start = "resources.gpu must give the memory for trying the networks on two inputs, got "
    assert str(error.value).startswith(f"{start}{gpu} on fake with 16.0 GiB: this job held 1.0 GiB")
    assert way in str(error.value)
    assert "out of memory" not in str(error.value)


class _Task:
    """Task whose methods are replaced."""


def test_jobs_with_words_of_their_own_are_jobs() -> None:
    assert set(WORK) <= set(_JOBS)


TRAIN = """
import torch

def train(trial):
    if trial.seed == 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    trial.report({"val_accuracy": 0.5}, student=torch.nn.Linear(1, 1))
"""


def test_a_trial_without_memory_ends_and_the_next_goes_on(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(TRAIN)
    model = {"name": "selfkd_mlp", "args": {}}
    own = {"config": to_tree(Config()), "stage": "generation-0", "model": model, "teachers": []}
    own |= {"function": f"{tmp_path / 'own.py'}:train", "targets": str(tmp_path / "targets")}
    jobs = [
        Job("train", {**own, "seed": seed, "student": str(tmp_path / f"{seed}" / "s.safetensors")})
        for seed in (1, 2)
    ]
    batch = Batch(jobs)

    InProcess(run_job).run(batch)

    first, second = batch.outcomes
    assert first.error is not None
    assert first.error.startswith("DeviceMemoryError: train.batch_size must fit")
    assert second.error is None
    assert second.row["val_accuracy"] == 0.5


class _Worker:
    """Executor with a worker that has a GPU."""

    def __init__(self, **row: Any) -> None:
        self.row, self.kinds = row, list[str]()

    def run(self, jobs: Any, **options: Any) -> None:
        def one(kind: str, payload: Any) -> Iterator[Row]:
            self.kinds.append(kind)
            yield self.row

        InProcess(one).run(jobs)


def test_the_precision_of_the_gpu_is_written_into_the_run(tmp_path: Path) -> None:
    config = config_of("resources.gpu=0.5", "train.amp=auto")
    folder = RunFolder.create(tmp_path / "one", config)
    events = list[Any]()
    worker = _Worker(amp="float16", gpu="NVIDIA T4", memory=16 * GIB, free=15 * GIB)

    settled = settle_device(config, folder, worker, events.append)

    assert (settled.train.amp, settled.train.tf32) == ("float16", True)
    assert events == [
        Message(
            "NVIDIA T4 with 16.0 GiB, 15.0 GiB free: 2 trials share one, each with at most 8.0 GiB"
        )
    ]
    written = (folder.path / "config.yaml").read_text()
    assert "amp: float16" in written
    assert "tf32: true" in written
    folder.check_change(settled, settled)


def test_without_a_gpu_auto_is_none_and_no_worker_is_asked(tmp_path: Path) -> None:
    config = config_of("train.amp=auto")
    folder = RunFolder.create(tmp_path / "one", config)
    worker = _Worker()

    settled = settle_device(config, folder, worker, print)

    assert (settled.train.amp, settled.train.tf32, worker.kinds) == ("none", None, [])
    plain = config_of()
    assert settle_device(plain, folder, worker, print) is plain


def test_a_worker_without_a_gpu_ends_the_run(tmp_path: Path) -> None:
    config = config_of("resources.gpu=1")
    folder = RunFolder.create(tmp_path / "one", config)

    with pytest.raises(ConfigError, match="must be 0 where torch"):
        settle_device(config, folder, InProcess(run_job), print)


def test_a_worker_says_what_its_gpu_is() -> None:
    tree = to_tree(config_of("resources.gpu=1"))
    with fake_cuda(bfloat16=False):
        (row,) = run_job("describe_device", {"config": tree})

    assert row == {"amp": "float16", "gpu": "fake", "memory": 16 * GIB, "free": 8 * GIB}
