"""Faults between settings: search spaces, teachers, resources, replication and controls."""

import re

import pytest

from selfkd.config import load_config, merge_settings
from selfkd.config.validate import check_capacity, check_study
from selfkd.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "spec", "message"),
    [
        (
            "distill.alpa",
            "{uniform: [0, 1]}",
            "is no config key: did you mean distill.alpha, distill.live, distill.average?",
        ),
        ("alpha", "{uniform: [0, 1]}", "is no config key"),
        ("train", "{choice: [{lr: 1}]}", "is no config key: did you mean train.lr, "),
        ("distill", "{choice: [{alpha: 1}]}", "is no config key: did you mean distill."),
        ("model.args.a.b", "{choice: [1]}", "is no config key: did you mean model.args, "),
        ("distill.alpha", "{uniform: [0.5, 0.5]}", "uniform must have low < high, got [0.5, 0.5]"),
        ("distill.alpha", "{uniform: [1, 0]}", "uniform must have low < high, got [1, 0]"),
        ("distill.alpha", "{choice: []}", "choice must have at least one value, got []"),
        ("distill.alpha", f"{{uniform: [0, {10**400}]}}", "uniform must be [low, high], got [0, 1"),
        ("distill.alpha", "{uniform: [0, 1e999]}", "uniform must be [low, high], got [0, inf]"),
        ("distill.alpha", "{normal: [0, 1]}", "distribution must be one of uniform, "),
        ("distill.alpha", "3", "a search space entry must be like {uniform: [0, 1]}, got 3"),
        ("distill.alpha", "null", "a search space entry must be like {uniform: [0, 1]}, got None"),
        ("distill.alpha", "{uniform: [0, 1], choice: [1]}", "a search space entry must be like"),
        ("distill.alpha", "{choice: abc}", "choice must have a list of values, got abc"),
        ("train.lr", "{uniform: [0.1, .nan]}", "uniform must be [low, high], got [0.1, nan]"),
        ("train.lr", "{loguniform: [0, 1]}", "loguniform must have low > 0, got [0, 1]"),
        ("distill.alpha", "{uniform: [0, 1.5]}", "must be less than or equal to 1, got 1.5"),
        ("distill.alpha", "{uniform: [-1, 1]}", "must be greater than or equal to 0, got -1.0"),
        ("train.epochs", "{randint: [0, 5]}", "must be greater than or equal to 1, got 0"),
        ("train.optimizer", "{choice: [sgd, 3]}", "must be a valid string, got 3"),
        (
            "train.schedule",
            "{choice: [cosine, linear, step, none, cosine]}",
            "must be 'cosine', 'step' or 'none', got 'linear'",
        ),
        ("seed", "{randint: [0, 9]}", "cannot be searched: all trials of a run share it"),
        ("rounds", "{randint: [0, 9]}", "cannot be searched: all trials of a run share it"),
        ("data.jitter", "{randint: [0, 2]}", "cannot be searched: all trials of a run share it"),
        ("search.trials", "{randint: [1, 2]}", "cannot be searched: all trials of a run share it"),
        ("distill.live", "{choice: [true]}", "cannot be searched: all trials of a run share it"),
        (
            "distill.teacher",
            "{choice: [previous, lineage]}",
            "cannot be searched: all trials of a run share it",
        ),
    ],
)
def test_impossible_search_spaces_are_refused(faults, key, spec, message):
    (line,) = faults(settings=[f"search.space.{key}={spec}"])
    assert line.startswith(f"--set: search.space.{key}: {message}")
    (line,) = faults(f"search: {{space: {{{key}: {spec}}}}}")
    assert line.startswith(f"run.yaml: search.space.{key}: {message}")


def test_a_range_of_fractions_for_whole_numbers_is_refused(faults):
    lines = faults(settings=["search.space.train.epochs={uniform: [1, 5]}"])
    assert lines[0] == "--set: search.space.train.epochs: must be a valid integer, got 1.0"


def test_generation_0_has_no_teacher_to_search(faults):
    (line,) = faults("search: {labels_only_space: {distill.alpha: {uniform: [0, 1]}}}")
    assert line == (
        "run.yaml: search.labels_only_space.distill.alpha: "
        "cannot be searched on labels only: there is no teacher"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("distill: {teacher: top:9}", "must be at most top:8, the number of trials, got 'top:9'"),
        (
            "distill: {teacher: top:4}\nsearch: {trials: 3}",
            "must be at most top:3, the number of trials, got 'top:4'",
        ),
    ],
)
def test_no_more_teachers_than_trials(faults, text, line):
    assert faults(text) == [f"run.yaml: distill.teacher: {line}"]


def test_as_many_teachers_as_trials(write):
    config = load_config(write("distill: {teacher: top:3}\nsearch: {trials: 3}"))
    assert config.distill.teacher == "top:3"


