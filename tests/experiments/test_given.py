"""Generation 0 from a file of weights, or from an earlier run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine import Count, Recorder, StopAfter, make_run, without_clock

from selfkd.cli.plan import plan_generations
from selfkd.cli.tables import summary_table
from selfkd.config import Config, load_config
from selfkd.errors import ConfigError
from selfkd.experiments.ensemble import compress
from selfkd.experiments.generations import born_again, finished
from selfkd.experiments.given import check_given
from selfkd.experiments.members import check_members
from selfkd.experiments.run_folder import RunFolder
from selfkd.generations import main, make_parser
from selfkd.loading.model import load
from selfkd.models import make_model
from selfkd.reporting.page import run_page
from selfkd.reporting.plain import plain_rows
from selfkd.reporting.read import read_run
from selfkd.reporting.words import headlines
from selfkd.results import GenerationsSummary, McNemar
from selfkd.tracking.rows import confirmation_row, confirmation_summary
from selfkd.worker.jobs import run_job

TINY = (
    "model={name: selfkd_mlp, args: {width: 8, depth: 1}}",
    *("train={epochs: 3, batch_size: 20}", "search.trials=2", "confirm.seeds=3", "rounds=1"),
)


def config_of(*settings: str, given: Path | None = None) -> Config:
    path = [] if given is None else [f"generation_0.path={given}"]
    return load_config(settings=[*TINY, *path, *settings])


class Done(NamedTuple):
    config: Config
    folder: RunFolder
    summary: GenerationsSummary
    events: Recorder
    do: Count


def run(folder: Path, config: Config, do: Any = None) -> Done:
    check_given(config)
    do, events = do or Count(), Recorder()
    if (folder / "config.yaml").exists():
        made, _ = RunFolder.open(folder)
    else:
        made = RunFolder.create(folder, config)
    summary = born_again(make_run(config, made, do, events))
    return Done(config, made, summary, events, do)


def save_weights(path: Path, *, width: int = 8, order: list[int] | None = None) -> Path:
    """Write a network as a tutorial does, its classes in another order."""
    torch.manual_seed(7)
    args = {"width": width, "depth": 1}
    network = make_model("selfkd_mlp", args, num_classes=10, in_chans=1, image_size=8)
    state = network.state_dict()
    if order is not None:
        state = {k: v[order] if v.shape[:1] == (10,) else v for k, v in state.items()}
    torch.save({"model_state_dict": state, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run whose best generation is 0, as that of one generation is."""
    return run(tmp_path_factory.mktemp("earlier") / "old", config_of("rounds=0"))


@pytest.fixture(scope="module")
def from_file(tmp_path_factory: pytest.TempPathFactory) -> Done:
    place = tmp_path_factory.mktemp("file")
    return run(place / "run", config_of(given=save_weights(place / "a.pt")))


# --- a file ---


def test_a_file_is_generation_0_and_teaches_the_next(from_file: Done) -> None:
    first, second = from_file.folder.results()
    assert first.origin is not None
    assert first.origin.name == "a.pt"
    assert first.trials == 0
    assert {"val_accuracy", "test_accuracy", "test_nll", "test_ece"} <= first.metrics.keys()
    assert set(first.diagnostics) == {"val", "test"}
    assert [model.hash for model in second.teachers] == [first.hash]
    assert len(list(from_file.folder.path.glob(f"targets/{first.hash}*/**/*.safetensors"))) > 0
    assert "agreement" in second.metrics
    stages = {job["stage"] for job in from_file.do.kinds("train")}
    assert stages == {"generation-1", "confirm-1"}
    assert load(from_file.folder.path, generation=0).checkpoint["hash"] == first.hash


