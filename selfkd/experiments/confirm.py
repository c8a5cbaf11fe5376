"""Confirmation of generations: each one's chosen setting, replicated on the same fresh seeds.

Teachers stay those of the run: what is confirmed is the setting, given its teacher; or whole
lineages are repeated, each with teachers of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from selfkd.analysis.families import judge
from selfkd.analysis.statistics import mean_interval
from selfkd.analysis.verdicts import (
    count,
    describe_other_data,
    format_difference,
    is_better,
    join,
    ranges,
)
from selfkd.config import Config, ModelConfig
from selfkd.experiments.arms import TITLE, Arm, Run
from selfkd.experiments.lineages import in_lineages, remove_teachers, replicas_folder
from selfkd.experiments.measured import measure_replicas
from selfkd.experiments.replicas import contrast, pair_up, remove_students
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.teachers import prepare_teachers
from selfkd.results import (
    Confirmation,
    ControlResult,
    GenerationConfirmed,
    GenerationResult,
    Interval,
    Point,
    Replicated,
    Verdict,
    find_metric,
)
from selfkd.storage.rows import load_row, save_row

LINEAGES = "whole lineages"
LABELS, CONFIRMATION = "labels", "confirmation.json"
PATIENCE = 2  # generations that, taken together, must gain on the one before; else auto stops
ONE_SIDED = 0.9  # confidence of the interval whose lower end a gain is above, at 5 %


def confirm_generations(run: Run, results: Sequence[GenerationResult]) -> list[Confirmation]:
    """Confirm the generations that are not confirmed yet; return the confirmations of all.

    Each is kept as `confirmation.json` in its generation's folder. Where `student` differs from
    `model`, the difference to generation 0 is that to the student's own network from labels only,
    and in a chain to that of each generation. Without `confirm.baseline` neither is trained, and
    the later generations alone are confirmed.

    Raises:
        RunError: All trials of a generation's confirmation failed.
    """
    config = run.config
    if not config.confirm.replicas:
        return []
    wanted = results if config.confirm.baseline else results[1:]
    for result in wanted[:1]:
        _keep_given(run, result)
    done = {row.generation for row in load_confirmations(config, run.folder, len(results))}
    waiting = [row for row in wanted if row.generation not in done]
    for lot in [[row] for row in waiting] if config.confirm.lineages else [waiting]:
        _replicate(run, results, lot)
    for result in wanted:  # here, as a kill may have come between
        _remove_students(run, result.generation)
    return [load_row(Confirmation, _path(run.folder, row.generation)) for row in wanted]


def prepare_again(run: Run, results: Sequence[GenerationResult]) -> None:
    """Prepare what confirmations read of their teachers, which may have been removed since.

    Args:
        run: Run that is resumed.
        results: Generations of an earlier start.

    Raises:
        RunError: It could not be made.
    """
    config = run.config
    if not config.confirm.replicas or not config.reads_cache or run.function is not None:
        return
    if config.confirm.lineages:  # which prepare their own teachers
        return
    known = _load_known(run.folder, len(results))
    done = {row.generation for row in known if _is_replicated(config, row)}
    for result in results:
        if result.teachers and result.generation not in done:
            prepare_teachers(run, result.teachers, of=f"generation {result.generation}")


def _keep_given(run: Run, result: GenerationResult) -> None:
    """Write down a generation 0 whose training cannot be repeated as what it is: one model."""
    path = _path(run.folder, result.generation)
    if result.origin is None or result.origin.unknown is None or path.exists():
        return
    value = result.metrics[run.metric]
    given = Confirmation(
        generation=result.generation,
        seeds=(0,),
        metric=run.metric,
        values=(value,),
        validation=(result.metrics[run.config.search.metric],),
        mean=Interval(value),
        wanted=1,
        given=True,
    )
    save_row(path, given)
    run.events(GenerationConfirmed(given))


def _replicate(
    run: Run, results: Sequence[GenerationResult], waiting: Sequence[GenerationResult]
) -> None:
    """Train and measure generations side by side, and write down their confirmations."""
    config, folder = run.config, run.folder
    arms = [in_lineages(run, _arm(run, row), row) for row in waiting]
    known = {row.generation: row for row in _load_known(folder, len(results))} if waiting else {}
    before: list[Replicated | None] = [known.get(row.generation) for row in waiting]
    own = baselines(config, range(1, len(results))) if run.function is None else {}
    saved = []
    for name, (path, model) in own.items():
        of_labels = _load_baseline(folder.path / path)
        if of_labels is None or of_labels.wanted < config.confirm.replicas:
            arms.append(_labels_arm(run, name, path, model, results[0].point))
            before.append(of_labels)
            saved.append(folder.path / path)
    measured: list[Replicated] = []
    if arms:
        trials = run.replicate(arms, title=LINEAGES if config.confirm.lineages else TITLE)
        title = "testing what was confirmed"
        measured = measure_replicas(run, arms, trials, title=title, known=before)
    for file, row in zip(saved, measured[len(waiting) :], strict=True):
        save_row(file, row)
    for path, _ in own.values():
        remove_students((folder.path / path).parent / "confirm")
    for result, found in zip(waiting, measured, strict=False):
        before_it = _load_known(folder, result.generation)
        confirmation = _confirmation(run, result, found, before_it)
        save_row(_path(folder, result.generation), confirmation)
        run.events(GenerationConfirmed(confirmation))
        _remove_students(run, result.generation)


def _remove_students(run: Run, generation: int) -> None:
    """Remove the students that are measured and teach nobody any more."""
    if run.config.confirm.lineages:
        remove_teachers(run, generation - 1)
    else:
        remove_students(replicas_folder(run, generation))


def labels_only(
    run: Run, confirmations: Sequence[Confirmation], generation: int
) -> tuple[str, Replicated]:
    """Return what a born-again generation is compared with: its name, and its measured arm."""
    for path, _ in baselines(run.config, [generation]).values():
        if (row := _load_baseline(run.folder.path / path)) is not None:
            return "the same network from labels only", row
    name = "generation 0 (one given model)" if confirmations[0].given else "generation 0"
    return name, confirmations[0]


def baseline_rows(run: Run, confirmations: Sequence[Confirmation]) -> list[ControlResult]:
    """Return the rows of the students' own networks from labels only, where they are others."""
    found = []
    for name, (path, model) in baselines(run.config, range(1, len(confirmations))).items():
        if (measured := _load_baseline(run.folder.path / path)) is None:
            continue
        first = contrast(measured, confirmations[0], floor=run.terms.floor)
        title = f"{model.title if run.config.is_chain else model.name}, labels only"
        found.append(ControlResult(**vars(measured), name=name, title=title, first=first))
    return found


