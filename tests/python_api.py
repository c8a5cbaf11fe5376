"""The Python API as a type checker sees it: mypy reads this with the package, nothing runs it."""

import selfkd


def train_fn(trial: object) -> None:
    """Train nothing."""


def results_are_typed() -> list[float]:
    """`selfkd.generations` is a module that can be called."""
    generations = selfkd.generations(train_fn, rounds=1)
    assert generations == selfkd.run_generations(train_fn, rounds=1)
    ensemble = selfkd.run_ensemble(members=3)
    capacity = selfkd.run_capacity(values=[2, 4])
    study = selfkd.run_study(config="study.yaml", settings={"train.epochs": 3})
    return [
        generations.summary.generations[0].metrics["val_accuracy"],
        ensemble.summary.gain.value if ensemble.summary.gain is not None else 0.0,
        capacity.summary.sizes[0].difference.value,
        study.summary.arms[0].mean.value,
        generations.table[0]["test_accuracy"],
        generations.load(ensemble=True).predict("a.png").confidences[0].item(),
        selfkd.load(generations.folder, generation=0).predict(["a.png"]).confidences[0].item(),
    ]


def arguments_are_checked() -> None:
    """An ignore that silences nothing would be an error."""
    selfkd.generations(rounds="many")  # type: ignore[arg-type]
    selfkd.run_ensemble(members="three")  # type: ignore[arg-type]
