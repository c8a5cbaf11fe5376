"""The sources of the documentation: pages of docs/, and pages made from the code, in build/docs.

    python scripts/docs.py && properdocs build --strict -f mkdocs.yml

Nothing that is made here is committed, so that it cannot differ from the code.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

import selfkd
from selfkd.__main__ import COMMANDS, command_module
from selfkd.config.reference import config_sections

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "docs"
RECIPES = ("generations", "ensemble", "capacity", "study", "deploy")
PLUG_IN = (
    *("Distiller", "Teacher", "Ensemble", "distillation_loss"),
    *("cache_logits", "load_logits", "import_logprobs", "SeededView"),
    "soft_targets.tokens.TokenTargets",
    *("distill.terms.LogitTerm", "distill.terms.FeatureTerm", "distill.features.Features"),
    *("distill.layers.copy_layers", "distill.soups.average_weights", "distill.soups.greedy_soup"),
    "distill.soups.fit_weights",
)
LOADING = tuple(
    f"loading.model.{name}" for name in ("load", "LoadedModel", "Predictions", "push_to_hub")
)
INTEGRATIONS = ("timm", "lightning", "transformers")
BELOW = "imports only what is below"


def write_sources(folder: Path) -> None:
    """Write all sources into a folder."""
    shutil.copytree(ROOT / "docs", folder)
    for name in ("examples", "tune_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    for page in folder.rglob("*.md"):  # links from docs/, examples/ and the root, as seen here
        text = re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", page.read_text(encoding="utf-8"))
        if page.parent == folder:
            text = re.sub(r"\]\((\.\./|docs/)", "](", text)
        page.write_text(text, encoding="utf-8")
    (folder / "config.md").write_text(config_page(), encoding="utf-8")
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    (folder / "api.md").write_text(api_page(), encoding="utf-8")
    (folder / "losses.md").write_text(losses_page(), encoding="utf-8")
    (folder / "packages.svg").write_text(packages_picture(), encoding="utf-8")


# --- the config, from its schema ---


def config_page() -> str:
    """Return the reference of the config."""
    lines = [
        "# Config",
        "",
        "Keys of a YAML file (`--config`), of `--set dotted.key=value` and of a search space. "
        "Flags win over `--set`, that over the file, that over the defaults below.",
    ]
    for section in config_sections():
        lines += ["", f"## {section.name}", "", section.meaning, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in section.keys:
            cells = (f"`{key.name}`", key.type, key.default, key.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


# --- the commands, from their parsers ---


def commands_page() -> str:
    """Return the reference of the commands."""
    lines = [
        "# Commands",
        "",
        "`python -m selfkd.COMMAND` and `selfkd COMMAND` are the same. A command ends with 0 when "
        "it is done, 1 when it failed, 2 when it was called wrongly, 130 when it was stopped.",
    ]
    for name in COMMANDS:
        module = command_module(name)
        lines += ["", f"## {name}", ""]
        for parser in _with_subcommands(module.make_parser()):
            parser.formatter_class = partial(argparse.HelpFormatter, width=88)
            lines += ["```text", parser.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _with_subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


# --- the Python API, which mkdocstrings fills in ---


def api_page() -> str:
    """Return the reference of the Python API, but for the losses."""
    runs = [f"{name}.run_{name}" for name in RECIPES]
    adapters = [
        f"integrations.{name}.{adapter}"
        for name in INTEGRATIONS
        for adapter in _adapters(ROOT / "selfkd" / "integrations" / name)
    ]
    parts = {
        "In a loop of your own": PLUG_IN,
        "Runs from Python": [*runs, "cli.result.Result", "cli.result.Table"],
        "Models of a run": LOADING,
        "A training function of your own": ["training.trial.Trial"],
        "Other loops": adapters,
        "Models and config": ["make_model", "config.load_config"],
        "Errors": [
            f"errors.{name}"
            for name in _own_names(ROOT / "selfkd" / "errors.py")
            if name.endswith("Error")
        ],
    }
    lines = ["# Python API", "", "The losses have [a page of their own](losses.md)."]
    for title, names in parts.items():
        lines += ["", f"## {title}", *(f"\n::: selfkd.{name}" for name in names)]
    return "\n".join(lines) + "\n"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def losses_page() -> str:
    """Return the reference of the losses, by module; all are in `selfkd.losses`."""
    lines = [
        "# Losses",
        "",
        "Every one is `selfkd.losses.NAME`, whatever its module. [Which loss](choosing.md): what "
        "each is for; [weights of papers](conventions.md): the factors of published weights.",
    ]
    for module, names in losses().items():
        text = ast.get_docstring(_parse(_losses_file(module))) or ""
        lines += ["", f"## {module}", "", _one_line(text.split("\n\n")[0])]
        lines += [f"\n::: selfkd.losses.{name}" for name in names]
    return "\n".join(lines) + "\n"


def losses() -> dict[str, list[str]]:
    """Return the names of `selfkd.losses` by the module that they are from."""
    found: dict[str, list[str]] = {}
    for node in _parse(_losses_file("__init__")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = found.setdefault(node.module.rpartition(".")[2], [])
            names += [alias.name for alias in node.names]
    return found


def _losses_file(module: str) -> Path:
    return ROOT / "selfkd" / "losses" / f"{module}.py"


def _adapters(place: Path) -> list[str]:
    """Return the names of an adapter, a module or a package that has them from its modules."""
    if not place.is_dir():
        return _own_names(place.with_suffix(".py"))
    imports = [
        node for node in _parse(place / "__init__.py").body if isinstance(node, ast.ImportFrom)
    ]
    return [alias.name for node in imports for alias in node.names]


def _own_names(file: Path) -> list[str]:
    return [
        node.name
        for node in _parse(file).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


# --- the packages, from the import contract ---


def layers() -> list[tuple[list[str], bool]]:
    """Return the packages of each layer, top first, and whether they may import each other."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]
    (contract,) = (
        contract
        for contract in linter["contracts"]
        if contract["type"] == "layers" and contract["containers"] == ["selfkd"]
    )
    return [(re.findall(r"\w+", line), ":" in line) for line in contract["layers"]]