def baselines(config: Config, generations: Iterable[int]) -> Mapping[str, tuple[str, ModelConfig]]:
    """Return files and networks of what students are compared with: their own from labels only.

    Each network stands once, by the name of its row: `labels` of the last one, `labels_N` of one
    that generation N of a chain is the first to have.

    Args:
        config: Config of the run.
        generations: Numbers of the generations whose networks they are, from 1 on.

    None where there is to be no baseline.

    >>> from selfkd.config import from_tree
    >>> chain = [{"name": name} for name in "aab"]
    >>> list(baselines(from_tree({"student": chain, "rounds": 3}), range(1, 4)))
    ['labels_1', 'labels']
    """
    found = {}
    compared = config.student is not None and config.confirm.baseline
    for generation in generations if compared else ():
        model = config.network(generation)
        if model == config.network():
            found[LABELS] = (f"{LABELS}/{CONFIRMATION}", model)
        else:
            first = config.students.index(model) + 1
            path = f"{LABELS}/generation_{first:03d}/{CONFIRMATION}"
            found[f"{LABELS}_{first}"] = (path, model)
    return found


def pairs_of(config: Config) -> list[tuple[Config, list[ModelConfig]]]:
    """Return configs of one network of students each, with the networks that may teach them."""
    if not config.is_chain:
        later = config.students if config.most_rounds > 1 else ()
        return [(config, [config.model, *later])]
    found = []
    for generation, model in enumerate(config.students, start=1):
        first = 0 if config.distill.teacher == "lineage" else generation - 1
        teachers = [config.network(number) for number in range(first, generation)]
        found.append((replace(config, student=model), teachers))
    return found


def _load_baseline(path: Path) -> Replicated | None:
    return load_row(Replicated, path) if path.exists() else None


def _labels_arm(run: Run, name: str, path: str, model: ModelConfig, point: Point) -> Arm:
    folder = (run.folder.path / path).parent / "confirm"
    return Arm(
        name=f"confirm_{name}", folder=folder, point=point, network=lambda own, number: model
    )


