"""Several GPUs that train one student: the gradient is that of one, over NCCL (gloo on the CPU)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from setting import Row, Setting, digits

RANKS = 2


def check_ranks(setting: Setting) -> list[Row]:
    """Train on two ranks and on one, and compare the weights."""
    if setting.quick and setting.device == "cpu":
        return [Row("two ranks over gloo", "left out", "--part ranks")]
    if setting.device == "cuda" and torch.cuda.device_count() < RANKS:
        return [Row("two ranks over NCCL", "left out", f"{torch.cuda.device_count()} GPU")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", str(Path(__file__)), setting.device]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=max(5.0, setting.left), check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    backend = "NCCL" if setting.device == "cuda" else "gloo"
    return [Row(f"two ranks over {backend} as one", done.stdout.strip().splitlines()[-1])]


def main(device: str) -> None:
    from correct import exact_float32, network

    from selfkd.distill.distiller import Distiller
    from selfkd.training.fit import Training, fit
    from selfkd.training.optimizers import make_optimizer
    from selfkd.training.ranks import Ranks

    exact_float32()
    here = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    data, found = digits().to(here), []
    for ranks in (Ranks.here(), Ranks()):
        student = network(0).to(here)
        for module in student.modules():  # whose statistics differ between ranks
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
                module.train = lambda mode=True, own=module: own  # type: ignore[method-assign]
        training = Training(
            student=student,
            optimizer=make_optimizer(student, name="sgd", lr=0.05, momentum=0.9, weight_decay=0),
            generator=torch.Generator().manual_seed(0),
            device=here,
        )
        list(fit(training, data, Distiller(), epochs=1, batch_size=60, ranks=ranks))
        found.append(torch.cat([p.detach().flatten().cpu() for p in student.parameters()]))
    apart = float((found[0] - found[1]).norm() / found[1].norm())
    assert apart < 1e-4, f"weights are {apart:.1e} apart"
    if dist.get_rank() == 0:
        print(f"{apart:.1e} apart")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
