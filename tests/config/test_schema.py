"""The schema: every invalid value or unknown key is named, with close ones; points and networks."""

import ast
import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from selfkd.config import (
    RESERVED_ARGS,
    Config,
    DistillConfig,
    ModelConfig,
    SearchConfig,
    TrainConfig,
    load_config,
    schema,
)
from selfkd.config.space import Distribution
from selfkd.errors import ConfigError

# --- values ---


def test_whole_numbers_are_accepted_for_floats():
    value = load_config(settings=["train.lr=1"]).train.lr
    assert value == 1.0
    assert type(value) is float


STRICT = [
    ("student", "[]", "must be a list that is not empty, got []"),
    ("train.init", "{}", "must be a mapping that is not empty, got {}"),
    ("rounds", "1e400", "must be a whole number of at least 0, or auto, got inf"),
    ("rounds", str(10**12), f"must be at most 10000, got {10**12}"),
    ("rounds_max", str(10**12), f"must be less than or equal to 10000, got {10**12}"),
    ("seed", str(10**30), f"must be less than {2**63}, got {10**30}"),
    ("search.trials", str(10**12), f"must be less than or equal to 100000, got {10**12}"),
    ("confirm.seeds", str(10**12), f"must be less than or equal to 10000, got {10**12}"),
    ("members.count", str(10**12), f"must be less than or equal to 10000, got {10**12}"),
    ("data.views", str(10**12), f"must be a whole number from 1 to 10000, or fresh, got {10**12}"),
    ("data.views", "often", "must be a whole number from 1 to 10000, or fresh, got 'often'"),
    ("data.augment.preset", "heavy", "must be 'none', 'light' or 'strong', got 'heavy'"),
    ("data.augment.mixup", "-1", "must be greater than or equal to 0, got -1"),
    ("data.repeats", "0", "must be greater than or equal to 1, got 0"),
    ("data.repeats", "2", "must be 1 without augmentation, got 2: set data.augment"),
    ("train.epochs", str(10**12), f"must be less than or equal to 1000000, got {10**12}"),
    ("train.lr", "1e-320", "must be in [1e-37, 1e37], as single precision has it, got 1e-320"),
    ("train.lr", "1e308", "must be in [1e-37, 1e37], as single precision has it, got 1e+308"),
    (
        "distill.temperature",
        "1e-320",
        "must be in [1e-37, 1e37], as single precision has it, got 1e-320",
    ),
    ("tracking.wait", "1e308", "must be less than or equal to 1000000000, got 1e+308"),
    ("resources.wait", "1e308", "must be less than or equal to 1000000000, got 1e+308"),
    ("search.metric", "seconds", "must be a metric, got seconds, which selfkd sets itself"),
    ("params", "{a: [1, {b: .nan}]}", "must have finite numbers, got {'a': [1, {'b': nan}]}"),
    ("model.args", "{width: .inf}", "must have finite numbers, got {'width': inf}"),
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
    ("train.amp", "fp16", "must be 'none', 'bfloat16', 'float16' or 'auto', got 'fp16'"),
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
    ("data.label_noise", "1", "must be less than 1, got 1"),
    ("data.label_noise", "-0.1", "must be greater than or equal to 0, got -0.1"),
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
def test_a_bad_value_is_named_with_source_and_key(faults, key, value, message):
    shown = {"tracking": "tracking.mode", "train.lr.x": "train.lr"}.get(key, key)
    assert faults(settings=[f"{key}={value}"]) == [f"--set: {shown}: {message}"]
    text = value
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    assert faults(text) == [f"run.yaml: {shown}: {message}"]


def test_checkpoints_can_be_left_out():
    config = load_config(settings=["checkpoint={seconds: null, epochs: null}"])
    assert (config.checkpoint.seconds, config.checkpoint.epochs) == (None, None)


def test_an_unknown_control_is_refused():
    with pytest.raises(ConfigError, match=r"controls.0: must be 'seeds', 'label_smoothing', .*'x'"):
        load_config(settings=["controls=[x]"])


def test_a_config_is_frozen():
    config = Config()
    for thing, name in [(config, "rounds"), (config.train, "lr"), (config.distill, "alpha")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 1)


def test_every_key_is_documented():
    tree = ast.parse(Path(schema.__file__).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bare = [
        f"{section.name}.{ast.unparse(field.target)}"
        for section in classes
        for field, after in pairwise([*section.body, None])
        if isinstance(field, ast.AnnAssign)
        and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]
    assert len(classes) > 10
    assert bare == []


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
        ("zzz: 1", "zzz: unknown key (known: rounds, rounds_max, seed, name, storage, task, "),
        ("1: 2", "1: unknown key (known: rounds, "),
    ],
)
def test_an_unknown_key_is_reported_with_close_ones(faults, text, line):
    (fault,) = faults(text)
    assert fault.startswith(f"run.yaml: {line}")


def test_unknown_keys_of_set(faults):
    lines = faults(settings=["model.argz.width=3", "a.b.c=1"])
    assert lines[0] == "--set: model.argz: unknown key: did you mean model.args, model.name?"
    assert lines[1].startswith("--set: a: unknown key (known: rounds, ")


# --- points of the search space ---


def test_the_space_of_generation_0_has_no_distill_keys():
    assert Config().space(with_teacher=False) == {}
    assert Config().space(with_teacher=True) == {
        "distill.temperature": Distribution("loguniform", (1, 10)),
        "distill.alpha": Distribution("uniform", (0.1, 1)),
    }
    smoothing = {"train.label_smoothing": {"uniform": [0, 0.2]}}
    lr = {"train.lr": {"loguniform": [0.01, 0.1]}}
    alpha = {"distill.alpha": {"uniform": [0, 1]}}
    config = Config(search=SearchConfig(space=lr | alpha, labels_only_space=smoothing))
    assert list(config.space(with_teacher=False)) == ["train.lr", "train.label_smoothing"]
    assert list(config.space(with_teacher=True)) == ["train.lr", "distill.alpha"]


