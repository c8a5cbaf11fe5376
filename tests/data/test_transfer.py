"""Transfer sets: what is taken, how it is mixed into batches, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from selfkd.data import Data, Split, load_data
from selfkd.data.augmentation import Views
from selfkd.data.decode import decode
from selfkd.data.load import load_rest
from selfkd.data.stream import Stream
from selfkd.data.transfer import TransferSet, check_leaks, load_transfer
from selfkd.distill.distiller import Distiller
from selfkd.training.ranks import Ranks

ALONE = Ranks()
DIGITS = {"train_size": 100, "val_size": 100, "reserve": 300}


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits", **DIGITS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def unlabelled(digits: Data) -> TransferSet:
    return load_rest_of(digits)


def load_rest_of(digits: Data, **changes: object) -> TransferSet:
    settings = {"size": 300, "weight": 0.75, "rest": partial(load_rest, "digits", **DIGITS)}
    return load_transfer("digits", digits, **settings | changes)  # type: ignore[arg-type]


def rows(images: Tensor | Stream) -> set[bytes]:
    pixels = images if isinstance(images, Tensor) else decode(images)
    return {image.numpy().tobytes() for image in pixels}


def save(folder: Path, images: Tensor, mode: str = "L") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        picture = Image.fromarray(image[0].numpy()).convert(mode)
        (folder / f"{number % 2}").mkdir(exist_ok=True)
        picture.save(folder / f"{number % 2}" / f"{number}.png")
    return folder


def test_the_rest_of_a_data_set(digits: Data, unlabelled: TransferSet) -> None:
    """It has nothing of the splits, which are those of any run that reserves as many."""
    splits = [rows(split.images) for split in (digits.train, digits.val, digits.test)]
    own = rows(unlabelled.split.images)
    assert (len(unlabelled), len(digits.test)) == (300, 1197)
    assert all(not own & split for split in splits)
    assert not unlabelled.split.labels.any()
    more = load_data("digits", train_size=100, val_size=100, reserve=1000)
    assert len(more.test) == 597
    labelled = load_rest_of(digits, labelled=True)
    assert labelled.fingerprint == unlabelled.fingerprint
    assert labelled.split.labels.unique().tolist() == list(range(10))


def test_a_share_of_a_data_set_is_taken_by_the_seed(digits: Data) -> None:
    one, same, other = (load_rest_of(digits, size=50, seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert rows(one.split.images) < rows(load_rest_of(digits).split.images)


def mixed(
    data: Data, transfer: TransferSet, epoch: int, ranks: Ranks = ALONE, batch_size: int = 40
) -> list[tuple[Tensor, Tensor, Tensor]]:
    sizes = [batch_size] * (100 // batch_size) + [100 % batch_size] * (100 % batch_size > 0)
    views = Views(jitter=1, count=2)
    generator = torch.Generator().manual_seed(epoch)
    batches = data.batches(
        "train",
        batch_size=batch_size,
        generator=generator,
        views=views,
        view=epoch % 2,
        share=ranks.share,
    )
    found = transfer.mix(
        batches, sizes, data, epoch=epoch, seed=3, views=views, view=epoch % 2, share=ranks.share
    )
    return list(found)


def test_batches_end_with_the_transfer_set(digits: Data, unlabelled: TransferSet) -> None:
    """The labelled images are those without it, in their order; its own are read in passes."""
    plain = digits.batches("train", batch_size=40, generator=torch.Generator().manual_seed(0))
    found = mixed(digits, unlabelled, 0)
    for (inputs, labels, index), (_, own, without) in zip(found, plain, strict=True):
        assert torch.equal(labels, own)
        assert torch.equal(index[: len(own)], without)
        assert len(inputs) == len(index) == 4 * len(own)
        assert index[len(own) :].min() >= 100
    read = torch.cat([index[index >= 100] for _, _, index in found])
    assert sorted(read.tolist()) == list(range(100, 400))  # one pass an epoch, at this share
    again, later = mixed(digits, unlabelled, 0), mixed(digits, unlabelled, 1)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0][2], later[0][2])


def test_views_of_a_transfer_image_do_not_depend_on_its_batch(
    digits: Data, unlabelled: TransferSet
) -> None:
    views = Views(jitter=1, count=2)
    ((inputs, _, index), *_) = mixed(digits, unlabelled, 1)
    alone = unlabelled.of(digits).batches("train", batch_size=300, views=views, view=1)
    whole = next(alone)[0]
    assert torch.equal(inputs[40:], whole[index[40:] - 100])


def test_labels_of_a_transfer_set(digits: Data) -> None:
    transfer = load_rest_of(digits, labelled=True)
    _, labels, index = mixed(digits, transfer, 0)[0]
    assert torch.equal(labels[40:], transfer.split.labels[index[40:] - 100])


@pytest.mark.parametrize(
    ("weight", "batch_size", "ranks"),
    [(0.75, 40, 2), (0.75, 33, 3), (0.2, 32, 4), (0.9, 33, 4)],
)
def test_ranks_share_a_mixed_batch(
    digits: Data, weight: float, batch_size: int, ranks: int
) -> None:
    """The mean of their losses is that of a single one, whoever has no labelled image."""
    transfer = load_rest_of(digits, weight=weight)
    weights = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(400, 10, generator=torch.Generator().manual_seed(1))
    distiller = Distiller(targets=lambda index, view: teacher[index], alpha=0.6, temperature=2.0)

    whole = mixed(digits, transfer, 0, ALONE, batch_size)
    counts = [(len(labels), len(index) - len(labels)) for _, labels, index in whole]

    def losses(own: Ranks) -> Tensor:
        found = []
        parts = mixed(digits, transfer, 0, own, batch_size)
        for (inputs, labels, index), count in zip(parts, counts, strict=True):
            terms = distiller(
                inputs.flatten(1) @ weights,
                labels,
                index=index,
                unlabelled=len(index) - len(labels),
                labelled_share=count[0] / sum(count),
            )
            found.append([own.mean_loss(value, *count) for value in terms.values()])
        return torch.tensor(found)

    together = torch.stack([losses(Ranks(rank, ranks)) for rank in range(ranks)])
    torch.testing.assert_close(together.mean(0), losses(ALONE), rtol=1e-5, atol=1e-6)


def test_a_folder_of_images(digits: Data, unlabelled: TransferSet, tmp_path: Path) -> None:
    """Images of subfolders at any depth; at another size they are scaled if data.image_size is."""
    images = unlabelled.split.images
    assert isinstance(images, Tensor)
    folder = save(tmp_path / "deep", images[:6])
    (folder / "notes.txt").write_text("no image")
    found = load_transfer("folder", digits, root=tmp_path)
    assert rows(found.split.images) == rows(images[:6])
    assert found.places(0).endswith("deep/0/0.png")
    streamed = load_transfer("folder", digits, root=tmp_path, in_memory=False)
    assert isinstance(streamed.split.images, Stream)
    assert "6 images without labels" in check_leaks(streamed, digits)
    larger = load_data("digits", image_size=12)
    assert load_transfer("folder", larger, root=tmp_path, fixed=False).split.images.shape == (
        6,
        1,
        12,
        12,
    )


def test_leaks_are_refused_by_their_pixels(
    digits: Data, unlabelled: TransferSet, tmp_path: Path
) -> None:
    """How many, and which; images of training are fine, and said."""
    test, train, own = (part.images for part in (digits.test, digits.train, unlabelled.split))
    assert isinstance(test, Tensor)
    assert isinstance(train, Tensor)
    assert isinstance(own, Tensor)
    fine = save(tmp_path / "fine", torch.cat([train[:2], own[:3]]))
    assert "5 images" in (said := check_leaks(load_transfer("folder", digits, root=fine), digits))
    assert "2 of them also in training" in said
    leaky = save(tmp_path / "leaky", torch.cat([own[:1], test[7:9]]))
    with pytest.raises(ValueError, match=r"2 of 3 that are \(.*1/1.png is image 7 of test.*remove"):
        check_leaks(load_transfer("folder", digits, root=leaky), digits)
    only = save(tmp_path / "only", test[:2])
    with pytest.raises(ValueError, match="got all that are"):
        check_leaks(load_transfer("folder", digits, root=only), digits)


def test_the_rest_of_a_data_set_is_without_its_duplicates(digits: Data) -> None:
    own = load_rest("digits", **DIGITS)  # type: ignore[arg-type]
    images = torch.cat([digits.test.images[:2], own.images])  # type: ignore[index,list-item]
    both = Split(images, torch.zeros(len(images)))
    assert len(load_rest_of(digits, size=None, rest=lambda: both)) == len(own) == 400


def test_bad_transfer_sets(digits: Data, tmp_path: Path) -> None:
    own = torch.randint(0, 255, (2, 1, 8, 8), dtype=torch.uint8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("nothing")
    colour = save(tmp_path / "colour", own, "RGB")
    larger = save(tmp_path / "larger", F.pad(own, (0, 2)))
    load = partial(load_transfer, "folder", digits)
    for root, match in (
        (None, "root must be given"),
        (tmp_path / "none", "must be an existing folder"),
        (tmp_path / "empty", "must hold images, got none"),
        (tmp_path / "broken", "must be readable, got .*a.png"),
        (colour, "must have images of 1 channel, as digits has, got 3 .*png"),
        (larger, "must have images of 8x8 pixels, as digits has, got 8x10 .*data.image_size"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            load(root=root)
    with pytest.raises(ValueError, match=r"labels must be false .* without the classes"):
        load(root=colour, labelled=True)
    with pytest.raises(ValueError, match=r"size must be at most 2, .* got 3"):
        load(root=colour, size=3)
    with pytest.raises(ValueError, match=r"size must be at most 1,596, .* got 1,600"):
        load_data("digits", train_size=100, val_size=100, reserve=1600)
    with pytest.raises(ValueError, match="must leave training images of digits"):
        load_rest_of(digits, rest=lambda: digits.train.take(torch.arange(0)))


def test_scaled_images_may_be_in_colour_where_the_data_are() -> None:
    """Grey images are given the channels of colour data."""
    digits = load_data("digits")
    images = digits.train.images
    assert isinstance(images, Tensor)
    coloured = Split(images.expand(-1, 3, -1, -1), digits.train.labels)
    data = Data(
        "c", coloured, coloured, coloured, digits.class_names, 8, (0.5,) * 3, (0.5,) * 3, ""
    )
    transfer = load_transfer("digits", data, size=5)
    assert transfer.split.images.shape == (5, 3, 8, 8)


@pytest.mark.parametrize("name", ["x.npy", "both.npz", "x.csv", "labelled.csv"])
def test_features_with_or_without_labels(tmp_path: Path, name: str) -> None:
    """Arrays are taken by their features; labels of the file do not count."""
    values = np.random.default_rng(0).normal(size=(90, 3)).round(3)
    labels = np.arange(90) % 3
    np.savez(tmp_path / "data.npz", x=values[:60], y=labels[:60])
    file, further = tmp_path / name, values[60:]
    if name.endswith("csv"):
        pytest.importorskip("pyarrow")
        head = "x0,x1,x2" + (",label" if "labelled" in name else "")
        rows = [",".join(map(str, row)) + (",a" if "labelled" in name else "") for row in further]
        file.write_text("\n".join([head, *rows]))
    elif name.endswith("npz"):
        np.savez(file, x=further, y=labels[60:])
    else:
        np.save(file, further)
    data = load_data("arrays", root=tmp_path / "data.npz")
    transfer = load_transfer("arrays", data, root=file)
    assert isinstance(transfer.split.images, Tensor)
    np.testing.assert_allclose(transfer.split.images.numpy(), further)
    assert "30 rows without labels" in check_leaks(transfer, data)
    if name == "both.npz":
        assert load_transfer("arrays", data, root=file, labelled=True).split.labels.max() == 2


def test_bad_features(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(60, 3)).round(3)
    np.savez(tmp_path / "data.npz", x=values, y=np.arange(60) % 3)
    data = load_data("arrays", root=tmp_path / "data.npz")
    assert isinstance(data.test.images, Tensor)
    np.save(tmp_path / "leaks.npy", np.concatenate([np.full((2, 3), 9), data.test.images[:1]]))
    leaky = load_transfer("arrays", data, root=tmp_path / "leaks.npy")
    with pytest.raises(ValueError, match=r"1 of 3 that are .* is row 0 of (val|test)"):
        check_leaks(leaky, data)
    np.save(tmp_path / "wide.npy", np.zeros((2, 4)))
    with pytest.raises(ValueError, match="must have the 3 features of the data, got 4"):
        load_transfer("arrays", data, root=tmp_path / "wide.npy")
    with pytest.raises(ValueError, match="must have rows of 3 features, as arrays has, got images"):
        load_transfer("digits", data)
