"""Reading a config: what takes precedence, and every mistake named with its source."""

import time
from pathlib import Path

import pytest

from selfkd.config import (
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
from selfkd.errors import ConfigError
from selfkd.results import FORMAT

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
                "distill.temperature": {"loguniform": [1, 10]},
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
def test_tracking_is_set_by_its_mode(write, text, settings, flags, mode, project):
    tracking = load_config(write(text), settings=settings, flags=flags).tracking
    assert (tracking.mode, tracking.project) == (mode, project)


def test_merge_settings_changes_an_existing_config():
    config = Config(train=TrainConfig(epochs=3))
    merged = merge_settings(config, settings=["train.lr=1e-2"], flags={"rounds": 1})
    assert merged == Config(rounds=1, train=TrainConfig(epochs=3, lr=0.01))
    assert config == Config(train=TrainConfig(epochs=3))
    with pytest.raises(ConfigError, match=r"--set: train\.lr: must be greater than 0, got -1"):
        merge_settings(config, settings=["train.lr=-1"], flags={})


# --- sources of faults ---


def test_a_bad_flag_is_named(faults):
    assert faults("rounds: 1", ["rounds=2"], {"rounds": -3}) == [
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
def test_the_winning_source_is_named(faults, settings, flags, source):
    (line,) = faults("train: {lr: -1}", settings, flags)
    assert line == f"{source}: train.lr: must be greater than 0, got -1"


def test_the_nearest_source_is_named(faults):
    (line,) = faults("search: {trials: 3}", ["search.space={distill.alpha: {uniform: [0, 2]}}"])
    assert line.startswith("--set: search.space.distill.alpha: must be less than or equal to 1")


def test_all_faults_are_reported_at_once(faults):
    lines = faults(
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


@pytest.mark.parametrize("setting", ["rounds", "", "=3", "train.lr:3"])
def test_a_setting_without_equals_is_refused(faults, setting):
    assert faults(settings=[setting]) == [f"--set must be dotted.key=value, got {setting!r}"]


# --- files ---


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".1e-2", "1.e-3", "+1e-3", "0.001", "1.0e-03"])
def test_numbers_as_people_write_them(write, text):
    assert load_config(write(f"train: {{lr: {text}}}")).train.lr == 0.001
    assert load_config(settings=[f"train.lr={text}"]).train.lr == 0.001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must be a mapping of config keys, got ['a', 'b']"),
        ("3", "must be a mapping of config keys, got 3"),
        ("rounds", "must be a mapping of config keys, got 'rounds'"),
        ("a: [", "must be YAML: while parsing a flow node"),
        ("rounds: 1\nseed: 1\nrounds: 2", "must be YAML: the key 'rounds' is given twice"),
        ("train: {lr: 1}\ntrain: {epochs: 2}", "must be YAML: the key 'train' is given twice"),
        ("2024-01-01: 3", "must be YAML: keys must be text"),
        ("? [a, b]\n: 3", "must be YAML: keys must be text"),
        ("rounds: \t1: 2\n", "must be YAML: "),
        ("seed: 0x" + "f" * 9000, "must be YAML: numbers must have fewer"),
        (
            "params: {a: 1" + ":1" * 700 + "}",
            "must be YAML: numbers must have fewer",
        ),
        ('params: {a: "\\ud800"}', "must be YAML: text must be Unicode"),
        ("params: {a: !!binary aGk=}", "must be YAML: could not determine a constructor"),
        ("params: {a: !!set {b, c}}", "must be YAML: could not determine a constructor"),
        ("params: {a: [" + "1," * 2**19 + "]}", "must have at most 524,288 characters"),
    ],
)
def test_a_file_without_a_config_is_refused(faults, text, message):
    (line,) = faults(text)
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
def test_yaml_makes_no_python_objects(faults, tmp_path, text):
    touched = tmp_path / "touched"
    (line,) = faults(text.format(touched))
    assert line.startswith("run.yaml: must be YAML: could not determine a constructor")
    (line,) = faults(settings=[f"name={text.format(touched)}"])
    assert "could not determine a constructor" in line or "must be a valid string" in line
    assert not touched.exists()


@pytest.mark.parametrize("text", ["1" * 100_000 + "e", "1." * 50_000 + "e", "." * 100_000])
def test_a_long_word_is_read_in_linear_time(text):
    start = time.process_time()
    assert parse_yaml(text, "run.yaml") == text
    assert time.process_time() - start < 20  # all ways to split its digits take minutes


def test_an_unreadable_file_is_named(tmp_path):
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


def test_the_config_of_a_run_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"format: {FORMAT}\nrounds: 7\n")
    assert load_config(path).rounds == 7
    path.write_text("format: 99\nrounds: 7\n")
    with pytest.raises(ConfigError, match="format: unknown key"):
        load_config(path)


def test_names_of_arms_are_the_words_as_they_are_written() -> None:
    config = load_config(settings=["study.arms={no: {}, 1: {}, on: {}}"])
    assert list(config.study.arms) == ["no", "1", "on"]
    assert parse_yaml("{null: no}", "x.yaml") == {"null": False}
