"""Rules that choose a trial of a search, replayed on pools of trainings.

    python tests/benchmarks/choice.py pool POOLS digits100 0 1 2 …
    python tests/benchmarks/choice.py pool POOLS cifar12 0 1 2 3 --root cifar10_small
    python tests/benchmarks/choice.py replay POOLS

A pool is one split of one task: a teacher (the best of several on labels), then each of many points
trained from it on the same seeds, beside labels alone. A replay draws eight points and a seed for
each from one half of the seeds, lets each rule choose by validation, and takes the chosen point's
mean test gain over labels on the other half. `cifar12` and `cifar36` are natural images, one folder
a class in train/ and test/, at 16 pixels: undertrained, and trained three times as long.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selfkd.config import Config, load_config, to_tree
from selfkd.config.space import make_points
from selfkd.experiments.choice import APART
from selfkd.tasks import make_task
from selfkd.worker.jobs import run_job

Array = NDArray[np.float64]
NATURAL = [
    *("data.name=folder", "data.train_size=1000", "data.val_size=400", "data.image_size=16"),
    *("model={name: selfkd_resnet8}", "train.batch_size=32", "train.lr=0.1"),
]
TASKS = {  # settings, points, seeds, candidates for the teacher
    "digits100": (["data.train_size=100", "model.args.width=8"], 28, 6, 8),
    "digits200": (["data.train_size=200", "model.args.width=16"], 28, 6, 8),
    "folder400": (
        [
            *("data.name=folder", "data.train_size=400", "data.val_size=400", "train.epochs=20"),
            *("data.image_size=14", "model.args.width=8"),
        ],
        *(20, 6, 8),
    ),
    "cifar12": ([*NATURAL, "train.epochs=12"], 10, 3, 3),
    "cifar36": ([*NATURAL, "train.epochs=36"], 8, 3, 3),
}
WIDEST = (
    "search.space={distill.temperature: {loguniform: [1, 20]}, distill.alpha: {uniform: [0, 1]}}"
)
DRAWS = 120
TRIALS = 8


def train_pool(name: str, split: int, root: str | None, file: Path) -> None:
    """Train the pool of a split and save it."""
    settings, points, seeds, candidates = TASKS[name]
    config = load_config(
        settings=[*settings, f"seed={split}", *([f"data.root={root}"] if root else [])]
    )
    task = make_task(to_tree(config))
    with tempfile.TemporaryDirectory() as folder:

        def train(own: Config, seed: int, teachers: list[Any]) -> tuple[str, str]:
            path = str(Path(folder, f"{seed}.safetensors"))
            tree = to_tree(own)
            common = {"stage": "pool", "seed": seed, "model": tree["model"], "student": path}
            job = {**common, "config": tree, "teachers": teachers, "targets": f"{folder}/targets"}
            return path, list(run_job("train", job))[-1]["hash"]

        def measure(path: str) -> tuple[Array, float]:
            hits = (task.hits(task.predict(path, part), part) for part in ("val", "test"))
            val, test = (hit.numpy() for hit in hits)
            return val, float(test.mean())

        found = []
        for number in range(candidates):
            path, digest = train(config, 90_000 + number, [])
            kept = Path(folder, f"teacher_{number}.safetensors")
            Path(path).rename(kept)
            found.append((measure(str(kept))[0].mean(), {"hash": digest, "checkpoint": str(kept)}))
        teacher = max(found, key=lambda pair: pair[0])[1]
        for view in range(task.check().views):
            job = {"config": to_tree(config), "checkpoint": teacher["checkpoint"], "view": view}
            list(
                run_job(
                    "cache_teacher_logits",
                    job | {"shard": 0, "run": folder, "targets": f"{folder}/targets"},
                )
            )
        labels = [measure(train(config, seed, [])[0]) for seed in range(seeds)]
        wide = load_config(settings=[WIDEST]).space(with_teacher=True)
        drawn = make_points(
            Config().space(with_teacher=True),
            count=points - points // 4 - 1,
            algorithm="sobol",
            seed=split,
        )
        drawn = [{"distill.temperature": 1.0, "distill.alpha": 1.0}, *drawn]
        drawn += make_points(wide, count=points // 4, algorithm="sobol", seed=split + 77)
        rows = [
            [measure(train(config.at(point), seed, [teacher])[0]) for seed in range(seeds)]
            for point in drawn
        ]
    np.savez_compressed(
        file,
        points=np.array([list(point.values()) for point in drawn]),
        val=np.array([[hits for hits, _ in row] for row in rows]),
        test=np.array([[accuracy for _, accuracy in row] for row in rows]),
        labels=np.array([accuracy for _, accuracy in labels]),
    )


class Pool:
    """A pool, and its points as quantiles of the default space."""

    def __init__(self, file: Path) -> None:
        data = np.load(file)
        self.points, self.val, self.test = data["points"], data["val"], data["test"]
        self.gains = 100 * (self.test - data["labels"])
        self.over_mean = 100 * (self.test - data["labels"].mean())
        temperature, alpha = self.points.T
        self.places = np.stack([np.log10(temperature), (alpha - 0.1) / 0.9], axis=1)
        self.inside = (temperature <= 10) & (alpha >= 0.1)
        self.narrow = (temperature >= 2) & (temperature <= 10) & (alpha >= 0.6)


def place(temperature: float, alpha: float) -> Array:
    return np.array([np.log10(temperature), (alpha - 0.1) / 0.9])


def surface(places: Array, values: Array, at: Array) -> Array:
    """Return a smoothed mean of values at places, by a Gaussian process of fixed settings."""

    def kernel(a: Array, b: Array) -> Array:
        return 4 * np.exp(-np.square(a[:, None] - b[None]).sum(-1) / (2 * 0.35**2)) + 25

    weights = np.linalg.solve(kernel(places, places) + np.eye(len(values)), values - values.mean())
    return values.mean() + kernel(at, places) @ weights


def best_accuracy(pool: Pool, points: list[int], hits: Array) -> int:
    return int(hits.mean(axis=1).argmax())


def middle_of_mcnemar(pool: Pool, points: list[int], hits: Array) -> int:
    """The nearest to the middle of the trials that McNemar's test does not tell apart."""
    lost = hits[hits.mean(axis=1).argmax()] - hits
    good = lost.sum(axis=1) <= 1.96 * np.sqrt(np.square(lost).sum(axis=1))
    places = pool.places[points]
    away = np.square(places - places[good].mean(axis=0)).sum(axis=1)
    return int(np.where(good, away, np.inf).argmin())


