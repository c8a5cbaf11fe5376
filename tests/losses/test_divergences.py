"""Divergences of token losses against plain autograd, and TRL's tests of the same divergences."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses import jensen_shannon, reverse_kl, sampled_targets, sparsify
from selfkd.losses.sequences import LinearLogits, linear_sequence_terms, sequence_terms

BATCH, LENGTH, VOCABULARY, WIDTH = 2, 5, 9, 3
DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("js", 0.5), ("js", 0.1), ("js", 0.9)]
only_soft = partial(sequence_terms, temperature=1.0, alpha=1.0)


def make(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_labels() -> Tensor:
    labels = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % VOCABULARY
    labels[0, 1] = labels[1, 4] = -100
    return labels


def plain(
    z_s: Tensor, z_t: Tensor, labels: Tensor, divergence: str, beta: float, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return hard and soft loss by the formulas, at T = 2 and with label smoothing 0.1."""
    z_s, z_t, labels = z_s[labels != -100], z_t[..., labels != -100, :], labels[labels != -100]
    hard = F.cross_entropy(z_s, labels, label_smoothing=0.1)
    p_s, p_t = (F.softmax(z[..., :size] / 2, dim=-1) for z in (z_s, z_t))
    p_t = p_t.mean(0) if p_t.ndim == 3 else p_t
    m = beta * p_t + (1 - beta) * p_s
    forward, backward = p_t * (p_t / p_s).log(), p_s * (p_s / p_t).log()
    mixed = beta * p_t * (p_t / m).log() + (1 - beta) * p_s * (p_s / m).log()
    soft = {"forward_kl": forward, "reverse_kl": backward, "js": mixed}[divergence]
    return hard, 4 * soft.sum(-1).mean()


@pytest.mark.parametrize("members", [(), (3,)])
@pytest.mark.parametrize("size", [None, 6])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_value_and_gradient_are_those_of_plain_autograd(
    divergence: Any, beta: float, size: int | None, members: tuple[int, ...]
) -> None:
    student = make(BATCH, LENGTH, VOCABULARY).requires_grad_()
    classes = VOCABULARY if size is None else 7  # of another size than the student, and cut too
    teacher, labels = make(*members, BATCH, LENGTH, classes, seed=1), make_labels()
    for alpha in (0.0, 0.6, 1.0):
        hard, soft = plain(student, teacher, labels, divergence, beta, size)
        loss = (1 - alpha) * hard + alpha * soft
        (gradient,) = torch.autograd.grad(loss, student)
        terms = sequence_terms(
            student, teacher, labels, temperature=2.0, alpha=alpha, label_smoothing=0.1,
            divergence=divergence, beta=beta, vocabulary=size, chunk=3,
        )  # fmt: skip
        torch.testing.assert_close(tuple(terms), (loss, hard, soft))
        (found,) = torch.autograd.grad(terms.loss, student)
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("size", [None, 6])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_linear_heads_have_the_same_terms(divergence: Any, beta: float, size: int | None) -> None:
    inputs = [make(BATCH, LENGTH, WIDTH), make(VOCABULARY, WIDTH, seed=1), make(VOCABULARY, seed=2)]
    hidden, weight, bias = (tensor.requires_grad_() for tensor in inputs)
    classes = VOCABULARY if size is None else 7
    teacher = LinearLogits(
        make(BATCH, LENGTH, WIDTH, seed=3), make(classes, WIDTH, seed=4), make(classes, seed=5)
    )
    settings: dict[str, Any] = {
        "temperature": 2.0, "alpha": 0.6, "divergence": divergence, "beta": beta,
        "vocabulary": size, "chunk": 3,
    }  # fmt: skip
    labels = make_labels()
    found = linear_sequence_terms(hidden, weight, teacher, labels, bias=bias, **settings)
    expected = sequence_terms(
        F.linear(hidden, weight, bias), F.linear(*teacher), labels, **settings
    )
    torch.testing.assert_close(tuple(found), tuple(expected))
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, inputs), torch.autograd.grad(expected.loss, inputs)
    )


def test_rows_have_the_losses_of_classifiers() -> None:
    student, teacher = make(4, VOCABULARY), make(4, VOCABULARY, seed=1)
    labels = torch.zeros(4, 1, dtype=torch.int64)
    soft = partial(
        sequence_terms, student[:, None], teacher[:, None], labels, temperature=3.0, alpha=1.0
    )
    torch.testing.assert_close(
        soft(divergence="reverse_kl").loss, reverse_kl(student, teacher, temperature=3.0)
    )
    torch.testing.assert_close(
        soft(divergence="js", beta=0.2).loss,
        jensen_shannon(student, teacher, temperature=3.0, beta=0.2),
    )


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_masked_and_saturated_classes_have_no_nan(divergence: Any, beta: float) -> None:
    student = torch.tensor([[[2000.0, 0.0, -torch.inf]]], requires_grad=True)
    teacher, label = torch.tensor([[[0.0, 2000.0, -torch.inf]]]), torch.tensor([[0]])
    loss = only_soft(student, teacher, label, divergence=divergence, beta=beta).loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert loss > 0.1
    teacher[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="teacher must have numbers for soft_loss, got nan"):
        only_soft(student, teacher, label, divergence=divergence, beta=beta)


