"""What students need of their teachers: cached logits or written text, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from engine import Recorder, make_run

from selfkd.cli.plan import plan_generations, plan_study
from selfkd.cli.print_plan import print_plan
from selfkd.cli.tables import summary_table
from selfkd.config import Config, load_config
from selfkd.errors import RunError
from selfkd.experiments.ensemble import compress
from selfkd.experiments.export import describe_lineage
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.study import compare_arms
from selfkd.reporting.words import describe_ensemble
from selfkd.results import Facts, Model, Row, StudySummary, TaskStarted, Written, to_row

SETTINGS = [
    *("train.epochs=2", "search.trials=2", "rounds=1", "confirm.seeds=0", "tracking=none"),
    *("distill.mode=traces", "targets.shard_size=60", "write.samples=2"),
]
ARMS = (
    "{a: {}, b: {teacher: a, set: {distill.mode: traces}}, c: {teacher: a}, "
    "d: {teacher: a, set: {distill.mode: traces, write.keep: right}}}"
)


class Fake:
    """Does jobs without training; of each part of 20 texts so many are right."""

    def __init__(self, right: int | None = 19) -> None:
        self.right = right
        self.jobs: list[tuple[str, Mapping[str, Any]]] = []

    def __call__(self, kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        self.jobs.append((kind, payload))
        if kind == "check":
            yield {
                "facts": to_row(Facts(items={"train": 100, "test": 9}, metric="nll", mode="min"))
            }
        elif kind == "train":
            student = Path(payload["student"])
            student.parent.mkdir(parents=True, exist_ok=True)
            student.write_text(f"{payload['stage']}-{payload['seed']}")
            digest = student.read_text()
            yield {"epoch": 2, "val_nll": 1.0, "seconds": 2.0, "hash": digest}
        elif kind == "write":
            yield {"state": "written", **to_row(Written(texts=20, cut=1, right=self.right))}
        elif kind == "cache_teacher_logits":
            yield {"state": "written"}
        elif kind == "evaluate":
            yield {"hash": Path(payload["student"]).read_text(), "test_nll": 1.0}
        elif kind == "average":
            yield {"rows": [{"hash": "all", "test_nll": 1.0}] * len(payload["ensembles"])}
        elif kind == "time":
            yield {"rows": [{"parameters": 1}] * len(payload["models"])}
        elif kind == "examples":
            yield {}

    def kinds(self, kind: str) -> list[Mapping[str, Any]]:
        return [payload for name, payload in self.jobs if name == kind]


def start(folder: Path, *settings: str) -> tuple[Config, RunFolder]:
    config = load_config(settings=[*SETTINGS, *settings], flags={"task": "text"})
    return config, RunFolder.create(folder / "run", config)


def test_the_teacher_writes_before_its_students_are_trained(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    fake, events = Fake(), Recorder()
    summary = born_again(make_run(config, folder, fake, events))
    written = fake.kinds("write")
    assert [payload["shard"] for payload in written] == [0, 1, 2, 3]  # two parts, two texts each
    places = {payload["targets"] for payload in [*written, *fake.kinds("train")]}
    assert places == {str(folder.path / "written")}
    assert not fake.kinds("cache_teacher_logits")
    assert "generation 1: text of the teachers" in [e.title for e in events.of(TaskStarted)]
    said = "generation 1: the teacher has written 80 texts, 95.0 % of them right; 4 did not end"
    assert events.notes[-1].startswith(said)
    first, second = summary.generations
    assert (first.written, second.written) == (None, Written(texts=80, cut=4, right=76))
    assert (second.temperature, second.alpha, second.point) == (None, None, {})
    assert summary_table(summary, "nll").head == ("generation", "test NLL")


def test_text_lies_in_the_folder_of_targets_where_one_is_given(tmp_path: Path) -> None:
    config, folder = start(tmp_path, f"targets.root={tmp_path / 'shared'}")
    fake = Fake()
    born_again(make_run(config, folder, fake))
    (place,) = {payload["targets"] for payload in fake.kinds("write")}
    assert place == str(tmp_path / "shared" / "written")


def test_a_teacher_that_is_never_right_ends_a_run_that_keeps_what_is_right(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "write.keep=right")
    with pytest.raises(RunError) as error:
        born_again(make_run(config, folder, Fake(right=0)))
    assert str(error.value) == (
        "generation 1: write.keep right needs a text that is right, got 0 of 80 by "
        "generation_000/student.safetensors: start a new run with write.keep=all, or with a "
        "better teacher (more train.steps, a larger model)"
    )
    assert folder.results()[0].hash  # which is kept


def test_all_members_of_an_ensemble_write(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "members=3", "members.use=2")
    fake = Fake()
    summary = compress(make_run(config, folder, fake))
    assert len(fake.kinds("write")) == 2 * 4
    assert summary.teacher.written == Written(texts=160, cut=8, right=152)
    assert (summary.chosen.temperature, summary.chosen.alpha) == (None, None)
    said = "chosen of 2 trials on validation: trained on the text of its teachers"
    assert describe_ensemble(summary)[0] == said


def test_arms_of_a_study_differ_in_what_they_are_distilled_from(tmp_path: Path) -> None:
    settings = ["distill.mode=tokens", "confirm.seeds=2", f"study.arms={ARMS}"]
    config, folder = start(tmp_path, *settings)
    fake = Fake()
    summary: StudySummary = compare_arms(make_run(config, folder, fake))
    assert len(fake.kinds("write")) == 2 * 4  # once for b and d
    assert len(fake.kinds("cache_teacher_logits")) == 2 * 2
    by_arm = {row.name: row.written for row in summary.arms}
    written = Written(texts=160, cut=8, right=152)
    assert by_arm == {"a": None, "b": written, "c": None, "d": written}
    places = {job["stage"]: Path(job["targets"]).name for job in fake.kinds("train")}
    assert places == {"a": "targets", "b": "written", "c": "targets", "d": "written"}
    plan = plan_study(config)
    assert (plan.teachers, plan.writers, plan.texts) == (2, 2, 4)
    config, folder = start(tmp_path / "no", *settings)
    with pytest.raises(RunError, match=r"^d: write.keep right needs a text that is right, got 0"):
        compare_arms(make_run(config, folder, Fake(right=0)))


def test_the_plan_counts_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["data.context=32", "model.args.width=16", "train.steps=3", "train.warmup_steps=1"]
    config = load_config(settings=[*SETTINGS, *settings, "rounds=2"], flags={"task": "text"})
    print_plan(plan_generations(config), "generations", config, RunFolder(tmp_path / "no"), None)
    printed = capsys.readouterr().out
    found = re.search(
        r"\nwritten: ([\d,]+) texts by 2 models on ([\d,]+) training prompts", printed
    )
    assert found is not None
    texts, prompts = (int(number.replace(",", "")) for number in found.groups())  # of any manual
    assert texts == 4 * prompts > 0
    assert "cached:" not in printed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (SETTINGS, "- trained on the text of the teacher `abc`\n"),
        ([], "- distilled from the teacher `abc` with temperature T = 1, weight alpha = 1\n"),
    ],
)
def test_the_card_says_what_a_model_was_distilled_from(settings: list[str], said: str) -> None:
    config = load_config(settings=settings, flags={"task": "text"})
    teachers = [Model("abc", "a.safetensors")]
    assert said in describe_lineage("m", config, Facts(), "def", teachers, {})
    assert "only" in describe_lineage("m", config, Facts(), "def", [], {})
    given = describe_lineage("m", config, Facts(), "def", [], {}, given=True)
    assert "only" not in given
    assert "m, which was given to the run" in given
