"""The loss of a teacher's largest logits against SciPy, its bias against the full loss, edges."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, logsumexp, softmax
from torch import Tensor

from selfkd.losses import SparseLogits, distillation_terms, sparse_terms, sparsify
from selfkd.losses.distillation import hard_loss
from selfkd.losses.sequences import linear_sequence_terms, sequence_terms
from selfkd.losses.sparse import REST_TEMPERATURES

TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
SHAPES = ((5, 2, 1, None), (4, 7, 3, 1), (4, 7, 3, 3), (2, 1000, 20, 2))  # batch, K, k, members


def make_batch(
    batch: int = 4, classes: int = 7, members: int | None = None, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return student logits that require a gradient, teacher logits and labels; float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, classes) if members is None else (members, batch, classes)
    student = 3 * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    return student.requires_grad_(), teacher, labels


def reference_soft_loss(
    student: Tensor,
    teacher: Tensor,
    k: int,
    *,
    temperature: float,
    weights: np.ndarray,
    spread: bool = False,
) -> float:
    """Return the soft term by the formula from full logits, row by row; k below K.

    The bucket of the teacher's other classes is exact, or that of an evenly `spread` rest.
    """
    z_s, z_t = student.detach().numpy() / temperature, teacher.numpy()
    z_t = z_t.reshape(-1, *z_s.shape)
    batch, classes = z_s.shape
    total = 0.0
    for weight, member in zip(weights, z_t, strict=True):
        for row_s, row_t in zip(z_s, member, strict=True):
            order = np.argsort(-row_t)
            known, others = order[:k], order[k:]
            bucket = logsumexp(row_t[others] / temperature)
            if spread:
                bucket = logsumexp(row_t[others]) / temperature
                bucket += (1 - 1 / temperature) * np.log(classes - k)
            log_t = log_softmax(np.append(row_t[known] / temperature, bucket))
            log_s = np.append(row_s[known], logsumexp(row_s[others])) - logsumexp(row_s)
            total += weight * (np.exp(log_t) * (log_t - log_s)).sum() / batch
    return float(temperature**2 * total)


def without_grid(teacher: Tensor, k: int) -> SparseLogits:
    return sparsify(teacher, k)._replace(rest_grid=None)


def gradient_of(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


def test_sparsify() -> None:
    _, teacher, _ = make_batch(members=2)
    values, indices, rest, grid = sparsify(teacher.requires_grad_(), 3)
    assert grid is not None
    z_t = teacher.detach().numpy()
    order = np.argsort(-z_t, axis=-1)
    np.testing.assert_array_equal(indices, order[..., :3])
    np.testing.assert_array_equal(values, np.take_along_axis(z_t, order, -1)[..., :3])
    others = np.take_along_axis(z_t, order, -1)[..., 3:]
    np.testing.assert_allclose(rest, logsumexp(others, -1))
    for column, temperature in zip(grid.unbind(-1), REST_TEMPERATURES, strict=True):
        np.testing.assert_allclose(column, logsumexp(others / temperature, -1))
    assert not any(tensor.requires_grad for tensor in (values, rest, grid))
    half = sparsify(teacher.half(), 7)
    assert half.values.dtype == half.rest.dtype == torch.float32
    assert (half.rest == -torch.inf).all()
    for k in (0, 8):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 7\].*got {k}"):
            sparsify(teacher, k)


@pytest.mark.filterwarnings("ignore:sparse logits without rest_grid")
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape: tuple[int, int, int, int | None], *, spread: bool) -> None:
    batch, classes, k, members = shape
    student, teacher, labels = make_batch(batch, classes, members)
    even = np.full(members or 1, 1 / (members or 1))
    uneven = np.arange(1, len(even) + 1) / np.arange(1, len(even) + 1).sum()
    for temperature, alpha, weights in itertools.product(
        TEMPERATURES if spread else (1.0, 3.0, 20.0),
        (0.0, 0.3, 1.0),
        (None, uneven) if members else (None,),
    ):
        terms = sparse_terms(
            student, without_grid(teacher, k) if spread else sparsify(teacher, k), labels,
            temperature=temperature, alpha=alpha, label_smoothing=0.1, weights=weights,
        )  # fmt: skip
        hard = F.cross_entropy(student, labels, label_smoothing=0.1).item()
        soft = reference_soft_loss(
            student, teacher, k,
            temperature=temperature, weights=even if weights is None else weights, spread=spread,
        )  # fmt: skip
        expected = [(1 - alpha) * hard + alpha * soft, hard, soft]
        np.testing.assert_allclose([term.item() for term in terms], expected, rtol=1e-10)
        assert [term.requires_grad for term in terms] == [True, False, False]


@pytest.mark.parametrize("members", [None, 3])
def test_gradcheck(members: int | None) -> None:
    student, teacher, labels = make_batch(3, 5, members)
    sparse = sparsify(teacher, 2)

    def loss(logits: Tensor) -> Tensor:
        return sparse_terms(logits, sparse, labels, temperature=3.0, alpha=0.6).loss

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


@pytest.mark.filterwarnings("ignore:the mass of the other classes")
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_with_all_classes_known_it_is_the_full_loss(temperature: float) -> None:
    student, teacher, labels = make_batch()
    settings: dict[str, Any] = {"temperature": temperature, "alpha": 0.6, "label_smoothing": 0.1}
    full = distillation_terms(student, teacher, labels, **settings)
    expected = gradient_of(full.loss, student)
    for k in (7, 6):  # a bucket of one class hides nothing
        sparse = sparse_terms(student, sparsify(teacher, k), labels, **settings)
        torch.testing.assert_close(tuple(sparse), tuple(full))
        torch.testing.assert_close(gradient_of(sparse.loss, student), expected)


@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3]])
def test_members_have_the_gradient_of_their_mean(weights: list[float] | None) -> None:
    """The value is larger by the members' own mean divergence, for any student."""
    student, teacher, labels = make_batch(members=3)
    settings: dict[str, Any] = {"temperature": 3.0, "alpha": 1.0, "weights": weights}
    surplus = []
    for logits in (student, student.detach().roll(1, 0).requires_grad_()):
        full = distillation_terms(logits, teacher, labels, **settings).loss
        sparse = sparse_terms(logits, sparsify(teacher, 7), labels, **settings).loss
        torch.testing.assert_close(gradient_of(sparse, logits), gradient_of(full, logits))
        surplus.append((sparse - full).item())
    assert surplus[0] > 0.1
    assert surplus[0] == pytest.approx(surplus[1])


