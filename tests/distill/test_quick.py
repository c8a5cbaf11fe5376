"""Soft targets that are computed once, and the loss that reads them."""

import math

import pytest
import torch
from torch import nn

from selfkd import Distiller, Teacher, cache_logits
from selfkd.distill import quick as quick_module
from selfkd.distill.quick import SoftTargetRows
from selfkd.distill.terms import LogitTerm
from selfkd.losses import soft_targets
from selfkd.soft_targets import store as store_module

IMAGES, CLASSES = 30, 4


@pytest.fixture
def dataset():
    draw = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(torch.randn(IMAGES, 6, generator=draw))


def make_targets(dataset, path, members=1, **settings):
    torch.manual_seed(0)
    teachers = [nn.Linear(6, CLASSES) for _ in range(members)]
    return cache_logits(teachers, dataset, path, **settings)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_rows_are_the_soft_targets_of_the_cached_logits(dataset, tmp_path, members, average):
    targets = make_targets(dataset, tmp_path, members, views=2)
    rows, index = SoftTargetRows(targets), torch.tensor([7, 3, 29, 3])
    weights = None if members == 1 else [0.5, 0.25, 0.25]
    for view in (0, 1, 0):
        for temperature in (1.0, 4.0):
            found = rows(index, view, temperature, average, weights)
            expected = soft_targets(
                targets(index, view), temperature=temperature, average=average, weights=weights
            )
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("members", [1, 3])
def test_a_quick_loss_is_the_loss_but_for_rounding(dataset, tmp_path, members, monkeypatch):
    calls, compute = [], quick_module.few_classes_terms
    monkeypatch.setattr(
        quick_module, "few_classes_terms", lambda *a, **k: calls.append(a) or compute(*a, **k)
    )
    targets = make_targets(dataset, tmp_path, members)
    logits = torch.randn(5, CLASSES, requires_grad=True)
    labels, index = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([4, 3, 2, 1, 0])
    found = []
    for quick in (False, True):
        terms = Distiller(targets=targets, quick=quick)(logits, labels, index=index)
        (gradient,) = torch.autograd.grad(terms["loss"], logits)
        found.append((terms, gradient))
    (plain, expected), (terms, gradient) = found
    assert list(plain) == list(terms) == ["loss", "hard_loss", "soft_loss"]
    assert len(calls) == 1  # of the quick one alone
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms, plain, rtol=1e-4, atol=1e-5)


def test_a_live_teacher_gives_what_its_cached_logits_do(dataset, tmp_path):
    torch.manual_seed(0)
    teacher, (inputs,) = nn.Linear(6, CLASSES), dataset.tensors
    targets = cache_logits(teacher, dataset, tmp_path)
    logits, labels = torch.randn(IMAGES, CLASSES), torch.arange(IMAGES) % CLASSES
    live = Distiller(Teacher(teacher), quick=True)(logits, labels, inputs=inputs)
    cached = Distiller(targets=targets, quick=True)(logits, labels, index=torch.arange(IMAGES))
    torch.testing.assert_close(live, cached, rtol=1e-3, atol=1e-4)  # half precision


def test_a_schedule_of_the_temperature_is_followed(dataset, tmp_path):
    distiller = Distiller(targets=make_targets(dataset, tmp_path), quick=True, alpha=1.0)
    logits, labels, index = torch.zeros(3, CLASSES), torch.zeros(3).long(), torch.arange(3)
    soft = []
    for temperature in (1.0, 8.0, 1.0):
        distiller.temperature = temperature
        soft.append(distiller(logits, labels, index=index)["soft_loss"].item())
    assert soft[0] == soft[2] != soft[1]


def test_views_that_are_not_kept_are_computed_as_before(dataset, tmp_path, monkeypatch):
    logits, labels, index = torch.randn(3, CLASSES), torch.zeros(3).long(), torch.arange(3)

    def loss(targets, quick, **more):
        return Distiller(targets=targets, quick=quick, **more)(logits, labels, index=index)

    few = make_targets(dataset, tmp_path / "few", top_k=2)
    assert loss(few, True) == loss(few, False)
    targets = make_targets(dataset, tmp_path / "all")
    assert loss(lambda i, view: targets(i, view), True) == loss(targets, False)
    monkeypatch.setattr(store_module, "PACK_LIMIT", 0)
    large = make_targets(dataset, tmp_path / "large")
    assert loss(large, True) == loss(large, False)


def test_the_oldest_views_make_room(dataset, tmp_path, monkeypatch):
    targets = make_targets(dataset, tmp_path, views=3)
    monkeypatch.setattr(quick_module, "KEPT_BYTES", 2 * 4 * IMAGES * CLASSES)
    rows, index = SoftTargetRows(targets), torch.tensor([1])
    for view in (0, 1, 2):
        rows(index, view, 1.0, "probabilities", None)
    assert list(rows._views) == [1, 2]
    monkeypatch.setattr(quick_module, "KEPT_BYTES", 4)
    assert SoftTargetRows(targets)(index, 0, 1.0, "probabilities", None) is None


