"""What students need of their teachers, made once: cached logits, or text that teachers write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

from selfkd.config import Config
from selfkd.errors import RunError
from selfkd.experiments.arms import Run
from selfkd.results import Facts, Message, Model, Row, Written, from_row


def prepare_teachers(
    run: Run,
    teachers: Sequence[Model],
    *,
    of: str = "",
    config: Config | None = None,
    facts: Facts | None = None,
) -> dict[str, Written]:
    """Cache the logits of teachers, or let them write text (`distill.mode: traces`), once.

    Logits are cached for every view of every item, of training and of the transfer set, and text
    is written on every training prompt, by each teacher. The work is split by teacher, view or text
    of a prompt, and shard of items; a part that fails is done again alone.

    Args:
        run: Run at work.
        teachers: Models that teach.
        of: Name of the students' stage, for people.
        config: Config of the students; the run's when not given.
        facts: Facts of its data, where it is other than the run's.

    Returns:
        By the hash of a teacher what it has written; nothing where logits are cached.

    Raises:
        RunError: A part failed again, or no text is right with `write.keep: right`.
    """
    config, facts = config or run.config, facts or run.folder.facts
    prefix = f"{of}: " if of else ""
    place = {"targets": str(run.folder.targets(config)), "run": str(run.folder.path)}
    if config.distill.mode == "tokens":
        size = facts.cached.shard_size if facts.cached else config.targets.shard_size
        pools: list[tuple[int, Row]] = [
            (facts.items["train"], {}),
            (facts.transfer, {"of": "transfer"}),
        ]
        parts: list[Row] = [
            {"checkpoint": teacher["checkpoint"], "view": view, "shard": shard, **place, **of}
            for teacher in run.rows(teachers)
            for items, of in pools
            for view in range(facts.views)
            for shard in range(-(-items // size))
        ]
        run.jobs(f"{prefix}caching teacher logits", "cache_teacher_logits", parts, config=config)
        return {}
    shards = -(-facts.items["train"] // config.targets.shard_size) * config.write.samples
    parts = [
        {"checkpoint": teacher["checkpoint"], "shard": shard, **place}
        for teacher in run.rows(teachers)
        for shard in range(shards)
    ]
    rows = run.jobs(f"{prefix}text of the teachers", "write", parts, config=config)
    found = {
        model.hash: sum_written(from_row(Written, row) for row in rows[n * shards :][:shards])
        for n, model in enumerate(teachers)
    }
    written = sum_written(found.values())
    run.events(Message(f"{prefix}{describe_written(written, len(found))}"))
    check_right(written, teachers, of=of, config=config)
    return found


def check_right(written: Written, teachers: Sequence[Model], *, of: str, config: Config) -> None:
    """Check that students have some text to be trained on.

    Args:
        written: Numbers of what the teachers have written.
        teachers: Models that teach.
        of: Name of the students' stage, for people.
        config: Config of the students.

    Raises:
        RunError: No text is right with `write.keep: right`.
    """
    if config.write.keep == "right" and not written.right:
        names = ", ".join(model.checkpoint for model in teachers)
        raise RunError(
            f"{f'{of}: ' if of else ''}write.keep right needs a text that is right, got 0 of "
            f"{written.texts:,} by {names}: start a new run with write.keep=all, or with a better "
            "teacher (more train.steps, a larger model)"
        )


def sum_written(rows: Iterable[Written]) -> Written:
    """Return the numbers of several parts of text, taken together."""
    return reduce(Written.__add__, rows)


def describe_written(written: Written, teachers: int) -> str:
    """Return in words what teachers have written.

    >>> describe_written(Written(texts=4000, cut=12, right=3990), 1)
    'the teacher has written 4,000 texts, 99.8 % of them right; 12 did not end within the context'
    """
    who = "the teacher has" if teachers == 1 else f"{teachers} teachers have"
    said = f"{who} written {written.texts:,} {'text' if written.texts == 1 else 'texts'}"
    if written.right is not None:
        said += f", {100 * written.right / max(written.texts, 1):.1f} % of them right"
    return f"{said}; {written.cut:,} did not end within the context" if written.cut else said
