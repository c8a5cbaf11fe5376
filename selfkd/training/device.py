"""The device of a worker: its precision, its memory, and what is said when that does not do."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from selfkd.config import Config, Tree, from_tree
from selfkd.errors import DeviceMemoryError
from selfkd.training.predict import Precision

GIB = 2**30


def prepare_device(config: Config) -> str:
    """Set the threads of this worker, the precision and share of its GPU, and return its device.

    Of a fraction of a GPU a trial gets the same fraction of its memory, so that one trial that
    needs more ends rather than those that share the GPU with it.

    Raises:
        ValueError: A GPU is asked for, and torch finds none that is trained on.
    """
    torch.set_num_threads(max(1, int(config.resources.cpu)))
    share = config.resources.gpu
    if share <= 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(f"resources.gpu must be 0 {_without_cuda()}, got {share:g}")
    tf32 = bool(config.train.tf32)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    return "cuda"


def _without_cuda() -> str:
    """Return where no GPU is trained on: on Apple's, Intel's, or where there is none."""
    for name, maker in (("mps", "Apple"), ("xpu", "Intel")):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            return f"on a machine whose GPU is {maker}'s ({name}): commands train on CUDA and CPUs"
    return "where torch finds no GPU"


def precision_of(amp: Precision | Literal["auto"], device: str) -> Precision:
    """Return the precision of `train.amp`: of auto, the best of a device.

    That is bfloat16, float16 on a GPU that does not compute in it, and none on CPUs.

    >>> precision_of("auto", "cpu"), precision_of("float16", "cpu")
    ('none', 'float16')
    """
    if amp != "auto":
        return amp
    if torch.device(device).type == "cpu":
        return "none"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def describe_gpu() -> dict[str, Any]:
    """Return the name of this worker's GPU, and its memory in bytes: all of it, what is free."""
    free, total = torch.cuda.mem_get_info()
    return {"gpu": torch.cuda.get_device_name(), "memory": total, "free": free}


@contextmanager
def saying_memory(config: Tree | None, job: str = "train") -> Iterator[None]:
    """Say what a GPU's memory was taken by where it has run out, and free what is left of a job.

    Args:
        config: Config of the job; None of one that computes nothing.
        job: Kind of the job; of training, its batch size is named.

    Raises:
        DeviceMemoryError: It has.
    """
    message = ""
    try:
        yield
    except Exception as error:
        if config is None or not ran_out(error):
            raise
        message = _describe_shortage(from_tree(config), job)
        for each in _chain(error):
            traceback.clear_frames(each.__traceback__)  # which hold the tensors of the job
    if message:
        gc.collect()
        torch.cuda.empty_cache()
        raise DeviceMemoryError(message)


def ran_out(error: BaseException) -> bool:
    """Return whether an error is that of a GPU's memory, or was made from it.

    >>> ran_out(torch.OutOfMemoryError("CUDA out of memory")), ran_out(ValueError("too wide"))
    (True, False)
    """
    return any(isinstance(each, torch.OutOfMemoryError) for each in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _describe_shortage(config: Config, job: str) -> str:
    size, share = config.train.batch_size, config.resources.gpu
    if job == "train":
        found = f"train.batch_size must fit into the memory of the GPU, got {size}"
        ways = ["lower train.batch_size", "raise resources.gpu", "choose train.amp auto"]
    else:
        work = WORK.get(job, f"the job {job}")
        found = f"resources.gpu must give the memory for {work}, got {share:g}"
        ways = ["end what else is on it", "raise resources.gpu", "compute on CPUs: resources.gpu=0"]
    if not 0 < share < 1:
        del ways[1]
    if torch.cuda.is_available():
        gpu, own = describe_gpu(), torch.cuda.memory_reserved()
        others = max(0, gpu["memory"] - gpu["free"] - own)
        this = "trial" if job == "train" else "job"
        found += (
            f" on {gpu['gpu']} with {gpu['memory'] / GIB:.1f} GiB: this {this} held "
            f"{own / GIB:.1f} GiB, others {others / GIB:.1f} GiB, {gpu['free'] / GIB:.1f} GiB free"
        )
    if 0 < share < 1:
        found += f" (resources.gpu {share:g} lets a trial have {share:.0%} of it)"
    return f"{found}: {', or '.join(ways)}"


WORK = {
    "check": "trying the networks on two inputs",
    "cache_teacher_logits": "caching a teacher's logits, one input at a time",
    "evaluate": "evaluating a model, one input at a time",
    "fit_ensemble_weights": "predicting by each member, one input at a time",
    "average_checkpoints": "evaluating averaged weights, one input at a time",
    "import_checkpoint": "evaluating a given model, one input at a time",
    "time": "timing models at the batches of the report",
    "write": "writing text by a teacher",
}
"""What jobs do, by their kind. Predictions halve their batches before their memory runs out."""
