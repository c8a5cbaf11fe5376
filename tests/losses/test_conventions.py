"""Each line of docs/conventions.md: the published form, written from its formula, is factor x ours.

The factor is read from the page.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import selfkd.losses as losses
from selfkd.losses import ContrastiveMemory, LinearLogits, sparsify

PAGE = Path(__file__).parents[2] / "docs" / "conventions.md"
T, BATCH, CLASSES, TOKENS = 3.0, 4, 5, 6


class Line(NamedTuple):
    """A line of the table: a loss and one published form of it."""

    loss: str
    published_in: str
    factor: str


def lines() -> list[Line]:
    table = PAGE.read_text(encoding="utf-8").partition("|---|")[2].partition("\n\n")[0]
    found = []
    for row in table.splitlines()[1:]:
        name, _, source, _, factor, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        source = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", source)
        found += [Line(loss, source, factor.strip("`")) for loss in re.findall(r"`(\w+)`", name)]
    return found


class Case(NamedTuple):
    """The published form and the loss here, of the same tensors.

    `constant` is what the values may differ by beside the factor, without a gradient.
    """

    published: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]
    student: Tensor
    sizes: dict[str, float]
    constant: float | Tensor = 0.0


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def softmax(logits: Tensor, temperature: float = T) -> Tensor:
    powers = (logits / temperature).exp()
    return powers / powers.sum(-1, keepdim=True)


HINTON = ("distillation_loss", "distillation_terms")
LABELS = torch.tensor([0, 2, 4, 1])
STUDENT, TEACHER = draw(BATCH, CLASSES, seed=1), draw(BATCH, CLASSES, seed=2)
ROWS = range(BATCH)
SIZES = {"batch": BATCH, "classes": CLASSES, "T": T}


def cross_entropy(student: Tensor, soft_targets: Tensor, temperature: float = T) -> Tensor:
    return -(soft_targets * softmax(student, temperature).log()).sum(-1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


# --- of logits ---


def hinton(name: str) -> Case:
    """0.1 CE + 0.9 T^2 times the cross-entropy with soft targets, which is KL plus a constant."""

    def ours(student: Tensor) -> Tensor:
        value = getattr(losses, name)(student, TEACHER, LABELS, temperature=T, alpha=0.9)
        return value if name == "distillation_loss" else value.loss

    def published(student: Tensor) -> Tensor:
        hard = -softmax(student, 1)[ROWS, LABELS].log().mean()
        return 0.1 * hard + 0.9 * T**2 * cross_entropy(student, softmax(TEACHER)).mean()

    constant = 0.9 * T**2 * entropy(softmax(TEACHER)).mean()
    return Case(published, ours, STUDENT, SIZES, constant)


def default_mean(name: str) -> Case:
    """KLDivLoss() as it is: the mean over all elements."""

    def ours(student: Tensor) -> Tensor:
        value = getattr(losses, name)(student, TEACHER, LABELS, temperature=T, alpha=1.0)
        return value if name == "distillation_loss" else value.loss

    p_t = softmax(TEACHER)
    return Case(lambda s: T**2 * (p_t * (p_t / softmax(s)).log()).mean(), ours, STUDENT, SIZES)


def soft_cross_entropy_hinton() -> Case:
    return Case(
        lambda s: T**2 * cross_entropy(s, softmax(TEACHER)).mean(),
        lambda s: losses.soft_cross_entropy(s, TEACHER, temperature=T),
        STUDENT,
        SIZES,
    )


def soft_cross_entropy_tinybert() -> Case:
    return Case(
        lambda s: (-softmax(TEACHER) * softmax(s).log()).mean(),
        lambda s: losses.soft_cross_entropy(s, TEACHER, temperature=T),
        STUDENT,
        SIZES,
    )


def hard_loss() -> Case:
    return Case(
        lambda s: -softmax(s, 1)[ROWS, LABELS].log().mean(),
        lambda s: losses.hard_loss(s, LABELS),
        STUDENT,
        SIZES,
    )


def sparse() -> Case:
    teacher = sparsify(TEACHER, CLASSES)
    return Case(
        lambda s: T**2 * kl(softmax(TEACHER), softmax(s)).mean(),
        lambda s: losses.sparse_terms(s, teacher, LABELS, temperature=T, alpha=1.0).loss,
        STUDENT,
        SIZES,
    )


TOKEN_STUDENT, TOKEN_TEACHER = (draw(BATCH, TOKENS, CLASSES, seed=seed) for seed in (3, 4))
TOKEN_LABELS = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % CLASSES


def tokens(name: str) -> Case:
    """GKD: the divergence of a text is the mean over its tokens, without T^2."""

    def ours(student: Tensor) -> Tensor:
        teacher: Tensor | LinearLogits = TOKEN_TEACHER
        arguments = (student,)
        if name == "linear_sequence_terms":  # logits by an identity head
            arguments = (student, torch.eye(CLASSES, dtype=torch.float64))
        terms = getattr(losses, name)(*arguments, teacher, TOKEN_LABELS, temperature=T, alpha=1.0)
        value: Tensor = terms.loss
        return value

    def published(student: Tensor) -> Tensor:
        return kl(softmax(TOKEN_TEACHER), softmax(student)).mean(1).mean()

    return Case(published, ours, TOKEN_STUDENT, SIZES)


def reverse_kl() -> Case:
    return Case(
        lambda s: kl(softmax(s), softmax(TOKEN_TEACHER)).sum(1).mean(),
        lambda s: losses.reverse_kl(s.flatten(0, 1), TOKEN_TEACHER.flatten(0, 1), temperature=T),
        TOKEN_STUDENT,
        {"tokens": TOKENS, "T": T},
    )


def jensen_shannon() -> Case:
    beta = 0.1

    def published(student: Tensor) -> Tensor:
        p_t, p_s = softmax(TEACHER), softmax(student)
        mixture = beta * p_t + (1 - beta) * p_s
        return (beta * kl(p_t, mixture) + (1 - beta) * kl(p_s, mixture)).mean()

    return Case(
        published,
        lambda s: losses.jensen_shannon(s, TEACHER, temperature=T, beta=beta),
        STUDENT,
        SIZES,
    )


def logit_mse_ba() -> Case:
    return Case(
        lambda s: (s - TEACHER).square().sum() / (2 * BATCH),
        lambda s: losses.logit_mse(s, TEACHER),
        STUDENT,
        SIZES,
    )


def logit_mse_kim() -> Case:
    return Case(
        lambda s: torch.nn.MSELoss()(s, TEACHER),
        lambda s: losses.logit_mse(s, TEACHER),
        STUDENT,
        SIZES,
    )


def dkd() -> Case:
    def published(student: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row, label in enumerate(LABELS.tolist()):
            p_t, p_s = softmax(TEACHER[row]), softmax(student[row])
            b_t, b_s = (torch.stack([p[label], 1 - p[label]]) for p in (p_t, p_s))
            others = [k for k in range(CLASSES) if k != label]
            q_t, q_s = (p[others] / p[others].sum() for p in (p_t, p_s))
            total = total + T**2 * (1 * kl(b_t, b_s) + 8 * kl(q_t, q_s))
        return total / BATCH

    return Case(
        published, lambda s: losses.dkd_loss(s, TEACHER, LABELS, temperature=T), STUDENT, SIZES
    )


def dist() -> Case:
    def correlation(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()

    def published(student: Tensor) -> Tensor:
        p_s, p_t = softmax(student), softmax(TEACHER)
        rows = torch.stack([correlation(p_s[i], p_t[i]) for i in ROWS])
        columns = torch.stack([correlation(p_s[:, k], p_t[:, k]) for k in range(CLASSES)])
        return 2 * T**2 * (1 - rows.mean()) + 2 * T**2 * (1 - columns.mean())

    return Case(
        published,
        lambda s: losses.dist_loss(s, TEACHER, temperature=T, inter_weight=2.0, intra_weight=2.0),
        STUDENT,
        SIZES,
    )


def standardized() -> Case:
    def z_score(logits: Tensor) -> Tensor:
        return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)

    temperature = T * math.sqrt(CLASSES / (CLASSES - 1))
    return Case(
        lambda s: T**2 * kl(softmax(z_score(TEACHER)), softmax(z_score(s))).mean(),
        lambda s: losses.standardized_loss(s, TEACHER, temperature=temperature),
        STUDENT,
        SIZES,
    )


def hard_teacher() -> Case:
    return Case(
        lambda s: -softmax(s, 1)[ROWS, TEACHER.argmax(-1)].log().mean(),
        lambda s: losses.hard_teacher_loss(s, TEACHER),
        STUDENT,
        SIZES,
    )


def confidence_weighted() -> Case:
    confidence = softmax(TEACHER, 1).amax(-1)
    weights = confidence / confidence.sum()
    return Case(
        lambda s: -(weights * softmax(s, 1)[ROWS, LABELS].log()).sum(),
        lambda s: losses.confidence_weighted_loss(s, TEACHER, LABELS),
        STUDENT,
        SIZES,
    )


def multi_label() -> Case:
    def published(student: Tensor) -> Tensor:
        p_s, p_t = student.sigmoid(), TEACHER.sigmoid()
        total = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
        return total.sum() / BATCH

    return Case(
        published,
        lambda s: losses.multi_label_terms(s, TEACHER, None, temperature=1.0, alpha=1.0).loss,
        STUDENT,
        {"labels": CLASSES},
    )


def regression() -> Case:
    return Case(
        lambda s: (s - TEACHER).square().sum(-1).mean(),
        lambda s: losses.regression_terms(s, TEACHER, None, alpha=1.0).loss,
        STUDENT,
        {"values": CLASSES},
    )


# --- of features ---

MAPS, TEACHER_MAPS = (draw(BATCH, 3, 2, 4, seed=seed) for seed in (5, 6))
VECTORS, TEACHER_VECTORS = draw(BATCH, 6, seed=7), draw(BATCH, 3, seed=8)
OTHERS = [(i, j) for i in ROWS for j in ROWS if i != j]


def hint_fitnets() -> Case:
    return Case(
        lambda s: torch.stack(
            [0.5 * torch.linalg.vector_norm(s[i] - TEACHER_MAPS[i]) ** 2 for i in ROWS]
        ).mean(),
        lambda s: losses.hint_loss(s, TEACHER_MAPS),
        MAPS,
        {"elements": MAPS[0].numel()},
    )


def hint_mse() -> Case:
    return Case(
        lambda s: torch.nn.MSELoss()(s, TEACHER_MAPS),
        lambda s: losses.hint_loss(s, TEACHER_MAPS),
        MAPS,
        {},
    )


def attention_vector(features: Tensor) -> Tensor:
    attention = features.square().mean(1).flatten(1)  # as in the authors' code
    return attention / attention.square().sum(1, keepdim=True).sqrt()


def attention_code() -> Case:
    return Case(
        lambda s: (attention_vector(s) - attention_vector(TEACHER_MAPS)).square().mean(),
        lambda s: losses.attention_transfer(s, TEACHER_MAPS),
        MAPS,
        {},
    )


def attention_equation() -> Case:
    teacher = TEACHER_MAPS[:1]
    return Case(
        lambda s: torch.linalg.vector_norm(attention_vector(s) - attention_vector(teacher)),
        lambda s: losses.attention_transfer(s, teacher),
        MAPS[:1],
        {"positions": 8},
    )


def similarity() -> Case:
    def gram(features: Tensor) -> Tensor:
        q = features.flatten(1)
        g = q @ q.T
        return g / g.square().sum(1, keepdim=True).sqrt()

    return Case(
        lambda s: (gram(s) - gram(TEACHER_VECTORS)).square().sum() / BATCH**2,
        lambda s: losses.similarity_preserving(s, TEACHER_VECTORS),
        VECTORS,
        SIZES,
    )


def pkt_sum(features: Tensor, teacher: Tensor) -> Tensor:
    def conditional(x: Tensor, i: int, j: int) -> Tensor:
        return kernel(x, i, j) / sum(kernel(x, i, k) for k in ROWS if k != i)

    def kernel(x: Tensor, i: int, j: int) -> Tensor:
        return (torch.cosine_similarity(x[i], x[j], dim=0) + 1) / 2 + 1e-7

    parts = [
        conditional(teacher, i, j)
        * (conditional(teacher, i, j) / conditional(features, i, j)).log()
        for i, j in OTHERS
    ]
    return torch.stack(parts).sum()


def pkt_paper() -> Case:
    return Case(
        lambda s: pkt_sum(s, TEACHER_VECTORS),
        lambda s: losses.pkt(s, TEACHER_VECTORS),
        VECTORS,
        SIZES,
    )


def pkt_code() -> Case:
    return Case(
        lambda s: pkt_sum(s, TEACHER_VECTORS) / BATCH**2,
        lambda s: losses.pkt(s, TEACHER_VECTORS),
        VECTORS,
        SIZES,
    )


def crd() -> Case:
    images, negatives, dim = 9, 3, 6
    memory = ContrastiveMemory(images, dim, generator=torch.Generator().manual_seed(0))
    memory.student, memory.teacher = draw(images, dim, seed=9), draw(images, dim, seed=10)
    contrast = memory.draw(
        torch.arange(BATCH), negatives=negatives, generator=torch.Generator().manual_seed(1)
    )
    teacher = draw(BATCH, dim, seed=11)
    memory.log_constants = torch.tensor([2.0, 3.0], dtype=torch.float64)

    def side(embeddings: Tensor, bank: Tensor, log_z: float) -> Tensor:
        units = embeddings / embeddings.square().sum(1, keepdim=True).sqrt()
        p = ((bank[contrast] @ units[..., None])[..., 0] / 0.07).exp() / math.exp(log_z)
        noise = negatives / images
        positive, negative = p[:, 0], p[:, 1:]
        log_d1 = (positive / (positive + noise)).log()
        log_d0 = (noise / (negative + noise)).log()
        return -(log_d1.sum() + log_d0.sum()) / BATCH

    return Case(
        lambda s: side(s, memory.teacher, 2.0) + side(teacher, memory.student, 3.0),
        lambda s: losses.crd_loss(s, teacher, memory, contrast),
        VECTORS,
        SIZES,
    )


def huber(u: Tensor) -> Tensor:
    return torch.where(u.abs() <= 1, u.square() / 2, u.abs() - 0.5)


def distance_sum(student: Tensor) -> Tensor:
    def psi(x: Tensor) -> Tensor:
        distances = torch.stack([(x[i] - x[j]).square().sum().sqrt() for i, j in OTHERS])
        return distances / distances.mean()

    return huber(psi(student) - psi(TEACHER_VECTORS)).sum()


def angle_sum(student: Tensor) -> Tensor:
    def angles(x: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0)
                for i, j in OTHERS
                for k in ROWS
                if k not in (i, j)
            ]
        )

    return huber(angles(student) - angles(TEACHER_VECTORS)).sum()


def rkd(ours: Callable[[Tensor, Tensor], Tensor], divisor: float) -> Case:
    total = distance_sum if ours is losses.rkd_distance else angle_sum
    return Case(lambda s: total(s) / divisor, lambda s: ours(s, TEACHER_VECTORS), VECTORS, SIZES)


# --- of transformers' layers ---

STATES, TEACHER_STATES = draw(2, BATCH, TOKENS, 3, seed=12), draw(4, BATCH, TOKENS, 3, seed=13)


def hidden_states() -> Case:
    return Case(
        lambda s: (
            (s[0] - TEACHER_STATES[1]).square().mean() + (s[1] - TEACHER_STATES[3]).square().mean()
        ),
        lambda s: losses.hidden_state_loss(list(s), list(TEACHER_STATES)),
        STATES,
        {"layers": 2},
    )


def attention_matrices() -> Case:
    teacher = draw(BATCH, 2, TOKENS, TOKENS, seed=15)
    return Case(  # the mean over heads of the MSE of each
        lambda s: sum((s[:, h] - teacher[:, h]).square().mean() for h in range(2)) / 2,
        lambda s: losses.attention_matrices(s, teacher),
        draw(BATCH, 2, TOKENS, TOKENS, seed=14),
        {},
    )


def cosine() -> Case:
    ones = torch.ones(BATCH * TOKENS)
    return Case(
        lambda s: torch.nn.CosineEmbeddingLoss()(
            s.flatten(0, 1), TEACHER_STATES[0].flatten(0, 1), ones
        ),
        lambda s: losses.cosine_embedding(s, TEACHER_STATES[0]),
        STATES[0],
        {},
    )


CASES: dict[tuple[str, str], Callable[[], Case]] = {
    **{(name, "Hinton et al. 2015, RepDistiller"): lambda n=name: hinton(n) for name in HINTON},
    **{
        (name, "code with `KLDivLoss()`, such as that of AT, of Tf-KD"): (
            lambda n=name: default_mean(n)
        )
        for name in HINTON
    },
    ("soft_cross_entropy", "Hinton et al. 2015"): soft_cross_entropy_hinton,
    ("soft_cross_entropy", "code of TinyBERT"): soft_cross_entropy_tinybert,
    ("hard_loss", "all"): hard_loss,
    ("sparse_terms", "Hinton et al. 2015"): sparse,
    ("sequence_terms", "GKD, TRL, Liger"): lambda: tokens("sequence_terms"),
    ("linear_sequence_terms", "GKD, TRL, Liger"): lambda: tokens("linear_sequence_terms"),
    ("reverse_kl", "MiniLLM"): reverse_kl,
    ("jensen_shannon", "GKD, TRL"): jensen_shannon,
    ("logit_mse", "Ba and Caruana 2014"): logit_mse_ba,
    ("logit_mse", "code of Kim et al. 2021"): logit_mse_kim,
    ("dkd_loss", "Zhao et al. 2022"): dkd,
    ("dist_loss", "code of DIST"): dist,
    ("standardized_loss", "code of Sun et al. 2024"): standardized,
    ("hard_teacher_loss", "DeiT"): hard_teacher,
    ("confidence_weighted_loss", "Furlanello et al. 2018"): confidence_weighted,
    ("multi_label_terms", "MLD, Yang et al. 2023"): multi_label,
    ("regression_terms", "Chen et al. 2017"): regression,
    ("hint_loss", "FitNets"): hint_fitnets,
    ("hint_loss", "RepDistiller"): hint_mse,
    ("attention_transfer", "code of Zagoruyko and Komodakis 2017, RepDistiller"): attention_code,
    ("attention_transfer", "their equation 2, for one sample"): attention_equation,
    ("similarity_preserving", "Tung and Mori 2019, RepDistiller"): similarity,
    ("pkt", "Passalis and Tefas 2018"): pkt_paper,
    ("pkt", "their code, RepDistiller"): pkt_code,
    ("crd_loss", "CRD, RepDistiller"): crd,
    ("rkd_distance", "Park et al. 2019"): lambda: rkd(losses.rkd_distance, 1),
    ("rkd_distance", "their code, RepDistiller"): lambda: rkd(losses.rkd_distance, BATCH**2),
    ("rkd_angle", "Park et al. 2019"): lambda: rkd(losses.rkd_angle, 1),
    ("rkd_angle", "their code, RepDistiller"): lambda: rkd(losses.rkd_angle, BATCH**3),
    ("hidden_state_loss", "TinyBERT"): hidden_states,
    ("attention_matrices", "TinyBERT"): attention_matrices,
    ("cosine_embedding", "DistilBERT"): cosine,
}


def test_each_line_has_its_published_form() -> None:
    assert {(line.loss, line.published_in) for line in lines()} == set(CASES)


@pytest.mark.parametrize("line", lines(), ids=lambda line: f"{line.loss}, {line.published_in}")
def test_the_published_loss_is_the_factor_times_ours(line: Line) -> None:
    case = CASES[line.loss, line.published_in]()
    ours, our_gradient = value_and_gradient(case.ours, case.student)
    published, gradient = value_and_gradient(case.published, case.student)
    names = {**vars(math), **case.sizes, "loss": ours.item()}
    factor = eval(line.factor, {"__builtins__": {}}, names)
    torch.testing.assert_close(published - case.constant, factor * ours)
    if "loss" not in line.factor:
        torch.testing.assert_close(gradient, factor * our_gradient)
    assert ours.item() > 0


def value_and_gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def test_every_public_loss_has_a_line() -> None:
    public = {
        name
        for name, value in vars(losses).items()
        if inspect.isfunction(value) and re.search(r"Returns:\n\s+Scalar", value.__doc__ or "")
    }
    assert public == {line.loss for line in lines()}


@pytest.mark.parametrize("name", sorted({line.loss for line in lines()}))
def test_each_docstring_says_its_factors(name: str) -> None:
    text = " ".join((getattr(losses, name).__doc__ or "").split())
    for line in lines():
        if line.loss == name and line.factor == "1":
            assert re.search(r"[Pp]ublished weights? holds? ", text), line
        elif line.loss == name:
            assert f"`{line.factor}` times this" in text, line


@pytest.mark.parametrize(
    ("factor", "weight", "sizes", "here"),
    [
        ("(classes - 1) / classes", 9, {"classes": 100}, 8.91),
        ("1 / batch", 30_000, {"batch": 64}, 469),
        ("(batch - 1) / batch", 25, {"batch": 64}, 24.6),
        ("(batch - 1) / batch", 1, {"batch": 128}, 0.99),
        ("(batch - 1) * (batch - 2) / batch ** 2", 50, {"batch": 64}, 47.7),
        ("(batch - 1) * (batch - 2) / batch ** 2", 1, {"batch": 128}, 0.98),
    ],
)
def test_the_converted_weights_are_those_of_the_page(
    factor: str, weight: float, sizes: dict[str, float], here: float
) -> None:
    assert factor in {line.factor for line in lines()}
    converted = weight * eval(factor, {"__builtins__": {}}, sizes)
    assert converted == pytest.approx(here, abs=0.5 * 10 ** -len(str(here).partition(".")[2]))


def test_the_code_of_pkt_is_that_much_less_at_a_batch_of_64() -> None:
    """With each sample beside itself, 3 % less than the line says."""
    student, teacher = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)).double()

    def probabilities(x: Tensor) -> Tensor:
        units = x / x.square().sum(1, keepdim=True).sqrt()
        kernel = (units @ units.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)

    p_s, p_t = probabilities(student), probabilities(teacher)
    code = (p_t * (p_t / p_s).log()).mean()
    assert (code / (losses.pkt(student, teacher) / 64)).item() == pytest.approx(0.97, abs=0.002)
