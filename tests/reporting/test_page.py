"""The page in a real browser: it draws, asks for nothing, fits, and its texts are inert."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree as Tree

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
from run_folders import (
    DATA,
    PICTURE,
    add_deployment,
    capacity_run,
    deploy_run,
    ensemble_run,
    generations_run,
    study_run,
)
from selenium.webdriver import Chrome
from selenium.webdriver.support.wait import WebDriverWait

from selfkd.errors import ConfigError
from selfkd.reporting import words
from selfkd.reporting.comparison_page import comparison_page
from selfkd.reporting.page import render, write_report
from selfkd.reporting.read import read_run
from selfkd.reporting.tables import train_seconds, wall_seconds
from selfkd.results import (
    Comparison,
    Example,
    Examples,
    GenerationsSummary,
    TrialResult,
    Verdict,
)
from selfkd.storage.files import save_json
from selfkd.storage.rows import load_row, save_row

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
PAGES = ("generations", "ensemble", "capacity", "study", "deploy", "going", "bare", "comparison")
FEWEST = {"capacity": 1, "study": 1, "deploy": 1}  # figures
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
        "deploy": deploy_run(folder / "deploy"),
        "going": generations_run(folder / "going", rounds=4, done=2),
        "bare": generations_run(folder / "bare", seeds=0, diagnostics=False, rounds=8),
    }
    add_deployment(runs["ensemble"])
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
    """What is drawn in each drawing."""
    script = """
        return [...document.querySelectorAll(".plot")].map(plot => {
          const box = plot.getBoundingClientRect(), room = plot.parentNode.getBoundingClientRect();
          return {name: plot.getAttribute("aria-label"), left: box.left - room.left,
                  right: room.right - box.right, width: box.width, height: box.height,
                  marks: plot.querySelectorAll("circle, polyline, path, rect").length};
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
        assert min(plot["left"], plot["right"]) > -2, plot
        assert plot["width"] > 150, plot
        assert plot["height"] > 80, plot
        assert plot["marks"] > 0, plot
        assert plot["name"], plot
    wide = driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    assert driver.execute_script("return document.querySelectorAll('details[open]').length") == 0


@browser_needed
@pytest.mark.parametrize("name", ["generations", "ensemble", "comparison"])
def test_with_javascript_off_figures_and_tables_are_there(
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
    assert shown.count("circle") == file.count("<circle") > 0
    assert "BUTTON" not in shown


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
          ticks: contrast(document.querySelector(".plot .tick"), "fill"),
          legend: contrast(document.querySelector(".legend span"), "color"),
          marks: contrast(document.querySelector(".plot .line.c2"), "stroke")};"""
    papers = []
    for dark in (False, True):
        show(driver, pages["generations"], dark=dark)
        screenshot(driver, shots / f"generations-{'dark' if dark else 'light'}.png")
        found = driver.execute_script(script)
        papers.append(found["paper"])
        assert min([*found["texts"], found["ticks"], found["legend"]]) >= 4.5  # WCAG 2.2, AA
        assert found["marks"] >= 3
    assert papers[0] > 0.9
    assert papers[1] < 0.05


@browser_needed
def test_prints_all_figures_on_pages(driver: Chrome, pages: dict[str, Path], shots: Path) -> None:
    show(driver, pages["generations"])
    pdf = printed(driver, shots / "generations.pdf").read_bytes()
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12


@browser_needed
def test_figures_and_tables_can_be_taken_along(driver: Chrome, pages: dict[str, Path]) -> None:
    show(driver, pages["generations"])
    driver.execute_script("""
        window.taken = [];
        HTMLAnchorElement.prototype.click = function () { taken.push([this.download, this.href]); };
        navigator.clipboard.writeText = async text => { taken.push(["", text]); };
        for (const name of ["SVG", "PNG", "Markdown", "LaTeX"])
          [...document.querySelectorAll("button")].find(b => b.textContent === name).click();""")
    WebDriverWait(driver, 60).until(lambda d: len(d.execute_script("return taken")) == 4)
    taken = dict(
        zip(("svg", "md", "tex", "png"), driver.execute_script("return taken"), strict=True)
    )
    name, address = taken["svg"]
    assert name == "test-accuracy-over-generation-0.svg"
    drawn = Tree.fromstring(unquote(address.partition(",")[2]))
    sides = [e.get(key, "") for e in drawn.iter() for key in ("x", "cx", "x1", "width")]
    assert not any(side.endswith("%") for side in sides)
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) > 4
    assert taken["png"][1].startswith("data:image/png;base64,")
    assert taken["md"][1].splitlines()[1].startswith("| :-- | --:")
    assert taken["tex"][1].startswith("\\begin{tabular}{lr")
    assert "\\%" in taken["tex"][1] or "points" in taken["tex"][1]


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
    made = add_deployment(folder)
    rows = tuple(replace(row, title=EVIL, remarks=(EVIL,)) for row in made.rows)
    made = replace(made, title=EVIL, rows=rows, sentences=(EVIL, EVIL), files={EVIL: EVIL})
    save_row(folder / "deploy" / "deploy.json", made)
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
    assert "iframe" not in tags
    (link,) = (attributes for tag, attributes in elements.found if tag == "a")  # to the file
    assert list(link) == ["href"]
    assert re.fullmatch(r"\./[\w%./-]+", link["href"] or "")
    sources = [attributes["src"] for tag, attributes in elements.found if tag == "img"]
    assert sources == [f"data:image/png;base64,{PICTURE}"] * 4
    assert all(not name.startswith("on") for _, attributes in elements.found for name in attributes)
    own = [tag for tag, attributes in elements.found if tag == "script" and not attributes]
    assert len(own) == 1


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
        self.within = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "figure":
            self.within = True
            self.figures.append({"figcaption": 0, "table": 0, "drawings": 0, "title": 0})
        elif self.within and tag in ("figcaption", "table", "title"):
            self.figures[-1][tag] += 1
        elif self.within and dict(attrs).get("role") == "img":
            self.figures[-1]["drawings"] += 1

    def handle_endtag(self, tag: str) -> None:
        self.within = self.within and tag != "figure"


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_has_words_and_a_table(pages: dict[str, Path], name: str) -> None:
    parser = _Figures()
    parser.feed(pages[name].read_text())
    assert len(parser.figures) >= FEWEST.get(name, 2)
    for figure in parser.figures:
        assert (figure["figcaption"], figure["table"]) == (1, 1)
        assert figure["title"] >= figure["drawings"]
    assert any(figure["drawings"] for figure in parser.figures)


def test_a_small_file_without_an_address_to_load_from(pages: dict[str, Path]) -> None:
    for name in PAGES:
        text = pages[name].read_text()
        assert len(text) < 500_000
        page = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
        assert not re.findall(
            r"https?://|url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")", page
        )


def test_a_deployment_of_another_generation_than_the_best_is_said(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    made = add_deployment(path)
    best = read_run(path).best
    assert best is not None
    for model, said in ((best.hash, False), ("0" * 16, True)):
        save_row(path / "deploy" / "deploy.json", replace(made, model=model))
        text = write_report(path).read_text()
        assert (f"the best of the run is generation {best.generation}" in text) == said


def test_what_was_deployed_has_its_table_its_words_and_links_to_its_files(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    made = add_deployment(path)
    files = {"int8.onnx": "deploy/int8.onnx", "b": "javascript:alert(1)"}
    save_row(path / "deploy" / "deploy.json", replace(made, files=files))
    text = write_report(path).read_text()
    places = [text.index(f">{title}</h2>") for title in ("Deployed", "Size and time", "Learning")]
    assert places == sorted(places)
    assert '<a href="./deploy/int8.onnx">int8.onnx</a>' in text
    assert '<a href="./javascript%3Aalert%281%29">b</a>' in text
    assert f"<li>{words.sentence(made.sentences[0])}</li>" in unescape(text)
    assert text.count("pruned, distilled</th>") == 2  # in both tables


def test_the_verdict_of_the_run_is_its_first_sentence(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    summary = load_row(GenerationsSummary, path / "summary.json")
    comparisons = (Comparison(name="generation 2", to="generation 0", outcome="better"),)
    sentences = ("generations 1 and 2 are better than generation 0", "so is generation 2")
    verdict = Verdict(name="a", to="b", comparisons=comparisons, sentences=sentences)
    save_row(path / "summary.json", replace(summary, verdict=verdict))
    text = write_report(path).read_text()
    assert '<p class="first">Generations 1 and 2 are better than generation 0.</p>' in text
    assert re.search(r'class="c2 mark"[^>]*><title>generation 2: ', text)
    assert re.search(r'class="c1 open"[^>]*><title>generation 1: ', text)


PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n and so on").decode()


def test_pictures_show_what_both_models_say_and_are_pictures_only(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run", data=replace(DATA, names=tuple("abcdefghij")))
    common = {"label": 3, "predicted": (2, 3), "confidence": (0.61, 0.98)}
    rows = (
        Example(item=5, picture=PIXEL, **common),
        Example(item=6, picture=f'{PIXEL}" onerror="alert(1)', **common),
        Example(item=7, picture=base64.b64encode(b"<svg onload=alert(1)>").decode(), **common),
    )
    save_row(path / "examples.json", Examples(generations=(0, 2), counts=(41, 20), gained=rows))
    text = write_report(path).read_text()
    assert text.count("<img ") == 1
    assert f'src="data:image/png;base64,{PIXEL}"' in text
    assert "generation 0: c (61%)" in text
    assert "generation 2: d (98%)" in text
    assert "41 are predicted rightly by generation 2 alone and 20 by generation 0 alone" in text


def test_all_models_and_all_time_are_counted(tmp_path: Path) -> None:
    path = ensemble_run(tmp_path / "run")
    trial = load_row(TrialResult, path / "student" / "trial_000" / "result.json")
    for number in range(3):
        place = path / "confirm" / "student" / f"trial_{number:03d}" / "result.json"
        save_row(place, replace(trial, stage="confirm-student"))
    save_json(path / "environment.json", [{"seconds": 61.5}, {"seconds": 40}, {"seconds": "x"}])
    run = read_run(path)
    assert (run.trained, wall_seconds(run), train_seconds(run)) == (10, 101.5, 10.0)
    text = write_report(path).read_text()
    assert (
        "10 models were trained, all of them counted; wall time: 101.5 s; time on workers: 10.0 s."
        in text
    )


def test_the_model_is_named_with_the_lines_that_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = generations_run(tmp_path / "runs" / "a b", rounds=2)
    monkeypatch.chdir(tmp_path)
    text = unescape(write_report(path).read_text())
    assert "runs/a b/generation_002/student.safetensors" in text
    assert 'model = selfkd.load("runs/a b")' in text
    assert "python -m selfkd.generations --config 'runs/a b/config.yaml' --name 'a b-again'" in text


def test_unfinished_is_said(pages: dict[str, Path]) -> None:
    going = pages["going"].read_text()
    assert "unfinished: 2 of 5 generations done, 2 of 6 trials of generation 2" in going
    assert "unfinished" not in pages["generations"].read_text()


def test_all_parts_are_there(pages: dict[str, Path]) -> None:
    text = pages["generations"].read_text()
    for title in (
        *("Test accuracy over generation 0", "Temperature and alpha", "Reliability on test"),
        *("Each trial by generation", "Use this model", "Findings", "Config"),
        *("Teacher agreement", "Confusions on test", "Accuracy by class", "Lineage"),
        *("Cost", "Environment", "Learning", "taken together, are better than generation 0"),
        *("Brier at best T", "Best T divides all logits", "perfect calibration"),
    ):
        assert title.lower() in text.lower(), title
    text = pages["ensemble"].read_text()
    for title in (
        *("Share of the teacher", "Reliability on test", "from its teacher", "Confusions on test"),
        *("The student predicts what its teacher predicts on 95.00", "Accuracy by class"),
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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), ""),
        (
            ("data.augment={preset: strong, mixup: 0.2}", "data.views=2"),
            "strong, mixup 0.2, views 2",
        ),
        (
            ("data.augment={preset: light, flip: false}", "data.repeats=2"),
            "light, no flip, repeats 2",
        ),
        (("data.flip=true", "data.jitter=2", "data.views=4"), "flip, jitter 2, views 4"),
    ],
)
def test_a_page_says_how_training_images_were_augmented(
    tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    path = generations_run(tmp_path / "run", rounds=1, settings=(*settings, "data.test_size=12"))

    facts = write_report(path).read_text().partition("<dl")[2].partition("</dl>")[0]

    shown = dict(re.findall(r"<dt[^>]*>(.*?)</dt>\s*<dd[^>]*>(.*?)</dd>", facts, re.S))
    assert (shown.get("augmentation", ""), shown["side at test"]) == (said, "12")
