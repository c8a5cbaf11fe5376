"""CRD and its memory bank against NumPy in float64, their edges and wrong versions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import pair, randn
from torch import Tensor

from selfkd.losses.contrast import ContrastiveMemory, crd_loss

Array = np.ndarray
IMAGES, DIM = 12, 3


def make_memory(**settings: Any) -> ContrastiveMemory:
    generator = torch.Generator().manual_seed(3)
    return ContrastiveMemory(IMAGES, DIM, generator=generator, **settings)


def make_contrast(memory: ContrastiveMemory, negatives: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return memory.draw(torch.tensor([7, 0, 11, 4]), negatives=negatives, generator=generator)


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def reference_scores(anchors: Tensor, bank: Tensor, contrast: Tensor) -> Array:
    rows = bank.double().numpy()[contrast.numpy()]
    return np.einsum("bd,bkd->bk", unit(anchors.detach().numpy()), rows) / 0.07


def check_crd(crd: Callable[..., Tensor], negatives: int) -> None:
    """Compared on the first batch, and on a second one with the constants of the first."""
    memory = make_memory()
    constants: list[float] = []
    for seed in range(2):
        student, teacher = pair((4, DIM), seed=seed)
        teacher.requires_grad_()
        contrast = make_contrast(memory, negatives, seed=seed)
        expected = 0.0
        for side, (anchors, bank) in enumerate(
            ((student, memory.teacher), (teacher, memory.student))
        ):
            scores = reference_scores(anchors, bank, contrast)
            if seed == 0:
                constants.append(IMAGES * np.exp(scores).mean())
            p = np.exp(scores) / constants[side]
            h = p / (p + negatives / IMAGES)
            expected -= (np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)).mean()
        loss = partial(crd, memory=memory, contrast=contrast)
        np.testing.assert_allclose(loss(student, teacher).item(), expected, rtol=1e-6)
        if seed:  # the first batch has its own constants, which have no gradient
            assert torch.autograd.gradcheck(loss, (student, teacher), raise_exception=False)
        before = memory.state_dict()
        loss(student, teacher)
        after = memory.state_dict()
        assert all(torch.equal(before[k], after[k]) or before[k].isnan().any() for k in before)
        memory.update(student, teacher, contrast)
    np.testing.assert_allclose(memory.log_constants, np.log(constants), rtol=1e-6)


@pytest.mark.parametrize("negatives", [1, 2, 9])  # gathered first, or last
def test_crd_equals_reference_in_float64(negatives: int) -> None:
    check_crd(crd_loss, negatives)


def naive_crd(
    s: Tensor, t: Tensor, memory: ContrastiveMemory, contrast: Tensor, *, wrong: str = ""
) -> Tensor:
    """Return `crd_loss` in a few lines, with one thing in it `wrong`."""
    negatives = contrast.shape[1] - 1
    banks = [memory.teacher, memory.student]
    if wrong == "rows of its own":
        banks.reverse()
    if wrong == "teacher detached":
        t = t.detach() + 0 * t
    losses = []
    for x, bank, log_constant in zip((s, t), banks, memory.log_constants, strict=True):
        anchors = x if wrong == "not normalised" else F.normalize(x, dim=-1)
        scores = torch.einsum("bd,bkd->bk", anchors, bank[contrast].to(x.dtype))
        scores = scores / (1.0 if wrong == "T left out" else 0.07)
        log_z = log_constant.to(x.dtype)
        if log_constant.isnan() or wrong == "Z of each batch":
            images = 1 if wrong == "Z without n" else IMAGES
            log_z = math.log(images) + scores.detach().exp().mean().log()
        p = (scores - log_z).exp()
        h = p / (p + (1 if wrong == "one negative" else negatives) / IMAGES)
        if wrong == "softmax over the rows":
            losses.append(-F.log_softmax(scores, dim=-1)[:, 0])
            continue
        first = 0 if wrong == "the image among its negatives" else 1
        rejected = (1 - h[:, first:]).log()
        away = rejected.mean(1) if wrong == "mean over negatives" else rejected.sum(1)
        losses.append(-h[:, 0].log() - (0 if wrong == "no negatives" else away))
    if wrong == "student's side only":
        return losses[0].mean()
    return torch.stack(losses).sum() / (1 if wrong == "sum over the batch" else len(s))


def test_the_right_version_of_crd_passes_the_check() -> None:
    check_crd(naive_crd, 9)


@pytest.mark.parametrize(
    "wrong",
    [
        *("rows of its own", "teacher detached", "not normalised", "T left out"),
        *("Z of each batch", "Z without n", "one negative", "softmax over the rows"),
        *("the image among its negatives", "mean over negatives", "no negatives"),
        *("student's side only", "sum over the batch"),
    ],
)
def test_wrong_versions_of_crd_fail_the_check(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_crd(partial(naive_crd, wrong=wrong), 9)


def test_crd_constant_of_the_first_batch_has_no_gradient() -> None:
    memory = make_memory()
    student, teacher = pair((4, DIM))
    contrast = make_contrast(memory, 5)
    first = torch.autograd.grad(crd_loss(student, teacher, memory, contrast), student)
    memory.log_constants.copy_(first_constants(memory, student, teacher, contrast))
    second = torch.autograd.grad(crd_loss(student, teacher, memory, contrast), student)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def first_constants(memory: ContrastiveMemory, s: Tensor, t: Tensor, contrast: Tensor) -> Tensor:
    scores = (
        reference_scores(s, memory.teacher, contrast),
        reference_scores(t, memory.student, contrast),
    )
    return torch.tensor([np.log(IMAGES * np.exp(score).mean()) for score in scores])


def test_crd_survives_a_low_temperature_and_zeros() -> None:
    memory = make_memory(temperature=1e-3)
    student, teacher = torch.zeros(4, DIM, requires_grad=True), randn(4, DIM).float()
    loss = crd_loss(student, teacher, memory, make_contrast(memory, 5))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = crd_loss(teacher, teacher, memory, make_contrast(memory, 5))
    assert torch.equal(lowered, crd_loss(teacher, teacher, memory, make_contrast(memory, 5)))


def test_crd_gradient_reaches_both_projections_and_not_the_memory() -> None:
    memory = make_memory()
    student, teacher = pair((4, DIM))
    loss = crd_loss(student, teacher.requires_grad_(), memory, make_contrast(memory, 5))
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, (student, teacher)))
    assert not memory.student.requires_grad


def test_update_moves_the_rows_of_the_batch_only() -> None:
    memory = make_memory(momentum=0.8)
    before = memory.state_dict()
    student, teacher = pair((4, DIM))
    contrast = make_contrast(memory, 5)
    memory.update(student, teacher, contrast)
    rows = contrast[:, 0].numpy()
    for bank, embeddings in (("student", student), ("teacher", teacher)):
        expected = before[bank].double().numpy()
        new = unit(embeddings.detach().numpy())
        expected[rows] = unit(0.8 * expected[rows] + 0.2 * new)
        np.testing.assert_allclose(memory.state_dict()[bank], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labelled", [False, True])
def test_negatives_are_drawn_evenly_from_the_others(labelled: bool) -> None:
    labels = torch.tensor([5, 2, 2, 9, 5, 9, 9, 2, 9, 5, 9, 2])
    memory = make_memory(labels=labels if labelled else None)
    indices = torch.tensor([3, 0, 11])
    contrast = memory.draw(indices, negatives=60_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(contrast[:, 0], indices)
    for index, negatives in zip(indices, contrast[:, 1:], strict=True):
        others = labels != labels[index] if labelled else torch.arange(IMAGES) != index
        counts = torch.bincount(negatives, minlength=IMAGES)
        expected = 60_000 * others / others.sum()
        assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_draws_and_first_rows_are_those_of_the_generator() -> None:
    memory, twin = make_memory(), make_memory()
    assert torch.equal(memory.student, twin.student)
    assert not torch.equal(memory.student, memory.teacher)
    norms = ContrastiveMemory(500, 64).student.square().sum(1)
    assert norms.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(make_contrast(memory, 50), make_contrast(twin, 50))
    assert not torch.equal(make_contrast(memory, 50), make_contrast(memory, 50, seed=1))


def test_a_restored_memory_gives_the_same_results() -> None:
    memory, restored = make_memory(), ContrastiveMemory(IMAGES, DIM)
    restored.load_state_dict(memory.state_dict())  # the state before the first batch
    student, teacher = pair((4, DIM))
    restored.update(student, teacher, make_contrast(restored, 5))
    memory.update(student, teacher, make_contrast(memory, 5))
    saved = memory.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in restored.state.items())
    restored = ContrastiveMemory(IMAGES, DIM)
    memory.update(teacher, student, make_contrast(memory, 5))  # the saved state is a copy
    restored.load_state_dict(saved)
    restored.update(teacher, student, make_contrast(restored, 5))
    contrast = make_contrast(memory, 7, seed=1)
    losses = [crd_loss(student, teacher, each, contrast) for each in (memory, restored)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match=r"state must be of .*, got \{'student': \[12, 3\]\}"):
        restored.load_state_dict({"student": saved["student"]})
    assert memory.to("cpu") is memory


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0"),
        ({"temperature": torch.nan}, "temperature must be > 0 and finite, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
        ({"labels": torch.zeros(3)}, r"labels must be \[12\], one an image, got \[3\]"),
        ({"labels": torch.zeros(12)}, "labels must be of 2 classes or more, got 1"),
    ],
)
def test_memories_of_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_memory(**settings)
    with pytest.raises(ValueError, match="images must be >= 2 and dim >= 1, got 1 and 3"):
        ContrastiveMemory(1, 3)


def test_wrong_draws_are_refused() -> None:
    memory = make_memory()
    for indices, error, message in [
        ([0.5], TypeError, r"indices must be torch\.int64, got torch\.float32"),
        ([[1]], ValueError, r"indices must be \[batch\], got \[1, 1\]"),
        ([3, 12], ValueError, r"indices must be in \[0, 12\), got 12"),
        ([3, -1], ValueError, r"indices must be in \[0, 12\), got -1"),
        ([3, 5, 3], ValueError, r"each image at most once, got \[3, 5, 3\]"),
    ]:
        with pytest.raises(error, match=message):
            memory.draw(torch.tensor(indices), negatives=2)
    with pytest.raises(ValueError, match="negatives must be >= 1, got 0"):
        memory.draw(torch.tensor([1]), negatives=0)


def test_embeddings_that_do_not_fit_the_memory_are_refused() -> None:
    memory = make_memory()
    contrast, rows = make_contrast(memory, 5), torch.zeros(4, DIM)
    for loss in (crd_loss, lambda s, t, m, c: m.update(s, t, c)):
        for student, teacher, drawn, error, message in [
            (rows[:3], rows, contrast, ValueError, r"student_embeddings must be \[4, 3\], got \[3"),
            (rows, rows[:, :2], contrast, ValueError, r"teacher_embeddings must be \[4, 3\], got"),
            (rows, rows.long(), contrast, TypeError, "teacher_embeddings must be floating point"),
            (rows, rows, contrast.int(), TypeError, "contrast must be indices of torch.int64"),
            (rows, rows, contrast[:, :1], ValueError, r"contrast must be \[batch, 1 \+ negatives"),
        ]:
            with pytest.raises(error, match=message):
                loss(student, teacher, memory, drawn)