def test_workers_of_one_student_have_whole_gpus(faults):
    settings = ["resources={gpu: 0.5, workers: 2}"]
    assert faults(settings=settings) == [
        "--set: resources.gpu: must be whole with several resources.workers, got 0.5"
    ]
    for gpu, workers in ((0.5, 1), (1, 1), (2, 1), (0, 2), (2, 2)):
        load_config(settings=[f"resources={{gpu: {gpu}, workers: {workers}}}"])


def test_a_trial_has_a_part_of_one_gpu_or_whole_ones(faults):
    assert faults(settings=["resources.gpu=1.5"]) == [
        "--set: resources.gpu: must be whole above 1, got 1.5"
    ]


def test_the_warm_up_is_shorter_than_the_training():
    line = "--set: train.warmup_epochs: must be less than train.epochs (40), got 40"
    with pytest.raises(ConfigError, match=re.escape(line)):
        load_config(settings=["train.warmup_epochs=40"])


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            ["rounds=auto", "confirm.seeds=2"],
            "--set: confirm.seeds: must be at least 3 with rounds auto: fewer are no evidence, "
            "got 2",
        ),
        (
            ["controls=[dkpp]", "confirm.seeds=0"],
            "--set: confirm.seeds: must be at least 1 with controls, which are replicated too, "
            "got 0",
        ),
        (
            ["controls=[dkpp]", "rounds=0"],
            "--set: rounds: must be at least 1 with controls, which need generation 1, got 0",
        ),
        (
            ["rounds=auto", "confirm.baseline=false"],
            "--set: confirm.baseline: must be true with rounds auto, which stops by it, got false",
        ),
        (
            ["controls=[dkpp]", "confirm.baseline=false"],
            "--set: confirm.baseline: must be true with controls, which stand beside it, got false",
        ),
        (
            ["confirm.lineages=2", "confirm.baseline=false"],
            "--set: confirm.baseline: must be true with confirm.lineages, which begin with it, "
            "got false",
        ),
        (
            ["controls=[seeds, dkpp]", "distill.live=true"],
            "--set: controls: dkpp needs cached teacher logits of all classes: leave out "
            "distill.live and targets.top_k, or dkpp",
        ),
        (
            ["controls=[cwtm]", "targets.top_k=3"],
            "--set: controls: cwtm needs cached teacher logits of all classes: leave out "
            "distill.live and targets.top_k, or cwtm",
        ),
        (
            ["controls=[hard]", "targets.top_k=3"],
            "--set: controls: hard needs cached teacher logits of all classes: leave out "
            "distill.live and targets.top_k, or hard",
        ),
        (
            ["controls=[class_mean]", "data.transfer={name: mnist}"],
            "--set: controls: class_mean needs the label of each item: leave out data.transfer",
        ),
    ],
)
def test_replication_and_controls_must_fit_together(settings, fault):
    with pytest.raises(ConfigError) as error:
        load_config(settings=settings)
    assert str(error.value) == fault


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[null]", r"must be numbers or words, got [None]"),
        ("[[1], 2]", r"must be numbers or words, got [[1]]"),
        ("[{}]", r"must be numbers or words, got [{}]"),
        ("[true, 2]", r"must be numbers or words, got [True]"),
        ("[1, 1.0]", r"must be different ones, got [1, 1.0]"),
        ("[a, a]", r"must be different ones, got ['a', 'a']"),
    ],
)
def test_sizes_are_different_numbers_or_words(values, message):
    config = load_config(settings=[f"capacity.values={values}"])
    with pytest.raises(ConfigError, match=re.escape(message)) as found:
        check_capacity(config)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("check", [check_capacity, check_study])
def test_curves_and_studies_have_a_baseline_of_their_own(check):
    settings = ["confirm.baseline=false", "study.arms={a: {}}"]
    with pytest.raises(ConfigError, match=r"^confirm\.baseline must be true: a .*, got false$"):
        check(load_config(settings=settings))


@pytest.mark.parametrize(
    ("settings", "flags", "refused"),
    [
        (["confirm.lineages=6"], {"confirm.seeds": 10}, True),  # as --seeds 10
        (["confirm.lineages=6", "confirm.seeds=10"], {}, False),
        (["confirm.lineages=0"], {"confirm.seeds": 10}, False),
        (["confirm.seeds=10"], {"confirm.lineages": 6}, False),
    ],
)
def test_seeds_that_would_be_passed_over_are_refused(settings, flags, refused):
    def load():
        return load_config(settings=settings, flags=flags)

    if not refused:
        assert load().confirm.seeds == 10
        return
    with pytest.raises(ConfigError, match="6 whole lineages take the place of seeds"):
        load()


def test_seeds_for_a_run_of_whole_lineages_name_the_way_out():
    old = load_config(settings=["confirm.lineages=6"])
    with pytest.raises(ConfigError, match=r"raise confirm\.lineages, or give"):
        merge_settings(old, settings=["confirm.seeds=10"], flags={})
    fresh = ["confirm.seeds=10", "confirm.lineages=0"]
    assert merge_settings(old, settings=fresh, flags={}).confirm.replicas == 10
