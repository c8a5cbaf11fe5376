"""Chosen models as folders for other programs, with a card of their lineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from selfkd.config import Config, DistillConfig
from selfkd.experiments.arms import Run
from selfkd.results import Facts, GenerationResult, Model, TaskStarted
from selfkd.results.metrics import find_metric, is_measured, title

CARD = "README.md"


def export_generation(run: Run, result: GenerationResult) -> None:
    """Write the chosen model of a generation for other programs, unless it is there."""
    number, config = result.generation, run.config.at(result.point)
    card = describe_lineage(
        f"generation {number} of born-again generations",
        config,
        run.folder.facts,
        result.hash,
        result.teachers,
        result.metrics,
        given=result.origin is not None,
    )
    export(run, result.models[0], run.folder.generation(number), card)


def export(run: Run, model: Model, parent: Path, card: str) -> None:
    """Write a model for other programs, unless it is there, or its task has no such form.

    Args:
        run: Run of the model.
        model: Model that is written.
        parent: Folder of the run in which the model's own folder is made.
        card: Text of its card.
    """
    name = run.folder.facts.export
    if run.function is not None or name is None or (parent / name / CARD).exists():
        return
    run.events(TaskStarted("writing the chosen model for other programs", 1))
    (row,) = run.rows([model])
    run.job("export", checkpoint=row["checkpoint"], folder=str(parent / name), card=card)


def describe_lineage(
    made: str,
    config: Config,
    facts: Facts,
    digest: str,
    teachers: Sequence[Model],
    metrics: Mapping[str, float],
    *,
    given: bool = False,
) -> str:
    """Return the card of a model, as Markdown: how it was made, of what, and what it is worth.

    Args:
        made: What it is of the run, in words.
        config: Config of its trial.
        facts: Facts of the data.
        digest: Hash of the model.
        teachers: Models that it was distilled from; none of a model trained on labels.
        metrics: What was measured of it.
        given: Whether it was trained elsewhere, and given to the run.
    """

    def lines() -> Iterator[str]:
        origin = ", which was given to the run" if given else ""
        yield f"- model `{digest}`, {made}{origin}; seed of the run {config.seed}"
        if teachers:
            yield f"- {_describe_teachers(config.distill, teachers)}"
        elif not given:
            yield "- trained on labels only"
        sizes = ", ".join(f"{count:,} {split}" for split, count in facts.items.items())
        yield f"- data: {config.data.name}, {sizes} {facts.unit}, {facts.outputs:,} outputs"
        digests = ", ".join(f"{split} `{own}`" for split, own in facts.fingerprints.items())
        yield f"- fingerprints of the data: {digests}"
        if facts.weights:
            hashes = ", ".join(f"`{own}`" for own in facts.weights.values())
            yield f"- hash of the folder that the weights or the architecture came from: {hashes}"
        for name, value in metrics.items():
            if is_measured(name):
                yield f"- {title(name)}: {find_metric(name).with_unit(value)}"

    return f"# {config.data.name}: {made}\n\nTrained by selfkd.\n\n" + "\n".join(lines()) + "\n"


def _describe_teachers(distill: DistillConfig, teachers: Sequence[Model]) -> str:
    """Return in words what a model was distilled from, and how."""
    names = ", ".join(f"`{teacher.hash}`" for teacher in teachers)
    of = f"the teacher{'s' if len(teachers) > 1 else ''} {names}"
    if distill.mode == "traces":
        return f"trained on the text of {of}"
    return (
        f"distilled from {of} with temperature T = {distill.temperature:.3g}, "
        f"weight alpha = {distill.alpha:.3g}"
    )
