"""Losses between logits against NumPy in float64, their limits, edges and wrong versions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from scipy.stats import zscore
from torch import Tensor

from selfkd.losses import distillation_loss, distillation_terms
from selfkd.losses.logits import (
    confidence_weighted_loss,
    confidence_weights,
    dist_loss,
    dkd_loss,
    hard_teacher_loss,
    jensen_shannon,
    logit_mse,
    permute_nontarget,
    reverse_kl,
    soft_cross_entropy,
    standardize_logits,
    standardized_loss,
    teacher_free_logits,
)

Array = np.ndarray
Loss = Callable[..., Tensor]
TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
SHAPES = ((5, 2, None), (3, 10, 1), (4, 7, 3), (6, 1000, 2))  # batch, classes, members


# --- the formulas ------------------------------------------------------------------------------


def kl(p: Array, q: Array) -> Array:
    """Return the KL of rows of log-probabilities, in logs so that nothing underflows."""
    return (np.exp(p) * (p - q)).sum(-1)


def soft_cross_entropy_reference(s: Array, t: Array, y: Array, *, temperature: float) -> float:
    return -(softmax(t / temperature, -1) * log_softmax(s / temperature, -1)).sum(-1).mean()


def reverse_kl_reference(s: Array, t: Array, y: Array, *, temperature: float) -> float:
    kls = kl(log_softmax(s / temperature, -1), log_softmax(t / temperature, -1))
    return temperature**2 * kls.mean()


def jensen_shannon_reference(
    s: Array, t: Array, y: Array, *, temperature: float, beta: float
) -> float:
    log_s, log_t = log_softmax(s / temperature, -1), log_softmax(t / temperature, -1)
    log_m = np.logaddexp(log_t + np.log(beta), log_s + np.log1p(-beta))
    return temperature**2 * (beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)).mean()


def logit_mse_reference(s: Array, t: Array, y: Array, *, centre: bool) -> float:
    difference = s - t
    if centre:
        difference = difference - difference.mean(-1, keepdims=True)
    return (difference**2).mean(-1).mean()


def dkd_reference(
    s: Array,
    t: Array,
    y: Array,
    *,
    temperature: float,
    target_weight: float,
    nontarget_weight: float,
) -> float:
    total = 0.0
    for z_s, z_t, label in zip(s / temperature, t / temperature, y, strict=True):
        rest_s, rest_t = np.delete(z_s, label), np.delete(z_t, label)
        log_s, log_t = (
            log_softmax([z[label], np.logaddexp.reduce(rest)])
            for z, rest in ((z_s, rest_s), (z_t, rest_t))
        )
        total += target_weight * kl(log_t, log_s)
        total += nontarget_weight * kl(log_softmax(rest_t), log_softmax(rest_s))
    return temperature**2 * total / len(y)


def correlation(p: Array, q: Array) -> float:
    """Return Pearson's correlation, 0 where one is constant or its variance underflows."""
    if any(np.ptp(values) <= 1e-14 * values.max() + 1e-150 for values in (p, q)):
        return 0.0
    return np.corrcoef(p, q)[0, 1]


def dist_reference(
    s: Array,
    t: Array,
    y: Array,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
) -> float:
    p_s, p_t = softmax(s / temperature, -1), softmax(t / temperature, -1)
    rows = np.mean([1 - correlation(*pair) for pair in zip(p_s, p_t, strict=True)])
    columns = np.mean([1 - correlation(*pair) for pair in zip(p_s.T, p_t.T, strict=True)])
    return inter_weight * rows + intra_weight * columns


def standardize_reference(z: Array) -> Array:
    constant = np.ptp(z, axis=-1, keepdims=True) == 0
    return np.where(constant, 0.0, zscore(z + constant * np.arange(z.shape[-1]), axis=-1))


def standardized_reference(s: Array, t: Array, y: Array, *, temperature: float) -> float:
    log_s, log_t = (log_softmax(standardize_reference(z) / temperature, -1) for z in (s, t))
    return temperature**2 * kl(log_t, log_s).mean()


def hard_teacher_reference(s: Array, t: Array, y: Array) -> float:
    return -np.mean([log_softmax(z_s)[z_t.argmax()] for z_s, z_t in zip(s, t, strict=True)])


def confidence_weighted_reference(s: Array, t: Array, y: Array) -> float:
    weights = softmax(t, -1).max(-1)
    losses = -log_softmax(s, -1)[np.arange(len(y)), y]
    return (weights * losses).sum() / weights.sum()