class TestGeneralizedJSDLoss:
    """Cases of TRL's tests/experimental/test_gkd_trainer.py, class TestGeneralizedJSDLoss.

    TRL divides its sums by the batch, here by the tokens; it has no T^2.
    """

    student_logits, teacher_logits = make(2, 3, 5).float(), make(2, 3, 5, seed=1).float()

    @staticmethod
    def loss(
        student: Tensor, teacher: Tensor, *, beta: float = 0.5, temperature: float = 1.0
    ) -> float:
        labels = torch.zeros(student.shape[:2], dtype=torch.int64)
        loss = sequence_terms(
            student, teacher, labels, temperature=temperature, alpha=1.0, divergence="js", beta=beta
        ).loss
        return loss.item() / temperature**2

    def test_uniform_distribution(self) -> None:
        logits = torch.ones(1, 1, 5)
        assert self.loss(logits, logits) == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize("beta", [0, 1])
    def test_edge_cases(self, beta: int) -> None:
        student = torch.tensor([[[0.1, 0.9]]]).log()
        teacher = torch.tensor([[[0.9, 0.1]]]).log()
        log_q, log_p = (student, teacher) if beta == 0 else (teacher, student)
        expected = F.kl_div(log_q[0], log_p[0].exp(), reduction="batchmean").item()
        assert expected == pytest.approx(1.7577797, abs=1e-6)  # 0.8 ln 9
        assert self.loss(student, teacher, beta=beta) == pytest.approx(expected, abs=1e-5)

    def test_directions_of_the_ends(self) -> None:
        """The golden values of a port of the same loss: beta 0 is forward, 1 is reverse KL."""
        student, teacher = torch.tensor([[[0.8, 0.2]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
        forward = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
        backward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
        assert self.loss(student, teacher, beta=0) == pytest.approx(forward, rel=1e-5)
        assert self.loss(student, teacher, beta=1) == pytest.approx(backward, rel=1e-5)

    def test_values_of_beta_and_temperature_differ(self) -> None:
        both = self.student_logits, self.teacher_logits
        assert self.loss(*both, beta=0) != self.loss(*both, beta=1)
        assert self.loss(*both, temperature=1) != self.loss(*both, temperature=2)

    def test_symmetry(self) -> None:
        both = self.student_logits, self.teacher_logits
        swapped = both[::-1]
        assert self.loss(*both, beta=0.1) != pytest.approx(self.loss(*swapped, beta=0.1))
        assert self.loss(*both, beta=0.5) == pytest.approx(self.loss(*swapped, beta=0.5))

    def test_zero_loss_for_identical_inputs(self) -> None:
        for beta in (0, 0.1, 0.5, 1):
            same = self.loss(self.student_logits, self.student_logits, beta=beta)
            assert same == pytest.approx(0, abs=1e-6)

    def test_ignored_tokens_are_left_out(self) -> None:
        """TRL masks labels of -100 and divides by the others."""
        labels = torch.tensor([[0, -100, 0], [-100, 0, -100]])
        soft = partial(sequence_terms, temperature=1.0, alpha=1.0, divergence="js")
        both = self.student_logits, self.teacher_logits
        whole = soft(*both, labels).loss
        kept = (labels != -100).nonzero().tolist()
        single = [
            soft(*(z[i : i + 1, j : j + 1] for z in both), torch.zeros(1, 1).long()).loss
            for i, j in kept
        ]
        torch.testing.assert_close(whole, torch.stack(single).mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "kl"}, "divergence must be 'forward_kl', 'reverse_kl' or 'js', got 'kl'"),
        ({"divergence": "js", "beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"divergence": "js", "beta": math.nan}, r"beta must be in \[0, 1\], got nan"),
        ({"vocabulary": 1}, "vocabulary must be at least 2, got 1"),
        ({"vocabulary": 8}, "at most that of the student, 9, and of the teacher, 7, got 8"),
        ({}, r"teacher must be \[2, 5, 9\] as the student's logits are"),
    ],
)
def test_faults_are_refused(settings: dict[str, Any], message: str) -> None:
    student, teacher = make(BATCH, LENGTH, VOCABULARY), make(BATCH, LENGTH, 7)
    with pytest.raises(ValueError, match=message):
        only_soft(student, teacher, make_labels(), **settings)


@pytest.mark.parametrize("kind", ["SparseLogits", "SampledTargets"])
def test_part_of_the_teacher_has_the_forward_divergence_only(kind: str) -> None:
    student, logits = make(BATCH, LENGTH, VOCABULARY), make(BATCH, LENGTH, VOCABULARY)
    teacher: Any = sparsify(logits, 3)
    if kind == "SampledTargets":
        teacher = sampled_targets(logits, 3, temperature=1.0)
    message = f"divergence must be 'forward_kl' where teacher is {kind}, got 'js': others need full"
    with pytest.raises(ValueError, match=message):
        only_soft(student, teacher, make_labels(), divergence="js")
    with pytest.raises(ValueError, match=f"vocabulary must be None where teacher is {kind}, got 8"):
        only_soft(student, teacher, make_labels(), vocabulary=8)
