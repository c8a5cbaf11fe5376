"""Averaged weights, and weights of predictions against a grid and the conditions of a minimum."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from torch import nn

from selfkd.distill.soups import average_weights, fit_weights, greedy_soup


def network(seed, width=4):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    for _ in range(seed + 1):
        net(torch.randn(8, 3))
    return net


def states(count=3):
    return [network(seed).state_dict() for seed in range(count)]


# Averaged weights


def test_a_soup_is_the_mean_of_each_tensor():
    given = states()
    soup = average_weights(given)
    assert list(soup) == list(given[0])
    for name, tensor in soup.items():
        if tensor.is_floating_point():
            mean = np.mean([state[name].double().numpy() for state in given], axis=0)
            np.testing.assert_array_equal(tensor.numpy(), mean.astype(np.float32))
    network(5).load_state_dict(soup)


def test_counters_are_the_first_states():
    given = states()
    assert [int(state["1.num_batches_tracked"]) for state in given] == [1, 2, 3]
    assert int(average_weights(given)["1.num_batches_tracked"]) == 1
    assert average_weights(given)["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_is_taken_in_float64_and_given_back_in_the_dtype(dtype):
    large = torch.finfo(dtype).max / (4 if dtype == torch.float64 else 1)
    soup = average_weights([{"w": torch.tensor([large, 1.0], dtype=dtype)}] * 3)
    assert soup["w"].dtype == dtype
    assert soup["w"].tolist() == torch.tensor([large, 1.0], dtype=dtype).tolist()


def test_a_soup_shares_no_memory_and_has_no_graph():
    parameters = [dict(network(seed).named_parameters()) for seed in range(2)]
    assert not any(tensor.requires_grad for tensor in average_weights(parameters).values())
    given = states(1)
    soup = average_weights(given)
    for name, tensor in soup.items():
        assert torch.equal(tensor, given[0][name])
        assert tensor.data_ptr() != given[0][name].data_ptr()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.ones(2)}, r"got 'b' of \[1\] in state 0 and of None in state 1"),
        (
            {"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(3)},
            r"got 'c' of None in state 0 and of \[3\] in state 1",
        ),
        ({"a": torch.ones(3), "b": torch.ones(2)}, r"got 'a' of \[2\] in state 0 and of \[3\]"),
        ({"a": torch.ones(2), "b": torch.tensor(1.0)}, r"got 'b' of \[1\] in state 0 and of \[\]"),
    ],
)
def test_other_architectures_are_refused_by_the_first_tensor_that_differs(other, message):
    first = {"a": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(ValueError, match=message):
        average_weights([first, other])
    with pytest.raises(ValueError, match="in state 2"):
        average_weights([first, first, other])


def test_no_states_are_refused():
    with pytest.raises(ValueError, match="states must be at least one state dict, got none"):
        average_weights([])
    with pytest.raises(ValueError, match="states must be at least one state dict, got none"):
        greedy_soup([], lambda soup: 0.0)


# Greedy soup


def by_value(score):
    return lambda soup: score(float(soup["w"]))


@pytest.mark.parametrize(
    ("values", "score", "taken", "soup"),
    [
        ([4.0, 0.0, 2.0], lambda w: -abs(w - 2), [0, 1, 2], 2.0),  # 2, then 2: equal is added
        ([1.0, 9.0, 3.0], lambda w: -abs(w - 2), [0, 2], 2.0),  # the left out is not averaged in
        ([2.0, 3.0, 1.0], lambda w: -abs(w - 2), [0], 2.0),
        ([1.0, 1.0], lambda w: 0.5, [0, 1], 1.0),
        ([5.0], lambda w: w, [0], 5.0),
        ([2.0, 4.0, 2.9], lambda w: w if w > 2 else 2.5, [0, 1], 3.0),  # compared with the best
    ],
)
def test_a_state_is_added_where_the_score_does_not_drop(values, score, taken, soup):
    found, members = greedy_soup([{"w": torch.tensor(w)} for w in values], by_value(score))
    assert members == taken
    assert float(found["w"]) == soup


# Weights of predictions


def make_members(members, rows=300, classes=5, scale=2.0, seed=0):
    """Members of different skill and confidence."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    logits = scale * torch.randn(members, rows, classes, generator=generator)
    logits[:, torch.arange(rows), labels] += scale * torch.linspace(1.5, 0.5, members)[:, None]
    return logits * torch.linspace(1.0, 0.6, members)[:, None, None], labels


def reference_nll(weights, member_logits, labels, average):
    log_p = log_softmax(member_logits.double().numpy(), axis=-1)
    with np.errstate(divide="ignore"):
        log_w = np.log(np.asarray(weights, dtype=np.float64))[:, None, None]
    if average == "probabilities":
        log_q = logsumexp(log_p + log_w, axis=0)
    else:
        log_q = log_softmax(np.tensordot(weights, member_logits.double().numpy(), axes=1), axis=-1)
    return -log_q[np.arange(len(labels)), labels.numpy()].mean()