class Case(NamedTuple):
    loss: Loss
    reference: Callable[..., float]
    settings: dict[str, tuple[Any, ...]]
    labelled: bool = False

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        return self.loss(student, teacher, *([labels] if self.labelled else []), **settings)

    def expect(self, student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> float:
        s, t = student.detach().double().numpy(), teacher.detach().double().numpy()
        return self.reference(s, t.mean(0) if t.ndim == 3 else t, labels.numpy(), **settings)

    def all_settings(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.settings.values()):
            yield dict(zip(self.settings, values, strict=True))

    def some_settings(self) -> dict[str, Any]:
        return {name: values[-1] for name, values in self.settings.items()} | (
            {"temperature": 4.0} if "temperature" in self.settings else {}
        )


AT_T = {"temperature": TEMPERATURES}
CASES = {
    "soft_cross_entropy": Case(soft_cross_entropy, soft_cross_entropy_reference, AT_T),
    "reverse_kl": Case(reverse_kl, reverse_kl_reference, AT_T),
    "jensen_shannon": Case(
        jensen_shannon, jensen_shannon_reference, AT_T | {"beta": (0.5, 0.9, 0.3)}
    ),
    "logit_mse": Case(logit_mse, logit_mse_reference, {"centre": (True, False)}),
    "dkd_loss": Case(
        dkd_loss,
        dkd_reference,
        AT_T | {"target_weight": (0.0, 1.5), "nontarget_weight": (0.0, 8.0)},
        labelled=True,
    ),
    "dist_loss": Case(
        dist_loss,
        dist_reference,
        AT_T | {"inter_weight": (0.0, 2.0), "intra_weight": (0.0, 0.5)},
    ),
    "standardized_loss": Case(standardized_loss, standardized_reference, AT_T),
    "hard_teacher_loss": Case(hard_teacher_loss, hard_teacher_reference, {}),
    "confidence_weighted_loss": Case(
        confidence_weighted_loss, confidence_weighted_reference, {}, labelled=True
    ),
}
each_loss = pytest.mark.parametrize("name", CASES)


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


def gradient_of(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


# --- against the reference ---------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_in_float64(name: str, shape: tuple[int, int, int | None]) -> None:
    case, batch = CASES[name], make_batch(*shape)
    for settings in case.all_settings():
        loss = case(*batch, **settings)
        assert loss.shape == ()
        expected = case.expect(*batch, **settings)
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-9, atol=1e-11, err_msg=settings)


@each_loss
def test_float32_equals_reference(name: str) -> None:
    case, (student, teacher, labels) = CASES[name], make_batch(16, 1000, 2)
    student, teacher = student.detach().float(), teacher.float()
    settings = case.some_settings()
    loss = case(student, teacher, labels, **settings)
    assert loss.dtype == torch.float32
    expected = case.expect(student, teacher, labels, **settings)
    np.testing.assert_allclose(loss.item(), expected, rtol=2e-6)


@each_loss
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradcheck(name: str, shape: tuple[int, int, int | None]) -> None:
    case, (student, teacher, labels) = CASES[name], make_batch(*shape)
    assert torch.autograd.gradcheck(
        lambda logits: case(logits, teacher, labels, **case.some_settings()), (student,)
    )


# --- precision ---------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_saturated_and_constant_logits(name: str, dtype: torch.dtype, temperature: float) -> None:
    case, z = CASES[name], 1e4
    student = torch.tensor([[z, -z, 0.0], [z, -z, 0.0], [-z, -z, -z], [0, 1, 2]], dtype=dtype)
    teacher = torch.tensor([[-z, z, 0.0], [z, -z, 0.0], [z, 0.0, -z], [z, z, z]], dtype=dtype)
    labels = torch.tensor([1, 0, 2, 2])
    for settings in case.all_settings():
        if "temperature" in settings:
            settings["temperature"] = temperature
        student.requires_grad_()
        loss = case(student, teacher, labels, **settings)
        expected = case.expect(student, teacher, labels, **settings)
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-5, err_msg=str(settings))
        assert gradient_of(loss, student).isfinite().all()


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    case, (student, teacher, labels) = CASES[name], make_batch(8, 100, 2)
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    wide = student.detach().float().requires_grad_()
    expected = case(wide, teacher.float(), labels, **case.some_settings())
    with torch.autocast("cpu", dtype=dtype):
        loss = case(student, teacher, labels, **case.some_settings())
    assert loss.dtype == torch.float32
    assert loss == expected
    gradient = gradient_of(2.0**10 * loss, student)
    torch.testing.assert_close(gradient, gradient_of(2.0**10 * expected, wide).to(dtype))