@pytest.mark.filterwarnings("ignore:sparse logits without rest_grid")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 1e6])
def test_mass_of_the_bucket_without_grid(temperature: float) -> None:
    """The rest is exact at T = 1 and as T -> inf, too large in between, too small below T = 1."""
    _, teacher, _ = make_batch(classes=50)
    values, indices, rest, _ = sparsify(teacher, 5)
    student = torch.zeros(4, 50, dtype=torch.float64, requires_grad=True)
    terms = sparse_terms(
        student, SparseLogits(values, indices, rest), torch.zeros(4, dtype=torch.int64),
        temperature=temperature, alpha=1.0,
    )  # fmt: skip
    # T (p_s - q_t) / batch of each known class
    q_t = 1 / 50 - gradient_of(terms.loss, student).gather(1, indices) * 4 / temperature
    known = softmax(teacher.numpy() / temperature, -1)
    excess = np.take_along_axis(known, indices.numpy(), -1).sum(-1) - q_t.sum(-1).numpy()
    if temperature in (1.0, 1e6):
        np.testing.assert_allclose(excess, 0, atol=1e-6)
    else:
        assert (np.sign(excess) == np.sign(temperature - 1)).all()


# --- the rest of the teacher between the temperatures at which it is known -----------------------


def make_teachers() -> dict[str, tuple[Tensor, int]]:
    """Return logits and k of rests of several kinds, float64."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def zipf(power: float, classes: int) -> Tensor:
        ranks = torch.arange(1, classes + 1, dtype=torch.float64)
        return noise(4, classes) - power * ranks.log()

    padded = 2 * noise(4, 1000)
    padded[:, 800:] -= 1e4
    return {
        "flat": (torch.zeros(1, 1000, dtype=torch.float64), 20),
        "normal": (2 * noise(4, 1000), 20),
        "few": (8 * noise(64, 10), 3),
        "Zipf 1": (zipf(1, 5000), 20),
        "Zipf 2": (zipf(2, 5000), 20),
        "Zipf 3": (zipf(3, 5000), 20),
        "one known": (zipf(1, 1000), 1),
        "padded": (padded, 20),
        "even": (-40 * torch.rand(4, 1000, generator=generator, dtype=torch.float64), 20),
    }


@pytest.mark.parametrize("name", make_teachers())
def test_student_equal_to_the_teacher_has_no_loss(name: str) -> None:
    teacher, k = make_teachers()[name]
    labels = torch.zeros(len(teacher), dtype=torch.int64)
    for shape in (teacher.shape, (2, *teacher.shape)):  # one teacher, and two equal ones
        sparse = sparsify(teacher.expand(shape), k)
        for temperature in (1.0, 1.2, 1.5, 1.8, 2.0, 2.5, 4.0, 5.0, 6.5, 8.0, 12.0, 16.0, 20.0):
            student = teacher.clone().requires_grad_()
            terms = sparse_terms(student, sparse, labels, temperature=temperature, alpha=1.0)
            exact = temperature in (1.0, *REST_TEMPERATURES)
            assert terms.soft_loss.item() == pytest.approx(0, abs=1e-9 if exact else 5e-4)
            # T (p_s - q_t) / batch: the error of a probability
            gradient = gradient_of(terms.loss, student) * len(teacher) / temperature
            assert gradient.abs().max() < (1e-9 if exact else 1.2e-3)


@pytest.mark.parametrize("members", [(), (2,)])
def test_tokens_equal_to_the_teacher_have_no_loss(members: tuple[int, ...]) -> None:
    logits = torch.randn(2, 5, 60, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.eye(60, dtype=torch.float64)
    labels = torch.tensor([[3, -100, 0, 1, 2], [5, 4, -100, -100, 9]])
    sparse = sparsify(logits.expand(*members, 2, 5, 60), 6)
    for temperature, bound in ((1.0, 1e-12), (2.5, 5e-4), (8.0, 1e-12)):
        settings: dict[str, Any] = {"temperature": temperature, "alpha": 0.5}
        student = logits.clone().requires_grad_()
        terms = sequence_terms(student, sparse, labels, **settings)
        head = linear_sequence_terms(student, weight, sparse, labels, **settings)
        assert terms.soft_loss.item() == pytest.approx(0, abs=bound)
        torch.testing.assert_close(tuple(head), tuple(terms))
        torch.testing.assert_close(
            gradient_of(head.loss, student), gradient_of(terms.loss, student)
        )


@pytest.mark.parametrize("temperature", [25.0, 50.0, 200.0, 1e6])
@pytest.mark.parametrize("name", ["flat", "normal", "Zipf 1", "Zipf 2", "Zipf 3"])
def test_rest_above_the_last_temperature(name: str, temperature: float) -> None:
    teacher, k = make_teachers()[name]
    labels = torch.zeros(len(teacher), dtype=torch.int64)
    settings: dict[str, Any] = {"temperature": temperature, "alpha": 1.0}
    assert sparse_terms(teacher, sparsify(teacher, k), labels, **settings).loss < 1e-3


def test_rest_below_1_is_extrapolated_with_a_warning() -> None:
    """The tangent is nearer than an evenly spread rest; a line, as of one class, is exact."""
    teacher, k = make_teachers()["normal"]
    labels = torch.zeros(len(teacher), dtype=torch.int64)
    settings: dict[str, Any] = {"temperature": 0.8, "alpha": 1.0}
    with pytest.warns(UserWarning, match="extrapolated below T = 1"):
        loss = sparse_terms(teacher, sparsify(teacher, k), labels, **settings).loss
    with pytest.warns(UserWarning, match="without rest_grid are exact at T = 1 only"):
        spread = sparse_terms(teacher, without_grid(teacher, k), labels, **settings).loss
    assert loss < 0.2 * spread


@pytest.mark.parametrize("make", [sparsify, without_grid])
def test_what_is_exact_does_not_warn(make: Callable[..., SparseLogits]) -> None:
    student, teacher, labels = make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k, temperature in ((3, 1.0), (7, 3.0)):  # no rest where all are known
            sparse_terms(student, make(teacher, k), labels, temperature=temperature, alpha=0.5)


# --- the bias of the unknown classes -----------------------------------------------------------


def make_peaked_batch(batch: int = 64, classes: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Return a teacher of mean confidence 0.43, with 0.65 in its top 20, and a similar student."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (batch,), generator=generator)
    noise = torch.randn(2, batch, classes, generator=generator, dtype=torch.float64)
    teacher = 1.8 * noise[0] + 8 * F.one_hot(labels, classes)
    return (0.7 * teacher + 1.5 * noise[1]).requires_grad_(), teacher, labels


@pytest.mark.parametrize(
    ("temperature", "bias", "cosine"),
    [(1.0, (-0.35, -0.25), 0.99), (4.0, (-0.97, -0.9), 0.35), (20.0, (-1.0, -0.95), 0.15)],
)
def test_bias_against_full_logits(
    temperature: float, bias: tuple[float, float], cosine: float
) -> None:
    """k = 20 of 1,000: nearly the full gradient at T = 1; at high T most of the mass is unknown."""
    student, teacher, labels = make_peaked_batch()
    settings: dict[str, Any] = {"temperature": temperature, "alpha": 1.0}
    full = distillation_terms(student, teacher, labels, **settings)
    expected = gradient_of(full.loss, student)
    biases, cosines = [], []
    for k in (5, 20, 100, 999):
        sparse = sparse_terms(student, sparsify(teacher, k), labels, **settings)
        gradient = gradient_of(sparse.loss, student)
        biases.append((sparse.soft_loss / full.soft_loss - 1).item())
        cosines.append(F.cosine_similarity(gradient.flatten(), expected.flatten(), 0).item())
    assert bias[0] < biases[1] < bias[1]
    assert cosines[1] > cosine
    assert biases == sorted(biases)
    assert cosines == sorted(cosines)
    assert biases[-1] == pytest.approx(0, abs=1e-12)
    assert cosines[-1] == pytest.approx(1)


# --- precision and edges -----------------------------------------------------------------------


def test_tiny_rest_of_the_student_is_not_lost() -> None:
    """With 1 - p, which is 0 in float32, the logarithm would be infinite."""
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]], requires_grad=True)
    sparse = SparseLogits(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1))
    terms = sparse_terms(student, sparse, torch.tensor([0]), temperature=1.0, alpha=1.0)
    assert terms.soft_loss.item() == pytest.approx(-np.log(2) + 0.5 * (60 - np.log(3)), rel=1e-6)
    torch.testing.assert_close(
        gradient_of(terms.loss, student), torch.tensor([[0.5, -1 / 6, -1 / 6, -1 / 6]])
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_rest_without_mass(temperature: float) -> None:
    student, teacher, labels = make_batch(classes=6)
    labels %= 4
    mask = torch.tensor([0.0] * 4 + [-torch.inf] * 2, dtype=torch.float64)
    settings: dict[str, Any] = {"temperature": temperature, "alpha": 0.6}
    expected = distillation_terms(student[:, :4], teacher[:, :4], labels, **settings).loss
    for logits in (student, (student.detach() + mask).requires_grad_()):
        terms = sparse_terms(logits, sparsify(teacher + mask, 4), labels, **settings)
        assert terms.loss.isfinite()
        assert gradient_of(terms.loss, logits).isfinite().all()
    torch.testing.assert_close(terms.loss, expected)  # the student has no mass there either


def test_weightless_member_may_be_anything() -> None:
    student, teacher, labels = make_batch(members=2)
    sparse = sparsify(teacher, 3)
    sparse.values[1] = torch.nan
    actual = sparse_terms(student, sparse, labels, temperature=2.0, alpha=0.5, weights=[1.0, 0.0])
    expected = sparse_terms(student, sparsify(teacher[0], 3), labels, temperature=2.0, alpha=0.5)
    torch.testing.assert_close(tuple(actual), tuple(expected))
    assert gradient_of(actual.loss, student).isfinite().all()


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher, labels = make_batch(8, 100)
    half = student.detach().bfloat16().requires_grad_()
    sparse = sparsify(teacher, 10)
    sparse = sparse.map(lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)
    wide = sparse.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = sparse_terms(half, sparse, labels, temperature=2.0, alpha=0.5)
    expected = sparse_terms(half.float(), wide, labels, temperature=2.0, alpha=0.5)
    assert actual.loss.dtype == torch.float32
    torch.testing.assert_close(tuple(actual), tuple(expected))
    assert gradient_of(actual.loss, half).dtype == torch.bfloat16


def test_teacher_gets_no_gradient_and_alpha_0_is_the_hard_loss() -> None:
    student, teacher, labels = make_batch()
    sparse = sparsify(teacher, 3)
    sparse.values.requires_grad_()
    terms = sparse_terms(student, sparse, labels, temperature=2.0, alpha=0.5)
    terms.loss.backward()
    assert sparse.values.grad is None
    terms = sparse_terms(student, sparse, labels, temperature=2.0, alpha=0.0)
    torch.testing.assert_close(terms.loss, hard_loss(student, labels), rtol=1e-14, atol=0)


@pytest.mark.parametrize("soft_labels", [False, True])
@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize(("k", "chunk"), [(3, 2**17), (3, 25), (7, 25)])
def test_fused_equals_plain(
    k: int, chunk: int, members: int | None, *, soft_labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradient, with chunks of 3 or of all rows, by either kind of labels."""
    monkeypatch.setattr("selfkd.losses.fused_sparse._CHUNK", chunk)
    student, teacher, labels = make_batch(8, 7, members)
    if soft_labels:
        labels = torch.rand(8, 7, dtype=torch.float64).softmax(-1)
        labels[0] = torch.eye(7)[2]
    sparse = sparsify(teacher, k)
    for temperature, alpha, smoothing in itertools.product((1.0, 3.0), (0.0, 0.4, 1.0), (0.0, 0.2)):
        settings: dict[str, Any] = {
            "temperature": temperature, "alpha": alpha, "label_smoothing": smoothing,
            "weights": None if members is None else [0.5, 0.2, 0.3],
        }  # fmt: skip
        fused = sparse_terms(student, sparse, labels, **settings)
        monkeypatch.setattr("selfkd.losses.sparse.fused_is_faster", lambda logits: False)
        plain = sparse_terms(student, sparse, labels, **settings)
        monkeypatch.undo()
        monkeypatch.setattr("selfkd.losses.fused_sparse._CHUNK", chunk)
        torch.testing.assert_close(tuple(fused), tuple(plain))
        expected = gradient_of(plain.loss, student)
        torch.testing.assert_close(gradient_of(fused.loss, student), expected)


