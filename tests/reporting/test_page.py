"""The page in a real browser: it draws, asks for nothing, fits, and its texts are inert."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from browser import (
    CHROMIUM,
    DESKTOP,
    DRIVER,
    PHONE,
    complaints,
    open_browser,
    printed,
    requests,
    screenshot,
    show,
)
from run_folders import DATA, capacity_run, ensemble_run, generations_run, study_run
from selenium.webdriver import Chrome

from selfkd.errors import ConfigError
from selfkd.reporting.comparison_page import comparison_page
from selfkd.reporting.page import _figure_json, render, write_report
from selfkd.reporting.read import read_run
from selfkd.results import (
    GenerationsSummary,
    TrialResult,
    Verdict,
)
from selfkd.storage.rows import load_row, save_row

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
PAGES = ("generations", "ensemble", "capacity", "study", "going", "bare", "comparison")
FEWEST = {"capacity": 1, "study": 1}  # figures
Make = Callable[[Path], Path]
COMPARED = ("generations", "ensemble", "going", "bare")
browser_needed = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and "SELFKD_BROWSER" not in os.environ,  # CI must have them
    reason="chromium and chromedriver are not installed",
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "generations": generations_run(folder / "generations", rounds=3),
        "ensemble": ensemble_run(folder / "ensemble"),
        "capacity": capacity_run(folder / "capacity"),
        "study": study_run(folder / "study"),
        "going": generations_run(folder / "going", rounds=4, done=2),
        "bare": generations_run(folder / "bare", seeds=0, diagnostics=False, rounds=8),
    }
    made = {name: write_report(path) for name, path in runs.items()}
    made["comparison"] = folder / "comparison.html"
    made["comparison"].write_text(
        render(comparison_page([read_run(runs[name]) for name in COMPARED]))
    )
    return made


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures are kept: a folder that CI takes them from, if it names one."""
    named = os.environ.get("SELFKD_SCREENSHOTS")
    return Path(named) if named else tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


def plots(driver: Chrome) -> list[dict[str, Any]]:
    """What is drawn in each place for a figure."""
    script = """
        return [...document.querySelectorAll(".plot")].map(plot => {
          const svg = plot.querySelector("svg.main-svg");
          const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
          return {id: plot.id, width: box.width, height: box.height,
                  room: plot.clientWidth, marks: plot.querySelectorAll(
                    ".points path, .lines path, .heatmaplayer image, .hm image").length};
        });"""
    found: list[dict[str, Any]] = driver.execute_script(script)
    return found


@browser_needed
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_draws_all_and_asks_for_nothing(
    driver: Chrome, pages: dict[str, Path], shots: Path, name: str, size: tuple[int, int]
) -> None:
    show(driver, pages[name], size=size)
    screenshot(driver, shots / f"{name}-{size[0]}.png")
    assert complaints(driver) == []
    asked = [url for url in requests(driver) if not url.startswith("data:")]
    assert asked == [pages[name].as_uri()]
    drawn = plots(driver)
    assert len(drawn) >= FEWEST.get(name, 2)
    for plot in drawn:
        assert plot["width"] == pytest.approx(plot["room"], abs=2), plot
        assert plot["height"] > 80, plot
        assert plot["marks"] > 0, plot
    wide = driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    assert driver.execute_script("return document.querySelectorAll('details[open]').length") == 0


@browser_needed
@pytest.mark.parametrize("name", ["generations", "ensemble", "comparison"])
def test_with_javascript_off_the_tables_are_there(
    driver: Chrome, pages: dict[str, Path], shots: Path, name: str
) -> None:
    show(driver, pages[name], scripts=False)
    screenshot(driver, shots / f"{name}-no-javascript.png")
    tree = driver.execute_cdp_cmd("DOMSnapshot.captureSnapshot", {"computedStyles": []})
    boxes = tree["documents"][0]["layout"]["nodeIndex"]
    names = [tree["strings"][i] for i in tree["documents"][0]["nodes"]["nodeName"]]
    shown = [names[node] for node in boxes]
    file = pages[name].read_text()
    assert shown.count("TABLE") == file.count("<table")
    assert shown.count("TD") == file.count("<td>")
    text = " ".join(tree["strings"][i] for i in tree["documents"][0]["layout"]["text"] if i >= 0)
    assert "The figures need JavaScript, which is off" in text


