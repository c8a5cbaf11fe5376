"""Files of weights as other people's code writes them."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from selfkd.storage.weights import Weights, find_weights


class Net(nn.Module):
    def __init__(self, channels: int = 1, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)


class Trained(nn.Module):
    """A module around the network, as Lightning's, with settings of its own class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model, self.settings = network, argparse.Namespace(lr=0.1)


NET = Net()
STATE = NET.state_dict()
EMA = {name: tensor + 1 for name, tensor in STATE.items()}
SHAPES = {name: tensor.shape for name, tensor in STATE.items()}


def named(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def find(path: Path, saved: Any = None, key: str | None = None) -> Weights:
    if saved is not None:
        torch.save(saved, path)
    return find_weights(path, SHAPES, key=key, outputs=3)


def is_whole(found: Weights, state: Mapping[str, Tensor] = STATE) -> bool:
    return found.tensors.keys() == state.keys() and all(
        torch.equal(tensor, state[name].to(tensor)) for name, tensor in found.tensors.items()
    )


@pytest.mark.parametrize(
    "key",
    [
        *("model_state_dict", "state_dict", "model", "net", "network", "weights", "params"),
        *("ema", "state_dict_ema", "model_ema", "module", "student", "generator"),
    ],
)
def test_weights_are_found_under_any_key(tmp_path: Path, key: str) -> None:
    optimizer = torch.optim.SGD(NET.parameters(), lr=0.1, momentum=0.9).state_dict()
    beside = {"args": argparse.Namespace(lr=1), "path": Path("x"), "best": np.float64(0.9)}
    found = find(tmp_path / "a.pt", {key: STATE, "optimizer": optimizer, "epoch": 3} | beside)
    assert is_whole(found)
    assert found.note is None


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "model.", "_orig_mod.", "net.", "student.", "backbone.net."),
        *("module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module.net."),
    ],
)
def test_weights_are_found_with_any_prefix(tmp_path: Path, prefix: str) -> None:
    loss = {"criterion.weight": torch.zeros(3)}
    assert is_whole(find(tmp_path / "a.pt", {"state_dict": named(prefix) | loss}))


@pytest.mark.parametrize(
    "saved",
    [
        STATE,
        {"a": {"b": {"c": {"d": STATE}}}},
        {name.replace(".", "._orig_mod.", 1): tensor for name, tensor in STATE.items()},
        {**STATE, "total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)},
        NET,
        {"model": Trained(NET), "epoch": 2},
        (STATE, 3),
        nn.DataParallel(NET),
        AveragedModel(NET),
        AveragedModel(NET).state_dict(),
    ],
    ids=[
        "plain",
        "deep",
        "compiled part",
        "thop",
        "net",
        "own",
        "tuple",
        "parallel",
        "swa",
        "swa state",
    ],
)
def test_weights_are_found_in_other_wraps(tmp_path: Path, saved: Any) -> None:
    assert is_whole(find(tmp_path / "a.pt", saved))


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    old = {name: tensor for name, tensor in STATE.items() if "num_batches" not in name}
    assert is_whole(find(tmp_path / "a.pt", old))


def test_other_formats_load_as_well(tmp_path: Path) -> None:
    save_file(named("model."), tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in STATE.items()})
    beside = {"net": STATE, "args": argparse.Namespace(lr=1), "best": np.float64(0.9)}
    torch.save(beside, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    parts = {"m-00001-of-00002.safetensors": {}, "m-00002-of-00002.safetensors": {}}
    where = {name: list(parts)[len(name) % 2] for name in STATE}
    for name, part in parts.items():
        part |= {tensor: STATE[tensor] for tensor in STATE if where[tensor] == name}
        save_file(part, tmp_path / name)
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": where}))
    for name in ("a.safetensors", "a.npz", "old.bin", "m.index.json"):
        assert is_whole(find(tmp_path / name))
    with pytest.raises(ValueError, match=r"it is one part of several: give their index"):
        find(tmp_path / "m-00001-of-00002.safetensors")
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the file m-00002-of-.*, which is not beside it"):
        find(tmp_path / "m.index.json")


# --- several sets ---


@pytest.mark.parametrize(
    ("saved", "average", "raw"),
    [
        ({"state_dict": STATE, "state_dict_ema": EMA}, "state_dict_ema", "state_dict"),
        (named("model.") | named("ema_model.", EMA), "ema_model", "model"),
        ({**STATE, "ema": EMA}, "ema", "raw"),
        ({"net": STATE, "swa_model": EMA}, "swa_model", "net"),
    ],
)
def test_an_average_is_taken_and_said_unless_another_set_is_named(
    tmp_path: Path, saved: Any, average: str, raw: str
) -> None:
    found = find(tmp_path / "a.pt", saved)
    assert is_whole(found, EMA)
    assert found.note is not None
    assert f"the average {average!r} beside the weights {raw!r}" in found.note
    assert f"weights: {raw}" in found.note
    assert is_whole(find(tmp_path / "a.pt", key=raw))
    assert is_whole(find(tmp_path / "a.pt", key=average), EMA)


def test_of_several_others_one_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"several sets .*, 'student', 'teacher': choose one by"):
        find(tmp_path / "a.pt", {"student": STATE, "teacher": EMA})
    assert is_whole(find(tmp_path / "a.pt", key="teacher"), EMA)
    with pytest.raises(ValueError, match="weights must be one of 'student', 'teacher', got 'ema'"):
        find(tmp_path / "a.pt", key="ema")
    assert find(tmp_path / "a.pt", {"best": STATE, "last": STATE}).note is None