@pytest.mark.parametrize("members", [None, 2])
def test_rows_whose_probabilities_underflow(members: int | None) -> None:
    """In float32, of a bucket, of a known class, or of a class with a logit of -inf."""
    student, teacher, labels = make_batch(6, 7, members)
    sparse, weights = sparsify(teacher, 2), None if members is None else [0.3, 0.7]
    z = student.detach().clone()
    known = sparse.indices.reshape(-1, 6, 2)[0]
    z[1].scatter_(0, known[1], 300.0)
    z[2, known[2, 0]] = -400.0
    z[4, known[4, 0]] = 200.0
    masked = z.clone()
    masked[3, known[3, 0]] = -torch.inf
    settings: dict[str, Any] = {"temperature": 2.0, "alpha": 0.6, "weights": weights}
    for logits in (z, masked):
        wide, narrow = logits.clone().requires_grad_(), logits.float().requires_grad_()
        expected = sparse_terms(wide, sparse, labels, **settings)
        actual = sparse_terms(narrow, sparse, labels, **settings)
        torch.testing.assert_close(tuple(actual), tuple(expected), check_dtype=False)
        torch.testing.assert_close(
            gradient_of(actual.loss, narrow), gradient_of(expected.loss, wide), check_dtype=False
        )


def test_second_backward_and_scale() -> None:
    student, teacher, labels = make_batch(members=2)
    loss = sparse_terms(student, sparsify(teacher, 3), labels, temperature=2.0, alpha=0.5).loss
    first, second = (torch.autograd.grad(f * loss, student, retain_graph=True)[0] for f in (1, 3))
    torch.testing.assert_close(second, 3 * first)


