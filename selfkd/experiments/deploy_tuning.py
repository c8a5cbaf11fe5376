"""Models that are fine-tuned to be served: pruned, or with weights in low bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfkd.analysis.statistics import mean_interval
from selfkd.config import TERMS, Config, ModelConfig, choices_of_terms
from selfkd.errors import RayLostError, RunError
from selfkd.experiments.arms import Arm, Request, Run
from selfkd.experiments.deploy_forms import File, Served, Work, digest, measure, serve, write_float
from selfkd.experiments.teachers import prepare_teachers
from selfkd.results import WRITTEN_BITS, CompressedModel, DeployRow, Model, Point, Row, TrialResult
from selfkd.results.metrics import AGREEMENT
from selfkd.storage.files import remove_file

MOST_ALPHA = 0.65
"""Largest weight of the soft targets in a fine-tuning, whose teacher is the model that it started
from: what is new to it are the labels. With 1 it was worse on MNIST, natural images and text."""
WARMUP = 8
"""Epochs of a fine-tuning to one of its warm-up, where the model was trained without: the weights
are good, and the full learning rate at once would throw them about. On digits the gain of
distillation varied half as much over seeds; MNIST was the same, natural images better by 0.4
points."""
_ALPHA = "distill.alpha"
_TUNED = ("distill.", "train.")
"""Beginnings of the keys of a model's own setting that its fine-tuning keeps."""


def prune(work: Work, fraction: float) -> Served:
    """Prune the model and fine-tune it, beside the same from labels and a fresh student.

    Args:
        work: Deployment at work, which the rows are put into.
        fraction: Share of the channels of each layer that is pruned.

    Returns:
        What is served: the best on validation of what was pruned.
    """
    run, base = work.run, work.source.model
    name, title = f"{digest(base)}-pruned-{fraction}", f"pruning by {fraction:.0%}"
    start, pruned = _compress(work, title, name, "prune", base, fraction=fraction)
    work.remarks += pruned.remarks
    model = ModelConfig.of_checkpoint(pruned.model)
    share = f"pruned by {fraction:.0%}"
    arms: dict[str, tuple[str, Row, Sequence[Model]]] = {
        "pruned_labels": (f"{share}, from labels", {"checkpoint": str(start)}, ()),
        "pruned_distilled": (f"{share}, distilled", {"checkpoint": str(start)}, (base,)),
        "fresh": (
            "fresh of that size, distilled",
            {"checkpoint": str(start), "fresh": True},
            (base,),
        ),
    }
    found = tune(work, f"{pruned.hash}-pruned-{fraction:g}", arms, model)
    best = _best(run, found["pruned_distilled"], found["pruned_labels"])
    work.like |= dict.fromkeys(arms, "pruned_float")
    titles = f"{share}, ONNX float", f"{share}, ONNX int8"
    return serve(work, best, "pruned_float", "pruned_int8", *titles)


def lower_bits(work: Work, served: Served, bits: int) -> File | None:
    """Fine-tune the model with rounded weights, beside the same from labels; write the best.

    Args:
        work: Deployment at work, which the rows are put into.
        served: What is served, whose network is rounded.
        bits: Number of bits.

    Returns:
        File of weights in low bits; None of bits that are only simulated.
    """
    run, name = work.run, f"{digest(served.model)}-bits-{bits}"
    title, rounding = f"{bits}-bit weights", f"rounding to {bits} bits"
    rounded, made = _compress(work, rounding, name, "round_checkpoint", served.model, bits=bits)
    model = Model(made.hash, run.folder.relative(rounded))
    request = Request(model, (work.source.model,), logits=False)
    (tested,) = run.evaluate([request], title="measuring the rounded")
    key = f"bits{bits}"
    work.rows[f"{key}_rounded"] = DeployRow(
        key=f"{key}_rounded",
        title=f"{title}, only rounded",
        hash=model.hash,
        metrics={name: value for name, value in tested.metrics.items() if name != AGREEMENT},
        agreement=tested.metrics[AGREEMENT],
    )
    work.remarks += made.remarks
    start, base = {"checkpoint": str(run.folder.file(served.model.checkpoint))}, work.source.model
    arms = {
        f"{key}_labels": (f"{title}, from labels", start, ()),
        f"{key}_distilled": (f"{title}, distilled", start, (base,)),
    }
    network = ModelConfig.of_checkpoint(served.exported.row.model)
    found = tune(work, name, arms, network, bits=bits)
    if bits not in WRITTEN_BITS:
        work.remarks.append(f"{title} are simulated: onnxruntime has no operator for them")
        return None
    best = _best(run, *reversed(found.values()))
    exported = write_float(work, title, best)
    file = work.write(
        f"{title}: writing",
        work.steps / f"{exported.path.stem}-bits-{bits}.onnx",
        "deploy_lower_bits",
        exported=str(exported.path),
        bits=bits,
    ).like(exported)
    measure(work, key, f"{title}, ONNX", best, file=file)
    work.like |= dict.fromkeys([f"{key}_rounded", *arms], key)
    return file