def test_a_file_has_one_seed_and_no_interval_and_this_is_said(from_file: Done) -> None:
    summary, folder = from_file.summary, from_file.folder
    given, later = summary.confirmations
    assert given.given
    assert (given.mean.low, given.mean.high, len(given.seeds)) == (None, None, 1)
    assert given.values == (folder.results()[0].metrics["test_accuracy"],)
    assert later.first is not None
    assert later.first.value == pytest.approx(later.mean.value - given.mean.value)
    assert summary.verdict is not None
    assert "generation 0 (one given model)" in summary.verdict.sentences[0]
    assert summary.verdict.sentences[-1].startswith("generation 0 may have been trained on other d")
    assert summary.verdict.sentences[-2].startswith(
        "generation 0 has one seed, as a file of weights says nothing of its training: the "
        "intervals are over seeds of the later generations"
    )
    assert any("generation 0 (a.pt) has one seed" in note for note in from_file.events.notes)
    assert any("10.5% of validation, about as by chance" in note for note in from_file.events.notes)
    assert any("its metrics are optimistic" in note for note in from_file.events.notes)
    table = summary_table(summary, "accuracy")
    assert table.rows[0][1].endswith("(1 seed)")
    assert "±" not in table.rows[0][1]
    rows = plain_rows(summary)
    assert [row["seeds"] for row in rows[:2]] == [1, 3]
    assert rows[0]["mean_low"] is None
    assert confirmation_row(given)["confirmed/seeds"] == 1
    assert confirmation_summary(given)["confirmed_seeds"] == 1
    page = run_page(read_run(folder.path))
    assert page.lead is not None
    assert "compared with generation 0, which is one given model" in page.lead.text
    assert finished(from_file.config, folder) == summary
    assert (
        finished(load_config(folder.path / "config.yaml", settings=["confirm.seeds=4"]), folder)
        is None
    )


def test_classes_of_another_order_are_matched(tmp_path: Path, from_file: Done) -> None:
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    path = save_weights(tmp_path / "a.pt", order=order)
    (tmp_path / "names.txt").write_text("\n".join(map(str, order)))
    classes = f"generation_0.classes={tmp_path}/names.txt"
    done = run(tmp_path / "run", config_of(classes, "rounds=0", given=path))
    assert done.folder.results()[0].metrics == pytest.approx(from_file.folder.results()[0].metrics)
    _, given, other, *_ = headlines(read_run(done.folder.path))
    assert given == "Generation 0 is a given model: a.pt."
    assert "its metrics are optimistic" in other


def test_rounds_auto_and_controls_take_one_given_model(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "a.pt")
    settings = ("rounds=auto", "rounds_max=2", "controls=[label_smoothing]")
    done = run(tmp_path / "run", config_of(*settings, given=path))
    assert done.summary.stopped is None or "generation 0 (val_accuracy, 3 fresh seeds" in str(
        done.summary.stopped
    )
    (control,) = done.summary.controls
    assert control.first is not None
    assert control.first.value == pytest.approx(
        control.mean.value - done.summary.confirmations[0].mean.value
    )


def test_a_student_of_its_own_network_is_compared_with_the_same_from_labels(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "a.pt")
    student = "student={name: selfkd_mlp, args: {width: 4, depth: 1}}"
    done = run(tmp_path / "run", config_of(student, given=path))
    assert done.summary.verdict is not None
    assert done.summary.verdict.to == "the same network from labels only"
    assert "one seed" not in " ".join(done.summary.verdict.sentences)


# --- a run ---


def test_a_run_of_the_same_training_is_repeated_on_fresh_seeds(
    earlier: Done, tmp_path: Path
) -> None:
    done = run(tmp_path / "run", config_of(given=earlier.folder.path))
    first = done.folder.results()[0]
    assert first.origin is not None
    assert first.origin.unknown is None
    assert first.origin.name == "generation 0 of old"
    assert first.hash == earlier.folder.results()[0].hash
    assert first.metrics == pytest.approx(earlier.folder.results()[0].metrics)
    given, _ = done.summary.confirmations
    assert not given.given
    assert given.values == earlier.summary.confirmations[0].values
    assert not done.events.notes
    assert done.summary.verdict is not None
    assert done.summary.verdict.to == "generation 0"


