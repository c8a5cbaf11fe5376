"""Specialists: networks that tell a few confusable classes apart, beside one generalist."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selfkd.data import Split

TINY = torch.finfo(torch.float64).tiny


def cluster_classes(probabilities: Tensor, *, clusters: int, seed: int) -> list[tuple[int, ...]]:
    """Classes that a generalist predicts together, by K-means on its covariance matrix.

    Each class is a point: its column of the covariance, over the rows, of the predictions. A
    cluster of one class has nothing to tell apart; it is merged where the sum of squares of
    K-means grows least, so there may be fewer clusters than `clusters`.

    The columns of a confident generalist are nearly orthogonal, and end in one large cluster. Give
    its probabilities at a raised temperature: in 100 synthetic classes of 10 or 20 groups, at T = 4
    the groups are found where at T = 1 about 80 classes are in one cluster.

    The paper's on-line K-means is for more classes than fit in memory; here the whole of it, from
    10 starts, finds groups that scikit-learn's `MiniBatchKMeans` misses.

    Args:
        probabilities: Predictions of the generalist `[rows, classes]`.
        clusters: Number of clusters, in [2, classes // 2].
        seed: Seed of the starts.

    Returns:
        Disjoint clusters of at least two classes, ascending, that together are all classes.

    Raises:
        ValueError: Rows that do not sum to 1, `clusters` out of range, or classes that do not fall
            into two clusters.

    >>> predictions = torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.1, 0.0, 0.4, 0.5]])
    >>> cluster_classes(predictions, clusters=2, seed=0)
    [(0, 1), (2, 3)]

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 5.3,
        https://arxiv.org/abs/1503.02531
    """
    if probabilities.ndim != 2 or len(probabilities) < 2:
        raise ValueError(
            "probabilities must be [rows, classes] of at least two rows, "
            f"got {list(probabilities.shape)}"
        )
    rows = probabilities.detach().double()
    sums = rows.sum(dim=1)
    if not bool(((sums - 1).abs() < 1e-2).all()):
        raise ValueError(
            "probabilities must be rows that sum to 1, "
            f"got sums from {float(sums.min()):.4g} to {float(sums.max()):.4g}"
        )
    classes = rows.shape[1]
    if not 2 <= clusters <= classes // 2:
        raise ValueError(f"clusters must be in [2, {classes // 2}], got {clusters}")
    columns = torch.cov(rows.T).cpu().numpy()
    from sklearn.cluster import KMeans  # slow to import

    assigned = KMeans(clusters, n_init=10, random_state=seed).fit_predict(columns)
    found = [np.flatnonzero(assigned == cluster).tolist() for cluster in range(clusters)]
    merged = _without_singletons([members for members in found if members], columns)
    if len(merged) < 2:
        raise ValueError(
            f"probabilities must fall into two clusters or more, got one of all {classes} classes: "
            "raise their temperature, or choose other clusters"
        )
    return sorted(tuple(sorted(members)) for members in merged)


class Specialist(nn.Module):
    """A network over all classes, seen as one of a few of them and a dustbin for the rest.

        logits = [z_S, log sum_{c not in S} exp(z_c)]

    whose softmax is the network's own distribution with the rest of the classes taken as one. So a
    specialist that starts with the generalist's weights starts with its predictions, dustbin
    included, and is of the same architecture: no head is cut or added.

    Args:
        network: Network from inputs to logits `[batch, all classes]`. It is not copied; what is to
            be saved is its state, `specialist.network.state_dict()`.
        classes: Two or more of all classes, in the order of the logits.

    Raises:
        ValueError: `classes` are not as above.

    >>> specialist = Specialist(nn.Identity(), (1, 3))
    >>> specialist(torch.zeros(1, 5)).exp()
    tensor([[1., 1., 3.]])

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 5.2,
        https://arxiv.org/abs/1503.02531
    """

    def __init__(self, network: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        _check_classes(classes)
        self.network = network
        self.classes = tuple(classes)
        self._index: Tensor
        self.register_buffer("_index", torch.tensor(self.classes), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of a batch.

        Args:
            inputs: Inputs `[batch, ...]`.

        Returns:
            Logits `[batch, len(classes) + 1]`, the dustbin last, float32 or wider.

        Raises:
            ValueError: The network has no such classes, or no others.
        """
        logits: Tensor = self.network(inputs)
        _check_classes(self.classes, logits.shape[1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        dustbin = logits.index_fill(1, self._index, -math.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat([logits.index_select(1, self._index), dustbin], dim=1)


def relabel(split: Split, classes: Sequence[int]) -> Split:
    """The same images labelled 0, 1, … by position in `classes`; all others len(classes).

    Args:
        split: Split with labels of all classes.
        classes: Classes of a specialist.

    Returns:
        A split of as many images.

    Raises:
        ValueError: A class twice, or fewer than two.

    >>> relabel(Split(torch.zeros(4, 1, 1, 1), torch.tensor([0, 1, 2, 3])), (3, 1)).labels
    tensor([2, 1, 2, 0])
    """
    _check_classes(classes)
    labels = torch.full_like(split.labels, len(classes))
    for position, label in enumerate(classes):
        labels[split.labels == label] = position
    return Split(split.images, labels)


def specialist_split(split: Split, classes: Sequence[int], *, seed: int) -> tuple[Split, float]:
    """What a specialist is trained on: all images of its classes, as many drawn from the others.

    The others are drawn without replacement; where they are fewer, each is there equally often,
    but for one more of some. A specialist trained on this sees its N_S images as often as the
    dustbin's N_rest, so that its odds of the dustbin are too low by N_rest / N_S. Hence

        dustbin_shift = log(N_rest / N_S)

    which is to be added to its dustbin logit before `combine`: the log of the proportion by which
    its classes are oversampled.

    Args:
        split: Training images with labels of all classes.
        classes: Classes of the specialist.
        seed: Seed of the draw.

    Returns:
        The split, labelled as by `relabel`, and `dustbin_shift`.

    Raises:
        ValueError: `classes` are not at least two different ones, or no image is of them, or all.

    >>> split = Split(torch.zeros(8, 1, 1, 1), torch.arange(8))
    >>> some, dustbin_shift = specialist_split(split, (2, 5), seed=0)
    >>> some.labels.tolist(), round(dustbin_shift, 4)  # log(6 / 2)
    ([0, 1, 2, 2], 1.0986)

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 5.2,
        https://arxiv.org/abs/1503.02531
    """
    coarse = relabel(split, classes)
    rest = coarse.labels.cpu() == len(classes)
    special, others = (~rest).nonzero()[:, 0], rest.nonzero()[:, 0]
    if not len(special) or not len(others):
        raise ValueError(
            f"split must have images of classes {tuple(classes)} and of others, "
            f"got {len(special)} and {len(others)}"
        )
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    drawn = others[order.repeat(math.ceil(len(special) / len(others)))[: len(special)]]
    chosen = torch.cat([special, drawn.sort().values])
    return coarse.take(chosen), math.log(len(others) / len(special))


@torch.no_grad()
def combine(
    generalist_logits: Tensor, specialists: Sequence[tuple[Sequence[int], Tensor]]
) -> Tensor:
    """One distribution of a generalist and the specialist that a row concerns.

    The specialist m of a row is the one in whose set S_m the generalist's most probable class is.
    The row's q minimises equation 5 of the paper,

        KL(p_g || q) + KL(p_m || q)

    where p_m is over S_m and the dustbin, whose q is the sum of q outside S_m. With one specialist
    a row that is the mean of p_g and of p_m, its dustbin shared among the classes outside S_m as
    p_g is.

    Args:
        generalist_logits: Logits `[rows, classes]`.
        specialists: For each its classes and its logits `[rows, len(classes) + 1]`, the dustbin
            last, with the `dustbin_shift` of `specialist_split` added. The sets are disjoint.

    Returns:
        log q `[rows, classes]`, float32 or wider; log p_g where a row has no specialist.

    Raises:
        ValueError: Shapes or classes that do not match, or a class of two specialists.

    >>> generalist_logits = torch.tensor([[0.4, 0.4, 0.1, 0.1]]).log()
    >>> specialist_logits = torch.tensor([[0.6, 0.2, 0.2]]).log()
    >>> combine(generalist_logits, [((0, 1), specialist_logits)]).exp()
    tensor([[0.5000, 0.3000, 0.1000, 0.1000]])

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 5.4,
        https://arxiv.org/abs/1503.02531
    """
    _check_combine(generalist_logits, specialists)
    log_p_g = generalist_logits.double().log_softmax(dim=1)
    log_q, p_g = log_p_g.clone(), log_p_g.exp().clamp(min=TINY)  # none is ruled out for good
    top = p_g.argmax(dim=1)
    for classes, logits in specialists:
        own = list(classes)
        rows = torch.isin(top, top.new_tensor(own))
        p_m = logits[rows].double().softmax(dim=1)
        shared = p_g[rows].index_fill(1, top.new_tensor(own), 0.0)
        shared *= p_m[:, -1:] / shared.sum(dim=1, keepdim=True)
        shared[:, own] = p_m[:, :-1]
        log_q[rows] = ((p_g[rows] + shared) / 2).log()
    return log_q.to(torch.promote_types(generalist_logits.dtype, torch.float32))


def _without_singletons(clusters: list[list[int]], columns: NDArray[np.float64]) -> list[list[int]]:
    """Merge each cluster of one class where the sum of squares grows least (Ward, 1963)."""
    clusters = list(clusters)
    while len(clusters) > 1 and min(map(len, clusters)) == 1:
        alone = clusters.pop(next(i for i, members in enumerate(clusters) if len(members) == 1))
        costs = [
            len(members)
            / (len(members) + 1)
            * np.square(columns[members].mean(axis=0) - columns[alone[0]]).sum()
            for members in clusters
        ]
        clusters[int(np.argmin(costs))] += alone
    return clusters


def _check_classes(classes: Sequence[int], num_classes: int | None = None) -> None:
    if len(classes) < 2 or len(set(classes)) < len(classes) or min(classes) < 0:
        raise ValueError(f"classes must be two or more different ones, got {tuple(classes)}")
    if num_classes is not None and (max(classes) >= num_classes or len(classes) >= num_classes):
        raise ValueError(
            f"classes must be some, not all, of the {num_classes} classes, got {tuple(classes)}"
        )


def _check_combine(
    generalist_logits: Tensor, specialists: Sequence[tuple[Sequence[int], Tensor]]
) -> None:
    if generalist_logits.ndim != 2 or not generalist_logits.numel():
        raise ValueError(
            f"generalist_logits must be [rows, classes], got {list(generalist_logits.shape)}"
        )
    rows, num_classes = generalist_logits.shape
    taken = set[int]()
    for classes, logits in specialists:
        _check_classes(classes, num_classes)
        if twice := taken & set(classes):
            raise ValueError(f"specialists must have disjoint classes, got {min(twice)} in two")
        taken |= set(classes)
        if logits.shape != (rows, len(classes) + 1):
            raise ValueError(
                f"logits of a specialist must be [{rows}, {len(classes) + 1}], the dustbin last, "
                f"got {list(logits.shape)}"
            )