def smoothed(pool: Pool, points: list[int], hits: Array) -> int:
    """The best by a surface that is fitted to the trials."""
    places, values = pool.places[points], hits.mean(axis=1)
    return int(surface(places, values / values.std(), places).argmax())


def near(temperature: float, alpha: float, apart: float = APART) -> Callable[..., int]:
    """The nearest to a setting, which is tried, of the trials that accuracy does not tell apart."""

    def rule(pool: Pool, points: list[int], hits: Array) -> int:
        values = hits.mean(axis=1)
        best = values.max()
        error = np.sqrt((values * (1 - values) + best * (1 - best)) / hits.shape[1])
        away = np.square(pool.places[points] - place(temperature, alpha)).sum(axis=1)
        return int(np.where(best - values <= apart * error, away, np.inf).argmin())

    rule.setting = place(temperature, alpha)  # type: ignore[attr-defined]
    return rule


RULES: dict[str, tuple[str, Callable[..., int]]] = {
    "T 1 to 20, alpha 0 to 1: best accuracy": ("val", best_accuracy),
    "T 2 to 10, alpha 0.6 to 1: best accuracy": ("narrow", best_accuracy),
    "T 1 to 10, alpha 0.1 to 1: best accuracy": ("inside", best_accuracy),
    "… fitted surface": ("inside", smoothed),
    "… not told apart by McNemar, nearest the middle": ("inside", middle_of_mcnemar),
    "… not told apart, nearest (T 3.5, alpha 0.5)": ("inside", near(3.5, 0.5)),
    "… not told apart, nearest (T 3.5, alpha 0.65)": ("inside", near(3.5, 0.65)),
    "… not told apart, nearest (T 4, alpha 0.7)": ("inside", near(4, 0.7)),
    "… (T 3.5, alpha 0.65) at any accuracy": ("inside", near(3.5, 0.65, np.inf)),
}


