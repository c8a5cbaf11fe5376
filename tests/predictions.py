"""Predictions of a whole split at once, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfkd.training.predict import predict_batches


def predict(*arguments: Any, **options: Any) -> Tensor:
    """Return the logits of a model for a split; arguments are those of `predict_batches`."""
    return torch.cat(list(predict_batches(*arguments, **options)))
