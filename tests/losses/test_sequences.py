"""The loss of token logits against SciPy: chunks, masks, micro-batches and sampled targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import Tensor

from selfkd.losses import sequences
from selfkd.losses.divergences import SoftTerm
from selfkd.losses.sequences import (
    LinearLogits,
    SampledTargets,
    liger_fits,
    linear_sequence_terms,
    sampled_targets,
    sequence_terms,
)
from selfkd.losses.sparse import SparseLogits, sparse_terms, sparsify

BATCH, LENGTH, VOCABULARY, WIDTH = 2, 5, 7, 3
SETTINGS: dict[str, Any] = {"temperature": 3.0, "alpha": 0.6, "label_smoothing": 0.1}


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return student and teacher logits, labels of which three are ignored, and a mask."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, BATCH, LENGTH, VOCABULARY)
    student, teacher = 2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[0, :2] = labels[1, 4] = -100
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = False
    return student.clone().requires_grad_(), teacher, labels, mask


def reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
    normalizer: float | None = None,
) -> tuple[float, float, float, np.ndarray]:
    """Return loss, terms and gradient by the formula, token by token."""
    z_s, z_t = student.detach().double().numpy(), teacher.double().numpy()
    gradient, hard, soft = np.zeros_like(z_s), 0.0, 0.0
    n = int(valid.sum()) if normalizer is None else normalizer
    for place in map(tuple, valid.nonzero().tolist()):
        y = np.full(z_s.shape[-1], label_smoothing / z_s.shape[-1])
        y[labels[place]] += 1 - label_smoothing
        p_t, p_s = softmax(z_t[place] / temperature), softmax(z_s[place] / temperature)
        hard -= (y * log_softmax(z_s[place])).sum() / n
        soft += temperature**2 * (p_t * (np.log(p_t) - np.log(p_s))).sum() / n
        gradient[place] = (1 - alpha) * (softmax(z_s[place]) - y) / n
        gradient[place] += alpha * temperature * (p_s - p_t) / n
    return (1 - alpha) * hard + alpha * soft, hard, soft, gradient


def gradient_of(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_equals_reference(chunk: int, ignored: bool, masked: bool) -> None:
    student, teacher, labels, mask = make_batch()
    if not ignored:
        labels = labels.clamp(min=0)
    valid = (labels != -100) & mask if masked else labels != -100
    for alpha, normalizer in ((0.0, None), (0.6, None), (1.0, None), (0.6, 17)):
        settings = SETTINGS | {"alpha": alpha, "normalizer": normalizer}
        *expected, gradient = reference(student, teacher, labels, valid, **settings)
        terms = sequence_terms(
            student, teacher, labels, mask=mask if masked else None, chunk=chunk, **settings
        )
        np.testing.assert_allclose([term.item() for term in terms], expected, rtol=1e-12)
        np.testing.assert_allclose(gradient_of(terms.loss, student), gradient, atol=1e-14)
        assert [term.requires_grad for term in terms] == [True, False, False]
        with torch.no_grad():
            no_grad = sequence_terms(
                student, teacher, labels, mask=mask if masked else None, chunk=chunk, **settings
            )
        torch.testing.assert_close(tuple(no_grad), tuple(terms))
        assert not no_grad.loss.requires_grad


def test_a_token_weighs_the_same_in_a_short_row() -> None:
    """Tokens have equal weight: the mean over rows of the rows' means would differ."""
    student, teacher, labels, _ = make_batch()
    whole = sequence_terms(student, teacher, labels, **SETTINGS).loss
    rows = [
        sequence_terms(student[[i]], teacher[[i]], labels[[i]], **SETTINGS).loss for i in range(2)
    ]
    torch.testing.assert_close((3 * rows[0] + 4 * rows[1]) / 7, whole)
    assert abs((rows[0] + rows[1]) / 2 - whole) > 1e-3


