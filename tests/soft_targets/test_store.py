"""Cached teacher logits: the right rows of the right shard, in little memory, or an error."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from scipy.special import logsumexp, softmax

from selfkd.losses.sparse import REST_TEMPERATURES, sparsify
from selfkd.soft_targets import shards, store
from selfkd.soft_targets.manifest import (
    Manifest,
    data_key,
    load_manifest,
    save_manifest,
    shard_path,
    store_path,
)
from selfkd.soft_targets.shards import check_shard, write_shard
from selfkd.soft_targets.store import open_store
from selfkd.soft_targets.upkeep import list_stores, remember_user, sweep, unused
from selfkd.storage import checkpoint
from selfkd.storage.checkpoint import load_tensors, save_tensors

IMAGES, CLASSES, SHARD = 20, 5, 7  # shards of 7, 7 and 6 images


@pytest.fixture(params=["packed", "mapped"])
def way(request, monkeypatch):
    if request.param == "mapped":
        monkeypatch.setattr(store, "PACK_LIMIT", 0)
    return request.param


def make_logits(seed, rows=IMAGES, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, classes, generator=generator)


def make_manifest(teacher="t1", top_k=None, fingerprint="abc", recipe=None, samples=None, **more):
    recipe = {"flip": True, "seed": 0} if recipe is None else recipe
    sizes = {"views": 1, "images": IMAGES, "classes": CLASSES, "shard_size": SHARD, **more}
    forms = {"top_k": top_k, "samples": samples}
    own = {"teacher": teacher, "fingerprint": fingerprint, "recipe": recipe, **forms}
    return Manifest(data=data_key(fingerprint, recipe, **forms), **own, **sizes)


def cache(root, views, **more):
    """Write a whole store, `views` a list of the logits of all images; return its manifest."""
    manifest = make_manifest(views=len(views), **more)
    for view, logits in enumerate(views):
        for shard in range(manifest.shards):
            rows = manifest.rows(shard)
            part = logits[rows.start : rows.stop]
            write_shard(root, manifest, view=view, shard=shard, logits=part)
    return manifest


def shifted(logits):
    return logits - logits.amax(dim=-1, keepdim=True)


def whole(root, manifest):
    return [
        check_shard(root, manifest, view=view, shard=shard)
        for view in range(manifest.views)
        for shard in range(manifest.shards)
    ]


# --- rows of a batch ---


@pytest.mark.parametrize("shard_size", [1, 7, 10, 19, 20, 50])
def test_rows_follow_the_image_through_any_order_and_shard(tmp_path, way, shard_size):
    logits = make_logits(0)
    manifest = cache(tmp_path, [logits], shard_size=shard_size)
    targets = open_store(tmp_path, ["t1"], data=manifest.data)
    for seed in range(3):
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))
        for index in order.split(8):
            served = targets(index, 0)
            assert served.shape == (len(index), CLASSES)
            np.testing.assert_allclose(served.float(), shifted(logits)[index], atol=0.02)


def test_an_image_may_come_twice_and_a_batch_may_be_empty(tmp_path, way):
    logits = make_logits(0)
    targets = open_store(tmp_path, ["t1"], data=cache(tmp_path, [logits]).data)
    index = torch.tensor([19, 3, 19, 8, 3])
    np.testing.assert_allclose(targets(index, 0).float(), shifted(logits)[index], atol=0.02)
    assert targets(index[:0], 0).shape == (0, CLASSES)


def test_any_strides_of_the_index_will_do(tmp_path, way):
    targets = open_store(tmp_path, ["t1"], data=cache(tmp_path, [make_logits(0)]).data)
    index = torch.tensor([[3, 0], [12, 0], [9, 0]])[:, 0]
    assert torch.equal(targets(index, 0), targets(torch.tensor([3, 12, 9]), 0))


def test_each_view_has_its_own_logits(tmp_path, way):
    views = [make_logits(seed) for seed in range(3)]
    targets = open_store(tmp_path, ["t1"], data=cache(tmp_path, views).data)
    assert targets.views == 3
    index = torch.tensor([4, 0, 4, 17])
    for view in [0, 2, 1, 0]:
        expected = shifted(views[view])[index]
        np.testing.assert_allclose(targets(index, view).float(), expected, atol=0.02)


def test_several_teachers_come_as_members_in_the_given_order(tmp_path, way):
    predictions = {teacher: make_logits(seed) for seed, teacher in enumerate("abc")}
    for (teacher, logits), shard_size in zip(predictions.items(), [7, 20, 3], strict=True):
        key = cache(tmp_path, [logits], teacher=teacher, shard_size=shard_size).data
    targets = open_store(tmp_path, ["c", "a", "b"], data=key)
    assert (targets.members, targets.images, targets.classes) == (3, IMAGES, CLASSES)
    index = torch.tensor([13, 1, 19, 6])
    served = targets(index, 0)
    assert served.shape == (3, 4, CLASSES)
    for member, teacher in zip(served, "cab", strict=True):
        np.testing.assert_allclose(member.float(), shifted(predictions[teacher])[index], atol=0.02)


@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0.0, 0.25, 0.75]])
def test_the_mean_of_logits_is_weighted(tmp_path, way, weights):
    predictions = [make_logits(seed) for seed in range(3)]
    for teacher, logits in zip("abc", predictions, strict=True):
        key = cache(tmp_path, [logits], teacher=teacher).data
    targets = open_store(tmp_path, ["a", "b", "c"], data=key, average="logits", weights=weights)
    index = torch.tensor([13, 1, 19, 6])
    served = targets(index, 0)
    assert (served.shape, served.dtype) == ((4, CLASSES), torch.float32)
    stack = torch.stack(predictions).double().numpy()[:, index]
    expected = softmax(np.average(stack, axis=0, weights=weights), axis=1)
    np.testing.assert_allclose(softmax(served.double().numpy(), axis=1), expected, atol=1e-3)


def test_the_mean_keeps_what_half_precision_would_lose(tmp_path, way):
    """The mean of cached values is exact to float32, also for members far apart."""
    a, b = torch.tensor([[0.0, -1000.5]]), torch.tensor([[-0.001, 0.0]])
    for teacher, logits in [("a", a), ("b", b)]:
        key = cache(tmp_path, [logits], teacher=teacher, images=1, classes=2).data
    served = open_store(tmp_path, ["a", "b"], data=key, average="logits")(torch.tensor([0]), 0)
    expected = (a.half().double() + b.half().double()) / 2
    np.testing.assert_allclose(served.double(), expected, rtol=1e-6)


def test_weights_of_probabilities_are_left_to_the_loss(tmp_path):
    for seed, teacher in enumerate("ab"):
        key = cache(tmp_path, [make_logits(seed)], teacher=teacher).data
    index = torch.arange(5)
    plain = open_store(tmp_path, ["a", "b"], data=key)
    weighted = open_store(tmp_path, ["a", "b"], data=key, weights=[0.9, 0.1])
    assert torch.equal(plain(index, 0), weighted(index, 0))


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(
    ("form", "average"),
    [
        ({}, "probabilities"),
        ({}, "logits"),
        ({"top_k": 2}, "probabilities"),
        ({"samples": 2}, "probabilities"),
    ],
)
def test_packed_and_mapped_give_the_same_bits(tmp_path, monkeypatch, members, form, average):
    teachers = [f"t{member}" for member in range(members)]
    for seed, teacher in enumerate(teachers):
        logits = make_logits(seed, rows=300, classes=11)
        key = cache(tmp_path, [logits], teacher=teacher, images=300, classes=11, **form).data
    weights = [0.1, 0.2, 0.7][:members]
    results = []
    for limit in [0, 2**20]:
        monkeypatch.setattr(store, "PACK_LIMIT", limit)
        targets = open_store(tmp_path, teachers, data=key, average=average, weights=weights)
        served = targets(torch.randperm(300, generator=torch.Generator().manual_seed(0))[:33], 0)
        parts = [served] if isinstance(served, torch.Tensor) else served
        results.append([part for part in parts if isinstance(part, torch.Tensor)])
    for mapped, packed in zip(*results, strict=True):
        assert mapped.dtype == packed.dtype
        assert torch.equal(mapped, packed)


def test_serving_changes_nothing_and_makes_no_graph(tmp_path, way):
    key = cache(tmp_path, [make_logits(0).requires_grad_()]).data
    targets = open_store(tmp_path, ["t1"], data=key)
    first = targets(torch.arange(IMAGES), 0)
    assert not first.requires_grad
    kept = first.clone()
    first.zero_()
    assert torch.equal(targets(torch.arange(IMAGES), 0), kept)


# --- half precision and top k ---


@pytest.mark.parametrize("temperature", [1, 4, 20])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1, 0), (5, 0), (30, 0), (300, 0), (5, 30_000), (5, -30_000), (5, 1e6), (1e5, 0), (1e30, 0)],
)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_half_precision_hardly_changes_the_soft_targets(
    tmp_path, temperature, scale, offset, classes
):
    logits = make_logits(classes, rows=50, classes=classes) * scale / 4 + offset
    key = cache(tmp_path, [logits], images=50, classes=classes, shard_size=50).data
    served = open_store(tmp_path, ["t1"], data=key)(torch.arange(50), 0)
    assert served.isfinite().all()
    expected = softmax(logits.double().numpy() / temperature, axis=1)
    found = softmax(served.double().numpy() / temperature, axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [None, 1])
def test_logits_of_any_precision_and_size_are_stored(tmp_path, dtype, top_k):
    largest = torch.finfo(dtype).max
    logits = torch.tensor([[largest, -largest, 0.9 * largest]], dtype=dtype)
    key = cache(tmp_path, [logits], images=1, classes=3, top_k=top_k).data
    served = open_store(tmp_path, ["t1"], data=key)(torch.tensor([0]), 0)
    values = served if top_k is None else served.values
    assert values[0, 0] == 0
    assert all(tensor.isfinite().all() for tensor in ([served] if top_k is None else served))


@pytest.mark.parametrize("top_k", [1, 3, 10])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (8, 0), (300, 0), (3, 30_000), (1e30, 0)])
def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(tmp_path, way, top_k, scale, offset):
    logits = make_logits(1, rows=50, classes=11) * scale / 4 + offset
    key = cache(tmp_path, [logits], images=50, classes=11, top_k=top_k).data
    index = torch.tensor([40, 2, 49, 2])
    served = open_store(tmp_path, ["t1"], data=key)(index, 0)
    assert [tuple(tensor.shape) for tensor in served] == [(4, top_k), (4, top_k), (4,), (4, 6)]
    assert [tensor.dtype for tensor in served[:2]] == [torch.float16, torch.int64]
    assert [tensor.dtype for tensor in served[2:]] == [torch.float32] * 2

    rows = logits.double().numpy()[index]
    rows = rows - rows.max(axis=1, keepdims=True)
    order = np.argsort(-rows, axis=1)
    np.testing.assert_array_equal(served.indices, order[:, :top_k])
    ordered = np.take_along_axis(rows, order, axis=1).clip(min=-65504)
    np.testing.assert_allclose(served.values, ordered[:, :top_k], rtol=1e-3, atol=1e-3)
    expected = logsumexp(ordered[:, top_k:], axis=1)
    np.testing.assert_allclose(served.rest, expected, rtol=1e-5, atol=1e-5)
    for column, temperature in zip(served.rest_grid.unbind(1), REST_TEMPERATURES, strict=True):
        expected = logsumexp(ordered[:, top_k:] / temperature, axis=1)
        np.testing.assert_allclose(column, expected, rtol=1e-5, atol=1e-5)
    parts = np.concatenate([served.values.double(), served.rest.double()[:, None]], axis=1)
    kept = softmax(ordered, axis=1)[:, :top_k]
    np.testing.assert_allclose(softmax(parts, axis=1)[:, :top_k], kept, atol=1e-3)


def test_top_k_of_members_keeps_their_order(tmp_path, way):
    predictions = {teacher: make_logits(seed) for seed, teacher in enumerate("ab")}
    for teacher, logits in predictions.items():
        key = cache(tmp_path, [logits], teacher=teacher, top_k=2).data
    index = torch.tensor([13, 1, 19])
    served = open_store(tmp_path, ["b", "a"], data=key)(index, 0)
    assert [tuple(tensor.shape) for tensor in served] == [(2, 3, 2), (2, 3, 2), (2, 3), (2, 3, 6)]
    for member, teacher in enumerate("ba"):
        expected = predictions[teacher][index].topk(2).indices
        assert torch.equal(served.indices[member], expected)


@pytest.mark.parametrize("members", [1, 2])
def test_shards_without_the_mass_at_other_temperatures(tmp_path, way, members):
    """Without `rest_grid` in one of its shards, a store is whole, and exact at T = 1 only."""
    teachers = [f"t{member}" for member in range(members)]
    for teacher in teachers:
        manifest = cache(tmp_path, [make_logits(0)], teacher=teacher, top_k=2)
    path = shard_path(tmp_path, manifest, view=0, shard=1)
    tensors, facts = load_tensors(path)
    save_tensors(path, {n: tensor for n, tensor in tensors.items() if n != "rest_grid"}, facts)
    assert whole(tmp_path, manifest) == ["whole"] * 3
    targets = open_store(tmp_path, teachers, data=manifest.data)
    assert targets(torch.tensor([2, 9]), 0).rest_grid is None
    served = targets(torch.tensor([9, 2, 19]), 0)
    rest = sparsify(shifted(make_logits(0))[[9, 2, 19]], 2).rest
    torch.testing.assert_close(served.rest, rest.expand(members, 3) if members > 1 else rest)
    assert (targets(torch.tensor([0, 1]), 0).rest_grid is None) == (way == "packed")


def test_top_k_takes_less_disk(tmp_path):
    logits = make_logits(0, rows=100, classes=1000)
    sizes = {"images": 100, "classes": 1000, "shard_size": 100}
    taken = {}
    for root, form in [("full", {}), ("top", {"top_k": 20}), ("few", {"samples": 8})]:
        manifest = cache(tmp_path / root, [logits], **sizes, **form)
        (path,) = (tmp_path / root).glob("*/*/view_000/*")
        taken[root] = sum(tensor.nbytes for tensor in load_tensors(path)[0].values()) / 100
        assert taken[root] == manifest.row_bytes
    assert taken == {"full": 2000, "top": 4 * 20 + 28, "few": 16}


# --- samples ---


def draw(root, logits, samples=8, sizes=(20,), **more):
    """Cache samples, each shard in batches of these sizes; return the store."""
    rows, classes = logits.shape
    manifest = make_manifest(samples=samples, images=rows, classes=classes, **more)
    for shard in range(manifest.shards):
        part = manifest.rows(shard)
        batches, start = [], part.start
        while start < part.stop:
            size = min(sizes[len(batches) % len(sizes)], part.stop - start)
            batches.append(logits[start : start + size])
            start += size
        write_shard(root, manifest, view=0, shard=shard, logits=iter(batches))
    return open_store(root, [manifest.teacher], data=manifest.data)


def test_samples_are_of_the_image_whatever_the_batch_and_the_shard(tmp_path, way):
    logits = make_logits(0)
    index = torch.tensor([13, 0, 19, 13])
    drawn = {
        draw(tmp_path / f"{size}-{sizes}", logits, sizes=sizes, shard_size=size)(index, 0)
        .indices.numpy()
        .tobytes()
        for size in (1, 7, 20)
        for sizes in ((20,), (1,), (3, 2))
    }
    assert len(drawn) == 1
    others = [draw(tmp_path / "b", logits, teacher="t2"), draw(tmp_path / "c", logits, recipe={})]
    assert all(other(index, 0).indices.numpy().tobytes() not in drawn for other in others)


@pytest.mark.parametrize("samples", [1, 8, 33])
def test_samples_follow_the_softmax(tmp_path, samples):
    rows = 40_000 // samples
    logits = torch.tensor([0.0, 1.0, -1.0, -60_000.0, -200_000.0, 0.5]).repeat(rows, 1)
    targets = draw(tmp_path, logits, samples, sizes=(700,), shard_size=rows)
    drawn = targets(torch.arange(rows), 0)
    assert drawn.indices.shape == (rows, samples)
    assert drawn.indices.dtype == torch.int64
    assert (drawn.weights, drawn.log_p, drawn.temperature) == (None, None, 1.0)
    shares = drawn.indices.flatten().bincount(minlength=6).double().numpy() / (rows * samples)
    wanted = softmax(logits[0].double().numpy())
    np.testing.assert_allclose(shares, wanted, atol=4 * np.sqrt(0.25 / (rows * samples)))
    assert shares[3] == shares[4] == 0  # in half precision they would tie


@pytest.mark.parametrize(("classes", "dtype"), [(2**16, "U16"), (2**16 + 1, "I32")])
def test_numbers_of_classes_take_16_bits_where_these_are_enough(tmp_path, classes, dtype):
    logits = torch.full((4, classes), -50.0)
    logits[:, -1] = 0
    for form in ({"samples": 3}, {"top_k": 1}):
        sizes = {"images": 4, "classes": classes, "shard_size": 4}
        manifest = cache(tmp_path, [logits], **sizes, **form)
        with safe_open(shard_path(tmp_path, manifest, view=0, shard=0), "pt") as file:
            assert file.get_slice("indices").get_dtype() == dtype
        served = open_store(tmp_path, ["t1"], data=manifest.data)(torch.tensor([2]), 0)
        assert (served.indices == classes - 1).all()


def test_samples_of_members_are_of_their_mean(tmp_path, way):
    logits = [make_logits(seed) for seed in range(3)]
    single = [draw(tmp_path, own, 4, teacher=name) for name, own in zip("abc", logits, strict=True)]
    key = make_manifest(samples=4).data
    index = torch.tensor([3, 17])
    own = [targets(index, 0).indices for targets in single]
    served = open_store(tmp_path, ["a", "b", "c"], data=key)(index, 0)
    assert torch.equal(served.indices, torch.cat(own, dim=-1))
    assert served.weights is None
    weighted = open_store(tmp_path, ["a", "b", "c"], data=key, weights=[1.0, 0.0, 3.0])(index, 0)
    assert torch.equal(weighted.indices, torch.cat([own[0], own[2]], dim=-1))
    assert weighted.weights.tolist() == [[0.0625] * 4 + [0.1875] * 4] * 2
    with pytest.raises(ValueError, match="average must be probabilities where only samples"):
        open_store(tmp_path, ["a", "b"], data=key, average="logits")


def test_a_shard_is_made_batch_by_batch(tmp_path):
    """No more than a batch of the logits is held beside what is written."""
    rows, classes = 2_000, 5_000
    manifest = make_manifest(samples=8, images=rows, classes=classes, shard_size=rows)
    alive = []

    def batches():
        for _ in range(rows // 100):
            batch = torch.zeros(100, classes)
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(each() is not None for each in alive) <= 1

    write_shard(tmp_path, manifest, view=0, shard=0, logits=batches())
    assert len(alive) == 20
    with pytest.raises(ValueError, match=r"logits must be \[2000, 5000\], got \[100, 5000\]"):
        write_shard(tmp_path, manifest, view=0, shard=0, logits=[torch.zeros(100, classes)])
    with pytest.raises(ValueError, match=r"logits must be \[2000, 5000\], got \[2001, 5000\]"):
        write_shard(tmp_path, manifest, view=0, shard=0, logits=[torch.zeros(667, classes)] * 3)


# --- refused arguments ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("top_k", [None, 2])
def test_logits_that_are_not_finite_are_refused(tmp_path, value, top_k):
    logits = make_logits(0, rows=SHARD)
    logits[3, 2] = value
    logits[5, 0] = value
    manifest = make_manifest(top_k=top_k)
    with pytest.raises(ValueError, match=rf"teacher logits must be finite, got {value} in row 10$"):
        write_shard(tmp_path, manifest, view=0, shard=1, logits=logits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, r"top_k must be in \[1, 4\], got 0"),
        ({"top_k": -1}, r"top_k must be in \[1, 4\], got -1"),
        ({"top_k": CLASSES}, r"top_k must be in \[1, 4\], got 5"),
        ({"views": 0}, "views must be an integer of at least 1, got 0"),
        ({"images": 0}, "images must be an integer of at least 1, got 0"),
        ({"images": "20"}, "images must be an integer of at least 1, got '20'"),
        ({"classes": -3}, "classes must be an integer of at least 1, got -3"),
        ({"shard_size": 0}, "shard_size must be an integer of at least 1, got 0"),
        ({"shard_size": 2.5}, "shard_size must be an integer of at least 1, got 2.5"),
        ({"samples": 0}, "samples must be an integer of at least 1 or none, got 0"),
        ({"samples": 2, "top_k": 2}, "samples must be none where there is top_k, got 2"),
        ({"samples": 2, "exact": True}, "exact must be false where there is samples, got True"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_manifest(**changes)


def test_a_manifest_under_another_key_is_refused():
    manifest = make_manifest()
    forms = [{"top_k": 2}, {"samples": 2}]
    for changes in [{"data": "d1"}, {"fingerprint": "x"}, {"recipe": {}}, *forms]:
        with pytest.raises(ValueError, match=r"data must be \w{16}, the key of .*, got \w+"):
            replace(manifest, **changes)


def test_shards_cover_all_images_once():
    for images, shard_size in [(20, 7), (20, 20), (21, 20), (1, 50)]:
        manifest = make_manifest(images=images, shard_size=shard_size)
        rows = [row for shard in range(manifest.shards) for row in manifest.rows(shard)]
        assert rows == list(range(images))


@pytest.mark.parametrize(
    ("where", "rows", "message"),
    [
        ({"view": 1, "shard": 0}, 7, r"view must be in \[0, 1\), got 1"),
        ({"view": -1, "shard": 0}, 7, r"view must be in \[0, 1\), got -1"),
        ({"view": 0, "shard": 3}, 7, r"shard must be in \[0, 3\), got 3"),
        ({"view": 0, "shard": -1}, 6, r"shard must be in \[0, 3\), got -1"),
        ({"view": 0, "shard": 2}, 7, r"logits must be \[6, 5\], got \[7, 5\]"),
        ({"view": 0, "shard": 0}, 6, r"logits must be \[7, 5\], got \[6, 5\]"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused(tmp_path, where, rows, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, make_manifest(), **where, logits=make_logits(0, rows=rows))


@pytest.mark.parametrize("wrong", [-1, -20, 20, 2**40])
def test_an_image_out_of_range_is_refused(tmp_path, way, wrong):
    targets = open_store(tmp_path, ["t1"], data=cache(tmp_path, [make_logits(0)]).data)
    with pytest.raises(IndexError, match=rf"index must be in \[0, 20\), got {wrong}$"):
        targets(torch.tensor([3, wrong, 5]), 0)


def test_a_view_out_of_range_and_a_wrong_index_are_refused(tmp_path, way):
    targets = open_store(tmp_path, ["t1"], data=cache(tmp_path, [make_logits(0)] * 2).data)
    for view in [2, -1]:
        with pytest.raises(ValueError, match=rf"view must be in \[0, 2\), got {view}"):
            targets(torch.tensor([0]), view)
    for index in [torch.tensor([1.0]), torch.tensor([True]), torch.tensor(1), torch.ones(2, 2)]:
        with pytest.raises(ValueError, match=r"index must be int64 \[batch\], got torch\.\w+ \["):
            targets(index, 0)
    with pytest.raises(TypeError, match=r"index must be a tensor, int64 .*, got list"):
        targets([0], 0)


def test_a_view_may_be_a_tensor(tmp_path, way):
    targets = open_store(tmp_path, ["t1"], data=cache(tmp_path, [make_logits(0)]).data)
    index = torch.tensor([2, 1])
    for view in (torch.tensor(0), torch.tensor(0)):
        assert torch.equal(targets(index, view), targets(index, 0))
    assert list(targets._packed) == [0]


def test_an_average_of_top_k_logits_is_refused(tmp_path):
    for teacher in "ab":
        key = cache(tmp_path, [make_logits(0)], teacher=teacher, top_k=2).data
    with pytest.raises(ValueError, match="average must be probabilities where only top_k"):
        open_store(tmp_path, ["a", "b"], data=key, average="logits")
    assert open_store(tmp_path, ["a"], data=key, average="logits").members == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights must be one a teacher, 2, got 1"),
        ([1.0, -0.5], r"weights must be at least 0 and not all 0, got \[1.0, -0.5\]"),
        ([0.0, 0.0], "weights must be at least 0"),
        ([1.0, float("nan")], "weights must be at least 0"),
        ([1.0, float("inf")], "weights must be at least 0"),
    ],
)
def test_impossible_weights_are_refused(tmp_path, weights, message):
    key = make_manifest().data
    with pytest.raises(ValueError, match=message):
        open_store(tmp_path, ["a", "b"], data=key, average="logits", weights=weights)


def test_no_teachers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="teachers must be at least one hash, got none"):
        open_store(tmp_path, [], data="d")


# --- missing files ---


def test_missing_stores_and_shards_are_named(tmp_path, way):
    manifest = make_manifest(views=2)
    with pytest.raises(
        FileNotFoundError, match=r"no such store: .*t1/\w+: the teacher logits are not cached"
    ):
        open_store(tmp_path, ["t1"], data=manifest.data)
    write_shard(tmp_path, manifest, view=0, shard=0, logits=make_logits(0, rows=SHARD))
    targets = open_store(tmp_path, ["t1"], data=manifest.data)
    with pytest.raises(
        FileNotFoundError, match=r"view_000/shard_00001.*: the teacher logits are not cached"
    ):
        targets(torch.tensor([0, 8]), 0)
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*view_001/shard_00000"):
        targets(torch.tensor([0]), 1)
    with pytest.raises(FileNotFoundError, match=r"no such store: .*t2/"):
        open_store(tmp_path, ["t1", "t2"], data=manifest.data)


def test_only_the_shards_of_the_batch_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PACK_LIMIT", 0)
    manifest = cache(tmp_path, [make_logits(0)])
    shard_path(tmp_path, manifest, view=0, shard=1).unlink()
    targets = open_store(tmp_path, ["t1"], data=manifest.data)
    assert targets(torch.tensor([0, 6, 14, 19]), 0).shape == (4, CLASSES)


def test_a_shard_is_hashed_once_a_process_until_it_changes(tmp_path, way, monkeypatch):
    read = []
    monkeypatch.setattr(shards, "load_tensors", lambda path: (read.append(path), load(path))[1])
    load = load_tensors
    manifest = cache(tmp_path, [make_logits(0)])
    for _ in range(3):
        targets = open_store(tmp_path, ["t1"], data=manifest.data)
        targets(torch.arange(IMAGES), 0)
        targets(torch.arange(IMAGES), 0)
    assert len(read) == len(set(read)) == 3
    flip(shard_path(tmp_path, manifest, view=0, shard=1), -1)
    with pytest.raises(ValueError, match=r"shard_00001\.safetensors is damaged"):
        open_store(tmp_path, ["t1"], data=manifest.data)(torch.arange(IMAGES), 0)


# --- shards that are damaged or misplaced ---


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("form", [{}, {"top_k": 2}, {"samples": 2}])
def test_any_flipped_byte_is_found(tmp_path, form):
    manifest = cache(tmp_path, [make_logits(0)], **form)
    path = shard_path(tmp_path, manifest, view=0, shard=0)
    assert whole(tmp_path, manifest) == ["whole"] * 3
    for position in range(path.stat().st_size):
        flip(path, position)
        state = check_shard(tmp_path, manifest, view=0, shard=0)
        assert state == "damaged", position
        flip(path, position)
    assert whole(tmp_path, manifest) == ["whole"] * 3


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_truncated_shard_is_found(tmp_path, way, size):
    manifest = cache(tmp_path, [make_logits(0)])
    path = shard_path(tmp_path, manifest, view=0, shard=2)
    path.write_bytes(path.read_bytes()[:size])
    assert whole(tmp_path, manifest) == ["whole", "whole", "damaged"]
    targets = open_store(tmp_path, ["t1"], data=manifest.data)
    with pytest.raises(ValueError, match=r"shard_00002\.safetensors is damaged"):
        targets(torch.tensor([16]), 0)


def test_a_damaged_shard_is_made_again_with_the_same_bits(tmp_path):
    logits = make_logits(0)
    manifest = cache(tmp_path, [logits], samples=4)
    path = shard_path(tmp_path, manifest, view=0, shard=1)
    before = load_tensors(path)[1]["hash"]
    flip(path, -3)
    assert whole(tmp_path, manifest) == ["whole", "damaged", "whole"]
    write_shard(tmp_path, manifest, view=0, shard=1, logits=logits[7:14].split(2))
    assert load_tensors(path)[1]["hash"] == before


def test_a_damaged_shard_is_replaced(tmp_path, way):
    logits = make_logits(0)
    manifest = cache(tmp_path, [logits])
    flip(shard_path(tmp_path, manifest, view=0, shard=1), -3)
    assert whole(tmp_path, manifest) == ["whole", "damaged", "whole"]
    write_shard(tmp_path, manifest, view=0, shard=1, logits=logits[7:14])
    assert whole(tmp_path, manifest) == ["whole"] * 3
    served = open_store(tmp_path, ["t1"], data=manifest.data)(torch.arange(IMAGES), 0)
    np.testing.assert_allclose(served.float(), shifted(logits), atol=0.02)


@pytest.mark.parametrize(
    "other",
    [
        {"view": 1},
        {"shard": 1},
        {"teacher": "t2"},
        {"fingerprint": "other"},
        {"recipe": {"flip": False}},
    ],
)
def test_a_shard_copied_from_elsewhere_is_found(tmp_path, way, other):
    where = {"view": 0, "shard": 0}
    manifest = cache(tmp_path, [make_logits(0), make_logits(1)])
    place = shard_path(tmp_path, manifest, **where)
    from_where = {key: other.get(key, value) for key, value in where.items()}
    more = {key: value for key, value in other.items() if key not in where}
    source = cache(tmp_path, [make_logits(2), make_logits(3)], **more)
    shutil.copy(shard_path(tmp_path, source, **from_where), place)
    assert check_shard(tmp_path, manifest, **where) == "damaged"
    targets = open_store(tmp_path, ["t1"], data=manifest.data)
    with pytest.raises(ValueError, match=r"shard_00000\.\w+ must hold .*'t1'.*: remove it"):
        targets(torch.tensor([0]), 0)


def overwrite(root, manifest, tensors):
    facts = {"teacher": "t1", "data": manifest.data, "view": 0, "shard": 0}
    save_tensors(shard_path(root, manifest, view=0, shard=0), tensors, facts)


@pytest.mark.parametrize(
    "tensors",
    [
        {"logits": torch.zeros(6, CLASSES, dtype=torch.float16)},
        {"logits": torch.zeros(7, 4, dtype=torch.float16)},
        {"logits": torch.zeros(7, CLASSES)},
        {"scores": torch.zeros(7, CLASSES, dtype=torch.float16)},
        {"logits": torch.zeros(7, CLASSES, dtype=torch.float16), "more": torch.zeros(1)},
        {"logits": torch.zeros(7, CLASSES, dtype=torch.bfloat16)},
    ],
)
def test_a_shard_of_other_tensors_is_found(tmp_path, way, tensors):
    manifest = cache(tmp_path, [make_logits(0)])
    overwrite(tmp_path, manifest, tensors)
    assert check_shard(tmp_path, manifest, view=0, shard=0) == "damaged"
    targets = open_store(tmp_path, ["t1"], data=manifest.data)
    with pytest.raises(ValueError, match=r"shard_00000\.\w+ does not fit its manifest, got \{"):
        targets(torch.tensor([0]), 0)


@pytest.mark.parametrize("form", [{"top_k": 2}, {"samples": 2}])
@pytest.mark.parametrize(("classes", "wrong"), [(5, 5), (5, 2**16 - 1), (70_000, -1)])
def test_indices_of_no_class_are_found(tmp_path, way, form, classes, wrong):
    manifest = cache(tmp_path, [make_logits(0, classes=classes)], classes=classes, **form)
    path = shard_path(tmp_path, manifest, view=0, shard=0)
    tensors = {name: tensor.clone() for name, tensor in load_tensors(path)[0].items()}
    tensors["indices"][3, 1] = wrong
    overwrite(tmp_path, manifest, tensors)
    assert check_shard(tmp_path, manifest, view=0, shard=0) == "damaged"
    targets = open_store(tmp_path, ["t1"], data=manifest.data)
    with pytest.raises(
        ValueError, match=rf"shard_00000\.\w+ must have indices in \[0, {classes}\)"
    ):
        targets(torch.tensor([0]), 0)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    ("changes", "top_k_sees"), [({"classes": 4}, False), ({"images": 19}, True)]
)
def test_a_manifest_of_other_sizes_does_not_fit_its_shards(
    tmp_path, way, top_k, changes, top_k_sees
):
    manifest = cache(tmp_path, [make_logits(0)], top_k=top_k)
    open_store(tmp_path, ["t1"], data=manifest.data)(torch.arange(IMAGES), 0)  # all checked
    edit(tmp_path / "t1" / manifest.data / "manifest.json", **changes)
    message = "does not fit its manifest"
    if top_k and not top_k_sees:
        message = r"must have indices in \[0, 4\), got 0 to 4"
    targets = open_store(tmp_path, ["t1"], data=manifest.data)
    with pytest.raises(ValueError, match=message):
        targets(torch.arange(19), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"is damaged \(version must be 1, got 2\)"),
        ({"recipe": {}}, r"is damaged \(data must be"),
        ({"colour": "red"}, r"is damaged \(.*colour"),
        ({"images": None}, r"is damaged \(images must be"),
        ({"top_k": "many"}, r"is damaged \("),
        ({"teacher": "t2"}, r"must be of t1/\w+, got t2/\w+: remove it and resume"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, changes, message):
    manifest = cache(tmp_path, [make_logits(0)])
    edit(tmp_path / "t1" / manifest.data / "manifest.json", **changes)
    with pytest.raises(ValueError, match=rf"manifest\.json {message}"):
        open_store(tmp_path, ["t1"], data=manifest.data)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}"])
def test_an_unreadable_manifest_is_named_and_replaced(tmp_path, text):
    manifest = cache(tmp_path, [make_logits(0)])
    path = tmp_path / "t1" / manifest.data / "manifest.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*: remove it and resume"):
        load_manifest(tmp_path, "t1", manifest.data)
    assert whole(tmp_path, manifest) == ["damaged"] * 3
    save_manifest(tmp_path, manifest)
    assert whole(tmp_path, manifest) == ["whole"] * 3


def test_a_lost_manifest_is_written_again(tmp_path):
    manifest = cache(tmp_path, [make_logits(0)])
    (tmp_path / "t1" / manifest.data / "manifest.json").unlink()
    assert whole(tmp_path, manifest) == ["absent"] * 3
    save_manifest(tmp_path, manifest)
    assert whole(tmp_path, manifest) == ["whole"] * 3


@pytest.mark.parametrize("changes", [{"images": 19}, {"classes": 6}])
def test_teachers_of_different_data_are_refused(tmp_path, changes):
    for teacher, more in [("a", {}), ("b", changes)]:
        key = make_manifest(teacher=teacher, **more).data
        save_manifest(tmp_path, make_manifest(teacher=teacher, **more))
    (name,) = changes
    with pytest.raises(ValueError, match=rf"b/\w+/manifest\.json must have {name} \d+, as a has"):
        open_store(tmp_path, ["a", "b"], data=key)


# --- writing: atomic, resumed, shared between runs ---


def test_the_manifest_is_written_with_the_shard(tmp_path):
    origin = {"checkpoint": "/runs/a/best.safetensors", "config": {"seed": 3}}
    manifest = replace(make_manifest(top_k=2, views=3), origin=origin)
    write_shard(tmp_path, manifest, view=1, shard=2, logits=make_logits(0, rows=6))
    assert load_manifest(tmp_path, "t1", manifest.data) == manifest
    path = store_path(tmp_path, "t1", manifest.data)
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert files == {"manifest.json", "view_001/shard_00002.safetensors"}
    expected = ["absent"] * 9
    expected[5] = "whole"
    assert whole(tmp_path, manifest) == expected


def test_more_views_are_added_and_fewer_leave_them(tmp_path):
    views = [make_logits(seed) for seed in range(3)]
    cache(tmp_path, views[:1])
    more = make_manifest(views=3)
    assert whole(tmp_path, more) == ["whole"] * 3 + ["absent"] * 6
    cache(tmp_path, views)
    cache(tmp_path, views[:1])
    assert whole(tmp_path, more) == ["whole"] * 9
    cache(tmp_path, views[:2], teacher="t2")
    targets = open_store(tmp_path, ["t1", "t2"], data=more.data)
    assert targets.views == 2


def test_views_outside_the_manifest_are_absent(tmp_path):
    manifest = cache(tmp_path, [make_logits(0)] * 2)
    edit(tmp_path / "t1" / manifest.data / "manifest.json", views=1)
    assert whole(tmp_path, manifest) == ["whole"] * 3 + ["absent"] * 3
    (info,) = list_stores(tmp_path)
    assert (info.present, info.expected) == (3, 3)


def test_other_shards_are_refused_not_mixed(tmp_path):
    manifest = cache(tmp_path, [make_logits(0)])
    other = make_manifest(shard_size=10)
    message = r"shard_size must be 7, as in .*manifest\.json, got 10"
    with pytest.raises(ValueError, match=message):
        check_shard(tmp_path, other, view=0, shard=0)
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, other, view=0, shard=0, logits=make_logits(0, rows=10))
    assert whole(tmp_path, manifest) == ["whole"] * 3


@contextmanager
def small_files():
    """The kernel refuses to write more than 20,000 bytes to a file; also to the log of the tests,
    so keep it short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_shard_too_large_for_the_disk_leaves_no_file(tmp_path):
    manifest = make_manifest(images=20_000, shard_size=20_000)
    with pytest.raises(OSError, match=r"too large.*shard_00000") as caught, small_files():
        write_shard(tmp_path, manifest, view=0, shard=0, logits=torch.zeros(20_000, CLASSES))
    assert caught.value.errno == errno.EFBIG
    assert whole(tmp_path, manifest) == ["absent"]
    assert list_stores(tmp_path)[0].leftovers == []


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_raises_its_errno(tmp_path, monkeypatch, error):
    def save_file(*_args, **_kwargs):
        raise error

    manifest = cache(tmp_path, [make_logits(0)])
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="No space left") as caught:
        write_shard(tmp_path, manifest, view=0, shard=0, logits=make_logits(1, rows=SHARD))
    assert caught.value.errno == errno.ENOSPC
    assert whole(tmp_path, manifest) == ["whole"] * 3  # what was there before still is
    assert list_stores(tmp_path)[0].leftovers == []


