"""Several ranks that train one student: the result of a single one, however batches are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import on_ranks, train_together
from timm.layers import BatchNormAct2d
from torch import nn
from train_jobs import PLAIN, born_again, payload

from selfkd.data import Data, Split
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.training.ranks import Ranks, smallest_batch
from selfkd.worker.jobs import run_job

RANKS = 3
CASES = {
    "plain": PLAIN,
    "uneven": (*PLAIN, "train.batch_size=16"),
    "one each": (*PLAIN, "train.batch_size=2", "train.epochs=1"),
    "clipped": (*PLAIN, "train.clip_grad=0.5", "train.ema=0.9", "train.warmup_epochs=1"),
    "mixed": (*PLAIN, "data.augment=strong", "data.repeats=2", "train.batch_size=16"),
    "views": (*PLAIN, "data.jitter=1", "data.views=2", "train.optimizer=adamw", "train.lr=0.01"),
}
CONFIDENCE = {"transform": "confidence"}
DROPOUT = (*PLAIN, "model.args={width: 12, depth: 1, drop_rate: 0.4}", "train.ema=0.9")
NORM = (*PLAIN, "model={name: selfkd_cnn, args: {width: 4}}", "train.ema=0.9")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Row], Path]]:
    """Rows and folder of each case, trained by the same three processes, and of its teacher."""
    root = tmp_path_factory.mktemp("together")
    teacher = born_again(root)
    jobs: dict[str, dict[str, Any]] = {
        name: {"payload": payload(root / name, *settings), "stop": None}
        for name, settings in CASES.items()
    }
    distilled = payload(root / "distilled", *PLAIN, **teacher)
    jobs["distilled"] = {"payload": distilled, "stop": None}
    weighted = payload(root / "weighted", *PLAIN, **teacher, **CONFIDENCE)
    jobs["weighted"] = {"payload": weighted, "stop": None}
    for name, settings in (("dropout", DROPOUT), ("norm", NORM)):
        whole = payload(root / name, *settings)
        part = payload(root / f"{name} again", *settings)
        jobs[name] = {"payload": whole, "stop": None}
        jobs[f"{name} part"] = {"payload": part, "stop": 1}
        jobs[f"{name} again"] = {"payload": part, "stop": None}
    on_ranks(train_together, RANKS, root, list(jobs.values()))
    return {
        name: (json.loads((root / f"rows_{number}.json").read_text()), root / name)
        for number, name in enumerate(jobs)
    }


def untimed(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "student.safetensors")[0]


@pytest.mark.parametrize("name", [*CASES, "distilled", "weighted"])
def test_three_train_as_one(
    together: dict[str, tuple[list[Row], Path]], tmp_path: Path, name: str
) -> None:
    rows, folder = together[name]
    more = {} if name in CASES else _same_teacher(folder)
    more |= CONFIDENCE if name == "weighted" else {}
    settings = CASES.get(name, PLAIN)
    alone = list(run_job("train", payload(tmp_path, *settings, **more)))
    assert len(rows) == len(alone)
    for one, other in zip(alone, rows, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "hash", "checkpoint"}:
            assert other[key] == pytest.approx(one[key], abs=2e-5), key
        assert other["val_accuracy"] * 400 == pytest.approx(round(other["val_accuracy"] * 400))
    ours, theirs = weights(tmp_path), weights(folder)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], atol=2e-5, rtol=1e-4)


def _same_teacher(folder: Path) -> dict[str, Any]:
    facts = load_tensors(folder.parent / "teacher" / "student.safetensors")[1]
    checkpoint = str(folder.parent / "teacher" / "student.safetensors")
    return {
        "stage": "generation-1",
        "teachers": [{"hash": facts["hash"], "checkpoint": checkpoint}],
        "targets": str(folder.parent / "targets"),
    }


@pytest.mark.parametrize("name", ["dropout", "norm"])
def test_resumed_together_equals_undisturbed(
    together: dict[str, tuple[list[Row], Path]], name: str
) -> None:
    """Dropout continues on every rank; all ranks have the batch statistics of rank 0."""
    whole, again = together[name], together[f"{name} again"]
    assert [row["epoch"] for row in together[f"{name} part"][0]] == [1]
    plain = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in rows] for rows, _ in (whole, again)
    ]
    assert plain[0] == plain[1]
    ours, theirs = weights(whole[1]), weights(again[1])
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again[0][0]["seconds"] == together[f"{name} part"][0][0]["seconds"]


def test_dropout_differs_between_ranks(
    together: dict[str, tuple[list[Row], Path]], tmp_path: Path
) -> None:
    alone = list(run_job("train", payload(tmp_path, *DROPOUT)))
    assert together["dropout"][0][0]["loss"] != pytest.approx(alone[0]["loss"], abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 20, 21])
def test_shares_are_disjoint_whole_and_even(size: int, count: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sum(Ranks(rank, size).weight(count) for rank in range(size)) == pytest.approx(1)


def test_the_parts_of_each_batch_are_the_batch() -> None:
    images = torch.arange(7, dtype=torch.uint8).reshape(7, 1, 1, 1)
    split = Split(images, torch.arange(7))
    data = Data("a", split, split, split, ("a",), 1, (0.0,), (1.0,), "f")

    def indices(ranks: Ranks) -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        batches = data.batches("train", batch_size=3, generator=generator, share=ranks.share)
        return [index.tolist() for _, _, index in batches]

    whole = indices(Ranks())
    assert [len(batch) for batch in whole] == [3, 3, 1]
    one, two = indices(Ranks(0, 2)), indices(Ranks(1, 2))
    assert [a + b for a, b in zip(one[:2], two[:2], strict=True)] == whole[:2]
    assert one[2] == two[2] == whole[2]  # rank 0 gets the image too, with weight 0
    assert (Ranks(0, 2).weight(1), Ranks(1, 2).weight(1)) == (0, 1)


@pytest.mark.parametrize(
    ("layer", "ranks", "smallest"),
    [
        (nn.Identity(), 4, 1),
        (nn.GroupNorm(1, 4), 4, 1),
        (nn.BatchNorm2d(4), 1, 2),
        (nn.BatchNorm1d(4), 3, 6),
        (BatchNormAct2d(4), 2, 4),
        (nn.SyncBatchNorm(4), 4, 2),
        (nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm3d(4)), 4, 8),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_smallest_batch(layer: nn.Module, ranks: int, smallest: int) -> None:
    student = nn.Sequential(nn.Flatten(), layer)
    settings: dict[str, int] = {"batch_size": 8, "images": 8, "ranks": ranks}
    assert smallest_batch(student, **settings) == smallest
    if smallest > 1:
        for name, key in (("train.batch_size", "batch_size"), ("data.train_size", "images")):
            where = f" on {ranks} workers" if ranks > 1 else ""
            message = f"{name} must be at least {smallest} with batch normalisation{where}"
            with pytest.raises(ValueError, match=f"^{message}, .* got {smallest - 1}$"):
                smallest_batch(student, **(settings | {key: smallest - 1}))