@pytest.mark.parametrize("lineages", [0, 3])
def test_a_distilled_model_of_a_run_is_repeated_with_its_teacher(
    tmp_path: Path, lineages: int
) -> None:
    for mode in ("max", "min"):  # of one of them generation 1 is the best
        old = run(tmp_path / mode, config_of(f"search.mode={mode}"))
        if old.summary.best:
            break
    assert old.summary.best == 1
    settings = (f"confirm.lineages={lineages}", f"search.mode={mode}")
    done = run(tmp_path / "run", config_of(*settings, given=old.folder.path))
    first, theirs = done.folder.results()[0], old.folder.results()[1]
    assert (first.hash, first.point) == (theirs.hash, theirs.point)
    assert [model.hash for model in first.teachers] == [model.hash for model in theirs.teachers]
    assert (first.temperature, first.mcnemar) == (theirs.temperature, theirs.mcnemar)
    assert isinstance(first.mcnemar, McNemar)
    assert done.summary.confirmations[0].values == old.summary.confirmations[1].values


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["train.epochs=2"], "its training differs: train.epochs 3, here 2"),
        (["data.jitter=1"], "its training differs: data.jitter 0, here 1"),
        (["seed=1"], "it was trained on other images than this run's training split"),
    ],
)
def test_a_run_of_another_training_has_one_seed(
    earlier: Done, tmp_path: Path, settings: list[str], reason: str
) -> None:
    done = run(tmp_path / "run", config_of(*settings, "rounds=0", given=earlier.folder.path))
    (first,) = done.folder.results()
    assert first.origin is not None
    assert first.origin.unknown == reason
    assert done.summary.confirmations[0].given
    again = run(tmp_path / "two", config_of(*settings, "rounds=0", given=done.folder.path))
    assert again.folder.results()[0].origin.unknown == reason  # type: ignore[union-attr]


def test_the_student_of_an_ensemble_has_one_seed(tmp_path: Path) -> None:
    config = config_of("members=2", "confirm.seeds=0")
    folder = RunFolder.create(tmp_path / "many", config, command="ensemble")
    compress(make_run(config, folder, Count()))
    done = run(tmp_path / "run", config_of("rounds=0", given=folder.path))
    origin = done.folder.results()[0].origin
    assert origin is not None
    assert (origin.name, origin.unknown) == (
        "the student of many",
        "it is distilled from an ensemble",
    )


# --- resume ---


