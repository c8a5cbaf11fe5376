"""A real browser without a window: what it drew, said and asked for."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars"),
)
DESKTOP, PHONE = (1280, 900), (390, 844)


@contextmanager
def open_browser(folder: Path) -> Iterator[webdriver.Chrome]:
    """Start Chromium with a profile of its own."""
    options = Options()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


def show(
    driver: webdriver.Chrome,
    page: Path,
    *,
    size: tuple[int, int] = DESKTOP,
    dark: bool = False,
    scripts: bool = True,
) -> None:
    """Open a file in a window of a size, forgetting what was logged before."""
    phone = size[0] < 600
    device = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": phone}
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    driver.get("about:blank")
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get(page.as_uri())


def requests(driver: webdriver.Chrome) -> list[str]:
    """Return the addresses that were asked for since the page was opened."""
    messages = [json.loads(row["message"])["message"] for row in driver.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def complaints(driver: webdriver.Chrome) -> list[dict[str, Any]]:
    """Return the warnings and errors of the console."""
    rows: list[dict[str, Any]] = driver.get_log("browser")
    return [row for row in rows if row["level"] in ("SEVERE", "WARNING")]


def screenshot(driver: webdriver.Chrome, path: Path) -> Path:
    """Save a picture of the whole page, once it is laid out: a busy machine takes its time."""

    def laid_out(driver: webdriver.Chrome) -> dict[str, float] | None:
        size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        return size if size["width"] and size["height"] else None

    size = WebDriverWait(driver, 60).until(laid_out)
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    taken = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    return _save(path, taken["data"])


def printed(driver: webdriver.Chrome, path: Path) -> Path:
    """Save the page as it is printed, a PDF."""
    options = {"printBackground": True, "preferCSSPageSize": True}
    return _save(path, driver.execute_cdp_cmd("Page.printToPDF", options)["data"])


def _save(path: Path, encoded: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(encoded))
    return path
