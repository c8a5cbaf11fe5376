"""Cached logits that stay on a GPU: the same rows, and only where they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from torch import Tensor

from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits
from selfkd.soft_targets.joined import JoinedTargets
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.resident import ResidentTargets, resident
from selfkd.soft_targets.shards import write_shard
from selfkd.soft_targets.store import SoftTargets, open_store

IMAGES, CLASSES, VIEWS = 10, 6, 2
FORMS: dict[str, dict[str, Any]] = {
    "all": {},
    "top_k": {"top_k": 2},
    "samples": {"samples": 3},
    "exact": {"exact": True},
}


def make_store(folder: Path, teachers: int, *, name: str = "a", **forms: Any) -> SoftTargets:
    key = data_key(name, {}, top_k=forms.get("top_k"), samples=forms.get("samples"))
    hashes = [f"teacher{number}" for number in range(teachers)]
    for number, teacher in enumerate(hashes):
        manifest = Manifest(
            teacher=teacher,
            data=key,
            fingerprint=name,
            recipe={},
            views=VIEWS,
            images=IMAGES,
            classes=CLASSES,
            **forms,
        )
        for view in range(VIEWS):
            generator = torch.Generator().manual_seed(10 * number + view)
            logits = torch.randn(IMAGES, CLASSES, generator=generator)
            write_shard(folder, manifest, view=view, shard=0, logits=logits)
    shares = [0.75, 0.25] if teachers == 2 and "samples" in forms else None
    return open_store(folder, hashes, data=key, weights=shares)


def parts(rows: Any) -> list[Any]:
    return [rows] if isinstance(rows, Tensor) else list(rows)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_rows_are_those_of_the_store(
    tmp_path: Path, form: str, teachers: int, joined: bool
) -> None:
    stored: Any = make_store(tmp_path, teachers, **FORMS[form])
    if joined:
        stored = JoinedTargets([stored, make_store(tmp_path, teachers, name="b", **FORMS[form])])
    kept = ResidentTargets(stored, torch.device("cpu"))
    index = torch.tensor([3, 0, 9, 7] + ([12, 19] if joined else []))

    for view in (1, 0, 1):
        found, expected = kept(index, view), stored(index, view)
        assert type(found) is type(expected)
        for own, other in zip(parts(found), parts(expected), strict=True):
            assert torch.equal(own, other) if isinstance(other, Tensor) else own == other


@pytest.mark.parametrize("form", FORMS)
def test_they_are_on_the_gpu_and_no_batch_waits_for_it(tmp_path: Path, form: str) -> None:
    stored = make_store(tmp_path, 2, **FORMS[form])
    with fake_cuda() as waits:
        kept = resident(stored, "cuda")
        assert isinstance(kept, ResidentTargets)
        kept(torch.arange(4), 0)
        waits.clear()

        found = kept(torch.tensor([3, 0]), 0)

        assert {own.device.type for own in parts(found) if isinstance(own, Tensor)} == {"cuda"}
        assert isinstance(
            found, {"top_k": SparseLogits, "samples": SampledTargets}.get(form, Tensor)
        )
        assert waits.found == []


@pytest.mark.parametrize(("free", "stays"), [(16, True), (15, False)])
def test_the_size_decides(tmp_path: Path, free: int, stays: bool) -> None:
    stored = make_store(tmp_path, 1)
    size = VIEWS * IMAGES * CLASSES * 2
    with fake_cuda(mem_get_info=lambda *args: (free * size, 16 * size)):
        kept = resident(stored, "cuda")

    assert (kept is not stored) == stays


def test_on_the_cpu_they_are_read_from_the_store(tmp_path: Path) -> None:
    stored = make_store(tmp_path, 1)
    assert resident(stored, "cpu") is stored
