"""The schema: what wins over what, and every mistake named with its source, key and value."""

import dataclasses
import json
import re

import pytest

from selfkd.config import (
    RESERVED_ARGS,
    Config,
    DataConfig,
    DistillConfig,
    ModelConfig,
    SearchConfig,
    TrainConfig,
    differences,
    dump_config,
    from_tree,
    load_config,
    merge_settings,
    parse_yaml,
    to_tree,
)
from selfkd.config.space import Distribution
from selfkd.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_yaml(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write_yaml


def faults(write, text="", settings=(), flags=None):
    """The lines of the ConfigError, the path of the YAML file written as run.yaml."""
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, settings=settings, flags=flags)
    return str(caught.value).replace(str(path), "run.yaml").splitlines()


# --- precedence ---


@pytest.mark.parametrize(
    ("text", "settings", "flags", "rounds"),
    [
        ("", [], {}, Config().rounds),
        ("rounds: 1", [], {}, 1),
        ("rounds: 1", ["rounds=2"], {}, 2),
        ("rounds: 1", ["rounds=2", "rounds=3"], {}, 3),
        ("rounds: 1", ["rounds=2"], {"rounds": 4}, 4),
        ("rounds: 1", [], {"rounds": None}, 1),
        ("", [], {"rounds": 0}, 0),
        ("rounds: auto", [], {}, "auto"),
        ("rounds: auto", [], {"rounds": 3}, 3),
        ("", [], {"rounds": "auto"}, "auto"),
    ],
)
def test_flags_win_over_set_over_yaml_over_defaults(write, text, settings, flags, rounds):
    assert load_config(write(text), settings=settings, flags=flags).rounds == rounds


def test_each_source_changes_only_what_it_names(write):
    path = write("train: {lr: 0.2, epochs: 7}\ndistill: {alpha: 0.3}")
    config = load_config(path, settings=["train.lr=0.4"], flags={"train.batch_size": 8})
    assert config == Config(
        train=TrainConfig(lr=0.4, epochs=7, batch_size=8), distill=DistillConfig(alpha=0.3)
    )


def test_without_sources_there_are_the_defaults():
    assert load_config() == Config()


def test_a_section_is_merged_and_free_values_are_replaced(write):
    path = write("train: {lr: 0.2}\nmodel: {name: a, args: {width: 8, depth: 2}}")
    config = load_config(path, settings=["train={epochs: 3}", "model={args: {width: 4}}"])
    assert (config.train.lr, config.train.epochs) == (0.2, 3)
    assert config.model == ModelConfig(name="a", args={"width": 4})


def test_one_model_argument_is_added(write):
    path = write("model: {args: {width: 8}}")
    config = load_config(path, settings=["model.args.depth=1", "student.name=selfkd_cnn"])
    assert config.model.args == {"width": 8, "depth": 1}
    assert config.student == ModelConfig(name="selfkd_cnn")


@pytest.mark.parametrize(
    ("text", "settings", "space"),
    [
        (
            "",
            ["search.space.distill.alpha={uniform: [0, 0.5]}"],
            {
                "distill.temperature": {"loguniform": [1, 20]},
                "distill.alpha": {"uniform": [0, 0.5]},
            },
        ),
        (
            "search: {space: {train.lr: {loguniform: [1e-3, 1]}}}",
            ["search.space.distill.alpha={choice: [0, 1]}"],
            {"train.lr": {"loguniform": [1e-3, 1]}, "distill.alpha": {"choice": [0, 1]}},
        ),
        (
            "search: {space: {distill.alpha: {uniform: [0, 1]}}}",
            ["search.space.distill.alpha={choice: [0, 1]}"],
            {"distill.alpha": {"choice": [0, 1]}},
        ),
        ("search: {space: {distill.alpha: {uniform: [0, 1]}}}", ["search.space={}"], {}),
        (
            "search: {trials: 3}",
            ["search.space={model.args.width: {choice: [8, 16]}}"],
            {"model.args.width": {"choice": [8, 16]}},
        ),
    ],
)
def test_set_adds_one_search_key_or_replaces_the_space(write, text, settings, space):
    assert load_config(write(text), settings=settings).search.space == space


