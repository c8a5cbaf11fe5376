"""What a tracker is: something that logs the events of a run, or nothing."""

from __future__ import annotations

from datetime import datetime

from selfkd.config import Config
from selfkd.errors import cut_text, describe_error
from selfkd.results import Event


def end_of_tracking(error: Exception) -> str:
    """Return when and why tracking has stopped: the time of now, and an error in one line."""
    reason = " ".join(describe_error(error).split())
    return f"{datetime.now():%H:%M:%S} ({cut_text(reason, 300)})"


class NoTracker:
    """A tracker that logs nothing.

    Args:
        why: Why it does not, for its description.
    """

    description = "W&B: none"
    incomplete = False

    def __init__(self, why: str = "") -> None:
        if why:
            self.description = f"{self.description}, {why}"

    def settle(self, config: Config) -> None:
        """Do nothing."""

    def __call__(self, event: Event) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class BothTrackers(NoTracker):
    """Two trackers of one run.

    Args:
        first: Tracker that is given each event first.
        second: The other.
    """

    def __init__(self, first: NoTracker, second: NoTracker) -> None:
        self._both = first, second

    @property
    def description(self) -> str:  # type: ignore[override]
        """Where the run can be seen."""
        return "; ".join(tracker.description for tracker in self._both)

    @property
    def incomplete(self) -> bool:  # type: ignore[override]
        """Whether something could not be logged or sent, which the description says."""
        return any(tracker.incomplete for tracker in self._both)

    def settle(self, config: Config) -> None:
        """Take the config with what its workers have decided, before any event of a trial."""
        for tracker in self._both:
            tracker.settle(config)

    def __call__(self, event: Event) -> None:
        """Log an event."""
        for tracker in self._both:
            tracker(event)

    def close(self) -> None:
        """Finish both."""
        for tracker in self._both:
            tracker.close()