# --- memory ---


def test_packed_views_stay_within_the_limit(tmp_path, monkeypatch):
    views = [make_logits(seed) for seed in range(5)]
    key = cache(tmp_path, views).data
    one = IMAGES * CLASSES * 2
    monkeypatch.setattr(store, "PACK_LIMIT", 2 * one + 10)
    targets = open_store(tmp_path, ["t1"], data=key)
    index = torch.tensor([3, 18])
    for view in [0, 1, 2, 3, 4, 0, 1, 1, 4]:
        expected = shifted(views[view])[index]
        np.testing.assert_allclose(targets(index, view).float(), expected, atol=0.02)
        sizes = [array.nbytes for arrays in targets._packed.values() for array in arrays.values()]
        assert sum(sizes) <= 2 * one
    assert sorted(targets._packed) == [1, 4]


def test_many_mapped_files_are_released(tmp_path, way, monkeypatch):
    monkeypatch.setattr(store, "_MAPS", 2)
    logits = make_logits(0)
    targets = open_store(tmp_path, ["t1"], data=cache(tmp_path, [logits], shard_size=2).data)
    for _ in range(2):
        served = targets(torch.arange(IMAGES), 0)
        np.testing.assert_allclose(served.float(), shifted(logits), atol=0.02)
        assert len(targets._shards) <= 2


