"""Specialists: clusters, coarse answers, their data, and equation 5 against SciPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from predictions import predict
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax
from torch import nn

from selfkd.analysis import metrics
from selfkd.data import Data, Split
from selfkd.distill.distiller import Distiller
from selfkd.tasks.images.specialists import (
    Specialist,
    _without_singletons,
    cluster_classes,
    combine,
    relabel,
    specialist_split,
)
from selfkd.training.fit import Training, fit

# Clusters


def grouped_predictions(classes=20, groups=5, seed=0, scale=2.0):
    """Class c is confused with those of the same c % groups."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=2000)
    logits = rng.normal(size=(2000, classes))
    logits[np.arange(2000), labels] += scale
    logits[(np.arange(classes) % groups)[None] == labels[:, None] % groups] += scale
    return torch.tensor(softmax(logits, axis=1))


@pytest.mark.parametrize("seed", range(4))
def test_classes_confused_with_each_other_are_clustered(seed):
    found = cluster_classes(grouped_predictions(seed=seed), clusters=5, seed=seed)
    assert found == [tuple(range(group, 20, 5)) for group in range(5)]


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("clusters", [3, 5, 10])
def test_clusters_are_a_partition_without_lone_classes(clusters, scale):
    probabilities = grouped_predictions(scale=scale).float()
    found = cluster_classes(probabilities, clusters=clusters, seed=1)
    assert 2 <= len(found) <= clusters
    assert all(len(members) >= 2 and list(members) == sorted(members) for members in found)
    assert sorted(sum(found, ())) == list(range(20))
    assert found == sorted(found)
    assert found == cluster_classes(probabilities, clusters=clusters, seed=1)


@pytest.mark.parametrize(
    ("clusters", "merged"),
    [
        ([[0, 1], [2, 3], [4]], [[0, 1], [2, 3, 4]]),  # the nearest
        ([[0, 1], [2, 3], [4], [5]], [[0, 1], [2, 3], [5, 4]]),  # another lone one
        ([[0], [1, 2, 3]], [[1, 2, 3, 0]]),
        ([[0, 1], [2, 3]], [[0, 1], [2, 3]]),
    ],
)
def test_a_lone_class_joins_the_nearest_cluster(clusters, merged):
    points = np.array([[0.0, 0], [0, 1], [10, 0], [10, 1], [7, 0], [6.5, 0]])
    assert _without_singletons(clusters, points) == merged


def test_among_lone_classes_the_less_spread_merger_is_chosen():
    """Confident classes stand at right angles; the two that are confused a little go together."""
    points = np.eye(8)
    points[6, 7] = points[7, 6] = 0.2
    merged = _without_singletons([[0, 1, 2, 3, 4, 5], [6], [7]], points)
    assert merged == [[0, 1, 2, 3, 4, 5], [7, 6]]


@pytest.mark.parametrize(
    ("probabilities", "clusters", "message"),
    [
        (grouped_predictions(), 1, r"clusters must be in \[2, 10\], got 1"),
        (grouped_predictions(), 11, r"clusters must be in \[2, 10\], got 11"),
        (torch.randn(9, 8), 2, "probabilities must be rows that sum to 1, got sums"),
        (torch.full((9, 8), math.nan), 2, "probabilities must be rows that sum to 1"),
        (torch.full((8,), 1 / 8), 2, r"\[rows, classes\] of at least two rows, got \[8\]"),
        (torch.full((1, 8), 1 / 8), 2, r"at least two rows, got \[1, 8\]"),
    ],
)
def test_what_cannot_be_clustered_is_refused(probabilities, clusters, message):
    with pytest.raises(ValueError, match=message):
        cluster_classes(probabilities, clusters=clusters, seed=0)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_generalist_that_says_always_the_same_has_no_clusters():
    with pytest.raises(ValueError, match="must fall into two clusters or more, got one of all 8"):
        cluster_classes(torch.full((9, 8), 1 / 8), clusters=4, seed=0)


# The network


def test_a_specialist_starts_with_the_generalists_answers():
    torch.manual_seed(0)
    network, inputs = nn.Linear(4, 7), torch.randn(5, 4)
    specialist = Specialist(network, (5, 0, 2))
    p = softmax(network(inputs).detach().double().numpy(), axis=1)
    expected = np.concatenate([p[:, [5, 0, 2]], p[:, [1, 3, 4, 6]].sum(1, keepdims=True)], axis=1)
    np.testing.assert_allclose(specialist(inputs).softmax(1).detach(), expected, atol=1e-6)
    z = network(inputs).detach().double().numpy()
    dustbin = logsumexp(z[:, [1, 3, 4, 6]], axis=1)
    np.testing.assert_allclose(specialist(inputs)[:, -1].detach(), dustbin, rtol=1e-5)