# --- limits and invariances --------------------------------------------------------------------


@each_loss
def test_only_the_student_gets_a_gradient(name: str) -> None:
    case, (student, teacher, labels) = CASES[name], make_batch(4, 7, 3)
    teacher.requires_grad_()
    case(student, teacher, labels, **case.some_settings()).backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 1e-3
    assert teacher.grad is None


@pytest.mark.parametrize(
    "name",
    ["reverse_kl", "jensen_shannon", "logit_mse", "dkd_loss", "dist_loss", "standardized_loss"],
)
def test_0_at_the_teacher_and_above_it_elsewhere(name: str) -> None:
    case, (student, teacher, labels) = CASES[name], make_batch(6, 5)
    settings = case.some_settings()
    loss = case(student, student, labels, **settings)
    assert abs(loss.item()) < 1e-14
    assert gradient_of(loss, student).abs().max() < 1e-14
    assert case(student, teacher, labels, **settings) > 0.01


@each_loss
def test_invariances(name: str) -> None:
    case, (student, teacher, labels) = CASES[name], make_batch(6, 5, 3)
    loss = partial(case, **case.some_settings())
    expected = loss(student, teacher, labels)
    rows, columns = torch.randperm(6), torch.randperm(5)
    torch.testing.assert_close(loss(student[rows], teacher[:, rows], labels[rows]), expected)
    torch.testing.assert_close(
        loss(student[:, columns], teacher[..., columns], columns.argsort()[labels]), expected
    )
    torch.testing.assert_close(loss(student, teacher.flip(0), labels), expected)
    if name == "logit_mse":
        loss = partial(loss, centre=True)
        expected = loss(student, teacher, labels)
    shift = torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(loss(student + 9 * shift, teacher - 7 * shift, labels), expected)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"dist_loss", "confidence_weighted_loss"}))
def test_mean_of_micro_batches_is_the_loss_of_the_batch(name: str) -> None:
    case, batch = CASES[name], make_batch(12, 5)
    loss = partial(case, **case.some_settings())
    parts = [loss(*part) for part in zip(*(tensor.split(4) for tensor in batch), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss(*batch))


@each_loss
def test_compiles_whole(name: str) -> None:
    case, (student, teacher, labels) = CASES[name], make_batch(4, 6, 3)
    loss = partial(case, **case.some_settings())
    expected = loss(student, teacher, labels)
    torch.compiler.reset()  # the cache that all cases share is soon full
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(student, teacher, labels)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient_of(compiled, student), gradient_of(expected, student))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_cross_entropy_is_divergence_and_entropy(temperature: float) -> None:
    student, teacher, labels = make_batch()
    divergence = distillation_loss(student, teacher, labels, temperature=temperature, alpha=1.0)
    p = F.softmax(teacher / temperature, dim=-1)
    expected = divergence / temperature**2 + torch.special.entr(p).sum(-1).mean()
    loss = soft_cross_entropy(student, teacher, temperature=temperature)
    torch.testing.assert_close(loss, expected)


def test_reverse_kl_is_the_divergence_the_other_way_round() -> None:
    student, teacher, labels = make_batch()
    expected = distillation_loss(teacher, student, labels, temperature=3.0, alpha=1.0)
    torch.testing.assert_close(reverse_kl(student, teacher, temperature=3.0), expected)


def test_jensen_shannon_ends_and_bound() -> None:
    student, teacher, labels = make_batch()
    forward = distillation_loss(student, teacher, labels, temperature=2.0, alpha=1.0)
    backward = reverse_kl(student, teacher, temperature=2.0)
    at = partial(jensen_shannon, student, teacher, temperature=2.0)
    for end, expected in ((at(beta=1e-7), forward), (at(beta=1 - 1e-7), backward)):
        torch.testing.assert_close(end / 1e-7, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(at(), jensen_shannon(teacher, student, temperature=2.0))
    apart = jensen_shannon(100 * student, 100 * student.roll(1, 1), temperature=2.0)
    assert apart.item() <= 4 * np.log(2) + 1e-12


def test_centred_mse_is_twice_the_limit_of_the_divergence() -> None:
    student, teacher, labels = make_batch()
    divergence = distillation_loss(student, teacher, labels, temperature=1e5, alpha=1.0)
    loss = logit_mse(student, teacher, centre=True)
    torch.testing.assert_close(loss, 2 * divergence, rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [2, 7])
def test_dkd_parts_add_up_to_the_divergence(temperature: float, classes: int) -> None:
    student, teacher, labels = make_batch(1, classes)
    share = F.softmax(teacher / temperature, dim=-1)[0, labels[0]].item()
    loss = dkd_loss(
        student, teacher, labels,
        temperature=temperature, target_weight=1.0, nontarget_weight=1 - share,
    )  # fmt: skip
    expected = distillation_loss(student, teacher, labels, temperature=temperature, alpha=1.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student))


