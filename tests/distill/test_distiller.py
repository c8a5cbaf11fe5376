"""The distiller: the terms it returns for teachers and cached logits, in a training loop."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.distill.distiller import Distiller
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.distill.terms import LogitTerm
from selfkd.losses import (
    SparseLogits,
    distillation_terms,
    multi_label_terms,
    regression_terms,
    sparse_terms,
    sparsify,
)
from selfkd.losses.distillation import hard_loss
from selfkd.losses.logits import dkd_loss, logit_mse

BATCH, FEATURES, CLASSES = 6, 4, 3


class CachedLogits:
    """Cached logits of two views, of one teacher or of several."""

    def __init__(self, *members: int) -> None:
        self.logits = torch.randn(2, *members, 20, CLASSES)

    def __call__(self, index: Tensor, view: int) -> Tensor:
        return self.logits[view][..., index, :]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_step() -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Student logits, labels, and what a teacher or cached logits need."""
    student_logits = torch.randn(BATCH, CLASSES, requires_grad=True)
    labels = torch.randint(CLASSES, (BATCH,))
    return student_logits, labels, {
        "inputs": torch.randn(BATCH, FEATURES),
        "index": torch.randperm(20)[:BATCH],
    }  # fmt: skip


def test_teacher_and_cached_logits_give_the_terms_of_the_loss() -> None:
    student_logits, labels, batch = make_step()
    module, cached = nn.Linear(FEATURES, CLASSES), CachedLogits(3)
    settings: dict[str, Any] = {
        "temperature": 2.0, "alpha": 0.3, "average": "logits", "label_smoothing": 0.1,
    }  # fmt: skip
    for distiller, teacher_logits in (
        (Distiller(module, **settings), module(batch["inputs"])),
        (Distiller(module.forward, **settings), module(batch["inputs"])),
        (Distiller(targets=cached, **settings), cached(batch["index"], 0)),
    ):
        terms = distiller(student_logits, labels, **batch)
        expected = distillation_terms(student_logits, teacher_logits, labels, **settings)
        assert terms == expected._asdict()
        assert [term.requires_grad for term in terms.values()] == [True, False, False]


def test_cached_logits_are_those_of_the_view() -> None:
    student_logits, labels, batch = make_step()
    cached = CachedLogits()
    terms = Distiller(targets=cached)(student_logits, labels, index=batch["index"], view=1)
    expected = distillation_terms(
        student_logits, cached(batch["index"], 1), labels, temperature=3.5, alpha=0.65
    )
    assert terms["loss"] == expected.loss


@pytest.mark.parametrize("members", [(), (3,)])
def test_store_of_sparse_logits(members: tuple[int, ...]) -> None:
    student_logits, labels, batch = make_step()
    cached = CachedLogits(*members)

    def targets(index: Tensor, view: int) -> SparseLogits:
        return sparsify(cached(index, view), 2)

    settings: dict[str, Any] = {"temperature": 2.0, "alpha": 0.3, "label_smoothing": 0.1}
    settings["weights"] = [0.5, 0.2, 0.3] if members else None
    sparse = targets(batch["index"], 0)
    terms = Distiller(targets=targets, **settings)(student_logits, labels, **batch)
    assert terms == sparse_terms(student_logits, sparse, labels, **settings)._asdict()
    on_meta = Distiller(targets=targets)(
        student_logits.to("meta"), labels.to("meta"), index=batch["index"]
    )
    assert {term.device.type for term in on_meta.values()} == {"meta"}
    distiller = Distiller(targets=targets, average="logits")
    if members:
        with pytest.raises(ValueError, match="average must be 'probabilities' where targets are"):
            distiller(student_logits, labels, **batch)
    else:  # one teacher has no average
        expected = sparse_terms(student_logits, sparse, labels, temperature=3.5, alpha=0.65)
        assert distiller(student_logits, labels, **batch) == expected._asdict()


def test_members_are_weighted() -> None:
    student_logits, labels, batch = make_step()
    cached, weights = CachedLogits(3), [0.5, 0.2, 0.3]
    terms = Distiller(targets=cached, weights=weights)(student_logits, labels, **batch)
    expected = distillation_terms(
        student_logits, cached(batch["index"], 0), labels,
        temperature=3.5, alpha=0.65, weights=weights,
    )  # fmt: skip
    assert terms == expected._asdict()
    assert terms["loss"] != Distiller(targets=cached)(student_logits, labels, **batch)["loss"]


