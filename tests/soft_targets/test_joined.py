"""Cached logits of a training split and a transfer set, by one index."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from selfkd.losses.sparse import SparseLogits
from selfkd.soft_targets.joined import joined, open_joined
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.shards import write_shard


def write(root: Path, teacher: str, name: str, logits: Tensor, top_k: int | None = None) -> str:
    key = data_key(name, {}, top_k=top_k)
    manifest = Manifest(
        teacher=teacher, data=key, fingerprint=name, recipe={}, views=1, images=len(logits),
        classes=4, top_k=top_k, shard_size=2,
    )  # fmt: skip
    for shard in range(manifest.shards):
        rows = manifest.rows(shard)
        write_shard(root, manifest, view=0, shard=shard, logits=logits[rows.start : rows.stop])
    return key


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("top_k", [None, 2])
def test_rows_of_both_sets_in_any_order(tmp_path: Path, teachers: int, top_k: int | None) -> None:
    """A batch of both is what each store has of its rows; so is one of a single set."""
    names = [f"t{number}" for number in range(teachers)]
    logits = torch.randn(teachers, 8, 4)
    for name, own in zip(names, logits, strict=True):
        first = write(tmp_path, name, "train", own[:3], top_k)
        second = write(tmp_path, name, "transfer", own[3:], top_k)
    both = open_joined(tmp_path, names, data=first, transfer=second)
    for order in ([2, 5, 0, 7, 3], [1, 0], [4, 3]):
        found = both(torch.tensor(order), 0)
        dense = found.values if isinstance(found, SparseLogits) else found
        assert isinstance(dense, Tensor)
        wanted = logits - logits.amax(-1, keepdim=True)
        if top_k is not None:
            wanted = wanted.topk(top_k).values
        wanted = wanted[:, order] if teachers > 1 else wanted[0, order]
        torch.testing.assert_close(dense.float(), wanted, rtol=1e-2, atol=1e-2)
    alone = open_joined(tmp_path, names, data=first, transfer=None)
    assert alone.samples is None
    with pytest.raises(IndexError):
        alone(torch.tensor([3]), 0)


def test_what_is_known_of_some_rows_only_is_left_out() -> None:
    own = SparseLogits(torch.zeros(1, 2), torch.zeros(1, 2).long(), torch.zeros(1))
    other = own._replace(rest_grid=torch.zeros(1, 6))
    found = joined([own, other], torch.tensor([1, 0]))
    assert isinstance(found, SparseLogits)
    assert found.rest_grid is None
    assert found.values.shape == (2, 2)