def test_dkd_of_two_classes_has_no_second_term() -> None:
    student, teacher, labels = make_batch(4, 2)
    loss = dkd_loss(student, teacher, labels, temperature=2.0, target_weight=0.0)
    assert loss == 0
    assert not gradient_of(loss, student).any()


def test_dist_is_blind_to_affine_maps_of_probabilities_and_keeps_its_gradient_at_high_t() -> None:
    student, teacher, _ = make_batch(6, 5)
    p = F.softmax(student.detach(), dim=-1)
    loss = dist_loss((0.3 * p + 0.7 / 5).log(), p.log(), intra_weight=0.0)
    assert abs(loss.item()) < 1e-12
    norms = [
        gradient_of(dist_loss(student, teacher, temperature=t), student).norm() for t in (1e2, 1e3)
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e4, 1 / 3])
def test_dist_of_a_constant_student_is_finite(dtype: torch.dtype, size: float) -> None:
    student = torch.full((7, 5), size, dtype=dtype, requires_grad=True)
    loss = dist_loss(student, torch.randn(7, 5))
    assert loss == 2
    assert not gradient_of(loss, student).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_standardize_logits(dtype: torch.dtype) -> None:
    logits = (1000 + 3 * torch.randn(3, 8, 50)).to(dtype).requires_grad_()
    rows = standardize_logits(logits)
    assert rows.dtype == torch.promote_types(dtype, torch.float32)
    expected = zscore(logits.detach().double().numpy(), axis=-1)
    np.testing.assert_allclose(rows.detach(), expected, rtol=1e-3, atol=1e-4)
    assert gradient_of(rows[..., 0].sum(), logits).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1 / 3, -1e4, 1e-20])
def test_constant_rows_become_zeros_without_a_gradient(value: float) -> None:
    logits = torch.full((3, 7), value)
    logits[1] = torch.arange(7)
    logits[2] += 1e-7 * value * torch.arange(7)
    logits.requires_grad_()
    rows = standardize_logits(logits)
    assert not rows[[0, 2]].any()
    assert rows[1].std(correction=0).item() == pytest.approx(1)
    gradient = gradient_of(rows[:, 0].sum(), logits)
    assert not gradient[[0, 2]].any()
    assert gradient[1].any()


def test_standardized_loss_is_blind_to_the_size_of_logits() -> None:
    student, teacher, labels = make_batch()
    loss = standardized_loss(student, teacher, temperature=2.0)
    sizes = torch.tensor([[0.01], [1.0], [10.0], [1000.0]])
    torch.testing.assert_close(standardized_loss(sizes * student, 7 * teacher, temperature=2), loss)
    expected = distillation_loss(
        standardize_logits(student), standardize_logits(teacher), labels,
        temperature=2.0, alpha=1.0,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)


def test_confidence_weights() -> None:
    student, teacher, labels = make_batch(6, 5, 3)
    weights = confidence_weights(teacher.requires_grad_())
    assert not weights.requires_grad
    confidence = softmax(teacher.detach().numpy().mean(0), -1).max(-1)
    np.testing.assert_allclose(weights, confidence / confidence.mean(), rtol=1e-12)
    certain = 1e4 * F.one_hot(labels, 5).double()
    torch.testing.assert_close(
        confidence_weighted_loss(student, certain, labels), F.cross_entropy(student, labels)
    )


# --- transforms of the teacher -----------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_permute_nontarget_keeps_the_choice_and_the_values(
    shape: tuple[int, int, int | None],
) -> None:
    _, teacher, _ = make_batch(*shape)
    permuted = permute_nontarget(teacher.requires_grad_(), generator=torch.Generator())
    expected = teacher.detach().reshape(-1, *shape[:2]).mean(0)
    assert not permuted.requires_grad
    assert torch.equal(permuted.argmax(-1), expected.argmax(-1))
    assert torch.equal(permuted.amax(-1), expected.amax(-1))
    assert torch.equal(permuted.sort(-1).values, expected.sort(-1).values)
    assert torch.equal(permuted, expected) == (shape[1] == 2)


