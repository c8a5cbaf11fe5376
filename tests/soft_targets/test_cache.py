"""Teacher logits of a data set of any loop: the teacher's own, whatever the order, or an error."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import selfkd
from selfkd.losses import SparseLogits, sparsify
from selfkd.soft_targets import cache, manifest

LENGTH, FEATURES, CLASSES = 11, 4, 3


class Counting(nn.Module):
    """Network that counts the rows it was run on."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.rows = nn.Linear(FEATURES, CLASSES), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.rows += len(inputs)
        return self.linear(inputs)


class Augmented(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Data with random draws of each generator that augmentation uses."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draws = [random.random(), float(np.random.random()), float(torch.rand(()))]
        return torch.tensor([float(index), *draws]), index % CLASSES


def make_data() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(LENGTH, FEATURES), torch.arange(LENGTH) % CLASSES)


def shifted(logits: Tensor) -> Tensor:
    return logits - logits.amax(dim=-1, keepdim=True)


def close(found: Any, logits: Tensor) -> None:
    torch.testing.assert_close(found.float(), shifted(logits), atol=5e-3, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_cached_logits_are_those_of_the_items_that_the_student_gets(
    tmp_path: Path, workers: int
) -> None:
    teacher, data = Counting(), Augmented()
    targets = selfkd.cache_logits(
        teacher, data, tmp_path, views=2, seed=5, batch_size=4, workers=workers
    )
    for view in range(2):
        loader = DataLoader(selfkd.SeededView(data, view, seed=5), batch_size=5, shuffle=True)
        for (inputs, labels), index in loader:
            assert labels.equal(index % CLASSES)
            close(targets(index, view), teacher(inputs).detach())
    assert not torch.equal(targets(torch.arange(3), 0), targets(torch.arange(3), 1))


def test_workers_that_persist_follow_the_view(tmp_path: Path) -> None:
    teacher, data = Counting(), Augmented()
    targets = selfkd.cache_logits(teacher, data, tmp_path, views=2)
    view = selfkd.SeededView(data)
    loader = DataLoader(Subset(view, [7, 2, 5]), num_workers=1, persistent_workers=True)
    for number in (0, 1):
        view.view = number
        for (inputs, _), index in loader:
            close(targets(index, number), teacher(inputs).detach())
    with pytest.raises(ValueError, match="view must be an integer of at least 0, got -1"):
        view.view = -1


def test_reading_a_view_leaves_the_generators_as_they_were() -> None:
    view = selfkd.SeededView(Augmented())
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    view[3]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_second_call_runs_the_teacher_on_what_is_missing_only(tmp_path: Path) -> None:
    module, data = Counting(), Augmented()
    teacher = selfkd.Teacher(module)
    first = selfkd.cache_logits(teacher, data, tmp_path, views=1)
    rows = teacher.module.rows
    again = selfkd.cache_logits(teacher, data, tmp_path, views=1)
    assert teacher.module.rows == rows
    assert torch.equal(again(torch.arange(LENGTH), 0), first(torch.arange(LENGTH), 0))
    more = selfkd.cache_logits(teacher, data, tmp_path, views=3)
    assert teacher.module.rows == rows + 2 * LENGTH
    assert (more.views, more.images) == (3, LENGTH)


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    module, data = Counting(), make_data()
    first = selfkd.cache_logits(module, data, tmp_path)(torch.arange(LENGTH), 0)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    assert torch.equal(selfkd.cache_logits(module, data, tmp_path)(torch.arange(LENGTH), 0), first)


def trained_further(module: Counting) -> Counting:
    with torch.no_grad():
        module.linear.bias += 1
    return module


OTHERS: dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]] = {
    "weights": lambda: (trained_further(Counting()), make_data(), {}),
    "order of classes": lambda: (
        selfkd.Teacher(Counting(), columns=[2, 0, 1]),
        make_data(),
        {},
    ),
    "activation": lambda: (nn.Sequential(Counting(), nn.ReLU()), make_data(), {}),
    "length": lambda: (Counting(), TensorDataset(*make_data()[:-1]), {}),
    "values": lambda: (Counting(), TensorDataset(make_data()[:][0] + 1, make_data()[:][1]), {}),
    "order": lambda: (Counting(), TensorDataset(*(part.flip(0) for part in make_data()[:])), {}),
    "seed": lambda: (Counting(), make_data(), {"seed": 1}),
    "top_k": lambda: (Counting(), make_data(), {"top_k": 1}),
    "exact": lambda: (Counting(), make_data(), {"exact": True}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_teachers_and_data_have_stores_of_their_own(tmp_path: Path, name: str) -> None:
    selfkd.cache_logits(Counting(), make_data(), tmp_path)
    teacher, data, more = OTHERS[name]()
    found = selfkd.cache_logits(teacher, data, tmp_path, **more)(torch.arange(3), 0)
    assert len(list(tmp_path.rglob("manifest.json"))) == 2
    if name not in ("top_k", "exact"):
        run = teacher if isinstance(teacher, selfkd.Teacher) else selfkd.Teacher(teacher)
        close(found, run(data[:3][0]))


def test_the_largest_logits_and_an_ensemble(tmp_path: Path) -> None:
    data, members = make_data(), [Counting(0), Counting(1)]
    targets = selfkd.cache_logits(members, data, tmp_path, top_k=2)
    found = targets(torch.tensor([7, 2]), 0)
    assert isinstance(found, SparseLogits)
    inputs = data[:][0][[7, 2]]
    for number, member in enumerate(members):
        expected = sparsify(shifted(member(inputs).detach()), 2)
        assert torch.equal(found.indices[number], expected.indices)
        torch.testing.assert_close(found.values[number].float(), expected.values, atol=5e-3, rtol=0)
    one = selfkd.cache_logits(selfkd.Ensemble(members[:1]), data, tmp_path, top_k=2)
    assert torch.equal(one(torch.tensor([7, 2]), 0).values, found.values[0])


def test_a_loop_that_reads_cached_logits_trains_as_one_with_a_live_teacher(tmp_path: Path) -> None:
    teacher, data = Counting(), make_data()
    targets = selfkd.cache_logits(teacher, data, tmp_path)
    inputs, labels = data[:]
    losses = [
        distiller(Counting(2)(inputs), labels, inputs=inputs, index=torch.arange(LENGTH))["loss"]
        for distiller in (selfkd.Distiller(teacher), selfkd.Distiller(targets=targets))
    ]
    torch.testing.assert_close(losses[0], losses[1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_several_labels_and_numbers_need_exact_logits(tmp_path: Path, task: Any) -> None:
    teacher, data = [Counting(0), Counting(1)], make_data()
    inputs, index = data[:][0], torch.arange(LENGTH)
    labels = torch.rand(LENGTH, CLASSES)
    with pytest.raises(ValueError, match=f"targets must be cached with exact=True for {task}"):
        selfkd.Distiller(targets=selfkd.cache_logits(teacher, data, tmp_path), task=task)
    targets = selfkd.cache_logits(teacher, data, tmp_path, exact=True)
    live = selfkd.Distiller(selfkd.Ensemble(teacher), task=task)
    cached = selfkd.Distiller(targets=targets, task=task)
    losses = [
        distiller(Counting(2)(inputs), labels, inputs=inputs, index=index)["loss"]
        for distiller in (live, cached)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_one_number_an_item_is_a_column(tmp_path: Path) -> None:
    data = make_data()
    teacher = nn.Sequential(nn.Linear(FEATURES, 1), nn.Flatten(0))
    targets = selfkd.cache_logits(teacher, data, tmp_path, exact=True)
    found = targets(torch.arange(LENGTH), 0)
    torch.testing.assert_close(found, teacher(data[:][0]).detach()[:, None])
    student, labels = torch.randn(LENGTH), torch.randn(LENGTH)
    distiller = selfkd.Distiller(targets=targets, task="regression", margin=None)
    terms = distiller(student, labels, index=torch.arange(LENGTH))
    torch.testing.assert_close(terms["soft_loss"], (student - found[:, 0]).square().mean())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.linear(pixels if mask is None else pixels * mask)}


@pytest.mark.parametrize("names", [("pixels",), ("pixels", "mask")])
@pytest.mark.parametrize("label", ["labels", "label", None])
def test_items_that_are_mappings(tmp_path: Path, names: tuple[str, ...], label: str | None) -> None:
    torch.manual_seed(0)
    items: list[dict[str, Any]] = [
        {name: torch.randn(FEATURES) for name in names} for _ in range(5)
    ]
    teacher = Named()
    expected = [teacher(**item)["logits"].detach() for item in items]
    for number, item in enumerate(items):
        if label:
            item[label] = number
    found = selfkd.cache_logits(teacher, items, tmp_path)(torch.arange(5), 0)
    close(found, torch.stack(expected))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inputs, number: (inputs, None),
        lambda inputs, number: (inputs, {"boxes": torch.zeros(number, 4)}),
        lambda inputs, number: {"pixels": inputs, "label_ids": number, "file": "a.png"},
        lambda inputs, number: {"x": inputs, "y": number, "idx": number, "caption": None},
        lambda inputs, number: inputs.numpy(),
    ],
)
def test_what_is_no_input_is_not_batched(tmp_path: Path, wrap: Any) -> None:
    teacher, rows = Counting(), make_data()[:][0]
    items = [wrap(inputs, number) for number, inputs in enumerate(rows)]
    state = torch.get_rng_state()
    found = selfkd.cache_logits(teacher, items, tmp_path)(torch.arange(LENGTH), 0)
    close(found, teacher(rows).detach())
    assert torch.equal(torch.get_rng_state(), state)


class OfTexts(nn.Module):
    """Network of texts by their length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, CLASSES)

    def forward(self, texts: list[str]) -> Tensor:
        return self.embedding(torch.tensor([len(text) for text in texts]))


def frozen_script(seed: int) -> Any:
    return torch.jit.freeze(torch.jit.script(nn.Sequential(Counting(seed).linear).eval()))


@pytest.mark.filterwarnings("ignore")
def test_weights_and_items_that_are_no_tensors_are_told_apart(tmp_path: Path) -> None:
    data, index = make_data(), torch.arange(2)
    one, other = (selfkd.cache_logits(frozen_script(seed), data, tmp_path) for seed in (0, 1))
    assert not torch.equal(one(index, 0), other(index, 0))
    teacher = OfTexts()
    one, other = (
        selfkd.cache_logits(teacher, texts, tmp_path) for texts in (["a", "bc"], ["def", "g"])
    )
    assert not torch.equal(one(index, 0), other(index, 0))


def test_inputs_and_batches_may_be_found_by_functions(tmp_path: Path) -> None:
    teacher = Counting()
    items = [(number, np.full(FEATURES, number, dtype=np.float64)) for number in range(5)]
    targets = selfkd.cache_logits(
        teacher,
        items,
        tmp_path,
        collate=lambda batch: [torch.tensor(np.stack([item[1] for item in batch])).float()],
        inputs=lambda batch: batch[0],
    )
    close(targets(torch.tensor([4]), 0), teacher(torch.full((1, FEATURES), 4.0)).detach())


def test_files_are_small_where_there_are_many_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SHARD_BYTES", 4 * CLASSES * 4)
    teacher, data = Counting(), make_data()
    targets = selfkd.cache_logits(teacher, data, tmp_path, batch_size=3)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    close(targets(torch.arange(LENGTH), 0), teacher(data[:][0]).detach())
    assert selfkd.cache_logits([teacher, Counting(1)], data, tmp_path).members == 2


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter([torch.zeros(FEATURES)])


class Sized(Endless):
    def __len__(self) -> int:
        return 3


class Unseeded(Augmented):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draw = np.random.default_rng().random()
        return torch.full((FEATURES,), draw), 0


def sizes(*lengths: int) -> list[Tensor]:
    return [torch.zeros(length) for length in lengths]


@pytest.mark.parametrize(
    ("teacher", "data", "more", "kind", "message"),
    [
        (len, sizes(4), {}, TypeError, "teacher must be a torch.nn.Module, .* got builtin"),
        ([], sizes(4), {}, ValueError, "members must be at least one teacher"),
        (Counting(), Endless(), {}, TypeError, "dataset must be map-style, .* got Endless"),
        (Counting(), [], {}, ValueError, "dataset must have items, got none"),
        (Counting(), Unseeded(), {}, ValueError, "must give the same item each time"),
        (Counting(), [object()], {}, ValueError, "items that make a batch, got object .*collate"),
        (Counting(), Sized(), {}, TypeError, "dataset must be map-style, .* got Sized"),
        (Counting(), {"train": sizes(4)}, {}, TypeError, "dataset must be map-style, .* got dict"),
        (Counting(), selfkd.SeededView(sizes(4)), {}, TypeError, "inside of SeededView, got Seed"),
        (Counting(), sizes(4), {"views": 0}, ValueError, "views must be an integer .* 1, got 0"),
        (Counting(), sizes(4), {"batch_size": 0}, ValueError, "batch_size must be .* 1, got 0"),
        (Counting(), sizes(4), {"workers": -1}, ValueError, "workers must be .* 0, got -1"),
        (Counting(), sizes(4), {"seed": -1}, ValueError, "seed must be .* 0, got -1"),
        (Counting(), sizes(3), {}, ValueError, "teacher must take .* give inputs, a function"),
        (
            nn.Linear(FEATURES, CLASSES),
            [{"x": torch.zeros(FEATURES), "number": 3}],
            {},
            ValueError,
            r"teacher must take .* got dict of x \[1, 4\], number \[1\] .* give inputs",
        ),
        (nn.Linear(FEATURES, 1), sizes(4), {}, ValueError, "at least 2 classes, or exact"),
        (Counting(), sizes(4), {"top_k": 1, "exact": True}, ValueError, "exact must be false"),
        (nn.Flatten(0), sizes(1), {}, ValueError, r"must return \[batch, classes\], got \[1\]"),
        (Counting(), sizes(4, 4), {"top_k": 3}, ValueError, r"top_k must be in \[1, 2\], got 3"),
        (Counting(), [torch.full((4,), torch.nan)], {}, ValueError, "logits must be finite"),
        (
            [Counting(), nn.Linear(FEATURES, 2)],
            sizes(4),
            {},
            ValueError,
            r"members of the same classes, got \[3, 2\]",
        ),
    ],
)
def test_bad_input(
    tmp_path: Path, teacher: Any, data: Any, more: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        selfkd.cache_logits(teacher, data, tmp_path, **more)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_interrupted_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SHARD_BYTES", 4 * CLASSES * 4)
    write, count = cache.write_shard, 0

    def once(*args: Any, **more: Any) -> Path:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt
        return write(*args, **more)

    teacher = selfkd.Teacher(Counting())
    monkeypatch.setattr(cache, "write_shard", once)
    with pytest.raises(KeyboardInterrupt):
        selfkd.cache_logits(teacher, make_data(), tmp_path)
    monkeypatch.setattr(cache, "write_shard", write)
    rows = teacher.module.rows
    targets = selfkd.cache_logits(teacher, make_data(), tmp_path)
    assert teacher.module.rows == rows + LENGTH - 4  # the first file was kept
    close(targets(torch.arange(LENGTH), 0), teacher(make_data()[:][0]))
    assert manifest.DEFAULT_SHARD > LENGTH
