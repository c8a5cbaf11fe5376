"""No password of a path is repeated, and nothing of a foreign run folder is fetched, run or obeyed.

That a run writes and prints no key or token of its environment is in `tracking/test_online.py`.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import resource
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import capacity_run, ensemble_run, generations_run, study_run

from selfkd import budget, ensemble, generations, report, response, submit, targets
from selfkd.config import load_config, load_yaml, refuse_foreign, remember, to_tree
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    Epoch,
    GenerationResult,
    Member,
    Model,
    SearchOfSize,
    TrialResult,
    from_row,
)
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.files import link, load_json, save_json
from selfkd.tasks.images.networks import ImageNetworks


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generations", ["--set", "storage={}"]),
        ("generations", ["--set", "data.root={}"]),
        ("generations", ["--set", "data.name={}"]),
        ("generations", ["--train", "{}:f"]),
        ("generations", ["--set", "targets.root={}"]),
        ("generations", ["--resume", "{}"]),
        ("ensemble", ["--from", "{}"]),
        ("ensemble", ["--set", "members.checkpoints=[{{path: '{}', model: a}}]"]),
        ("ensemble", ["--set", "members.checkpoints=[{{path: a, model: a, classes: '{}'}}]"]),
    ],
)
@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:{}@bucket/a",
        "S3:///KEY:{}@bucket",
        "abfs://:{}@host/a",
        "ftp://a:{}@b",
        "s3://a:{}/x@b",
        "https://{}@host/a",
        "s3://a%3A{}@b",
    ],
)
@pytest.mark.parametrize("outside", [False, True])
def test_a_password_in_a_path_is_refused_and_not_repeated(
    command: str, words: list[str], uri: str, outside: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = f"x{secrets.token_hex(8)}"
    words = [word.format(uri.format(secret)) for word in words]
    if outside:
        words = ["--address", "h:1", "--", command, *words]
        assert submit.main(words) == 2
    else:
        assert {"generations": generations, "ensemble": ensemble}[command].main(words) == 2
    said = capsys.readouterr()
    assert "must have no user:password@ in its URI" in said.err
    assert secret not in said.out + said.err


@pytest.mark.parametrize("uri", ["s3://KEY:{}@b", "https://{}@h/a", "s3://b/a?key={}", "s3://b#{}"])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (report, ["{}"]),
        (report, [".", "--output", "{}"]),
        (response, ["{}"]),
        (budget, ["--from", "{}", "--teacher", "1", "--student", "1", "--price", "1"]),
        (targets, ["ls", "{}"]),
        (targets, ["gc", "{}"]),
        (targets, ["verify", "{}"]),
        (generations, ["--config", "{}"]),
        (submit, ["--address", "{}", "--", "generations"]),
    ],
)
def test_nor_is_one_by_the_commands_that_read(
    command: Any,
    words: list[str],
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = f"x{secrets.token_hex(8)}"
    assert command.main([word.format(uri.format(secret)) for word in words]) == 2
    said = capsys.readouterr()
    assert secret not in said.out + said.err
    assert list(tmp_path.iterdir()) == []


def test_nor_is_one_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SELFKD_DATA", "s3://KEY:hidden@bucket")
    assert generations.main(["--set", f"storage={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "must have no user:password@" in said
    assert "hidden" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    ["cache_dir: .", "pretrained_cfg: {url: 'http://127.0.0.1:9/x.py'}", "act_layer: os.system"],
)
def test_a_foreign_config_that_would_fetch_or_run_is_refused_at_resume(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (
        ("config.yaml", f"format: 1\nmodel:\n  name: resnet18\n  args:\n    {line}\n"),
        ("command", "generations"),
        ("run_id", "x"),
    ):
        (tmp_path / name).write_text(text)
    assert generations.main(["--resume", str(tmp_path)]) == 2
    assert "model.args: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["command", "config.yaml", "run_id"]


# --- secrets and places ---


@pytest.mark.parametrize("mark", ["?secret_key=", "#", "/a?token="])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (generations, ["--set", "storage={}"]),
        (generations, ["--set", "data.root={}"]),
        (generations, ["--set", "targets.root={}"]),
        (generations, ["--resume", "{}"]),
        (generations, ["--config", "{}"]),
        (ensemble, ["--from", "{}"]),
        (ensemble, ["--set", "members.checkpoints=[{{path: '{}', model: a}}]"]),
        (targets, ["ls", "{}"]),
        (report, ["{}"]),
        (response, ["{}"]),
        (budget, ["--from", "{}", "--teacher", "1", "--student", "1", "--price", "1"]),
    ],
    ids=lambda part: part.__name__ if hasattr(part, "__name__") else part[0] + part[-1][:12],
)
def test_a_secret_in_a_query_is_refused_and_not_repeated(
    command: Any, words: list[str], mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = f"x{secrets.token_hex(8)}"
    assert command.main([word.format(f"s3://bucket{mark}{secret}") for word in words]) == 2
    said = capsys.readouterr()
    assert "must be a URI that has no query" in said.err
    assert secret not in said.out + said.err


# --- foreign run folders ---


def foreign_run(path: Path, *settings: str) -> Path:
    """Make a run folder as somebody else would have, whose settings nobody here has asked for."""
    RunFolder.create(path, load_config(settings=settings))
    return path


@pytest.mark.parametrize(
    "setting",
    [
        "data.download=true",
        "data.name=hfds/someone/evil",
        "data.name=wds/evil",
        "targets.root=/elsewhere",
        "tracking.entity=somebody",
        "data.root=s3://somebody/data",
        "members.runs=[s3://somebody/run]",
        "members.checkpoints=[{path: 's3://somebody/x', model: resnet18}]",
        "model={name: resnet18, args: {pretrained: true}}",
        "student={name: resnet18, args: {pretrained: true}}",
        "search.space.model.args.pretrained={choice: [false, true]}",
        "capacity.values=[{pretrained: true}]",
        "study.arms={a: {set: {model.args.pretrained: true}}}",
        "data.transfer={name: hfds/somebody/data}",
        "data.transfer={name: folder, root: 's3://bucket/images'}",
        "study.arms={a: {set: {data.transfer: {name: wds/x}}}}",
        "study.arms={a: {set: {data.transfer.root: 's3://bucket/images'}}}",
    ],
)
def test_what_reaches_out_of_a_foreign_run_is_asked_for_again(
    setting: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "cache"))
    run = foreign_run(tmp_path / "run", setting)
    before = sorted(run.rglob("*"))
    assert generations.main(["--resume", str(run)]) == 2
    assert (
        "config.yaml was not written by a run of yours on this machine" in capsys.readouterr().err
    )
    assert sorted(run.rglob("*")) == before


def test_what_a_user_has_started_or_given_again_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "cache"))
    config = load_config(settings=["targets.root=/a", "data.download=true"])
    file = tmp_path / "config.yaml"
    refuse_foreign(config, file, confirmed=["targets.root", "data"])
    with pytest.raises(ConfigError, match=r"--set targets.root=/a$"):
        refuse_foreign(config, file, confirmed=["data.download"])
    remember(config)
    refuse_foreign(config, file, confirmed=[])
    with pytest.raises(ConfigError, match=r"targets.root=/b"):
        refuse_foreign(load_config(settings=["targets.root=/b"]), file, confirmed=[])


@pytest.mark.parametrize("change", ["lr: 0.05", "seed: 0", "trials: 8"])
def test_an_edited_config_is_refused(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = foreign_run(tmp_path / "run")
    file = run / "config.yaml"
    text = file.read_text()
    assert change in text
    file.write_text(text.replace(change, change.split(":")[0] + ": 3", 1))
    assert generations.main(["--resume", str(run)]) == 2
    assert f"{file} was edited where a run may not change" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["../../home/netrc", "/etc/passwd", "a/../../b", "s3://host/x", "a\\b", "a\0b"]
)
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (Model, {"hash": "a", "checkpoint": "{}"}),
        (Member, {"hash": "a", "checkpoint": "{}"}),
        (Epoch, {"epoch": 1, "checkpoint": "{}"}),
        (GenerationResult, {"generation": 0, "trial": 0, "predictions": "{}"}),
        (Model, {"hash": "{}", "checkpoint": "a"}),
        (TrialResult, {"stage": "{}", "trial": 0, "seed": 1, "status": "completed"}),
        (SearchOfSize, {"value": 1, "parameters": 1, "search": "{}"}),
    ],
)
def test_a_name_in_a_row_stays_within_the_folder(
    kind: type[Any], row: dict[str, Any], name: str
) -> None:
    filled = {key: name if value == "{}" else value for key, value in row.items()}
    with pytest.raises(ValueError, match=r"must be a file within|should match pattern"):
        from_row(kind, filled)


@pytest.mark.parametrize(
    "key", ["data.root", "data.name", "targets.root", "storage", "members.runs", "tracking.mode"]
)
def test_a_point_sets_nothing_that_cannot_be_searched(key: str) -> None:
    row = {"generation": 1, "trial": 0, "point": {key: "x"}}
    with pytest.raises(ValueError, match="must have keys that can be searched"):
        from_row(GenerationResult, row)


def test_a_symlink_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    run = RunFolder(foreign_run(tmp_path / "run"))
    secret = tmp_path / "netrc"
    secret.write_text("password")
    secret.chmod(0o600)
    (run.path / "student.safetensors").symlink_to(secret)
    (run.path / "inner").symlink_to(run.path / "config.yaml")
    with pytest.raises(ValueError, match="must be a file within"):
        run.file("student.safetensors")
    assert run.file("inner").exists()


# --- modes ---


def test_the_mode_of_what_was_hard_linked_stays(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("x")
    mine.chmod(0o600)
    link(mine, tmp_path / "run" / "student")
    assert mine.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "run" / "student").read_text() == "x"


def test_files_of_a_group_share_are_the_groups(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        save_json(tmp_path / "a" / "row.json", [])
        save_tensors(tmp_path / "a" / "student.safetensors", {"w": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o775
    for path in (tmp_path / "a").iterdir():
        assert path.stat().st_mode & 0o777 == 0o664


def test_a_share_that_refuses_modes_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    save_tensors(tmp_path / "student.safetensors", {"w": torch.zeros(2)}, {})
    assert load_tensors(tmp_path / "student.safetensors")[0]["w"].shape == (2,)


# --- odd files ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b"[" * 60 + b"]" * 60, "nested too deeply"),
        (b'{"a": 1e309}', "numbers must fit 64 bits"),
        (b'{"a": -1e999}', "numbers must fit 64 bits"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "numbers must fit 64 bits"),
        (b'{"a": 18446744073709551616}', "numbers must fit 64 bits"),
        (b'"\xff\xfe"', "can't decode"),
        (b"", "Expecting value"),
    ],
    ids=[
        "200,000 levels",
        "60 levels",
        "1e309",
        "-1e999",
        "5,001 digits",
        "2^64",
        "bytes",
        "empty",
    ],
)
def test_json_that_would_harm_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_json(path)
    assert str(path) in str(error.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "result.json"
    os.mkfifo(pipe)
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for path in (pipe, tmp_path / "zero", tmp_path / "folder"):
        with pytest.raises(ValueError, match="is a folder, pipe or device"):
            load_json(path)
        with pytest.raises(ValueError, match="is a folder, pipe or device"):
            load_tensors(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with path.open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(ValueError, match="must have at most"):
        load_json(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1]\nb: *a\n",
        "a: &a {b: 1}\nc:\n  <<: *a\n",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
    ],
)
def test_no_loader_takes_aliases(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(text)
    run = foreign_run(tmp_path / "run")
    (run / "config.yaml").write_text(text)
    for words in (
        ["--config", str(file)],
        ["--set", f"params={{{text.splitlines()[0]}, z: *a}}"],
        ["--resume", str(run)],
    ):
        assert generations.main(words) == 2
        assert "aliases (*name) are not allowed" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="aliases"):  # of class names, of a runtime environment
        load_yaml(file)


# --- foreign checkpoints ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageNetworks, Path]:
    config = load_config(settings=["model={name: selfkd_mlp, args: {width: 4}}"])
    task = ImageNetworks(to_tree(config))
    path = tmp_path_factory.mktemp("checkpoint") / "student.safetensors"
    task.save(path, task.make(config.model), config.model, {})
    return task, path


@pytest.mark.parametrize(
    "facts",
    [
        {"model": {"name": "selfkd_mlp", "args": {"width": 10**9}}},
        {"model": {"name": "selfkd_mlp", "args": {"width": 4, "depth": 10**8}}},
        {"model": {"name": "selfkd_mlp", "args": {"width": 9000}}},
        {"model": {"name": "vit_giant_patch14_224", "args": {}}},
        {"model": {"name": "hf-hub:somebody/evil", "args": {}}},
        {"model": {"name": "local-dir:/tmp", "args": {}}},
        {"model": {"name": ["selfkd_mlp"], "args": {}}},
        {"model": {"name": "selfkd_mlp", "args": {"width": [[4]]}}},
        {"model": "selfkd_mlp"},
        {"classes": []},
        {"classes": [[1]]},
        {"classes": ["0"] * 10},
        {"mean": "x"},
        {"std": [float("nan")]},
        {"mean": []},
    ],
    ids=lambda facts: str(facts)[:60],
)
def test_a_checkpoint_whose_metadata_lie_is_named_and_takes_no_memory(
    checkpoint: tuple[ImageNetworks, Path], tmp_path: Path, facts: dict[str, Any]
) -> None:
    task, whole = checkpoint
    tensors, known = load_tensors(whole)
    known.pop("hash")
    path = tmp_path / "student.safetensors"
    save_tensors(path, tensors, known | facts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError, match=r"cannot be rebuilt|was trained for other classes"
    ) as error:
        task.load(str(path))
    assert str(path) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("name", ["pretrained", "cache_dir", "pretrained_cfg", "checkpoint_path"])
def test_where_weights_come_from_is_left_out_of_a_foreign_network(
    checkpoint: tuple[ImageNetworks, Path], tmp_path: Path, name: str
) -> None:
    task, whole = checkpoint
    tensors, known = load_tensors(whole)
    known.pop("hash")
    known["model"]["args"][name] = {"url": "http://127.0.0.1:9/x.py"}
    path = tmp_path / "student.safetensors"
    save_tensors(path, tensors, known)
    assert task.load(str(path))[1].model["args"] == {"width": 4}


CONTROLS = "\x1b]0;x\x07\x1b[2J\x9b31m\u202e\u2066\u200f\udcff\rx\nerror: forged"
FORMULA = '=HYPERLINK("http://127.0.0.1:9","x")'
TEXTS = ("error", "verdict", "name", "title", "stopped", "unit", "key", "value")


def _foreign(value: Any, text: str) -> Any:
    """Return rows whose texts for people are another's."""
    if isinstance(value, list):
        return [_foreign(part, text) for part in value]
    if not isinstance(value, dict):
        return value
    changed = {key: _foreign(part, text) for key, part in value.items()}
    for key, part in value.items():
        if key in TEXTS and isinstance(part, str):
            changed[key] = text + part
        elif key in ("sentences", "said", "classes", "problems") and isinstance(part, list):
            changed[key] = [text + str(each) for each in part] + [text]
    return changed


