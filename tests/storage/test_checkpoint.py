"""Tensors on disk: the same after a round trip, verified, memory-mapped."""

import math
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from selfkd.storage.checkpoint import load_tensors, save_tensors, tensors_hash

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


# --- round trip ---


def test_tensors_and_facts_come_back(tmp_path):
    tensors = make_tensors()
    facts = {"model": {"name": "selfkd_mlp", "args": {"width": 3}}, "mean": [0.1], "x": None}
    saved = save_tensors(tmp_path / "a" / "file.safetensors", tensors, facts)
    found, found_facts = load_tensors(tmp_path / "a" / "file.safetensors")
    assert_same(found, tensors)
    assert found_facts == {**facts, "hash": saved}
    assert saved != save_tensors(tmp_path / "b", tensors, {**facts, "x": 1})  # of facts as well
    assert re.fullmatch(r"[0-9a-f]{16}", saved)
    assert os.listdir(tmp_path / "a") == ["file.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (3, 2)])
def test_every_dtype_and_shape_comes_back(tmp_path, dtype, shape):
    tensors = {"x": torch.arange(math.prod(shape)).reshape(shape).to(dtype)}
    save_tensors(tmp_path / "file", tensors, {})
    assert_same(load_tensors(tmp_path / "file")[0], tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 1e-45])
def test_odd_numbers_come_back_bit_by_bit(tmp_path, value):
    tensor = torch.tensor([value])
    save_tensors(tmp_path / "file", {"x": tensor}, {})
    found = load_tensors(tmp_path / "file")[0]["x"]
    assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))


def test_views_and_shared_tensors_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.t(), "column": base[:, 1], "base": base, "same": base}
    save_tensors(tmp_path / "file", tensors, {})
    assert_same(load_tensors(tmp_path / "file")[0], tensors)


def test_a_network_comes_back(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    network = network.to(memory_format=torch.channels_last)
    save_tensors(tmp_path / "file", network.state_dict(), {})
    assert_same(load_tensors(tmp_path / "file")[0], dict(network.state_dict()))
    save_tensors(tmp_path / "file", dict(network.named_parameters()), {})  # these need a gradient
    assert not any(tensor.requires_grad for tensor in load_tensors(tmp_path / "file")[0].values())


def test_others_can_read_the_file(tmp_path):
    path = tmp_path / "file.safetensors"
    before = os.umask(0o022)
    try:
        save_tensors(path, make_tensors(), {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert_same(load_file(path), make_tensors())  # by safetensors alone


def test_facts_must_be_json(tmp_path):
    with pytest.raises(TypeError):
        save_tensors(tmp_path / "file", {}, {"x": object()})
    assert os.listdir(tmp_path) == []


# --- the hash ---


def test_the_hash_does_not_depend_on_order_or_layout():
    tensors = make_tensors()
    assert tensors_hash(dict(reversed(tensors.items()))) == tensors_hash(tensors)
    scattered = {**tensors, "weight": tensors["weight"].t().contiguous().t()}
    assert not scattered["weight"].is_contiguous()
    assert tensors_hash(scattered) == tensors_hash(tensors)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(6)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3).index_fill(1, torch.tensor(2), 1e-45)},
        {"a": -torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ],
)
def test_the_hash_depends_on_names_types_shapes_and_values(other):
    assert tensors_hash(other) != tensors_hash({"a": torch.zeros(2, 3)})


def test_swapped_tensors_have_another_hash():
    one, two = torch.ones(2), torch.zeros(2)
    assert tensors_hash({"a": one, "b": two}) != tensors_hash({"a": two, "b": one})


# --- damage ---


def test_every_flipped_byte_is_found(tmp_path):
    """In the tensors, their names and shapes, the hash and the facts."""
    path = tmp_path / "file.safetensors"
    save_tensors(path, make_tensors(), {"teacher": "abc", "mean": [0.5]})
    content = path.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        damaged.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"damaged\.safetensors (is damaged|was not written)"):
            load_tensors(damaged)


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_cut_file_is_found(tmp_path, kept):
    path = tmp_path / "file.safetensors"
    save_tensors(path, make_tensors(), {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"file\.safetensors is damaged .*: remove it and resume"):
        load_tensors(path)


@pytest.mark.parametrize("metadata", [None, {"hash": "0" * 16}, {"facts": "{}"}])
def test_a_foreign_file_is_refused(tmp_path, metadata):
    path = tmp_path / "theirs.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"theirs\.safetensors was not written by selfkd"):
        load_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing\.safetensors"):
        load_tensors(tmp_path / "nothing.safetensors")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    save_tensors(path, make_tensors(), {"version": 1})

    def fail(tensors, temporary, metadata):
        Path(temporary).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("selfkd.storage.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(path, {"x": torch.zeros(1)}, {"version": 2})
    assert load_tensors(path)[1]["version"] == 1
    assert os.listdir(tmp_path) == ["file.safetensors"]


# --- memory ---


def own_memory():
    """Bytes of anonymous memory of this process, without pages of mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_tensors_are_mapped_and_not_copied(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"x": torch.arange(16 * 2**20, dtype=torch.float32)}, {})
    load_tensors(path)  # memory that the first call alone takes
    before = own_memory()
    tensors, _ = load_tensors(path)
    assert own_memory() - before < 4 * 2**20
    assert tensors["x"][-1] == 16 * 2**20 - 1


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path):
    save_tensors(tmp_path / "file", {"x": torch.zeros(4)}, {})
    load_tensors(tmp_path / "file")[0]["x"].fill_(1)
    assert torch.equal(load_tensors(tmp_path / "file")[0]["x"], torch.zeros(4))


def test_a_mapped_file_may_be_replaced(tmp_path):
    save_tensors(tmp_path / "file", {"x": torch.zeros(4)}, {})
    old = load_tensors(tmp_path / "file")[0]["x"]
    save_tensors(tmp_path / "file", {"x": torch.ones(4)}, {})
    assert torch.equal(old, torch.zeros(4))
    assert torch.equal(load_tensors(tmp_path / "file")[0]["x"], torch.ones(4))
