"""The training task for timm: its loss equals that of timm's own task, and works in timm's loop."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.task import (
    LogitDistillationTask,
    MultiLabelClassificationEvaluator,
    TrainingTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import selfkd.losses
from selfkd import Distiller, Ensemble, Teacher, make_model
from selfkd.integrations.timm import DistillationTask, WithIndex
from selfkd.losses import distillation_terms

BATCH, CLASSES = 8, 5
SETTINGS: dict[str, float] = {"temperature": 3.0, "alpha": 0.7}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small for more
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def make_net() -> nn.Module:
    """Make a network of timm's registry without dropout, with batch norm."""
    return make_model("selfkd_resnet8", {"width": 4}, num_classes=CLASSES, in_chans=3, image_size=8)


def make_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, 8, 8), torch.randint(CLASSES, (BATCH,))


def gradients(task: nn.Module, inputs: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a task's loss by name."""
    task.zero_grad()
    task(inputs, target)["loss"].backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in task.named_parameters()
        if name.startswith("trainable_module") and parameter.grad is not None
    }


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (3.0, 0.7), (8.0, 1.0)])
def test_is_timms_own_task_for_one_teacher(temperature: float, alpha: float) -> None:
    student, teacher = make_net(), make_net()
    inputs, labels = make_batch()
    theirs = LogitDistillationTask(
        copy.deepcopy(student),
        copy.deepcopy(teacher),
        nn.CrossEntropyLoss(),
        task_loss_weight=1 - alpha,
        distill_loss_weight=alpha,
        temperature=temperature,
        verbose=False,
    ).train()
    distiller = Distiller(teacher.train(), temperature=temperature, alpha=alpha)
    ours = DistillationTask(student, distiller).train()
    assert isinstance(ours, TrainingTask)
    expected = gradients(theirs, inputs, labels)
    assert len(expected) == len(list(student.parameters()))
    torch.testing.assert_close(gradients(ours, inputs, labels), expected)
    their_result, result = theirs(inputs, labels), ours(inputs, labels)
    torch.testing.assert_close(result["loss"], their_result["loss"])
    torch.testing.assert_close(result["output"], their_result["output"])
    torch.testing.assert_close(result["hard_loss"], their_result["task_loss"].detach())
    torch.testing.assert_close(result["soft_loss"], their_result["kd_loss"])
    assert set(their_result) <= set(result)  # no key of timm's result is missing
    torch.testing.assert_close(result["task_loss"], result["hard_loss"])
    torch.testing.assert_close(result["kd_loss"], result["soft_loss"])


MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "num_classes": CLASSES, "label_smoothing": 0.1}
RECIPES: dict[str, dict[str, Any]] = {
    "mixup": {"soft_targets": True},
    "mixup, BCE": {"loss_type": "bce", "soft_targets": True},
    "mixup, BCE, summed above a threshold": {
        "loss_type": "bce", "soft_targets": True, "bce_target_thresh": 0.2, "bce_sum": True,
    },
    "smoothing": {"smoothing": 0.1},
    "BCE": {"loss_type": "bce", "smoothing": 0.1},
    "JSD": {"loss_type": "jsd", "jsd_splits": 2, "smoothing": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_recipes_are_those_of_timms_own_task(recipe: str, alpha: float) -> None:
    student, teacher = make_net(), make_net()
    inputs, target = make_batch()
    if "mixup" in recipe:
        inputs, target = timm.data.Mixup(**MIXED)(inputs, target)
    theirs = LogitDistillationTask(
        copy.deepcopy(student),
        teacher,
        criterion_kwargs=RECIPES[recipe],
        task_loss_weight=1 - alpha,
        distill_loss_weight=alpha,
        temperature=3.0,
        verbose=False,
    ).train()
    distiller = Distiller(teacher, temperature=3.0, alpha=alpha)
    ours = DistillationTask(student, distiller, theirs.criterion).train()
    torch.testing.assert_close(gradients(ours, inputs, target), gradients(theirs, inputs, target))
    their_result, result = theirs(inputs, target), ours(inputs, target)
    torch.testing.assert_close(result["loss"], their_result["loss"])
    torch.testing.assert_close(result["task_loss"], their_result["task_loss"].detach())


def test_soft_targets_are_not_smoothed_again() -> None:
    student, (inputs, labels) = make_net().eval(), make_batch()
    mixed, target = timm.data.Mixup(**MIXED)(inputs, labels)
    task = DistillationTask(student, Distiller(make_net(), label_smoothing=0.1))
    expected = nn.functional.cross_entropy(student(mixed), target)
    torch.testing.assert_close(task(mixed, target)["hard_loss"], expected.detach())
    expected = nn.functional.cross_entropy(student(inputs), labels, label_smoothing=0.1)
    torch.testing.assert_close(task(inputs, labels)["hard_loss"], expected.detach())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("criterion", [None, nn.CrossEntropyLoss()])
def test_the_loss_can_be_divided_in_place(
    alpha: float, teacher: bool, criterion: nn.Module | None
) -> None:
    distiller = Distiller(make_net() if teacher else None, alpha=alpha)
    result = DistillationTask(make_net(), distiller, criterion)(*make_batch())
    before = {name: value.clone() for name, value in result.items()}
    loss = result["loss"]
    loss /= 4
    torch.testing.assert_close(result, before | {"loss": before["loss"] / 4})


class Several(nn.Module):
    """A network whose output has more than logits."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.net, self.output = make_net(), output

    def forward(self, inputs: Tensor) -> Any:
        logits = self.net(inputs)
        return {
            "dict": {"logits": logits, "features": inputs},
            "tuple": (logits, inputs),
            "no graph": logits.detach(),
            "maps": [inputs, inputs],
        }[self.output]


@pytest.mark.parametrize("output", ["dict", "tuple"])
def test_logits_are_taken_from_the_output(output: str) -> None:
    student = Several(output).eval()
    inputs, labels = make_batch()
    task = DistillationTask(student, Distiller(student.net, **SETTINGS))
    expected = DistillationTask(student.net, Distiller(student.net, **SETTINGS))(inputs, labels)
    torch.testing.assert_close(task(inputs, labels), expected)


def test_outputs_that_cannot_teach_are_refused() -> None:
    with pytest.raises(ValueError, match="student_logits must have a graph to train the student"):
        DistillationTask(Several("no graph"), Distiller()).train()(*make_batch())
    DistillationTask(Several("no graph"), Distiller()).eval()(*make_batch())
    with pytest.raises(TypeError, match=r"student must return a tensor .* got list of"):
        DistillationTask(Several("maps"), Distiller())(*make_batch())


def test_labels_only_an_ensemble_and_further_terms() -> None:
    student, members = make_net().eval(), [make_net().eval() for _ in range(3)]
    inputs, labels = make_batch()
    logits = student(inputs)
    plain = DistillationTask(student, Distiller())(inputs, labels)
    assert set(plain) == {"output", "loss", "hard_loss", "task_loss"}
    torch.testing.assert_close(plain["loss"], nn.functional.cross_entropy(logits, labels))

    averaged = DistillationTask(student, Distiller(Ensemble(members), **SETTINGS))(inputs, labels)
    teacher_logits = torch.stack([member(inputs) for member in members])
    expected = distillation_terms(logits, teacher_logits, labels, **SETTINGS)
    torch.testing.assert_close(averaged["loss"], expected.loss)

    distiller = Distiller(
        members[0], **SETTINGS, terms={"hint": {"student": "head.fc"}}, student=student
    )
    result = DistillationTask(student, distiller)(inputs, labels)
    hint = nn.functional.mse_loss(logits, teacher_logits[0])
    torch.testing.assert_close(result["hint"], hint.detach())
    soft = distillation_terms(logits, teacher_logits[0], labels, **SETTINGS).loss
    torch.testing.assert_close(result["loss"], soft + hint)


class CachedLogits:
    """Cached logits of two views."""

    def __init__(self, images: int) -> None:
        self.logits = torch.randn(2, images, CLASSES)

    def __call__(self, index: Tensor, view: int) -> Tensor:
        return self.logits[view][index]


def test_cached_targets_are_those_of_the_images_and_the_view() -> None:
    student, cached = make_net().eval(), CachedLogits(20)
    data = WithIndex(TensorDataset(torch.randn(20, 3, 8, 8), torch.randint(CLASSES, (20,))))
    task = DistillationTask(student, Distiller(targets=cached, **SETTINGS))
    seen = []
    for inputs, target in DataLoader(data, BATCH, shuffle=True):
        labels, index = target.T
        seen += index.tolist()
        assert torch.equal(inputs, data.dataset.tensors[0][index])
        assert torch.equal(labels, data.dataset.tensors[1][index])
        for view in (0, 1):
            task.view = view
            expected = distillation_terms(
                student(inputs), cached.logits[view][index], labels, **SETTINGS
            )
            torch.testing.assert_close(task(inputs, target)["loss"], expected.loss)
    assert sorted(seen) == list(range(20))
    with pytest.raises(ValueError, match="index must be given where targets are cached, got None"):
        task(inputs, labels)


@pytest.mark.parametrize("use_prefetcher", [True, False])
def test_numbers_come_through_timms_loader(tmp_path: Path, use_prefetcher: bool) -> None:
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        for number in range(3):
            image = Image.new("RGB", (8, 8), (100 * label + 10 * number,) * 3)
            image.save(tmp_path / str(label) / f"{number}.png")
    dataset = timm.data.create_dataset("", str(tmp_path))
    loader = timm.data.create_loader(
        WithIndex(dataset),
        (3, 8, 8),
        batch_size=3,
        is_training=True,
        no_aug=True,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        num_workers=0,
        device=torch.device("cpu"),
        use_prefetcher=use_prefetcher,
    )
    batches = list(loader)
    target = torch.cat([target for _, target in batches])
    assert sorted(target.tolist()) == [[0, 0], [0, 1], [0, 2], [1, 3], [1, 4], [1, 5]]
    brightness = torch.cat([inputs for inputs, _ in batches]).mean((1, 2, 3)) * 255
    torch.testing.assert_close(brightness, (100 * target[:, 0] + 10 * (target[:, 1] % 3)).float())
    task = DistillationTask(make_net(), Distiller(targets=CachedLogits(6)))
    assert task(*batches[0])["output"].shape == (3, CLASSES)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.rand(BATCH), TypeError, "labels must be class indices of torch.int64, got .*32"),
        (torch.full((BATCH, 2), 0.5), ValueError, r"or probabilities \[8, 5\], got \[8, 2\]"),
        (torch.zeros(BATCH, 3).long(), ValueError, r"label and index .*, got \[8, 3\]"),
        (torch.tensor(1), ValueError, r"target must be labels \[batch\].*, got \[\]"),
    ],
)
def test_other_targets_are_refused(target: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DistillationTask(make_net(), Distiller())(make_batch()[0], target)


def test_mixed_images_have_no_cached_targets() -> None:
    mixup = timm.data.Mixup(mixup_alpha=0.2, num_classes=CLASSES)
    task = DistillationTask(make_net(), Distiller(targets=CachedLogits(20)))
    with pytest.raises(ValueError, match="turn off what mixes images"):
        task(*mixup(*make_batch()))


def test_several_labels_and_numbers_are_given_to_the_distiller() -> None:
    student, (inputs, _) = make_net().eval(), make_batch()
    logits = student(inputs)
    several = torch.randint(2, (BATCH, CLASSES)).float()
    distiller = Distiller(task="multi_label")
    task = DistillationTask(student, distiller)
    torch.testing.assert_close(task(inputs, several)["loss"], distiller(logits, several)["loss"])
    assert isinstance(task.create_evaluator(), MultiLabelClassificationEvaluator)
    assert not isinstance(
        DistillationTask(student, Distiller()).create_evaluator(), MultiLabelClassificationEvaluator
    )
    numbers = torch.randn(BATCH, CLASSES)
    loss = DistillationTask(student, Distiller(task="regression"))(inputs, numbers)["loss"]
    torch.testing.assert_close(loss, nn.functional.mse_loss(logits, numbers))
    with pytest.raises(ValueError, match=r"labels must be class indices, got 0\.5 of image 1"):
        WithIndex([("a.png", 1), ("b.png", 0.5)])[1]


def test_data_sets_without_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="length and items by number, got list_iterator"):
        WithIndex(iter([]))


# --- what a loop does to a task ----------------------------------------------------------------


def test_the_teacher_stays_as_it_is_and_outside() -> None:
    teacher = Teacher(make_net())
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    task = DistillationTask(make_net(), Distiller(teacher, **SETTINGS)).train()
    gradients(task, *make_batch())
    assert task.trainable_module.training
    assert not any(module.training for module in teacher.module.modules())
    after = teacher.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name.split(".")[0] for name in task.state_dict()} == {"trainable_module"}
    assert len(list(task.parameters())) == len(list(task.trainable_module.parameters()))


def test_the_teacher_moves_with_the_task() -> None:
    ensemble = Ensemble([make_net(), make_net()])
    task = DistillationTask(make_net(), Distiller(ensemble)).to("meta")
    devices = {p.device.type for member in ensemble.members for p in member.module.parameters()}
    assert devices == {"meta"} == {task.device.type}
    assert DistillationTask(make_net(), Distiller(lambda inputs: inputs)).to("meta")


@pytest.mark.parametrize("project", [True, False])
def test_model_dtypes_of_timm(project: bool) -> None:
    student, teacher, (inputs, labels) = make_net(), make_net(), make_batch()
    terms: dict[str, Any] = {"hint": {"student": "head.fc", "project": (CLASSES, CLASSES)}}
    expected = DistillationTask(copy.deepcopy(student).eval(), Distiller(teacher, **SETTINGS))
    student.to(torch.bfloat16)
    distiller = Distiller(teacher, **SETTINGS, terms=terms if project else {})
    task = DistillationTask(student, distiller, dtype=torch.bfloat16).eval()
    result = task(inputs.bfloat16(), labels)
    assert result["output"].dtype == torch.bfloat16
    assert result["loss"].dtype == torch.float32
    result["loss"].backward()
    assert {p.dtype for p in task.parameters()} == {torch.bfloat16}
    assert all(p.grad is not None for p in task.parameters())
    hard = expected(inputs, labels)["hard_loss"]
    torch.testing.assert_close(result["hard_loss"], hard, rtol=0.02, atol=0.0)
    assert {p.dtype for p in distiller.teacher.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("loss", ["hint_loss", "similarity_preserving", "pkt"])
def test_a_batch_of_one_is_finite(loss: str) -> None:
    term = {"student": "head.fc", "loss": getattr(selfkd.losses, loss)}
    distiller = Distiller(make_net(), terms={"feature": term}, **SETTINGS)
    task = DistillationTask(make_net(), distiller).train()
    for target in (torch.tensor([0]), torch.full((1, CLASSES), 1 / CLASSES)):
        found = gradients(task, make_batch()[0][:1], target)
        assert all(gradient.isfinite().all() for gradient in found.values())


def test_micro_batches_have_the_gradient_of_the_whole() -> None:
    student = make_net().eval()  # batch norm would see the split
    task = DistillationTask(student, Distiller(make_net(), **SETTINGS))
    inputs, labels = make_batch()
    whole = gradients(task, inputs, labels)
    task.zero_grad()
    for part in torch.arange(BATCH).chunk(4):
        with task.no_sync():
            (task(inputs[part], labels[part])["loss"] / 4).backward()
    parts = {f"trainable_module.{name}": p.grad for name, p in student.named_parameters()}
    torch.testing.assert_close(parts, whole)


def test_compiled_it_is_the_same() -> None:
    task = DistillationTask(make_net(), Distiller(make_net(), **SETTINGS)).train()
    batch = make_batch()
    expected = list(gradients(task, *batch).values())
    compiled = task.compile(backend="eager")
    assert compiled is task.get_eval_model() is task.trainable_module
    torch.testing.assert_close(list(gradients(task, *batch).values()), expected)


@pytest.mark.usefixtures("group")
def test_distributed_it_is_the_same() -> None:
    task = DistillationTask(make_net(), Distiller(make_net(), **SETTINGS)).train()
    batch = make_batch()
    expected = list(gradients(task, *batch).values())
    assert task.prepare_distributed() is task
    assert isinstance(task.trainable_module, DistributedDataParallel)
    torch.testing.assert_close(list(gradients(task, *batch).values()), expected)


def test_a_copy_trains_by_itself() -> None:
    task = DistillationTask(make_net(), Distiller(make_net(), **SETTINGS)).train()
    batch = make_batch()
    twin = copy.deepcopy(task)
    torch.testing.assert_close(gradients(twin, *batch), gradients(task, *batch))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in task.parameters() if parameter.ndim > 1)
    assert twin.distiller.teacher.module is not task.distiller.teacher.module


def projecting(student: nn.Module) -> Distiller:
    hint: dict[str, Any] = {"student": "head.fc", "project": (CLASSES, CLASSES)}
    return Distiller(make_net(), **SETTINGS, terms={"hint": hint}, student=student)


def test_projections_are_trained_clipped_and_saved(tmp_path: Path) -> None:
    student = make_net()
    task = DistillationTask(student, projecting(student))
    optimizer = create_optimizer_v2(task, opt="sgd", lr=0.1)
    projections = list(task.distiller.parameters())
    ids = {id(parameter) for parameter in task.get_clip_parameters()}
    assert ids == {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert {id(parameter) for parameter in projections} < ids
    before = [parameter.clone() for parameter in projections]
    for _ in range(2):
        optimizer.zero_grad()
        task(*make_batch())["loss"].backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, projections, strict=True))

    task.setup_ema()
    task.update_ema(step=9)
    assert task.get_eval_model() is student
    assert task.get_eval_model(ema=True)(make_batch()[0]).shape == (BATCH, CLASSES)
    path = tmp_path / "last.pth.tar"
    CheckpointSaver(student, optimizer, checkpoint_dir=tmp_path, task=task)._save(path, epoch=3)
    saved = torch.load(path, weights_only=False)
    assert set(saved["state_dict"]) == set(student.state_dict())
    assert set(saved["task_state"]) == set(task.distiller.state_dict())
    assert set(saved["state_dict_ema"]) == set(student.state_dict())
    assert set(saved["task_state_ema"]) == set(task.distiller.state_dict())
    fresh = make_net()
    resumed = DistillationTask(fresh, projecting(fresh))
    resumed.setup_ema()
    load_task_ema_checkpoint(resumed, path, weights_only=False)
    assert resume_task_checkpoint(resumed, path, weights_only=False, log_info=False) == 4
    torch.testing.assert_close(fresh.state_dict(), student.state_dict())
    torch.testing.assert_close(resumed.distiller.state_dict(), task.distiller.state_dict())


def make_vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=CLASSES)


def vit_task(student: nn.Module, *, project: bool) -> DistillationTask:
    hint: dict[str, Any] = {"student": "norm", "project": (64, 64)}
    terms = {"hint": hint} if project else {}
    return DistillationTask(student, Distiller(make_vit(), student=student, terms=terms))


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("source", ["task", "trainable module", "compiled"])
@pytest.mark.parametrize("make", [make_vit, make_net])
def test_weight_decay_and_layer_decay_are_the_students(
    make: Callable[[], nn.Module], source: str, project: bool
) -> None:
    student = make()
    if make is make_vit:
        task = vit_task(student, project=project)
    else:  # a network without no_weight_decay and group_matcher
        task = DistillationTask(student, projecting(student) if project else Distiller())
    if source == "compiled":
        task.compile(backend="eager")
    module = task.get_trainable_module() if source == "trainable module" else task
    for layer_decay in (None, 0.5):
        settings = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": layer_decay}
        plain, ours = (
            settings_by_parameter(create_optimizer_v2(m, **settings)) for m in (student, module)
        )
        projections = [ours.pop(id(p)) for p in task.distiller.parameters()]
        assert ours == plain
        assert [decay for decay, _ in projections] == ([0.05, 0.0] if project else [])
        assert {scale for _, scale in projections} <= {1.0, None}


def settings_by_parameter(optimizer: torch.optim.Optimizer) -> dict[int, tuple[float, Any]]:
    """Return weight decay and scale of the learning rate by the identity of each parameter."""
    return {
        id(parameter): (group["weight_decay"], group.get("lr_scale"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_projections_that_would_differ_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    student = make_net()
    with pytest.raises(ValueError, match=r"be attached .* after .*, got 1 in 2 processes"):
        DistillationTask(student, projecting(student)).prepare_distributed()


def test_generations_in_one_process() -> None:
    inputs, labels = make_batch()
    distiller, logits = Distiller(), []
    for generation in range(3):
        torch.manual_seed(generation)
        task = DistillationTask(make_net(), distiller).train()
        optimizer = create_optimizer_v2(task, opt="sgd", lr=0.05)
        task.setup_ema(decay=0.0)
        losses = []
        for _ in range(6):
            loss = task(inputs, labels)["loss"]
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
        assert losses[-1] < losses[0]
        last = task.get_eval_model().eval()
        torch.testing.assert_close(task.get_eval_model(ema=True).eval()(inputs), last(inputs))
        if distiller.teacher is not None:  # still the generation before
            torch.testing.assert_close(distiller.teacher(inputs), logits[-1])
        logits.append(last(inputs).detach())
        distiller = Distiller(Teacher(last), **SETTINGS)
    assert not torch.equal(logits[1], logits[2])