def test_its_state_is_the_networks():
    network = nn.Linear(4, 7)
    specialist = Specialist(network, (1, 2))
    assert set(specialist.state_dict()) == {"network.weight", "network.bias"}
    nn.Linear(4, 7).load_state_dict(specialist.network.state_dict())
    assert specialist.network is network


def test_its_gradient_is_that_of_the_coarse_distribution():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    specialist = Specialist(nn.Identity(), (4, 1))
    assert torch.autograd.gradcheck(specialist, (logits,))
    F.cross_entropy(specialist(logits), torch.tensor([2, 2, 2])).backward()
    assert (logits.grad[:, [4, 1]] > 0).all()
    assert (logits.grad[:, [0, 2, 3, 5]] < 0).all()


def test_half_precision_and_large_logits_are_summed_in_float32():
    logits = torch.full((1, 1000), 6e4, dtype=torch.float16)
    answer = Specialist(nn.Identity(), (0, 1))(logits)
    assert answer.dtype == torch.float32
    assert float(answer[0, -1]) == pytest.approx(float(logits[0, 0]) + math.log(998))


@pytest.mark.parametrize("classes", [(), (1,), (1, 1), (-1, 2)])
def test_classes_that_are_not_two_different_ones_are_refused(classes):
    split = Split(torch.zeros(3, 1, 1, 1), torch.arange(3))
    for use in (
        lambda: Specialist(nn.Identity(), classes),
        lambda: relabel(split, classes),
        lambda: specialist_split(split, classes, seed=0),
    ):
        with pytest.raises(ValueError, match="classes must be two or more different ones, got"):
            use()


@pytest.mark.parametrize("classes", [(0, 4), (0, 1, 2, 3)])
def test_classes_that_leave_no_rest_or_are_not_there_are_refused(classes):
    with pytest.raises(ValueError, match="classes must be some, not all, of the 4 classes"):
        Specialist(nn.Identity(), classes)(torch.zeros(1, 4))


# Its data


def numbered_split(counts):
    """Image i is i."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return Split(torch.arange(len(labels))[:, None, None, None], labels)


def test_half_are_its_classes_and_half_drawn_from_the_others():
    split = numbered_split([10, 20, 30, 40, 50])
    some, shift = specialist_split(split, (3, 1), seed=0)
    images = some.images.flatten()
    original = split.labels[images]
    assert len(some) == 120
    assert sorted(images[:60].tolist()) == [*range(10, 30), *range(60, 100)]
    assert some.labels[original == 3].unique().tolist() == [0]
    assert some.labels[original == 1].unique().tolist() == [1]
    rest = images[some.labels == 2]
    assert len(rest.unique()) == 60
    assert set(split.labels[rest].tolist()) == {0, 2, 4}
    assert shift == pytest.approx(math.log(90 / 60))
    again, other = (specialist_split(split, (3, 1), seed=seed)[0].images for seed in (0, 1))
    assert torch.equal(again, some.images)
    assert not torch.equal(other, some.images)


def test_too_few_others_are_each_there_as_often():
    some, shift = specialist_split(numbered_split([10, 13, 5]), (0, 1), seed=0)
    assert (some.labels == 2).sum() == 23
    counts = some.images.flatten().bincount()[23:]
    assert sorted(counts.tolist()) == [4, 4, 5, 5, 5]
    assert shift == pytest.approx(math.log(5 / 23))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    specialist_split(numbered_split([9, 9, 9]), (0, 1), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_relabel_keeps_all_rows():
    split = numbered_split([1, 2, 1, 1])
    coarse = relabel(split, (3, 0))
    assert coarse.labels.tolist() == [1, 2, 2, 2, 0]
    assert coarse.images is split.images
    assert split.labels.tolist() == [0, 1, 1, 2, 3]


@pytest.mark.parametrize(("counts", "got"), [([5, 5], "10 and 0"), ([0, 0, 5], "0 and 5")])
def test_a_split_without_one_side_is_refused(counts, got):
    with pytest.raises(ValueError, match=f"split must have images of classes .* got {got}"):
        specialist_split(numbered_split(counts), (0, 1), seed=0)


@pytest.mark.parametrize("counts", [[4000, 6000, 50000, 20000], [30000, 20000, 5000, 5000]])
def test_the_shift_restores_the_true_frequencies(counts):
    """A perfect specialist: the frequencies, in its own training data, of what it sees."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    seen = torch.multinomial(
        torch.tensor([[5.0, 3, 1, 1], [1, 5, 3, 1], [1, 2, 5, 3], [2, 1, 2, 5]])[labels],
        1,
        generator=generator,
    )[:, 0]
    split = Split(seen[:, None, None, None], labels)
    some, shift = specialist_split(split, (1, 0), seed=0)

    def frequencies(split):
        table = torch.zeros(4, 3, dtype=torch.float64)
        table.index_put_(
            (split.images.flatten(), split.labels), torch.tensor(1.0).double(), accumulate=True
        )
        return table / table.sum(dim=1, keepdim=True)

    logits = frequencies(some).log()
    logits[:, -1] += shift
    truth = frequencies(relabel(split, (1, 0)))
    torch.testing.assert_close(logits.softmax(1), truth, atol=0.015, rtol=0)
    assert (frequencies(some) - truth).abs().max() > 0.1


