"""Which trial of a search is taken: by accuracy, and distance from the config's own values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from selfkd.config import load_config
from selfkd.config.space import Distribution
from selfkd.experiments.choice import choose, distance
from selfkd.results import TrialResult

OWN = {"distill.temperature": 3.5, "distill.alpha": 0.65}
FAR = {"distill.temperature": 9.0, "distill.alpha": 0.2}
PAPER = {"distill.temperature": 1.0, "distill.alpha": 1.0}
CONFIG = load_config(settings=["distill.temperature=3.5", "distill.alpha=0.65"])
SPACE = CONFIG.space(with_teacher=True)


def trials(*rows: tuple[dict[str, Any], float]) -> list[TrialResult]:
    made = [
        TrialResult(
            stage="generation-1",
            trial=number,
            seed=number,
            point=point,
            status="completed",
            metrics={"val_accuracy": value},
        )
        for number, (point, value) in enumerate(rows)
    ]
    return sorted(made, key=lambda trial: -trial.metrics["val_accuracy"])


def taken(*rows: tuple[dict[str, Any], float], items: int = 400, **changes: Any) -> list[int]:
    config = load_config(settings=[f"{key}={value}" for key, value in changes.items()])
    space = config.space(with_teacher=True)
    return [trial.trial for trial in choose(config, space, trials(*rows), items=items)]


def test_the_config_s_own_setting_is_taken_of_those_not_told_apart() -> None:
    # 1.5 standard errors of 0.93 and 0.92 on 400 items are 2.8 points
    rows = (FAR, 0.93), (OWN, 0.92), (PAPER, 0.915)
    assert taken(*rows) == [1, 0, 2]
    assert taken(*rows, items=4000) == [0, 1, 2]  # 0.9 points


def test_of_others_the_nearest_is_taken() -> None:
    near = {"distill.temperature": 4.0, "distill.alpha": 0.6}
    assert taken((FAR, 0.93), (near, 0.92), (OWN, 0.85)) == [1, 0, 2]
    assert taken((FAR, 0.93), (near, 0.85), (OWN, 0.85)) == [0, 1, 2]


def test_without_a_space_the_best_is_taken() -> None:
    assert taken(({}, 0.91), ({}, 0.93), ({}, 0.92)) == [1, 2, 0]


def test_other_metrics_are_taken_as_they_are() -> None:
    rows = trials((FAR, 0.93), (OWN, 0.92))
    assert choose(CONFIG, SPACE, rows, items=0) == rows
    nll = load_config(settings=["search.metric=val_nll", "search.mode=min"])
    assert choose(nll, SPACE, rows, items=400) == rows
    assert choose(CONFIG, SPACE, [], items=400) == []


def test_in_a_space_of_the_user_s_own_the_best_is_taken() -> None:
    rows = (FAR, 0.93), (OWN, 0.92)
    own = {"search.space.distill.alpha": "{uniform: [0, 1]}"}
    assert taken(*rows) == [1, 0]
    assert taken(*rows, **own) == [0, 1]


def test_points_of_other_keys_are_far() -> None:
    lr = {"train.lr": 0.5}
    assert taken((lr, 0.93), (OWN, 0.92)) == [1, 0]
    assert distance(CONFIG, SPACE, lr) == 1
    assert distance(CONFIG, SPACE, {"train.lr": CONFIG.train.lr}) == 0


def test_words_differ_or_do_not() -> None:
    space = {
        "train.optimizer": Distribution("choice", ("sgd", "adamw")),
        "params.lr": Distribution("loguniform", (0.01, 1)),
        "model.args.width": Distribution("randint", (4, 12)),
    }
    assert distance(CONFIG, space, {"train.optimizer": "adamw"}) == 1
    assert distance(CONFIG, space, {"train.optimizer": "sgd", "params.lr": 0.1}) == 0  # no own lr
    assert distance(CONFIG, space, {"model.args.width": 10}) == pytest.approx(0.25**2)


def test_luck_is_not_taken_for_skill() -> None:
    """Of eight equal settings the config's own wins most searches, not one in eight."""
    rng = np.random.default_rng(0)
    points = [OWN, *({**OWN, "distill.alpha": 0.1 + 0.1 * k} for k in range(7))]
    own = 0
    for _ in range(400):
        values = rng.binomial(400, 0.92, size=8) / 400
        own += taken(*zip(points, values, strict=True), **{"distill.alpha": 0.65})[0] == 0
    assert own / 400 > 0.6
