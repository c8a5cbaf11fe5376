"""A run in W&B, which can be opened again with all that was logged; what is shown in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

Work = Callable[[Any], None]


class LoggedRun:
    """A run of W&B that can be opened again: it remembers what was logged to it."""

    def __init__(
        self,
        run_id: str,
        start: Callable[[], Any],
        *,
        left_code: int,
        recover: Callable[[], bool] = lambda: False,
        lose: Callable[[str, Exception], None] = lambda what, reason: None,
    ) -> None:
        self.run_id, self.left_code = run_id, left_code
        self._start, self._recover, self._lose = start, recover, lose
        self._done: list[tuple[Work, str | None]] = []
        self._once: set[str] = set()
        self.whole = True
        """Whether all of the trial has been logged once the run is closed."""
        self.run = start()

    def do(self, work: Work, *, extra: str | None = None) -> None:
        """Log something.

        Args:
            work: What logs it.
            extra: What it is, where its failure is not that of the run, as that of a file.
        """
        self._done.append((work, extra))
        try:
            work(self.run)
        except Exception as error:
            if self._recover():  # all of it has been logged again
                return
            if extra is None:
                raise
            self._done.remove((work, extra))
            self._lose(extra, error)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row of the history."""
        self.do(lambda run: run.log(row))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Put values into the summary."""
        self.do(lambda run: run.summary.update(values))

    def note(self, text: str) -> None:
        """Replace the notes."""

        def write(run: Any) -> None:
            run.notes = text

        self.do(write)

    def reopen(self) -> None:
        """Open the run anew, and log all of it again."""
        self.run = self._start()
        for work, extra in self._done:
            try:
                work(self.run)
            except Exception as error:
                if extra is None:
                    raise
                self._lose(extra, error)

    @property
    def folder(self) -> Path:
        """Folder of its file."""
        return Path(self.run.dir).parent

    def add_artifact(
        self,
        make: Callable[[], Any],
        *,
        aliases: Sequence[str] = (),
        used: bool = False,
        once: str | None = None,
    ) -> None:
        """Log an artifact, or the use of one: at once, and whether or not there is a network.

        W&B's own `log_artifact` calls the host first and fails without it; its `use_artifact` does
        not take what is not on the host yet. What both write in the end is this record. A used
        artifact is identified by its content, by which the host finds it.

        Args:
            make: Maker of the artifact, called again when the run is opened again.
            aliases: Aliases beside `latest`.
            used: Whether the run uses the artifact, and did not make it.
            once: Name under which only the first artifact is logged.
        """
        if once is not None and once in self._once:
            return
        if once is not None:
            self._once.add(once)

        def work(run: Any) -> None:
            artifact = make()
            artifact.finalize()
            names = [] if used else ["latest", *aliases]
            run._interface.publish_artifact(
                run, artifact, names, is_user_created=used, use_after_commit=used
            )

        self.do(work, extra="artifact")


def make_html(page: str) -> Any:
    """Return a page for W&B."""
    return wandb.Html(page, inject=False, data_is_not_path=True)


def make_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return a table for W&B, of rows that all have the same keys."""
    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])


def make_artifact(
    name: str,
    type: str,
    *,
    facts: Mapping[str, Any],
    file: Path | None = None,
    files: Mapping[str, Path] | None = None,
    folder: Path | None = None,
    reference: str | None = None,
    description: str | None = None,
) -> Any:
    """Return an artifact of files or a folder, which stay where they are, or of a reference."""
    artifact = wandb.Artifact(name, type, description=description, metadata=dict(facts))
    if file is not None:
        artifact.add_file(str(file), policy="immutable")
    for name_in_it, each in (files or {}).items():
        artifact.add_file(str(each), name=name_in_it, policy="immutable")
    if folder is not None:
        artifact.add_dir(str(folder), policy="immutable")
    if reference is not None:
        artifact.add_reference(reference, checksum=reference.startswith("file://"))
    return artifact


def default_entity() -> str:
    """Return the entity whose projects are used where none is given."""
    return str(wandb.Api().default_entity)
