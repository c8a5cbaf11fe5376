"""The born-again loop.

Generation 0 is trained on labels, generation k distilled from a teacher made of the generations
before (Furlanello et al., Born-Again Neural Networks, 2018, https://arxiv.org/abs/1805.04770).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from selfkd.analysis.verdicts import resolution
from selfkd.config import Config, to_tree
from selfkd.config.tasks import tries_teachers
from selfkd.execution.jobs import Beside, Job, Outcome
from selfkd.experiments.arms import Arm, Request, Run, Searched
from selfkd.experiments.confirm import (
    baseline_rows,
    confirm_generations,
    judge_generations,
    load_confirmations,
    pairs_of,
    prepare_again,
    stop_reason,
)
from selfkd.experiments.controls import judge_controls, run_controls
from selfkd.experiments.export import export_generation
from selfkd.experiments.given import import_generation, say_changes
from selfkd.experiments.run_folder import EXAMPLES, RunFolder
from selfkd.experiments.teacher_row import name_generation_teacher, teacher_beside
from selfkd.experiments.teachers import prepare_teachers, sum_written
from selfkd.results import (
    Confirmation,
    Evaluation,
    Examples,
    Facts,
    GenerationConfirmed,
    GenerationFinished,
    GenerationResult,
    GenerationsSummary,
    Message,
    Model,
    Point,
    Written,
    best_generation,
    from_row,
)
from selfkd.storage.rows import load_row, save_row

MOST_EXAMPLES = 12


def born_again(run: Run) -> GenerationsSummary:
    """Train generation 0 and `config.rounds` born-again generations, and say what they are worth.

    What is done is kept. With `rounds: auto` each generation is confirmed at once, and the last is
    the one after which `stop_reason` gives a reason to stop.

    Returns:
        The summary, which is saved as `summary.json`.

    Raises:
        ConfigError: The data or the models are not as the config says.
        RunError: All trials of a stage failed.
    """
    config, folder = run.config, run.folder
    folder.keep(config, _check(run))
    results = folder.results()[: config.most_rounds + 1]
    for result in results:
        run.events(GenerationFinished(result))
    for result in results[:1]:
        say_changes(run, result)
    for result in results:
        export_generation(run, result)
    for confirmation in load_confirmations(config, folder, len(results)):
        run.events(GenerationConfirmed(confirmation))
    prepare_again(run, results)
    while not _is_last(config, folder, results):
        confirmed = len(load_confirmations(config, folder, len(results))) == len(results)
        if config.rounds != "auto" or confirmed:
            results.append(_generation(run, results))
            export_generation(run, results[-1])
            run.events(GenerationFinished(results[-1]))
        if config.rounds == "auto":
            confirm_generations(run, results)
    confirmations = confirm_generations(run, results)
    ensemble = None
    if run.function is None:  # whose models have no predictions
        models = [result.models[0] for result in results]
        more = [
            *_examples_beside(run, results, confirmations),
            *_teacher_beside(run, results, confirmations),
        ]
        (ensemble,) = run.average([(models, "probabilities")], beside=more)
    baselines = baseline_rows(run, confirmations)
    controls = run_controls(run, results, confirmations)
    verdict = judge_generations(run, confirmations)
    beside = judge_controls(run, confirmations, controls)
    if verdict and beside:
        verdict = replace(verdict, sentences=(*verdict.sentences, *beside.sentences))
    best = _best(run, results, confirmations)
    folder.keep_best(best.models[0].checkpoint)
    return run.finish(
        GenerationsSummary(
            best=best.generation,
            generations=tuple(
                replace(result, history=(), models=(), teachers=(), diagnostics={}, mcnemar=None)
                for result in results
            ),
            confirmations=tuple(confirmations),
            verdict=verdict,
            ensemble=ensemble,
            controls=(*baselines, *controls),
            against_controls=beside,
            stopped=_stopped(config, folder, confirmations) if config.rounds == "auto" else None,
        )
    )


def _check(run: Run) -> Facts:
    """Try the networks of the run, each student with its teachers."""
    pairs = pairs_of(run.config)
    if not run.config.is_chain:
        return run.check(teachers=pairs[0][1])
    for generation, (own, teachers) in enumerate(pairs, start=1):
        if tries_teachers(own):
            run.check(own, where=f"generation {generation}: ", teachers=teachers)
    return run.check()


def _best(
    run: Run, results: Sequence[GenerationResult], confirmations: Sequence[Confirmation]
) -> GenerationResult:
    search = run.config.search
    return best_generation(results, confirmations, metric=search.metric, mode=search.mode)


def _examples_beside(
    run: Run, results: Sequence[GenerationResult], confirmations: Sequence[Confirmation]
) -> list[Beside]:
    """Return the job that finds the test items that tell generation 0 and the best one apart."""
    if len(results) < 2:
        return []
    best = _best(run, results[1:], confirmations)
    pair, path = (results[0], best), run.folder.path / EXAMPLES
    hashes = (results[0].hash, best.hash)
    if path.exists() and load_row(Examples, path).hashes == hashes:
        return []

    def take(outcome: Outcome) -> None:
        if outcome.error is not None:  # no reason to lose what was trained
            run.events(Message(f"no examples for the report: {outcome.error}"))
            return
        own = {"generations": [result.generation for result in pair], "hashes": hashes}
        save_row(path, from_row(Examples, {**outcome.row, **own}))

    models = run.predicted([result.models[0] for result in pair])
    payload = {"config": to_tree(run.config), "models": models, "most": MOST_EXAMPLES}
    return [Beside(Job("examples", payload), take)]


def _teacher_beside(
    run: Run, results: Sequence[GenerationResult], confirmations: Sequence[Confirmation]
) -> list[Beside]:
    """Return the job that reads what the teacher of the best later generation knows."""
    if len(results) < 2:
        return []
    best = _best(run, results[1:], confirmations)
    kind, models = run.config.distill.teacher, best.teachers
    return teacher_beside(
        run,
        models,
        config=run.config.at(best.point),
        teacher=name_generation_teacher(kind, best.generation, len(models)),
        students=f"generation {best.generation}",
    )


def finished(config: Config, folder: RunFolder) -> GenerationsSummary | None:
    """Return the summary of a run that has nothing left to do, else None."""
    results, summary = folder.results(), folder.summary(GenerationsSummary)
    if summary is None or not _is_last(config, folder, results):
        return None
    rows = summary.generations
    done = {row.name for row in summary.controls}
    replicas = [*summary.confirmations, *(r for r in summary.controls if r.name != "seeds")]
    confirmed = not config.confirm.replicas or (
        len(summary.confirmations) == len(rows) - (not config.confirm.baseline)
        and all(row.given or row.wanted >= config.confirm.replicas for row in replicas)
    )
    same = [row.hash for row in rows] == [row.hash for row in results]
    return summary if same and confirmed and done >= set(config.controls) else None


def _is_last(config: Config, folder: RunFolder, results: Sequence[GenerationResult]) -> bool:
    """Say whether no generation is to follow those that are done."""
    if len(results) > config.most_rounds:
        return True
    confirmed = load_confirmations(config, folder, len(results))
    if config.rounds != "auto" or len(confirmed) < len(results):
        return False
    return _stopped(config, folder, confirmed) is not None


def _stopped(
    config: Config, folder: RunFolder, confirmations: Sequence[Confirmation]
) -> str | None:
    floor = resolution(folder.facts, config.search.metric, "val")
    return stop_reason(config, confirmations, floor=floor)


def _generation(run: Run, results: Sequence[GenerationResult]) -> GenerationResult:
    """Search, choose and measure the next generation; import one that is given."""
    config, generation = run.config, len(results)
    if not generation and config.generation_0.path is not None:
        return import_generation(run)
    start = time.perf_counter()
    teachers = _teachers(config, results)
    written: list[Written] = []
    if teachers and run.function is None and config.reads_cache:
        written += prepare_teachers(run, teachers, of=f"generation {generation}").values()
    arm = Arm(
        name=f"generation-{generation}",
        title=f"generation {generation} of {config.most_rounds}",
        folder=run.folder.generation(generation),
        teachers=lambda own, number: teachers,
        network=lambda own, number: own.network(generation),
        space=config.space(with_teacher=generation > 0),
        points=config.search.points or () if generation else (),
        seed_name=generation,
    )
    kept = int(config.distill.teacher[4:]) if config.distill.teacher.startswith("top:") else 1
    last: Point = results[-1].point if results else {}
    searched = run.search(arm, save=arm.folder / "student.safetensors", keep=kept, last=last)
    evaluation = None
    if run.function is None:
        request = Request(searched.models[0], teachers=teachers, diagnose=True)
        (evaluation,) = run.evaluate([request], title="testing the chosen model")
    result = _result(config, generation, searched, teachers, evaluation)
    result = replace(
        result,
        wanted_models=kept,
        seconds=time.perf_counter() - start,
        written=sum_written(written) if written else None,
    )
    save_row(arm.folder / "result.json", result)
    return result


def _teachers(config: Config, results: Sequence[GenerationResult]) -> Sequence[Model]:
    """Return the teachers of the next generation."""
    if not results:
        return []
    if config.distill.teacher == "lineage":
        return [result.models[0] for result in results]
    return results[-1].models


def _result(
    config: Config,
    generation: int,
    searched: Searched,
    teachers: Sequence[Model],
    evaluation: Evaluation | None,
) -> GenerationResult:
    """Return what is known of a generation's chosen trial."""
    best, distill = searched.best, config.at(searched.best.point).distill
    soft = generation > 0 and distill.mode == "tokens"
    if evaluation is None:
        metrics, measured = best.metrics, Evaluation(hash=best.hash)
    else:
        chosen_by = config.search.metric
        own = {k: v for k, v in best.metrics.items() if k.startswith("val_") or k == chosen_by}
        metrics = own | evaluation.metrics
        measured = evaluation
    return GenerationResult(
        generation=generation,
        trial=best.trial,
        point=best.point,
        temperature=distill.temperature if soft else None,
        alpha=distill.alpha if soft else None,
        metrics=metrics,
        hash=best.hash,
        teachers=tuple(teachers),
        models=tuple(searched.models),
        parameters=measured.parameters,
        mcnemar=measured.mcnemar,
        diagnostics=measured.diagnostics,
        history=best.history,
        trials=len(searched.trials),
        failed=sum(trial.status == "failed" for trial in searched.trials),
        train_seconds=sum(trial.train_seconds for trial in searched.trials),
    )