@browser_needed
def test_dark_and_light_differ_and_both_can_be_read(
    driver: Chrome, pages: dict[str, Path], shots: Path
) -> None:
    script = """
        const luminance = colour => {
          const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => {
            v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
          return .2126 * r + .7152 * g + .0722 * b; };
        const paper = luminance(getComputedStyle(document.body).backgroundColor);
        const contrast = (element, key) => {
          const ink = luminance(getComputedStyle(element)[key]);
          return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05); };
        return {paper, texts: ["p", "h1", "td", "figcaption", "summary", ".status span"].map(
            name => contrast(document.querySelector(name), "color")),
          ticks: contrast(document.querySelector(".plot .xtick text"), "fill"),
          legend: contrast(document.querySelector(".plot .legendtext"), "fill")};"""
    papers = []
    for dark in (False, True):
        show(driver, pages["generations"], dark=dark)
        screenshot(driver, shots / f"generations-{'dark' if dark else 'light'}.png")
        found = driver.execute_script(script)
        papers.append(found["paper"])
        assert min([*found["texts"], found["ticks"], found["legend"]]) >= 4.5  # WCAG 2.2, AA
    assert papers[0] > 0.9
    assert papers[1] < 0.05


@browser_needed
def test_prints_all_figures_on_pages(driver: Chrome, pages: dict[str, Path], shots: Path) -> None:
    show(driver, pages["generations"])
    pdf = printed(driver, shots / "generations.pdf").read_bytes()
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
    assert all(plot["width"] == pytest.approx(plot["room"], abs=2) for plot in plots(driver))


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose names and texts are markup, wherever a text can stand."""
    folder = tmp_path_factory.mktemp("evil") / "<img src=x onerror=alert(1)>"
    names = [EVIL, "</script>", "<a href='javascript:alert(1)'>a</a>", *map(str, range(7))]
    generations_run(folder, data=replace(DATA, names=tuple(names)))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("name: digits", f"name: {json.dumps(EVIL)}"))
    for path in folder.glob("generation_*/trial_000/result.json"):
        save_row(path, replace(load_row(TrialResult, path), error=EVIL, status="failed"))
    path = folder / "summary.json"
    verdict = Verdict(name=EVIL, to=EVIL, sentences=(EVIL,))
    save_row(path, replace(load_row(GenerationsSummary, path), verdict=verdict))
    (folder / "generation_000" / "trial_001" / "result.json").write_text("<b>damaged</b>")
    path = folder / "generation_000" / "trial_002" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": EVIL}))
    return write_report(folder)


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_no_text_becomes_markup(evil: Path) -> None:
    elements = _Elements()
    elements.feed(evil.read_text())
    tags = [tag for tag, _ in elements.found]
    assert not {"img", "a", "iframe"} & set(tags)
    assert all(not name.startswith("on") for _, attributes in elements.found for name in attributes)
    own = [tag for tag, attributes in elements.found if tag == "script" and not attributes]
    assert len(own) == 2  # plotly's and the page's


@browser_needed
def test_markup_in_names_is_inert_and_shown_to_the_letter(driver: Chrome, evil: Path) -> None:
    show(driver, evil)
    assert complaints(driver) == []
    title = driver.execute_script("return document.title")
    assert title == "<img src=x onerror=alert(1)> · selfkd"
    heading = driver.execute_script("return document.querySelector('h1').textContent")
    assert heading == "<img src=x onerror=alert(1)>"
    drawn = driver.execute_script(
        "return [...document.querySelectorAll('.plot text')].map(text => text.textContent)"
    )
    assert any("<script>" in text for text in drawn)
    assert driver.execute_script("return document.querySelectorAll('.plot a').length") == 0


@browser_needed
def test_a_script_that_is_not_the_pages_own_is_refused(driver: Chrome, evil: Path) -> None:
    page = evil.with_name("injected.html")
    page.write_text(evil.read_text().replace("</main>", f"</main>{EVIL}"))
    show(driver, page)
    assert driver.execute_script("return document.title") != "owned"
    assert any("Content Security Policy" in row["message"] for row in complaints(driver))


class _Figures(HTMLParser):
    """Counts, of each figure, what it must have."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[dict[str, int]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "figure":
            self.figures.append({"caption": 0, "label": 0, "table": 0})
        elif self.figures and tag == "figcaption":
            self.figures[-1]["caption"] += 1
        elif self.figures and tag == "div" and len(dict(attrs).get("aria-label") or "") > 30:
            self.figures[-1]["label"] += dict(attrs).get("role") == "img"
        elif self.figures and tag == "details":
            self.figures[-1]["table"] = 1


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_has_words_and_a_table(pages: dict[str, Path], name: str) -> None:
    parser = _Figures()
    parser.feed(pages[name].read_text())
    assert len(parser.figures) >= FEWEST.get(name, 2)
    for figure in parser.figures:
        assert figure == {"caption": 1, "label": 1, "table": 1}


