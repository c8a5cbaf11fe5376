"""What is measured of a language model: a token is an item."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.analysis import metrics
from selfkd.results import Bin, Diagnostics
from selfkd.tasks.text.data import Tokens

MOST = 700.0  # nats, whose exponential is still a number


def measure(split: str, logits: Tensor, tokens: Tokens) -> dict[str, float]:
    """Return NLL, perplexity, bits a byte and token accuracy of logits on a split.

        nll = -sum_i log p(token i) / n,  perplexity = exp(nll),
        bits_per_byte = n nll / (ln 2 bytes)

    with n the number of tokens, end tokens included; bits a byte compare models of different
    tokenizers, the others do not.

    Args:
        split: Name of the split, which the names begin with.
        logits: Logits `[scored, vocabulary]` of the scored rows.
        tokens: Tokens of the split.

    >>> tokens = Tokens(torch.tensor([0, 1, 1]), context=2, bytes=2)
    >>> round(measure("val", torch.zeros(2, 2), tokens)["val_bits_per_byte"], 6)
    1.0
    """
    labels = tokens.labels[tokens.scored]
    nll = metrics.nll(logits, labels)
    return {
        f"{split}_nll": nll,
        f"{split}_perplexity": math.exp(min(nll, MOST)),
        f"{split}_bits_per_byte": len(labels) * nll / (math.log(2) * tokens.bytes),
        f"{split}_token_accuracy": metrics.accuracy(logits, labels),
    }


def window_nll(logits: Tensor, tokens: Tokens) -> Tensor:
    """Return NLLs of windows, double `[windows]`, whose mean is the NLL of a token.

        w_j = windows / n sum_{i in window j} -log p(token i)

    with n the number of tokens; tokens of one window depend on each other.

    Args:
        logits: Logits `[scored, vocabulary]` of the scored rows.
        tokens: Tokens of the split.

    >>> tokens = Tokens(torch.tensor([0, 1, 1, 0]), context=2, bytes=2)
    >>> window_nll(torch.zeros(3, 2), tokens).mean().exp()
    tensor(2.0000, dtype=torch.float64)
    """
    nll = F.cross_entropy(logits, tokens.labels[tokens.scored], reduction="none").double()
    windows = torch.searchsorted(tokens.bounds, tokens.scored, right=True) - 1
    sums = torch.zeros(tokens.windows, dtype=torch.float64).index_add(0, windows, nll)
    return sums * (tokens.windows / len(nll))


def diagnosis(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Diagnostics:
    """Return the calibration of a model, and its fidelity to its teacher where there is one.

    Args:
        logits: Logits `[rows, vocabulary]` of the model.
        labels: Tokens `[rows]`.
        teacher_logits: Logits `[rows, vocabulary]` of its teacher.
    """
    found = {
        "accuracy": metrics.accuracy(logits, labels),
        "nll": metrics.nll(logits, labels),
        "ece": metrics.ece(logits, labels),
    }
    if teacher_logits is not None:
        found["agreement"] = metrics.agreement(logits, teacher_logits)
        found["kl"] = metrics.mean_kl(teacher_logits, logits)
    bins = tuple(Bin(**row) for row in metrics.reliability(logits, labels))
    return Diagnostics(metrics=found, reliability=bins)
