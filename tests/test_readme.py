"""What the README shows works as it stands."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from selfkd import capacity, ensemble, generations, study, submit
from selfkd.config import load_config
from selfkd.experiments.study import check_study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.replace("\\\n", " ").partition("  #")[0]
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in re.split(r"(?<!\\)\n", block)
    if re.search(r"python -m selfkd\.(generations|ensemble|capacity|study|submit)", line)
]


def test_the_two_commands_come_first_and_ci_runs_the_second() -> None:
    first, second = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert first.startswith("pip install -e . && python -m selfkd.generations --rounds 5")
    command = second.partition("  #")[0].strip()
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    words = shlex.split(command)
    module = next(word for word in words if word.startswith("selfkd."))
    words = words[words.index(module) + 1 :]
    if module == "selfkd.submit":
        submit.make_parser().parse_args(words[: words.index("--")])
        module, *words = words[words.index("--") + 1 :]
    modules = {
        "generations": generations,
        "ensemble": ensemble,
        "capacity": capacity,
        "study": study,
    }
    arguments = modules[module.removeprefix("selfkd.")].make_parser().parse_args(words)
    config = ROOT / arguments.config if arguments.config else None
    load_config(config, settings=arguments.settings)


def test_inline_settings_are_understood() -> None:
    settings = re.findall(r"`--set '?([^`']+)'?`", README)
    assert len(settings) >= 2
    for setting in settings:
        if "dotted.key" not in setting:
            load_config(settings=[setting])


def test_the_study_is_understood(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(study:.*?)```", README, re.DOTALL)
    (tmp_path / "study.yaml").write_text(block)
    check_study(load_config(tmp_path / "study.yaml"))


def test_plug_in_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    inputs = torch.randn(64, 4)
    labels = (inputs.sum(dim=1) > 0).long()
    names = {
        "make_model": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        "loader": [(inputs[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)],
    }
    exec(compile(example, "README.md", "exec"), names)
    model = names["model"]
    assert (model(inputs).argmax(dim=1) == labels).float().mean() > 0.7  # type: ignore[operator]


def test_file_tree_names_what_is_there() -> None:
    tree = README.split("## The files")[1].split("## What it does not do")[0]
    for path in (ROOT / "selfkd").iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert path.name in tree
    for name in re.findall(r"\b(\w+\.py|\w+/)", tree):
        assert list(ROOT.rglob(name.rstrip("/"))), name


def test_extras_and_script_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) >= {"test", "dev", "cluster", "optuna"}
    assert project["scripts"]["selfkd"] == "selfkd.__main__:main"
    assert project["requires-python"] == ">=3.11"