def test_one_file_with_one_plotly_and_no_address_to_load_from(pages: dict[str, Path]) -> None:
    text = pages["generations"].read_text()
    assert text.count("plotly.js v") == 1
    assert len(text) < 6_000_000
    page = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"https?://|url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")", page)


def test_unfinished_is_said(pages: dict[str, Path]) -> None:
    going = pages["going"].read_text()
    assert "unfinished: 2 of 5 generations done, 2 of 6 trials of generation 2" in going
    assert "unfinished" not in pages["generations"].read_text()


def test_all_parts_are_there(pages: dict[str, Path]) -> None:
    text = pages["generations"].read_text()
    for title in (
        *("Accuracy per generation", "Temperature and alpha", "Reliability on test", "Config"),
        *("Teacher agreement", "Confusions on test", "Accuracy by class", "Lineage"),
        *("Cost", "Environment", "Learning", "taken together, are better than generation 0"),
        *("Brier at best T", "Best T divides all logits", "perfect calibration"),
    ):
        assert title.lower() in text.lower(), title
    text = pages["ensemble"].read_text()
    for title in (
        *("Share of the teacher", "Reliability on test", "from its teacher", "Confusions on test"),
        *("The student predicts the class that its teacher predicts on 95.00", "Accuracy by class"),
        *("Calibration", "Brier at best T", "both"),
    ):
        assert title in text, title
    assert "Accuracy over parameters" in pages["capacity"].read_text()
    assert "Distilled is better than labels" in pages["study"].read_text()


def test_a_damaged_file_is_named_on_the_page(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    damaged = path / "generation_001" / "result.json"
    damaged.write_text("{")
    text = write_report(path).read_text()
    assert f"{damaged} is damaged" in text
    assert "Not all could be read" in text


UNUSUAL: list[tuple[Make, str, tuple[str | int, ...], Any]] = [
    (study_run, "summary.json", ("arms", 0, "runs", 0, "test_accuracy"), "x"),
    (ensemble_run, "summary.json", ("rows", 4, "test_accuracy"), "x"),
    (ensemble_run, "student/trial_000/result.json", ("point", "distill.temperature"), -3),
    (
        generations_run,
        "generation_001/result.json",
        ("diagnostics", "test", "reliability", 14, "count"),
        -3,
    ),
]


@pytest.mark.parametrize(("make", "file", "place", "value"), UNUSUAL)
def test_a_value_that_cannot_be_is_not_drawn_and_stops_nothing(
    tmp_path: Path, make: Make, file: str, place: tuple[str | int, ...], value: object
) -> None:
    path = make(tmp_path / "run") / file
    tree = json.loads(path.read_text())
    *outer, last = place
    row = tree
    for step in outer:
        row = row[step]
    row[last] = value
    path.write_text(json.dumps(tree))
    assert write_report(tmp_path / "run").exists()


def test_nothing_is_left_of_a_report_that_could_not_be_written(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    for folder in path.glob("generation_*"):
        shutil.rmtree(folder)
    before = sorted(path.iterdir())
    with pytest.raises(ConfigError):
        write_report(path)
    assert sorted(path.iterdir()) == before


def test_a_figure_never_ends_its_script() -> None:
    evil = {"data": [{"type": "scatter", "text": ["</script><script>", "<!--"]}]}
    drawn = _figure_json(go.Figure(evil))
    assert not set("<>&") & set(drawn)
    assert json.loads(drawn)["data"][0]["text"] == ["</script><script>", "<!--"]