def test_permute_nontarget_draws_each_order_as_often_for_each_row() -> None:
    rows = 6000
    teacher = torch.tensor([5.0, 1.0, 9.0, 2.0]).repeat(rows, 1)
    permuted = permute_nontarget(teacher, generator=torch.Generator().manual_seed(0))
    orders, counts = permuted.unique(dim=0, return_counts=True)
    assert len(orders) == 6  # all orders of the three that may move
    assert (counts - rows / 6).abs().max() < 5 * (rows / 6) ** 0.5
    again = permute_nontarget(teacher, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permuted, again)


def test_permute_nontarget_with_ties() -> None:
    teacher = torch.tensor([[2.0, 2.0, 1.0, 2.0]]).repeat(50, 1)
    permuted = permute_nontarget(teacher, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permuted[:, 0], teacher[:, 0])
    assert torch.equal(permuted.sort(-1).values, teacher.sort(-1).values)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("confidence", [0.1, 0.9, 1 - 1e-6])
def test_teacher_free_logits(classes: int, confidence: float) -> None:
    labels = torch.tensor([0, classes - 1, 1])
    expected = np.full((3, classes), (1 - confidence) / (classes - 1))
    expected[np.arange(3), labels] = confidence
    logits = teacher_free_logits(labels, classes=classes, confidence=confidence)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits, np.log(expected), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_uniform_teacher_at_t_1_is_label_smoothing(alpha: float) -> None:
    student, _, labels = make_batch(6, 5)
    uniform = teacher_free_logits(labels, classes=5, confidence=1 / 5)
    expected = F.cross_entropy(student, labels, label_smoothing=alpha)
    hard, soft = (
        F.cross_entropy(student, labels),
        soft_cross_entropy(student, uniform, temperature=1.0),
    )
    torch.testing.assert_close(hard.lerp(soft, alpha), expected)
    loss = distillation_terms(student, uniform, labels, temperature=1.0, alpha=alpha).loss
    torch.testing.assert_close(loss + alpha * np.log(5), expected)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student))


def test_virtual_teacher_at_t_1_is_label_smoothing_of_another_amount() -> None:
    """Label smoothing is all mass but the label's, spread over all classes: (1 - a) K / (K - 1)."""
    student, _, labels = make_batch(6, 5)
    virtual = teacher_free_logits(labels, classes=5, confidence=0.9)
    expected = F.cross_entropy(student, labels, label_smoothing=0.1 * 5 / 4)
    torch.testing.assert_close(soft_cross_entropy(student, virtual, temperature=1.0), expected)


# --- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if "temperature" in CASES[name].settings])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_out_of_range(name: str, temperature: float) -> None:
    case = CASES[name]
    with pytest.raises(ValueError, match=f"temperature must be > 0 and finite, got {temperature}"):
        case(*make_batch(), **case.some_settings() | {"temperature": temperature})


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("dkd_loss", "target_weight"),
        ("dkd_loss", "nontarget_weight"),
        ("dist_loss", "inter_weight"),
        ("dist_loss", "intra_weight"),
    ],
)
@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_weights_out_of_range(name: str, setting: str, weight: float) -> None:
    with pytest.raises(ValueError, match=f"^{setting} must be >= 0 and finite, got {weight}"):
        CASES[name](*make_batch(), temperature=2.0, **{setting: weight})


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan")])
def test_shares_out_of_range(value: float) -> None:
    student, teacher, labels = make_batch()
    with pytest.raises(ValueError, match=rf"beta must be in \(0, 1\), got {value}"):
        jensen_shannon(student, teacher, temperature=1.0, beta=value)
    with pytest.raises(ValueError, match=rf"confidence must be in \(0, 1\), got {value}"):
        teacher_free_logits(labels, classes=7, confidence=value)


@each_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_teacher_that_is_not_finite(name: str, value: float) -> None:
    case, (student, teacher, labels) = CASES[name], make_batch(4, 7)
    teacher[2, 5] = value
    message = f"teacher_logits must be finite, got {value} in row 2"
    with pytest.raises(ValueError, match=f"{message}$"):
        case(student, teacher, labels, **case.some_settings())
    members = torch.stack([torch.zeros_like(teacher), teacher])
    with pytest.raises(ValueError, match=f"{message} of member 1$"):
        case(student, members, labels, **case.some_settings())


def test_transforms_of_a_teacher_that_is_not_finite() -> None:
    teacher = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    for transform in (
        confidence_weights,
        partial(permute_nontarget, generator=torch.Generator()),
    ):
        with pytest.raises(ValueError, match="teacher_logits must be finite, got nan in row 1"):
            transform(teacher)
        with pytest.raises(ValueError, match=r"teacher_logits must be \[batch.*got shape \(2,\)"):
            transform(teacher[0])
        with pytest.raises(TypeError, match=r"teacher_logits must be floating.*got torch.int64"):
            transform(teacher.long())