@pytest.mark.parametrize(
    ("text", "settings", "flags", "mode", "project"),
    [
        ("tracking: none", [], {}, "none", "selfkd"),
        ("", ["tracking=offline"], {}, "offline", "selfkd"),
        ("tracking: none", ["tracking.project=x"], {}, "none", "x"),
        ("tracking: {project: x}", ["tracking=none"], {}, "none", "x"),
        ("", ["tracking.project=x"], {"tracking": "none"}, "none", "x"),
        ("tracking: {mode: online}", [], {"tracking.mode": "none"}, "none", "selfkd"),
    ],
)
def test_tracking_may_be_given_by_its_mode(write, text, settings, flags, mode, project):
    tracking = load_config(write(text), settings=settings, flags=flags).tracking
    assert (tracking.mode, tracking.project) == (mode, project)


def test_merge_settings_changes_a_config_that_is_there():
    config = Config(train=TrainConfig(epochs=3))
    merged = merge_settings(config, settings=["train.lr=1e-2"], flags={"rounds": 1})
    assert merged == Config(rounds=1, train=TrainConfig(epochs=3, lr=0.01))
    assert config == Config(train=TrainConfig(epochs=3))
    with pytest.raises(ConfigError, match=r"--set: train\.lr: must be greater than 0, got -1"):
        merge_settings(config, settings=["train.lr=-1"], flags={})


# --- numbers and types ---


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".1e-2", "1.e-3", "+1e-3", "0.001", "1.0e-03"])
def test_numbers_as_people_write_them(write, text):
    assert load_config(write(f"train: {{lr: {text}}}")).train.lr == 0.001
    assert load_config(settings=[f"train.lr={text}"]).train.lr == 0.001


def test_a_whole_number_will_do_for_a_fraction():
    value = load_config(settings=["train.lr=1"]).train.lr
    assert value == 1.0
    assert type(value) is float