def test_ensemble_is_averaged_into_one_teacher() -> None:
    student_logits, labels, batch = make_step()
    modules = [nn.Linear(FEATURES, CLASSES) for _ in range(3)]
    terms = Distiller(Ensemble(modules))(student_logits, labels, **batch)
    logits = torch.stack([module(batch["inputs"]) for module in modules])
    expected = distillation_terms(student_logits, logits, labels, temperature=3.5, alpha=0.65)
    assert terms["loss"] == expected.loss


def test_labels_only() -> None:
    student_logits, labels, batch = make_step()
    terms = Distiller(label_smoothing=0.1)(student_logits, labels, **batch)
    assert list(terms) == ["loss", "hard_loss"]
    assert terms["loss"] == terms["hard_loss"]
    assert terms["loss"] == hard_loss(student_logits, labels, label_smoothing=0.1)
    assert not terms["hard_loss"].requires_grad


@pytest.mark.parametrize("source", ["labels", "teacher", "sparse", "terms"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_soft_labels_and_a_loss_that_shares_no_memory(source: str, alpha: float) -> None:
    student_logits, labels, batch = make_step()
    teacher, terms = (
        nn.Linear(FEATURES, CLASSES),
        {"mse": LogitTerm(lambda s, t, y: logit_mse(s, t))},
    )
    make = partial(Distiller, alpha=alpha, label_smoothing=0.1)
    distiller = {
        "labels": make(),
        "teacher": make(teacher),
        "sparse": make(targets=lambda index, view: sparsify(torch.zeros(BATCH, CLASSES), 2)),
        "terms": make(teacher, terms=terms),
    }[source]
    expected = distiller(student_logits, labels, **batch)
    named = distiller(student_logits, nn.functional.one_hot(labels, CLASSES).float(), **batch)
    torch.testing.assert_close(named, expected)
    named["loss"] /= 4  # as timm's train.py does
    torch.testing.assert_close(named, expected | {"loss": expected["loss"] / 4})


@pytest.mark.parametrize("source", ["labels", "teacher", "sparse", "terms"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_hard_term_of_the_callers_own(source: str, alpha: float) -> None:
    student_logits, labels, batch = make_step()
    teacher, mse = nn.Linear(FEATURES, CLASSES), LogitTerm(lambda s, t, y: logit_mse(s, t))
    make = partial(Distiller, alpha=alpha)
    distiller = {
        "labels": make(),
        "teacher": make(teacher),
        "sparse": make(targets=lambda index, view: sparsify(torch.zeros(BATCH, CLASSES), 2)),
        "terms": make(teacher, terms={"mse": mse}),
    }[source]
    expected = distiller(student_logits, labels, **batch)
    own = nn.functional.cross_entropy(student_logits, labels)
    unknown = torch.full((BATCH,), -1) if source != "terms" else labels
    named = distiller(student_logits, unknown, **batch, hard_loss=own)
    torch.testing.assert_close(named, expected)
    for terms in (named, expected):
        terms["gradient"] = torch.autograd.grad(terms["loss"], student_logits)[0]
    torch.testing.assert_close(named["gradient"], expected["gradient"])
    doubled = distiller(student_logits, labels, **batch, hard_loss=2 * own, normalizer=2 * BATCH)
    torch.testing.assert_close(doubled["hard_loss"], own.detach())
    with pytest.raises(TypeError, match="hard_loss must be a tensor, got float"):
        distiller(student_logits, labels, **batch, hard_loss=own.item())
    with pytest.raises(ValueError, match=r"hard_loss must be a scalar, got shape \[2\]"):
        distiller(student_logits, labels, **batch, hard_loss=torch.ones(2))


def test_teacher_is_not_run_at_alpha_0() -> None:
    student_logits, labels, batch = make_step()

    def teacher(inputs: Tensor) -> Tensor:
        raise AssertionError("the teacher was run")

    distiller = Distiller(teacher, alpha=0.0)
    terms = distiller(student_logits, labels)
    assert list(terms) == ["loss", "hard_loss"]
    assert terms["loss"] == hard_loss(student_logits, labels)
    distiller.alpha = 0.5  # a schedule
    with pytest.raises(AssertionError, match="was run"):
        distiller(student_logits, labels, **batch)


def test_teacher_is_frozen_and_apart_from_the_module() -> None:
    student_logits, labels, batch = make_step()
    module = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES), nn.Dropout(0.5))
    before = copy.deepcopy(module.state_dict())
    distiller = Distiller(module)
    assert isinstance(distiller.teacher, Teacher)
    first = distiller(student_logits, labels, **batch)
    first["loss"].backward()
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        module[0].weight.add_(1)  # the module is trained further
    assert distiller(student_logits, labels, **batch)["loss"] == first["loss"]


def test_teacher_is_run_without_gradients() -> None:
    student_logits, labels, batch = make_step()
    batch["inputs"].requires_grad_()
    module = nn.Linear(FEATURES, CLASSES)
    Distiller(lambda inputs: module(inputs))(student_logits, labels, **batch)["loss"].backward()
    assert batch["inputs"].grad is None
    assert module.weight.grad is None
    assert student_logits.grad is not None


def test_is_no_part_of_a_module() -> None:
    model = nn.Linear(FEATURES, CLASSES)
    names = list(model.state_dict())
    model.distiller = Distiller(nn.Linear(FEATURES, CLASSES))
    assert list(model.state_dict()) == names
    assert len(list(model.parameters())) == 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
@pytest.mark.parametrize("source", ["teacher", "targets"])
def test_copies_and_pickles(clone: Any, source: str) -> None:
    student_logits, labels, batch = make_step()
    value = nn.Linear(FEATURES, CLASSES) if source == "teacher" else CachedLogits()
    distiller = Distiller(**{source: value}, temperature=2.0, alpha=0.3)
    expected = distiller(student_logits, labels, **batch)
    assert clone(distiller)(student_logits, labels, **batch) == expected


@pytest.mark.parametrize("source", ["teacher", "targets"])
def test_step_compiles_whole(source: str) -> None:
    _, labels, batch = make_step()
    value = nn.Linear(FEATURES, CLASSES) if source == "teacher" else CachedLogits()
    distiller = Distiller(**{source: value})
    student = nn.Linear(FEATURES, CLASSES)

    def step(inputs: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        return distiller(student(inputs), labels, inputs=inputs, index=index)

    expected = step(batch["inputs"], labels, batch["index"])
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    terms = compiled(batch["inputs"], labels, batch["index"])
    torch.testing.assert_close(terms, expected)
    gradients = [torch.autograd.grad(t["loss"], student.weight)[0] for t in (terms, expected)]
    torch.testing.assert_close(*gradients)


def test_loss_does_not_depend_on_the_split_into_micro_batches() -> None:
    student_logits, labels, batch = make_step()
    distiller = Distiller(targets=CachedLogits(2))
    whole = distiller(student_logits, labels, index=batch["index"])["loss"]
    parts = [
        distiller(logits, part, index=index)["loss"]
        for logits, part, index in zip(
            student_logits.split(2), labels.split(2), batch["index"].split(2), strict=True
        )
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("source", ["cached", "sparse", "teacher", "labels"])
def test_micro_batches_of_different_sizes_add_up(source: str) -> None:
    student_logits, labels, batch = make_step()
    cached = CachedLogits(2)
    distiller = {
        "cached": Distiller(targets=cached),
        "sparse": Distiller(targets=lambda index, view: sparsify(cached(index, view), 2)),
        "teacher": Distiller(
            nn.Linear(FEATURES, CLASSES),
            terms={"mse": LogitTerm(lambda z_s, z_t, _: logit_mse(z_s, z_t), weight=0.5)},
        ),
        "labels": Distiller(label_smoothing=0.1),
    }[source]
    whole = distiller(student_logits, labels, **batch)
    parts = [
        distiller(
            student_logits[part],
            labels[part],
            normalizer=BATCH,
            **{name: value[part] for name, value in batch.items()},
        )
        for part in torch.arange(BATCH).split([1, 3, 2])
    ]
    torch.testing.assert_close({name: sum(p[name] for p in parts) for name in whole}, whole)
    for value in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="normalizer must be > 0 and finite, got"):
            distiller(student_logits, labels, normalizer=value, **batch)


@pytest.mark.parametrize("source", ["teacher", "cached", "sparse", "ensemble"])
def test_unlabelled_data(source: str) -> None:
    student_logits, labels, batch = make_step()
    cached = CachedLogits(2)
    distiller = {
        "teacher": Distiller(
            nn.Linear(FEATURES, CLASSES),
            alpha=1.0,
            terms={"mse": LogitTerm(lambda z_s, z_t, _: logit_mse(z_s, z_t), weight=0.5)},
        ),
        "cached": Distiller(targets=cached, alpha=1.0),
        "sparse": Distiller(targets=lambda index, view: sparsify(cached(index, view), 2), alpha=1),
        "ensemble": Distiller(
            Ensemble([nn.Linear(FEATURES, CLASSES)] * 2), alpha=1.0, label_smoothing=0.1
        ),
    }[source]
    for normalizer in (None, 9):
        expected = distiller(student_logits, labels, normalizer=normalizer, **batch)
        terms = distiller(student_logits, None, normalizer=normalizer, **batch)
        del expected["hard_loss"]
        assert terms == expected
        gradients = [torch.autograd.grad(t["loss"], student_logits)[0] for t in (terms, expected)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("source", ["classes", "probabilities"])
def test_the_last_images_of_a_batch_may_have_no_label(source: str) -> None:
    """The hard term is the mean over the labelled, the soft term over all; parts add up."""
    student_logits, labels, batch = make_step()
    targets: Tensor = labels
    if source == "probabilities":
        targets = torch.randn(BATCH, CLASSES).softmax(-1)
    cached = CachedLogits()
    settings: dict[str, Any] = {"temperature": 2.0, "alpha": 0.7, "label_smoothing": 0.1}
    distiller = Distiller(targets=cached, **settings)
    index = batch["index"]
    found = distiller(student_logits, targets[:2], index=index, unlabelled=BATCH - 2)
    hard = hard_loss(student_logits[:2], targets[:2], label_smoothing=0.1)
    soft = distillation_terms(
        student_logits, cached(index, 0), labels, temperature=2.0, alpha=1.0
    ).loss
    torch.testing.assert_close(found["hard_loss"], hard.detach())
    torch.testing.assert_close(found["soft_loss"], soft.detach())
    torch.testing.assert_close(found["loss"], 0.3 * hard + 0.7 * soft)
    parts = [
        distiller(
            student_logits[rows],
            targets[rows][:labelled],
            index=index[rows],
            unlabelled=len(index[rows]) - labelled,
            labelled_share=2 / BATCH,
            normalizer=BATCH,
        )
        for rows, labelled in ((slice(0, 1), 1), (slice(1, 4), 1), (slice(4, BATCH), 0))
    ]
    for name, value in found.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)
    with pytest.raises(ValueError, match="labels must be of the 6 images less the 3 of unlabelled"):
        distiller(student_logits, targets[:2], index=index, unlabelled=3)


def test_terms_of_labels_need_them_of_all_images() -> None:
    student_logits, labels, batch = make_step()
    batch |= {"unlabelled": BATCH - 2}
    without = {"mse": LogitTerm(lambda z_s, z_t, y: logit_mse(z_s, z_t))}
    distiller = Distiller(targets=CachedLogits(), terms=without)
    assert "mse" in distiller(student_logits, labels[:2], **batch)
    of_labels = {"dkd": LogitTerm(partial(dkd_loss, temperature=2.0))}
    with pytest.raises(ValueError, match="labels must be given for the term 'dkd'"):
        Distiller(targets=CachedLogits(), terms=of_labels)(student_logits, labels[:2], **batch)


def test_labels_are_named_where_they_are_needed() -> None:
    student_logits, _, batch = make_step()
    teacher = nn.Linear(FEATURES, CLASSES)
    for alpha in (0.0, 0.5):
        with pytest.raises(ValueError, match=f"labels must be given at alpha {alpha}, got None"):
            Distiller(teacher, alpha=alpha)(student_logits, None, **batch)
    with pytest.raises(ValueError, match="labels must be given where there is neither a teacher"):
        Distiller(alpha=1.0)(student_logits, None)
    term = LogitTerm(partial(dkd_loss, temperature=2.0))
    with pytest.raises(ValueError, match="labels must be given for the term 'dkd', got None"):
        Distiller(teacher, alpha=1.0, terms={"dkd": term})(student_logits, None, **batch)
    mistaken = LogitTerm(partial(logit_mse, temperature=2.0))
    with pytest.raises(TypeError, match="argument 'temperature'"):
        Distiller(teacher, alpha=1.0, terms={"mse": mistaken})(student_logits, None, **batch)


class Output:
    """An output with logits among other things."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.hidden = logits, torch.zeros(BATCH, FEATURES)


@pytest.mark.parametrize(
    "wrap", [Output, lambda z: {"logits": z, "aux": z}, lambda z: (z, [z]), lambda z: [z]]
)
def test_logits_are_taken_of_outputs(wrap: Any) -> None:
    student_logits, labels, batch = make_step()
    module, cached = nn.Linear(FEATURES, CLASSES), CachedLogits()

    class Wrapped(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return wrap(super().forward(inputs))

    wrapped = Wrapped(FEATURES, CLASSES)
    wrapped.load_state_dict(module.state_dict())
    for plain, other in (
        (Distiller(), Distiller()),
        (Distiller(module), Distiller(wrapped)),
        (Distiller(module), Distiller(lambda inputs: wrap(module(inputs)))),
        (Distiller(Ensemble([module] * 2)), Distiller(Ensemble([wrapped] * 2))),
        (Distiller(targets=cached), Distiller(targets=lambda *at: wrap(cached(*at)))),
    ):
        expected = plain(student_logits, labels, **batch)
        assert other(wrap(student_logits), labels, **batch) == expected


def test_outputs_without_clear_logits_are_described() -> None:
    student_logits, labels, batch = make_step()
    pair = (student_logits, student_logits)
    for distiller in (Distiller(), Distiller(nn.Linear(FEATURES, CLASSES))):
        with pytest.raises(
            TypeError, match=r"student_logits must be .*, got tuple of \[6, 3\], \["
        ):
            distiller(pair, labels, **batch)
    for name, distiller in (
        ("teacher", Distiller(lambda _: pair)),
        ("targets", Distiller(targets=lambda *_: pair)),  # type: ignore[arg-type,return-value]
    ):
        with pytest.raises(TypeError, match=f"{name} must return .*, got tuple of .*: wrap it"):
            distiller(student_logits, labels, **batch)


def test_nested_inputs_reach_the_teacher() -> None:
    student_logits, labels, batch = make_step()

    class Pair(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask)

    teacher = Pair(FEATURES, CLASSES)
    inputs = {"x": batch["inputs"].double(), "mask": torch.tensor([1, 0, 1, 0]), "ids": labels}
    expected = Distiller(teacher)(student_logits, labels, inputs=batch["inputs"] * inputs["mask"])
    assert Distiller(teacher)(student_logits, labels, inputs=inputs) == expected


def test_cached_logits_move_to_the_students_device() -> None:
    student_logits, labels, batch = make_step()
    terms = Distiller(targets=CachedLogits())(
        student_logits.to("meta"), labels.to("meta"), index=batch["index"]
    )
    assert {term.device.type for term in terms.values()} == {"meta"}


def test_what_is_missing_is_named() -> None:
    student_logits, labels, batch = make_step()
    teacher = nn.Linear(FEATURES, CLASSES)
    with pytest.raises(ValueError, match="inputs must be given where there is a teacher"):
        Distiller(teacher)(student_logits, labels, index=batch["index"])
    with pytest.raises(ValueError, match="index must be given where targets are cached"):
        Distiller(targets=CachedLogits())(student_logits, labels, inputs=batch["inputs"])
    with pytest.raises(ValueError, match="teacher must be None where targets are given, got Lin"):
        Distiller(teacher, targets=CachedLogits())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(Distiller, temperature=float("nan")), ValueError, "temperature must be > 0 and"),
        (partial(Distiller, alpha=2), ValueError, r"alpha must be in \[0, 1\], got 2"),
        (partial(Distiller, average="mean"), ValueError, "average must be .* got 'mean'"),
        (partial(Distiller, label_smoothing=-1), ValueError, "label_smoothing must be in"),
        (partial(Distiller, teacher=3), TypeError, "teacher must be callable, got int"),
        (partial(Distiller, targets=torch.ones(2)), TypeError, "targets must be callable, got T"),
    ],
)
def test_settings_out_of_range(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# --- several labels, numbers ---

TASKS: dict[str, Any] = {"multi_label": multi_label_terms, "regression": regression_terms}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("members", [1, 2])
def test_the_loss_of_a_task_is_that_of_its_function(task: Any, alpha: float, members: int) -> None:
    student_logits, _, batch = make_step()
    teachers = [nn.Linear(FEATURES, CLASSES) for _ in range(members)]
    labels = torch.rand(BATCH, CLASSES)
    teacher = Ensemble(teachers) if members > 1 else teachers[0]
    found = Distiller(teacher, task=task, alpha=alpha, temperature=3.0)(
        student_logits, labels, **batch
    )
    teacher_logits = torch.stack([one(batch["inputs"]) for one in teachers]).squeeze(0)
    more = {"temperature": 3.0} if task == "multi_label" else {}
    expected = TASKS[task](student_logits, teacher_logits, labels, alpha=alpha, **more)._asdict()
    assert set(found) == ({"loss", "hard_loss"} if alpha == 0 else set(expected))
    torch.testing.assert_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("task", TASKS)
def test_labels_without_a_teacher_and_a_teacher_without_labels(task: Any) -> None:
    student_logits, _, batch = make_step()
    labels = torch.rand(BATCH, CLASSES)
    hard = {"multi_label": F.binary_cross_entropy_with_logits, "regression": F.mse_loss}[task]
    found = Distiller(task=task)(student_logits, labels)
    torch.testing.assert_close(found["loss"], hard(student_logits, labels))
    teacher = nn.Linear(FEATURES, CLASSES)
    unlabelled = Distiller(teacher, task=task, alpha=1.0)(student_logits, None, **batch)
    assert set(unlabelled) == {"loss", "soft_loss"}


@pytest.mark.parametrize("source", ["teacher", "targets", "sparse"])
def test_teacher_logits_of_inference_mode(source: str) -> None:
    student_logits, labels, batch = make_step()
    logits = torch.randn(BATCH, CLASSES)
    with torch.inference_mode():
        made = logits.clone()
        sparse = sparsify(logits, 2)
    more = {"targets": {"targets": lambda index, view: made}}
    more["sparse"] = {"targets": lambda index, view: sparse}
    given: Any = more.get(source, {"teacher": lambda inputs: made})
    terms = {} if source == "sparse" else {"mse": LogitTerm(lambda s, t, y: logit_mse(s, t))}
    found = Distiller(**given, terms=terms)(student_logits, labels, **batch)["loss"]
    (gradient,) = torch.autograd.grad(found, student_logits)
    given = sparsify(logits, 2) if source == "sparse" else logits
    distiller = Distiller(targets=lambda index, view: given, terms=terms)
    expected = distiller(student_logits, labels, **batch)["loss"]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student_logits)[0])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("of_labels", [0, 1])
@pytest.mark.parametrize("of_teacher", [0, 1])
@pytest.mark.parametrize("of_student", [0, 1])
def test_one_number_an_item_may_be_a_column(
    task: Any, members: int, of_labels: int, of_teacher: int, of_student: int
) -> None:
    def shaped(values: Tensor, columns: int) -> Tensor:
        return values.unsqueeze(-1) if columns else values

    values, labels, teacher = torch.randn(BATCH), torch.rand(BATCH), torch.randn(members, BATCH)
    means = teacher if members > 1 else teacher[0]
    found = Distiller(
        lambda _: shaped(means, of_teacher),
        task=task,
        terms={"l1": LogitTerm(lambda s, t, y: (s - t).abs().mean() + (s - y).abs().mean())},
    )(shaped(values, of_student), shaped(labels, of_labels), inputs=0)
    more = {"temperature": 3.5} if task == "multi_label" else {}
    expected = TASKS[task](values, means, labels, alpha=0.65, **more)
    torch.testing.assert_close(found["soft_loss"], expected.soft_loss)
    torch.testing.assert_close(found["hard_loss"], expected.hard_loss)
    l1 = (values - teacher).abs().mean() + (values - labels).abs().mean()
    torch.testing.assert_close(found["l1"], l1)


def test_a_task_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="task must be one of single_label, multi_label, regr"):
        Distiller(task="binary")  # type: ignore[arg-type]
    student_logits, _, batch = make_step()
    targets = CachedLogits(2)
    distiller = Distiller(
        targets=lambda index, view: sparsify(targets(index, view), 2), task="multi_label"
    )
    with pytest.raises(ValueError, match="targets must have all logits for multi_label"):
        distiller(student_logits, torch.rand(BATCH, CLASSES), **batch)