def replay(pool: Pool, split: int) -> dict[str, float]:
    """Return the mean test gain of what each rule chooses, in points."""
    rng, gains = np.random.default_rng(split), defaultdict[str, list[float]](list)
    seeds = pool.test.shape[1]
    for _ in range(DRAWS):
        order = rng.permutation(seeds)
        searched, fresh = order[: seeds // 2], order[seeds // 2 :]
        for name, (region, rule) in RULES.items():
            allowed = np.arange(len(pool.points))
            if region != "val":
                allowed = allowed[getattr(pool, region)]
            if len(allowed) < 2:
                continue
            points = list(rng.choice(allowed, min(TRIALS, len(allowed)), replace=False))
            setting = getattr(rule, "setting", None)
            if setting is not None:
                away = np.square(pool.places - setting).sum(axis=1)
                points[-1] = int(np.where(pool.inside, away, np.inf).argmin())
            hits = np.stack([pool.val[p, rng.choice(searched)] for p in points]).astype(float)
            gains[name].append(float(pool.gains[points[rule(pool, points, hits)], fresh].mean()))
    return {name: float(np.mean(values)) for name, values in gains.items()}


def models(pool: Pool, split: int, seeds_at_own: int) -> tuple[float, float]:
    """Return the test gain of two models of a search, in points.

    Args:
        pool: Pool of a split.
        split: Seed of the draws.
        seeds_at_own: Trials at (T 3.5, alpha 0.65), each with a seed of its own.

    Returns:
        Gain over the mean of labels: of the model that is taken, and of the best on validation.
    """
    rng, gains = np.random.default_rng(split), []
    away = np.square(pool.places - place(3.5, 0.65)).sum(axis=1)
    own = int(np.where(pool.inside, away, np.inf).argmin())
    others = [n for n in np.flatnonzero(pool.inside) if n not in (0, own)]
    seeds = pool.test.shape[1]
    repeats = min(seeds_at_own, seeds)
    rest = min(TRIALS - 1 - repeats, len(others))
    for _ in range(DRAWS):
        points = [*[own] * repeats, 0, *rng.choice(others, rest, replace=False)]
        drawn = [*rng.permutation(seeds)[:repeats], *rng.integers(seeds, size=rest + 1)]
        hits = np.stack([pool.val[p, s] for p, s in zip(points, drawn, strict=True)])
        values = hits.mean(axis=1)
        best = values.max()
        error = np.sqrt((values * (1 - values) + best * (1 - best)) / hits.shape[1])
        good = np.flatnonzero(best - values <= APART * error)
        taken = min(good, key=lambda n: (away[points[n]], -values[n]))
        gains.append([pool.over_mean[points[n], drawn[n]] for n in (taken, values.argmax())])
    first, second = np.mean(gains, axis=0)
    return float(first), float(second)


def main() -> None:
    """Train pools, or replay the rules on all there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("pool", "replay"))
    parser.add_argument("pools", type=Path)
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("splits", nargs="*", type=int)
    parser.add_argument("--root", help="folder of the images")
    given = parser.parse_args()
    if given.what == "pool":
        torch.set_num_threads(1)
        given.pools.mkdir(exist_ok=True)
        for split in given.splits:
            train_pool(given.task, split, given.root, given.pools / f"{given.task}_{split}.npz")
        return
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 19), np.linspace(0, 1, 19)), -1).reshape(-1, 2)
    print(
        "gain over labels in points, mean ± standard error over splits, "
        "share of the best fixed setting's"
    )
    for task in TASKS:
        pools = [Pool(file) for file in sorted(given.pools.glob(f"{task}_*.npz"))]
        if not pools:
            continue
        places = np.concatenate([pool.places for pool in pools])
        means = surface(places, np.concatenate([pool.gains.mean(axis=1) for pool in pools]), grid)
        best, (x, y) = means.max(), grid[means.argmax()]
        paper = np.mean([pool.gains[0].mean() for pool in pools])
        print(
            f"\n{task}, {len(pools)} splits; best fixed: {best:+.2f} at T {10**x:.1f}, "
            f"alpha {0.1 + 0.9 * y:.2f}; T 1, alpha 1: {paper:+.2f}"
        )
        found = [replay(pool, split) for split, pool in enumerate(pools)]
        for name in RULES:
            values = np.array([row[name] for row in found if name in row])
            if len(values):
                error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
                print(
                    f"  {name:52} {values.mean():+.2f} ± {error:.2f}  {values.mean() / best:5.2f}"
                )
        for count in (1, 3):
            taken, top = np.mean([models(p, n, count) for n, p in enumerate(pools)], axis=0)
            print(f"  model, {count} of 8 at the own setting: taken {taken:+.2f}, best {top:+.2f}")


if __name__ == "__main__":
    main()