STRICT = [
    ("rounds", "-1", "must be a whole number of at least 0, or auto, got -1"),
    ("rounds", "1.5", "must be a whole number of at least 0, or auto, got 1.5"),
    ("rounds", "3.0", "must be a whole number of at least 0, or auto, got 3.0"),
    ("rounds", "true", "must be a whole number of at least 0, or auto, got True"),
    ("rounds", "'3'", "must be a whole number of at least 0, or auto, got '3'"),
    ("rounds", "many", "must be a whole number of at least 0, or auto, got 'many'"),
    ("rounds_max", "0", "must be greater than or equal to 1, got 0"),
    ("rounds", "null", "must be a whole number of at least 0, or auto, got None"),
    ("seed", "-1", "must be greater than or equal to 0, got -1"),
    ("name", "3", "must be a valid string, got 3"),
    ("name", "a/b", "must match pattern '^[\\w][\\w.-]*$', got 'a/b'"),
    ("name", ".hidden", "must match pattern '^[\\w][\\w.-]*$', got '.hidden'"),
    ("train.epochs", "0", "must be greater than or equal to 1, got 0"),
    ("train.lr", "0", "must be greater than 0, got 0"),
    ("train.lr", ".nan", "must be a finite number, got nan"),
    ("train.lr", "true", "must be a valid number, got True"),
    ("train.lr", "'0.1'", "must be a valid number, got '0.1'"),
    ("train.momentum", "1.0", "must be less than 1, got 1.0"),
    ("train.label_smoothing", "1", "must be less than 1, got 1"),
    ("train.clip_grad", "0", "must be greater than 0, got 0"),
    ("train.ema", "1.0", "must be less than 1, got 1.0"),
    ("train.amp", "fp16", "must be 'none', 'bfloat16' or 'float16', got 'fp16'"),
    ("train.compile", "1", "must be a valid boolean, got 1"),
    ("train.schedule", "linear", "must be 'cosine', 'step' or 'none', got 'linear'"),
    ("distill.temperature", "0", "must be greater than 0, got 0"),
    ("distill.temperature", ".nan", "must be a finite number, got nan"),
    ("distill.temperature", ".inf", "must be a finite number, got inf"),
    ("distill.temperature", "-1.5", "must be greater than 0, got -1.5"),
    ("distill.alpha", "1.5", "must be less than or equal to 1, got 1.5"),
    ("distill.alpha", "-0.1", "must be greater than or equal to 0, got -0.1"),
    ("distill.alpha", "{uniform: [0, 1]}", "must be a valid number, got {'uniform': [0, 1]}"),
    ("distill.teacher", "best", "must be previous, lineage or top:m with m >= 1, got 'best'"),
    ("distill.teacher", "top:0", "must be previous, lineage or top:m with m >= 1, got 'top:0'"),
    ("distill.average", "median", "must be 'probabilities' or 'logits', got 'median'"),
    ("search.trials", "0", "must be greater than or equal to 1, got 0"),
    ("search.algorithm", "grid", "must be 'sobol', 'random' or 'optuna', got 'grid'"),
    ("data.flip", "'yes'", "must be a valid boolean, got 'yes'"),
    ("data.crop", "1.5", "must be less than or equal to 1, got 1.5"),
    ("data.train_size", "2.5", "must be a valid integer, got 2.5"),
    ("resources.cpu", "0", "must be greater than 0, got 0"),
    ("resources.gpu", "-1", "must be greater than or equal to 0, got -1"),
    ("resources.workers", "0", "must be greater than or equal to 1, got 0"),
    ("resources.workers", "1.5", "must be a valid integer, got 1.5"),
    ("checkpoint.seconds", "-1", "must be greater than or equal to 0, got -1"),
    ("checkpoint.epochs", "0", "must be greater than or equal to 1, got 0"),
    ("tracking", "maybe", "must be 'auto', 'online', 'offline' or 'none', got 'maybe'"),
    ("train", "3", "must be an object, got 3"),
    ("train", "[1]", "must be an object, got [1]"),
    ("model.args", "3", "must be an object, got 3"),
    ("train.lr.x", "3", "must be a valid number, got {'x': 3}"),
]


@pytest.mark.parametrize(("key", "value", "message"), STRICT)
def test_a_bad_value_is_named_with_source_and_key(write, key, value, message):
    shown = {"tracking": "tracking.mode", "train.lr.x": "train.lr"}.get(key, key)
    assert faults(write, settings=[f"{key}={value}"]) == [f"--set: {shown}: {message}"]
    text = value
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    assert faults(write, text) == [f"run.yaml: {shown}: {message}"]


def test_workers_of_one_student_have_whole_gpus(write):
    settings = ["resources={gpu: 0.5, workers: 2}"]
    assert faults(write, settings=settings) == [
        "--set: resources.gpu: must be whole with several resources.workers, got 0.5"
    ]
    for gpu, workers in ((0.5, 1), (0, 2), (2, 2)):
        load_config(settings=[f"resources={{gpu: {gpu}, workers: {workers}}}"])


def test_checkpoints_can_be_left_out():
    config = load_config(settings=["checkpoint={seconds: null, epochs: null}"])
    assert (config.checkpoint.seconds, config.checkpoint.epochs) == (None, None)


def test_a_bad_flag_is_named(write):
    assert faults(write, "rounds: 1", ["rounds=2"], {"rounds": -3}) == [
        "command line: rounds: must be a whole number of at least 0, or auto, got -3"
    ]