def _compress(
    work: Work, title: str, name: str, kind: str, model: Model, **more: Any
) -> tuple[Path, CompressedModel]:
    """Prune or round a model in a job; return the file to fine-tune from, and the job's row."""
    save = work.steps / f"{name}.safetensors"
    (row,) = work.run.rows([model])
    more |= {"checkpoint": row["checkpoint"], "save": str(save)}
    return save, work.step(title, name, kind, CompressedModel, writes=save, **more)


def tune(
    work: Work,
    name: str,
    arms: Mapping[str, tuple[str, Row, Sequence[Model]]],
    model: ModelConfig,
    *,
    bits: int | None = None,
) -> dict[str, list[tuple[Model, float]]]:
    """Train arms on the same seeds, and put a row of each; return their models with the metric.

    Args:
        work: Deployment at work.
        name: Name of their folder, which begins with the hash of the model that they start from.
        arms: Title, start and teachers by key.
        model: Their network.
        bits: Bits that their weights are rounded to in training; not rounded when not given.

    Raises:
        RunError: All trials of an arm failed.
    """
    run, base = work.run, work.source.model
    point = work.point = _point(run.config, work.source.point)
    name += run.config.deploy.suffix
    rounded = {} if bits is None else {"bits": bits}
    if run.config.at(point).reads_cache:
        prepare_teachers(run, [base], of="deploy", config=run.config.at(point))

    def arm(key: str, start: Row, teachers: Sequence[Model]) -> Arm:
        return Arm(
            name=f"deploy_{key}-{name[:8]}",  # in W&B two fine-tunings must not be one
            folder=work.folder / name / key,
            point=point,
            teachers=lambda config, number: teachers,
            network=lambda config, number: model,
            options=lambda number: {"start": start, **rounded},
            seeds=work.seeds(),
        )

    own = [arm(key, start, teachers) for key, (_, start, teachers) in arms.items()]
    trials = _replicate(run, own)
    models = [
        [arm.model(run, trial) for trial in rows] for arm, rows in zip(own, trials, strict=True)
    ]
    requests = [Request(each, (base,), logits=False) for rows in models for each in rows]
    measured = iter(run.evaluate(requests, title="measuring what was fine-tuned"))
    found = {}
    for (key, (title, _, _)), rows, own_models in zip(arms.items(), trials, models, strict=True):
        tested = [next(measured) for _ in rows]
        means = {n: _mean([row.metrics[n] for row in tested]) for n in tested[0].metrics}
        work.rows[key] = DeployRow(
            key=key,
            title=title,
            agreement=means.pop(AGREEMENT),
            metrics=means,
            seeds=tuple(trial.seed for trial in rows),
            values=tuple(row.metrics[run.metric] for row in tested),
        )
        chosen_by = run.config.search.metric
        found[key] = [
            (each, trial.metrics[chosen_by]) for each, trial in zip(own_models, rows, strict=True)
        ]
        pairs = found[key]
        bests = [_best(run, pairs[: number + 1]) for number in range(len(pairs))]
        _remove_all_but(bests, own_models, run)
    return found


def _replicate(run: Run, arms: Sequence[Arm]) -> list[list[TrialResult]]:
    """Train arms on their seeds; where all trials of one fail, name the learning rate."""
    try:
        return run.replicate(arms, title="fine-tuning")
    except RayLostError:
        raise
    except RunError as error:
        lr = run.config.at(arms[0].point).train.lr
        raise RunError(
            f"{error}\n(train.lr of the fine-tuning is {lr:g}; --set deploy.lr=X)"
        ) from None


def _point(config: Config, chosen: Point) -> Point:
    """Return the settings of a fine-tuning in which it differs from the config.

    Args:
        config: Config of the run.
        chosen: Settings of the training of the model that is deployed.
    """
    point = {
        key: value
        for key, value in chosen.items()
        if key.startswith(_TUNED) and not key.startswith(TERMS)
    }
    if any(choices_of_terms(config)):  # layers of a pruned network are narrower
        point[TERMS] = []
    if config.data.views == "fresh":  # of a run on labels alone: there is nothing to cache
        point["distill.live"] = True
    point[_ALPHA] = min(config.at(point).distill.alpha, MOST_ALPHA)
    if config.deploy.lr is not None:
        point["train.lr"] = config.deploy.lr
    train = config.at(point).train
    if config.steps_by_part is None and not train.warmup_epochs and train.epochs > 1:
        point["train.warmup_epochs"] = max(1, train.epochs // WARMUP)
    return point


def _best(run: Run, *arms: Sequence[tuple[Model, float]]) -> Model:
    """Return the best model on validation of the arm that is the best in the mean over its seeds.

    By the best of all trials alone, the arm that varies most would be chosen. Of equal arms it is
    the first.
    """
    choose = max if run.config.search.mode == "max" else min
    arm = choose(arms, key=lambda pairs: _mean([value for _, value in pairs]))
    return choose(arm, key=lambda pair: pair[1])[0]


def _remove_all_but(bests: Sequence[Model], models: Sequence[Model], run: Run) -> None:
    """Remove the students of an arm but those that fewer seeds, or more, can choose."""
    kept = {model.hash for model in bests}
    for model in models:
        if model.hash not in kept:
            remove_file(run.folder.file(model.checkpoint))


def _mean(values: Sequence[float]) -> float:
    return mean_interval(values).value