def _make_foreign(run: Path, text: str) -> None:
    for path in run.rglob("*.json"):
        path.write_text(json.dumps(_foreign(json.loads(path.read_text()), text)))


@pytest.mark.parametrize("kind", [generations_run, ensemble_run, capacity_run, study_run])
def test_no_text_of_a_foreign_run_controls_the_terminal(
    kind: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = kind(tmp_path / "run")
    _make_foreign(run, CONTROLS)
    run = run.rename(tmp_path / "a\udcff\x1b[31m\u202e")
    (run / "generation_000" / "trial_009").mkdir(parents=True)
    (run / "generation_000" / "trial_009" / "result.json").write_text(f'{{"{CONTROLS[:9]}')
    for command in (
        lambda: report.main([str(run)]),
        lambda: report.main([str(run), "--format", "table"]),
        lambda: report.main([str(run), "--format", "csv"]),
        lambda: report.main([str(run), "--format", "json"]),
        lambda: report.main([str(run), "--format", "table", "--output", str(tmp_path / "table")]),
        lambda: response.main([str(run)]),
        lambda: budget.main(["--from", str(run)]),
        lambda: targets.main(["ls", str(run)]),
    ):
        command()
        said = capsys.readouterr()
        for line in (said.out + said.err).split("\n"):
            assert line.isprintable()
            assert not line.startswith("error: forged")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in page.split("\n"))
    assert all(line.isprintable() for line in (tmp_path / "table").read_text().split("\n"))