@pytest.mark.parametrize(
    ("settings", "flags", "source"),
    [
        ([], {}, "run.yaml"),
        (["train.lr=-1"], {}, "--set"),
        (["train={lr: -1}"], {}, "--set"),
        (["train.lr=2"], {"train.lr": -1}, "command line"),
        (["train.epochs=2"], {}, "run.yaml"),
    ],
)
def test_the_source_is_the_one_that_won(write, settings, flags, source):
    (line,) = faults(write, "train: {lr: -1}", settings, flags)
    assert line == f"{source}: train.lr: must be greater than 0, got -1"


def test_the_nearest_source_is_named(write):
    (line,) = faults(
        write, "search: {trials: 3}", ["search.space={distill.alpha: {uniform: [0, 2]}}"]
    )
    assert line.startswith("--set: search.space.distill.alpha: must be less than or equal to 1")


# --- unknown keys ---


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("distil: {alpha: 1}", "distil: unknown key: did you mean distill?"),
        ("trainConfig: {}", "trainConfig: unknown key: did you mean tracking, train?"),
        (
            "train: {epoch: 3}",
            "train.epoch: unknown key: did you mean train.epochs, train.warmup_epochs, ",
        ),
        ("train: {lrConfig: 3}", "train.lrConfig: unknown key: did you mean train.lr, "),
        (
            "distill: {temprature: 2}",
            "distill.temprature: unknown key: did you mean distill.temperature, ",
        ),
        (
            "student: {nam: selfkd_mlp}",
            "student.nam: unknown key: did you mean student.name, student.args?",
        ),
        ("search.trials: 3", "search.trials: unknown key: did you mean search?"),
        ("search: {spaces: {}}", "search.spaces: unknown key: did you mean search.space, "),
        ("zzz: 1", "zzz: unknown key (known: rounds, rounds_max, seed, name, storage, data, "),
        ("1: 2", "1: unknown key (known: rounds, "),
    ],
)
def test_an_unknown_key_comes_with_close_ones(write, text, line):
    (fault,) = faults(write, text)
    assert fault.startswith(f"run.yaml: {line}")


def test_unknown_keys_of_set(write):
    lines = faults(write, settings=["model.argz.width=3", "a.b.c=1"])
    assert lines[0] == "--set: model.argz: unknown key: did you mean model.args, model.name?"
    assert lines[1].startswith("--set: a: unknown key (known: rounds, ")


def test_all_faults_come_at_once(write):
    lines = faults(
        write,
        """
        distill: {alpha: 1.5, temperature: 0, teacher: best}
        train: {lr: .nan, epochz: 3, batch_size: '3'}
        foo: 1
        search:
          space:
            distill.alpha: {uniform: [1, 0]}
            train.lr: {loguniform: [0, 1]}
            seed: {randint: [0, 9]}
        """,
        ["rounds", "train.epochs=[1", "rounds=-1"],
        {"seed": -2},
    )
    starts = [
        "--set must be dotted.key=value, got 'rounds'",
        "--set train.epochs: must be YAML: ",
        "--set: rounds: must be a whole number of at least 0, or auto, got -1",
        "command line: seed: must be greater than or equal to 0, got -2",
        "run.yaml: train.batch_size: must be a valid integer, got '3'",
        "run.yaml: train.lr: must be a finite number, got nan",
        "run.yaml: train.epochz: unknown key: did you mean train.epochs, ",
        "run.yaml: distill.temperature: must be greater than 0, got 0",
        "run.yaml: distill.alpha: must be less than or equal to 1, got 1.5",
        "run.yaml: distill.teacher: must be previous, lineage or top:m with m >= 1, got 'best'",
        "run.yaml: foo: unknown key",
        "run.yaml: search.space.distill.alpha: uniform must have low < high, got [1, 0]",
        "run.yaml: search.space.train.lr: loguniform must have low > 0, got [0, 1]",
        "run.yaml: search.space.seed: cannot be searched: all trials of a run share it",
    ]
    assert len(lines) == len(starts)
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, start


