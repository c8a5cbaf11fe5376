"""Losses of intermediate features against NumPy in float64, their edges and wrong versions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import pair, randn
from scipy.special import rel_entr
from torch import Tensor

from selfkd.losses.features import (
    Projection,
    attention_matrices,
    attention_transfer,
    cosine_embedding,
    every_other,
    hidden_state_loss,
    hint_loss,
    pkt,
    reconcile,
    similarity_preserving,
)

Loss = Callable[[Tensor, Tensor], Tensor]
Array = np.ndarray
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])


def as_list(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, **settings: Any) -> Any:
    """Return `hidden_state_loss` of two tensors whose first dimension is the layer."""
    return loss(list(student), list(teacher), **settings)


# name -> loss, shape of the student, shape of the teacher
LOSSES: dict[str, tuple[Loss, tuple[int, ...], tuple[int, ...]]] = {
    "hint": (hint_loss, (3, 4, 5), (3, 4, 5)),
    "attention_transfer": (attention_transfer, (3, 2, 4, 6), (3, 5, 4, 6)),
    "attention_transfer 1": (partial(attention_transfer, power=1), (3, 2, 4, 4), (3, 5, 2, 4)),
    "attention_transfer 1.5": (partial(attention_transfer, power=1.5), (3, 2, 4, 4), (3, 5, 4, 4)),
    "similarity_preserving": (similarity_preserving, (5, 3, 2, 2), (5, 7)),
    "pkt": (pkt, (5, 3, 2), (5, 7)),
    "hidden_state": (partial(as_list, hidden_state_loss), (2, 3, 5, 4), (4, 3, 5, 4)),
    "hidden_state masked": (
        partial(as_list, hidden_state_loss, mask=MASK), (2, 3, 5, 4), (4, 3, 5, 4)
    ),
    "cosine": (cosine_embedding, (3, 5, 4), (3, 5, 4)),
    "cosine masked": (partial(cosine_embedding, mask=MASK), (3, 5, 4), (3, 5, 4)),
    "matrices": (attention_matrices, (3, 2, 5, 5), (3, 2, 5, 5)),
    "matrices masked": (partial(attention_matrices, mask=MASK), (3, 2, 5, 5), (3, 4, 5, 5)),
}  # fmt: skip
every_loss = pytest.mark.parametrize("name", LOSSES)


def make(name: str, *, seed: int = 0) -> tuple[Loss, Tensor, Tensor]:
    loss, student, teacher = LOSSES[name]
    return loss, *pair(student, teacher, seed=seed)


# --- against the reference ---------------------------------------------------------------------


def reference_attention(features: Array, power: float, size: tuple[int, int] | None) -> Array:
    maps = (np.abs(features) ** power).sum(1)
    if size:
        batch, height, width = maps.shape
        steps = height // size[0], width // size[1]
        maps = maps.reshape(batch, size[0], steps[0], size[1], steps[1]).mean((2, 4))
    flat = maps.reshape(len(maps), -1)
    return flat / np.sqrt((flat**2).sum(1, keepdims=True))


def reference_gram(features: Array) -> Array:
    rows = features.reshape(len(features), -1)
    gram = rows @ rows.T
    return gram / np.linalg.norm(gram, axis=1, keepdims=True)


def reference_neighbours(features: Array) -> list[Array]:
    """Return the probabilities of the other samples, row by row."""
    rows = features.reshape(len(features), -1)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    kernel = (1 + units @ units.T) / 2 + 1e-7
    others = [np.delete(row, i) for i, row in enumerate(kernel)]
    return [row / row.sum() for row in others]


def reference(name: str, s: Array, t: Array) -> float:
    kind, _, detail = name.partition(" ")
    mask = MASK.numpy().astype(bool)
    if detail != "masked":
        mask = np.ones_like(mask)
    if kind == "hint":
        return ((s - t) ** 2).mean()
    if kind == "attention_transfer":
        power = float(detail or 2)
        size = None if s.shape[2:] == t.shape[2:] else (2, 4)
        q_s = reference_attention(s, power, size)
        return ((q_s - reference_attention(t, power, size)) ** 2).sum() / q_s.size
    if kind == "similarity_preserving":
        return np.linalg.norm(reference_gram(s) - reference_gram(t), "fro") ** 2 / len(s) ** 2
    if kind == "pkt":
        pairs = zip(reference_neighbours(s), reference_neighbours(t), strict=True)
        return float(np.mean([rel_entr(p_t, p_s).sum() for p_s, p_t in pairs]))
    if kind == "hidden_state":
        squares = [((s[i][mask] - t[j][mask]) ** 2).mean() for i, j in ((0, 1), (1, 3))]
        return float(np.mean(squares))
    if kind == "cosine":
        u, v = s[mask], t[mask]
        cosines = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
        return float(np.mean(1 - cosines))
    if s.shape[1] != t.shape[1]:
        s, t = s.mean(1, keepdims=True), t.mean(1, keepdims=True)
    squares = [
        ((a[head][valid][:, valid] - b[head][valid][:, valid]) ** 2).ravel()
        for a, b, valid in zip(s, t, mask, strict=True)
        for head in range(s.shape[1])
    ]
    return float(np.concatenate(squares).mean())


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_equals_reference_in_float64(name: str, seed: int) -> None:
    loss, student, teacher = make(name, seed=seed)
    expected = reference(name, student.detach().numpy(), teacher.numpy())
    assert expected > 0
    np.testing.assert_allclose(loss(student, teacher).item(), expected, rtol=1e-10)


@every_loss
def test_gradcheck(name: str) -> None:
    loss, student, teacher = make(name)
    assert torch.autograd.gradcheck(lambda features: loss(features, teacher), student)


@pytest.mark.parametrize("name", ["similarity_preserving", "pkt"])
def test_a_gradient_written_out_can_be_differentiated_in_turn(name: str) -> None:
    loss, student, teacher = make(name)
    assert torch.autograd.gradgradcheck(lambda features: loss(features, teacher), student)


# --- what holds for every loss -----------------------------------------------------------------


@every_loss
def test_teacher_is_detached_and_0_where_it_is_the_student(name: str) -> None:
    loss, student, teacher = make(name)
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    if student.shape == teacher.shape:
        same = student.detach().requires_grad_()
        value = loss(same, same)
        assert abs(value.item()) < 1e-14
        assert torch.autograd.grad(value, same)[0].abs().max() < 1e-7


@every_loss
@pytest.mark.parametrize("zeros", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_have_a_finite_loss_and_gradient(name: str, zeros: str, dtype: torch.dtype) -> None:
    loss, student, teacher = make(name)
    student, teacher = student.detach().to(dtype), teacher.to(dtype)
    if zeros != "teacher":
        student[..., 0, :] = 0
        student[:, 0] = 0
        if zeros == "student":
            student.zero_()
    if zeros != "student":
        teacher.zero_()
    student.requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_widened(name: str, dtype: torch.dtype, autocast: bool) -> None:
    """Computed in float32 in autocast too, which lowers the precision of matrix products."""
    loss, student, teacher = make(name)
    student, teacher = student.detach().to(dtype), teacher.to(dtype)
    if autocast:  # float32 inputs, with digits to lose
        student, teacher = student.float() + 1e-4, teacher.float() - 1e-4
    expected = loss(student.double(), teacher.double()).item()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.item(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["attention_transfer", "attention_transfer 1", "similarity_preserving", "pkt", "cosine"]
)
@pytest.mark.parametrize("scale", [1e-10, 1e-4, 1e4, 1e10])
def test_scale_does_not_matter(name: str, scale: float) -> None:
    loss, student, teacher = make(name)
    value = loss((scale * student).float(), (teacher / scale).clamp(-1e18, 1e18).float())
    np.testing.assert_allclose(value.item(), loss(student, teacher).item(), rtol=1e-4)


@every_loss
def test_order_of_the_batch_does_not_matter(name: str) -> None:
    loss, student, teacher = make(name)
    if "masked" in name:
        pytest.skip("the mask has the order")
    dim = 1 if name == "hidden_state" else 0
    order = torch.arange(student.shape[dim]).roll(1)
    torch.testing.assert_close(
        loss(student.index_select(dim, order), teacher.index_select(dim, order)),
        loss(student, teacher),
    )


@pytest.mark.parametrize("name", ["hint", "attention_transfer", "cosine", "matrices"])
def test_is_the_mean_over_the_batch(name: str) -> None:
    loss, student, teacher = make(name)
    parts = [loss(s[None], t[None]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss(student, teacher))


@pytest.mark.parametrize("name", ["hidden_state masked", "cosine masked", "matrices masked"])
def test_what_is_masked_is_not_read(name: str) -> None:
    loss, student, teacher = make(name)
    expected = loss(student, teacher)
    (gradient,) = torch.autograd.grad(expected, student)
    padding = (MASK == 0)[:, None, :, None] if "matrices" in name else (MASK == 0)[..., None]
    if "matrices" in name:
        padding = padding | padding.mT
    for nothing in (torch.nan, torch.inf):
        poisoned = student.detach().masked_fill(padding, nothing).requires_grad_()
        value = loss(poisoned, teacher.masked_fill(padding, -nothing))
        assert torch.equal(value, expected)
        assert torch.equal(torch.autograd.grad(value, poisoned)[0], gradient)


@pytest.mark.parametrize("name", ["hidden_state", "cosine", "matrices"])
def test_no_valid_token_is_0_with_a_graph(name: str) -> None:
    loss, student, teacher = make(name)
    value = loss(student, teacher, mask=torch.zeros(3, 5, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value, student)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", ["hidden_state", "cosine", "matrices"])
def test_masks_are_bool_or_integer(name: str) -> None:
    loss, student, teacher = make(name)
    masked = partial(loss, student, teacher)
    ones = masked(mask=torch.ones(3, 5, dtype=torch.int64))
    torch.testing.assert_close(ones, masked())
    same = masked(mask=MASK), masked(mask=MASK.bool())
    assert torch.equal(*same)
    with pytest.raises(TypeError, match=r"mask must be bool or integer, got torch\.float32"):
        masked(mask=MASK.float())
    with pytest.raises(ValueError, match=r"mask must be \[3, 5\], got \[5\]"):
        masked(mask=MASK[0])


# --- hints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (3, 6, 4), (3, 4, 5, 6)])
def test_projection_is_a_matrix_over_channels(shape: tuple[int, ...]) -> None:
    projection, features = Projection(4, 7).double(), randn(*shape)
    weight, bias = (parameter.detach().numpy() for parameter in projection.parameters())
    channels = 1 if len(shape) == 4 else -1
    moved = np.moveaxis(features.numpy(), channels, -1) @ weight.T + bias
    actual = projection(features).detach().numpy()
    np.testing.assert_allclose(actual, np.moveaxis(moved, -1, channels), rtol=1e-10, atol=1e-12)


def test_projection_refuses_other_channels() -> None:
    with pytest.raises(ValueError, match="features must have 4 channels, got 5"):
        Projection(4, 7)(torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"features must be \[batch, channels\].*got \[4\]"):
        Projection(4, 7)(torch.zeros(4))


def test_projection_is_trained_on_the_hints() -> None:
    projection = Projection(4, 7).double()
    hint_loss(projection(randn(3, 4)), randn(3, 7)).backward()
    gradients = [parameter.grad for parameter in projection.parameters()]
    assert [list(gradient.shape) for gradient in gradients] == [[7, 4], [7]]
    assert all(gradient.any() for gradient in gradients)


def test_reconcile_pools_each_side_where_it_is_larger() -> None:
    student, teacher = pair((2, 3, 6, 4), (2, 5, 3, 8))
    pooled_student, pooled_teacher = reconcile(student, teacher)
    torch.testing.assert_close(pooled_student, student.unflatten(2, (3, 2)).mean(3))
    torch.testing.assert_close(pooled_teacher, teacher.unflatten(3, (4, 2)).mean(4))
    unpooled = reconcile(student, student)
    assert unpooled[0] is student
    assert reconcile(torch.zeros(1, 1, 7, 7), torch.zeros(1, 1, 4, 5))[0].shape == (1, 1, 4, 5)


def test_hints_of_other_shapes_are_refused() -> None:
    message = r"student_features must be \[2, 4\] .* got \[2, 3\]: Projection maps"
    with pytest.raises(ValueError, match=message):
        hint_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"student_features must be \[batch, channels, height"):
        reconcile(torch.zeros(2, 3), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"teacher_features must be \[batch, channels, height"):
        attention_transfer(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3))


@pytest.mark.parametrize("loss", [hint_loss, attention_transfer, similarity_preserving, pkt])
def test_other_batches_and_types_are_refused(loss: Loss) -> None:
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"teacher_features must have a batch of 2 .* got 1"):
        loss(maps, maps[:1])
    with pytest.raises(ValueError, match=r"student_features must be .* not empty, got"):
        loss(maps[:0], maps[:0])
    with pytest.raises(TypeError, match=r"teacher_features must be floating point, got torch\.int"):
        loss(maps, maps.long())


@pytest.mark.parametrize("power", [-1, 0, 0.5, torch.nan, torch.inf])
def test_power_below_1_is_refused(power: float) -> None:
    with pytest.raises(ValueError, match="power must be at least 1 and finite, got"):
        attention_transfer(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), power=power)


# --- relations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [similarity_preserving, pkt])
def test_rotation_of_the_features_does_not_matter(loss: Loss) -> None:
    student, teacher = pair((6, 4), (6, 9))
    rotation, _ = torch.linalg.qr(randn(4, 4, seed=5))
    torch.testing.assert_close(loss(student @ rotation, teacher), loss(student, teacher))


def test_pkt_is_0_where_there_is_no_choice_of_neighbours() -> None:
    for batch in (1, 2):
        student, teacher = pair((batch, 4))
        value = pkt(student, teacher)
        assert value == 0
        assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_pkt_of_opposite_vectors_is_finite() -> None:
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    value = pkt(student, torch.ones(3, 2))
    assert 1 < value < 10
    assert torch.autograd.grad(value, student)[0].isfinite().all()


# --- tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        *[(1, 1, [0]), (1, 4, [3]), (2, 4, [1, 3]), (3, 12, [3, 7, 11]), (4, 12, [2, 5, 8, 11])],
        *[(4, 6, [0, 2, 3, 5]), (5, 12, [1, 3, 6, 8, 11]), (3, 4, [0, 1, 3])],  # spread evenly
    ],
)
def test_every_other(student: int, teacher: int, expected: list[int]) -> None:
    assert every_other(student, teacher) == expected


@pytest.mark.parametrize(("student", "teacher"), [(12, 5), (4, 2), (0, 4), (2, 0), (-2, 4)])
def test_impossible_maps_are_refused(student: int, teacher: int) -> None:
    with pytest.raises(ValueError, match=r"teacher_layers must be at least student_layers \("):
        every_other(student, teacher)


def test_layers_are_mapped_by_the_layer_map() -> None:
    student, teacher = pair((2, 3, 5, 4), (3, 3, 5, 4))
    loss = hidden_state_loss(list(student), list(teacher), layer_map=[2, 0])
    expected = ((student[0] - teacher[2]) ** 2 + (student[1] - teacher[0]) ** 2).mean() / 2
    torch.testing.assert_close(loss, expected)
    states = list(teacher)
    for layer_map, message in [
        ([0], "layer_map must have one layer for each of the student's 2, at least 1, got 1"),
        ([0, 3], r"layer_map must be of layers in \[0, 3\), got \[0, 3\]"),
        ([0, -1], r"layer_map must be of layers in \[0, 3\), got \[0, -1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            hidden_state_loss(list(student), states, layer_map=layer_map)
    with pytest.raises(ValueError, match=r"teacher_layers must be at least student_layers \(2"):
        hidden_state_loss(list(student), states[:1])
    with pytest.raises(ValueError, match=r"layer_map must have one layer .* at least 1, got 0"):
        hidden_state_loss([], states, layer_map=[])


def test_other_widths_are_refused() -> None:
    student, teacher = torch.zeros(2, 5, 4), torch.zeros(2, 5, 8)
    message = r"\[batch, tokens, width\] as the teacher's \[2, 5, 8\], got \[2, 5, 4\]: Projection"
    with pytest.raises(ValueError, match=message):
        hidden_state_loss([student], [teacher])
    with pytest.raises(ValueError, match=message):
        cosine_embedding(student, teacher)


def test_cosine_has_its_range() -> None:
    hidden = torch.tensor([[3.0, 4.0]])
    assert cosine_embedding(hidden, 2 * hidden).item() == pytest.approx(0, abs=1e-6)
    assert cosine_embedding(hidden, -hidden).item() == pytest.approx(2)
    assert cosine_embedding(hidden, torch.zeros(1, 2)).item() == 1


def test_heads_of_other_numbers_are_averaged_first() -> None:
    student, teacher = pair((2, 2, 3, 3), (2, 6, 3, 3))
    expected = (student.mean(1) - teacher.mean(1)).square().mean()
    torch.testing.assert_close(attention_matrices(student, teacher), expected)


def test_other_matrices_are_refused() -> None:
    square = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"student must be \[batch, heads, tokens, tokens\], got"):
        attention_matrices(torch.zeros(2, 3, 4, 5), square)
    with pytest.raises(ValueError, match=r"teacher must be \[batch, heads, tokens, tokens\], got"):
        attention_matrices(square, square[0])
    with pytest.raises(ValueError, match="student must have 4 tokens as teacher has, got 3"):
        attention_matrices(square[..., :3, :3], square)


# --- wrong versions are rejected ---------------------------------------------------------------


def check_loss(name: str, loss: Loss) -> None:
    """Raise AssertionError unless `loss` is the loss of that name."""
    for seed in range(2):
        _, student, teacher = make(name, seed=seed)
        value = loss(student, teacher.requires_grad_())
        expected = reference(name, student.detach().numpy(), teacher.detach().numpy())
        np.testing.assert_allclose(value.item(), expected, rtol=1e-9)
        value.backward()
        assert teacher.grad is None, "the teacher got a gradient"
    zeros = torch.zeros_like(student, requires_grad=True)
    value = loss(zeros, teacher)
    assert value.isfinite()
    assert torch.autograd.grad(value, zeros)[0].isfinite().all()


def naive(s: Tensor, t: Tensor, *, name: str, wrong: str = "") -> Tensor:
    """Return a loss in a few lines, with one thing in it `wrong`."""
    kind, _, detail = name.partition(" ")
    if wrong != "teacher not detached":
        t = t.detach()
    if kind in ("hint", "attention_transfer"):
        losses = {"hint": naive_hint, "attention_transfer": naive_attention_transfer}
        return losses[kind](s, t, detail, wrong)
    if kind in ("similarity_preserving", "pkt"):
        return (naive_similarity if kind == "similarity_preserving" else naive_pkt)(s, t, wrong)
    mask = MASK.bool()
    if detail != "masked" or wrong == "mask ignored":
        mask = torch.ones_like(mask)
    return {"hidden_state": naive_hidden, "cosine": naive_cosine, "matrices": naive_matrices}[kind](
        s, t, mask, wrong
    )


def naive_unit(x: Tensor, dims: int | tuple[int, ...] = -1, wrong: str = "") -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / (norm if wrong == "0 / 0 of zeros" else norm.clamp_min(1e-12))


def naive_hint(s: Tensor, t: Tensor, _detail: str, wrong: str) -> Tensor:
    if wrong == "directions only":
        s, t = naive_unit(s), naive_unit(t)
    difference = s - t
    if wrong == "not squared":
        return difference.abs().mean()
    if wrong == "sum of a sample, halved":
        return difference.square().sum() / 2 / len(s)
    return difference.square().mean() / (2 if wrong == "half" else 1)


def naive_attention_transfer(s: Tensor, t: Tensor, detail: str, wrong: str) -> Tensor:
    power = 1.0 if wrong == "power left out" else float(detail or 2)
    maps = []
    for features in (s, t):
        a = features if wrong == "signs kept" else features.abs()
        if wrong == "features pooled, not maps":
            a = F.adaptive_avg_pool2d(features, (2, 4)).abs()
        a = a.pow(power).sum(1, keepdim=True)
        if wrong == "normalised, then pooled":
            a = naive_unit(a, (2, 3))
        maps.append(a)
    maps = [a.flatten(1) for a in reconcile(maps[0], maps[1])]
    if wrong == "normalised over the batch":
        maps = [naive_unit(a, 0) for a in maps]
    elif wrong not in ("not normalised", "normalised, then pooled"):
        maps = [naive_unit(a, wrong=wrong) for a in maps]
    difference = maps[0] - maps[1]
    if wrong == "distance, not its square":
        return torch.linalg.vector_norm(difference, dim=1).mean()
    if wrong == "sum over positions":
        return difference.square().sum(1).mean()
    return difference.square().mean()


def naive_similarity(s: Tensor, t: Tensor, wrong: str) -> Tensor:
    grams = []
    for features in (s, t):
        rows = features.flatten(1)
        if wrong == "samples normalised, not rows of G":
            rows = naive_unit(rows)
        gram = rows @ rows.T
        if wrong == "normalised as a whole":
            gram = naive_unit(gram, (0, 1))
        elif wrong not in ("not normalised", "samples normalised, not rows of G"):
            gram = naive_unit(gram, wrong=wrong)
        grams.append(gram)
    squares = (grams[0] - grams[1]).square()
    if wrong == "diagonal left out":
        return squares[~torch.eye(len(s), dtype=torch.bool)].mean()
    return squares.sum() / len(s) ** {"by batch, not its square": 1, "sum": 0}.get(wrong, 2)


def naive_pkt(s: Tensor, t: Tensor, wrong: str) -> Tensor:
    shares = []
    for features in (s, t):
        units = naive_unit(features.flatten(1), wrong=wrong)
        cosines = units @ units.T
        kernel = (cosines if wrong == "kernel not shifted" else (1 + cosines) / 2) + 1e-7
        if wrong == "softmax of cosines":
            kernel = cosines.exp()
        if wrong != "diagonal kept":
            kernel = kernel[~torch.eye(len(s), dtype=torch.bool)].view(len(s), -1)
        by = {"probabilities over all pairs": kernel.sum(), "not normalised": 1.0}
        shares.append(kernel / by.get(wrong, kernel.sum(1, keepdim=True)))
    p_s, p_t = shares[::-1] if wrong == "p and q swapped" else shares
    divergences = (p_t * (p_t / p_s).log()).sum(1)
    if wrong == "mean over neighbours too":
        return divergences.mean() / len(s)
    return divergences.sum() if wrong == "sum over the batch" else divergences.mean()


def naive_mean(values: Tensor, valid: Tensor, wrong: str) -> Tensor:
    """Return the mean over valid values; rows are the first dimension."""
    valid = valid.expand_as(values)
    if wrong == "padding counted":
        return (values * valid).mean()
    if wrong == "mean of the rows' means":
        rows = [row[mask].mean() for row, mask in zip(values, valid, strict=True) if mask.any()]
        return torch.stack(rows).mean()
    return values[valid].mean()


def naive_hidden(s: Tensor, t: Tensor, mask: Tensor, wrong: str) -> Tensor:
    layers = {"the first layers": (0, 1), "the last layers": (2, 3)}.get(wrong, (1, 3))
    squares = [(s[i] - t[j]).square() for i, j in enumerate(layers)]
    losses = torch.stack([naive_mean(each, mask[..., None], wrong) for each in squares])
    if wrong == "last layer only":
        return losses[-1]
    if wrong == "sum over width":
        return losses.mean() * s.shape[-1]
    return losses.sum() if wrong == "layers added up" else losses.mean()


def naive_cosine(s: Tensor, t: Tensor, mask: Tensor, wrong: str) -> Tensor:
    if wrong == "directions of whole rows":
        s, t = (x.masked_fill(~mask[..., None], 0).flatten(1)[:, None] for x in (s, t))
        mask = mask.any(1, keepdim=True)
    if wrong == "cosines over tokens":
        return (1 - (naive_unit(s, 1) * naive_unit(t, 1)).sum(1)).mean()
    u = s if wrong == "student not normalised" else naive_unit(s, wrong=wrong)
    v = t if wrong == "teacher not normalised" else naive_unit(t, wrong=wrong)
    cosines = (u * v).sum(-1)
    if wrong == "similarity for distance":
        return naive_mean(cosines, mask, wrong)
    return naive_mean(
        cosines.square() if wrong == "square of the cosine" else 1 - cosines, mask, wrong
    )


def naive_matrices(s: Tensor, t: Tensor, mask: Tensor, wrong: str) -> Tensor:
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    if wrong == "columns of padding read":
        pairs = mask[:, None, :, None]
    if wrong == "rows of padding read":
        pairs = mask[:, None, None, :]
    if wrong == "softmax of scores":
        s, t = s.softmax(-1), t.softmax(-1)
    if wrong == "first heads only":
        s, t = s[:, :1], t[:, :1]
    if s.shape[1] != t.shape[1] or wrong == "heads averaged first":
        s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
    heads = s.shape[1]
    loss = naive_mean((s - t).square(), pairs.expand_as(s), wrong)
    if wrong == "sum over heads":
        return loss * heads
    return loss * s.shape[-1] if wrong == "by tokens, not their square" else loss


OF_MASKS = ("mask ignored", "padding counted", "mean of the rows' means")
ZEROS = "0 / 0 of zeros"
WRONG: dict[str, tuple[str, ...]] = {
    "hint": ("half", "not squared", "sum of a sample, halved", "directions only"),
    "attention_transfer": (
        ZEROS,
        "not normalised",
        "normalised over the batch",
        "power left out",
        "distance, not its square",
        "sum over positions",
    ),
    "attention_transfer 1": (
        "signs kept",
        "not normalised",
        "normalised, then pooled",
        "features pooled, not maps",
    ),
    "attention_transfer 1.5": ("power left out", "not normalised"),
    "similarity_preserving": (
        ZEROS,
        "not normalised",
        "normalised as a whole",
        "samples normalised, not rows of G",
        "diagonal left out",
        "by batch, not its square",
        "sum",
    ),
    "pkt": (
        ZEROS,
        "p and q swapped",
        "diagonal kept",
        "kernel not shifted",
        "softmax of cosines",
        "probabilities over all pairs",
        "not normalised",
        "mean over neighbours too",
        "sum over the batch",
    ),
    "hidden_state": (
        "layers added up",
        "the first layers",
        "the last layers",
        "last layer only",
        "sum over width",
    ),
    "hidden_state masked": OF_MASKS,
    "cosine": (
        ZEROS,
        "similarity for distance",
        "square of the cosine",
        "student not normalised",
        "teacher not normalised",
        "directions of whole rows",
        "cosines over tokens",
    ),
    "cosine masked": (*OF_MASKS, "directions of whole rows"),
    "matrices": (
        "heads averaged first",
        "first heads only",
        "sum over heads",
        "by tokens, not their square",
        "softmax of scores",
    ),
    "matrices masked": (
        *OF_MASKS,
        "first heads only",
        "columns of padding read",
        "rows of padding read",
    ),
}


@every_loss
def test_right_versions_pass_the_check(name: str) -> None:
    check_loss(name, LOSSES[name][0])
    check_loss(name, partial(naive, name=name))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [(name, wrong) for name in WRONG for wrong in (*WRONG[name], "teacher not detached")],
)
def test_wrong_versions_fail_the_check(name: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_loss(name, partial(naive, name=name, wrong=wrong))
