"""Relational losses against NumPy in float64, their edges and wrong versions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.relations import rkd_angle, rkd_distance

Array = np.ndarray
Loss = Callable[[Tensor, Tensor], Tensor]
SHAPES = ((3, 1, 1), (4, 2, 5), (6, 7, 3), (9, 40, 2))  # batch, dim of the student, of the teacher


# --- the formulas ------------------------------------------------------------------------------


def huber(u: float) -> float:
    return u**2 / 2 if abs(u) <= 1 else abs(u) - 0.5


def distance_reference(s: Array, t: Array) -> float:
    pairs = list(itertools.permutations(range(len(s)), 2))
    psi = []
    for x in (s, t):
        distances = np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs])
        psi.append(distances / (distances.mean() if distances.any() else 1.0))
    return np.mean([huber(u) for u in psi[0] - psi[1]])


def unit(v: Array) -> Array:
    return v / (np.linalg.norm(v) or 1.0)


def angle_reference(s: Array, t: Array) -> float:
    terms = []
    for i, j, k in itertools.permutations(range(len(s)), 3):
        cosines = [unit(x[i] - x[j]) @ unit(x[k] - x[j]) for x in (s, t)]
        terms.append(huber(cosines[0] - cosines[1]))
    return np.mean(terms)


LOSSES = {"rkd_distance": rkd_distance, "rkd_angle": rkd_angle}
REFERENCES = {"rkd_distance": distance_reference, "rkd_angle": angle_reference}
each_loss = pytest.mark.parametrize("name", LOSSES)


def make_batch(
    batch: int = 6, dim: int = 7, teacher_dim: int = 3, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return heavy-tailed student embeddings that require a gradient and teacher embeddings."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    teacher = torch.randn(batch, teacher_dim, generator=generator, dtype=torch.float64)
    student[0] *= 20  # differences above 1, where huber is linear
    return student.requires_grad_(), 5 + teacher


def expect(name: str, student: Tensor, teacher: Tensor) -> float:
    return REFERENCES[name](*(x.detach().double().numpy() for x in (student, teacher)))


def gradient_of(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


# --- against the reference ---------------------------------------------------------------------


@each_loss
def test_a_common_offset_does_not_cost_digits(name: str) -> None:
    # whole numbers, exact with the offset too
    student, teacher = ((10 * x.detach()).round().float() for x in make_batch())
    gradients = []
    for offset in (0, 2**20):
        moved = (student + offset).requires_grad_()
        gradients.append(gradient_of(LOSSES[name](moved, teacher), moved))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


@each_loss
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_in_float64(name: str, shape: tuple[int, int, int]) -> None:
    student, teacher = make_batch(*shape)
    loss = LOSSES[name](student, teacher)
    assert loss.shape == ()
    np.testing.assert_allclose(loss.item(), expect(name, student, teacher), rtol=1e-11)


@each_loss
def test_float32_equals_reference(name: str) -> None:
    student, teacher = make_batch(12, 500, 30)
    student, teacher = 1e4 + student.detach().float(), teacher.float()
    loss = LOSSES[name](student, teacher)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), expect(name, student, teacher), rtol=1e-4)


@each_loss
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(name: str, shape: tuple[int, int, int]) -> None:
    student, teacher = make_batch(*shape)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher), (student,))


@each_loss
def test_gradient_in_float32(name: str) -> None:
    student, teacher = make_batch(16, 200, 30)
    narrow = (student.detach().float() + 100).requires_grad_()
    gradient = gradient_of(LOSSES[name](narrow, teacher.float()), narrow)
    wide = narrow.detach().double().requires_grad_()
    expected = gradient_of(LOSSES[name](wide, teacher.float()), wide)
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=atol)


def test_gradient_may_be_computed_twice_and_scaled() -> None:
    student, teacher = make_batch()
    loss = rkd_distance(student, teacher)
    expected = gradient_of(loss, student)
    loss = rkd_distance(student, teacher)
    first = torch.autograd.grad(3 * loss, student, retain_graph=True)[0]
    torch.testing.assert_close(first, 3 * expected)
    torch.testing.assert_close(gradient_of(loss, student), expected)


# --- points that coincide, small batches -------------------------------------------------------


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_coinciding_points_are_finite(name: str, dtype: torch.dtype) -> None:
    student, teacher = make_batch(7, 5, 3)
    student, teacher = student.detach().to(dtype), teacher.to(dtype)
    student[2], student[5], teacher[4] = student[1], student[1], teacher[3]
    student.requires_grad_()
    loss = LOSSES[name](student, teacher)
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(loss.item(), expect(name, student, teacher), rtol=rtol)
    gradient = gradient_of(loss, student)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10


@each_loss
def test_points_that_all_coincide_have_no_gradient(name: str) -> None:
    _, teacher = make_batch(5)
    student = torch.full((5, 3), 1 / 3, requires_grad=True)
    loss = LOSSES[name](student, teacher.float())
    np.testing.assert_allclose(loss.item(), expect(name, student, teacher), rtol=1e-5)
    assert not gradient_of(loss, student).any()
    constant_teacher = LOSSES[name](teacher.requires_grad_(), student)
    assert gradient_of(constant_teacher, teacher).isfinite().all()


@pytest.mark.parametrize(
    ("name", "batch"), [("rkd_distance", 1), ("rkd_angle", 1), ("rkd_angle", 2)]
)
def test_batches_too_small_have_a_loss_of_0_with_a_graph(name: str, batch: int) -> None:
    student, teacher = make_batch(batch)
    loss = LOSSES[name](student, teacher)
    assert loss == 0
    gradient = gradient_of(loss, student)
    assert gradient.shape == student.shape
    assert not gradient.any()


def test_one_pair_has_no_loss_of_distances() -> None:
    student, teacher = make_batch(2)
    loss = rkd_distance(student, teacher)
    assert loss == 0
    assert gradient_of(loss, student).abs().max() < 1e-15


# --- precision, invariances --------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = (x.detach().to(dtype) for x in make_batch(8, 100, 20))
    student.requires_grad_()
    wide = student.detach().float().requires_grad_()
    expected = LOSSES[name](wide, teacher.float())
    with torch.autocast("cpu", dtype=dtype):
        loss = LOSSES[name](student, teacher)
    assert loss.dtype == torch.float32
    assert loss == expected
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, wide).to(dtype))


@each_loss
def test_blind_to_similarities_and_order(name: str) -> None:
    student, teacher = make_batch()
    loss = LOSSES[name]
    expected = loss(student, teacher)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    moved = 30 * student @ rotation + torch.randn(7)
    torch.testing.assert_close(loss(moved, 0.01 * teacher - 4), expected)
    order = torch.randperm(6)
    torch.testing.assert_close(loss(student[order], teacher[order]), expected)
    same = loss(moved, student)
    assert abs(same.item()) < 1e-14
    assert gradient_of(same, student).abs().max() < 1e-14


@each_loss
def test_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = make_batch()
    LOSSES[name](student, teacher.requires_grad_()).backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None


@each_loss
def test_teacher_is_not_written_to(name: str) -> None:
    student, teacher = make_batch()
    copies = student.detach().clone(), teacher.clone()
    LOSSES[name](student, teacher)
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])


@each_loss
def test_compiles_whole(name: str) -> None:
    student, teacher = make_batch()
    loss = LOSSES[name]
    expected = loss(student, teacher)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(student, teacher)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient_of(compiled, student), gradient_of(expected, student))


# --- edges -------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.zeros(4), torch.zeros(4, 2), r"student_embeddings must be \[batch, dim\].*\(4,\)"),
        (torch.zeros(4, 0), torch.zeros(4, 2), r"student_embeddings must be .*shape \(4, 0\)"),
        (torch.zeros(4, 3), torch.zeros(2, 4, 3), r"teacher_embeddings must .*\(2, 4, 3\)"),
        (torch.zeros(4, 3), torch.zeros(5, 3), "teacher_embeddings must have 4 rows.*got 5"),
        (
            torch.zeros(2, 2),
            torch.tensor([[0.0, 1.0], [1.0, torch.nan]]),
            "teacher_embeddings must be finite, got nan in row 1",
        ),
    ],
)
def test_embeddings_that_do_not_fit(
    name: str, student: Tensor, teacher: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LOSSES[name](student, teacher)


@each_loss
def test_types_that_do_not_fit(name: str) -> None:
    student, teacher = make_batch()
    with pytest.raises(TypeError, match=r"student_embeddings must be floating.*got torch.int64"):
        LOSSES[name](student.long(), teacher)
    with pytest.raises(TypeError, match=r"teacher_embeddings must be floating.*got torch.int64"):
        LOSSES[name](student, teacher.long())


# --- wrong versions are rejected ---------------------------------------------------------------


def check_loss(name: str, loss: Loss) -> None:
    """Raise AssertionError unless `loss` is the loss of that name."""
    for coincide in (False, True):
        student, teacher = make_batch(6, 4, 3)
        student, teacher = student.detach(), teacher.requires_grad_()
        if coincide:
            student[2] = student[3]
        value = loss(student.requires_grad_(), teacher)
        np.testing.assert_allclose(value.item(), expect(name, student, teacher), rtol=1e-9)
        value.backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert student.grad.abs().max() < 10
        assert teacher.grad is None, "the teacher got a gradient"
    try:
        loss(student, torch.full_like(teacher, torch.nan))
    except ValueError:
        return
    raise AssertionError("NaN was accepted")


def naive(s: Tensor, t: Tensor, *, name: str, wrong: str = "") -> Tensor:
    """Return one of the losses in a few lines, with one thing in it `wrong`."""
    if wrong != "NaN passes" and t.isnan().any():
        raise ValueError
    values = naive_distances if name == "rkd_distance" else naive_cosines
    psi_s, psi_t = (
        values(s, wrong),
        values(t if wrong == "teacher not detached" else t.detach(), wrong),
    )
    batch, order = len(s), 2 if name == "rkd_distance" else 3
    if wrong == "squared error":
        return F.mse_loss(psi_s, psi_t)
    if wrong == "mean with the diagonal":
        return F.smooth_l1_loss(psi_s, psi_t, reduction="sum") / batch**order
    if wrong == "sum":
        return F.smooth_l1_loss(psi_s, psi_t, reduction="sum")
    return F.smooth_l1_loss(psi_s, psi_t)


def naive_distances(x: Tensor, wrong: str) -> Tensor:
    different = ~torch.eye(len(x), dtype=torch.bool)
    squares = (x[:, None] - x).square().sum(-1)[different]
    if wrong == "squared distances":
        return squares / squares.mean()
    if wrong == "gradient of sqrt at 0":
        distances = squares.sqrt()
    else:
        distances = squares.where(squares > 0, 1).sqrt() * (squares > 0)
    if wrong == "not normalised":
        return distances
    if wrong == "by the largest":
        return distances / distances.max()
    if wrong == "by the mean with the diagonal":
        return distances / (distances.sum() / len(x) ** 2)
    return distances / distances.mean()


def naive_cosines(x: Tensor, wrong: str) -> Tensor:
    batch = len(x)
    difference = x - x[:, None]
    squares = difference.square().sum(-1, keepdim=True)
    if wrong == "normalised by an epsilon":
        units = F.normalize(difference, dim=-1)
    elif wrong == "not normalised":
        units = difference
    else:
        units = difference / squares.where(squares > 0, torch.inf).sqrt()
    if wrong == "angle at the origin":
        units = F.normalize(x, dim=-1).expand(batch, -1, -1)
    cosines = torch.einsum("jid,jkd->jik", units, units)
    j, i, k = torch.meshgrid(*[torch.arange(batch)] * 3, indexing="ij")
    if wrong == "i = k a triplet":
        return cosines[(i != j) & (k != j)]
    return cosines[(i != j) & (k != j) & (i != k)]


ANY = ("NaN passes", "teacher not detached", "squared error", "mean with the diagonal", "sum")
WRONG = {
    "rkd_distance": (
        *ANY,
        "squared distances",
        "not normalised",
        "by the largest",
        "by the mean with the diagonal",
        "gradient of sqrt at 0",
    ),
    "rkd_angle": (
        *ANY,
        "not normalised",
        "normalised by an epsilon",
        "angle at the origin",
        "i = k a triplet",
    ),
}


@each_loss
def test_right_versions_pass_the_check(name: str) -> None:
    check_loss(name, LOSSES[name])
    check_loss(name, partial(naive, name=name))


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name in WRONG for wrong in WRONG[name]]
)
def test_wrong_versions_fail_the_check(name: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_loss(name, partial(naive, name=name, wrong=wrong))