# --- files ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must be a mapping of config keys, got ['a', 'b']"),
        ("3", "must be a mapping of config keys, got 3"),
        ("rounds", "must be a mapping of config keys, got 'rounds'"),
        ("a: [", "must be YAML: while parsing a flow node"),
        ("rounds: 1\nseed: 1\nrounds: 2", "must be YAML: the key 'rounds' stands twice"),
        ("train: {lr: 1}\ntrain: {epochs: 2}", "must be YAML: the key 'train' stands twice"),
        ("2024-01-01: 3", "must be YAML: keys must be text"),
        ("? [a, b]\n: 3", "must be YAML: keys must be text"),
        ("rounds: \t1: 2\n", "must be YAML: "),
    ],
)
def test_a_file_that_is_no_config(write, text, message):
    (line,) = faults(write, text)
    assert line.startswith(f"run.yaml: {message}")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "name: !!python/object/apply:os.system ['touch {}']",
        "name: !!python/name:os.system",
        "name: !!python/object:selfkd.config.schema.Config {{}}",
    ],
)
def test_yaml_makes_no_python_objects(write, tmp_path, text):
    touched = tmp_path / "touched"
    (line,) = faults(write, text.format(touched))
    assert line.startswith("run.yaml: must be YAML: could not determine a constructor")
    (line,) = faults(write, settings=[f"name={text.format(touched)}"])
    assert "could not determine a constructor" in line or "must be a valid string" in line
    assert not touched.exists()


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"--config must be a readable file, got .*nope\.yaml: "):
        load_config(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match=r"--config must be a readable file"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match=r"--config must be a readable file, got .*latin\.yaml"):
        load_config(tmp_path / "latin.yaml")


def test_an_empty_file_and_empty_sections_are_defaults(write):
    assert load_config(write("")) == Config()
    assert load_config(write("# nothing\n")) == Config()
    assert load_config(write("train: {}\nsearch: {}")) == Config()


@pytest.mark.parametrize("setting", ["rounds", "", "=3", "train.lr:3"])
def test_a_setting_without_equals_is_refused(write, setting):
    assert faults(write, settings=[setting]) == [f"--set must be dotted.key=value, got {setting!r}"]


# --- search space ---


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
def test_a_search_space_that_cannot_be_followed(write, key, spec, message):
    (line,) = faults(write, settings=[f"search.space.{key}={spec}"])
    assert line.startswith(f"--set: search.space.{key}: {message}")
    (line,) = faults(write, f"search: {{space: {{{key}: {spec}}}}}")
    assert line.startswith(f"run.yaml: search.space.{key}: {message}")


def test_a_range_of_fractions_for_whole_numbers_is_refused(write):
    lines = faults(write, settings=["search.space.train.epochs={uniform: [1, 5]}"])
    assert lines[0] == "--set: search.space.train.epochs: must be a valid integer, got 1.0"


def test_generation_0_has_no_teacher_to_search(write):
    (line,) = faults(write, "search: {labels_only_space: {distill.alpha: {uniform: [0, 1]}}}")
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
def test_no_more_teachers_than_trials(write, text, line):
    assert faults(write, text) == [f"run.yaml: distill.teacher: {line}"]


def test_as_many_teachers_as_trials(write):
    config = load_config(write("distill: {teacher: top:3}\nsearch: {trials: 3}"))
    assert config.distill.teacher == "top:3"


def test_the_space_of_generation_0_has_no_distill_keys():
    assert Config().space(taught=False) == {}
    assert Config().space(taught=True) == {
        "distill.temperature": Distribution("loguniform", (1, 20)),
        "distill.alpha": Distribution("uniform", (0, 1)),
    }
    smoothing = {"train.label_smoothing": {"uniform": [0, 0.2]}}
    lr = {"train.lr": {"loguniform": [0.01, 0.1]}}
    alpha = {"distill.alpha": {"uniform": [0, 1]}}
    config = Config(search=SearchConfig(space=lr | alpha, labels_only_space=smoothing))
    assert list(config.space(taught=False)) == ["train.lr", "train.label_smoothing"]
    assert list(config.space(taught=True)) == ["train.lr", "distill.alpha"]


