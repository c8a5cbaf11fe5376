"""Keeps a run's report up to date while it goes on; never stops it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from selfkd.jobs import Row

REPORT = "report.html"
logger = logging.getLogger(__name__)


class Reporter:
    """Writes `report.html` after each generation; a failure is logged and changes nothing.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self) -> None:
        """Write the report as things stand."""
        try:
            from selfkd.reporting.page import write_report  # plotly: only when it is needed

            write_report(self._folder)
        except Exception as error:  # noqa: BLE001 - a report must never stop the training
            logger.warning("report.html was not written: %s: %s", type(error).__name__, error)

    def generation_finished(self, result: Row) -> None:
        """Write it again with one more generation; once for all those done before a resume."""
        if not self._result(result["generation"] + 1).exists():
            self.write()

    def _result(self, generation: int) -> Path:
        return self._folder / f"generation_{generation:03d}" / "result.json"

    def generation_confirmed(self, confirmation: Row) -> None:
        """Write it again with what fresh seeds say; once for all those done before a resume."""
        following = self._result(confirmation["generation"] + 1).with_name("confirmation.json")
        if not following.exists():
            self.write()

    def compressed(self, summary: Row) -> None:
        """Write it again with the student."""
        self.write()

    def working(self, title: str, parts: int) -> None:
        """Nothing."""

    def worked(self, row: Row) -> None:
        """Nothing."""

    def stage_started(self, title: str, trials: int, done: int) -> None:
        """Nothing."""

    def trial_reported(self, trial: Row, rows: Sequence[Row]) -> None:
        """Nothing."""

    def trial_finished(self, trial: Row) -> None:
        """Nothing."""

    def noted(self, text: str) -> None:
        """Nothing."""
