"""Remote storage over the S3 protocol: paths, files, stores, and a whole run."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_here
from engine import make_run
from s3_server import BUCKET, s3_server

import selfkd
from selfkd.config import Config, load_config
from selfkd.errors import ConfigError
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.generations import main
from selfkd.soft_targets.manifest import Manifest, data_key, load_manifest
from selfkd.soft_targets.shards import check_shard, write_shard
from selfkd.soft_targets.store import open_store
from selfkd.soft_targets.upkeep import list_stores
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.files import fetch, link, load_json, remove_tree, replace, save_json
from selfkd.storage.lock import Lock
from selfkd.storage.remote import RemotePath, _file_system, as_path
from selfkd.training.progress import Progress
from selfkd.training.ranks import Ranks


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        _file_system.cache_clear()
        yield environment | {"SELFKD_CACHE": os.environ["SELFKD_CACHE"]}
    _file_system.cache_clear()


@pytest.fixture
def root(bucket: dict[str, str], request: pytest.FixtureRequest) -> Path:
    return as_path(f"s3://{BUCKET}/{re.sub(r'[^a-z]', '', request.node.name)}")


@pytest.mark.parametrize("text", ["s3://bucket/a/b", "gs://bucket/a", "hdfs://host/a"])
def test_a_uri_is_unchanged(text: str) -> None:
    path = as_path(text)
    assert str(path) == str(as_path(str(path))) == str(pickle.loads(pickle.dumps(path))) == text
    assert path.absolute() == path == path.expanduser()
    assert str(path.parent / path.name) == text
    assert str(as_path(Path(text))) == text  # pathlib makes one slash of two


def test_a_local_path_is_a_pathlib_path() -> None:
    assert type(as_path("runs/a")) is type(Path())
    assert str(as_path("/runs/a:b")) == "/runs/a:b"


def test_unsupported_methods_of_a_remote_path_raise(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    path = as_path("s3://bucket/a")
    for misuse in (path.open, lambda: path.write_text("x"), lambda: os.listdir(path)):
        with pytest.raises(TypeError, match="s3://bucket/a is not a local file"):
            misuse()
    assert not any(tmp_path.iterdir())


def test_files(root: Path, tmp_path: Path) -> None:
    path = root / "folder" / "row.json"
    assert not path.exists()
    assert not root.exists()
    with pytest.raises(FileNotFoundError):
        load_json(path)
    save_json(path, {"a": 1})
    save_json(path, {"a": 2})
    assert load_json(path) == {"a": 2}
    assert path.is_file()
    assert root.is_dir()
    assert not path.is_dir()
    assert list(root.glob("*/row.json")) == [path] == list(root.rglob("row.json"))
    assert list(root.glob("*/")) == [root / "folder"] == list(root.iterdir())
    assert path.stat().st_size == len('{\n "a": 2\n}\n')
    link(path, root / "again.json")
    link(path, tmp_path / "local.json")
    link(tmp_path / "local.json", root / "up.json")
    for copy in (root / "again.json", tmp_path / "local.json", root / "up.json"):
        assert load_json(copy) == {"a": 2}
    path.unlink()
    path.unlink(missing_ok=True)
    assert not path.exists()
    remove_tree(root)
    assert not (root / "again.json").exists()


def test_a_write_that_fails_leaves_nothing(root: Path) -> None:
    def write(temporary: str) -> None:
        Path(temporary).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(root / "a", write)
    assert not (root / "a").exists()


def test_a_copy_is_fetched_once_and_again_when_the_file_has_changed(root: Path) -> None:
    path = root / "a.json"
    save_json(path, [1])
    first = fetch(path)
    assert fetch(path) == first
    assert load_json(first) == [1]
    save_json(path, [1, 2])
    assert load_json(fetch(path)) == [1, 2]


def test_checkpoints_and_stores(root: Path) -> None:
    tensors = {"w": torch.randn(3, 4)}
    digest = save_tensors(root / "a.safetensors", tensors, {"n": 1})
    loaded, facts = load_tensors(root / "a.safetensors")
    assert torch.equal(loaded["w"], tensors["w"])
    assert facts == {"n": 1, "hash": digest}

    key = data_key("images", {})
    manifest = Manifest(
        teacher="t", data=key, fingerprint="images", recipe={}, views=1, images=10, classes=3,
        shard_size=6,
    )  # fmt: skip
    logits = torch.randn(10, 3)
    for shard in range(2):
        rows = manifest.rows(shard)
        write_shard(root, manifest, view=0, shard=shard, logits=logits[rows.start : rows.stop])
        assert check_shard(root, manifest, view=0, shard=shard) == "whole"
    stored = open_store(root, ["t"], data=key)(torch.tensor([9, 0, 5]), 0)
    expected = (logits - logits.amax(1, keepdim=True))[[9, 0, 5]].half()
    assert torch.equal(stored, expected)
    (info,) = list_stores(root)
    assert (info.present, info.expected) == (2, 2)


def progress(path: Path) -> Progress:
    return Progress(path, made_from={}, seconds=None, epochs=None, ranks=Ranks())


@pytest.mark.parametrize("read", [load_tensors, progress, lambda at: load_manifest(at, "a", "b")])
def test_a_storage_that_does_not_respond_is_retried(
    read: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow reports a network failure as an OSError without an errno."""
    results: list[bool | OSError] = [OSError("AWS Error NETWORK_CONNECTION"), False]

    def exists(self: RemotePath) -> bool:
        result = results.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr(RemotePath, "exists", exists)
    if read is progress:
        assert read(as_path("s3://b/file")).state is None
    else:
        with pytest.raises(FileNotFoundError, match="no such"):
            read(as_path("s3://b/file"))
    assert results == []