@pytest.mark.parametrize(
    "text", [FORMULA, "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1"]
)
@pytest.mark.parametrize("kind", [ensemble_run, capacity_run, study_run])
def test_no_text_of_a_foreign_run_is_a_formula(
    kind: Callable[[Path], Path], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = kind(tmp_path / "run")
    _make_foreign(run, text)
    run = run.rename(tmp_path / FORMULA.replace("/", "_"))
    assert report.main([str(run), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows
    for row in rows:
        for cell in row.values():
            if cell.lstrip()[:1] in ("=", "+", "-", "@", "\uff1d"):
                float(cell)  # a number, which stays what it is
    assert rows[0]["run"].startswith("'=HYPERLINK")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--name", "a\udcff"], "name"),
        (["--resume", "a\udcff"], "--resume"),
        (["--set", "storage=a\udcff"], "--set"),
        (["--config", "a\udcff"], "--config"),
    ],
)
def test_a_name_that_is_no_utf8_is_refused_and_shown_safely(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generations.main([*words, "--set", f"storage={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {named} must be UTF-8, got ")
    assert "a\\udcff" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["generation_009", "targets", "wandb", "wandb/done.txt", "generation_000/trial_000/x"]
)
@pytest.mark.parametrize("kind", ["symlink", "pipe"])
def test_a_foreign_run_is_not_continued_through_symlinks_or_pipes(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = generations_run(tmp_path / "run", done=2), tmp_path / "mine"
    odd = run / name
    odd.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(odd)
    elif odd.suffix:
        mine.write_text("mine")
        odd.symlink_to(mine)
    else:
        mine.mkdir()
        odd.symlink_to(mine)
    assert generations.main(["--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{odd} must be a file or folder of the run folder" in said
    assert mine.is_file() or not mine.exists() or not any(mine.iterdir())


def test_a_run_whose_symlinks_stay_in_it_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = generations_run(tmp_path / "run")
    logs = run / "wandb" / "run-1" / "logs"
    logs.mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "core.log").touch()
    (logs / "debug-core.log").symlink_to(tmp_path / "core.log")  # W&B does so
    (tmp_path / "other name").symlink_to(run)
    assert generations.main(["--resume", str(tmp_path / "other name")]) == 0
    assert capsys.readouterr().err == ""