def test_compiles_whole() -> None:
    student, teacher, labels = make_batch(members=3)
    sparse = sparsify(teacher, 3)

    def loss(logits: Tensor, sparse: SparseLogits, labels: Tensor) -> Tensor:
        return sparse_terms(logits, sparse, labels, temperature=2.0, alpha=0.5).loss

    compiled = torch.compile(loss, backend="eager", fullgraph=True)(student, sparse, labels)
    torch.testing.assert_close(compiled, loss(student, sparse, labels))


GOOD = SparseLogits(
    torch.zeros(4, 2), torch.tensor([[0, 1]]).repeat(4, 1), torch.zeros(4), torch.zeros(4, 6)
)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": torch.zeros(3, 2)}, ValueError, r"values \[4, 'k'\].*got \[3, 2\]"),
        ({"values": torch.zeros(4, 4)}, ValueError, r"k in \[1, 3\].*got \[4, 4\]"),
        ({"values": torch.zeros(4, 0)}, ValueError, r"k in \[1, 3\].*got \[4, 0\]"),
        ({"values": torch.zeros(0, 4, 2)}, ValueError, r"values .*got \[0, 4, 2\]"),
        ({"values": torch.zeros(1, 1, 4, 2)}, ValueError, r"values .*got \[1, 1, 4, 2\]"),
        ({"rest": torch.zeros(4, 1)}, ValueError, r"rest \[4\], got \[4, 2\] and \[4, 1\]"),
        ({"indices": GOOD.indices[:, :1]}, ValueError, r"indices \[4, 2\].*got \[4, 1\] and"),
        ({"indices": GOOD.indices + 2}, ValueError, r"indices in \[0, 3\), got 3"),
        ({"indices": GOOD.indices - 1}, ValueError, r"indices in \[0, 3\), got -1"),
        ({"indices": GOOD.indices.int()}, TypeError, r"indices of torch.int64, got torch.int32"),
        ({"values": GOOD.indices}, TypeError, r"floating-point values and rest, got torch.int64"),
        ({"rest_grid": torch.zeros(4, 5)}, ValueError, r"rest_grid \[4, 6\], got \[4, 5\]"),
        ({"rest_grid": torch.zeros(4, 6).int()}, TypeError, r"rest_grid, got torch.int32"),
    ],
)
def test_teachers_that_do_not_fit(
    changes: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(error, match=message):
        sparse_terms(
            torch.zeros(4, 3), GOOD._replace(**changes), labels, temperature=2.0, alpha=0.5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0 and finite"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1\.5"),
        ({"label_smoothing": 2.0}, r"label_smoothing must be in \[0, 1\]"),
        ({"weights": [1.0]}, r"weights must be one for each of the members"),
        ({"labels": torch.tensor([0, 0, 0, 3])}, r"labels must be in \[0, 3\), got 3"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "student_logits": torch.zeros(4, 3), "teacher": GOOD,
        "labels": torch.zeros(4, dtype=torch.int64), "temperature": 2.0, "alpha": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparse_terms(**arguments | changes)


@pytest.mark.parametrize("members", [(), (2,)])
@pytest.mark.parametrize("place", ["values", "rest", "rest_grid"])
def test_nan_of_the_teacher_is_named_by_its_row(place: str, members: tuple[int, ...]) -> None:
    teacher = sparsify(torch.randn(*members, 4, 3), 2)
    if place == "rest":
        teacher.rest[..., 2] = torch.nan
    elif place == "rest_grid":
        assert teacher.rest_grid is not None
        teacher.rest_grid[..., 2, 0] = torch.nan
    else:
        teacher.values[..., 2, 1] = torch.nan
    message = "got nan in row 2" + (" of member 0$" if members else "$")
    student, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        sparse_terms(student, teacher, labels, temperature=2.0, alpha=0.5)


def test_moves_as_a_whole() -> None:
    assert {tensor.device.type for tensor in GOOD.to("meta") if tensor is not None} == {"meta"}
    moved = sparsify(torch.zeros(2, 3), 1).to("meta")
    assert {None if tensor is None else tensor.device.type for tensor in moved} == {"meta"}


# --- wrong versions are rejected ---------------------------------------------------------------

Loss = Callable[..., Tensor]
KNOWN = 3


def right(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """Return the loss of full teacher logits of which the k largest are kept."""
    return sparse_terms(student, without_grid(teacher, KNOWN), labels, **settings).loss


def check_loss(loss: Loss) -> None:
    """Raise AssertionError unless `loss` is that of the teacher's largest logits."""
    for members, weights in ((None, None), (3, None), (3, [0.5, 0.2, 0.3])):
        student, teacher, labels = make_batch(members=members)
        shares = np.array(weights or [1 / (members or 1)] * (members or 1))
        for temperature in (0.5, 4.0):
            hard = F.cross_entropy(student, labels, label_smoothing=0.1).item()
            soft = reference_soft_loss(
                student, teacher.detach(), KNOWN,
                temperature=temperature, weights=shares, spread=True,
            )  # fmt: skip
            settings: dict[str, Any] = {
                "temperature": temperature, "alpha": 0.3, "label_smoothing": 0.1,
                "weights": weights,
            }  # fmt: skip
            value = loss(student, teacher.requires_grad_(), labels, **settings)
            np.testing.assert_allclose(value.item(), 0.7 * hard + 0.3 * soft, rtol=1e-9)
            value.backward()
            assert student.grad is not None
            assert student.grad.isfinite().all()
            assert teacher.grad is None, "the teacher got a gradient"
    sure = torch.tensor([[240.0, 200.0, 160.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)  # float32
    teacher, settings["weights"] = sure.detach() / 80, None
    value = loss(sure, teacher, torch.tensor([0]), **settings)
    soft = reference_soft_loss(
        sure.double(), teacher.double(), KNOWN,
        temperature=temperature, weights=np.ones(1), spread=True,
    )  # fmt: skip
    hard = F.cross_entropy(sure, torch.tensor([0]), label_smoothing=0.1).item()
    np.testing.assert_allclose(value.item(), 0.7 * hard + 0.3 * soft, rtol=1e-5)
    try:
        loss(student, torch.full_like(student, torch.nan), labels, **settings)
    except ValueError:
        return
    raise AssertionError("NaN was accepted")


def naive(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    weights: list[float] | None,
    wrong: str = "",
) -> Tensor:
    """Return the loss in a few lines, with one thing in it `wrong`."""
    if teacher.isnan().any():
        if wrong != "NaN passes":
            raise ValueError
        teacher = teacher.nan_to_num()
    if wrong != "teacher not detached":
        teacher = teacher.detach()
    members = teacher.reshape(-1, *student.shape)
    if weights is None or wrong == "weights of the members ignored":
        weights = [1 / len(members)] * len(members)
    if wrong == "first member only":
        members, weights = members[:1], [1.0]
    if wrong == "logits of the members averaged":
        members, weights = members.mean(0, keepdim=True), [1.0]
    soft = torch.stack(
        [
            share * naive_divergence(student, member, temperature, wrong)
            for share, member in zip(weights, members, strict=True)
        ]
    ).sum()
    soft = soft * temperature ** {"T squared missing": 0, "T once": 1}.get(wrong, 2)
    smoothing = 0.0 if wrong == "smoothing left out" else label_smoothing
    scaled = student / (temperature if wrong == "T on the labels too" else 1)
    hard = F.cross_entropy(scaled, labels, label_smoothing=smoothing)
    if wrong == "weights swapped":
        alpha = 1 - alpha
    return (1 - alpha) * hard + alpha * soft


def naive_divergence(student: Tensor, teacher: Tensor, temperature: float, wrong: str) -> Tensor:
    values, indices = teacher.topk(KNOWN)
    known = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, indices, True)
    t_s = 1.0 if wrong in ("T on the teacher only", "T ignored") else temperature
    t_t = 1.0 if wrong in ("T on the student only", "T ignored") else temperature
    log_p = (student / t_s).log_softmax(-1)
    log_s, z_t = log_p.gather(-1, indices), values / t_t
    rest = teacher.masked_fill(known, -torch.inf).logsumexp(-1, keepdim=True)
    others = student.shape[-1] - (0 if wrong == "spread over all classes" else KNOWN)
    spread = (1 - 1 / t_t) * np.log(others)
    bucket = rest / t_t + (0.0 if wrong == "bucket of one class" else spread)
    if wrong == "bucket not tempered":
        bucket = rest
    rest_s = log_p.masked_fill(known, -torch.inf).logsumexp(-1, keepdim=True)
    if wrong == "1 - p of the student":
        rest_s = (1 - log_s.exp().sum(-1, keepdim=True)).log()
    if wrong == "the student's bucket spread too":
        z_s = student.masked_fill(known, -torch.inf).logsumexp(-1, keepdim=True) / t_s + spread
        log_s = torch.cat([student.gather(-1, indices) / t_s, z_s], -1).log_softmax(-1)
    elif wrong != "bucket dropped from the start":
        log_s = torch.cat([log_s, rest_s], -1)
    if wrong == "the student's own largest":
        log_s = torch.cat([log_p.topk(KNOWN).values, rest_s], -1)
    if wrong == "bucket dropped from the start":  # as if there were no other classes
        log_s, log_t = log_s.log_softmax(-1), z_t.log_softmax(-1)
    else:
        log_t = torch.cat([z_t, bucket], -1).log_softmax(-1)
    if wrong == "bucket dropped":
        log_s, log_t = log_s[:, :-1], log_t[:, :-1]
    if wrong == "p and q swapped":
        log_s, log_t = log_t, log_s
    divergences = log_t.exp() * (log_t - log_s)
    if wrong == "cross-entropy for the divergence":
        divergences = -log_t.exp() * log_s
    if wrong == "mean over classes too":
        return divergences.mean()
    return divergences.sum() if wrong == "sum over the batch" else divergences.sum(-1).mean()


WRONG = (
    "NaN passes",
    "teacher not detached",
    "bucket dropped",
    "bucket dropped from the start",
    "bucket of one class",
    "bucket not tempered",
    "spread over all classes",
    "the student's bucket spread too",
    "the student's own largest",
    "1 - p of the student",
    "first member only",
    "logits of the members averaged",
    "weights of the members ignored",
    "weights swapped",
    "T squared missing",
    "T once",
    "T on the student only",
    "T on the teacher only",
    "T on the labels too",
    "T ignored",
    "p and q swapped",
    "cross-entropy for the divergence",
    "smoothing left out",
    "mean over classes too",
    "sum over the batch",
)


@pytest.mark.filterwarnings("ignore:sparse logits without rest_grid")
@pytest.mark.parametrize("loss", [right, naive])
def test_right_versions_pass_the_check(loss: Loss) -> None:
    check_loss(loss)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_versions_fail_the_check(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_loss(partial(naive, wrong=wrong))
