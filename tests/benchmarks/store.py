"""Microseconds to read a batch of soft targets: packed in memory or from mapped files.

    python tests/benchmarks/store.py [--rounds 5] [--batch-size 128] [--threads 1]

Batches are random images. The ways take turns, and the best time of each counts. `first` is the
first batch: it checks every shard it touches, and packs the view where that is what is measured.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from selfkd.soft_targets import shards, store
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.shards import write_shard
from selfkd.soft_targets.store import SoftTargets, open_store

CALLS = 300
TARGET = 150.0
MAPPED, PACKED = 0, 2**40


def make_stores(root: Path, *, members: int, images: int, classes: int, top_k: int | None) -> str:
    key = data_key(f"{images} x {classes}", {}, top_k=top_k)
    for member in range(members):
        manifest = Manifest(
            teacher=str(member),
            data=key,
            fingerprint=f"{images} x {classes}",
            recipe={},
            views=1,
            images=images,
            classes=classes,
            top_k=top_k,
        )
        for shard in range(manifest.shards):
            logits = 4 * torch.randn(len(manifest.rows(shard)), classes)
            write_shard(root, manifest, view=0, shard=shard, logits=logits)
    return key


def microseconds(targets: SoftTargets, batches: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    for index in batches:
        targets(index, 0)
    return (time.perf_counter() - start) / len(batches) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    print(f"microseconds a batch of {args.batch_size}, best of {args.rounds} rounds; ", end="")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for images, classes, top_k in [
            (50_000, 10, None),
            (20_000, 1_000, None),
            (20_000, 1_000, 20),
        ]:
            for members, average in [(1, "probabilities"), (10, "probabilities"), (10, "logits")]:
                if top_k is not None and average == "logits":
                    continue
                root = Path(folder) / str(members)
                key = make_stores(
                    root, members=members, images=images, classes=classes, top_k=top_k
                )
                teachers = [str(member) for member in range(members)]
                batches = [torch.randint(images, (args.batch_size,)) for _ in range(CALLS)]
                ways = {}
                for way, limit in [("packed", PACKED), ("mapped", MAPPED)]:
                    store.PACK_LIMIT = limit
                    shards._CHECKED.clear()
                    targets = open_store(root, teachers, data=key, average=average)
                    ways[way] = targets, microseconds(targets, batches[:1])
                best = {
                    way: min(microseconds(targets, batches) for _ in range(args.rounds))
                    for way, (targets, _) in ways.items()
                }
                for way, (_, first) in ways.items():
                    name = f"{images:,} x {classes:,}, top_k {top_k}, {members} members, {average}"
                    print(f"{name:60} {way} {best[way]:8.1f}   first {first:10.0f}", flush=True)
                if classes == 10:
                    worst = max(worst, best["packed"])
    verdict = "reached" if worst <= TARGET else "MISSED"
    print(f"\n{verdict}: {worst:.1f} us packed at 10 classes, target {TARGET:.0f} us")


if __name__ == "__main__":
    main()
