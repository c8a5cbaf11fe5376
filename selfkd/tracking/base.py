"""What a tracker is: something that logs the events of a run, or nothing."""

from __future__ import annotations

from selfkd.results import Event


class NoTracker:
    """A tracker that logs nothing."""

    description = "W&B: none"

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

    def __call__(self, event: Event) -> None:
        """Log an event."""
        for tracker in self._both:
            tracker(event)

    def close(self) -> None:
        """Finish both."""
        for tracker in self._both:
            tracker.close()
