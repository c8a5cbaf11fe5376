"""Soups, averages of the weights of trained models; and fitted weights of an ensemble's members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfkd.losses import Average

Array = NDArray[np.float64]


def average_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Uniform soup: the mean of several networks' weights.

        theta = (theta_1 + ... + theta_n) / n

    in float64, then in each tensor's own dtype. Tensors that are not floating point, such as
    `num_batches_tracked`, are taken from the first state. Running statistics of batch norm are
    averaged too, but these are not the statistics of the averaged network: pass training data
    through it to measure them.

    Args:
        states: State dicts of networks of one architecture, trained from the same initialisation.

    Returns:
        A state dict that shares no memory with `states`.

    Raises:
        ValueError: No states, or states whose names or shapes differ.

    >>> average_weights([{"bias": torch.tensor([1.0, 2.0])}, {"bias": torch.tensor([3.0, 2.0])}])
    {'bias': tensor([2., 2.])}

    Reference:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
        accuracy without increasing inference time", 2022, https://arxiv.org/abs/2203.05482
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018,
        https://arxiv.org/abs/1803.05407
    """
    if not states:
        raise ValueError("states must be at least one state dict, got none")
    first, *others = states
    for number, other in enumerate(others, start=1):
        _check_same(first, other, number)
    return {
        name: _mean([state[name] for state in states])
        if tensor.is_floating_point()
        else tensor.detach().clone()
        for name, tensor in first.items()
    }


def greedy_soup(
    states: Sequence[Mapping[str, Tensor]], score: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """Greedy soup: a state is added to the average if the score does not drop.

    Args:
        states: State dicts of one architecture, best first.
        score: Function from a soup to its score on validation data, such as accuracy; higher is
            better.

    Returns:
        The soup, whose score is no less than that of the first state, and the positions of the
        states in it.

    Raises:
        ValueError: Same as `average_weights`.

    >>> states = [{"bias": torch.tensor(value)} for value in (1.0, 8.0, 0.0)]
    >>> greedy_soup(states, lambda soup: -abs(float(soup["bias"]) - 0.5))
    ({'bias': tensor(0.5000)}, [0, 2])

    Reference:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
        accuracy without increasing inference time", 2022, https://arxiv.org/abs/2203.05482
    """
    soup, selected = average_weights(states[:1]), [0]
    best = score(soup)
    for number in range(1, len(states)):
        candidate = average_weights([states[member] for member in [*selected, number]])
        value = score(candidate)
        if value >= best:
            soup, best = candidate, value
            selected.append(number)
    return soup, selected


def fit_weights(
    member_logits: Tensor, labels: Tensor, *, average: Average = "probabilities"
) -> list[float]:
    """Weights of an ensemble's members that minimise the NLL of their weighted average.

        probabilities: min_w -mean_i log sum_m w_m p_m(y_i)
        logits:        min_w -mean_i log softmax(sum_m w_m z_m)(y_i)

    over w >= 0, sum(w) = 1. Both problems are convex, so that the minimum found is the global one.
    The same arguments give the same weights; identical members get equal weights.

    Args:
        member_logits: Logits `[members, rows, classes]` on data that the members were not trained
            on.
        labels: Class indices `[rows]`, int64.
        average: Whether `probabilities` or `logits` are averaged.

    Returns:
        Weights of the members, at least 0, with sum 1; on these rows never worse than equal ones.

    Raises:
        ValueError: Shapes that do not match, logits that are not finite, a label out of range, or
            an unknown average.

    >>> good, poor = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    >>> weights = fit_weights(torch.stack([good, poor]), torch.tensor([0, 1]))
    >>> [round(weight, 6) for weight in weights]
    [1.0, 0.0]
    """
    from scipy.optimize import minimize  # slow to import

    _check_members(member_logits, labels, average)
    log_p = member_logits.detach().double().log_softmax(dim=-1).cpu().numpy()
    make_objective = _probability_nll if average == "probabilities" else _logit_nll
    objective = make_objective(log_p, labels.cpu().numpy())
    uniform = np.full(len(log_p), 1 / len(log_p))
    found = minimize(
        objective,
        uniform,
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * len(log_p),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    weights = found.x.clip(0, 1)
    weights /= weights.sum()
    better = objective(weights)[0] < objective(uniform)[0]
    return [float(weight) for weight in (weights if better else uniform)]


def _probability_nll(
    log_p: Array, labels: NDArray[np.int64]
) -> Callable[[Array], tuple[float, Array]]:
    """Return the NLL of averaged probabilities and its gradient, up to a constant, of weights."""
    label_log_p = log_p[:, np.arange(len(labels)), labels]
    likelihood = np.exp(label_log_p - label_log_p.max(axis=0))

    def objective(weights: Array) -> tuple[float, Array]:
        # without a minimum, a single member whose probability underflows would give log 0
        mixed = np.maximum(weights @ likelihood, np.finfo(np.float64).tiny)
        return float(-np.log(mixed).mean()), -(likelihood / mixed).mean(axis=1)

    return objective


def _logit_nll(log_p: Array, labels: NDArray[np.int64]) -> Callable[[Array], tuple[float, Array]]:
    """Return the NLL of averaged logits and its gradient, of weights.

    A constant shift of a row's logits changes neither, so log-probabilities serve as logits.
    """
    above_label = log_p - np.take_along_axis(log_p, labels[None, :, None], axis=2)

    def objective(weights: Array) -> tuple[float, Array]:
        logits = np.tensordot(weights, above_label, axes=1)
        top = logits.max(axis=1, keepdims=True)
        p = np.exp(logits - top)
        mass = p.sum(axis=1, keepdims=True)
        gradient = np.einsum("mrc,rc->m", above_label, p / mass) / len(labels)
        return float((top + np.log(mass)).mean()), gradient

    return objective


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor.detach()
    return (total / len(tensors)).to(tensors[0].dtype)


def _check_same(first: Mapping[str, Tensor], other: Mapping[str, Tensor], number: int) -> None:
    for name in (*first, *other):
        shapes = [list(state[name].shape) if name in state else None for state in (first, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"states must have the same names and shapes, got {name!r} of {shapes[0]} in "
                f"state 0 and of {shapes[1]} in state {number}: only one architecture averages"
            )


def _check_members(member_logits: Tensor, labels: Tensor, average: str) -> None:
    if average not in get_args(Average):
        raise ValueError(f"average must be 'probabilities' or 'logits', got {average!r}")
    if member_logits.ndim != 3 or not member_logits.numel():
        raise ValueError(
            f"member_logits must be [members, rows, classes], got {list(member_logits.shape)}"
        )
    rows, classes = member_logits.shape[1:]
    if labels.shape != (rows,):
        raise ValueError(f"labels must be [{rows}], one a row, got {list(labels.shape)}")
    if not bool(torch.isfinite(member_logits).all()):
        raise ValueError("member_logits must be finite, got infinity or NaN")
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(
            f"labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}"
        )