# --- one config from another ---


def test_at_puts_in_the_values_of_a_point():
    config = Config(model=ModelConfig(args={"depth": 1}))
    point = {"distill.alpha": 1, "train.lr": 0.25, "model.args.width": 8}
    assert config.at(point) == Config(
        model=ModelConfig(args={"depth": 1, "width": 8}),
        train=TrainConfig(lr=0.25),
        distill=DistillConfig(alpha=1.0),
    )
    assert config == Config(model=ModelConfig(args={"depth": 1}))
    assert config.at({}) == config


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"distill.alpha": 1.5}, r"distill\.alpha: must be less than or equal to 1, got 1\.5"),
        ({"distill.alpa": 1}, r"distill\.alpa: unknown key: did you mean distill\.alpha"),
    ],
)
def test_at_refuses_what_a_config_may_not_be(point, message):
    with pytest.raises(ConfigError, match=message):
        Config().at(point)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            rounds=2,
            name="1e5",  # text that looks like a number
            storage="1.5",
            student=ModelConfig(name="selfkd_cnn", args={"width": 4, "on": "off", "x": [1, 2.5]}),
            data=DataConfig(name="folder", root="~/ä b: c", crop=0.5, train_size=3),
            train=TrainConfig(lr=1e-7, clip_grad=1e20, ema=0.999),
            search=SearchConfig(space={"train.lr": {"loguniform": [1e-5, 1]}}),
        ),
    ],
    ids=["defaults", "everything"],
)
def test_a_dumped_config_reads_back_the_same(tmp_path, config):
    text = dump_config(config)
    assert from_tree(parse_yaml(text, "dump")) == config
    (tmp_path / "dump.yaml").write_text(text)
    assert load_config(tmp_path / "dump.yaml") == config
    assert from_tree(to_tree(config)) == config


def test_differences_name_each_value():
    old = Config(rounds=5, model=ModelConfig(name="selfkd_mlp"), search=SearchConfig(trials=2))
    new = Config(
        rounds=2,
        model=ModelConfig(name="selfkd_mlp", args={"width": 3}),
        student=ModelConfig(name="selfkd_cnn"),
        search=SearchConfig(trials=2, space={}),
    )
    assert differences(old, old) == []
    lines = differences(old, new)
    assert lines[0] == "rounds: 5 -> 2"
    assert lines[1] == "model.args: {} -> {'width': 3}"
    assert lines[2].startswith("search.space: {'distill.temperature': ")
    assert lines[3:] == ["student.name: None -> 'selfkd_cnn'", "student.args: None -> {}"]
    assert differences(new, old)[0] == "rounds: 2 -> 5"


def test_a_config_is_frozen():
    config = Config()
    for thing, name in [(config, "rounds"), (config.train, "lr"), (config.distill, "alpha")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 1)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("student.args.width=3", "--set: student: must have a name: set student.name"),
        (
            "train.warmup_epochs=40",
            "--set: train.warmup_epochs: must be less than train.epochs (40), got 40",
        ),
    ],
)
def test_settings_that_contradict_each_other(setting, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        load_config(settings=[setting])


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            ["rounds=auto", "confirm.seeds=1"],
            "--set: confirm.seeds: must be at least 2 with rounds auto: one seed is no evidence, "
            "got 1",
        ),
        (
            ["controls=[dkpp]", "confirm.seeds=0"],
            "--set: confirm.seeds: must be at least 1 with controls, which are confirmed too, "
            "got 0",
        ),
        (
            ["controls=[dkpp]", "rounds=0"],
            "--set: rounds: must be at least 1 with controls, which stand beside generation 1, "
            "got 0",
        ),
        (
            ["controls=[seeds, dkpp]", "distill.live=true"],
            "--set: controls: dkpp needs the teacher's stored answers, all of each: leave out "
            "distill.live and targets.top_k, or dkpp",
        ),
        (
            ["controls=[cwtm]", "targets.top_k=3"],
            "--set: controls: cwtm needs the teacher's stored answers, all of each: leave out "
            "distill.live and targets.top_k, or cwtm",
        ),
    ],
)
def test_what_makes_a_result_believed_must_fit_together(settings, fault):
    with pytest.raises(ConfigError) as error:
        load_config(settings=settings)
    assert str(error.value) == fault