@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_a_normalizer_add_up(as_tensor: bool) -> None:
    student, teacher, labels, mask = make_batch()
    whole = sequence_terms(student, teacher, labels, mask=mask, **SETTINGS)
    n = int(((labels != -100) & mask).sum())
    loss = partial(sequence_terms, normalizer=torch.tensor(n) if as_tensor else n, **SETTINGS)
    parts = [
        loss(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], mask=mask[i : i + 1])
        for i in range(BATCH)
    ]
    for name in ("loss", "hard_loss", "soft_loss"):
        torch.testing.assert_close(sum(getattr(p, name) for p in parts), getattr(whole, name))
    expected = gradient_of(whole.loss, student)
    torch.testing.assert_close(gradient_of(parts[0].loss + parts[1].loss, student), expected)


@pytest.mark.parametrize("normalizer", [None, 9])
def test_no_valid_token_gives_0_with_a_graph(normalizer: int | None) -> None:
    student, teacher, labels, mask = make_batch()
    for hidden_by in ({"mask": torch.zeros_like(mask)}, {"labels": torch.full_like(labels, -100)}):
        arguments = {"labels": labels} | hidden_by
        terms = sequence_terms(student, teacher, **arguments, normalizer=normalizer, **SETTINGS)
        assert [term.item() for term in terms] == [0, 0, 0]
        assert not gradient_of(terms.loss, student).any()


def test_what_is_masked_may_be_anything() -> None:
    student, teacher, labels, mask = make_batch()
    expected = sequence_terms(student, teacher, labels, mask=mask, **SETTINGS).loss
    hidden = ~mask | (labels == -100)
    student = student.detach().masked_fill(hidden[..., None], torch.nan).requires_grad_()
    teacher = teacher.masked_fill(hidden[..., None], torch.inf)
    labels = labels.masked_fill(~mask, 10**6)
    loss = sequence_terms(student, teacher, labels, mask=mask, **SETTINGS).loss
    torch.testing.assert_close(loss, expected)
    assert gradient_of(loss, student)[hidden].eq(0).all()


def test_gradient_by_differences_is_had_once() -> None:
    student, teacher, labels, mask = make_batch()

    def loss(logits: Tensor) -> Tensor:
        return sequence_terms(logits, teacher, labels, mask=mask, **SETTINGS).loss

    numeric = torch.zeros_like(student)
    for place in ((0, 2, 1), (1, 1, 0), (0, 0, 0)):
        step = torch.zeros_like(student)
        step[place] = 1e-6
        numeric[place] = (loss(student.detach() + step) - loss(student.detach() - step)) / 2e-6
    gradient = gradient_of(2 * loss(student), student)
    chosen = numeric != 0
    torch.testing.assert_close(gradient[chosen], 2 * numeric[chosen], rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="create_graph must be False for the loss of a sequ"):
        torch.autograd.grad(loss(student), student, create_graph=True)
    value = loss(student)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward must be called once on the loss of a seq"):
        value.backward()


