"""Jobs of several processes for tests: gloo, with a file as rendezvous."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

IMPORTED = ["rank_jobs", "selfkd.worker.jobs", "torch.distributed.fsdp", "torch._dynamo"]


def run_job(kind: str, payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row an epoch; a rank fails or dies where the payload says so."""
    dist: Any = sys.modules.get("torch.distributed")  # one worker alone needs no torch
    rank, size = (dist.get_rank(), dist.get_world_size()) if _in_group(dist) else (0, 1)
    for epoch in range(1, payload.get("epochs", 1) + 1):
        time.sleep(payload.get("pause", 0.0))
        if "trace" in payload:
            Path(payload["trace"]).with_suffix(f".{rank}").write_text(str(epoch))
        if payload.get("fails") == rank and epoch == 2:
            raise ValueError(f"rank {rank} fails")
        died = Path(payload.get("died", "."))
        if payload.get("away") == rank and epoch == 2 and not died.exists():
            died.touch()
            raise OSError(errno.EIO, "the storage is away")
        if payload.get("dies") == rank and epoch == 2 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield {
            "epoch": epoch,
            "rank": rank,
            "size": size,
            "sum": _sum(rank + 1.0) if size > 1 else 1.0,
            "pid": os.getpid(),
            "name": payload.get("name"),
            "val_accuracy": payload.get("accuracy", 0.5),
        }


def _in_group(dist: Any) -> bool:
    return dist is not None and dist.is_initialized()


def _sum(value: float) -> float:
    import torch

    total = torch.tensor([value])
    torch.distributed.all_reduce(total)
    return total.item()


def on_ranks(work: Callable[..., None], size: int, folder: Path, *more: Any) -> None:
    """Call `work(rank, folder, *more)` in `size` processes that form one process group.

    They are forks of a server that has imported what takes seconds: once, not in each of them.
    """
    import torch.multiprocessing as mp

    multiprocessing.set_forkserver_preload(IMPORTED)
    mp.start_processes(_on_rank, (work, size, folder, more), nprocs=size, start_method="forkserver")


def _on_rank(
    rank: int, work: Callable[..., None], size: int, folder: Path, more: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # a file, as the server of tcp:// may abort a process that ends
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    work(rank, folder, *more)
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()  # a wrapped model is a reference cycle; its threads should end before the process


def train_together(rank: int, folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Run jobs on this rank, one after the other, each for `stop` epochs, if given."""
    import torch
    import torch.distributed as dist

    from selfkd.worker.jobs import run_job as run_selfkd_job

    for number, job in enumerate(jobs):
        torch.manual_seed(1000 * number + rank)  # as in a process of its own
        rows = list(islice(run_selfkd_job("train", job["payload"]), job["stop"]))
        if rank == 0:
            (folder / f"rows_{number}.json").write_text(json.dumps(rows))
        dist.barrier()
