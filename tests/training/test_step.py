"""A step of `fit` is that of a loop by hand, bit for bit, in either layout and with either step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd import Distiller, cache_logits
from selfkd.data import Data, Split
from selfkd.data.augmentation import Views
from selfkd.data.batches import batches
from selfkd.data.normalise import kept_inputs, normalisation
from selfkd.losses import distillation_loss
from selfkd.models import make_model
from selfkd.training.fit import Training, fit
from selfkd.training.optimizers import make_average, make_optimizer, put_channels_last

BATCH, LR, DECAY = 8, 0.05, 1e-3


def make_split(images: int, seed: int, channels: int) -> Split:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (images, channels, 8, 8), generator=draw, dtype=torch.uint8)
    return Split(pixels, torch.randint(5, (images,), generator=draw))


def make_data(channels: int = 3) -> Data:
    splits = (make_split(count, seed, channels) for seed, count in enumerate((30, 12, 12)))
    stats = ((0.4,) * channels, (0.2,) * channels)
    return Data("noise", *splits, tuple("abcde"), 8, *stats, "noise")


def make_student(seed: int = 0, channels: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    args = {"width": 4}
    return make_model("selfkd_cnn", args, num_classes=5, in_chans=channels, image_size=8)


def make_training(student: nn.Module, *, channels_last: bool, fused: bool, **more: Any) -> Training:
    settings = {"name": "sgd", "lr": LR, "momentum": 0.9, "weight_decay": DECAY}
    return Training(
        student=student,
        optimizer=make_optimizer(student, fused=fused, **settings),  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(7),
        channels_last=channels_last,
        **more,
    )


def by_hand(
    student: nn.Module, data: Data, loss: Any, *, epochs: int, channels_last: bool, fused: bool
) -> dict[str, Tensor]:
    """Train as a person would write it: one index of a tensor a batch."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = data.train.images.float()  # type: ignore[union-attr]
    scale, shift = (torch.tensor(v, dtype=torch.float64) for v in (1 / 51, -2))
    x = (x * scale.float() + shift.float()).contiguous(memory_format=layout)
    student = student.to(memory_format=layout)
    decayed = [w for w in student.parameters() if w.ndim > 1]
    others = [w for w in student.parameters() if w.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": DECAY}],
        lr=LR,
        momentum=0.9,
        nesterov=True,
        fused=fused,
    )
    order = torch.Generator().manual_seed(7)
    for _ in range(epochs):
        student.train()
        for index in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss(student(x[index]), data.train.labels[index], index).backward()
            optimizer.step()
    return student.state_dict()


@pytest.fixture
def cached(tmp_path: Path) -> Any:
    data = make_data()
    inputs = normalisation(data.mean, data.std, torch.device("cpu"))(data.train.images)
    teachers = [make_student(seed) for seed in (1, 2)]
    return cache_logits(teachers, torch.utils.data.TensorDataset(inputs), tmp_path)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", ["labels", "cached"])
def test_it_gives_the_weights_of_a_loop_by_hand(
    cached: Any, channels_last: bool, fused: bool, way: str
) -> None:
    data, settings = make_data(), {"channels_last": channels_last, "fused": fused}

    def loss(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        if way == "labels":
            return F.cross_entropy(logits, labels)
        teacher = cached(index, 0)
        return distillation_loss(logits, teacher, labels, temperature=4.0, alpha=0.7)

    expected = by_hand(make_student(), data, loss, epochs=3, **settings)
    training = make_training(make_student(), **settings)
    targets = {} if way == "labels" else {"targets": cached}
    distiller = Distiller(**targets, temperature=4.0, alpha=0.7)
    rows = list(fit(training, data, distiller, epochs=3, batch_size=BATCH))
    assert len(rows) == 3
    for name, value in training.student.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_layout_and_fused_step_change_no_more_than_the_rounding() -> None:
    found = []
    for channels_last, fused in ((False, False), (True, False), (False, True)):
        training = make_training(make_student(), channels_last=channels_last, fused=fused)
        assert all(bool(group["fused"]) == fused for group in training.optimizer.param_groups)
        list(fit(training, make_data(), Distiller(), epochs=3, batch_size=BATCH))
        found.append(training.student.state_dict()["features.0.conv.weight"].clone())
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("quick", [False, True])
def test_a_resumed_training_gives_the_same_bits(cached: Any, quick: bool, tmp_path: Path) -> None:
    data = make_data()

    def start() -> tuple[Training, Iterator[dict[str, Any]]]:
        student = make_student()
        average = make_average(student, decay=0.9)
        training = make_training(student, channels_last=True, fused=True, average=average)
        distiller = Distiller(targets=cached, quick=quick)
        return training, fit(training, data, distiller, epochs=4, batch_size=BATCH)

    whole, rows = start()
    list(rows)
    first, rows = start()
    next(rows), next(rows)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second, _ = start()
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    distiller = Distiller(targets=cached, quick=quick)
    list(fit(second, data, distiller, epochs=4, batch_size=BATCH))
    for one, other in ((whole.student, second.student), (whole.best, second.best)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_a_network_without_maps_has_no_layout() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    training = make_training(student, channels_last=True, fused=False)
    assert not training.channels_last


def test_weights_and_images_have_channels_last() -> None:
    training = make_training(make_student(), channels_last=True, fused=True)
    seen: list[bool] = []
    layer = training.student.get_submodule("features.2")
    layer.register_forward_pre_hook(
        lambda module, inputs: seen.append(
            inputs[0].is_contiguous(memory_format=torch.channels_last)
        )
    )
    list(fit(training, make_data(), Distiller(), epochs=1, batch_size=BATCH))
    assert seen
    assert all(seen)
    weight = training.student.get_submodule("features.2.conv").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]


# --- batches ---


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmented", [False, True])
def test_kept_inputs_are_those_that_are_made_for_each_batch(
    monkeypatch: pytest.MonkeyPatch, channels_last: bool, channels: int, augmented: bool
) -> None:
    views = Views(flip=True, jitter=1) if augmented else None
    settings: dict[str, Any] = {"mean": [0.3] * channels, "std": [0.7] * channels, "batch_size": 7}
    settings |= {"views": views, "channels_last": channels_last}

    def read() -> list[tuple[Tensor, ...]]:
        order = torch.Generator().manual_seed(3)
        return list(batches(split, generator=order, **settings))

    split = make_split(30, 0, channels)
    before = copy.deepcopy(split.images)
    kept = read()
    monkeypatch.setattr(sys.modules["selfkd.data.batches"], "KEPT_VALUES", 0)  # `batches` is a name
    for mine, theirs in zip(kept, read(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        for part in (mine[0], theirs[0]):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert part.is_contiguous(memory_format=layout)
    assert torch.equal(split.images, before)


def test_inputs_are_kept_as_long_as_their_split_and_made_anew_for_other_numbers() -> None:
    from selfkd.data import normalise

    split = make_split(5, 0, 3)
    stats = ([0.5] * 3, [0.25] * 3)
    first = kept_inputs(split, split.images, *stats)
    assert kept_inputs(split, split.images, *stats) is first
    assert not torch.equal(kept_inputs(split, split.images, [0.0] * 3, stats[1]), first)
    known = len(normalise._KEPT)
    del split
    assert len(normalise._KEPT) == known - 1


def test_weights_of_one_channel_have_it_last_too():
    network = nn.Conv2d(1, 16, 3)  # their format would be that of neighbouring rows
    put_channels_last(network)
    assert network.weight.stride() == (9, 1, 3, 1)
