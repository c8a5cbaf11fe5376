"""The documentation that is made from the code has all of it. scripts/check builds the site."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import selfkd
import selfkd.losses
from selfkd.__main__ import COMMANDS
from selfkd.config import Config
from selfkd.config.schema import flat

ROOT = Path(__file__).parents[1]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_script", ROOT / "scripts" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


docs = load_script()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the site, as scripts/docs.py writes them."""
    folder = tmp_path_factory.mktemp("site") / "docs"
    docs.write_sources(folder)
    return folder


def test_the_config_reference_has_every_key() -> None:
    keys = [key.name for section in docs.config_sections() for key in section.keys]
    assert len(keys) == len(set(keys))
    assert set(keys) >= set(flat(Config()))
    page = docs.config_page()
    assert all(f"| `{key}` |" in page for key in keys)


def test_every_key_has_its_meaning() -> None:
    keys = [key for section in docs.config_sections() for key in section.keys]
    assert [key.name for key in keys if not key.meaning] == []


def test_types_limits_and_defaults_are_those_of_the_schema() -> None:
    found = {key.name: key for section in docs.config_sections() for key in section.keys}
    assert found["train.ema"].type == "number, above 0, below 1, or null"
    assert found["train.schedule"].type == "`cosine`, `step`, `none`"
    assert found["rounds"].type == "whole number or `auto`"
    assert found["data.classes"].type == "list of whole number, or null"
    network = "network as in [model](#model)"
    assert found["student"].type == f"{network} or list of {network}, or null"
    assert found["model.args"].default == '`{"width": 8}`'
    assert found["study.compare.each.arm"].default == "required"


def test_the_commands_reference_has_every_command_and_option() -> None:
    page = docs.commands_page()
    for name in COMMANDS:
        assert f"## {name}\n" in page
        assert f"usage: python -m selfkd.{name} " in page
    for option in ("--rounds N|auto", "--train FILE.py:FUNCTION", "--from RUN", "--rows ROWS"):
        assert option in page


def test_the_api_has_every_public_name_and_every_loss() -> None:
    said = re.findall(r"^::: ([\w.]+)$", docs.api_page() + docs.losses_page(), re.M)
    assert len(said) == len(set(said))
    names = set(selfkd.__all__) - {"__version__", "generations"}  # a module that can be called
    ends = {name.rpartition(".")[2] for name in said}
    assert ends >= names
    assert set(said) >= {f"selfkd.losses.{name}" for name in public_losses()}
    for name in said:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_guide_names_whatever_the_reference_has() -> None:
    """What the guide does not name by its purpose is found only by who knows that it is there."""
    said = re.findall(r"^::: ([\w.]+)$", docs.api_page() + docs.losses_page(), re.M)
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    code = " ".join(part for page in pages for part in re.findall(r"```.*?```|`[^`]+`", page, re.S))
    words = set(re.findall(r"\w+", code))
    assert [name for name in said if name.rpartition(".")[2] not in words] == []
    assert set(selfkd.__all__) - {"__version__"} <= words


def test_one_default_of_t_and_alpha_but_where_the_guide_says_why() -> None:
    """The Trainer is read, not imported, which would take long."""
    ours = inspect.signature(selfkd.Distiller).parameters
    config = Config().distill
    assert (ours["temperature"].default, ours["alpha"].default) == (
        config.temperature,
        config.alpha,
    )
    trainer = (ROOT / "selfkd" / "integrations" / "transformers" / "trainer.py").read_text()
    values = dict(re.findall(r"^        (temperature|alpha): float = ([\d.]+),$", trainer, re.M))
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    given = f"{float(values['temperature']):g} | {values['alpha']}"
    assert f"| `DistillationTrainer` of transformers | {given} |" in page


def test_the_figures_that_choices_stand_on_are_those_of_the_pages_they_are_from() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    bullets = re.findall(r"^- .*?(?=^- |^$)", page, re.M | re.S)
    assert len(bullets) >= 9
    for bullet in bullets:
        links = re.findall(r"\]\(([^)#]+)", bullet)
        sources = " ".join((ROOT / "docs" / link).read_text(encoding="utf-8") for link in links)
        for figure in re.findall(r"[+-]\d+\.\d+", bullet):
            assert figure in sources, (figure, links)


def public_losses() -> list[str]:
    return [
        name
        for name, value in vars(selfkd.losses).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]


def test_the_table_of_losses_has_every_loss() -> None:
    page = (ROOT / "docs" / "own_loop.md").read_text()
    table = page.partition("## All losses")[2].partition("\n## ")[0]
    assert [name for name in public_losses() if f"`{name}`" not in table] == []


def test_the_picture_has_every_package_from_top_to_bottom() -> None:
    picture = ElementTree.fromstring(docs.packages_picture())
    texts = list(picture.iter("{http://www.w3.org/2000/svg}text"))
    said = [text.text for text in texts if text.get("class") == "name"]
    here = Path(selfkd.__file__).parent
    packages = {path.parent.name for path in here.glob("*/__init__.py")}
    modules = {path.stem for path in here.glob("*.py")} - {"__init__"}
    assert set(said) == packages | modules
    assert said.index("generations") < said.index("experiments") < said.index("losses")
    arrows = [text for text in texts if text.text == docs.BELOW]
    assert len(arrows) == len(docs.layers()) - 1


def test_the_site_leads_to_every_page(site: Path) -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert set(pages(config["nav"])) == {path.name for path in site.glob("*.md")}


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages(part)]


def test_links_lead_to_files_and_headings(site: Path) -> None:
    for page in site.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
            if link.startswith("https://"):
                continue
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings, and names that mkdocstrings fills in."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    slugs = {re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings}
    return {re.sub(r"[-\s]+", "-", slug) for slug in slugs} | set(
        re.findall(r"^::: ([\w.]+)$", text, re.M)
    )


@pytest.mark.parametrize("page", ["worked_examples", "choosing"])
def test_the_numbers_of_a_page_are_computed(page: str) -> None:
    file = ROOT / "docs" / f"{page}.md"
    text = re.sub(r"^```.*$", "", file.read_text(encoding="utf-8"), flags=re.M)
    test = doctest.DocTestParser().get_doctest(text, {}, page, str(file), 0)
    said: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert results.attempted > 0
    assert results.failed == 0, "".join(said)