def test_an_unknown_control_is_refused():
    with pytest.raises(ConfigError, match=r"controls.0: must be 'seeds', 'label_smoothing', .*'x'"):
        load_config(settings=["controls=[x]"])


def test_the_most_rounds_are_those_asked_for_or_the_limit_of_auto():
    assert load_config(settings=["rounds=3"]).most_rounds == 3
    assert load_config(settings=["rounds=auto"]).most_rounds == 10
    assert load_config(settings=["rounds=auto", "rounds_max=4"]).most_rounds == 4


EVIL = [
    {"pretrained": "x"},
    {"pretrained_cfg": {"url": "http://127.0.0.1/x.py"}},
    {"cache_dir": "."},
    {"checkpoint_path": "x"},
    {"act_layer": "os.system"},
    {"act_layer": "file:x"},
    {"act_layer": "../x"},
    {"blocks": [1, ["a/b"]]},
    {"cfg": {"a": 1}},
]


@pytest.mark.parametrize("args", EVIL)
@pytest.mark.parametrize(
    "setting",
    [
        "model.args={}",
        "student={{name: resnet18, args: {}}}",
        "members=[{{name: resnet18, args: {}}}]",
        "members.checkpoints=[{{path: a, model: resnet18, args: {}}}]",
    ],
)
def test_arguments_that_are_not_plain_ones_of_the_network_are_refused(setting, args):
    with pytest.raises(
        ConfigError, match=r"args: (must be arguments of the network alone|\w+ must be)"
    ):
        load_config(settings=[setting.format(json.dumps(args))])


@pytest.mark.parametrize(
    "key", ["search.space.model.args.act_layer", "capacity.values", "study.arms"]
)
def test_nor_do_they_come_in_by_a_search_or_an_arm(key):
    values = {
        "search.space.model.args.act_layer": {"choice": ["os.system"]},
    }
    if key in values:
        with pytest.raises(ConfigError, match="act_layer must be"):
            load_config(settings=[f"{key}={json.dumps(values[key])}"])
    else:
        with pytest.raises(ConfigError, match="act_layer must be"):
            Config().at({"model.args.act_layer": "os.system"})


def test_weights_of_timms_own_may_be_asked_for():
    assert load_config(settings=["model.args.pretrained=true"]).model.args["pretrained"] is True


def test_the_reserved_arguments_are_those_that_timm_names():
    from selfkd.models import reserved_args

    assert set(RESERVED_ARGS) == reserved_args()


def test_a_checkpoints_network_has_no_word_on_where_weights_come_from():
    args = {"pretrained": True, "cache_dir": ".", "pretrained_cfg": {"url": "x"}, "width": 4}
    model = ModelConfig.of_checkpoint({"name": "selfkd_cnn", "args": args})
    assert (model.name, model.args) == ("selfkd_cnn", {"width": 4})


@pytest.mark.parametrize(
    "model",
    [
        None,
        {"name": "selfkd_cnn"},
        {"name": ["selfkd_cnn"], "args": {}},
        {"name": "selfkd_cnn", "args": {"act_layer": "os.system"}},
        {"name": "selfkd_cnn", "args": [1]},
    ],
)
def test_a_checkpoint_of_no_plain_network_is_refused(model):
    with pytest.raises(ValueError, match="model must"):
        ModelConfig.of_checkpoint(model)