# --- what does not fit ---


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            {"net": Net(classes=5).state_dict(), "epoch": 1},
            r"2 of another shape \(fc.weight \[5, 4\] instead of \[3, 4\], .*trained for 5 classes,"
            r" and the data have 3: .*; the file has 'net' \(9 tensors: conv.weight \[4, 1, 3, 3\]"
            r".*, 'epoch' \(int\)",
        ),
        (Net(width=8).state_dict(), r"\[8, 1, 3, 3\] instead of .* of another width or size: give"),
        (Net(channels=3).state_dict(), "inputs of 3 channels, and the data have 1"),
        (
            {name: tensor for name, tensor in STATE.items() if "fc" not in name},
            r"2 of 9 tensors missing \(fc.weight, fc.bias\): it has no last layer",
        ),
        ({**STATE, "fc2.bias": torch.zeros(3)}, r"1 left over \(fc2.bias\): it is of another net"),
        ({"a": torch.zeros(2)}, "none of its tensors has a name of this one's .*; the file has 1 "),
        ({"epoch": 3, "args": argparse.Namespace()}, "no tensors by name: .*'args' .*Namespace"),
        ([3], "no tensors by name: save the weights alone, by .*; the file has list of 1"),
        (
            {name.replace("fc.", "fc.1."): tensor for name, tensor in STATE.items()},
            "last layer has another name: rename fc.1.weight to fc.weight, fc.1.bias to fc.bias in",
        ),
        (
            {**STATE, "fc.bias": torch.tensor([0.0, torch.nan, 0.0])},
            r"1 of 9 tensors have NaN \(fc.bias\): its training has diverged",
        ),
        ({}, "the file has no keys"),
    ],
)
def test_what_does_not_fit_is_described_with_its_reason(
    tmp_path: Path, saved: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find(tmp_path / "a.pt", saved)


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "none")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "it is empty"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "is HDF5, as Keras writes it"),
        (lambda p: p.write_bytes(b"\x1f\x8b0"), "gzip: unpack it first"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com"), "run `git lfs pull`"),
        (lambda p: p.write_bytes(b"<!DOCTYPE html>"), "a web page or XML"),
        (lambda p: p.write_bytes(b"noise" * 20), "no file of weights"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "no file of weights"),
        (archive, "a zip file without weights of torch.save, of readme.txt"),
        (lambda p: p.mkdir(), "it is a folder"),
        (
            lambda p: (torch.save(STATE, p), p.write_bytes(halved(p.read_bytes()))),
            "damaged or cut off",
        ),
        (
            lambda p: (save_file(STATE, p), p.write_bytes(halved(p.read_bytes()))),
            "safetensors file that is damaged or cut off",
        ),
        (
            lambda p: torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(p),
            r"TorchScript .*torch.jit.load\('a.pt'\).state_dict\(\), 'weights.pt'\)",
        ),
        (
            lambda p: torch.save(NET, p, _use_new_zipfile_serialization=False),
            r"save the weights alone, by torch.save\(model.state_dict\(\), 'weights.pt'\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_other_files_are_named_without_the_advice_of_libraries(
    tmp_path: Path, write: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as error:
        find(tmp_path / "a.pt")
    assert "weights_only" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


class Calls:
    """Is pickled as a call of a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [eval, exec, os.system, os.mkdir, pickle.loads])
def test_no_code_in_a_file_is_run(tmp_path: Path, function: Any, zipped: bool) -> None:
    trace = tmp_path / "trace"
    text = f"__import__('os').mkdir({str(trace)!r})" if function in (eval, exec) else f"{trace}"
    text = f"mkdir {trace}" if function is os.system else text
    saved = {"a": Calls(function, text), "net": STATE}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    if function is eval or function is exec or function is pickle.loads:  # an empty object
        assert is_whole(find(tmp_path / "a.pt"))
    else:
        with pytest.raises(ValueError, match=r"without running code"):
            find(tmp_path / "a.pt")
    assert not trace.exists()
