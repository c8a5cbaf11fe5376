"""Terms by their names: which loss each is, what it compares, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import on_ranks
from torch import Tensor, nn

from selfkd import Distiller, Ensemble, Teacher, losses
from selfkd.config import Config
from selfkd.distill.loss_names import LOSSES
from selfkd.distill.named_terms import make_terms
from selfkd.distill.terms import FeatureTerm, LogitTerm, Term
from selfkd.losses import Projection, ensemble_logits

ELSEWHERE = {
    *("distillation_loss", "distillation_terms", "hard_loss", "soft_targets"),  # the loss itself
    *("multi_label_terms", "regression_terms", "sparse_terms"),  # of other labels, of top-k
    *("sequence_terms", "linear_sequence_terms", "liger_fits", "sampled_targets"),  # of tokens
    *("confidence_weighted_loss", "confidence_weights", "permute_nontarget"),  # target_transform
    *("teacher_free_logits", "ensemble_logits", "standardize_logits", "sparsify"),
    *("reconcile", "every_other"),
}
LAYERS = [name for name, loss in LOSSES.items() if loss.compares != "logits"]
OF_TOKENS = {"cosine", "hidden_state", "attention_matrices"}  # tests/tasks/text/test_terms.py
LOGITS = [name for name, loss in LOSSES.items() if loss.compares != "layers"]


def named(*terms: Mapping[str, Any]) -> dict[str, Term]:
    config = Config().at({"distill.terms": list(terms)})
    labels = torch.arange(12) % 3
    return make_terms(config.distill.terms, temperature=3.0, labels=labels, seed=4)


def make_net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3), nn.Flatten(), nn.Linear(width * 4, 3)
    )


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 1, 6, 6), torch.arange(8) % 3


def test_every_public_loss_has_a_name_or_a_place_of_its_own() -> None:
    public = {
        name
        for name, value in vars(losses).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert {loss.function for loss in LOSSES.values()} == public - ELSEWHERE


@pytest.mark.parametrize("name", LOGITS)
def test_a_term_of_logits_is_the_loss_whether_they_are_cached_or_not(name: str) -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    term = named({"name": name, "weight": 2.0})[name]
    assert isinstance(term, LogitTerm)
    assert term.weight == 2.0
    value = term.loss(student, teacher, labels)
    cached = teacher - teacher.amax(dim=1, keepdim=True)
    torch.testing.assert_close(term.loss(student, cached, labels), value)
    function = getattr(losses, LOSSES[name].function)
    args = {"temperature": 3.0} if "temperature" in LOSSES[name].args else {}
    given = (student, teacher)
    if LOSSES[name].shift:
        given = tuple(rows - rows.mean(dim=1, keepdim=True) for rows in given)  # type: ignore[assignment]
    expected = function(*given, *([labels] if name == "dkd" else []), **args)
    torch.testing.assert_close(value, expected)


def test_of_several_teachers_logits_are_averaged_first() -> None:
    torch.manual_seed(0)
    student, members = torch.randn(6, 4), torch.randn(3, 6, 4)
    (term,) = named({"name": "reverse_kl", "args": {"temperature": 2.0}}).values()
    assert isinstance(term, LogitTerm)
    expected = losses.reverse_kl(student, ensemble_logits(members), temperature=2.0)
    torch.testing.assert_close(term.loss(student, members, torch.zeros(6)), expected)


@pytest.mark.parametrize("name", sorted({*LAYERS} - OF_TOKENS - {"crd"}))
@pytest.mark.parametrize("teachers", [1, 2])
def test_a_term_of_layers_is_the_loss_of_their_outputs(
    batch: tuple[Tensor, Tensor], name: str, teachers: int
) -> None:
    inputs, labels = batch
    student, modules = make_net(2), [make_net(5 + n) for n in range(teachers)]
    project = name in ("hint",)
    term = {"name": name, "student": "0", "project": project}
    distiller = Distiller(
        Ensemble([Teacher(module) for module in modules]),
        terms=named(term),
        student=student,
        example=inputs[:1],
        alpha=0.0,
    )
    terms = distiller(student(inputs), labels, inputs=inputs)
    own = student[0](inputs)
    values = []
    for number, module in enumerate(modules):
        other, ours = module[0](inputs).detach(), own
        if project:
            ours = distiller.projections["_".join(["hint", "0", *str(number)][: 1 + teachers])](own)
        if name.startswith("rkd"):
            ours, other = ours.mean((2, 3)), other.mean((2, 3))
        values.append(getattr(losses, LOSSES[name].function)(ours, other))
    expected = torch.stack(values).mean()
    torch.testing.assert_close(terms[name], expected.detach())
    torch.testing.assert_close(terms["loss"], (terms["hard_loss"] + expected))
    terms["loss"].backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert all(p.grad is None for module in modules for p in module.parameters())


def test_channels_of_projections_are_those_of_an_example(batch: tuple[Tensor, Tensor]) -> None:
    inputs, _ = batch
    terms = {"hint": FeatureTerm("[01]", project=True)}
    student = make_net(2).train()
    with pytest.raises(ValueError, match="example must be given for the channels of hint"):
        Distiller(make_net(5), terms=terms, student=student)
    student[0].bias.requires_grad_(False)
    distiller = Distiller(make_net(5), terms=terms, student=student, example=inputs)
    made = [distiller.projections[f"hint_{n}"] for n in range(2)]
    assert all(isinstance(each, Projection) for each in made)
    assert [tuple(p.shape) for p in distiller.parameters()] == [(5, 2), (5,)] * 2
    assert student.training


def make_contrast(student: nn.Module, example: Tensor) -> Distiller:
    args = {"dim": 4, "negatives": 6}
    terms = named({"name": "crd", "student": "0", "teacher": "1", "args": args})
    torch.manual_seed(7)
    return Distiller(make_net(5), terms=terms, student=student, example=example, alpha=0.0)


def test_crd_goes_on_from_its_state_bit_for_bit(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch

    def steps(distiller: Distiller, student: nn.Module, numbers: range) -> list[float]:
        found = []
        optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
        for number in numbers:
            index = torch.arange(4) + 4 * (number % 2)
            rows = slice(4 * (number % 2), 4 * (number % 2) + 4)
            terms = distiller(student(inputs[rows]), labels[rows], inputs=inputs[rows], index=index)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            found.append(float(terms["crd"]))
        return found

    student = make_net(2)
    distiller = make_contrast(student, inputs)
    first = steps(distiller, student, range(3))
    state, weights = distiller.state_dict(), student.state_dict()
    state = {
        key: value if isinstance(value, dict) else value.clone() for key, value in state.items()
    }
    weights = {key: value.clone() for key, value in weights.items()}
    after = steps(distiller, student, range(3, 6))
    again = make_net(2)
    again.load_state_dict(weights)
    other = make_contrast(again, inputs)
    other.load_state_dict(state)
    assert steps(other, again, range(3, 6)) == after
    assert len({*first, *after}) == 6
    assert not [key for key in student.state_dict() if "crd" in key]


def _contrasting(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    student = make_net(2)
    inputs, labels = torch.randn(8, 1, 6, 6), torch.arange(8) % 3
    distiller = make_contrast(student, inputs)
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
    index = torch.arange(8)[rank * 4 : rank * 4 + 4]
    for _ in range(2):
        terms = distiller(student(inputs[index]), labels[index], inputs=inputs[index], index=index)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    torch.save(distiller.state_dict(), folder / f"{rank}.pt")


def test_banks_of_crd_are_the_same_in_all_processes(tmp_path: Path) -> None:
    on_ranks(_contrasting, 2, tmp_path)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    (bank,) = [value["student"] for value in states[0].values() if isinstance(value, dict)]
    first = make_contrast(make_net(2), torch.zeros(1, 1, 6, 6)).state_dict()
    (before,) = [value["student"] for value in first.values() if isinstance(value, dict)]
    assert (bank != before).any(dim=1).tolist() == [True] * 8 + [False] * 4


def test_crd_of_a_batch_without_its_index_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student = make_net(2)
    distiller = make_contrast(student, inputs)
    with pytest.raises(ValueError, match="index must be given for crd"):
        distiller(student(inputs), labels, inputs=inputs)


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ({"name": "hints"}, "got 'hints': did you mean hint"),
        ({"name": "attention"}, "student must be the path of a layer for attention"),
        ({"name": "dkd", "student": "0"}, "student must be left out for dkd"),
        ({"name": "hint", "teacher": "0"}, "student must be given with teacher, got '0'"),
        ({"name": "pkt", "project": True}, "project must be false for pkt"),
        ({"name": "crd", "student": "0", "project": True}, "projections of its own"),
        ({"name": "dkd", "args": {"temp": 1}}, "args must be those of dkd, got 'temp'"),
        ({"name": "pkt", "args": {"power": 1}}, "got 'power', and it has none"),
    ],
)
def test_terms_that_no_loss_can_be_are_refused(term: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        named(term)


def test_layers_of_unlike_shape_need_a_projection(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student = make_net(2)
    distiller = Distiller(
        make_net(5), terms=named({"name": "hint", "student": "0"}), student=student
    )
    with pytest.raises(ValueError, match=r"one shape, got \[2, 4, 4\].*\[5, 4, 4\].*project: true"):
        distiller(student(inputs), labels, inputs=inputs)