# Equation 5


def reference_objective(q, p_g, active):
    """KL(p_g || q) + sum KL(p_m || q), of one row; active: (classes, p_m) pairs."""
    value = (p_g * np.log(p_g / q)).sum()
    for classes, p_m in active:
        coarse = np.append(q[list(classes)], np.delete(q, classes).sum())
        value += (p_m * np.log(p_m / coarse)).sum()
    return value


def reference_combine(generalist_logits, specialists):
    rows = []
    for i, logits in enumerate(generalist_logits):
        p_g = softmax(logits)
        active = [(c, softmax(z[i])) for c, z in specialists if logits.argmax() in c]

        def cost(z, p_g=p_g, active=active):
            return reference_objective(softmax(z), p_g, active)

        found = minimize(cost, logits, method="BFGS", options={"gtol": 1e-9})
        rows.append(softmax(found.x))
    return np.array(rows)


def make_problem(sets, classes=7, rows=6, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    generalist = scale * rng.normal(size=(rows, classes))
    return generalist, [(s, scale * rng.normal(size=(rows, len(s) + 1))) for s in sets]


def tensors(generalist, specialists):
    return torch.tensor(generalist), [(s, torch.tensor(z)) for s, z in specialists]


DISJOINT = [(0, 1, 2), (3, 4), (6, 5)]


@pytest.mark.parametrize("sets", [DISJOINT, DISJOINT[:2]])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_combination_minimises_equation_5(sets, seed):
    problem = make_problem(sets, seed=seed)
    q = combine(*tensors(*problem)).exp()
    np.testing.assert_allclose(q, reference_combine(*problem), atol=1e-6)
    np.testing.assert_allclose(q.sum(dim=1), 1, atol=1e-12)


def test_it_is_the_mean_of_both_with_the_dustbin_shared():
    """q_S = (p_g + p_m) / 2 within, the rest as the generalist has it."""
    generalist, specialists = make_problem(DISJOINT, rows=50, scale=8.0)
    q = combine(*tensors(generalist, specialists)).exp().numpy()
    for i, p_g in enumerate(softmax(generalist, axis=1)):
        ((classes, z),) = [(s, z) for s, z in specialists if p_g.argmax() in s]
        p_m = softmax(z[i])
        rest = np.delete(np.arange(7), classes)
        expected = np.empty(7)
        expected[list(classes)] = (p_g[list(classes)] + p_m[:-1]) / 2
        expected[rest] = p_g[rest] * (1 + p_m[-1] / p_g[rest].sum()) / 2
        np.testing.assert_allclose(q[i], expected, atol=1e-12)


def test_a_specialist_that_agrees_changes_nothing():
    generalist = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    specialists = [(s, Specialist(nn.Identity(), s)(generalist)) for s in DISJOINT]
    q = combine(generalist, specialists)
    torch.testing.assert_close(q, generalist.log_softmax(1))


def test_rows_that_concern_no_specialist_keep_the_generalists_answer():
    generalist = torch.tensor([[9.0, 0, 0, 0, -800], [0.0, 0, 0, 9, -800]], dtype=torch.float64)
    q = combine(generalist, [((0, 1), torch.zeros(2, 3))])
    assert torch.equal(q[1], generalist.log_softmax(1)[1])
    assert not torch.allclose(q[0], generalist.log_softmax(1)[0])
    assert torch.isfinite(q).all()
    assert torch.equal(combine(generalist, []), generalist.log_softmax(1))


def test_the_generalists_first_class_decides_which_specialist_is_active():
    generalist = torch.tensor([[3.0, 2, 1, 0, -1], [2.0, 3, 1, 0, -1]])
    q = combine(generalist, [((1, 4), torch.tensor([[4.0, 0, 0]] * 2))])
    unchanged = generalist.log_softmax(1)
    torch.testing.assert_close(q[0], unchanged[0])
    assert q[1, 1] > unchanged[1, 1]


def test_rows_do_not_depend_on_each_other_and_saturation_is_finite():
    generalist, specialists = tensors(*make_problem(DISJOINT, rows=8, scale=300.0))
    q = combine(generalist, specialists)
    assert torch.isfinite(q).all()
    for i in range(8):
        one = [(s, z[i : i + 1]) for s, z in specialists]
        alone = combine(generalist[i : i + 1], one)
        torch.testing.assert_close(q[i : i + 1].exp(), alone.exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_answer_is_float32_or_wider_and_has_no_graph(dtype):
    generalist = torch.randn(2, 4).to(dtype).requires_grad_()
    q = combine(generalist, [((0, 1), torch.zeros(2, 3, dtype=dtype))])
    assert q.dtype == torch.float32
    assert not q.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generalist_logits": torch.zeros(4)}, r"generalist_logits must be \[rows, classes\]"),
        (
            {"specialists": [((0, 1), torch.zeros(2, 3)), ((2, 1), torch.zeros(2, 3))]},
            "specialists must have disjoint classes, got 1 in two",
        ),
        ({"specialists": [((0, 1), torch.zeros(2, 2))]}, r"must be \[2, 3\], the dustbin last"),
        ({"specialists": [((0, 1), torch.zeros(1, 3))]}, r"must be \[2, 3\], .* got \[1, 3\]"),
        ({"specialists": [((0, 4), torch.zeros(2, 3))]}, r"some, not all, of the 4 .* \(0, 4\)"),
        ({"specialists": [((0, 1, 2, 3), torch.zeros(2, 5))]}, "some, not all, of the 4 classes"),
        ({"specialists": [((1, 1), torch.zeros(2, 3))]}, "two or more different ones"),
    ],
)
def test_what_cannot_be_combined_is_refused(changes, message):
    arguments = {"generalist_logits": torch.zeros(2, 4), "specialists": []} | changes
    with pytest.raises(ValueError, match=message):
        combine(**arguments)


