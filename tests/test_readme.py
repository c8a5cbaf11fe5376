"""What the README and the pages of docs/ show works as it stands."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from selfkd import submit
from selfkd.__main__ import command_module
from selfkd.cli.options import config_flags
from selfkd.config import load_config
from selfkd.config.validate import check_study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    path.name: path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
TRAINING = ("generations", "ensemble", "capacity", "study")
MADE = ("api.md", "commands.md", "config.md", "losses.md", "packages.svg")
"""Of the site's pages those that scripts/docs.py makes."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Every command of selfkd, with the page that shows it."""
    return [
        (page, line.replace("\\\n", " ").partition("  #")[0].strip())
        for page in PAGES
        for block in blocks(page, "bash")
        for line in re.split(r"(?<!\\)\n", block)
        if re.search(r"python -m selfkd\.|sbatch examples/slurm", line)
    ]


def test_it_is_what_a_newcomer_reads_in_ten_minutes() -> None:
    assert len(README.encode()) < 12_288


def test_the_two_commands_come_first_and_ci_runs_the_second() -> None:
    first, second = blocks("README.md", "bash")[0].splitlines()
    assert first.startswith("pip install -e . && python -m selfkd.generations --rounds 5")
    command = second.partition("  #")[0].strip()
    assert command == "pip install -e '.[test]' && pytest"
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_is_understood(page: str, command: str) -> None:
    words = shlex.split(command)
    if "examples/slurm.sbatch" in words:  # hands on what follows
        words = ["selfkd.generations", *words[words.index("examples/slurm.sbatch") + 1 :]]
    module = next(word for word in words if word.startswith("selfkd."))
    words = words[words.index(module) + 1 :]
    if module == "selfkd.submit":
        submit.make_parser().parse_args(words[: words.index("--")])
        module, *words = words[words.index("--") + 1 :]
    name = module.removeprefix("selfkd.")
    arguments = command_module(name).make_parser().parse_args(words)
    if name in TRAINING:
        config = ROOT / arguments.config if arguments.config else None
        load_config(config, settings=arguments.settings, flags=config_flags(arguments))


@pytest.mark.parametrize("page", PAGES)
def test_inline_settings_are_understood(page: str) -> None:
    for setting in re.findall(r"`--set '?([^`']+)'?`", PAGES[page]):
        if "dotted.key" not in setting:
            load_config(settings=[setting])


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page: str) -> None:
    folder = ROOT if page in ("README.md", "CONTRIBUTING.md") else ROOT / "docs"
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        assert link.startswith("https://") or link in MADE or (folder / link).exists(), link
    named = r"[` ]((?:selfkd|tests|examples|tune_configs|docs|scripts|\.ci)/[\w./]*\w/?)"
    for name in re.findall(named, PAGES[page]):
        assert (ROOT / name).exists() or "/x/" in name, name


def test_the_study_is_understood(tmp_path: Path) -> None:
    (block,) = blocks("study.md", "yaml")
    (tmp_path / "study.yaml").write_text(block)
    check_study(load_config(tmp_path / "study.yaml"))


def test_plug_in_example_runs() -> None:
    (example,) = blocks("README.md", "python")
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
    assert blocks("own_loop.md", "python")[0] == example


@pytest.mark.parametrize("page", PAGES)
def test_python_of_every_page_compiles_and_imports_what_there_is(page: str) -> None:
    for example in blocks(page, "python"):
        if example.startswith(">>> "):  # tests/test_docs.py runs it
            example = doctest.script_from_examples(example)
        compile(example, page, "exec")
        for module, names in re.findall(r"^from (selfkd[\w.]*) import (.+)$", example, re.M):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), name


def test_extras_and_script_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) >= {"test", "dev", "docs", "cluster", "optuna"}
    assert project["scripts"]["selfkd"] == "selfkd.__main__:main"
    assert project["requires-python"] == ">=3.11"
