"""`python -m selfkd.targets` on real stores: what it lists, finds wrong and clears out."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from engine import Count, make_run
from safetensors.torch import load_file

from selfkd.config import Config, load_config, to_tree
from selfkd.experiments.ensemble import compress
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.study import compare_arms
from selfkd.results import FORMAT, TeacherTargets, from_row
from selfkd.soft_targets.upkeep import remember_user
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.rows import save_row
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


# --- show ---

FINISHED = [
    "data.train_size=60",
    "model={name: selfkd_mlp, args: {width: 8, depth: 1}}",
    "train={epochs: 1, batch_size: 20}",
    "search.trials=1",
    "confirm.seeds=0",
]


def finish(folder: Path, *settings: str, command: str = "generations") -> RunFolder:
    """Return a finished run."""
    config: Config = load_config(settings=[*FINISHED, *settings])
    place = RunFolder.create(folder, config, command=command)
    recipe = {"generations": born_again, "ensemble": compress, "study": compare_arms}[command]
    recipe(make_run(config, place, Count()))  # type: ignore[operator]
    return place


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = ["rounds=2", "data.jitter=1", "data.views=2", "targets.top_k=4"]
    return finish(tmp_path_factory.mktemp("shown") / "run", *settings)


def show(capsys: pytest.CaptureFixture[str], folder: RunFolder, *flags: str) -> TeacherTargets:
    assert main(["show", str(folder.path), *flags, "--format", "json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row.pop("format") == FORMAT
    return from_row(TeacherTargets, row)


def test_show_prints_what_a_teacher_knows(
    lineage: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfkd.targets.run_job", None)  # no teacher is run
    flags = ("--generation", "2", "--temperatures", "1", "3.5", "--at", "2")
    assert main(["show", str(lineage.path), *flags]) == 0
    printed = capsys.readouterr().out
    assert "soft targets of generation 1, which generation 2 is distilled from, on 60" in printed
    assert "the 4 largest of 10 logits are cached" in printed
    assert "share of the wrong mass at T 2" in printed
    assert re.search(r"^ 3\.5 +\d\.\d{3} +\d\.\d{3} +0\.\d{3} *$", printed, re.MULTILINE)
    assert all(len(line) <= 80 for line in printed.splitlines() if line.startswith(" "))
    found = show(capsys, lineage, *flags)
    assert found.hashes == (lineage.results()[1].hash,)
    assert [row.temperature for row in found.softness] == [1, 3.5]


def test_show_says_what_the_run_has_kept(
    lineage: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = from_row(TeacherTargets, json.loads((lineage.path / "teacher.json").read_text()))
    found = show(capsys, lineage)
    assert (found.teacher, found.softness) == (kept.teacher, kept.softness)
    assert (found.shares, found.near) == (kept.shares, kept.near)


def test_show_caches_again_what_is_gone(
    lineage: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = show(capsys, lineage)
    shutil.rmtree(lineage.path / "targets")
    assert main(["show", str(lineage.path)]) == 2
    message = capsys.readouterr().err
    assert f"the cached logits of {before.teacher} are gone" in message
    assert "add --cache, which runs it once on the training items" in message
    assert show(capsys, lineage, "--cache") == before
    assert show(capsys, lineage) == before
    assert main(["verify", str(lineage.path)]) == 0


def test_show_of_an_ensemble_says_how_its_members_disagree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finish(tmp_path / "run", "members=2", command="ensemble")
    assert main(["show", str(folder.path)]) == 0
    printed = capsys.readouterr().out
    assert "soft targets of the ensemble of 2 members, which the student is distilled" in printed
    assert "two members predict different classes on" in printed
    found = show(capsys, folder)
    assert found.disagreement is not None
    assert len(found.disagreement.agreement) == 2


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ("", ["--generation", "0"], "--generation must be from 1 to 2, got 0, which has no teac"),
        ("", ["--generation", "3"], "--generation must be from 1 to 2, got 3"),
        ("", ["--arm", "a"], "--arm is of runs of selfkd.study, got a and"),
        ("distill.live=true", [], "are not cached: distill.live is true"),
        (
            "distill.terms=[{name: hint, student: net.0, teacher: net.0}]",
            *([], "are not cached: distill.terms compares layers, so that its teachers run"),
        ),
        ("function", [], "are not cached: its training function, x:main, runs its teachers"),
        ("", ["--set", "data.train_size=50"], "the cached logits of generation"),
    ],
)
def test_what_cannot_be_shown(
    lineage: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    flags: list[str],
    message: str,
) -> None:
    folder = lineage
    if settings:
        folder = RunFolder(shutil.copytree(lineage.path, tmp_path / "run"))
        if settings == "function":
            save_row(folder.path / "data.json", replace(folder.facts, function="x:main"))
        else:
            folder.save_config(load_config(settings=[*FINISHED, "rounds=2", settings]))
    assert main(["show", str(folder.path), *flags]) == 2
    assert message in capsys.readouterr().err


HINT = "{distill.terms: [{name: hint, student: features.2}]}"
ARMS = f"{{labels: {{}}, hint: {{teacher: labels, set: {HINT}}}, logits: {{teacher: labels}}}}"


def test_of_a_study_with_terms_the_first_cached_teacher_is_shown_and_its_transfer_set_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["data.transfer={name: digits, size: 30}", "confirm.seeds=2", f"study.arms={ARMS}"]
    folder = finish(tmp_path / "run", *settings, command="study")
    assert show(capsys, folder).students == "arm logits"
    assert (folder.path / "teacher.json").exists()
    assert main(["show", str(folder.path), "--arm", "hint"]) == 2
    assert "distill.terms compares layers" in capsys.readouterr().err
    assert main(["verify", str(folder.path), "--rows", "3"]) == 0
    assert capsys.readouterr().out.count("as the teacher predicts") == 4  # 2 seeds, 2 sets each


def test_a_run_without_cached_logits_is_called_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.create(tmp_path / "run", load_config(), command="generations")
    assert main(["verify", str(folder.path)]) == 2
    assert "a run whose teachers' logits are not cached" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_a_temperature_is_above_0(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["show", "run", "--temperatures", value])
    assert error.value.code == 2
    assert f"must be above 0, got {value}" in capsys.readouterr().err


def test_show_is_of_a_run_that_has_a_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(tmp_path)]) == 2
    assert "must be a run folder (with a config.yaml)" in capsys.readouterr().err
    config = load_config(settings=["confirm.seeds=0"])
    for command, message in (
        ("generations", "must have a finished generation 1, got none yet"),
        ("ensemble", "must have its teachers (members), got none yet"),
        ("study", "must have an arm with a teacher, got none"),
        ("deploy", "a run of selfkd.deploy: give the run that its model is from"),
    ):
        folder = RunFolder.create(tmp_path / command, config, command=command)
        assert main(["show", str(folder.path)]) == 2
        assert message in capsys.readouterr().err