def test_teacher_whose_sum_overflows_is_finite() -> None:
    teacher = torch.full((4, 7), 60000.0, dtype=torch.float16)
    assert soft_cross_entropy(torch.zeros(4, 7), teacher, temperature=1.0).isfinite()


@each_loss
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": torch.zeros(4)}, r"student_logits must be \[batch, classes\].*\(4,\)"),
        ({"student": torch.zeros(0, 3)}, r"student_logits must be .*, got shape \(0, 3\)"),
        ({"teacher": torch.zeros(4, 2)}, r"teacher_logits must be \[4, 3\].*got \[4, 2\]"),
        ({"teacher": torch.zeros(3)}, r"teacher_logits must be \[4, 3\].*got \[3\]"),
        ({"teacher": torch.zeros(0, 4, 3)}, r"teacher_logits must be .*got shape \(0, 4, 3\)"),
        ({"teacher": torch.zeros(1, 1, 4, 3)}, r"teacher_logits must .*shape \(1, 1, 4, 3\)"),
    ],
)
def test_shapes_that_do_not_match(name: str, arguments: dict[str, Tensor], message: str) -> None:
    case = CASES[name]
    tensors = {
        "student": torch.zeros(4, 3),
        "teacher": torch.zeros(4, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
    } | arguments
    with pytest.raises(ValueError, match=message):
        case(**tensors, **case.some_settings())


@each_loss
def test_types_that_do_not_fit(name: str) -> None:
    case, (student, teacher, labels) = CASES[name], make_batch()
    with pytest.raises(TypeError, match=r"student_logits must be floating point, got torch.int64"):
        case(student.long(), teacher, labels, **case.some_settings())
    with pytest.raises(TypeError, match=r"teacher_logits must be floating point, got torch.int64"):
        case(student, teacher.long(), labels, **case.some_settings())


@pytest.mark.parametrize(
    "loss",
    [
        lambda labels: dkd_loss(torch.zeros(4, 3), torch.zeros(4, 3), labels, temperature=1.0),
        lambda labels: confidence_weighted_loss(torch.zeros(4, 3), torch.zeros(4, 3), labels),
        lambda labels: teacher_free_logits(labels, classes=3, confidence=0.9),
    ],
)
def test_labels_out_of_range(loss: Loss) -> None:
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 3\), got {wrong}"):
            loss(torch.tensor([0, 1, wrong, 2]))
    with pytest.raises(
        ValueError, match=r"be \[4\], one a row(, or prob.* \[4, 3\])?, got \[4, 1\]"
    ):
        loss(torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"labels must be class indices of torch.int64, got .*32"):
        loss(torch.zeros(4))


def test_confidence_weights_soft_labels_too() -> None:
    student, teacher, labels = make_batch()
    y = F.one_hot(labels, student.shape[1]).double()
    loss = partial(confidence_weighted_loss, student, teacher, label_smoothing=0.1)
    torch.testing.assert_close(loss(y), loss(labels))
    with pytest.raises(ValueError, match="labels must be probabilities of sum 1, got a sum of 2"):
        loss(2 * y)


def test_too_few_classes_and_a_negative_eps() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    student, teacher = torch.zeros(4, 1), torch.ones(4, 1)
    for loss in (
        partial(soft_cross_entropy, temperature=2.0),
        partial(jensen_shannon, temperature=2.0),
        partial(dist_loss, temperature=2.0),
        partial(dkd_loss, labels=labels, temperature=2.0),
        partial(confidence_weighted_loss, labels=labels),
        partial(logit_mse, centre=True),
        hard_teacher_loss,
    ):
        with pytest.raises(ValueError, match=r"at least 2 classes, got shape \(4, 1\): .*\(BCE"):
            loss(student, teacher)
    assert logit_mse(student, teacher) == 1
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        dkd_loss(torch.zeros(4, 3), torch.zeros(4, 3), [0] * 4, temperature=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="classes must be >= 2, got 1"):
        teacher_free_logits(labels, classes=1, confidence=0.9)
    with pytest.raises(ValueError, match="eps must be >= 0 and finite, got -1"):
        standardize_logits(torch.zeros(4, 3), eps=-1)
    with pytest.raises(TypeError, match=r"^logits must be floating point, got torch.int64"):
        standardize_logits(labels)


# --- wrong versions are rejected ---------------------------------------------------------------