@pytest.mark.parametrize("jobs", [1, 4, 7])
def test_a_stopped_run_ends_as_one_that_was_not(from_file: Done, tmp_path: Path, jobs: int) -> None:
    config = config_of(given=save_weights(tmp_path / "a.pt"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", config, StopAfter(run_job, jobs))
    done = run(tmp_path / "run", config)
    for own, other in zip(done.folder.results(), from_file.folder.results(), strict=True):
        own = without_clock(own)
        assert own.metrics == without_clock(other).metrics
        assert own.point == other.point
    assert done.summary.verdict == from_file.summary.verdict


def test_a_file_that_has_changed_is_noticed_and_the_copy_kept(
    from_file: Done, tmp_path: Path
) -> None:
    path = save_weights(tmp_path / "a.pt")
    first = run(tmp_path / "run", config_of("rounds=0", given=path))
    more = config_of("rounds=1", given=path)
    save_weights(path, width=16)
    done = run(tmp_path / "run", more)
    assert [note for note in done.events.notes if "has changed since this run began" in note]
    assert done.folder.results()[0] == first.folder.results()[0]
    assert done.summary.verdict == from_file.summary.verdict
    path.unlink()
    folder, config = RunFolder.open(tmp_path / "run")
    events = Recorder()
    born_again(make_run(config, folder, Count(), events))
    assert not events.notes


# --- words, plans and refusals ---


def test_the_plan_trains_no_generation_0(earlier: Done, tmp_path: Path) -> None:
    file = plan_generations(config_of(given=save_weights(tmp_path / "a.pt")))
    assert [(each.title, each.trainings) for each in file.stages] == [
        ("generation 1", 2),
        ("confirmation, generation 1", 3),
    ]
    known = plan_generations(config_of(given=earlier.folder.path))
    assert [each.title for each in known.stages] == [
        *("generation 1", "confirmation, generation 0", "confirmation, generation 1")
    ]


def test_a_card_says_that_a_model_was_given(from_file: Done) -> None:
    card = load(from_file.folder.path, generation=0).card
    assert "- given to the run as its generation 0, not trained by it" in card
    assert "--from FILE" in card
    assert "its difference to generation 0, one given model." in card
    assert str(from_file.folder.path.parent) not in card


def test_lineages_are_no_default_with_a_given_generation() -> None:
    from selfkd.generations import _is_default_job

    assert _is_default_job(make_parser().parse_args([]))
    assert not _is_default_job(make_parser().parse_args(["--from", "a.pt"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["generation_0.path=gone.pt"],
            r"a run folder .*, got .*, which is not",
        ),
        (
            ["generation_0.path={}"],
            r"run folder .*, got .*, a folder of a\.pt, names\.txt",
        ),
        (["generation_0.classes=a.txt"], r"path must be given with generation_0\.classes"),
        (
            ["generation_0.path={}/a.pt", "generation_0.classes=gone.txt"],
            r"classes must be a file, got gone\.txt",
        ),
        (["generation_0.path={}/a.pt", "confirm.lineages=3"], "lineages must be 0 with --from .*a"),
        (["generation_0.path={}/a.pt", "generation_0.mean=[0.5]"], "must have mean and std or ne"),
        (
            [
                *("generation_0.path={}/a.pt", "generation_0.classes={}/names.txt"),
                "train.init=teacher",
            ],
            "must be fresh with",
        ),
        (["generation_0.path={}/wide.pt"], r"--from: .*wide\.pt must fit .*another width or size"),
        (
            ["generation_0.path={}/a.pt", "generation_0.classes={}/names.txt"],
            r"names\.txt has 2 classes \('a', 'b'\) instead of 10",
        ),
        (["generation_0.path={}/a.pt", "generation_0.weights=ema"], "weights must be one of 'mod"),
        (
            [
                *("generation_0.path={}/a.pt", "generation_0.mean=[0.5, 0.5]"),
                "generation_0.std=[1.0, 1.0]",
            ],
            r"must be 1 numbers each, std above 0, got \[0\.5, 0\.5\]",
        ),
    ],
)
def test_what_can_be_no_generation_0_is_refused(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    save_weights(tmp_path / "a.pt")
    save_weights(tmp_path / "wide.pt", width=9)
    (tmp_path / "names.txt").write_text("a\nb")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", config_of(*(each.format(tmp_path) for each in settings)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.args={width: 9, depth: 1}"],
            r"model must be the network of generation 0 of old, got .*--set .model={\"name\": ",
        ),
        (["generation_0.mean=[0.5]", "generation_0.std=[1.0]"], "mean must be of a file of weigh"),
        (["data.image_size=16"], r"--from: .*old/generation_000/student\.safetensors cannot be re"),
        (["confirm.lineages=3", "train.epochs=2"], "lineages must be 0 with --from .*train.epochs"),
        (["confirm.lineages=3", "seed=1"], "lineages must be 0 with --from .*other images"),
    ],
)
def test_runs_that_can_be_no_generation_0_are_refused(
    earlier: Done, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", config_of(*settings, given=earlier.folder.path))


def test_runs_without_one_model_are_refused(earlier: Done, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "new", config_of())
    with pytest.raises(ConfigError, match=r"got .*new, which has none yet: give a file of weights"):
        check_given(config_of(given=tmp_path / "new"))
    RunFolder.create(tmp_path / "study", config_of(), command="study")
    with pytest.raises(ConfigError, match=r"a finished model, got .*study, of study"):
        check_given(config_of(given=tmp_path / "study"))
    copied = tmp_path / "copied"
    shutil.copytree(earlier.folder.path, copied, ignore=shutil.ignore_patterns("student*"))
    with pytest.raises(ConfigError, match=r"a run with its model, got none at .*student\.safet"):
        check_given(config_of(given=copied))
    with pytest.raises(ConfigError, match=r"generation_0\.path: of selfkd\.generations only"):
        check_members(config_of(given=earlier.folder.path))


def test_the_command_refuses_it_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--from", str(tmp_path / "gone.pt"), "--name", "a"]) == 2
    assert "--from must be a file of weights or a run folder" in capsys.readouterr().err
    (tmp_path / "f.py").write_text("def train(trial): ...")
    train = ["--train", f"{tmp_path}/f.py:train", "--from", str(save_weights(tmp_path / "a.pt"))]
    assert main(train) == 2
    assert "--from must not be given with --train" in capsys.readouterr().err
