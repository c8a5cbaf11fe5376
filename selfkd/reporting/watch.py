"""The report of a run that goes on, kept up to date: never stops the run and hardly slows it."""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from selfkd.reporting.read import ENVIRONMENT, REPORT
from selfkd.results import Event, GenerationConfirmed, GenerationFinished
from selfkd.storage.files import load_json, save_json

REST = 20.0
"""Times as long as a report took to write until the next one: each reads all trials so far."""

logger = logging.getLogger(__name__)


def make_plots(folder: Path) -> dict[str, str]:
    """Return the first figures of a run as pages of their own, by their titles as plain names.

    A failure is only logged: what is drawn must never stop a training.
    """
    try:
        from selfkd.reporting.page import render_figure, run_page  # jinja2: only when it is needed
        from selfkd.reporting.read import read_run

        page = run_page(read_run(folder))
        panels = [
            *([page.lead] if page.lead else []),
            *(p for s in page.sections for p in s.panels),
        ]
        figures = [(panel.title, panel.figure) for panel in panels if panel.figure is not None][:3]
        return {re.sub(r"\W+", "_", title.lower()): render_figure(of) for title, of in figures}
    except Exception as error:  # noqa: BLE001
        logger.warning("no plots of %s: %s: %s", folder, type(error).__name__, error)
        return {}


class Reporter:
    """Writes `report.html` after each generation, beside the run; a failure is only logged.

    One that takes long to write, as of thousands of trials, is not written after every one.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._begun = folder, time.monotonic()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="report")
        self._next: Future[None] | None = None
        self._rest = 0.0  # until when no other is written but the last one

    def write(self) -> None:
        """Write the report as things stand."""
        start = time.monotonic()
        try:
            from selfkd.reporting.page import write_report  # jinja2: only when it is needed

            self._keep_time()
            write_report(self._folder)
        except Exception as error:  # noqa: BLE001 - a report must never stop the training
            logger.warning("%s was not written: %s: %s", REPORT, type(error).__name__, error)
        end = time.monotonic()
        self._rest = end + REST * (end - start)

    def _keep_time(self) -> None:
        """Write beside the last start of the run how long it has taken."""
        path = self._folder / ENVIRONMENT
        starts = load_json(path) if path.exists() else None
        if isinstance(starts, list) and starts and isinstance(starts[-1], dict):
            starts[-1]["seconds"] = round(time.monotonic() - self._begun, 1)
            save_json(path, starts)

    def finish(self) -> None:
        """Write it for the last time."""
        self._write_soon()
        self._writer.shutdown(wait=True)

    def _write_soon(self) -> None:
        """Write it once the previous one is written; one that has not begun will hold it all."""
        if self._next is None or self._next.running() or self._next.done():
            self._next = self._writer.submit(self.write)

    def __call__(self, event: Event) -> None:
        """Write it after a generation; once for all that were done before a resume."""
        match event:
            case GenerationFinished(result):
                following = self._result(result.generation + 1)
            case GenerationConfirmed(confirmation):
                following = self._result(confirmation.generation + 1)
                following = following.with_name("confirmation.json")
            case _:  # `finish` writes the end of a run
                return
        if not following.exists() and time.monotonic() >= self._rest:
            self._write_soon()

    def _result(self, generation: int) -> Path:
        return self._folder / f"generation_{generation:03d}" / "result.json"