def packages_picture() -> str:
    """Return the packages as layers with their one-way arrows, in SVG."""
    line, gap, width = 24, 34, 900
    rows: list[str] = []
    top = gap
    found = layers()
    for number, (names, together) in enumerate(found):
        height = line * len(names) + 16
        rows.append(f'<rect x="20" y="{top}" width="{width - 40}" height="{height}" rx="6"/>')
        for place, name in enumerate(names):
            y = top + 8 + line * place + 17
            rows.append(f'<text class="name" x="36" y="{y}">{name}</text>')
            rows.append(f'<text x="190" y="{y}">{escape(_purpose(name))}</text>')
        top += height
        if number < len(found) - 1:
            middle = width // 2
            rows.append(
                f'<path d="M{middle} {top + 3}v{gap - 12}m-6 -7l6 7l6 -7"/>'
                f'<text class="note" x="{middle + 14}" y="{top + 21}">{BELOW}</text>'
            )
        if len(names) > 1:
            note = "may import each other, without a circle" if together else "independent"
            y = top - height - 6
            rows.append(f'<text class="note end" x="{width - 20}" y="{y}">{note}</text>')
        top += gap
    style = (
        "text{font:14px sans-serif;fill:#222}.name{font:bold 14px monospace}"
        ".note{font-size:12px;fill:#666}.end{text-anchor:end}"
        "rect{fill:#eef1fb;stroke:#4051b5}path{fill:none;stroke:#4051b5;stroke-width:2}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" role="img">'
        "<title>Packages of selfkd: imports go down only</title>"
        f'<style>{style}</style><path style="fill:#fff;stroke:none" d="M0 0h{width}v{top}H0z"/>'
        f"{''.join(rows)}</svg>\n"
    )


def _purpose(name: str) -> str:
    """Return the first line of a package's docstring, without the command it names."""
    package = Path(selfkd.__file__).parent / name
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    first = (ast.get_docstring(_parse(file)) or "").splitlines()[0]
    words = re.sub(r"^`[^`]*`: ", "", first).replace("`", "")
    return words[:1].upper() + words[1:]


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_sources(FOLDER)
