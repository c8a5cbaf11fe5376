"""`python -m selfkd.targets` on real stores: what it lists, finds wrong and clears out."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from selfkd.config import load_config, to_tree
from selfkd.soft_targets.upkeep import remember_user
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.targets import main
from selfkd.worker.jobs import run_job

SETTINGS = [
    "model={name: selfkd_mlp, args: {width: 8, depth: 1}}",
    "train={epochs: 1, batch_size: 50}",
    "data={train_size: 200, jitter: 1, views: 2}",
    "targets.shard_size=150",
]


@pytest.fixture(params=[None, 3])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run folder with a teacher and its cached logits: two views of two shards."""
    top_k = request.param
    config = to_tree(load_config(settings=[*SETTINGS, f"targets.top_k={top_k or 'null'}"]))
    folder = tmp_path / "run"
    checkpoint = folder / "student.safetensors"
    row = {"stage": "members", "seed": 0, "model": config["model"], "teachers": []}
    list(run_job("train", {"config": config, **row, "targets": "", "student": str(checkpoint)}))
    (folder / "config.yaml").touch()
    for view in range(2):
        for shard in range(2):
            place = {"view": view, "shard": shard, "run": str(folder)}
            where = {"checkpoint": str(checkpoint), "targets": str(folder / "targets")}
            payload = {"config": config, **where, **place}
            assert list(run_job("cache_teacher_logits", payload)) == [{"state": "written"}]
    return folder


def shards(run: Path) -> list[Path]:
    return sorted(run.glob("targets/*/*/view_*/shard_*.safetensors"))


def test_ls_lists_what_is_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(run)]) == 0
    printed = capsys.readouterr().out
    (store,) = run.glob("targets/*/*")
    row = next(line for line in printed.splitlines() if store.name in line)
    assert row.split()[:4] == [store.parent.name, store.name, "200", "2"]
    assert row.split()[-3:-1] == ["4/4", "0.0"]
    assert "1 stores" in printed


def test_verify_runs_the_teacher_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run / "targets"), "--rows", "5"]) == 0
    assert "5 rows a view are as the teacher predicts" in capsys.readouterr().out


def test_verify_names_a_row_that_the_teacher_does_not_predict(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shards(run)[3]  # of the second view: images 150 to 199
    tensors, facts = load_tensors(path)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    name = "logits" if "logits" in changed else "values"
    changed[name][:, 1] -= 0.5
    save_tensors(path, changed, {k: v for k, v in facts.items() if k != "hash"})
    assert main(["verify", str(run)]) == 1
    assert re.search(r"row 1[5-9]\d of view 1 differs by ", capsys.readouterr().out)


def test_verify_finds_a_flipped_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards(run)[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(run)]) == 1
    assert "shard 1 of view 0 is damaged" in capsys.readouterr().out


def test_verify_finds_another_teacher(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "student.safetensors"
    tensors, facts = load_tensors(checkpoint)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_tensors(checkpoint, other, {k: v for k, v in facts.items() if k != "hash"})
    assert main(["verify", str(run)]) == 1
    assert "is not the teacher whose logits are cached" in capsys.readouterr().out


def test_verify_says_when_the_teacher_is_gone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "student.safetensors").unlink()
    assert main(["verify", str(run)]) == 2
    assert "cannot be checked: its checkpoint" in capsys.readouterr().out


def test_gc_keeps_what_a_run_refers_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", str(run), "--yes"]) == 0
    assert len(shards(run)) == 4
    assert "removed 0 stores" in capsys.readouterr().out


@pytest.mark.parametrize(
    "named",
    [
        *("{}", "[]", '{"run": "runs/x"}', '{"run": "s3://b/x"}', '{"run": "/a\\u0000b"}'),
        *('{"run": "/' + "a" * 5000 + '"}', "folder", "pipe", "dangling", "linked folder"),
    ],
)
def test_gc_keeps_what_some_run_may_refer_to(
    run: Path, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = run.glob("targets/*/*/used_by/*.json")
    record.unlink()
    if named == "folder":
        record.mkdir()
    elif named == "pipe":
        os.mkfifo(record)
    elif named == "dangling":
        record.symlink_to(run / "none")
    elif named == "linked folder":
        record.parent.rename(run / "used_by")
        record.parent.symlink_to(run / "used_by")
    else:
        record.write_text(named)
    assert main(["gc", str(run), "--yes"]) == 0
    assert "removed 0 stores" in capsys.readouterr().out
    assert main(["ls", str(run)]) == 0
    assert len(shards(run)) == 4


def test_gc_of_a_run_follows_no_symlink(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "targets").rename(run.parent / "others")
    (run / "targets").symlink_to(run.parent / "others")
    shutil.move(run, run.parent / "elsewhere")
    assert main(["gc", str(run.parent / "elsewhere"), "--yes"]) == 2
    assert "PATH must hold no symlink" in capsys.readouterr().err
    assert any((run.parent / "others").glob("*/*/view_000/*"))


def test_gc_removes_what_no_run_refers_to_after_asking(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shutil.move(run / "targets", shared)
    shutil.rmtree(run)
    assert main(["gc", str(shared)]) == 2  # no terminal to ask on
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter(["n", "y"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(answers))
    assert main(["gc", str(shared)]) == 0
    assert list(shared.rglob("*.safetensors"))
    assert main(["gc", str(shared)]) == 0
    assert "removed 1 stores" in capsys.readouterr().out
    assert not list(shared.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "nowhere"], "PATH must be a targets folder or a run folder, got nowhere"),
        (["verify", "."], "PATH must hold soft targets"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_shard_is_read_as_it_was_written(run: Path) -> None:
    """The file is what safetensors reads: anyone's tools can."""
    tensors = load_file(shards(run)[0])
    assert {tensor.shape[0] for tensor in tensors.values()} == {150}


def test_text_of_teachers_is_listed_and_cleared_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a run folder, or in the folder of targets of several runs."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    store = folder / "written" / ("a" * 16) / ("b" * 16)
    remember_user(folder / "written", store.parent.name, store.name, folder)
    for shard in range(2):
        (store / f"shard_{shard:05d}.jsonl").write_text("{}\n")
    (store / "notes.md").touch()
    for command in (["ls"], ["verify"], ["gc", "--yes"]):
        assert main([*command, str(folder)]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"{store.parent.name} +{store.name} +text +2/2 +0\.0 +1 *\n", printed)
    assert f"{store.parent.name}/{store.name}: text, whose hashes" in printed
    assert "removed 0 stores" in printed
    shared = folder.rename(tmp_path / "shared")  # a run that is gone
    (shared / "config.yaml").unlink()
    assert main(["gc", "--yes", str(shared)]) == 0
    assert "removed 1 stores" in capsys.readouterr().out
    assert [path.name for path in shared.rglob("*") if path.is_file()] == ["notes.md"]
