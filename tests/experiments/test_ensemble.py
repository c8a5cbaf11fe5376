"""Many teachers, one student, in one process: what is trained, averaged, chosen and believed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import Count, Recorder, StopAfter, make_run
from PIL import Image
from safetensors.torch import save_file
from scipy.special import softmax

from selfkd.config import Config, load_config
from selfkd.data import load_data
from selfkd.errors import ConfigError, RunError
from selfkd.experiments.ensemble import compress, finished
from selfkd.experiments.members import check_members, find_members
from selfkd.experiments.run_folder import RunFolder
from selfkd.models import make_model
from selfkd.reporting.words import describe_ensemble
from selfkd.results import (
    EnsembleSummary,
    GenerationResult,
    Model,
    Row,
    RunFinished,
    TableRow,
)
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import load_json
from selfkd.storage.rows import save_row

TINY = [
    "data.train_size=200",
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train={epochs: 3, batch_size: 20}",
    "members=3",
    "search.trials=2",
    "confirm.seeds=2",
]


def start(folder: Path, *settings: str, name: str = "run") -> tuple[Config, RunFolder]:
    config = load_config(settings=[*TINY, *settings])
    return config, RunFolder.create(folder / name, config, command="ensemble")


Done = tuple[EnsembleSummary, RunFolder, Recorder, Count]


def run(folder: Path, *settings: str, name: str = "run", count: Count | None = None) -> Done:
    config, place = start(folder, *settings, name=name)
    ear, count = Recorder(), count or Count()
    return compress(make_run(config, place, count, ear)), place, ear, count


def named(summary: EnsembleSummary, start: str) -> TableRow:
    (row,) = (row for row in summary.rows if row.name.startswith(start))
    return row


def members_of(folder: RunFolder) -> list[Row]:
    rows: list[Row] = load_json(folder.path / "members" / "result.json")["members"]
    return rows


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return run(tmp_path_factory.mktemp("done"))


def logits(folder: RunFolder, mark: str, split: str) -> np.ndarray[Any, Any]:
    tensors, _ = load_tensors(folder.path / "predictions" / f"{mark}.safetensors")
    return tensors[split].double().numpy()


def test_members_are_trained_then_the_student_then_pairs(
    done: Done,
) -> None:
    _, _, ear, count = done
    assert [(title, trials) for title, trials, _ in ear.stages] == [
        ("members on labels", 3),
        ("student from the teachers", 2),
        ("confirmation on fresh seeds", 4),
    ]
    seeds = [job["seed"] for job in count.kinds("train")]
    assert len(set(seeds[:5])) == 5
    assert seeds[5:7] == seeds[7:]  # pairs: labels only and taught, on the same seeds
    taught = [len(job["teachers"]) for job in count.kinds("train")]
    assert taught == [0, 0, 0, 3, 3, 0, 0, 3, 3]
    assert len(count.kinds("cache_teacher_logits")) == 3


def test_the_table_is_that_of_the_predictions(done: Done) -> None:
    summary, folder, _, _ = done
    labels = load_data("digits").test.labels.numpy()
    members = members_of(folder)
    single = [logits(folder, row["hash"], "test") for row in members]
    accuracy = [(each.argmax(1) == labels).mean() for each in single]
    assert named(summary, "single member, mean of 3").metrics["test_accuracy"] == pytest.approx(
        np.mean(accuracy)
    )
    best = named(summary, "best member on validation")
    assert best.metrics["test_accuracy"] == pytest.approx(accuracy[0])
    assert [row["val_accuracy"] for row in members] == sorted(
        (row["val_accuracy"] for row in members), reverse=True
    )
    together = {
        "probabilities": np.mean([softmax(each, 1) for each in single], axis=0),
        "logits": np.mean(single, axis=0),
    }
    for average, scores in together.items():
        row = named(summary, f"ensemble of 3, {average}")
        assert row.metrics["test_accuracy"] == pytest.approx((scores.argmax(1) == labels).mean())


def test_students_are_diagnosed_and_the_taught_one_beside_its_teacher(
    done: Done,
) -> None:
    summary, folder, _, _ = done
    labels = load_data("digits").test.labels.numpy()
    members = members_of(folder)
    taught = load_json(folder.path / "confirm" / "student" / "trial_000" / "result.json")
    student = logits(folder, taught["hash"], "test").argmax(1)
    average = summary.chosen.average
    each = [logits(folder, row["hash"], "test") for row in members]
    teacher = np.mean([softmax(one, 1) if average == "probabilities" else one for one in each], 0)
    found = summary.diagnostics["student"]["test"].metrics
    assert found["agreement"] == pytest.approx((student == teacher.argmax(1)).mean())
    assert found["accuracy"] == pytest.approx((student == labels).mean())
    assert "agreement" not in summary.diagnostics["labels"]["test"].metrics
    assert {"val", "test"} == set(summary.diagnostics["labels"])


def test_the_share_is_of_the_gain_over_labels_only(done: Done) -> None:
    summary, *_ = done
    labels, taught = (named(summary, f"student, {name}").runs for name in ("labels", "from"))
    assert len(labels) == len(taught) == 2
    gain = np.subtract(taught, labels).mean()
    assert summary.gain is not None
    assert summary.gain.value == pytest.approx(gain)
    of_teacher = summary.teacher.metrics["test_accuracy"] - np.mean(labels)
    if of_teacher > 0:
        assert summary.share is not None
        assert summary.share.value == pytest.approx(gain / of_teacher)
    else:
        assert summary.share is None


def test_a_finished_run_is_not_done_again(done: Done) -> None:
    summary, folder, ear, _ = done
    assert folder.summary(EnsembleSummary) == summary == ear.of(RunFinished)[0].summary
    assert (folder.path / "student.safetensors").exists()
    assert load_tensors(folder.path / "student.safetensors")[1]["hash"] == summary.chosen.hash


def test_a_finished_run_takes_more_seeds(tmp_path: Path, done: Done) -> None:
    config, folder = start(tmp_path, "confirm.seeds=1")
    compress(make_run(config, folder, Count()))
    more, count = replace(config, confirm=replace(config.confirm, seeds=2)), Count()
    folder.check_change(config, more)
    assert finished(more, folder) is None
    assert compress(make_run(more, folder, count)) == done[0]
    assert len(count.kinds("train")) == 2
    assert finished(more, folder) == done[0]


@pytest.mark.parametrize("jobs", [0, 2, 4, 6, 8, 10, 13, 15])
def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path: Path, done: Done, jobs: int) -> None:
    config, folder = start(tmp_path)
    first, again = Count(), Count()
    with pytest.raises(KeyboardInterrupt):
        compress(make_run(config, folder, StopAfter(first, jobs)))
    folder, config = RunFolder.open(folder.path)
    summary = compress(make_run(config, folder, again))
    assert summary == done[0]
    assert len(first.kinds("train")) + len(again.kinds("train")) == 9


def test_members_may_be_of_several_models(tmp_path: Path) -> None:
    models = (
        "members=[{name: selfkd_mlp, args: {width: 8, depth: 1}}, "
        "{name: selfkd_cnn, args: {width: 4}}]"
    )
    _, folder, _, count = run(tmp_path, models, "members.count=3", "confirm.seeds=1")
    made = [job["model"]["name"] for job in count.kinds("train")][:3]
    assert made == ["selfkd_mlp", "selfkd_cnn", "selfkd_mlp"]
    rows = members_of(folder)
    assert sorted(row["model"]["name"] for row in rows) == sorted(made)


def test_every_source_makes_a_row_and_may_teach(tmp_path: Path) -> None:
    summary, folder, _, count = run(
        tmp_path,
        "members.same_init=true",
        "members.compare=[snapshots, soup, greedy_soup]",
        "members.source=weighted",
        "confirm.seeds=1",
    )
    names = [row.name for row in summary.rows]
    assert names == [
        "single member, mean of 3",
        "best member on validation",
        "ensemble of 3, probabilities",
        "ensemble of 3, logits",
        "ensemble, fitted weights, of 3",
        "snapshot ensemble, of 3",
        "mean of weights",
        "greedy mean of weights",
        "student, labels only",
        "student, from its teacher",
    ]
    weights = [
        row["weight"] for row in load_json(folder.path / "sources/weighted.json")["teachers"]
    ]
    assert sum(weights) == pytest.approx(1)
    assert all(
        [row["weight"] for row in job["teachers"]] == weights
        for job in count.kinds("train")
        if job["teachers"]
    )
    starts = {job["start"]["seed"] for job in count.kinds("train")[:3]}
    assert len(starts) == 1  # one initialisation for all members
    assert summary.teacher.source == "weighted"
    states = [load_tensors(folder.path / row["checkpoint"])[0] for row in members_of(folder)]
    soup, facts = load_tensors(folder.path / "sources" / "soup.safetensors")
    assert len(facts["soup"]) == 3
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / 3)


def test_the_number_of_members_and_the_average_may_be_searched(tmp_path: Path) -> None:
    space = (
        "search.space={members.use: {choice: [1, 2]}, members.source: {choice: [members, soup]}, "
        "distill.average: {choice: [logits, probabilities]}}"
    )
    settings = [space, "members.same_init=true", "search.trials=8", "confirm.seeds=1"]
    summary, folder, _, count = run(tmp_path, *settings)
    taught = [job for job in count.kinds("train") if job["teachers"]][:8]
    best = members_of(folder)
    for job in taught:
        members = job["config"]["members"]
        hashes = [row["hash"] for row in job["teachers"]]
        if members["source"] == "members":
            assert hashes == [row["hash"] for row in best[: members["use"]]]
        else:
            assert len(hashes) == 1
    assert {len(job["teachers"]) for job in taught} == {1, 2}
    assert set(summary.chosen.point) == {"members.use", "members.source", "distill.average"}


def test_the_baseline_is_searched_as_long_where_there_is_something_to_search(
    tmp_path: Path,
) -> None:
    space = "search.space={train.lr: {loguniform: [0.01, 0.1]}, distill.alpha: {uniform: [0, 1]}}"
    _, folder, ear, count = run(tmp_path, space, "confirm.seeds=1")
    assert ("student from labels only", 2, 0) in ear.stages
    labels = [job for job in count.kinds("train") if job["stage"] == "labels"]
    assert len({job["config"]["train"]["lr"] for job in labels}) == 2
    best = max(
        (load_json(folder.path / f"labels/trial_00{n}/result.json") for n in (0, 1)),
        key=lambda row: (row["val_accuracy"], -row["val_nll"]),
    )
    confirmed = [job for job in count.kinds("train") if job["stage"] == "confirm_labels"]
    assert confirmed[0]["config"]["train"]["lr"] == best["point"]["train.lr"]


def test_without_confirmation_there_is_one_pair_and_no_interval(tmp_path: Path) -> None:
    summary, *_ = run(tmp_path, "confirm.seeds=0")
    assert summary.seeds == 0
    assert summary.gain is not None
    assert summary.gain.low is None


@pytest.mark.parametrize("seeds", [0, 2])
def test_without_a_baseline_nothing_is_trained_from_labels_but_members(
    tmp_path: Path, done: Done, seeds: int
) -> None:
    config, folder = start(tmp_path, f"confirm.seeds={seeds}", "confirm.baseline=false")
    count = Count()
    summary = compress(make_run(config, folder, count))
    assert [len(job["teachers"]) for job in count.kinds("train")] == [0] * 3 + [3] * (2 + seeds)
    assert (summary.gain, summary.share, summary.verdict) == (None, None, None)
    assert [row.name for row in summary.rows if "student" in row.name] == [
        "student, from its teacher"
    ]
    assert set(summary.diagnostics) == {"student"}
    said = describe_ensemble(summary)
    assert said[1].startswith("not compared with labels only, as confirm.baseline is false")
    assert not any("share" in line or "evidence" in line for line in said)
    assert finished(config, folder) == summary
    if seeds == 0:
        return
    with_it, later = replace(config, confirm=replace(config.confirm, baseline=True)), Count()
    folder.check_change(config, with_it)
    assert finished(with_it, folder) is None
    assert compress(make_run(with_it, folder, later)) == done[0]
    assert [job["stage"] for job in later.kinds("train")] == ["confirm_labels"] * 2
    with pytest.raises(ConfigError, match=r"confirm\.baseline must stay true"):
        folder.check_change(with_it, config)


# --- members from elsewhere ---


def test_generations_of_an_earlier_run_are_members(tmp_path: Path, done: Done) -> None:
    earlier = done[1].path
    summary, folder, ear, count = run(
        tmp_path, f"members={{count: null, runs: ['{earlier}']}}", "confirm.seeds=1"
    )
    assert [job["stage"] for job in count.kinds("train")] == ["student"] * 2 + [
        "confirm_labels",
        "confirm_student",
    ]
    assert named(summary, "single member, mean of 3")
    assert ear.notes == []  # they learnt from the same images
    hashes = {row["hash"] for row in members_of(folder)}
    assert hashes == {
        row["hash"] for row in load_json(earlier / "members" / "result.json")["members"]
    }


def test_members_that_saw_other_images_are_told(tmp_path: Path, done: Done) -> None:
    runs = f"members={{count: null, runs: ['{done[1].path}']}}"
    _, _, ear, _ = run(tmp_path, runs, "seed=1", "confirm.seeds=1")
    assert "3 of the 3 members from elsewhere were trained on other data" in ear.notes[0]


def test_an_empty_run_is_refused(tmp_path: Path) -> None:
    _, empty = start(tmp_path, name="empty")
    with pytest.raises(ConfigError, match=r"--from must be a run with a finished generation"):
        find_members(str(empty.path))


def test_a_run_is_a_member_once(tmp_path: Path, done: Done) -> None:
    path = done[1].path
    (tmp_path / "link").symlink_to(path)
    spellings = [path, f"{path}/", path.parent / ".." / path.parent.name / path.name]
    for other in (*spellings, tmp_path / "link"):
        config = load_config(settings=[f"members={{count: null, runs: ['{path}', '{other}']}}"])
        with pytest.raises(ConfigError, match=r"--from must be different runs, got .* again as"):
            check_members(config)
    check_members(load_config(settings=[f"members={{count: null, runs: ['{path}']}}"]))


def foreign(path: Path, *, classes: Sequence[int] | None = None, seed: int = 0) -> torch.nn.Module:
    """Save a network that somebody else has trained, its classes in another order."""
    torch.manual_seed(seed)
    width = {"width": 16, "depth": 1}
    model = make_model("selfkd_mlp", width, num_classes=10, in_chans=1, image_size=8)
    state = model.state_dict()
    if classes is not None:
        state = {
            name: tensor[list(classes)] if tensor.shape[0] == 10 else tensor
            for name, tensor in state.items()
        }
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path)
    return model


def checkpoints(*files: str) -> str:
    listed = ", ".join(
        f"{{model: selfkd_mlp, args: {{width: 16, depth: 1}}, {file}}}" for file in files
    )
    return f"members={{count: null, checkpoints: [{listed}]}}"


def test_foreign_files_in_any_order_of_classes_and_normalisation_average_correctly(
    tmp_path: Path,
) -> None:
    """The same network thrice, as three people would have saved it, is one ensemble of itself."""
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    network = foreign(tmp_path / "plain.pt")
    foreign(tmp_path / "shuffled.safetensors", classes=order)
    (tmp_path / "classes.yaml").write_text(f"[{', '.join(map(str, order))}]")
    data = load_data("digits")
    scaled = {  # a network for inputs (x - 0.5) / 0.25 that answers as `network` does
        name: tensor.clone() for name, tensor in network.state_dict().items()
    }
    first = next(name for name, tensor in scaled.items() if tensor.shape == (16, 64))
    bias = first.replace("weight", "bias")
    weight = scaled[first].clone()
    scaled[first] = weight * 0.25 / data.std[0]
    scaled[bias] = scaled[bias] + weight.sum(1) * (0.5 - data.mean[0]) / data.std[0]
    save_file(scaled, tmp_path / "scaled.safetensors")
    _, folder, ear, _ = run(
        tmp_path,
        checkpoints(
            f"path: '{tmp_path}/plain.pt'",
            f"path: '{tmp_path}/shuffled.safetensors', classes: '{tmp_path}/classes.yaml'",
            f"path: '{tmp_path}/scaled.safetensors', mean: [0.5], std: [0.25]",
        ),
        "confirm.seeds=1",
    )
    rows = members_of(folder)
    answers = [logits(folder, row["hash"], "test") for row in rows]
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=1e-4)
    stores = sorted(folder.path.glob("targets/*/*/view_000/*.safetensors"))
    stored = [load_tensors(path)[0]["logits"] for path in stores]
    assert len(stored) == 3
    for each in stored[1:]:
        torch.testing.assert_close(each, stored[0], atol=0.01, rtol=0)
    assert "were trained on other data" in ear.notes[0]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("path: '{}/wide.pt'", r"wide\.pt must fit 'selfkd_mlp' .* for 10 classes"),
        ("path: '{}/noise.pt'", r"noise\.pt"),
        (
            "path: '{}/one.pt', classes: '{}/nine.yaml'",
            r"must be for the classes of digits: .*nine.yaml has 9 classes .* instead of 10 .*'9'",
        ),
        ("path: '{}/one.pt', classes: '{}/map.yaml'", r"map\.yaml must be a list of class names"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, file: str, message: str) -> None:
    foreign(tmp_path / "one.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "wide.pt")
    noise = random.Random(2).randbytes(100)  # reading it ends in an IndexError
    (tmp_path / "noise.pt").write_bytes(noise)
    (tmp_path / "nine.yaml").write_text("[0, 1, 2, 3, 4, 5, 6, 7, 8]")
    (tmp_path / "map.yaml").write_text("{a: zero}")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, checkpoints(file.replace("{}", str(tmp_path))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["members.use=4"], "members.use must be at most 3, the members, got 4"),
        (
            ["search.space={members.use: {randint: [1, 9]}}"],
            "members.use must be at most 3, the members, got 9",
        ),
        (
            ["members.compare=[snapshots]", "train.epochs=2"],
            r"train.epochs must be at least 3 for as many snapshots as members, got 2",
        ),
        (["members.source=specialists"], "must not be specialists with fewer than 20 classes"),
        (["targets.top_k=10"], r"targets.top_k must be in \[1, 9\], got 10"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    count = Count()
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *settings, count=count)
    assert count.kinds("train") == []


# --- caching teacher logits ---


def test_shards_are_jobs_and_what_fails_is_done_again_alone(tmp_path: Path) -> None:
    failures = ["full", "full"]

    def fail(kind: str, payload: Mapping[str, Any]) -> str | None:
        first = kind == "cache_teacher_logits" and (payload["view"], payload["shard"]) == (1, 1)
        return failures.pop() if first and failures else None

    count = Count(fail)
    config, folder = start(
        tmp_path, "data={jitter: 1, views: 2}", "targets.shard_size=150", "confirm.seeds=1"
    )
    compress(make_run(config, folder, count, ear := Recorder()))
    assert ear.states == ["written"] * (3 * 2 * 2)
    assert len(count.kinds("cache_teacher_logits")) == 3 * 2 * 2 + 2


def test_a_part_that_keeps_failing_ends_the_run(tmp_path: Path) -> None:
    count = Count(lambda kind, _: "broken" if kind == "cache_teacher_logits" else None)
    with pytest.raises(RunError, match=r"caching teacher logits failed: OSError: broken"):
        run(tmp_path, count=count)


def test_a_shared_store_is_not_written_twice(tmp_path: Path) -> None:
    shared = f"targets.root='{tmp_path / 'shared'}'"
    first, *_ = run(tmp_path, shared, name="one")
    again, _, ear, _ = run(tmp_path, shared, name="two")
    assert ear.states == ["kept"] * 3
    assert again == first


def test_a_damaged_shard_is_made_again_and_told(tmp_path: Path) -> None:
    shared = f"targets.root='{tmp_path / 'shared'}'"
    first, *_ = run(tmp_path, shared, name="one")
    path = next((tmp_path / "shared").rglob("shard_*"))
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)
    again, _, ear, _ = run(tmp_path, shared, name="two")
    assert sorted(ear.states) == ["kept", "kept", "remade"]
    assert again == first


def test_only_members_that_teach_are_asked(tmp_path: Path) -> None:
    _, _, _, count = run(tmp_path, "members.use=1", "confirm.seeds=1")
    assert len(count.kinds("cache_teacher_logits")) == 1


def test_live_teachers_need_no_store(tmp_path: Path) -> None:
    live, folder, _, count = run(tmp_path, "distill.live=true")
    assert count.kinds("cache_teacher_logits") == []
    assert not (folder.path / "targets").exists()
    assert live.chosen.metrics["val_accuracy"] > 0.5


# --- specialists, on as many classes as they need ---


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty classes of noisy 8x8 pictures, in five groups of four that look alike."""
    root = tmp_path_factory.mktemp("twenty")
    rng = np.random.default_rng(0)
    groups = rng.integers(60, 200, (5, 8, 8))
    kinds = [groups[number // 4] + rng.integers(-25, 25, (8, 8)) for number in range(20)]
    for split, count in (("train", 20), ("val", 15), ("test", 15)):
        for number, kind in enumerate(kinds):
            folder = root / split / f"class_{number:02d}"
            folder.mkdir(parents=True)
            for n in range(count):
                picture = np.clip(kind + rng.normal(0, 25, (8, 8)), 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / f"{n}.png")
    return root


def test_specialists_make_one_teacher_that_is_distilled(twenty: Path, tmp_path: Path) -> None:
    summary, folder, ear, count = run(
        tmp_path,
        f"data={{name: folder, root: '{twenty}'}}",
        "members=2",
        "members.source=specialists",
        "train.epochs=6",
        "confirm.seeds=1",
    )
    trained = [job for job in count.kinds("train") if job["stage"] == "specialists"]
    clusters = [job["specialist"] for job in trained]
    assert sorted(number for classes in clusters for number in classes) == list(range(20))
    generalist = members_of(folder)[0]
    assert all(generalist["checkpoint"] in job["start"]["checkpoint"] for job in trained)
    (teacher,) = load_json(folder.path / "sources" / "specialists.json")["teachers"]
    taught = [job for job in count.kinds("train") if job["teachers"]]
    assert {row["hash"] for job in taught for row in job["teachers"]} == {teacher["hash"]}
    parts = load_json(folder.path / teacher["checkpoint"])["parts"]
    assert len(parts) == 1 + len(clusters)
    row = named(summary, "generalist and specialists")
    best = named(summary, "best member on validation")
    assert row.metrics["test_accuracy"] > best.metrics["test_accuracy"] - 0.1
    assert row.metrics["test_nll"] != best.metrics["test_nll"]
    assert summary.teacher.source == "specialists"
    assert ear.notes == []


def test_a_lineage_is_a_source_of_members(tmp_path: Path) -> None:
    """What a born-again run leaves is taken by its results alone."""
    done = RunFolder.create(tmp_path / "lineage", load_config())
    (done.generation(0)).mkdir()
    (done.generation(0) / "student.safetensors").touch()
    model = Model("a", "generation_000/student.safetensors")
    result = GenerationResult(generation=0, trial=0, models=(model,))
    save_row(done.generation(0) / "result.json", result)
    assert find_members(str(done.path)) == [done.generation(0) / "student.safetensors"]


def test_the_metric_of_the_search_orders_members_and_chooses_the_student(tmp_path: Path) -> None:
    by_nll = ("search.metric=val_nll", "search.mode=min", "confirm.seeds=1", "search.trials=4")
    by_nll += ("members.compare=[greedy_soup]", "members.same_init=true", "train.epochs=8")
    summary, folder, _, _ = run(tmp_path, *by_nll)
    members = members_of(folder)
    assert members == sorted(members, key=lambda row: row["val_nll"])
    trials = [load_json(path) for path in folder.path.glob("student/trial_*/result.json")]
    best = min(trials, key=lambda row: row["val_nll"])
    assert summary.chosen.hash == best["hash"]
    assert summary.chosen.metrics["val_nll"] == best["val_nll"]


def test_a_metric_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.metric must be one of val_accuracy, val_nll"):
        run(tmp_path, "search.metric=f1")


def test_a_transfer_set_is_compared_with_distillation_without_it(tmp_path: Path) -> None:
    """A third student of the same seeds and setting, whose test split is the same."""
    transfer = "data.transfer={name: digits, size: 300, weight: 0.6}"
    summary, folder, ear, count = run(tmp_path, transfer, "data.val_size=100", "confirm.seeds=2")
    names = [row.name for row in summary.rows][-3:]
    assert names == [
        "student, labels only",
        "student, without transfer set",
        "student, from its teacher",
    ]
    without, student = (np.array(row.runs) for row in summary.rows[-2:])
    assert summary.transfer_gain is not None
    assert summary.transfer_gain.value == pytest.approx((student - without).mean())
    assert "the same without the transfer set" in " ".join(summary.verdict.sentences)
    of = [job.get("of") for job in count.kinds("cache_teacher_logits")]
    assert of == [None, "transfer"] * 3
    weights = [job["config"]["data"]["transfer"]["weight"] for job in count.kinds("train")]
    assert sorted(weights[-6:]) == [0.0, 0.0, 0.6, 0.6, 0.6, 0.6]
    assert folder.facts.transfer == 300
    assert any("300 images without labels" in note for note in ear.notes)
    lines = describe_ensemble(summary)
    assert any("without the transfer set" in line for line in lines)
