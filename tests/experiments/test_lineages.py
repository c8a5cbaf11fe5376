"""Whole lineages: each has its own teachers, is kept, resumed, and named in the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from engine import Count, Recorder, StopAfter, make_run

from selfkd.config import Config, load_config
from selfkd.config.validate import check_capacity, check_study
from selfkd.errors import ConfigError
from selfkd.experiments.generations import born_again, finished
from selfkd.experiments.members import check_members
from selfkd.experiments.replicas import confirm_seeds
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import GenerationsSummary, TaskStarted, TrialResult
from selfkd.storage.rows import load_row

TINY = [
    "data.train_size=100",
    "model={name: selfkd_mlp, args: {width: 8, depth: 1}}",
    "train.epochs=2",
    "search.trials=1",
    "rounds=2",
    "confirm.lineages=3",
]


def config_of(*settings: str) -> Config:
    return load_config(settings=[*TINY, *settings])


def start(path: Path, *settings: str) -> tuple[Config, RunFolder]:
    config = config_of(*settings)
    return config, RunFolder.create(path / "run", config)


def whole(
    config: Config, folder: RunFolder, do: Any, events: Recorder | None = None, **options: Any
) -> GenerationsSummary:
    return born_again(make_run(config, folder, do, events, **options))


Done = tuple[Config, RunFolder, GenerationsSummary, Count, Recorder]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    config, folder = start(tmp_path_factory.mktemp("lineages"))
    count, ear = Count(), Recorder()
    return config, folder, whole(config, folder, count, ear), count, ear


def hashes(folder: RunFolder, generation: int) -> list[str]:
    paths = sorted((folder.generation(generation) / "confirm").glob("trial_*/result.json"))
    return [load_row(TrialResult, path).hash for path in paths]


def taught(count: Count, stage: str) -> list[list[str]]:
    return [[row["hash"] for row in job["teachers"]] for job in count.trained(stage)]


def students(folder: RunFolder) -> list[int]:
    """Return how many lineages' students are kept of each generation."""
    return [
        len(list((folder.generation(g) / "confirm").rglob("student.safetensors")))
        for g in range(len(folder.results()))
    ]


def test_each_student_has_its_own_lineage_s_teacher(done: Done) -> None:
    config, folder, _, count, ear = done
    assert taught(count, "confirm-0") == [[], [], []]
    for generation in (1, 2):
        teachers = [[digest] for digest in hashes(folder, generation - 1)]
        assert taught(count, f"confirm-{generation}") == teachers
        seeds = [job["seed"] for job in count.trained(f"confirm-{generation}")]
        assert seeds == confirm_seeds(config)
    assert len({digest for g in range(3) for digest in hashes(folder, g)}) == 9
    cached = [event for event in ear.of(TaskStarted) if event.title.startswith("confirm")]
    assert [event.title for event in cached] == [
        "confirm 1: caching teacher logits",
        "confirm 2: caching teacher logits",
    ]
    assert len(count.kinds("cache_teacher_logits")) == 2 + 2 * 3


def test_the_settings_are_those_that_were_chosen(done: Done) -> None:
    config, folder, _, count, _ = done
    for result in folder.results():
        jobs = count.trained(f"confirm-{result.generation}")
        chosen = config.at(result.point).distill
        for job in jobs:
            assert job["config"]["distill"]["temperature"] == chosen.temperature
            assert job["config"]["distill"]["alpha"] == chosen.alpha


def test_the_verdict_says_what_it_covers(done: Done) -> None:
    _, _, summary, _, _ = done
    assert summary.verdict is not None
    assert summary.verdict.covers == "lineages"
    assert "over 3 whole lineages" in summary.verdict.sentences[0]
    assert [len(row.values) for row in summary.confirmations] == [3, 3, 3]


def test_generation_0_is_that_of_fresh_seeds(done: Done, tmp_path: Path) -> None:
    _, _, summary, _, _ = done
    config = load_config(settings=[*TINY[:-1], "confirm.seeds=3"])
    folder = RunFolder.create(tmp_path / "run", config)
    on_seeds = whole(config, folder, Count())
    first, second, _ = on_seeds.confirmations
    assert first.values == summary.confirmations[0].values
    assert second.values != summary.confirmations[1].values
    assert on_seeds.verdict is not None
    assert on_seeds.verdict.covers == "seeds"


def test_students_are_kept_until_their_successors_are_trained(done: Done) -> None:
    """Those of generation 0 stay for controls, the last ones for more rounds."""
    config, folder, summary, _, _ = done
    assert students(folder) == [3, 0, 3]
    assert finished(config, folder) == summary


def test_more_rounds_go_on_from_the_last(done: Done, tmp_path: Path) -> None:
    _, _, summary, _, _ = done
    config, folder = start(tmp_path, "rounds=1")
    whole(config, folder, Count())
    count = Count()
    found = whole(config_of(), folder, count)
    assert found.confirmations == summary.confirmations
    assert len(count.kinds("train")) == 1 + 3
    assert students(folder) == [3, 0, 3]


