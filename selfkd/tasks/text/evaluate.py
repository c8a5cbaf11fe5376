"""What is measured of a language model: a token is an item."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.analysis import metrics
from selfkd.distill.outputs import take_logits
from selfkd.losses import Average, ensemble_logits
from selfkd.results import Bin, Diagnostics
from selfkd.tasks.task import Split
from selfkd.tasks.text.data import IGNORED, TextData, Tokens
from selfkd.tasks.text.generate import generate
from selfkd.tasks.text.tokenizer import read_tokenizer

MOST = 700.0  # nats, whose exponential is still a number
SAMPLED = 128
"""Most prompts that a model is sampled on."""
CHECKED = 500
"""Most prompts whose greedy text is compared with the right one."""
SCORED_VALUES = 2**22
"""Most logits a batch of texts that are scored."""


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
    size = max(SCORED_VALUES // logits.shape[-1], 1)  # no copy of all logits is made
    labels = tokens.labels[tokens.scored]
    parts = zip(torch.split(logits, size), torch.split(labels, size), strict=True)
    nll = torch.cat([F.cross_entropy(*part, reduction="none") for part in parts]).double()
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


def fidelity(logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
    """Return agreement with a teacher, KL(teacher || student) in nats, and draft acceptance.

    Args:
        logits: Logits `[rows, vocabulary]` of the student on the test split.
        teacher_logits: Logits `[rows, vocabulary]` of its teacher.
    """
    return {
        "agreement": metrics.agreement(logits, teacher_logits),
        "test_kl": metrics.mean_kl(teacher_logits, logits),
        "test_draft_acceptance": metrics.draft_acceptance(logits, teacher_logits),
    }


def spread(count: int, most: int) -> list[int]:
    """Return at most so many numbers below `count`, evenly spaced from the first to the last.

    >>> spread(9, 3), spread(2, 3)
    ([0, 4, 8], [0, 1])
    """
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def measure_samples(
    network: nn.Module,
    teachers: Sequence[nn.Module],
    data: TextData,
    *,
    seed: int,
    average: Average = "probabilities",
    weights: Sequence[float] | None = None,
) -> dict[str, float]:
    """Return own NLL and distinct n-grams of what a model samples at T = 1 on test prompts.

    Args:
        network: Model that writes.
        teachers: Models whose average scores what it has written, in the same context.
        data: Text; prompts are those of at most 128 windows of its test split.
        seed: Seed of the draws.
        average: Average of the teachers.
        weights: Weight of each teacher; all alike when not given.
    """
    tokens = data.splits["test"]
    prompts = tokens.prompts(spread(tokens.windows, SAMPLED))
    written = generate(network, prompts, end=data.end, context=data.context, seed=seed)
    batch = max(SCORED_VALUES // (data.context * data.vocabulary), 1)
    found = own_nll(teachers, prompts, written, average=average, weights=weights, batch=batch)
    shares = {f"test_distinct_{n}": distinct(written, n) for n in (1, 2, 3)}
    measured = {"test_own_nll": found, **shares}
    return {name: value for name, value in measured.items() if value is not None}


@torch.no_grad()
def own_nll(
    teachers: Sequence[nn.Module],
    prompts: Sequence[Tensor],
    written: Sequence[Tensor],
    *,
    average: Average = "probabilities",
    weights: Sequence[float] | None = None,
    batch: int = 1,
) -> float | None:
    """Return the mean NLL, in nats a token, that teachers give to texts after their prompts.

        -sum_x sum_i log p_teacher(x_i | prompt, x_1 .. x_(i-1)) / sum_x |x|

    of texts x that the student has sampled: where it has led itself to what the teacher would not
    write, which no loss on given text sees, it is high. None of no text at all.

    Args:
        teachers: Language models, in eval mode.
        prompts: Tokens of each prompt, int64 `[length]`.
        written: Tokens after each prompt, int64 `[written]`.
        average: Average of the teachers.
        weights: Weight of each teacher; all alike when not given.
        batch: Number of texts that are scored at once.
    """
    device = next(teachers[0].parameters()).device
    total, count = 0.0, sum(map(len, written))
    texts = [pair for pair in zip(prompts, written, strict=True) if len(pair[1])]
    for start in range(0, len(texts), batch):
        pairs = texts[start : start + batch]
        inputs = nn.utils.rnn.pad_sequence(
            [torch.cat(pair)[:-1] for pair in pairs], batch_first=True
        ).to(device)
        labels = torch.full_like(inputs, IGNORED)
        for own, (prompt, text) in zip(labels, pairs, strict=True):
            own[len(prompt) - 1 : len(prompt) - 1 + len(text)] = text
        rows = labels != IGNORED
        logits = [take_logits(teacher(inputs), "teacher")[rows] for teacher in teachers]
        mean = ensemble_logits(torch.stack(logits), average=average, weights=weights)
        total += float(F.cross_entropy(mean, labels[rows], reduction="sum"))
    return total / count if count else None


def distinct(texts: Sequence[Tensor], n: int) -> float | None:
    """Return the share of the n-grams of texts that are distinct, pooled; None where none is.

    Reference:
        Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016,
        https://arxiv.org/abs/1510.03055

    >>> distinct([torch.tensor([1, 2, 1, 2])], 2)  # (1, 2), (2, 1), (1, 2)
    0.6666666666666666
    """
    rows = [text.tolist() for text in texts]
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


@dataclass(frozen=True, eq=False)
class Matches:
    """What became of prompts that models went on from, greedily."""

    right: Tensor
    """Whether the text after each prompt is right, bool `[prompts]`."""
    ended: Tensor
    """Whether it came to the end token before the end of the context, bool `[prompts]`."""


def match(
    data: TextData,
    split: Split,
    networks: Sequence[nn.Module],
    *,
    average: Average = "probabilities",
    weights: Sequence[float] | None = None,
) -> Matches:
    """Return which prompts of a split are greedily followed by the right text.

    A text that comes to the end of the context without an end token is wrong.

    Args:
        data: Text, of whose examples at most 500 are tried.
        split: Split of the examples.
        networks: Language model, or the members of an ensemble; one that only predicts, as an
            exported one does, is followed token by token.
        average: Average of the members.
        weights: Weight of each member; all alike when not given.
    """
    numbers = spread(len(data.examples[split]), CHECKED)
    prompts = data.splits[split].prompts(numbers)
    if len(networks) == 1 and hasattr(networks[0], "generate"):
        written = generate(
            networks[0], prompts, end=data.end, context=data.context, seed=0, greedy=True
        )
    else:
        members = [network.eval() for network in networks]
        written = list(_follow(members, prompts, data, average, weights))
    tokenizer = read_tokenizer(data.tokenizer)
    ended = [bool(len(text)) and int(text[-1]) == data.end for text in written]
    texts = [
        tokenizer.decode(text.tolist()[: len(text) - end], skip_special_tokens=False)
        for text, end in zip(written, ended, strict=True)
    ]
    right = [
        end and data.examples[split][number].is_right(text)
        for number, text, end in zip(numbers, texts, ended, strict=True)
    ]
    return Matches(torch.tensor(right), torch.tensor(ended))


def measure_matches(
    data: TextData, split: Split, *networks: nn.Module, **averaging: Any
) -> dict[str, float]:
    """Return exact match, and the share of texts without an end; nothing of documents.

    Args:
        data: Text.
        split: Split of the examples.
        networks: Language model, or the members of an ensemble.
        averaging: Further arguments of `match`.
    """
    if not data.examples[split] or not networks:
        return {}
    found = match(data, split, networks, **averaging)
    return {
        f"{split}_exact_match": float(found.right.double().mean()),
        f"{split}_unended": float((~found.ended).double().mean()),
    }


@torch.no_grad()
def _follow(
    networks: Sequence[nn.Module],
    prompts: Sequence[Tensor],
    data: TextData,
    average: Average,
    weights: Sequence[float] | None,
) -> Iterator[Tensor]:
    """Yield what the average of models finds most probable after each prompt, token by token."""
    device = next((tensor.device for tensor in networks[0].parameters()), torch.device("cpu"))
    size = max(SCORED_VALUES // (data.context * data.vocabulary), 1)
    for start in range(0, len(prompts), size):
        own = prompts[start : start + size]
        lengths = torch.tensor([len(prompt) for prompt in own], device=device)
        ids = torch.full((len(own), data.context + 1), data.end, device=device)
        for row, prompt in zip(ids, own, strict=True):
            row[: len(prompt)] = prompt
        ends, rows = lengths.clone(), torch.arange(len(own), device=device)
        for _ in range(data.context):
            open_ = (ends <= data.context) & ((ends == lengths) | (ids[rows, ends - 1] != data.end))
            if not open_.any():
                break
            inputs = ids[:, : int(ends[open_].max())]
            logits = [
                take_logits(network(inputs), "model")[rows, ends.clamp(max=inputs.shape[1]) - 1]
                for network in networks
            ]
            mean = ensemble_logits(torch.stack(logits), average=average, weights=weights)
            ids[rows[open_], ends[open_]] = mean.argmax(dim=-1)[open_]
            ends += open_
        for row, prompt, end in zip(ids.cpu(), own, ends.tolist(), strict=True):
            yield row[len(prompt) : end]
