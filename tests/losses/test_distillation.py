"""The distillation loss against SciPy in float64, its limits, edges and wrong versions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, logsumexp, softmax
from torch import Tensor

from selfkd.losses import DistillationTerms, distillation_loss, distillation_terms, soft_targets
from selfkd.losses import fused as fused_module
from selfkd.losses.distillation import hard_loss, plain_terms
from selfkd.losses.fused import fused_terms
from selfkd.losses.sparse import sparse_terms, sparsify

Loss = Callable[..., Tensor]
TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
ALPHAS = (0.0, 0.3, 1.0)
SHAPES = ((5, 2, None), (3, 10, 1), (4, 7, 3), (2, 1000, 2))  # batch, classes, members


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


def reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    average: str = "probabilities",
    label_smoothing: float = 0.0,
) -> tuple[float, float, float, np.ndarray]:
    """Return loss, its two terms and the gradient by the formula."""
    z_s, z_t = student.detach().double().numpy(), teacher.detach().double().numpy()
    z_t = z_t if z_t.ndim == 3 else z_t[None]
    batch, classes = z_s.shape
    one_hot = np.eye(classes)[labels.numpy()]
    y = (1 - label_smoothing) * one_hot + label_smoothing / classes
    if average == "logits":
        z_t = z_t.mean(0, keepdims=True)
    log_p_t = logsumexp(log_softmax(z_t / temperature, axis=-1), axis=0) - np.log(len(z_t))
    log_p_s = log_softmax(z_s / temperature, axis=-1)
    p_t, p_s = np.exp(log_p_t), np.exp(log_p_s)
    hard = -(y * log_softmax(z_s, axis=-1)).sum(-1).mean()
    soft = temperature**2 * (p_t * (log_p_t - log_p_s)).sum(-1).mean()
    gradient = (1 - alpha) * (softmax(z_s, axis=-1) - y) + alpha * temperature * (p_s - p_t)
    return (1 - alpha) * hard + alpha * soft, hard, soft, gradient / batch


def sparse(student: Tensor, teacher: Tensor, *args: Any, **settings: Any) -> DistillationTerms:
    return sparse_terms(student, sparsify(teacher, 3), *args, **settings)


def gradient_of(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


def cases() -> Iterator[dict[str, Any]]:
    for temperature, alpha, average in itertools.product(
        TEMPERATURES, ALPHAS, ("probabilities", "logits")
    ):
        yield {"temperature": temperature, "alpha": alpha, "average": average}


# --- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("terms_of", [distillation_terms, fused_terms, plain_terms])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_in_float64(
    terms_of: Callable[..., tuple[Tensor, ...]],
    label_smoothing: float,
    shape: tuple[int, int, int | None],
) -> None:
    student, teacher, labels = make_batch(*shape)
    for case in cases():
        case["label_smoothing"] = label_smoothing
        terms = terms_of(student, teacher, labels, **case)
        *expected, gradient = reference(student, teacher, labels, **case)
        actual = [term.item() for term in terms]
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-11, err_msg=str(case))
        np.testing.assert_allclose(
            gradient_of(terms[0], student), gradient, rtol=0, atol=1e-12, err_msg=str(case)
        )


# --- soft labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("terms_of", [distillation_terms, fused_terms, plain_terms])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("chunk", [8, 10**6])
def test_soft_labels_are_those_of_cross_entropy(
    terms_of: Callable[..., tuple[Tensor, ...]],
    label_smoothing: float,
    alpha: float,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("selfkd.losses.fused._CHUNK", chunk)
    student, teacher, labels = make_batch(members=2)
    y = F.softmax(torch.randn(4, 7, dtype=torch.float64), dim=-1)
    y[0] = F.one_hot(labels[0], 7)
    y[1] *= 1 + 5e-4  # within the tolerance
    case = {"temperature": 3.0, "alpha": alpha, "label_smoothing": label_smoothing}
    case |= {} if terms_of is distillation_terms else {"average": "probabilities"}
    loss, hard, soft = terms_of(student, teacher, y, **case)
    expected = F.cross_entropy(student, y, label_smoothing=label_smoothing)
    of_indices = plain_terms(student, teacher, labels, **{"average": "probabilities"} | case)
    torch.testing.assert_close(hard, expected.detach())
    torch.testing.assert_close(soft, of_indices[2])
    soft_loss = distillation_loss(student, teacher, labels, temperature=3.0, alpha=1.0)
    whole = (1 - alpha) * expected + alpha * soft_loss
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(whole, student))


def test_one_hot_labels_are_the_indices() -> None:
    student, teacher, labels = make_batch()
    y = F.one_hot(labels, 7).to(torch.bfloat16)
    for settings in ({"alpha": 0.0}, {"alpha": 0.4, "label_smoothing": 0.2}, {"alpha": 1.0}):
        terms = distillation_terms(student, teacher, y, temperature=2.0, **settings)
        expected = distillation_terms(student, teacher, labels, temperature=2.0, **settings)
        torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(hard_loss(student, y), F.cross_entropy(student, labels))


def test_soft_labels_can_be_differentiated_twice_and_get_no_gradient() -> None:
    student, teacher, _ = make_batch(3, 4)
    y = F.softmax(torch.randn(3, 4, dtype=torch.float64), dim=-1).requires_grad_()
    loss = partial(distillation_loss, temperature=2.0, alpha=0.4)
    torch.autograd.gradcheck(lambda z: loss(z, teacher, y.detach()), student)
    torch.autograd.gradgradcheck(lambda z: loss(z, teacher, y.detach()), student)
    loss(student, teacher, y).backward()
    hard_loss(student, y).backward()
    assert y.grad is None


@pytest.mark.parametrize("terms_of", [fused_terms, plain_terms])
def test_a_class_without_mass_may_be_masked_out(terms_of: Callable[..., Any]) -> None:
    student = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    y = torch.tensor([[0.25, 0.75, 0.0]])
    settings = {"temperature": 1.0, "alpha": 0.5, "average": "probabilities"}
    loss, hard, _ = terms_of(student, student.detach(), y, **settings, label_smoothing=0.0)
    torch.testing.assert_close(hard, F.cross_entropy(student[:, :2], y[:, :2]).detach())
    assert gradient_of(loss, student).isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda y: y * 1.1, ValueError, r"be probabilities of sum 1, got a sum of 1.1 in row 0"),
        (lambda y: y + torch.eye(4, 7), ValueError, r"of sum 1, got a sum of 2 in row 0"),
        (lambda y: y * torch.nan, ValueError, r"of sum 1, got a sum of nan in row 0"),
        (
            lambda y: y + torch.tensor([-1.0, 1, 0, 0, 0, 0, 0]),
            ValueError,
            r"probabilities >= 0, got -0.8571 in row 0",
        ),
        (lambda y: y[:, :5], ValueError, r"\[4\], one a row, or prob.* \[4, 7\], got \[4, 5\]"),
        (lambda y: y.long(), TypeError, r"labels \[4, 7\] must be floating-point .*torch.int64"),
    ],
)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_labels_that_are_no_probabilities(
    change: Callable[[Tensor], Tensor], error: type[Exception], message: str, with_gradient: bool
) -> None:
    student, teacher, _ = make_batch()
    student = student.detach().requires_grad_(with_gradient)
    y = change(torch.full((4, 7), 1 / 7))
    with pytest.raises(error, match=message):
        distillation_terms(student, teacher, y, temperature=2.0, alpha=0.5)
    with pytest.raises(error, match=message):
        hard_loss(student, y)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("members", [None, 3])
def test_float32_equals_reference(temperature: float, members: int | None) -> None:
    student, teacher, labels = make_batch(16, 1000, members)
    student = student.detach().float().requires_grad_()
    teacher = teacher.float()
    settings = {"temperature": temperature, "alpha": 0.5}
    terms = distillation_terms(student, teacher, labels, **settings)
    *expected, gradient = reference(student, teacher, labels, **settings)
    assert all(term.dtype == torch.float32 for term in terms)
    np.testing.assert_allclose([term.item() for term in terms], expected, rtol=1e-6)
    atol = 1e-6 * np.abs(gradient).max()
    np.testing.assert_allclose(gradient_of(terms.loss, student), gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_gradcheck(shape: tuple[int, int, int | None], average: str) -> None:
    student, teacher, labels = make_batch(*shape)
    for temperature, alpha in itertools.product(TEMPERATURES, ALPHAS):

        def loss(logits: Tensor, temperature: float = temperature, alpha: float = alpha) -> Tensor:
            return distillation_loss(
                logits, teacher, labels, temperature=temperature, alpha=alpha, average=average
            )

        assert torch.autograd.gradcheck(loss, student)
        assert torch.autograd.gradgradcheck(loss, student)


@pytest.mark.parametrize("members", [None, 4])
@pytest.mark.parametrize("chunk", [1, 20, 21, 35, 75, 10**6])
def test_any_chunk_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, chunk: int, members: int | None
) -> None:
    student, teacher, labels = make_batch(5, 7, members)
    settings = {"temperature": 3.0, "alpha": 0.6}
    expected = distillation_terms(student, teacher, labels, **settings)
    monkeypatch.setattr(fused_module, "_CHUNK", chunk / torch.get_num_threads())
    actual = distillation_terms(student, teacher, labels, **settings)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(
        gradient_of(actual.loss, student), gradient_of(expected.loss, student)
    )


def test_backward_twice_and_of_a_scaled_loss() -> None:
    student, teacher, labels = make_batch()
    *_, expected = reference(student, teacher, labels, temperature=2.0, alpha=0.5)
    loss = distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5)
    (first,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    np.testing.assert_allclose(first, 3 * expected)
    first.zero_()  # the caller may write to its gradient
    loss.backward(retain_graph=True)
    loss.backward()
    np.testing.assert_allclose(student.grad, 2 * expected)


def test_layout_of_the_logits_does_not_matter() -> None:
    student, teacher, labels = make_batch(4, 6, 3)
    expected = distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5)
    strided = student.detach().t().contiguous().t().requires_grad_()
    loss = distillation_loss(
        strided, teacher.permute(2, 0, 1).contiguous().permute(1, 2, 0), labels,
        temperature=2.0, alpha=0.5,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, strided), gradient_of(expected, student))


# --- weights of the members --------------------------------------------------------------------

WEIGHTS = (0.5, 0.2, 0.3)


def weighted_targets(
    teacher: Tensor, weights: Sequence[float], temperature: float, average: str
) -> np.ndarray:
    z_t, w = teacher.double().numpy() / temperature, np.array(weights)[:, None, None]
    if average == "logits":
        return softmax((w * z_t).sum(0), axis=-1)
    return (w * softmax(z_t, axis=-1)).sum(0)


@pytest.mark.parametrize("terms_of", [distillation_terms, fused_terms, plain_terms])
@pytest.mark.parametrize("chunk", [8, 10**6])
def test_weighted_members_equal_reference(
    monkeypatch: pytest.MonkeyPatch, terms_of: Callable[..., tuple[Tensor, ...]], chunk: int
) -> None:
    monkeypatch.setattr(fused_module, "_CHUNK", chunk / torch.get_num_threads())
    student, teacher, labels = make_batch(4, 7, 3)
    for case in cases():
        p_t = weighted_targets(teacher, WEIGHTS, case["temperature"], case["average"])
        # a single teacher with these soft targets
        merged = torch.from_numpy(np.log(p_t) * case["temperature"])
        *expected, gradient = reference(student, merged, labels, **case)
        terms = terms_of(student, teacher, labels, **case, label_smoothing=0.0, weights=WEIGHTS)
        actual = [term.item() for term in terms]
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-11, err_msg=str(case))
        np.testing.assert_allclose(
            gradient_of(terms[0], student), gradient, rtol=0, atol=1e-12, err_msg=str(case)
        )
        targets = soft_targets(
            teacher, temperature=case["temperature"], average=case["average"], weights=WEIGHTS
        )
        np.testing.assert_allclose(targets, p_t, rtol=1e-12)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_weighted_gradient_can_be_differentiated(average: str) -> None:
    student, teacher, labels = make_batch(3, 4, 3)
    loss = partial(distillation_loss, temperature=3.0, alpha=0.6, average=average, weights=WEIGHTS)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, teacher, labels), student)
    assert torch.autograd.gradgradcheck(lambda logits: loss(logits, teacher, labels), student)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_weights_all_equal_are_no_weights(average: str) -> None:
    student, teacher, labels = make_batch(4, 7, 3)
    loss = partial(distillation_loss, temperature=3.0, alpha=0.6, average=average)
    expected = loss(student, teacher, labels)
    for weights in ([1 / 3] * 3, np.full(3, 1 / 3), torch.full((3,), 1 / 3)):
        torch.testing.assert_close(loss(student, teacher, labels, weights=weights), expected)
    torch.testing.assert_close(
        soft_targets(teacher, temperature=3.0, average=average, weights=[1 / 3] * 3),
        soft_targets(teacher, temperature=3.0, average=average),
    )


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_member_of_weight_0_is_not_heard(average: str) -> None:
    student, teacher, labels = make_batch(4, 7, 3)
    teacher[1, :, 2] = -torch.inf
    loss = partial(distillation_loss, temperature=3.0, alpha=0.6, average=average)
    actual = loss(student, teacher, labels, weights=[0.25, 0.0, 0.75])
    expected = loss(student, teacher[[0, 2]], labels, weights=[0.25, 0.75])
    torch.testing.assert_close(actual, expected)
    alone = loss(student, teacher, labels, weights=[0.0, 0.0, 1.0])
    torch.testing.assert_close(alone, loss(student, teacher[2], labels))


def test_weights_are_brought_to_sum_1() -> None:
    student, teacher, labels = make_batch(4, 7, 3)
    loss = partial(distillation_loss, student, teacher, labels, temperature=3.0, alpha=0.6)
    nearly = [weight * (1 + 9e-7) for weight in WEIGHTS]
    torch.testing.assert_close(loss(weights=nearly), loss(weights=WEIGHTS), rtol=1e-12, atol=0)


def test_weighted_loss_in_half_precision_and_compiled() -> None:
    student, teacher, labels = make_batch(8, 10, 3)
    student = student.detach().bfloat16().float().requires_grad_()
    teacher = teacher.transpose(0, 1).contiguous().transpose(0, 1).half()
    for average in ("probabilities", "logits"):
        loss = partial(
            distillation_loss, temperature=3.0, alpha=0.6, average=average, weights=WEIGHTS
        )
        expected = loss(student, teacher.float(), labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = loss(student.bfloat16(), teacher, labels)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(student, teacher, labels), expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], r"weights must be one for each of the members .*got 2 for \[3, 4, 7\]"),
        ([], "weights must be one for each of the members .*got 0"),
        ([0.5, 0.6, -0.1], r"weights must be >= 0 and of sum 1, got \[0\.5, 0\.6, -0\.1\]"),
        ([0.5, 0.2, 0.2], "weights must be >= 0 and of sum 1, got"),
        ([1.0, 1.0, 1.0], "weights must be >= 0 and of sum 1, got"),
        ([0.5, 0.5, float("nan")], "weights must be >= 0 and of sum 1, got"),
        ([0.5, 0.5, float("inf")], "weights must be >= 0 and of sum 1, got"),
    ],
)
def test_weights_out_of_range(weights: list[float], message: str) -> None:
    student, teacher, labels = make_batch(4, 7, 3)
    with pytest.raises(ValueError, match=message):
        distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5, weights=weights)
    with pytest.raises(ValueError, match=message):
        soft_targets(teacher, temperature=2.0, weights=weights)


def test_weights_of_one_teacher_are_refused() -> None:
    student, teacher, labels = make_batch()
    with pytest.raises(ValueError, match=r"weights must be one for each .*got 1 for \[4, 7\]"):
        distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5, weights=[1.0])


# --- worked numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, [0.920, 0.046, 0.017, 0.010, 0.007]), (2.0, [0.645, 0.144, 0.087, 0.068, 0.056])],
)
def test_worked_softmax(temperature: float, expected: list[float]) -> None:
    logits = torch.tensor([[5, 2, 1, 0.5, 0.1]], dtype=torch.float64)
    np.testing.assert_allclose(
        soft_targets(logits, temperature=temperature)[0], expected, rtol=0, atol=0.0005
    )


def test_worked_divergence() -> None:
    """KL of the teacher's [0.6, 0.3, 0.1] from the student's [0.5, 0.2, 0.3] is 0.121; the reverse
    KL is 0.157."""
    teacher = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64).log().requires_grad_()
    loss = distillation_loss(student, teacher, torch.tensor([0]), temperature=1.0, alpha=1.0)
    assert loss.item() == pytest.approx(0.121, abs=0.0005)
    np.testing.assert_allclose(gradient_of(loss, student), [[-0.1, -0.1, 0.2]], atol=1e-12)


# --- limits and invariances --------------------------------------------------------------------


def test_high_temperature_matches_centred_logits() -> None:
    student, teacher, labels = make_batch(4, 7)
    loss = distillation_loss(student, teacher, labels, temperature=1e5, alpha=1.0)
    difference = student.detach() - teacher
    difference -= difference.mean(-1, keepdim=True)
    half_square = difference.square().sum(-1).mean() / (2 * 7)
    torch.testing.assert_close(loss.detach(), half_square, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient_of(loss, student), difference / (7 * 4), rtol=0, atol=2e-5)


def test_low_temperature_matches_the_teachers_argmax() -> None:
    """Loss / T tends to the largest student logit less the one at the teacher's argmax, and
    gradient / T to the one-hot argmax of the student less that of the teacher (a perceptron)."""
    student, teacher, labels = make_batch(6, 5)
    temperature = 1e-3
    loss = distillation_loss(student, teacher, labels, temperature=temperature, alpha=1.0)
    chosen = teacher.argmax(-1, keepdim=True)
    margin = student.amax(-1, keepdim=True) - student.gather(1, chosen)
    torch.testing.assert_close(loss / temperature, margin.mean(), rtol=1e-6, atol=1e-9)
    one_hot = F.one_hot(student.argmax(-1), 5) - F.one_hot(chosen[:, 0], 5)
    assert one_hot.any()
    torch.testing.assert_close(
        gradient_of(loss, student) / temperature, one_hot.double() / 6, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_0_is_cross_entropy_and_alpha_1_the_soft_term(dtype: torch.dtype) -> None:
    student, teacher, labels = make_batch(8, 100)
    student, teacher = student.detach().to(dtype), teacher.to(dtype)
    for logits in (student, student.clone().requires_grad_()):  # plain and fused
        ends = [
            distillation_terms(logits, teacher, labels, temperature=4.0, alpha=alpha)
            for alpha in (0.0, 1.0)
        ]
        assert ends[0].loss == ends[0].hard_loss
        assert ends[1].loss == ends[1].soft_loss
        torch.testing.assert_close(ends[0].hard_loss, F.cross_entropy(student, labels))
        for alpha, end in ((1e-7, ends[0]), (1 - 1e-7, ends[1])):
            near = distillation_loss(logits, teacher, labels, temperature=4.0, alpha=alpha)
            torch.testing.assert_close(near, end.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_term_is_0_where_the_teacher_is_the_student(temperature: float, average: str) -> None:
    student, *_ = make_batch(8, 50)
    for dtype, members in itertools.product((torch.float32, torch.float64), (None, 1, 2, 5)):
        logits = student.detach().to(dtype).requires_grad_()
        teacher = logits if members is None else logits.expand(members, -1, -1)
        loss = distillation_loss(
            logits, teacher, torch.zeros(8, dtype=torch.int64),
            temperature=temperature, alpha=1.0, average=average,
        )  # fmt: skip
        tolerance = 0 if members in (None, 1) else 10 * torch.finfo(dtype).eps * temperature**2
        assert abs(loss.item()) <= tolerance
        assert gradient_of(loss, logits).abs().max() <= 10 * torch.finfo(dtype).eps * temperature


@pytest.mark.parametrize("members", [None, 3])
def test_invariances(members: int | None) -> None:
    student, teacher, labels = make_batch(6, 5, members)
    loss = partial(distillation_loss, temperature=3.0, alpha=0.4)
    expected = loss(student, teacher, labels)
    rows, columns = torch.randperm(6), torch.randperm(5)
    torch.testing.assert_close(loss(student[rows], teacher[..., rows, :], labels[rows]), expected)
    torch.testing.assert_close(
        loss(student[:, columns], teacher[..., columns], columns.argsort()[labels]), expected
    )
    shift = torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(loss(student + 9 * shift, teacher - 7 * shift, labels), expected)
    if members:
        torch.testing.assert_close(loss(student, teacher.flip(0), labels), expected)


def test_mean_of_micro_batches_is_the_loss_of_the_batch() -> None:
    student, teacher, labels = make_batch(12, 5)
    loss = partial(distillation_loss, temperature=3.0, alpha=0.4)
    parts = [
        loss(*part)
        for part in zip(student.split(4), teacher.split(4), labels.split(4), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), loss(student, teacher, labels))


def test_average_of_probabilities_has_the_mean_gradient_of_the_members() -> None:
    student, teacher, labels = make_batch(4, 6, 3)
    loss = partial(distillation_loss, temperature=3.0, alpha=1.0)
    members = [gradient_of(loss(student, member, labels), student) for member in teacher]
    ensemble = gradient_of(loss(student, teacher, labels), student)
    torch.testing.assert_close(torch.stack(members).mean(0), ensemble)


# --- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e4, 65504.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("terms_of", [fused_terms, plain_terms])
def test_saturated_logits(
    terms_of: Callable[..., tuple[Tensor, ...]], temperature: float, size: float
) -> None:
    student = torch.tensor([[size, -size, 0.0], [size, -size, 0.0], [-size, -size, -size]])
    teacher = torch.tensor([[-size, size, 0.0], [size, -size, 0.0], [size, size, size]]).half()
    labels = torch.tensor([1, 0, 2])
    settings = {
        "temperature": temperature, "alpha": 0.5, "average": "logits", "label_smoothing": 0.0,
    }  # fmt: skip
    student.requires_grad_()
    terms = terms_of(student, teacher, labels, **settings)
    *expected, gradient = reference(student, teacher, labels, **settings)
    np.testing.assert_allclose([term.item() for term in terms], expected, rtol=1e-6)
    np.testing.assert_allclose(gradient_of(terms[0], student), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("terms_of", [fused_terms, plain_terms])
def test_classes_that_are_masked_out_cost_nothing(
    terms_of: Callable[..., tuple[Tensor, ...]], average: str
) -> None:
    student, teacher, labels = make_batch(4, 6, 2)
    labels %= 5
    settings = {
        "temperature": 2.0, "alpha": 0.5, "average": average, "label_smoothing": 0.0,
    }  # fmt: skip
    expected = terms_of(student[:, :5], teacher[..., :5], labels, **settings)[0]
    mask = torch.tensor([0.0] * 5 + [-torch.inf], dtype=torch.float64)
    masked = (student.detach() + mask).requires_grad_()
    loss = terms_of(masked, teacher + mask, labels, **settings)[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, masked), gradient_of(expected, student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, labels = make_batch(8, 100, 2)
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.half()
    wide = student.detach().float().requires_grad_()
    settings = {"temperature": 2.0, "alpha": 0.5}
    expected = distillation_loss(wide, teacher.float(), labels, **settings)
    with torch.autocast("cpu", dtype=dtype):
        loss = distillation_loss(student, teacher, labels, **settings)
        without_graph = distillation_loss(student.detach(), teacher, labels, **settings)
    assert loss.dtype == without_graph.dtype == torch.float32
    assert loss == expected
    torch.testing.assert_close(without_graph, expected.detach())
    # scaled before it is rounded to half precision, as a gradient scaler needs it
    scale = 2.0**14
    gradient = gradient_of(scale * loss, student)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, gradient_of(scale * expected, wide).to(dtype))


def test_float16_teacher_as_its_float32_copy() -> None:
    student, teacher, labels = make_batch(8, 100, 2)
    settings = {"temperature": 2.0, "alpha": 0.5}
    half = distillation_loss(student, teacher.half(), labels, **settings)
    assert half == distillation_loss(student, teacher.half().float(), labels, **settings)


# --- what is returned, and what compiles -------------------------------------------------------


def test_only_the_loss_carries_a_graph() -> None:
    student, teacher, labels = make_batch()
    teacher.requires_grad_()
    terms = distillation_terms(student, teacher, labels, temperature=2.0, alpha=0.5)
    assert [term.requires_grad for term in terms] == [True, False, False]
    assert all(term.shape == () for term in terms)
    terms.loss.backward()
    assert teacher.grad is None
    with torch.no_grad():
        terms = distillation_terms(student, teacher, labels, temperature=2.0, alpha=0.5)
    assert not terms.loss.requires_grad


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("terms_of", [distillation_terms, plain_terms, sparse])
def test_the_loss_shares_no_memory_with_its_terms(
    alpha: float, terms_of: Callable[..., tuple[Tensor, ...]]
) -> None:
    student, teacher, labels = make_batch()
    case: dict[str, Any] = {"temperature": 2.0, "alpha": alpha}
    case |= {"average": "logits", "label_smoothing": 0.0} if terms_of is plain_terms else {}
    for graph in (True, False):
        loss, *terms = terms_of(student.detach().requires_grad_(graph), teacher, labels, **case)
        before = [term.item() for term in terms]
        loss /= 4  # as timm's train.py does
        assert [term.item() for term in terms] == before


@pytest.mark.parametrize("members", [None, 3])
def test_compiles_whole(members: int | None) -> None:
    student, teacher, labels = make_batch(4, 6, members)
    loss = partial(distillation_loss, temperature=2.0, alpha=0.5)
    expected = loss(student, teacher, labels)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(student, teacher, labels)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient_of(compiled, student), gradient_of(expected, student))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_targets(shape: tuple[int, int, int | None], average: str) -> None:
    _, teacher, _ = make_batch(*shape)
    targets = soft_targets(teacher.requires_grad_(), temperature=3.0, average=average)
    z_t = teacher.detach().numpy().reshape(-1, *shape[:2])
    if average == "logits":
        z_t = z_t.mean(0, keepdims=True)
    np.testing.assert_allclose(targets, softmax(z_t / 3, axis=-1).mean(0), rtol=1e-12)
    assert not targets.requires_grad
    assert targets.dtype == torch.float64
    assert soft_targets(teacher.half(), temperature=3.0).dtype == torch.float32


def test_hard_loss() -> None:
    student, _, labels = make_batch()
    torch.testing.assert_close(hard_loss(student, labels), F.cross_entropy(student, labels))
    torch.testing.assert_close(
        hard_loss(student, labels, label_smoothing=0.1),
        F.cross_entropy(student, labels, label_smoothing=0.1),
    )
    assert hard_loss(student.bfloat16(), labels).dtype == torch.float32


# --- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be > 0 and finite, got 0\.0"),
        ({"temperature": -1.0}, r"temperature must be > 0 and finite, got -1\.0"),
        ({"temperature": float("nan")}, "temperature must be > 0 and finite, got nan"),
        ({"temperature": float("inf")}, "temperature must be > 0 and finite, got inf"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1\.5"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0\.1"),
        ({"alpha": float("nan")}, r"alpha must be in \[0, 1\], got nan"),
        ({"average": "mean"}, "average must be 'probabilities' or 'logits', got 'mean'"),
        ({"label_smoothing": 2.0}, r"label_smoothing must be in \[0, 1\], got 2\.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_terms(*make_batch(), **{"temperature": 2.0, "alpha": 0.5} | settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student_logits": torch.zeros(4)}, r"student_logits must be \[batch, classes\].*\(4,\)"),
        ({"student_logits": torch.zeros(0, 3)}, r"student_logits must be .*, got shape \(0, 3\)"),
        ({"teacher_logits": torch.zeros(4, 2)}, r"teacher_logits must be \[4, 3\].*got \[4, 2\]"),
        ({"teacher_logits": torch.zeros(3)}, r"teacher_logits must be \[4, 3\].*got \[3\]"),
        ({"teacher_logits": torch.zeros(0, 4, 3)}, r"teacher_logits must be .*got \[0, 4, 3\]"),
        ({"teacher_logits": torch.zeros(1, 1, 4, 3)}, r"teacher_logits must .*\[1, 1, 4, 3\]"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, r"labels must be \[4\].*got \[4, 1\]"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, r"labels must be in \[0, 3\), got 3"),
        (
            {"labels": torch.tensor([0, -100, 2, 0])},
            r"labels must be in \[0, 3\), got -100: leave such rows out, or give",
        ),
    ],
)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_tensors_that_do_not_match(
    arguments: dict[str, Tensor], message: str, with_gradient: bool
) -> None:
    good = {
        "student_logits": torch.zeros(4, 3),
        "teacher_logits": torch.zeros(4, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
    } | arguments
    good["student_logits"] = good["student_logits"].clone().requires_grad_(with_gradient)
    with pytest.raises(ValueError, match=message):
        distillation_terms(**good, temperature=2.0, alpha=0.5)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("members", [None, 1, 3])
def test_nan_of_the_teacher_is_named_by_its_row(
    members: int | None, average: Any, with_gradient: bool
) -> None:
    student, teacher, labels = make_batch(4, 3, members)
    student = student.detach().requires_grad_(with_gradient)
    loss = partial(distillation_terms, temperature=2.0, alpha=0.5, average=average)
    teacher[..., 0, 0] = -torch.inf  # an impossible class is no error
    loss(student, teacher, labels)
    member = "" if members is None else f" of member {members - 1}"
    (teacher if members is None else teacher[-1])[2, 1] = torch.nan
    with pytest.raises(
        ValueError, match=f"teacher_logits must be numbers for soft_loss, got nan in row 2{member}$"
    ):
        loss(student, teacher, labels)
    teacher = teacher.nan_to_num()  # NaN in the student alone raises no error about the teacher
    assert loss(student.detach().fill_(torch.nan), teacher, labels).loss.isnan()


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "labels"])
@pytest.mark.parametrize("value", [None, (torch.zeros(4, 3),), [0, 1, 2, 0]])
def test_what_is_no_tensor_is_named(name: str, value: Any) -> None:
    tensors = {"student_logits": torch.randn(4, 3), "teacher_logits": torch.randn(4, 3)}
    tensors |= {"labels": torch.zeros(4, dtype=torch.long), name: value}
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got {type(value).__name__}"):
        distillation_loss(**tensors, temperature=4.0, alpha=0.9)


@pytest.mark.parametrize("loss", [hard_loss, distillation_loss])
def test_one_class_is_refused(loss: Any) -> None:
    logits, labels = torch.randn(4, 1, requires_grad=True), torch.zeros(4, dtype=torch.long)
    arguments = (logits, labels) if loss is hard_loss else (logits, logits, labels)
    settings = {} if loss is hard_loss else {"temperature": 4.0, "alpha": 0.9}
    with pytest.raises(ValueError, match=r"at least 2 classes, got shape \(4, 1\): .*\(BCE"):
        loss(*arguments, **settings)


def test_types_that_do_not_fit() -> None:
    student, teacher, labels = make_batch()
    with pytest.raises(TypeError, match=r"labels must be class indices of torch.int64, got .*32"):
        distillation_loss(student, teacher, labels.float(), temperature=2.0, alpha=0.5)
    with pytest.raises(TypeError, match=r"logits must be floating point, got .*int64 of the teach"):
        distillation_loss(student, teacher.long(), labels, temperature=2.0, alpha=0.5)
    with pytest.raises(ValueError, match=r"teacher_logits must be .*, got shape \(3,\)"):
        soft_targets(torch.zeros(3), temperature=1.0)


@pytest.mark.parametrize("members", [None, 3])
def test_the_teacher_has_no_graph_where_the_student_has_none(members: int | None) -> None:
    student, teacher, labels = make_batch(4, 3, members)
    terms = distillation_terms(
        student.detach(), teacher.requires_grad_(), labels, temperature=2.0, alpha=0.5
    )
    assert not terms.loss.requires_grad


# --- wrong versions are rejected ---------------------------------------------------------------


def check_loss(loss: Loss) -> None:
    """Raise AssertionError unless `loss` is the distillation loss."""
    for members, case in itertools.product((None, 3), cases()):
        student, teacher, labels = make_batch(4, 7, members)
        teacher.requires_grad_()
        value = loss(student, teacher, labels, **case)
        expected, *_, gradient = reference(student, teacher, labels, **case)
        np.testing.assert_allclose(value.item(), expected, rtol=1e-9, atol=1e-9)
        value.backward()
        np.testing.assert_allclose(student.grad, gradient, rtol=1e-9, atol=1e-9)
        assert teacher.grad is None, "the teacher got a gradient"
    for wrong in ({"temperature": float("nan")}, {"alpha": float("nan")}, {"average": "mean"}):
        try:
            loss(student, teacher, labels, **case | wrong)
        except ValueError:
            continue
        raise AssertionError(f"{wrong} was accepted")


def naive(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    average: str,
    wrong: str = "",
) -> Tensor:
    """Return the loss in a few lines, with one thing in it `wrong`."""
    if wrong == "NaN passes the check":
        if temperature <= 0:
            raise ValueError
    elif not temperature > 0:
        raise ValueError
    if not 0 <= alpha <= 1 or average not in ("probabilities", "logits"):
        raise ValueError
    if wrong != "teacher not detached":
        teacher = teacher.detach()
    dim = 0 if wrong == "softmax over the batch" else -1
    t_s = 1.0 if wrong == "temperature on the teacher only" else temperature
    t_t = 1.0 if wrong == "temperature on the student only" else temperature
    log_p_s = F.log_softmax(student / t_s, dim)
    members = teacher if teacher.ndim == 3 else teacher[None]
    if (average == "logits") != (wrong == "ensemble averaged in the other space"):
        log_p_t = F.log_softmax(members.mean(0) / t_t, dim)
    else:
        log_p_t = F.softmax(members / t_t, dim).mean(0).log()
    if wrong == "KL reversed":
        log_p_s, log_p_t = log_p_t, log_p_s
    if wrong == "probabilities for logs":
        log_p_s = log_p_s.exp()
    if wrong == "logs for probabilities":
        log_p_t = log_p_t.exp()
    reduction = {"mean over classes": "mean", "sum over the batch": "sum"}.get(wrong, "batchmean")
    soft = F.kl_div(log_p_s, log_p_t, log_target=True, reduction=reduction)
    if wrong == "squared error of probabilities":
        soft = (log_p_s.exp() - log_p_t.exp()).square().sum(-1).mean()
    if wrong == "cross-entropy for KL":
        soft = -(log_p_t.exp() * log_p_s).sum(-1).mean()
    if wrong != "T squared missing" and not (
        wrong == "T squared missing at alpha 1" and alpha == 1
    ):
        soft = soft * (temperature if wrong == "T not squared" else temperature**2)
    hard = F.cross_entropy(student / temperature if wrong == "hard term at T" else student, labels)
    return torch.lerp(soft, hard, alpha) if wrong == "weights swapped" else hard.lerp(soft, alpha)


@pytest.mark.parametrize("loss", [distillation_loss, naive])
def test_right_versions_pass_the_check(loss: Loss) -> None:
    check_loss(loss)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize(
    "wrong",
    [
        "T squared missing",
        "T not squared",
        "T squared missing at alpha 1",
        "mean over classes",
        "sum over the batch",
        "weights swapped",
        "temperature on the student only",
        "temperature on the teacher only",
        "hard term at T",
        "KL reversed",
        "cross-entropy for KL",
        "squared error of probabilities",
        "teacher not detached",
        "probabilities for logs",
        "logs for probabilities",
        "softmax over the batch",
        "NaN passes the check",
        "ensemble averaged in the other space",
    ],
)
def test_wrong_versions_fail_the_check(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_loss(partial(naive, wrong=wrong))