def simplex(members, cells):
    """All weights that are multiples of 1 / cells."""
    if members == 1:
        return [(cells,)]
    return [(i, *rest) for i in range(cells + 1) for rest in simplex(members - 1, cells - i)]


AVERAGES = pytest.mark.parametrize("average", ["probabilities", "logits"])


@AVERAGES
@pytest.mark.parametrize("seed", [0, 1])
def test_two_members_weights_are_those_of_a_grid(average, seed):
    logits, labels = make_members(2, seed=seed)
    grid = np.array(simplex(2, 1000)) / 1000
    best = min(grid, key=lambda weights: reference_nll(weights, logits, labels, average))
    np.testing.assert_allclose(fit_weights(logits, labels, average=average), best, atol=1e-3)


@AVERAGES
def test_three_members_weights_are_those_of_a_grid(average):
    """Compared with a coarse grid, then with a fine one around its best point."""
    logits, labels = make_members(3, rows=100, seed=3)
    cost = lambda weights: reference_nll(weights, logits, labels, average)  # noqa: E731
    coarse = min(np.array(simplex(3, 25)) / 25, key=cost)
    near = np.array(
        [
            (coarse[0] + i / 1000, coarse[1] + j / 1000, coarse[2] - (i + j) / 1000)
            for i in range(-40, 41, 2)
            for j in range(-40, 41, 2)
        ]
    )
    near = near[(near >= 0).all(axis=1)]
    best = min(near, key=cost)
    found = fit_weights(logits, labels, average=average)
    np.testing.assert_allclose(found, best, atol=2e-3)  # the fine grid's cell
    assert cost(np.array(found)) <= cost(best)


@AVERAGES
@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("members", [2, 5, 12])
def test_weights_are_a_minimum_on_the_simplex(members, scale, average):
    """By convexity it is enough that no step to a corner lowers the NLL."""
    logits, labels = make_members(members, scale=scale, seed=members)
    weights = np.array(fit_weights(logits, labels, average=average))
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    cost = reference_nll(weights, logits, labels, average)
    uniform = reference_nll(np.full(members, 1 / members), logits, labels, average)
    assert cost <= uniform
    for corner in np.eye(members):
        step = 1e-4 * (corner - weights)
        assert reference_nll(weights + step, logits, labels, average) >= cost * (1 - 1e-9) - 1e-9


@AVERAGES
def test_never_worse_than_equal_weights_where_those_are_best(average):
    logits, labels = make_members(1, rows=50)
    mirrored = torch.stack([logits[0], logits[0].flip(1)])
    symmetric = torch.cat([mirrored, mirrored.flip(0)], dim=1), torch.cat([labels, labels])
    np.testing.assert_allclose(fit_weights(*symmetric, average=average), [0.5, 0.5], atol=1e-6)


@AVERAGES
def test_edges(average):
    logits, labels = make_members(3)
    assert fit_weights(logits[:1], labels, average=average) == [1.0]
    same = logits[:1].expand(3, -1, -1)
    assert fit_weights(same, labels, average=average) == pytest.approx([1 / 3] * 3)
    again = [fit_weights(logits, labels, average=average) for _ in range(2)]
    assert again[0] == again[1]
    shifted = logits + torch.randn(3, 300, 1)
    np.testing.assert_allclose(fit_weights(shifted, labels, average=average), again[0], atol=1e-4)


@AVERAGES
def test_a_useless_member_gets_nothing(average):
    logits, labels = make_members(1)
    wrong = logits[0].roll(1, dims=1)
    weights = fit_weights(torch.stack([wrong, logits[0] * 0.7]), labels, average=average)
    assert weights == pytest.approx([0, 1], abs=0.05)


def test_half_precision_is_fitted_in_float64():
    logits, labels = make_members(3)
    assert fit_weights(logits.half(), labels) == fit_weights(logits.half().double(), labels)


@pytest.mark.parametrize(
    ("logits", "labels", "average", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2).long(), "logits", r"\[members, rows, classes\], got"),
        (torch.zeros(0, 2, 3), torch.zeros(2).long(), "logits", "member_logits must be"),
        (torch.zeros(2, 4, 3), torch.zeros(3).long(), "logits", r"labels must be \[4\], one a row"),
        (torch.zeros(1, 1, 3), torch.tensor([3]), "logits", r"labels must be in \[0, 3\), got 3"),
        (torch.zeros(1, 1, 3), torch.tensor([-1]), "logits", r"labels must be in \[0, 3\), got -1"),
        (torch.zeros(1, 1, 3), torch.tensor([0]), "mean", "average must be 'prob.*got 'mean'"),
        (torch.full((1, 1, 3), np.nan), torch.tensor([0]), "logits", "must be finite"),
        (torch.full((1, 1, 3), -np.inf), torch.tensor([0]), "logits", "must be finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(logits, labels, average, message):
    with pytest.raises(ValueError, match=message):
        fit_weights(logits, labels, average=average)
