"""Further terms of a distiller: their features and projections, and wrappers they work in."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_jobs import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from selfkd import Distiller, Teacher
from selfkd.distill.features import Features
from selfkd.distill.terms import FeatureTerm, LogitTerm
from selfkd.losses.distillation import distillation_terms
from selfkd.losses.features import attention_transfer, hint_loss
from selfkd.losses.logits import dkd_loss, soft_cross_entropy


def make_net(width: int, *, inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, width),
        nn.ReLU(inplace=inplace),
        nn.Linear(width, width),
        nn.ReLU(inplace=inplace),
        nn.Linear(width, 4),
    )


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6), torch.randint(4, (8,))


def setting(**changes: Any) -> tuple[nn.Module, Teacher, Distiller]:
    torch.manual_seed(0)
    student, teacher = make_net(5), Teacher(make_net(5))
    terms = {"hint": {"student": "2", "teacher": "2", "weight": 0.5}}
    options: dict[str, Any] = {"terms": terms, "student": student, **changes}
    return student, teacher, Distiller(teacher, **options)


def test_a_feature_term_is_added_with_its_weight(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student, teacher, distiller = setting()
    terms = distiller(student(inputs), labels, inputs=inputs)
    expected = hint_loss(student[:3](inputs), teacher.module[:3](inputs))  # type: ignore[index]
    plain = distillation_terms(
        student(inputs), teacher(inputs), labels, temperature=3.5, alpha=0.65
    )
    assert terms["hint"].item() == pytest.approx(expected.item())
    assert not terms["hint"].requires_grad
    assert terms["loss"].item() == pytest.approx(plain.loss.item() + 0.5 * expected.item())
    assert terms["soft_loss"].item() == pytest.approx(plain.soft_loss.item())


def test_its_gradient_reaches_the_student_and_only_the_student(
    batch: tuple[Tensor, Tensor],
) -> None:
    inputs, labels = batch
    student, teacher, distiller = setting(alpha=0.0)
    distiller(student(inputs), labels, inputs=inputs)["loss"].backward()
    found = student[0].weight.grad.clone()  # type: ignore[index,union-attr]
    student.zero_grad()
    loss = nn.functional.cross_entropy(student(inputs), labels)
    loss = loss + 0.5 * hint_loss(student[:3](inputs), teacher.module[:3](inputs))  # type: ignore[index]
    loss.backward()
    torch.testing.assert_close(found, student[0].weight.grad)  # type: ignore[index]
    assert all(p.grad is None for p in teacher.module.parameters())


class Checkpointed(nn.Module):
    """A network whose block is checkpointed in train mode."""

    def __init__(self, *, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem, self.head, self.reentrant = nn.Linear(6, 5), nn.Linear(5, 4), reentrant
        self.block = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.stem(inputs)
        if self.reentrant is None or not self.training:
            return self.head(self.block(hidden))
        return self.head(checkpoint(self.block, hidden, use_reentrant=self.reentrant))


def hint_gradient(batch: tuple[Tensor, Tensor], path: str, reentrant: bool | None) -> Tensor:
    inputs, labels = batch
    torch.manual_seed(0)
    student, teacher = Checkpointed(reentrant=reentrant), Checkpointed()
    distiller = Distiller(teacher, terms={"hint": {"student": path}}, student=student)
    distiller(student(inputs), labels, inputs=inputs)["loss"].backward()
    assert student.block[0].weight.grad is not None
    return student.block[0].weight.grad  # type: ignore[return-value]


def test_a_checkpointed_student_learns_of_its_features_or_is_refused(
    batch: tuple[Tensor, Tensor],
) -> None:
    for path in ("block.0", "block"):
        plain = hint_gradient(batch, path, None)
        torch.testing.assert_close(hint_gradient(batch, path, False), plain)
    # the output of the checkpointed module itself gets its graph afterwards
    torch.testing.assert_close(hint_gradient(batch, "block", True), plain)
    with pytest.raises(
        ValueError, match=r"feature 'block\.0' of the student, of 'hint', must have"
    ):
        hint_gradient(batch, "block.0", True)


def test_features_need_a_graph_where_the_student_trains(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student, _, distiller = setting()
    student.eval()
    with torch.no_grad():
        logits = student(inputs)
    expected = distiller(logits, labels, inputs=inputs)["hint"]  # validation, without no_grad here
    student.train()
    with torch.no_grad():
        assert distiller(student(inputs), labels, inputs=inputs)["hint"] == expected
    with pytest.raises(ValueError, match="student_logits must have a graph"):
        distiller(student(inputs).detach(), labels, inputs=inputs)
    for parameter in student[:3].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="feature '2' of the student, of 'hint', must have a gr"):
        distiller(student(inputs), labels, inputs=inputs)
    student.eval()  # trained all the same, such as for frozen statistics of batch normalisation
    with pytest.raises(ValueError, match="feature '2' of the student, of 'hint', must have a gr"):
        distiller(student(inputs), labels, inputs=inputs)
    _, _, measured = setting(terms={"hint": FeatureTerm("2", weight=0.0)}, student=student)
    assert measured(student(inputs), labels, inputs=inputs)["hint"] == expected


@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.half)],
)
def test_student_and_teacher_of_different_precision(
    batch: tuple[Tensor, Tensor], of_student: torch.dtype, of_teacher: torch.dtype
) -> None:
    inputs, labels = batch
    terms: dict[str, Any] = {
        "hint": {"student": "2", "teacher": "2", "project": (5, 5)},
        "plain": {"student": "2", "teacher": "2"},
    }
    student, teacher, distiller = setting(terms=terms)
    expected = distiller(student(inputs), labels, inputs=inputs)
    student.to(of_student)
    teacher.module.to(of_teacher)
    inputs = inputs.to(of_student)
    found = distiller(student(inputs), labels, inputs=inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value, rtol=0.05, atol=0.02)
    found["loss"].backward()
    assert all(p.grad is not None for p in (*student.parameters(), *distiller.parameters()))


def test_a_teacher_that_is_the_student_itself_is_refused() -> None:
    student, _, _ = setting()
    terms = {"hint": FeatureTerm("2")}
    with pytest.raises(ValueError, match="teacher must be another module than the student"):
        Distiller(Teacher(student, copy=False), terms=terms, student=student)


def test_wildcards_are_lists_and_their_terms_a_mean(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    terms = {"all": FeatureTerm("[02]", loss=hint_loss)}
    student, teacher, distiller = setting(terms=terms)
    found = distiller(student(inputs), labels, inputs=inputs)["all"]
    each = [
        hint_loss(student[:end](inputs), teacher.module[:end](inputs))  # type: ignore[index]
        for end in (1, 3)
    ]
    assert found.item() == pytest.approx(sum(value.item() for value in each) / 2)


def test_projections_are_the_optimiser_s_and_saved_apart(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    torch.manual_seed(0)
    student, teacher = make_net(5), make_net(9)
    terms = {"hint": FeatureTerm("[02]", project=(5, 9))}
    distiller = Distiller(teacher, terms=terms, student=student)
    assert sum(p.numel() for p in distiller.parameters()) == 2 * (5 * 9 + 9)
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        values = distiller(student(inputs), labels, inputs=inputs)
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        losses.append(values["hint"].item())
    assert losses[-1] < 0.7 * losses[0]
    assert not any("hint" in name for name in student.state_dict())
    other = Distiller(teacher, terms=terms, student=make_net(5))
    other.load_state_dict(distiller.state_dict())
    for mine, theirs in zip(distiller.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_logit_terms_work_with_cached_targets(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student, teacher = make_net(5), Teacher(make_net(5))
    cached = teacher(inputs)

    def dkd(z_s: Tensor, z_t: Tensor, y: Tensor) -> Tensor:
        return dkd_loss(z_s, z_t, y, temperature=4.0)

    distiller = Distiller(
        targets=lambda index, view: cached[index], terms={"dkd": LogitTerm(dkd, weight=2.0)}
    )
    terms = distiller(student(inputs), labels, index=torch.arange(8))
    expected = dkd_loss(student(inputs), cached, labels, temperature=4.0)
    assert terms["dkd"].item() == pytest.approx(expected.item())


def test_generation_0_goes_through_the_same_call(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student = make_net(5)
    terms = {"hint": {"student": "2"}}
    distiller = Distiller(terms=terms, student=student)
    assert sorted(distiller(student(inputs), labels)) == ["hard_loss", "loss"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: Distiller(t, terms={"a": {"student": "9"}}, student=s), "path must be .*'9'"),
        (
            lambda s, t: Distiller(t, terms={"a": {"student": "0"}}).attach(None),
            "student must be given",
        ),
        (
            lambda s, t: Distiller(t, terms={"a": {"student": "0"}})(
                torch.zeros(1, 4), torch.tensor([0]), inputs=torch.zeros(1, 6)
            ),
            "terms of features must have a student",
        ),
        (
            lambda s, t: Distiller(
                targets=lambda i, v: i, terms={"a": {"student": "0"}}, student=s
            ),
            r"terms of features \(a\) need a live teacher",
        ),
        (
            lambda s, t: FeatureTerm("0", weight=-1.0),
            "weight must be at least 0 and finite, got -1",
        ),
        (
            lambda s, t: LogitTerm(lambda a, b, c: a, weight=float("nan")),
            "weight must be at least 0",
        ),
        (
            lambda s, t: Distiller(t, terms={"soft_loss": {"student": "0"}}, student=s),
            "terms must have names of their own, got 'soft_loss'",
        ),
    ],
)
def test_bad_terms(make: Callable[[nn.Module, Teacher], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(make_net(5), Teacher(make_net(5)))


def test_lists_of_different_lengths_are_refused_at_the_start() -> None:
    student = make_net(5)
    with pytest.raises(ValueError, match=r"'\[02\]' must name as many submodules as"):
        Distiller(make_net(5), terms={"a": FeatureTerm("[02]", "[024]")}, student=student)
    assert all(not module._forward_hooks for module in student.modules())


def test_a_wrong_path_does_not_wait_for_a_teacher() -> None:
    with pytest.raises(ValueError, match=r"path must be .* got '9'"):
        Distiller(terms={"a": {"student": "9"}}, student=make_net(5))


def test_nan_of_the_teacher_is_named(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    inputs[3, 2] = torch.nan
    student, teacher = make_net(5), Teacher(make_net(5))
    with pytest.raises(ValueError, match="must be numbers for soft_loss, got nan in row 3"):
        Distiller(teacher)(student(torch.zeros(8, 6)), labels, inputs=inputs)


def test_nan_of_the_teacher_s_features_is_named(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student, teacher, distiller = setting()

    def make_nan(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[2, 1] = torch.nan
        return output

    teacher.module[2].register_forward_hook(make_nan)  # type: ignore[index]
    teacher.module[3].register_forward_hook(  # type: ignore[index]
        lambda module, args, output: output.nan_to_num()
    )
    distiller = Distiller(teacher, terms=distiller.terms, student=student)
    with pytest.raises(ValueError, match=r"'2' of the teacher must be numbers for hint, .* row 2"):
        distiller(student(inputs), labels, inputs=inputs)


def test_hints_of_maps_are_pooled_to_the_smaller(batch: tuple[Tensor, Tensor]) -> None:
    """Hints between neighbouring stages of a ResNet, with a projection of the channels."""
    from timm.models.resnet import BasicBlock, ResNet  # seconds, which spawned processes save

    torch.manual_seed(0)
    teacher = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    student = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    terms = {"hint": {"student": "layer2", "teacher": "layer3", "project": (128, 256)}}
    distiller = Distiller(teacher, terms=terms, student=student)
    images = torch.randn(8, 3, 32, 32)
    with Features(student, ["layer2"]) as found, Features(teacher.eval(), ["layer3"]) as expected:
        logits = student(images)
        teacher(images)
    hint = distiller(logits, batch[1], inputs=images)["hint"]
    maps = distiller.projections["hint_0"](F.avg_pool2d(found["layer2"], 2))
    assert hint.item() == pytest.approx(F.mse_loss(maps, expected["layer3"]).item(), rel=1e-5)
    assert hint > 0


# --- copies and wrappers ---


def test_a_copy_of_the_student_is_a_teacher_of_its_own(batch: tuple[Tensor, Tensor]) -> None:
    """Forward passes of a copy do not affect the terms of the distiller of the original."""
    inputs, labels = batch
    student, _, distiller = setting()
    logits = student(inputs)
    copied = Teacher(student)
    copied(torch.zeros(3, 6))
    before = distiller(logits, labels, inputs=inputs)["hint"]
    assert before == distiller(student(inputs), labels, inputs=inputs)["hint"]


def through_a_file(model: nn.Module) -> nn.Module:
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("clone", [copy.deepcopy, through_a_file])
def test_an_attached_student_is_copied_without_what_looks_at_it(
    batch: tuple[Tensor, Tensor], clone: Callable[[nn.Module], nn.Module]
) -> None:
    inputs, labels = batch
    student, _, distiller = setting()
    student[4].register_forward_hook(other_hook)  # type: ignore[index]
    logits = student(inputs)  # the captured features have a graph, which cannot be copied
    copied = clone(student)
    assert torch.equal(copied(torch.zeros(3, 6)), student(torch.zeros(3, 6)))
    logits = student(inputs)
    expected = distiller(logits, labels, inputs=inputs)["hint"]
    copied(torch.zeros(3, 6))
    assert distiller(logits, labels, inputs=inputs)["hint"] == expected
    for teacher in (Teacher(student), Teacher(copied)):
        hooks = [hook for m in teacher.module.modules() for hook in m._forward_hooks.values()]
        assert hooks == [other_hook]  # only those of `Features` are removed
        assert not teacher.module._forward_pre_hooks
    assert len(student[2]._forward_hooks) == 1  # type: ignore[index]


def other_hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_a_copied_distiller_is_attached_anew(
    batch: tuple[Tensor, Tensor], clone: Callable[[Distiller], Distiller]
) -> None:
    inputs, labels = batch
    student, _, distiller = setting()
    expected = distiller(student(inputs), labels, inputs=inputs)
    copied = clone(distiller)
    with pytest.raises(ValueError, match=r"distiller\.attach\(student\)"):
        copied(student(inputs), labels, inputs=inputs)
    copied.attach(student)
    found = copied(student(inputs), labels, inputs=inputs)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}


def test_detached_hooks_are_gone(batch: tuple[Tensor, Tensor]) -> None:
    student, _, distiller = setting()
    distiller.detach()
    assert all(not module._forward_hooks for module in student.modules())
    assert not student._forward_pre_hooks


def test_micro_batches_have_the_loss_of_the_whole(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student, _, distiller = setting()
    distiller(student(inputs), labels, inputs=inputs)["loss"].backward()
    whole = [p.grad.clone() for p in student.parameters()]  # type: ignore[union-attr]
    student.zero_grad()
    for part in torch.arange(8).split(2):
        loss = distiller(student(inputs[part]), labels[part], inputs=inputs[part])["loss"]
        (loss / 4).backward()
    for parameter, expected in zip(student.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_autocast_changes_little(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student, _, distiller = setting()
    expected = distiller(student(inputs), labels, inputs=inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distiller(student(inputs), labels, inputs=inputs)
    assert found["loss"].dtype == torch.float32
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.05, atol=0.02)


def test_in_place_activations_do_not_change_what_was_captured(
    batch: tuple[Tensor, Tensor],
) -> None:
    inputs, labels = batch
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        student, teacher = make_net(5, inplace=inplace), make_net(5, inplace=inplace)
        distiller = Distiller(teacher, terms={"hint": {"student": "2"}}, student=student)
        found.append(distiller(student(inputs), labels, inputs=inputs)["hint"].item())
    assert found[0] == found[1]


def test_a_compiled_student_has_its_terms(batch: tuple[Tensor, Tensor]) -> None:
    inputs, labels = batch
    student, teacher, distiller = setting()
    expected = distiller(student(inputs), labels, inputs=inputs)["loss"]
    distiller.detach()
    compiled = torch.compile(student, backend="eager")
    distiller = Distiller(
        teacher, terms={"hint": {"student": "2", "weight": 0.5}}, student=compiled
    )
    found = distiller(compiled(inputs), labels, inputs=inputs)["loss"]
    torch.testing.assert_close(found, expected)
    found.backward()
    assert student[0].weight.grad is not None  # type: ignore[index]


def test_attention_maps_of_networks_of_other_widths(batch: tuple[Tensor, Tensor]) -> None:
    def conv(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 4),
        )

    student, teacher = conv(3), conv(7)
    terms = {"attention": FeatureTerm("1", loss=attention_transfer, weight=100.0)}
    distiller = Distiller(teacher, terms=terms, student=student)
    images = torch.randn(8, 1, 6, 6)
    found = distiller(student(images), batch[1], inputs=images)
    assert found["attention"].item() == pytest.approx(
        attention_transfer(student[:2](images), teacher[:2](images)).item()
    )


def _worker(rank: int, folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    student, teacher = make_net(5), Teacher(make_net(5))
    wrapped: nn.Module = student
    if kind == "ddp":
        wrapped = DistributedDataParallel(student)
    else:
        fully_shard(student)
    distiller = Distiller(teacher, terms={"hint": {"student": "2", "weight": 0.5}}, student=wrapped)
    torch.manual_seed(1)
    inputs, labels = torch.randn(8, 6), torch.randint(4, (8,))
    mine = slice(rank * 4, rank * 4 + 4)
    terms = distiller(wrapped(inputs[mine]), labels[mine], inputs=inputs[mine])
    terms["loss"].backward()
    gradient = student[0].weight.grad
    assert gradient is not None
    full: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    torch.save(full, folder / f"{rank}.pt")
    if kind == "fsdp":
        with pytest.raises(ValueError, match="module must have its parameters whole, got shards"):
            Teacher(student)
        sharded = fully_shard(copy.deepcopy(teacher.module))
        torch.testing.assert_close(
            Teacher(sharded, copy=False)(inputs[mine]), teacher(inputs[mine])
        )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(
    tmp_path: Path, batch: tuple[Tensor, Tensor], kind: str
) -> None:
    inputs, labels = batch
    student, _, distiller = setting()
    distiller(student(inputs), labels, inputs=inputs)["loss"].backward()
    on_ranks(_worker, 2, tmp_path, kind)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, student[0].weight.grad)  # type: ignore[index]


def _projecting(rank: int, folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    student, teacher = make_net(5), make_net(9)
    wrapped: nn.Module = student
    if kind == "ddp":
        wrapped = DistributedDataParallel(student)
    else:
        fully_shard(student)
    torch.manual_seed(2 + rank)  # another initial projection in each process
    distiller = Distiller(teacher, terms=PROJECTING, student=wrapped)
    distiller.detach()
    distiller.attach(wrapped)  # averaged once, not twice
    torch.manual_seed(1)
    inputs, labels = torch.randn(8, 6), torch.randint(4, (8,))
    mine = slice(rank * 4, rank * 4 + 4)
    for step in range(2):
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5)
        terms = distiller(wrapped(inputs[mine]), labels[mine], inputs=inputs[mine])
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.save(distiller.state_dict(), folder / f"{rank}_{step}.pt")


PROJECTING = {"hint": FeatureTerm("2", weight=0.5, project=(5, 9))}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_train_one_projection(
    tmp_path: Path, batch: tuple[Tensor, Tensor], kind: str
) -> None:
    inputs, labels = batch
    torch.manual_seed(0)
    student, teacher = make_net(5), make_net(9)
    torch.manual_seed(2)
    distiller = Distiller(teacher, terms=PROJECTING, student=student)
    assert not distiller.in_step
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5)
    on_ranks(_projecting, 2, tmp_path, kind)
    for step in range(2):
        distiller(student(inputs), labels, inputs=inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}_{step}.pt", weights_only=True)
            torch.testing.assert_close(found, dict(distiller.state_dict()))


def test_a_term_may_be_the_only_one(batch: tuple[Tensor, Tensor]) -> None:
    """At alpha 0 the teacher is still run, for the further terms."""
    inputs, labels = batch
    student, teacher, distiller = setting(
        alpha=0.0,
        terms={
            "soft": LogitTerm(lambda z_s, z_t, _: soft_cross_entropy(z_s, z_t, temperature=2.0))
        },
    )
    terms = distiller(student(inputs), labels, inputs=inputs)
    expected = soft_cross_entropy(student(inputs), teacher(inputs), temperature=2.0)
    assert terms["loss"].item() == pytest.approx(terms["hard_loss"].item() + expected.item())