# --- sparse and sampled teachers ---------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 64])
def test_sparse_teacher(chunk: int) -> None:
    student, teacher, labels, mask = make_batch()
    sparse = sparsify(teacher, 3)
    valid = (labels != -100) & mask
    picked = SparseLogits(*(tensor[valid] for tensor in sparse))
    expected = sparse_terms(student[valid], picked, labels[valid], **SETTINGS)
    terms = sequence_terms(student, sparse, labels, mask=mask, chunk=chunk, **SETTINGS)
    torch.testing.assert_close(tuple(terms), tuple(expected))
    torch.testing.assert_close(
        gradient_of(terms.loss, student), gradient_of(expected.loss, student)
    )


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_sampled_targets_give_the_full_loss_on_average(exponent: float) -> None:
    """The mean of 4,000 draws is within 5 standard errors, for loss and each part of gradient."""
    draws, generator = 4000, torch.Generator().manual_seed(0)
    student, teacher, _, _ = make_batch()
    student, teacher = student.detach()[0, :1], teacher[0, :1]  # one token
    settings: dict[str, Any] = {"temperature": 2.0, "alpha": 1.0}
    labels = torch.zeros(1, 1, dtype=torch.int64)
    expected, *_, gradient = reference(
        student[None], teacher[None], labels, labels == 0, **settings
    )
    many = teacher.expand(1, draws, VOCABULARY)
    targets = sampled_targets(many, 3, temperature=2.0, generator=generator, exponent=exponent)
    logits = student.expand(1, draws, VOCABULARY).clone().requires_grad_()
    terms = sequence_terms(logits, targets, labels.expand(1, draws), **settings)
    gradients = gradient_of(terms.loss, logits)[0] * draws
    error = gradients.std(0) / draws**0.5
    assert ((gradients.mean(0) - torch.from_numpy(gradient[0, 0])).abs() < 5 * error + 1e-9).all()
    assert error.max() < 0.05 * np.abs(gradient).max()
    log_p_s = torch.log_softmax(student / 2, -1).expand(draws, -1).gather(1, targets.indices[0])
    losses = 4 * (targets.weights[0] * (targets.log_p[0] - log_p_s)).sum(-1)
    assert losses.mean().item() == pytest.approx(terms.soft_loss.item())
    assert abs(losses.mean().item() - expected) < 5 * losses.std().item() / draws**0.5
    assert losses.std().item() / draws**0.5 < 0.05 * expected


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alone", [False, True])
def test_samples_have_the_gradient_of_the_expression(
    alone: bool, temperature: float, alpha: float, smoothing: float
) -> None:
    """Of classes alone the soft loss is the cross-entropy with them, each of the same weight."""
    student, teacher, labels, mask = make_batch()
    student = student.double().detach().requires_grad_()
    targets = sampled_targets(teacher, 3, temperature=temperature, exponent=0.7)
    weights, log_p = targets.weights, targets.log_p
    if alone:
        targets = SampledTargets(targets.indices, temperature=temperature)
        weights, log_p = torch.tensor(1 / 3), torch.tensor(0.0)
    valid = (labels != -100) & mask
    log_p_s = (student / temperature).log_softmax(-1).gather(-1, targets.indices)
    soft = temperature**2 * (weights * (log_p - log_p_s)).sum(-1)[valid].mean()
    hard = torch.nn.functional.cross_entropy(
        student[valid], labels[valid], label_smoothing=smoothing
    )
    settings: dict[str, Any] = {"temperature": temperature, "alpha": alpha, "mask": mask}
    expected = gradient_of((1 - alpha) * hard + alpha * soft, student)
    for chunk in (2, 64):
        terms = sequence_terms(
            student, targets, labels, label_smoothing=smoothing, chunk=chunk, **settings
        )
        assert terms.hard_loss.item() == pytest.approx(hard.item())
        assert terms.soft_loss.item() == pytest.approx(soft.item())
        np.testing.assert_allclose(gradient_of(terms.loss, student), expected, atol=1e-7)


