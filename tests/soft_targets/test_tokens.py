"""Cached logits of tokens: those of the teacher at each position, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfkd
from selfkd.losses import SampledTargets, SparseLogits, sequence_terms
from selfkd.soft_targets import token_cache
from selfkd.soft_targets.tokens import TokenTargets
from selfkd.soft_targets.upkeep import list_stores, remove_store

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTHS = 19, (5, 3, 8, 1, 8, 6, 2)
ROWS = sum(LENGTHS)


class Language(nn.Module):
    """Causal model whose logits depend on all tokens before, and that counts its tokens."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)
        self.tokens = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        self.tokens += input_ids.numel()
        return {"logits": self.head(self.embedding(input_ids).cumsum(dim=1))}


def make_items(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(VOCABULARY, (length,), generator=generator).tolist(),
            "text": "left out",
        }
        for length in lengths
    ]


def expected(teacher: nn.Module, item: Any) -> Tensor:
    logits = teacher(torch.as_tensor(item["input_ids"])[None])["logits"][0].detach()
    return logits - logits.amax(dim=-1, keepdim=True)


def cached(path: Path, data: Any, teacher: Any = None, **more: Any) -> TokenTargets:
    targets = selfkd.cache_logits(teacher or Language(), data, path, **more)
    assert isinstance(targets, TokenTargets)
    return targets


def padded(items: list[Any], *, left: bool = False) -> dict[str, Tensor]:
    """Pad to a multiple of 16."""
    ids = torch.zeros(len(items), 16, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        count = len(item["input_ids"])
        place = slice(16 - count, 16) if left else slice(count)
        ids[row, place] = torch.as_tensor(item["input_ids"])
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["lists", "tensors", "datasets", "torch format", "collate"])
def test_a_token_has_the_logits_of_its_position_in_any_batch(kind: str, tmp_path: Path) -> None:
    items, more = make_items(), {}
    data: Any = items
    if kind == "tensors":
        data = [{"input_ids": torch.tensor(item["input_ids"])} for item in items]
    elif kind == "collate":
        more = {"collate": padded}
    elif kind != "lists":
        data = datasets.Dataset.from_list(items)
        data = data.with_format("torch") if kind == "torch format" else data
    targets = cached(tmp_path, data, batch_size=3, workers=int(kind == "datasets"), **more)
    assert (targets.items, targets.classes) == (len(items), VOCABULARY)
    order = torch.tensor([4, 0, 3])
    rows = targets.rows(order, 10)
    for row, number in zip(rows, order.tolist(), strict=True):
        logits = expected(Language(), items[number])
        assert row[len(logits) :].eq(-1).all()
        torch.testing.assert_close(targets(row[: len(logits)]).float(), logits, atol=5e-3, rtol=0)


def test_padding_that_items_have_is_left_out(tmp_path: Path) -> None:
    data = [{name: t[0].tolist() for name, t in padded([item]).items()} for item in make_items()]
    targets = cached(tmp_path, data)
    rows = targets.rows(torch.arange(len(data)), 16)
    assert rows[rows >= 0].equal(torch.arange(ROWS))


def test_the_largest_logits_and_an_ensemble(tmp_path: Path) -> None:
    teachers, items = [Language(0), Language(1)], make_items()
    targets = cached(tmp_path, items, teachers, top_k=4)
    found = targets(targets.rows(torch.tensor([2]), 8)[0])
    assert isinstance(found, SparseLogits)
    for number, teacher in enumerate(teachers):
        logits = expected(teacher, items[2]).topk(4)
        assert found.indices[number].equal(logits.indices)
        torch.testing.assert_close(found.values[number].float(), logits.values, atol=5e-3, rtol=0)
    assert cached(tmp_path, items, teachers[1]).members == 1


def test_samples_are_of_the_softmax_at_one(tmp_path: Path) -> None:
    items = make_items()[:2]
    targets = cached(tmp_path, items, samples=4_000, batch_size=1)
    found = targets(targets.rows(torch.tensor([1]), 3)[0])
    assert isinstance(found, SampledTargets)
    share = nn.functional.one_hot(found.indices, VOCABULARY).float().mean(dim=1)
    torch.testing.assert_close(share, expected(Language(), items[1]).softmax(-1), atol=0.03, rtol=0)
    logits, labels = torch.randn(3, VOCABULARY), torch.tensor([1, 2, 3])
    distiller = selfkd.Distiller(targets=targets, temperature=1.0, alpha=0.5)
    loss = distiller(logits, labels, index=targets.rows(torch.tensor([1]), 3)[0])["soft_loss"]
    torch.testing.assert_close(loss, -(share * logits.log_softmax(-1)).sum(-1).mean())
    with pytest.raises(ValueError, match=r"temperature must be that of the sampled targets, 1\.0"):
        selfkd.Distiller(targets=targets)(logits, labels, index=torch.arange(3))


def test_an_encoder_decoder_has_logits_of_its_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    items = [{**item, "labels": [*item["input_ids"][::-1], 1]} for item in make_items()]
    targets = cached(tmp_path, items, teacher, batch_size=2)
    ids, labels = (torch.tensor([items[2][name]]) for name in ("input_ids", "labels"))
    logits = teacher(input_ids=ids, labels=labels).logits[0].detach()
    found = targets(targets.rows(torch.tensor([2]), 9)[0]).float()
    logits = logits - logits.amax(dim=-1, keepdim=True)
    torch.testing.assert_close(found, logits, atol=5e-3, rtol=0)


