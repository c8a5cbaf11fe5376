"""What soft targets hold beside the label: similarities of classes, softness, second choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from selfkd.losses.averaging import Average, ensemble_logits
from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import SparseLogits, bucket_log_probabilities
from selfkd.results.teacher import (
    Disagreement,
    NearClass,
    SecondChoice,
    Softness,
    TeacherTargets,
)

TEMPERATURES = (1.0, 2.0, 4.0, 10.0)
MOST_SHARES = 30
"""Classes of which all shares are kept; of more classes only the pairs."""
MOST_ROWS = 1000
"""Classes whose wrong probability mass is summed; of more the most frequent ones."""
MOST_VALUES = 2**24
"""Logits that are read; of more items evenly spaced ones."""
NEAREST, PAIRS, FREQUENT = 3, 30, 20
_CHUNK = 2**21  # values

Cached = Tensor | SparseLogits | SampledTargets


def measure_targets(
    read: Callable[[Tensor], Cached],
    labels: Tensor,
    *,
    classes: int,
    temperatures: Sequence[float] = TEMPERATURES,
    temperature: float = 1.0,
    average: Average = "probabilities",
    weights: Sequence[float] | None = None,
    most: int = 12,
    most_values: int = MOST_VALUES,
) -> TeacherTargets:
    """Return what the cached logits of a teacher hold beside the labels.

    With p = softmax(z / T) of an item of label y, or the average of members, and W = 1 - p_y:

        entropy        = -sum_k p_k log2 p_k
        wrong_entropy  = -sum_{k != y} (p_k / W) log2 (p_k / W)
        share(y -> k)  = mean_i p_ik / W_i            over the items i of label y

    so that each item counts alike, however sure the teacher is of it; of samples the sums of both
    are divided. Of the largest logits alone, the mass of the others is taken as spread evenly among
    them, so that entropies are upper bounds.

    Args:
        read: Function from items, int64 `[batch]`, to their cached logits, those of members
            separate.
        labels: Label of each item that is cached, int64; below 0 where there is none.
        classes: Number of classes.
        temperatures: Temperatures T of the softness.
        temperature: Temperature of the similarities of classes.
        average: Whether the members' `probabilities` or `logits` are averaged.
        weights: Weights of the members in the average; equal when None.
        most: Number of items with a strong second choice.
        most_values: Number of logits that are read; of more items evenly spaced ones are.

    Raises:
        ValueError: No item has a label.

    >>> logits = torch.tensor([[4.0, 2.0, 0.0], [4.0, 2.0, 0.0], [0.0, 0.0, 4.0]])
    >>> found = measure_targets(
    ...     lambda items: logits[items], torch.tensor([0, 0, 2]), classes=3, temperature=2.0
    ... )
    >>> [(row.label, row.other, round(row.share, 2)) for row in found.near]
    [(0, 1, 0.73), (0, 2, 0.27), (2, 0, 0.5), (2, 1, 0.5)]
    >>> found.seconds[0].classes
    (0, 1)
    """
    known = (labels >= 0).nonzero()[:, 0]
    if not len(known):
        raise ValueError("labels must have at least one item with a label, got none")
    count = min(len(known), max(1, most_values // classes))
    items = known[torch.linspace(0, len(known) - 1, count, dtype=torch.float64).round().long()]
    totals = _Totals(labels[known], classes, most)
    for part in torch.split(items, max(1, _CHUNK // classes)):
        cached, own = read(part), labels[part]
        if isinstance(cached, SampledTargets):
            temperature, temperatures = 1.0, ()
            frequencies = _frequencies(cached, classes)
            totals.similar(frequencies, frequencies, own)
            continue
        at = {
            each: _log_mean(cached, each, classes, average, weights)
            for each in {1.0, temperature, *temperatures}
        }
        for each in temperatures:
            totals.soften(each, at[each], own)
        similar = at[temperature]
        totals.similar(_among_wrong(similar, own).exp(), similar.exp(), own)
        totals.second(at[1.0], part, own)
        members = _log_members(cached, 1.0, classes)
        if members.ndim == 3:
            totals.disagree(members, at[1.0], weights)
    shares, near = totals.near()
    return TeacherTargets(
        items=count,
        of=len(known),
        temperature=temperature,
        softness=totals.softness(),
        near=near,
        pairs=MOST_SHARES < classes <= MOST_ROWS,
        shares=shares,
        seconds=tuple(totals.seconds),
        disagreement=totals.disagreement(),
        notes=_notes(cached, classes),
    )


def wrong_entropy(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the entropy in bits among the classes other than the label, `[batch]`.

    Args:
        log_probabilities: Log-probabilities `[batch, classes]`, or logits.
        labels: Class indices `[batch]`, int64.

    >>> wrong_entropy(torch.tensor([[9.0, 1.0, 1.0]]), torch.tensor([0]))
    tensor([1.])
    """
    return entropy(_among_wrong(log_probabilities, labels))