def test_own_hard_losses_further_terms_and_unlabelled_images_are_as_before(dataset, tmp_path):
    targets = make_targets(dataset, tmp_path)
    logits, labels, index = torch.randn(3, CLASSES), torch.zeros(3).long(), torch.arange(3)
    term = {"mean": lambda s, t, y: (s - t).mean()}
    for quick_call in (
        {"hard_loss": torch.tensor(7.0)},
        {"labels": labels[:2], "unlabelled": 1},
    ):
        arguments = {"labels": labels, "index": index} | quick_call
        found = [Distiller(targets=targets, quick=q)(logits, **arguments) for q in (False, True)]
        assert found[0] == found[1]
    terms = {name: LogitTerm(loss, 0.5) for name, loss in term.items()}
    found = [
        Distiller(targets=targets, quick=q, terms=terms)(logits, labels, index=index)
        for q in (False, True)
    ]
    assert found[0] == found[1]


def test_nan_of_a_teacher_is_named_as_before():
    teacher = lambda inputs: torch.tensor([[0.0, math.nan, 0.0]])  # noqa: E731
    with pytest.raises(ValueError, match="got nan in row 0"):
        Distiller(teacher, quick=True)(torch.zeros(1, 3), torch.tensor([0]), inputs=torch.ones(1))


def outcome(quick, logits, labels, teacher, **settings):
    """Return the terms and the gradient of a loss, or what it is refused with."""
    student = logits.clone().requires_grad_()
    distiller = Distiller(lambda inputs: teacher, quick=quick, **settings)
    try:
        terms = distiller(student, labels, inputs=torch.ones(1))
    except (TypeError, ValueError) as error:
        return str(error)
    (gradient,) = torch.autograd.grad(terms["loss"], student)
    # what is not finite in one may be infinite in the other
    return {
        name: value.nan_to_num(math.inf, math.inf, math.inf)
        for name, value in (terms | {"gradient": gradient}).items()
    }


def with_value(tensor, value, *places):
    changed = tensor.clone()
    for place in places:
        changed[place] = value
    return changed


BATCH = torch.randn(2, 4, CLASSES, generator=torch.Generator().manual_seed(1)) * 3
STUDENT, TEACHER = BATCH
LABELS = torch.tensor([0, 1, 2, 3])
MIXED = torch.full((4, CLASSES), 0.25)
with torch.inference_mode():
    OF_INFERENCE = MIXED.clone()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("student", "labels", "teacher"),
    [
        pytest.param(STUDENT, MIXED, TEACHER, id="probabilities"),
        pytest.param(STUDENT, OF_INFERENCE, TEACHER, id="labels of inference mode"),
        pytest.param(STUDENT, LABELS, OF_INFERENCE, id="teacher of inference mode"),
        pytest.param(STUDENT.half(), LABELS, TEACHER.double(), id="half and double"),
        pytest.param(STUDENT.double(), LABELS, TEACHER.half(), id="double and half"),
        pytest.param(STUDENT.bfloat16() * 1000, LABELS, TEACHER * 1000, id="large logits"),
        pytest.param(STUDENT, torch.tensor([0, -100, 1, 2]), TEACHER, id="ignored label"),
        pytest.param(STUDENT, torch.full((4,), math.nan).long(), TEACHER, id="label of NaN"),
        pytest.param(with_value(STUDENT, math.nan, (1, 2)), LABELS, TEACHER, id="NaN"),
        pytest.param(with_value(STUDENT, math.inf, (1, 2)), LABELS, TEACHER, id="infinity"),
        pytest.param(
            with_value(STUDENT, -math.inf, (1, 1)), LABELS, TEACHER, id="impossible label"
        ),
        pytest.param(
            *(with_value(STUDENT, -math.inf, (1, 2)), LABELS),
            with_value(TEACHER, -math.inf, (1, 2)),
            id="impossible class",
        ),
        pytest.param(STUDENT, LABELS, with_value(TEACHER, math.nan, 0), id="NaN of the teacher"),
        pytest.param(STUDENT, -MIXED, TEACHER, id="negative probabilities"),
        pytest.param(STUDENT, LABELS, TEACHER.long(), id="integers of the teacher"),
        pytest.param(STUDENT, LABELS, TEACHER[:3], id="fewer rows"),
        pytest.param(STUDENT, LABELS, BATCH[:, :3], id="fewer rows of members"),
        pytest.param(STUDENT, LABELS, TEACHER[None, None], id="too many dimensions"),
        pytest.param(STUDENT[:0], LABELS[:0], TEACHER[:0], id="no rows"),
    ],
)
def test_quick_is_the_loss_but_for_rounding_of_whatever_is_given(alpha, student, labels, teacher):
    for more in ({}, {"label_smoothing": 0.2}, {"temperature": 1000.0}):
        plain, quick = (outcome(q, student, labels, teacher, alpha=alpha, **more) for q in (0, 1))
        if isinstance(plain, str):
            assert quick == plain
        else:
            torch.testing.assert_close(quick, plain, rtol=1e-3, atol=1e-5)


def test_neither_labels_nor_teacher_get_a_gradient():
    student, mixed, teacher = (t.clone().requires_grad_() for t in (STUDENT, MIXED, TEACHER))
    terms = Distiller(lambda inputs: teacher, quick=True)(student, mixed, inputs=torch.ones(1))
    terms["loss"].backward()
    assert mixed.grad is None is teacher.grad
    assert student.grad is not None


@pytest.mark.parametrize("index", [[0, IMAGES], [-1, 2], [[0, 1]]])
def test_an_index_that_is_wrong_is_named_as_before(dataset, tmp_path, index):
    targets = make_targets(dataset, tmp_path)
    said = []
    for quick in (False, True):
        with pytest.raises((IndexError, ValueError)) as error:
            Distiller(targets=targets, quick=quick)(
                STUDENT[:2], LABELS[:2], index=torch.tensor(index)
            )
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "index must be" in said[0]