def test_sampled_targets_are_drawn_from_the_power() -> None:
    logits = torch.tensor([[0.0, 2.0, 4.0]]).expand(20000, 3)
    generator = torch.Generator().manual_seed(1)
    targets = sampled_targets(logits, 1, temperature=2.0, generator=generator, exponent=0.5)
    shares = np.bincount(targets.indices[:, 0]) / 20000
    q = softmax(np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(shares, q, atol=0.015)
    p = softmax(np.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(targets.weights[:, 0], (p / q)[targets.indices[:, 0]], rtol=1e-5)
    np.testing.assert_allclose(targets.log_p[:, 0], np.log(p)[targets.indices[:, 0]], rtol=1e-5)
    again = sampled_targets(
        logits, 1, temperature=2.0, generator=generator.manual_seed(1), exponent=0.5
    )
    assert torch.equal(targets.indices, again.indices)
    assert targets.to("meta").weights.device.type == "meta"


# --- an ensemble -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("masked", [False, True])
def test_members_are_averaged_token_by_token(
    masked: bool, average: Any, weights: list[float] | None
) -> None:
    student, one, labels, mask = make_batch()
    members = torch.stack([one, one.flip(-1), one.roll(1, -1) * 3])
    shares = np.array(weights or [1 / 3] * 3)[:, None, None, None]
    if average == "logits":
        teacher = torch.from_numpy((shares * members.numpy()).sum(0))
    else:  # logits at T that have the mean of the members' probabilities
        p = (shares * softmax(members.numpy() / 3, axis=-1)).sum(0)
        teacher = torch.from_numpy(3 * np.log(p))
    if not masked:
        labels, mask = labels.clamp(min=0), torch.ones_like(mask)
    expected, hard, soft, gradient = reference(
        student, teacher, labels, (labels != -100) & mask, **SETTINGS
    )
    settings = SETTINGS | {"average": average, "weights": weights, "mask": mask, "chunk": 3}
    terms = sequence_terms(student, members, labels, **settings)
    np.testing.assert_allclose([term.item() for term in terms], [expected, hard, soft], rtol=1e-12)
    np.testing.assert_allclose(gradient_of(terms.loss, student), gradient, atol=1e-14)


def test_the_largest_logits_of_members() -> None:
    student, one, labels, mask = make_batch()
    sparse = sparsify(torch.stack([one, one.flip(-1)]), 3)
    valid = (labels != -100) & mask
    picked = SparseLogits(*(tensor[:, valid] for tensor in sparse))
    weights = [0.3, 0.7]
    expected = sparse_terms(student[valid], picked, labels[valid], weights=weights, **SETTINGS)
    terms = sequence_terms(student, sparse, labels, mask=mask, weights=weights, **SETTINGS)
    torch.testing.assert_close(tuple(terms), tuple(expected))
    torch.testing.assert_close(
        gradient_of(terms.loss, student), gradient_of(expected.loss, student)
    )


# --- the fused head ----------------------------------------------------------------------------


def make_head(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return hidden states, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH, LENGTH, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("make_teacher", [lambda z: z, lambda z: sparsify(z, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [3, 64])
def test_fused_head_equals_the_logits(
    chunk: int, with_bias: bool, make_teacher: Callable[[Tensor], Any]
) -> None:
    _, teacher, labels, mask = make_batch()
    hidden, weight, bias = make_head()
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    logits = F.linear(*inputs)
    expected = sequence_terms(logits, make_teacher(teacher), labels, mask=mask, **SETTINGS)
    settings = SETTINGS | {"bias": bias if with_bias else None, "mask": mask, "chunk": chunk}
    actual = linear_sequence_terms(hidden, weight, make_teacher(teacher), labels, **settings)
    torch.testing.assert_close(tuple(actual), tuple(expected))
    torch.testing.assert_close(
        torch.autograd.grad(3 * actual.loss, inputs), torch.autograd.grad(3 * expected.loss, inputs)
    )
    with torch.no_grad():
        no_grad = linear_sequence_terms(hidden, weight, make_teacher(teacher), labels, **settings)
    torch.testing.assert_close(tuple(no_grad), tuple(expected))
    frozen = linear_sequence_terms(
        hidden, weight.detach(), make_teacher(teacher), labels, **settings
    )
    frozen.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_fused_head_in_autocast() -> None:
    _, teacher, labels, _ = make_batch(torch.float32)
    inputs = make_head(torch.float32)
    hidden, weight, bias = inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = sequence_terms(F.linear(*inputs), teacher, labels, **SETTINGS).loss
        actual = linear_sequence_terms(hidden, weight, teacher, labels, bias=bias, **SETTINGS).loss
    torch.testing.assert_close(actual, expected)
    for gradient, other in zip(
        torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other, rtol=0.03, atol=0.005)


def make_linear_teacher(dtype: torch.dtype = torch.float64) -> LinearLogits:
    generator = torch.Generator().manual_seed(2)
    shapes = ((BATCH, LENGTH, WIDTH + 1), (VOCABULARY, WIDTH + 1), (VOCABULARY,))
    return LinearLogits(
        *(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    )


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_teacher_s_head_equals_its_logits(chunk: int) -> None:
    _, _, labels, mask = make_batch()
    inputs, teacher = make_head(), make_linear_teacher()
    for tensor in teacher:
        assert tensor is not None
        tensor.requires_grad_()
    settings = SETTINGS | {"bias": inputs[2], "mask": mask, "chunk": chunk}
    loss = partial(linear_sequence_terms, *inputs[:2], labels=labels, **settings)
    expected, actual = loss(teacher=F.linear(*teacher)), loss(teacher=teacher)
    torch.testing.assert_close(tuple(actual), tuple(expected))
    torch.testing.assert_close(
        torch.autograd.grad(actual.loss, inputs), torch.autograd.grad(expected.loss, inputs)
    )
    assert all(tensor.grad is None for tensor in teacher if tensor is not None)
    assert teacher.to("meta").weight.device.type == "meta"


LIGER_SETTINGS: dict[str, Any] = {"temperature": 3.0, "alpha": 0.6}


@pytest.mark.parametrize("normalizer", [None, 17])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_liger_kernel_has_the_same_loss(
    divergence: Any, with_bias: bool, normalizer: int | None
) -> None:
    """Liger's own code gives the same loss; it runs on a CPU if it is not compiled."""
    pytest.importorskip("liger_kernel")
    _, _, labels, mask = make_batch()
    hidden, weight, bias = (tensor.detach().float().requires_grad_() for tensor in make_head())
    teacher = make_linear_teacher(torch.float32)
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    teacher = teacher if with_bias else teacher._replace(bias=None)
    settings = LIGER_SETTINGS | {"bias": bias if with_bias else None, "mask": mask}
    settings |= {"normalizer": normalizer, "divergence": divergence, "beta": 0.3}
    expected = linear_sequence_terms(hidden, weight, teacher, labels, **settings)
    tokens = sequences._Tokens(
        F.linear(*inputs), teacher, labels, -100, mask,
        sequences._Settings(3.0, 0.6, 0.0, "probabilities", None), normalizer,
        SoftTerm(divergence, 0.3),
    )  # fmt: skip
    actual = sequences._liger_terms(hidden, weight, settings["bias"], teacher, tokens)
    torch.testing.assert_close(tuple(actual), tuple(expected))
    torch.testing.assert_close(
        torch.autograd.grad(2 * actual.loss, inputs), torch.autograd.grad(2 * expected.loss, inputs)
    )


def test_liger_kernel_is_for_gpus_only() -> None:
    hidden, weight, bias = make_head(torch.float32)
    assert not liger_fits(hidden, weight, bias, *make_linear_teacher(torch.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_liger_kernel_is_chosen_where_it_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    called = []
    own = sequences._liger_terms
    monkeypatch.setattr(sequences, "_liger_terms", lambda *a: called.append(1) or own(*a))
    labels = make_batch()[2].cuda()
    hidden, weight, _ = (t.detach().cuda().requires_grad_() for t in make_head(torch.float32))
    teacher = make_linear_teacher(torch.float32).to("cuda")
    loss = partial(linear_sequence_terms, hidden, weight, labels=labels, **LIGER_SETTINGS)
    expected = loss(teacher=F.linear(*teacher))
    assert not called
    torch.testing.assert_close(tuple(loss(teacher=teacher)), tuple(expected))
    assert len(called) == 1
    loss(teacher=teacher, label_smoothing=0.1)
    with torch.no_grad():
        loss(teacher=teacher)
    with torch.autocast("cuda", torch.bfloat16):
        loss(teacher=teacher)
    assert len(called) == 1


# --- precision, edges --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, labels, _ = make_batch(dtype)
    wide = student.detach().float().requires_grad_()
    expected = sequence_terms(wide, teacher.float(), labels, normalizer=10**6, **SETTINGS).loss
    loss = sequence_terms(student, teacher, labels, normalizer=10**6, **SETTINGS).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    # scaled before it is rounded, as a gradient scaler needs it
    gradient = gradient_of(2.0**14 * loss, student)
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient.float(), gradient_of(2.0**14 * expected, wide), rtol=0.02, atol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0"),
        ({"alpha": 2.0}, r"alpha must be in \[0, 1\], got 2"),
        ({"label_smoothing": -1.0}, "label_smoothing must be in"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"normalizer": 0}, "normalizer must be > 0 and finite, got 0"),
        ({"normalizer": float("nan")}, "normalizer must be > 0 and finite, got nan"),
        ({"student_logits": torch.zeros(2, 3)}, r"student_logits must be .* got .*\[2, 3\]"),
        ({"teacher": torch.zeros(2, 5, 8)}, r"teacher must be \[2, 5, 7\].*got \[2, 5, 8\]"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, r"labels must be \[2, 5\], got \[2, 4"),
        (
            {"student_logits": torch.zeros(2, 5, 1), "teacher": torch.zeros(2, 5, 1)},
            r"at least 2 classes, got shape \(2, 5, 1\)",
        ),
        ({"labels": torch.full((2, 5), 7)}, r"labels must be in \[0, 7\), got 7"),
        ({"mask": torch.ones(2, 5)}, r"mask must be bool \[2, 5\], got torch.float32 \[2, 5\]"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask must be bool .*got torch.bool \[5\]"),
        (
            {"teacher": sparsify(torch.zeros(2, 4, 7), 2)},
            r"teacher must have values \[2, 5, 'k'\].*got \[2, 4, 2\]",
        ),
        (
            {"teacher": sparsify(torch.zeros(3, 2, 5, 7), 2), "average": "logits"},
            "average must be 'probabilities' where teacher is SparseLogits of several members",
        ),
        ({"teacher": torch.zeros(3, 1, 2, 5, 7)}, r"teacher must be \[2, 5, 7\].*got \[3, 1, 2, 5"),
        ({"teacher": torch.zeros(0, 2, 5, 7)}, r"each of the members, got \[0, 2, 5, 7\]"),
        ({"weights": [1.0]}, r"weights must be None where teacher is not \[members, \.\.\.\]"),
        (
            {"teacher": torch.zeros(2, 2, 5, 7), "weights": [0.5, 0.6]},
            "weights must be >= 0 and of sum 1, got",
        ),
        (
            {"teacher": LinearLogits(torch.zeros(2, 5, 3), torch.zeros(6, 3))},
            r"teacher must have hidden \[2, 5, 'width'\].*got \[2, 5, 3\] and \[6, 3\]",
        ),
        (
            {"teacher": LinearLogits(torch.zeros(2, 4, 3), torch.zeros(7, 3))},
            r"teacher must have hidden \[2, 5, 'width'\].*got \[2, 4, 3\] and \[7, 3\]",
        ),
        (
            {"teacher": LinearLogits(torch.zeros(2, 5, 3), torch.zeros(7, 3), torch.zeros(6))},
            r"teacher must have bias \[7\], got \[6\]",
        ),
        ({"average": "mean"}, "average must be 'probabilities' or 'logits', got 'mean'"),
        (
            {"teacher": sampled_targets(torch.zeros(2, 5, 7), 2, temperature=1.0)},
            r"temperature must be that of the sampled targets, 1\.0, got 2\.0",
        ),
        (
            {"teacher": sampled_targets(torch.zeros(2, 4, 7), 2, temperature=2.0)},
            r"teacher must be sampled \[2, 5, 'samples'\], got \[\[2, 4, 2\]",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "student_logits": torch.zeros(2, 5, 7), "teacher": torch.zeros(2, 5, 7),
        "labels": torch.zeros(2, 5, dtype=torch.int64), "temperature": 2.0, "alpha": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sequence_terms(**arguments | changes)
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        sequence_terms(**arguments | {"labels": [[0] * 5] * 2})


@pytest.mark.parametrize("kind", ["logits", "members", "largest", "sampled", "head"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_nan_of_the_teacher_is_named_by_its_token(kind: str, with_gradient: bool) -> None:
    student, teacher, labels, mask = make_batch()
    student.requires_grad_(with_gradient)
    head = make_linear_teacher()
    teachers: dict[str, Any] = {
        "logits": teacher,
        "members": torch.stack([teacher, teacher]),
        "largest": sparsify(teacher, 3),
        "sampled": sampled_targets(teacher, 2, temperature=3.0),
        "head": head,
    }
    one = teachers[kind]
    tensor = {"logits": one, "members": one, "head": head.hidden}.get(kind)
    if tensor is None:
        tensor = one.values if kind == "largest" else one.log_p
    tensor[..., 1, 2, 0] = torch.nan
    tensor[..., 0, 1, 0] = torch.nan  # masked
    with pytest.raises(ValueError, match="numbers for soft_loss, got nan in token 2 of row 1"):
        sequence_terms(student, one, labels, mask=mask, chunk=2, **SETTINGS)
    student = student.detach().fill_(torch.nan)
    assert sequence_terms(student, teachers["logits"].nan_to_num(), labels, **SETTINGS)[2].isnan()


def test_heads_and_draws_that_do_not_fit() -> None:
    _, teacher, labels, _ = make_batch()
    hidden, weight, bias = make_head()
    loss = partial(linear_sequence_terms, teacher=teacher, labels=labels, **SETTINGS)
    with pytest.raises(ValueError, match=r"hidden must be .*got \[2, 5, 3\] and \[3, 7\]"):
        loss(hidden, weight.T)
    with pytest.raises(ValueError, match=r"bias must be \[7\], got \[6\]"):
        loss(hidden, weight, bias=bias[:6])
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        sampled_targets(teacher, 0, temperature=1.0)
    with pytest.raises(ValueError, match="exponent must be > 0 and finite, got 0"):
        sampled_targets(teacher, 1, temperature=1.0, exponent=0.0)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        sampled_targets(teacher, 1, temperature=-1.0)


def test_no_chunk_is_larger_than_given(monkeypatch: pytest.MonkeyPatch) -> None:
    _, teacher, labels, mask = make_batch()
    hidden, weight, _ = make_head()
    sizes = []

    def count(logits: Tensor, *args: Any, **settings: Any) -> Any:
        sizes.append(len(logits))
        return terms_of(logits, *args, **settings)

    terms_of = sequences.unchecked_terms
    monkeypatch.setattr(sequences, "unchecked_terms", count)
    linear_sequence_terms(hidden, weight, teacher, labels, mask=mask, chunk=3, **SETTINGS)
    assert sizes == [3, 3]
    assert isinstance(sampled_targets(teacher, 1, temperature=1.0), SampledTargets)


# --- wrong versions are rejected ---------------------------------------------------------------

Loss = Callable[..., Tensor]


def right(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    return sequence_terms(student, teacher, labels, **settings).loss


def check_loss(loss: Loss) -> None:
    """Raise AssertionError unless `loss` is the loss of a sequence."""
    for normalizer in (None, 17):
        student, teacher, labels, mask = make_batch()
        valid = (labels != -100) & mask
        settings = SETTINGS | {"normalizer": normalizer}
        expected, *_, gradient = reference(student, teacher, labels, valid, **settings)
        value = loss(student, teacher.requires_grad_(), labels, mask=mask, **settings)
        np.testing.assert_allclose(value.item(), expected, rtol=1e-9)
        value.backward()
        assert student.grad is not None
        np.testing.assert_allclose(student.grad, gradient, atol=1e-12)
        assert teacher.grad is None, "the teacher got a gradient"
    try:
        loss(student, torch.full_like(teacher, torch.nan), labels, mask=mask, **settings)
    except ValueError:
        return
    raise AssertionError("NaN was accepted")


def naive(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    mask: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    normalizer: float | None,
    wrong: str = "",
) -> Tensor:
    """Return the loss in a few lines, with one thing in it `wrong`."""
    if teacher.isnan().any():
        if wrong != "NaN passes":
            raise ValueError
        teacher = teacher.nan_to_num()
    if wrong != "teacher not detached":
        teacher = teacher.detach()
    valid = (labels != -100) & mask
    valid = {"mask ignored": labels != -100, "ignored labels counted": mask}.get(wrong, valid)
    if wrong == "labels shifted":
        labels = labels.roll(-1, 1)
    if wrong == "students shifted":
        student = student.roll(1, 1)
    t_s = 1.0 if wrong in ("T on the teacher only", "T ignored") else temperature
    t_t = 1.0 if wrong in ("T on the student only", "T ignored") else temperature
    log_p_s, p_t = (student / t_s).log_softmax(-1), (teacher / t_t).softmax(-1)
    if wrong == "softmax over the tokens":
        log_p_s, p_t = (student / t_s).log_softmax(1), (teacher / t_t).softmax(1)
    if wrong == "probabilities for logs":
        log_p_s = log_p_s.exp()
    each = F.kl_div(log_p_s, p_t, reduction="none").sum(-1)
    if wrong == "p and q swapped":
        each = (log_p_s.exp() * (log_p_s - p_t.log())).sum(-1)
    if wrong == "cross-entropy for the divergence":
        each = -(p_t * log_p_s).sum(-1)
    soft = each * temperature ** {"T squared missing": 0, "T once": 1}.get(wrong, 2)
    scaled = student / (temperature if wrong == "T on the labels too" else 1)
    smoothing = 0.0 if wrong == "smoothing left out" else label_smoothing
    hard = F.cross_entropy(
        scaled.mT, labels.clamp(min=0), reduction="none", label_smoothing=smoothing
    )
    if wrong == "weights swapped":
        alpha = 1 - alpha
    n = int(valid.sum()) if normalizer is None or wrong == "normalizer ignored" else normalizer
    if wrong == "mean over all places":
        n = normalizer or labels.numel()
    if wrong == "mean over the vocabulary too":
        n *= student.shape[-1]
    if wrong == "sum over the tokens":
        n = 1
    if wrong == "soft term of padding too":
        return ((1 - alpha) * hard[valid].sum() + alpha * soft[mask].sum()) / n
    if wrong == "normalizer of the labels only":
        return (1 - alpha) * hard[valid].sum() / n + alpha * soft[valid].mean()
    loss = (1 - alpha) * hard + alpha * soft
    if wrong == "mean of the rows' means":
        return torch.stack([row[here].mean() for row, here in zip(loss, valid, strict=True)]).mean()
    return loss[valid].sum() / n


WRONG = (
    "NaN passes",
    "teacher not detached",
    "mask ignored",
    "ignored labels counted",
    "soft term of padding too",
    "labels shifted",
    "students shifted",
    "T squared missing",
    "T once",
    "T on the student only",
    "T on the teacher only",
    "T on the labels too",
    "T ignored",
    "softmax over the tokens",
    "probabilities for logs",
    "p and q swapped",
    "cross-entropy for the divergence",
    "smoothing left out",
    "weights swapped",
    "mean over all places",
    "mean over the vocabulary too",
    "mean of the rows' means",
    "sum over the tokens",
    "normalizer ignored",
    "normalizer of the labels only",
)


@pytest.mark.parametrize("loss", [right, naive])
def test_right_versions_pass_the_check(loss: Loss) -> None:
    check_loss(loss)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_versions_fail_the_check(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_loss(partial(naive, wrong=wrong))