def _among_wrong(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return log-probabilities as if the label were impossible, `[batch, classes]`."""
    return log_probabilities.scatter(-1, labels[:, None], -torch.inf).log_softmax(dim=-1)


def entropy(log_probabilities: Tensor) -> Tensor:
    """Return the entropy in bits, `[...]`.

    Args:
        log_probabilities: Log-probabilities `[..., classes]`; -inf of an impossible class.

    >>> entropy(torch.tensor([[0.5, 0.5, 0.0]]).log())
    tensor([1.])
    """
    p = log_probabilities.exp()
    return -torch.xlogy(p, p).sum(dim=-1) / math.log(2)


def disagreement(
    members: Tensor, average: Tensor, *, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how members disagree on each item.

        information = H(sum_m w_m p_m) - sum_m w_m H(p_m)

    Args:
        members: Log-probabilities `[members, batch, classes]`.
        average: Log-probabilities of their average, `[batch, classes]`.
        weights: Weights of the members; equal when None.

    Returns:
        Fraction of pairs of members that predict different classes, `[batch]`; mutual information
        in bits, `[batch]`; whether each member predicts what the average does,
        `[members, batch]`.

    >>> p = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log()
    >>> disagreement(p, torch.tensor([[0.6, 0.4]]).log())
    (tensor([1.]), tensor([1.]), tensor([[ True],
            [False]]))
    """
    chosen = members.argmax(dim=-1)
    pairs = [(chosen[a] != chosen[b]) for a, b in combinations(range(len(chosen)), 2)]
    shares = members.new_tensor(weights or [1.0] * len(members))
    shares = shares / shares.sum()
    mixture = ensemble_logits(members, weights=shares.tolist())
    information = entropy(mixture) - (entropy(members) * shares[:, None]).sum(dim=0)
    apart = torch.stack(pairs).to(members.dtype).mean(dim=0)
    return apart, information.clamp(min=0), chosen == average.argmax(dim=-1)


class _Totals:
    """Sums over the items that have been read so far."""

    def __init__(self, labels: Tensor, classes: int, most: int) -> None:
        counts = labels.bincount(minlength=classes)
        order = counts.argsort(descending=True, stable=True)
        chosen = order[:FREQUENT] if classes > MOST_ROWS else torch.arange(classes)
        self._labels = chosen[counts[chosen] > 0]
        self._place = torch.full((classes,), -1)
        self._place[self._labels] = torch.arange(len(self._labels))
        self._shares = torch.zeros(len(self._labels), classes, dtype=torch.float64)
        self._mass = torch.zeros_like(self._shares)
        self._counts = torch.zeros(len(self._labels), dtype=torch.float64)
        self._items, self._most = 0, most
        self._soft: dict[float, Tensor] = {}
        self._apart: list[Tensor] = []
        self.seconds: list[SecondChoice] = []

    def soften(self, temperature: float, log_p: Tensor, labels: Tensor) -> None:
        wrong, largest = wrong_entropy(log_p, labels), log_p.exp().amax(dim=-1)
        found = torch.stack([entropy(log_p).sum(), wrong.sum(), largest.sum()])
        self._soft[temperature] = found + self._soft.get(temperature, 0)

    def softness(self) -> tuple[Softness, ...]:
        return tuple(
            Softness(temperature=temperature, entropy=all_, wrong_entropy=wrong, largest=largest)
            for temperature, sums in self._soft.items()
            for all_, wrong, largest in [(sums / self._items).tolist()]
        )

    def similar(self, shares: Tensor, p: Tensor, labels: Tensor) -> None:
        place = self._place[labels]
        kept = place >= 0
        self._items += len(labels)
        self._shares.index_add_(0, place[kept], shares[kept])
        self._mass.index_add_(0, place[kept], p[kept])
        self._counts += place[kept].bincount(minlength=len(self._counts))

    def near(self) -> tuple[tuple[tuple[float, ...], ...], tuple[NearClass, ...]]:
        """Return the shares where classes are few, and the pairs to show."""
        rows, classes = self._shares.shape
        shares = self._shares.clone()
        shares[torch.arange(rows), self._labels] = 0
        shares /= shares.sum(dim=1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        means = self._mass / self._counts[:, None].clamp(min=1)
        if MOST_SHARES < classes <= MOST_ROWS:
            places = (means * (shares > 0)).flatten().topk(PAIRS).indices
            pairs = [divmod(place, classes) for place in places.tolist()]
        else:
            nearest = shares.topk(min(NEAREST, classes - 1), dim=1).indices.tolist()
            pairs = [(row, other) for row, others in enumerate(nearest) for other in others]
        near = tuple(
            NearClass(
                label=int(self._labels[row]),
                other=other,
                share=_short(shares[row, other]),
                probability=_short(means[row, other]),
            )
            for row, other in pairs
            if shares[row, other] > 0
        )
        if classes > MOST_SHARES:
            return (), near
        full = torch.zeros(classes, classes, dtype=torch.float64)
        full[self._labels] = shares
        return tuple(tuple(map(_short, row)) for row in full), near

    def second(self, log_p: Tensor, items: Tensor, labels: Tensor) -> None:
        values, classes = log_p.exp().topk(2, dim=-1)
        rows = values[:, 1].argsort(descending=True, stable=True)[: self._most].tolist()
        self.seconds += [
            SecondChoice(
                item=int(items[row]),
                label=int(labels[row]),
                classes=tuple(classes[row].tolist()),
                probabilities=tuple(values[row].tolist()),
            )
            for row in rows
        ]
        self.seconds = sorted(self.seconds, key=lambda row: -row.probabilities[1])[: self._most]

    def disagree(self, members: Tensor, mean: Tensor, weights: Sequence[float] | None) -> None:
        apart, information, agreed = disagreement(members, mean, weights=weights)
        rows = torch.cat([torch.stack([apart, information]), agreed.to(apart.dtype)])
        self._apart.append(rows.sum(dim=1))

    def disagreement(self) -> Disagreement | None:
        if not self._apart:
            return None
        means = torch.stack(self._apart).sum(dim=0) / self._items
        pairs, information, *agreement = means.tolist()
        return Disagreement(pairs=pairs, information=information, agreement=tuple(agreement))


def _log_members(cached: Tensor | SparseLogits, temperature: float, classes: int) -> Tensor:
    """Return log-probabilities at T, double `[batch, classes]`, of members `[members, …]`."""
    if isinstance(cached, Tensor):
        return (cached.double() / temperature).log_softmax(dim=-1)
    known = bucket_log_probabilities(cached, temperature, classes, torch.float64)
    others = classes - cached.values.shape[-1]
    if not others:
        return torch.full_like(known, -torch.inf).scatter_(-1, cached.indices, known)
    spread = known[..., -1:] - math.log(others)
    full = spread.expand(*known.shape[:-1], classes).clone()
    return full.scatter_(-1, cached.indices, known[..., :-1])


def _log_mean(
    cached: Tensor | SparseLogits,
    temperature: float,
    classes: int,
    average: Average,
    weights: Sequence[float] | None,
) -> Tensor:
    """Return log-probabilities at T of a teacher or an average, double `[batch, classes]`."""
    if isinstance(cached, Tensor) and cached.ndim == 3 and average == "logits":
        cached = ensemble_logits(cached, average="logits", weights=weights)
    found = _log_members(cached, temperature, classes)
    if found.ndim == 2:
        return found
    return ensemble_logits(found, weights=weights).double().log_softmax(dim=-1)


def _frequencies(found: SampledTargets, classes: int) -> Tensor:
    """Return samples as the shares of their classes, double `[batch, classes]`."""
    indices, weights = found.indices, found.weights
    if indices.ndim == 3:  # of members, together
        indices, weights = indices.movedim(0, 1).flatten(1), None
    each = torch.full(indices.shape, 1 / indices.shape[-1]) if weights is None else weights
    zeros = torch.zeros(len(indices), classes, dtype=torch.float64)
    return zeros.scatter_add_(1, indices, each.double())


def _notes(cached: Cached, classes: int) -> tuple[str, ...]:
    if isinstance(cached, SampledTargets):
        return ("only samples at T = 1 are cached: entropies and second choices are unknown",)
    if isinstance(cached, SparseLogits):
        kept = cached.values.shape[-1]
        return (
            f"the {kept} largest of {classes:,} logits are cached: the rest of the probability "
            "counts as spread evenly over the other classes",
        )
    return ()


def _short(value: Tensor | float) -> float:
    return round(float(value), 5)