_READER = """
import sys
from pathlib import Path
import torch
from selfkd.soft_targets.store import open_store

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

targets = open_store(Path(sys.argv[1]), ["t1"], data=sys.argv[2])
before = own()
for _ in range(100):
    served = targets(torch.randint(targets.images, (128,)), 0)
print(own() - before, len(Path("/proc/self/maps").read_text().split("shard_0")) - 1)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_store_is_mapped_not_copied(tmp_path):
    """Pages of mapped files belong to the page cache; what counts is anonymous memory."""
    manifest = make_manifest(images=100_000, classes=1000, shard_size=25_000)  # 200 MB
    part = make_logits(0, rows=25_000, classes=1000)
    for shard in range(4):
        write_shard(tmp_path, manifest, view=0, shard=shard, logits=part)
    command = [sys.executable, "-c", _READER, str(tmp_path), manifest.data]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes, mapped = map(int, run.stdout.split())
    assert mapped == 4
    assert megabytes < 40


# --- upkeep ---


def test_stores_are_listed_with_their_users(tmp_path):
    root, run = tmp_path / "targets", tmp_path / "runs" / "a"
    assert list_stores(root) == unused(root) == []
    first = cache(root, [make_logits(0)] * 2, teacher="a")
    second = make_manifest(teacher="b", top_k=2, views=2)
    write_shard(root, second, view=1, shard=0, logits=make_logits(0, rows=SHARD))
    run.mkdir(parents=True)
    for _ in range(2):
        remember_user(root, "a", first.data, run)
    remember_user(root, "a", first.data, tmp_path / "gone")
    (root / "a" / "notes").mkdir()

    a, b = list_stores(root)
    assert (a.path, b.path) == (root / "a" / first.data, root / "b" / second.data)
    assert (a.manifest, b.manifest) == (first, second)
    assert [(info.present, info.expected) for info in (a, b)] == [(6, 6), (1, 6)]
    assert (a.users, b.users) == ([run], [])
    for info in (a, b):
        files = [file for file in info.path.rglob("*") if file.is_file()]
        assert info.bytes == sum(file.stat().st_size for file in files)
    assert [info.path for info in unused(root)] == [b.path]
    shutil.rmtree(run)
    assert [info.path for info in unused(root)] == [a.path, b.path]


def test_a_user_is_known_by_its_absolute_path(tmp_path, monkeypatch):
    manifest = cache(tmp_path, [make_logits(0)])
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    remember_user(tmp_path, "t1", manifest.data, Path("run"))
    remember_user(tmp_path, "t1", manifest.data, tmp_path / "run")
    monkeypatch.chdir("/")
    assert list_stores(tmp_path)[0].users == [tmp_path / "run"]


def test_a_store_with_a_damaged_manifest_is_listed(tmp_path):
    manifest = cache(tmp_path, [make_logits(0)])
    path = tmp_path / "t1" / manifest.data / "manifest.json"
    for break_it in [lambda: path.write_text("{"), path.unlink]:
        break_it()
        (info,) = list_stores(tmp_path)
        assert (info.manifest, info.present, info.expected) == (None, 3, 0)


def test_old_files_of_killed_writers_are_removed(tmp_path):
    manifest = cache(tmp_path, [make_logits(0)])
    folder = shard_path(tmp_path, manifest, view=0, shard=0).parent
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    old, new, mine, foreign = (
        folder / f".shard_00000.safetensors.{0:016x}",
        folder / f".shard_00001.safetensors.{1:016x}",
        folder / ".notes",
        elsewhere / f".x.{0:016x}",
    )
    for path in (old, new, mine, foreign):
        path.write_text("half")
        if path != new:
            os.utime(path, (0, 0))
    assert sorted(list_stores(tmp_path)[0].leftovers) == [old, new]
    assert list_stores(tmp_path)[0].present == 3
    assert sweep(tmp_path) == [old]
    assert new.exists()
    assert mine.exists()
    assert foreign.exists()
    assert sweep(tmp_path, seconds=-1) == [new]
    assert whole(tmp_path, manifest) == ["whole"] * 3


# --- keys ---


def test_the_key_depends_on_images_recipe_and_format():
    recipe = {"flip": True, "jitter": 2, "seed": 0}
    key = data_key("abc", recipe)
    assert key == data_key("abc", dict(reversed(recipe.items())))
    others = [("abd", recipe), *(("abc", {**recipe, name: 7}) for name in recipe), ("abc", {})]
    keys = {data_key(*other) for other in others}
    keys |= {data_key("abc", recipe, top_k=top_k) for top_k in (1, 2)}
    keys |= {data_key("abc", recipe, samples=samples) for samples in (1, 2)}
    assert len(keys) == len(others) + 4
    assert key not in keys