# All of it

CLASSES, GROUPS = 20, 5


def make_data(seed):
    """Five groups far apart, each of four classes that lie close together."""
    generator = torch.Generator().manual_seed(seed)
    group = 1.5 * torch.randn(GROUPS, 16, generator=generator)
    centre = group.repeat(CLASSES // GROUPS, 1) + 0.6 * torch.randn(
        CLASSES, 16, generator=generator
    )

    def make_split(rows):
        labels = torch.arange(rows) % CLASSES
        points = centre[labels] + 0.6 * torch.randn(rows, 16, generator=generator)
        return Split((points * 25 + 128).clamp(0, 255).byte().view(rows, 1, 4, 4), labels)

    names = tuple(map(str, range(CLASSES)))
    splits = (make_split(2000), make_split(500), make_split(2000))
    return Data("groups", *splits, names, 4, (0.5,), (0.1,), "0")


def train(model, data, epochs, lr):
    training = Training(
        student=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=lr),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in fit(training, data, Distiller(alpha=0.0), epochs=epochs, batch_size=100):
        pass


def make_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, CLASSES))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_specialists_help_an_undertrained_generalist(seed):
    torch.manual_seed(seed)
    data = make_data(seed)
    generalist = make_network()
    train(generalist, data, epochs=3, lr=3e-3)
    predictions = predict(generalist, data, "val").softmax(1)
    clusters = cluster_classes(predictions, clusters=GROUPS, seed=seed)
    assert len(clusters) >= 3
    specialists = []
    for classes in clusters:
        network = make_network()
        network.load_state_dict(generalist.state_dict())
        specialist = Specialist(network, classes)
        some, shift = specialist_split(data.train, classes, seed=seed)
        coarse = Data(
            "some",
            some,
            relabel(data.val, classes),
            relabel(data.test, classes),
            (*map(str, classes), "rest"),
            *(data.image_size, data.mean, data.std, data.fingerprint),
        )
        train(specialist, coarse, epochs=4, lr=3e-3)
        logits = predict(specialist, coarse, "test")
        logits[:, -1] += shift
        specialists.append((classes, logits))
    before = predict(generalist, data, "test")
    after = combine(before, specialists)
    labels = data.test.labels
    assert metrics.nll(after, labels) < metrics.nll(before, labels) - 0.05
    assert metrics.accuracy(after, labels) > metrics.accuracy(before, labels)
    np.testing.assert_allclose(log_softmax(after.numpy(), axis=1), after.numpy(), atol=1e-4)