def check_loss(name: str, loss: Loss) -> None:
    """Raise AssertionError unless `loss` is the loss of that name."""
    case = CASES[name]
    for size, members in ((1, None), (1, 3), (10_000, None)):
        student, teacher, labels = make_batch(4, 7, members)
        student = (size * student.detach()).requires_grad_()
        teacher = (size * teacher).requires_grad_()
        for settings in case.all_settings():
            value = loss(student, teacher, labels, **settings)
            expected = case.expect(student, teacher, labels, **settings)
            np.testing.assert_allclose(value.item(), expected, rtol=1e-9, atol=1e-9)
            value.backward()
            assert student.grad.isfinite().all()
            assert teacher.grad is None, "the teacher got a gradient"
    try:
        loss(student, torch.full_like(teacher, torch.nan), labels, **settings)
    except ValueError:
        return
    raise AssertionError("NaN was accepted")


def changed(name: str, change: Callable[..., Tensor]) -> Loss:
    """Return the loss as called by `change` with something wrong; T is 1 if the loss has none."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        right = partial(CASES[name], **settings)
        return change(right, student, teacher, labels, settings.get("temperature", 1.0))

    return loss


WRONG_IN_ANY: dict[str, Callable[..., Tensor]] = {
    "mean over classes too": lambda loss, s, t, y, temperature: loss(s, t, y) / s.shape[1],
    "sum over the batch": lambda loss, s, t, y, temperature: loss(s, t, y) * len(s),
    "student and teacher swapped": lambda loss, s, t, y, temperature: (
        loss(t.detach().reshape(-1, *s.shape).mean(0), s, y) + 0 * s.sum()
    ),
    "teacher not detached": lambda loss, s, t, y, temperature: loss(s, t, y) + 0 * t.sum(),
    "NaN passes": lambda loss, s, t, y, temperature: loss(s, t.nan_to_num(), y),
    "first member only": lambda loss, s, t, y, temperature: loss(s, t[0] if t.ndim == 3 else t, y),
    "probabilities for logits": lambda loss, s, t, y, temperature: loss(
        s.softmax(-1), t.reshape(-1, *s.shape).mean(0).softmax(-1), y
    ),
    "probabilities of the student only": lambda loss, s, t, y, temperature: loss(
        s.softmax(-1), t, y
    ),
    "logs over the batch": lambda loss, s, t, y, temperature: loss(
        s.log_softmax(0), t.log_softmax(-2), y
    ),
}
WRONG_AT_T: dict[str, Callable[..., Tensor]] = {
    "T squared missing, or one too many": lambda loss, s, t, y, temperature: (
        loss(s, t, y) / temperature**2
    ),
    "T on the student only": lambda loss, s, t, y, temperature: loss(s, temperature * t, y),
    "T on the teacher only": lambda loss, s, t, y, temperature: loss(temperature * s, t, y),
    "T ignored": lambda loss, s, t, y, temperature: loss(temperature * s, temperature * t, y),
}


def mask_of_1000(s: Tensor, t: Tensor, y: Tensor, **settings: Any) -> Tensor:
    """Return DKD as in the authors' code, with a mask of -1000 and logs of probabilities."""
    t = t.detach()
    if t.isnan().any():
        raise ValueError
    t, temperature = t if t.ndim == 2 else t.mean(0), settings["temperature"]
    mask = F.one_hot(y, s.shape[1])
    pairs = []
    for z in (s, t):
        p = (z / temperature).softmax(-1)
        pairs.append(torch.stack([(p * mask).sum(1), (p * (1 - mask)).sum(1)], 1))
    target = F.kl_div(pairs[0].log(), pairs[1], reduction="batchmean")
    rest = [z / temperature - 1000 * mask for z in (s, t)]
    nontarget = F.kl_div(rest[0].log_softmax(1), rest[1].softmax(1), reduction="batchmean")
    weights = settings["target_weight"], settings["nontarget_weight"]
    return temperature**2 * (weights[0] * target + weights[1] * nontarget)


def cosine_for_correlation(s: Tensor, t: Tensor, y: Tensor, **settings: Any) -> Tensor:
    t = t.detach()
    if t.isnan().any():
        raise ValueError
    p_s, p_t = (
        (z / settings["temperature"]).softmax(-1) for z in (s, t if t.ndim == 2 else t.mean(0))
    )
    rows, columns = (1 - F.cosine_similarity(p_s, p_t, dim=dim).mean() for dim in (1, 0))
    return settings["inter_weight"] * rows + settings["intra_weight"] * columns