def test_an_interrupted_download_is_retried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faults = [OSError("AWS Error NETWORK_CONNECTION")]

    def download(self: RemotePath, local: Path) -> None:
        local.write_text("half")
        if faults:
            raise faults.pop()
        local.write_text("whole")

    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path))
    monkeypatch.setattr(RemotePath, "stat", lambda self: os.stat(os.devnull))
    monkeypatch.setattr(RemotePath, "download", download)
    assert fetch(as_path("s3://b/file")).read_text() == "whole"


def test_one_driver_at_a_time(root: Path) -> None:
    folder = RunFolder.create(root / "run", Config())
    with Lock(folder.path), pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
        Lock(folder.path).__enter__()
    with Lock(folder.path):
        pass


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("storage=ftp://host/runs", "storage: must be a folder that all nodes see, or a URI"),
        ("storage=s3://b?endpoint_override=x", "has no query, got 's3://b'"),
    ],
)
def test_bad_uris(setting: str, message: str) -> None:
    from selfkd.config import load_config

    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(settings=[setting])


def test_a_missing_bucket_is_reported_at_once(bucket: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"run folder s3://nowhere/a must be writable: .*bucket"):
        RunFolder.create(as_path("s3://nowhere/a"), Config())


def test_a_run_lives_in_a_bucket(bucket: dict[str, str], tmp_path: Path) -> None:
    """Made by the command, then resumed for one more generation without Ray."""
    settings = [f"storage=s3://{BUCKET}/runs", "model.args={width: 4}", "train.epochs=2"]
    settings += ["search.trials=1", "confirm.seeds=0", "tracking=offline"]
    sets = [part for setting in settings for part in ("--set", setting)]
    done = run_here(main, tmp_path, "--rounds", "1", "--name", "a", *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"--resume s3://{BUCKET}/runs/a --rounds 2" in done.stdout
    path = as_path(f"s3://{BUCKET}/runs/a")
    assert isinstance(path, RemotePath)
    assert json.loads((path / "summary.json").read_text())["ensemble"]["test_accuracy"] > 0
    assert list((path / "wandb").rglob("run-*.wandb"))
    assert not (path / "lock.json").exists()
    assert not any(tmp_path.iterdir())  # nothing was written here

    folder, config = RunFolder.open(path)
    before = folder.results()
    born_again(make_run(dataclasses.replace(config, rounds=2), folder))
    results = folder.results()
    assert [result.generation for result in results] == [0, 1, 2]
    assert results[:2] == before
    assert results[2].teachers[0].hash == before[1].hash
    _, facts = load_tensors(path / "generation_002" / "student.safetensors")
    assert facts["hash"] == results[2].hash


def test_a_model_is_loaded_from_a_bucket(root: Path, tmp_path: Path) -> None:
    """Of a run folder only what is needed is fetched, and nothing that leads out of it."""
    settings = [
        "model={name: selfkd_mlp, args: {width: 4, depth: 1}}",
        "train.epochs=1",
        "rounds=1",
    ]
    settings += ["search.trials=1", "confirm.seeds=0"]
    config = load_config(settings=settings)
    folder = RunFolder.create(tmp_path / "run", config)
    born_again(make_run(config, folder))
    for file in folder.path.rglob("*"):
        if file.is_file() and file.name != "best.safetensors":
            link(file, root / file.relative_to(folder.path))
    here, there = selfkd.load(folder.path), selfkd.load(str(root))
    assert here.checkpoint == there.checkpoint
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    assert torch.equal(here.predict(images).probabilities, there.predict(images).probabilities)
    assert "s3://" not in there.card
    there.save(str(root / "exported"))
    assert selfkd.load(str(root / "exported")).checkpoint == here.checkpoint
    with pytest.raises(ValueError, match="generation must be one of the 2 that are finished"):
        selfkd.load(str(root), generation=5)
    with pytest.raises(ValueError, match=r"run must be a run folder .* got s3://bucket/nowhere"):
        selfkd.load(f"s3://{BUCKET}/nowhere")
