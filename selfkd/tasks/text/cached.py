"""How the teacher logits of a text are cached: all of them, or samples where these are too many."""

from __future__ import annotations

from selfkd.config import Config
from selfkd.soft_targets.manifest import row_bytes

SAMPLES = 8
"""Samples a token, where neither their number nor that of the largest logits is given."""
VOCABULARY = 4_096
"""Largest vocabulary of which all logits are cached without being asked for."""
STORE_BYTES = 10**9
"""Most bytes of all logits of a teacher."""


def caches_logits(config: Config) -> bool:
    """Say whether teacher logits are cached at all."""
    return config.reads_cache and config.distill.mode == "tokens"


def choose_samples(config: Config, rows: int, vocabulary: int) -> int | None:
    """Return the number of samples that are cached of each token; None where logits are.

    It depends on config and data alone, so that all workers agree.

    Args:
        config: Config of the students.
        rows: Number of training tokens.
        vocabulary: Number of tokens of the vocabulary.

    >>> choose_samples(Config(), 129_000, 1024), choose_samples(Config(), 129_000, 50_257)
    (None, 8)
    """
    targets = config.targets
    if targets.samples is not None or targets.top_k is not None or not caches_logits(config):
        return targets.samples
    few = vocabulary <= VOCABULARY and rows * row_bytes(vocabulary) <= STORE_BYTES
    return None if few else SAMPLES