def naive_standardized(
    s: Tensor, t: Tensor, y: Tensor, *, temperature: float, wrong: str = ""
) -> Tensor:
    t = t.detach()
    if t.isnan().any():
        raise ValueError
    t_s = 1.0 if wrong == "T on the teacher only" else temperature
    t_t = 1.0 if wrong == "T on the student only" else temperature
    deviation = partial(torch.std, dim=-1, keepdim=True, correction=wrong == "sample deviation")
    z_s, z_t = ((z - z.mean(-1, True)) / deviation(z) for z in (s, t if t.ndim == 2 else t.mean(0)))
    log_p_s, p_t = (z_s / t_s).log_softmax(-1), (z_t / t_t).softmax(-1)
    return temperature**2 * F.kl_div(log_p_s, p_t, reduction="batchmean")


WRONG_IN_ONE: dict[tuple[str, str], Loss] = {
    ("jensen_shannon", "weights swapped"): lambda s, t, y, temperature, beta: jensen_shannon(
        s, t, temperature=temperature, beta=1 - beta
    ),
    ("jensen_shannon", "one half only"): lambda s, t, y, temperature, beta: (
        beta * jensen_shannon(s, t, temperature=temperature, beta=beta)
    ),
    ("logit_mse", "always centred"): lambda s, t, y, centre: logit_mse(s, t, centre=True),
    ("logit_mse", "never centred"): lambda s, t, y, centre: logit_mse(s, t),
    ("logit_mse", "half"): lambda s, t, y, centre: logit_mse(s, t, centre=centre) / 2,
    ("dkd_loss", "weights swapped"): lambda s, t, y, temperature, **w: dkd_loss(
        s,
        t,
        y,
        temperature=temperature,
        target_weight=w["nontarget_weight"],
        nontarget_weight=w["target_weight"],
    ),
    ("dkd_loss", "labels of the teacher's choice"): lambda s, t, y, **settings: dkd_loss(
        s, t, t.reshape(-1, *s.shape).mean(0).argmax(-1), **settings
    ),
    ("dkd_loss", "mask of -1000"): mask_of_1000,
    ("dist_loss", "weights swapped"): lambda s, t, y, temperature, **w: dist_loss(
        s,
        t,
        temperature=temperature,
        inter_weight=w["intra_weight"],
        intra_weight=w["inter_weight"],
    ),
    ("dist_loss", "rows only"): lambda s, t, y, **w: dist_loss(s, t, **w | {"intra_weight": 0.0}),
    ("dist_loss", "cosine for correlation"): cosine_for_correlation,
    **{
        ("standardized_loss", wrong): partial(naive_standardized, wrong=wrong)
        for wrong in ("sample deviation", "T on the student only", "T on the teacher only")
    },
    ("standardized_loss", "T ignored"): lambda s, t, y, temperature: standardized_loss(
        s, t, temperature=1.0
    ),
    ("standardized_loss", "not standardised"): lambda s, t, y, temperature: distillation_loss(
        s, t, y, temperature=temperature, alpha=1.0
    ),
    ("hard_teacher_loss", "labels for the teacher's"): lambda s, t, y: F.cross_entropy(s, y),
    ("confidence_weighted_loss", "weights not normalised"): lambda s, t, y: (
        confidence_weighted_loss(s, t, y)
        * t.detach().reshape(-1, *s.shape).mean(0).softmax(-1).amax(-1).mean()
    ),
    ("confidence_weighted_loss", "not weighted"): lambda s, t, y: F.cross_entropy(s, y),
    ("confidence_weighted_loss", "the student's confidence"): lambda s, t, y: (
        confidence_weighted_loss(s, s, y)
    ),
}


def wrong_versions() -> Iterator[Any]:
    for name, case in CASES.items():
        at_t = WRONG_AT_T if "temperature" in case.settings else {}
        for wrong, change in (WRONG_IN_ANY | at_t).items():
            if (name, wrong) not in WRONG_IN_ONE:
                yield pytest.param(name, changed(name, change), id=f"{name}: {wrong}")
    for (name, wrong), loss in WRONG_IN_ONE.items():
        yield pytest.param(name, loss, id=f"{name}: {wrong}")


RIGHT = [*CASES.items(), ("standardized_loss", naive_standardized)]


@pytest.mark.parametrize(("name", "loss"), RIGHT)
def test_right_versions_pass_the_check(name: str, loss: Loss) -> None:
    check_loss(name, loss)


@pytest.mark.parametrize(("name", "loss"), list(wrong_versions()))
def test_wrong_versions_fail_the_check(name: str, loss: Loss) -> None:
    with pytest.raises(AssertionError):
        check_loss(name, loss)