OWN = {"distill.temperature": 3.5, "distill.alpha": 0.65}
PAPER = {"distill.temperature": 1.0, "distill.alpha": 1.0}


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ([], [OWN, OWN, OWN, PAPER]),
        (["search.trials=4", "distill.alpha=0.3"], [OWN | {"distill.alpha": 0.3}, PAPER]),
        (["search.trials=3"], []),  # would be most of all
        (["search.space={distill.alpha: {uniform: [0, 1]}}"], []),
        (["search.space.train.lr={loguniform: [0.01, 0.1]}"], []),
        (
            ["search.space.train.lr={loguniform: [0.01, 0.1]}", "search.points=[{train.lr: 1}]"],
            None,
        ),
        (["search.points=[]"], []),
    ],
)
def test_the_own_setting_and_the_paper_s_are_tried_unless_the_user_gives_space_or_points(
    settings, points
):
    config = load_config(settings=settings)
    assert config.search.points == ([{"train.lr": 1}] if points is None else points)
    assert schema.from_tree(schema.to_tree(config)) == config  # resolved, also with other settings
    assert config.at({"search.trials": 2}).search.points == config.search.points


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ("{}", "must have at least one key"),
        ("{seed: 3}", "seed cannot be searched"),
        ("{distill.alpha: 3}", "distill.alpha: must be less than or equal to 1, got 3"),
        ("{distill.alpah: 1}", "distill.alpah is no config key: did you mean distill.alpha"),
        ("3", "must be an object, got 3"),
    ],
)
def test_a_point_that_cannot_be_tried_is_refused(point, fault):
    with pytest.raises(ConfigError, match=f"--set: search.points.1: {fault}"):
        load_config(settings=[f"search.points=[{{distill.alpha: 1}}, {point}]"])


def test_at_sets_the_values_of_a_point():
    config = Config(model=ModelConfig(args={"depth": 1}))
    point = {"distill.alpha": 1, "train.lr": 0.25, "model.args.width": 8}
    assert config.at(point) == Config(
        search=config.search,  # its points stay those that were resolved
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
def test_at_refuses_invalid_values(point, message):
    with pytest.raises(ConfigError, match=message):
        Config().at(point)


def test_the_most_rounds_are_rounds_or_the_limit_of_auto():
    assert load_config(settings=["rounds=3"]).most_rounds == 3
    assert load_config(settings=["rounds=auto"]).most_rounds == 10
    assert load_config(settings=["rounds=auto", "rounds_max=4"]).most_rounds == 4


# --- networks ---


def test_a_student_must_have_a_name():
    line = "--set: student: must have a name: set student.name"
    with pytest.raises(ConfigError, match=re.escape(line)):
        load_config(settings=["student.args.width=3"])


UNSAFE = [
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


@pytest.mark.parametrize("args", UNSAFE)
@pytest.mark.parametrize(
    "setting",
    [
        "model.args={}",
        "student={{name: resnet18, args: {}}}",
        "members=[{{name: resnet18, args: {}}}]",
        "members.checkpoints=[{{path: a, model: resnet18, args: {}}}]",
    ],
)
def test_unsafe_arguments_of_networks_are_refused(setting, args):
    with pytest.raises(
        ConfigError, match=r"args: (must be arguments of the network alone|\w+ must be)"
    ):
        load_config(settings=[setting.format(json.dumps(args))])


@pytest.mark.parametrize(
    "key", ["search.space.model.args.act_layer", "capacity.values", "study.arms"]
)
def test_unsafe_arguments_are_refused_in_searches_and_arms(key):
    values = {
        "search.space.model.args.act_layer": {"choice": ["os.system"]},
    }
    if key in values:
        with pytest.raises(ConfigError, match="act_layer must be"):
            load_config(settings=[f"{key}={json.dumps(values[key])}"])
    else:
        with pytest.raises(ConfigError, match="act_layer must be"):
            Config().at({"model.args.act_layer": "os.system"})


def test_pretrained_weights_of_timm_are_allowed():
    assert load_config(settings=["model.args.pretrained=true"]).model.args["pretrained"] is True


def test_the_reserved_arguments_are_those_of_timm():
    from selfkd.models import reserved_args

    assert set(RESERVED_ARGS) == reserved_args()


def test_reserved_arguments_of_a_checkpoint_are_dropped():
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
def test_a_checkpoint_without_a_plain_network_is_refused(model):
    with pytest.raises(ValueError, match="model must"):
        ModelConfig.of_checkpoint(model)


def test_long_values_are_cut_in_messages(faults):
    (message,) = faults(settings=[f"train.lr='{'x' * 5_000_000}'"])
    assert message.startswith("--set: train.lr: must be a valid number, got 'xxx")
    assert len(message) < 400


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ((), "max"),
        (("search.metric=val_nll",), "min"),
        (("search.metric=val_token_accuracy",), "max"),
        (("search={metric: val_nll, mode: max}",), "max"),
        (("search.metric=val_f1",), "max"),
    ],
)
def test_the_mode_of_a_known_metric_is_known(settings: tuple[str, ...], mode: str) -> None:
    config = load_config(settings=settings)
    assert config.search.mode == mode
    assert config.at({"distill.alpha": 0.5}).search.mode == mode
