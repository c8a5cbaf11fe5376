"""The config as it is looked up: `selfkd config`, `--help-config`, the schema for editors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from selfkd import capacity, ensemble, generations, study
from selfkd.config import Config, load_config, load_yaml
from selfkd.config.__main__ import main
from selfkd.config.reference import commented_yaml, describe_key, field_docstrings, json_schema
from selfkd.config.schema import flat
from selfkd.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "tune_configs").rglob("*.yaml"))
SCHEMA = ROOT / "selfkd" / "config" / "config.schema.json"


def faults(tree: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(json_schema()).iter_errors(tree)]


def test_the_schema_in_the_repository_is_up_to_date() -> None:
    Draft202012Validator.check_schema(json_schema())
    assert json.loads(SCHEMA.read_text()) == json_schema(), (
        f"python -m selfkd.config --schema > {SCHEMA.relative_to(ROOT)}"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_names_the_schema_and_is_valid_by_it(path: Path) -> None:
    text = path.read_text()
    line, *_ = [line for line in text.splitlines() if "$schema=" in line]
    name = line.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / name).resolve() == SCHEMA
    assert faults(load_yaml(path) or {}) == []


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        ({"trian": {}}, "Additional properties are not allowed ('trian' was unexpected)"),
        ({"train": {"lr": 0}}, "0 is less than or equal to the minimum of 0"),
        ({"train": {"schedule": "linear"}}, "'linear' is not one of ['cosine', 'step', 'none']"),
        ({"search": {"space": {"distill.alpha": {"normal": [0, 1]}}}}, "'normal' was unexpected"),
        ({"members": "five"}, "'five' is not valid under any of the given schemas"),
    ],
)
def test_the_schema_refuses(tree: Any, fault: str) -> None:
    assert fault in " ".join(faults(tree))


@pytest.mark.parametrize(
    "tree",
    [
        {"tracking": "none", "members": 5, "rounds": "auto"},
        {"members": [{"name": "selfkd_cnn"}], "student": None},
        {"search": {"space": {"params.lr": {"choice": [1, 2]}, "train.lr": {"uniform": [1, 2]}}}},
        {"study": {"arms": {"a": {"set": {"distill.alpha": 0.5}}}}},
    ],
)
def test_the_schema_accepts_what_a_config_may_hold(tree: Any) -> None:
    assert faults(tree) == []


@pytest.mark.parametrize("path", [None, *CONFIGS], ids=lambda path: path.stem if path else "none")
def test_the_printed_config_is_the_resolved_one(
    path: Path | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(path)] if path else []
    assert main([*words, "--set", "train.lr=1e-3", "--epochs", "7"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    expected = load_config(path, settings=["train.lr=1e-3"], flags={"train.epochs": 7})
    assert load_config(printed) == expected
    assert faults(load_yaml(printed)) == []


def test_each_key_has_its_meaning_above_it() -> None:
    lines = commented_yaml(Config()).splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith("lr: 0"):  # of the training, not of a deployment
            assert lines[number - 1].strip().startswith("# Learning rate, after the warm-up")
    assert max(map(len, lines)) <= 100
    for text in field_docstrings(Config).values():
        assert f"# {text[:40]}" in "\n".join(lines)


def test_a_mistake_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--set", "trian.lr=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --set: trian: unknown key: did you mean train")


def test_every_key_and_section_is_described() -> None:
    for key in flat(Config()):
        assert describe_key(key).startswith(f"{key}: ")
    text = describe_key("distill")
    assert text.startswith("Distillation loss, ")
    assert "\n\ndistill.alpha: number, at least 0, at most 1 (default 0.65)\n    Weight" in text
    assert "members.checkpoints.each" in describe_key("members")
    for key, part in [
        ("data.transfer", "data.transfer.weight: "),
        ("distill.terms", "distill.terms.each.weight: "),
        ("study.arms", "study.arms.NAME.teacher: "),
    ]:
        assert f"\n\n{part}" in describe_key(key)
    assert describe_key("data.transfer.weight").startswith("data.transfer.weight: number")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("temperature", "did you mean distill.temperature, write.temperature?"),
        ("train.epoch", "did you mean train.epochs"),
        ("nonsense", "(sections: top level, data, data.augment, data.transfer, model"),
    ],
)
def test_an_unknown_key_has_its_likely_meaning(key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe_key(key)
    assert meant in str(caught.value)


@pytest.mark.parametrize("command", [generations, ensemble, capacity, study])
def test_each_command_says_what_a_key_means(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["--help-config", "train.lr"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("train.lr: number, above 0 (default 0.05)\n")
    assert said.endswith("flag: --lr\n")
    with pytest.raises(SystemExit) as caught:
        command.main(["--help-config", "train.l"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: train.l: unknown key: did you mean train.lr")


def test_it_is_a_command_and_starts_without_torch_and_ray() -> None:
    code = (
        "import sys; from selfkd.__main__ import main; sys.argv = ['selfkd', 'config', '--lr', '1']"
        "; main(); print([m for m in ('torch', 'ray', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "\n  lr: 1.0\n" in done.stdout
    assert done.stdout.endswith("[]\n")