@pytest.mark.parametrize("lengths", [LENGTHS, (4,) * 6])
def test_an_interrupted_call_goes_on(
    lengths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfkd.soft_targets.cache.SHARD_ROWS", 9)
    items, write, left = make_items(lengths), token_cache.write_shard, 2

    def some(*args: Any, **more: Any) -> Path:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return write(*args, **more)

    teacher = selfkd.Teacher(Language(), copy=False)
    module: Any = teacher.module
    monkeypatch.setattr(token_cache, "write_shard", some)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, items, teacher, batch_size=1)
    with pytest.raises(FileNotFoundError, match=r"must have \d files of logits, got 2: cache_logi"):
        selfkd.load_logits(tmp_path)
    monkeypatch.setattr(token_cache, "write_shard", write)
    module.tokens = 0
    targets = cached(tmp_path, items, teacher, batch_size=1)
    assert 0 < module.tokens - lengths[0] <= sum(lengths) - 8 + max(lengths)
    damaged = sorted(tmp_path.rglob("shard_*"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    targets = cached(tmp_path, items, teacher)
    found = torch.cat([targets(row[row >= 0]) for row in targets.rows(torch.arange(6), 8)])
    logits = torch.cat([expected(module, item) for item in items[:6]])
    torch.testing.assert_close(found.float(), logits, atol=5e-3, rtol=0)
    assert sum(lengths) != 24 or (targets.index.offsets[-1], len(list(tmp_path.rglob("*_0*")))) == (
        24, 1 + 3,
    )  # fmt: skip


def test_one_other_token_makes_another_store(tmp_path: Path) -> None:
    items = make_items((8,) * 200)
    cached(tmp_path, items)
    items[77] = {"input_ids": [*items[77]["input_ids"][:-1], 0]}
    items[78] = {"input_ids": [*items[78]["input_ids"][:-1], 1]}
    cached(tmp_path, items)
    found = sorted(path.parent.name for path in tmp_path.rglob("manifest.json"))
    assert len(set(found)) == 2
    with pytest.raises(ValueError, match=r"of one teacher and data set, got .*/.*, .*: teachers="):
        selfkd.load_logits(tmp_path)
    chosen = selfkd.load_logits(tmp_path, data=found[0])
    assert isinstance(chosen, TokenTargets)
    for store in list_stores(tmp_path):
        remove_store(store.path)
    assert not list(tmp_path.glob("*/*"))
    with pytest.raises(FileNotFoundError, match="no cached logits"):
        selfkd.load_logits(tmp_path)


def test_items_of_classes_are_opened_without_a_teacher(tmp_path: Path) -> None:
    data = [torch.randn(4) for _ in range(5)]
    made = selfkd.cache_logits([nn.Linear(4, 3), nn.Linear(4, 3)], data, tmp_path)
    names = sorted(path.parent.parent.name for path in tmp_path.rglob("manifest.json"))
    found = selfkd.load_logits(tmp_path, teachers=names)
    index = torch.tensor([3, 1])
    assert sorted(found(index, 0).sum((1, 2))) == sorted(made(index, 0).sum((1, 2)))


def test_a_loop_with_a_distiller_has_the_loss_of_a_live_teacher(tmp_path: Path) -> None:
    items, teacher, student = make_items(), Language(), Language(2)
    targets = cached(tmp_path, items, teacher)
    index = torch.tensor([1, 5, 2])
    batch = padded([items[i] for i in index])
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)[:, 1:]
    logits = student(batch["input_ids"])["logits"][:, :-1]
    rows = targets.rows(index, 16)[:, :-1]
    valid = (labels != -100) & (rows >= 0)
    distiller = selfkd.Distiller(targets=targets, temperature=2.0, alpha=0.7)
    terms = distiller(logits[valid], labels[valid], index=rows[valid])
    live = teacher(batch["input_ids"])["logits"][:, :-1]
    whole = sequence_terms(logits, live, labels, temperature=2.0, alpha=0.7)
    torch.testing.assert_close(terms["loss"], whole.loss, atol=1e-4, rtol=1e-3)


def masked_at_random(items: list[Any]) -> dict[str, Tensor]:
    batch = padded(items)
    batch["input_ids"][:, 0] = (batch["input_ids"][:, 0] + 1) % VOCABULARY
    return batch


LEFT = [{"input_ids": [0, 3, 4], "attention_mask": [0, 1, 1]}]


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        (LEFT, {}, r"padded on the right, .* got attention_mask \[0, 1, 1\]: padding_side"),
        (make_items(), {"collate": lambda rows: padded(rows, left=True)}, "collate must keep the"),
        (make_items(), {"collate": masked_at_random}, "as they are .* no random mask.*, got"),
        (make_items(), {"views": 2}, "views must be 1 where the logits of tokens are cached"),
        ([{"input_ids": [[1, 2], [3, 4]]}], {}, "items with input_ids as one list of token ids"),
        ([*make_items(), {"text": "a"}], {}, r"input_ids as one list .*, got \['text'\]"),
        ([torch.zeros(2)], {"samples": 3}, "samples must be None where the logits are not of"),
        (make_items(), {"top_k": VOCABULARY}, r"top_k must be in \[1, 18\], got 19"),
    ],
)
def test_bad_input(data: Any, more: Any, message: str, tmp_path: Path) -> None:
    teacher = nn.Linear(2, 3) if "samples" in more else Language()
    with pytest.raises(ValueError, match=message):
        selfkd.cache_logits(teacher, data, tmp_path, **more)
    assert not list(tmp_path.rglob("*.safetensors"))
