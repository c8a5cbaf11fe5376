"""The model of a run that is taken: chosen on validation, never on the test split."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selfkd.config import Config
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import Confirmation, GenerationResult
from selfkd.storage.files import link

BEST = "best.safetensors"
"""File of that model in a finished run's folder."""


def best_generation(
    config: Config, results: Sequence[GenerationResult], confirmations: Sequence[Confirmation]
) -> int:
    """Return the number of the best generation, by `search.metric` on validation.

    Where all generations were replicated on fresh seeds, their means over those are compared, else
    their chosen trials; of equal ones the earlier is taken.

    Args:
        config: Config of the run.
        results: Results of the finished generations, in order, at least one.
        confirmations: Confirmations of the same, as far as there are any.
    """
    metric, sign = config.search.metric, 1 if config.search.mode == "max" else -1
    values = [result.metrics.get(metric, math.nan) for result in results]
    replicated = [row.validation for row in confirmations]
    if len(replicated) == len(results) and all(replicated):
        values = [sum(row) / len(row) for row in replicated]
    ranks = [-math.inf if math.isnan(value) else sign * value for value in values]
    return results[ranks.index(max(ranks))].generation


def keep_best(folder: RunFolder, checkpoint: str) -> None:
    """Make a model the one that is taken from a run: a link to it, or a copy."""
    source = folder.file(checkpoint)
    if source.exists():
        link(source, folder.path / BEST)