@pytest.mark.parametrize("jobs", [11, 17, 22, 28])
def test_resumed_equals_undisturbed(done: Done, tmp_path: Path, jobs: int) -> None:
    _, _, summary, count, _ = done
    config, folder = start(tmp_path)
    first, again = Count(), Count()
    with pytest.raises(KeyboardInterrupt):
        whole(config, folder, StopAfter(first, jobs))
    assert finished(config, folder) is None
    folder, config = RunFolder.open(folder.path)
    found = whole(config, folder, again)
    assert found.verdict == summary.verdict
    assert found.confirmations == summary.confirmations
    trained = len(first.kinds("train")) + len(again.kinds("train"))
    assert trained == len(count.kinds("train"))
    assert students(folder) == [3, 0, 3]


def test_a_finished_run_takes_more_lineages(done: Done, tmp_path: Path) -> None:
    more, _, summary, _, _ = done
    config, folder = start(tmp_path, "confirm.lineages=2")
    whole(config, folder, Count())
    folder.check_change(config, more)
    assert finished(more, folder) is None
    count = Count()
    found = whole(more, folder, count)
    assert (found.confirmations, found.verdict) == (summary.confirmations, summary.verdict)
    assert len(count.kinds("train")) == 3
    assert len(count.kinds("cache_teacher_logits")) == 2


def test_a_lineage_ends_where_a_trial_of_it_fails(tmp_path: Path) -> None:
    def second_of_generation_1(kind: str, payload: Mapping[str, Any]) -> str | None:
        student = f"{payload.get('student')}"
        return "broken" if kind == "train" and "_001/confirm/trial_001" in student else None

    config, folder = start(tmp_path)
    count, ear = Count(second_of_generation_1), Recorder()
    summary = whole(config, folder, count, ear)
    assert [len(row.values) for row in summary.confirmations] == [3, 2, 2]
    assert ear.notes == ["1 of the 3 trials of the whole lineages failed"]
    first, _, third = hashes(folder, 1)
    assert taught(count, "confirm-2") == [[first], [third]]
    assert summary.verdict is not None
    assert summary.verdict.seeds == 2
    assert finished(config, folder) == summary


def test_all_earlier_models_of_a_lineage_may_teach(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "distill.teacher=lineage", "confirm.lineages=2")
    count = Count()
    whole(config, folder, count)
    both = zip(hashes(folder, 0), hashes(folder, 1), strict=True)
    assert taught(count, "confirm-2") == [list(pair) for pair in both]
    assert students(folder) == [2, 2, 2]


def test_auto_confirms_each_generation_at_once(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=auto", "rounds_max=3")
    count = Count()
    summary = whole(config, folder, count)
    stages = [job["stage"] for job in count.kinds("train")]
    for generation in range(len(summary.generations) - 1):
        last = max(n for n, stage in enumerate(stages) if stage == f"confirm-{generation}")
        assert last < stages.index(f"generation-{generation + 1}")
    assert finished(config, folder) == summary


def test_controls_have_the_lineage_s_own_teacher(tmp_path: Path) -> None:
    """Also where they are added to a finished run."""
    config, folder = start(tmp_path, "rounds=1")
    whole(config, folder, Count())
    more, count = config_of("rounds=1", "controls=[dkpp, label_smoothing]"), Count()
    summary = whole(more, folder, count)
    teachers = [[digest] for digest in hashes(folder, 0)]
    assert taught(count, "control_dkpp_confirm") == teachers
    assert taught(count, "control_label_smoothing_confirm") == [[], [], []]
    assert {*map(tuple, taught(count, "control_dkpp"))} == {
        tuple(model.hash for model in folder.results()[1].teachers)
    }
    assert summary.against_controls is not None
    assert summary.against_controls.covers == "lineages"


def test_a_function_of_the_user_s_is_repeated_in_lineages(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "def train(trial):\n"
        "    torch.manual_seed(trial.seed)\n"
        "    before = float(trial.teachers[0]['hash'] != '') if trial.teachers else 0.0\n"
        "    student = torch.nn.Linear(1, 1)\n"
        "    trial.report({'score': before + trial.generation + float(torch.rand(()))},"
        " student=student)\n"
    )
    config, folder = start(tmp_path, "search.metric=score", "rounds=1")
    count = Count()
    summary = whole(config, folder, count, function=f"{file}:train")
    assert taught(count, "confirm-1") == [[digest] for digest in hashes(folder, 0)]
    assert count.kinds("cache_teacher_logits") == []
    assert summary.confirmations[1].values[0] > 2


# --- what is refused ---


def test_the_best_of_several_trials_are_no_lineage() -> None:
    with pytest.raises(ConfigError, match=r"must be 0 with distill\.teacher top:2, as a"):
        config_of("distill.teacher='top:2'")


def test_lineages_are_there_from_the_start_or_not_at_all(done: Done) -> None:
    config, folder, *_ = done
    with pytest.raises(ConfigError, match="must be given from the start of a run or not at all"):
        folder.check_change(config, config_of("confirm.lineages=0"))
    with pytest.raises(ConfigError, match="must be at least the 3 of the run, got 2"):
        folder.check_change(config, config_of("confirm.lineages=2"))


@pytest.mark.parametrize("check", [check_capacity, check_study, check_members])
def test_other_commands_have_no_lineages(check: Any) -> None:
    with pytest.raises(ConfigError, match=r"confirm\.lineages: of selfkd\.generations only, got 3"):
        check(config_of())