def load_confirmations(config: Config, folder: RunFolder, generations: int) -> list[Confirmation]:
    """Return the confirmations of the first generations, as far as all of each is done."""
    return [
        row
        for row in _load_known(folder, generations)
        if _is_replicated(config, row) and not (row.alone and config.confirm.baseline)
    ]


def _is_replicated(config: Config, row: Confirmation) -> bool:
    return row.given or row.wanted >= config.confirm.replicas


def judge_generations(run: Run, confirmations: Sequence[Confirmation]) -> Verdict | None:
    """Return the verdict on the born-again generations; None where none is compared."""
    if len(confirmations) < 2 or confirmations[0].alone:
        return None
    family = []
    for row in confirmations[1:]:
        to, baseline = labels_only(run, confirmations, row.generation)
        family.append(pair_up(f"generation {row.generation}", to, row, baseline))
    numbers = ranges([row.generation for row in confirmations[1:]])
    together = f"born-again generations {numbers}, taken together,"
    terms = run.terms
    found = judge(family, terms=terms, together=together, noun="generation", method="closed")
    if not labels_only(run, confirmations, 1)[1].given:
        return found
    origin = run.folder.results()[0].origin
    why = f", as {origin.unknown}" if origin else ""
    rests = (
        f"generation 0 has one seed{why}: the intervals are over seeds of the later generations, "
        "and another training of generation 0 would move all differences alike"
    )
    more = [describe_other_data("generation 0")] if origin and origin.other_data else []
    return replace(found, sentences=(*found.sentences, rests, *more))


def _load_known(folder: RunFolder, generations: int) -> list[Confirmation]:
    paths = [_path(folder, generation) for generation in range(generations)]
    return [load_row(Confirmation, path) for path in paths if path.exists()]


def _path(folder: RunFolder, generation: int) -> Path:
    return folder.generation(generation) / CONFIRMATION


def _arm(run: Run, result: GenerationResult) -> Arm:
    generation = result.generation
    return Arm(
        name=f"confirm-{generation}",
        folder=replicas_folder(run, generation),
        point=result.point,
        teachers=lambda own, number: result.teachers,
        network=lambda own, number: own.network(generation),
    )


def _confirmation(
    run: Run, result: GenerationResult, measured: Replicated, before: Sequence[Confirmation]
) -> Confirmation:
    generation, floor = result.generation, run.terms.floor
    found = Confirmation(
        **vars(measured),
        generation=generation,
        mcnemar=result.mcnemar,
        alone=not run.config.confirm.baseline,
    )
    if before:
        found = replace(found, previous=contrast(measured, before[-1], floor=floor))
    if not generation or found.alone:
        return found
    base = labels_only(run, before, generation)[1]
    return replace(found, first=contrast(measured, base, floor=floor))


def stop_reason(
    config: Config, confirmations: Sequence[Confirmation], *, floor: float = 0.0
) -> str | None:
    """Return why `rounds: auto` stops after these generations, if it does.

    It stops where the last two generations, taken together, show no gain over the one before them:
    a one-sided paired t test at 5 %. The choice to stop sees validation only: the test split is for
    what is reported.

    Args:
        config: Config of the run.
        confirmations: Generations from 0 on, replicated.
        floor: Least spread over seeds.
    """
    metric, mode = config.search.metric, config.search.mode
    if len(confirmations) <= PATIENCE:
        return None
    before, *last = confirmations[-PATIENCE - 1 :]
    gain, seeds = _gain(last, before, floor)
    if is_better(gain, mode=mode):
        return None
    numbers = [str(row.generation) for row in last]
    form = find_metric(metric).difference
    value = format_difference(gain, form=form) if gain else "none in common"
    return (
        f"stopped after generation {numbers[-1]}: generations {join(numbers)}, taken together, "
        f"show no evidence of a gain over generation {before.generation} ({metric}, "
        f"{count(seeds, 'fresh seed' if before.given else 'paired seed')}: {value})"
    )


def _gain(
    last: Sequence[Confirmation], before: Confirmation, floor: float
) -> tuple[Interval | None, int]:
    """Return the mean gain of generations on validation, one-sided, and how many seeds it is of."""
    each = [pair_up("", "", row, before, key="validation").values for row in last]
    shared = [seed for seed in each[0] if all(seed in values for values in each)]
    gains = [sum(values[s][0] - values[s][1] for values in each) / len(each) for s in shared]
    found = mean_interval(gains, confidence=ONE_SIDED, floor=floor) if gains else None
    return found, len(gains)
