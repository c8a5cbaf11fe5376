"""Distillation in Lightning: the callback on an unmodified module, and the mixin."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selfkd
from selfkd import Distiller, Ensemble, Teacher
from selfkd.losses import distillation_terms

pl = pytest.importorskip("lightning.pytorch")

from selfkd.integrations.lightning import (  # noqa: E402
    DistillationCallback,
    DistillationMixin,
    _Call,
)

IMAGES, FEATURES, CLASSES = 16, 4, 3
SETTINGS: dict[str, float] = {"temperature": 3.0, "alpha": 0.7}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small for more
    yield
    torch.set_num_threads(threads)


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))


class Plain(pl.LightningModule):
    """Module with a cross-entropy loss, which records its gradients and logged values."""

    def __init__(self, *, calls: str = "self", output: str = "loss") -> None:
        super().__init__()
        self.model = make_net()
        self.calls, self.output = calls, output
        self.gradients: list[Tensor] = []
        self.logged: list[dict[str, float]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.model(inputs)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs = 2 * batch[0]  # an augmentation that the teacher's inputs must have too
        if self.calls == "self":
            logits = self(inputs)
        elif self.calls == "keyword":
            logits = self(inputs=inputs)
        elif self.calls == "twice":
            logits = self(inputs) + self(inputs)
        else:
            logits = self.model(inputs)
        loss = F.cross_entropy(logits, batch[1])
        self.log("own_loss", loss)
        return {"loss": loss, "none": None}.get(self.output, {"loss": loss, "extra": 7})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        values = self.trainer.callback_metrics
        self.logged.append({name: float(value) for name, value in values.items()})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.gradients.extend([torch.cat(gradients)] if gradients else [])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_data(*, index: bool = False) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(IMAGES, FEATURES, generator=generator)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    return TensorDataset(inputs, labels, *([torch.arange(IMAGES)] if index else []))


def make_trainer(*callbacks: Any, **settings: Any) -> Any:
    disabled = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    fixed = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **disabled}
    return pl.Trainer(callbacks=list(callbacks), **(fixed | settings))


def fit(module: Any, distiller: Distiller, *, path: str = "", batch: int = 8, **settings: Any):
    """Fit with the callback and return the trainer."""
    trainer = make_trainer(DistillationCallback(distiller, path=path), **settings)
    index = distiller.targets is not None
    trainer.fit(module, DataLoader(make_data(index=index), batch))
    return trainer


def expected_gradient(net: nn.Module, teacher_logits: Tensor) -> Tensor:
    inputs, labels = make_data().tensors
    loss = distillation_terms(net(2 * inputs), teacher_logits, labels, **SETTINGS).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def projecting(student: nn.Module) -> Distiller:
    terms: dict[str, Any] = {"hint": {"student": "model.0", "teacher": "0", "project": (8, 8)}}
    return Distiller(make_net(), **SETTINGS, terms=terms, student=student)


# --- the callback ------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["loss", "dict"])
@pytest.mark.parametrize(
    ("calls", "path"), [("self", ""), ("keyword", ""), ("model", "model"), ("self", "model")]
)
def test_a_plain_module_gets_the_distillers_gradient(calls: str, path: str, output: str) -> None:
    module, teacher = Plain(calls=calls, output=output), make_net()
    start = copy.deepcopy(module.model)
    fit(module, Distiller(teacher, **SETTINGS), path=path, batch=IMAGES)
    inputs, labels = make_data().tensors
    teacher_logits = teacher(2 * inputs).detach()
    torch.testing.assert_close(module.gradients, [expected_gradient(start, teacher_logits)])
    terms = distillation_terms(start(2 * inputs).detach(), teacher_logits, labels, **SETTINGS)
    (logged,) = module.logged
    for name, value in terms._asdict().items():
        assert logged[f"distill/{name}"] == pytest.approx(float(value))
    own_loss = F.cross_entropy(start(2 * inputs).detach(), labels)
    assert logged["own_loss"] == pytest.approx(float(own_loss))


def test_labels_only_an_ensemble_and_further_terms() -> None:
    module, members = Plain(), [make_net(), make_net()]
    start = copy.deepcopy(module.model)
    averaged = copy.deepcopy(module)
    fit(averaged, Distiller(Ensemble(members), **SETTINGS), batch=IMAGES)
    logits = torch.stack([member(2 * make_data().tensors[0]) for member in members]).detach()
    torch.testing.assert_close(averaged.gradients, [expected_gradient(start, logits)])

    plain = copy.deepcopy(module)
    fit(plain, Distiller(), batch=IMAGES)
    assert plain.logged[0]["distill/loss"] == pytest.approx(plain.logged[0]["own_loss"])

    terms = {"hint": {"student": "model.2", "teacher": "2"}}
    fit(module, Distiller(members[0], **SETTINGS, terms=terms, student=module), batch=IMAGES)
    hint = F.mse_loss(start(2 * make_data().tensors[0]).detach(), logits[0])
    assert module.logged[0]["distill/hint"] == pytest.approx(float(hint))


def test_cached_targets_are_those_of_the_images_and_the_view() -> None:
    cached = torch.randn(2, IMAGES, CLASSES)

    def targets(index: Tensor, view: int) -> Tensor:
        return cached[view][index]

    for view in (0, 1):
        module = Plain()
        start = copy.deepcopy(module.model)
        callback = DistillationCallback(Distiller(targets=targets, **SETTINGS))
        callback.view = view
        loader = DataLoader(make_data(index=True), IMAGES, shuffle=True)
        make_trainer(callback).fit(module, loader)
        torch.testing.assert_close(module.gradients, [expected_gradient(start, cached[view])])


def test_accumulated_batches_have_the_gradient_of_the_whole() -> None:
    module, teacher = Plain(), make_net()
    whole = copy.deepcopy(module)
    fit(whole, Distiller(teacher, **SETTINGS), batch=IMAGES)
    fit(module, Distiller(teacher, **SETTINGS), batch=4, accumulate_grad_batches=4)
    assert len(module.logged) == 4
    torch.testing.assert_close(module.gradients, whole.gradients)


def test_mixed_precision() -> None:
    class Recording(nn.Module):
        """Network that records the dtypes of its logits."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.dtypes = make_net(), set()

        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = self.model(inputs)
            self.dtypes.add(logits.dtype)
            return logits

    module, teacher = Plain(), Teacher(Recording())
    start = copy.deepcopy(module.model)
    fit(module, Distiller(teacher, **SETTINGS), batch=IMAGES, precision="bf16-mixed")
    assert teacher.module.dtypes == {torch.bfloat16}
    assert module.gradients[0].dtype == torch.float32
    expected = expected_gradient(start, teacher.module.model(2 * make_data().tensors[0]))
    torch.testing.assert_close(module.gradients[0], expected, rtol=0.05, atol=0.01)


def test_compiled_it_is_the_same() -> None:
    module, teacher = Plain(), make_net()
    other = copy.deepcopy(module)
    fit(module, Distiller(teacher, **SETTINGS))
    other.model.compile(backend="eager")
    fit(other, Distiller(teacher, **SETTINGS))
    torch.testing.assert_close(other.gradients, module.gradients)


class Interrupts(pl.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise ArithmeticError("stopped in the middle")


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_module_is_as_before_after_a_fit_or_an_error(interrupted: bool) -> None:
    module = Plain()
    callbacks = [DistillationCallback(Distiller(make_net()))]
    if interrupted:
        with pytest.raises(ArithmeticError, match="in the middle"):
            make_trainer(*callbacks, Interrupts()).fit(module, DataLoader(make_data(), 8))
    else:
        make_trainer(*callbacks).fit(module, DataLoader(make_data(), 8))
    assert module.training_step.__func__ is Plain.training_step
    assert not hasattr(module.training_step, "__wrapped__")
    assert not any(part._forward_hooks for part in module.modules())
    count = len(module.gradients)
    make_trainer().fit(module, DataLoader(make_data(), IMAGES))
    assert len(module.gradients) == count + 1
    assert "distill/loss" not in module.logged[-1]


def test_a_step_of_the_modules_own_comes_back() -> None:
    module = Plain()

    @functools.wraps(module.training_step)
    def step(batch: Any, batch_idx: int) -> Any:
        return Plain.training_step(module, batch, batch_idx)

    module.training_step = step
    fit(module, Distiller(make_net()))
    assert module.training_step is step
    assert "distill/soft_loss" in module.logged[0]


def test_a_step_that_is_skipped_stays_skipped() -> None:
    module = Plain(output="none")
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(module, Distiller(make_net()))
    assert not module.gradients


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in a loaded checkpoint."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def test_checkpoints_hold_no_teacher_and_resume_the_same(tmp_path: Path) -> None:
    def make() -> tuple[Plain, Distiller]:
        torch.manual_seed(5)
        module = Plain()
        return module, projecting(module)

    def run(epochs: int, resume: Path | None = None) -> tuple[Plain, Distiller, Any]:
        module, distiller = make()
        trainer = make_trainer(DistillationCallback(distiller), max_epochs=epochs)
        trainer.fit(module, DataLoader(make_data(), 8), ckpt_path=resume)
        return module, distiller, trainer

    path = tmp_path / "last.ckpt"
    _, half, trainer = run(1)
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert set(saved["state_dict"]) == set(Plain().state_dict())
    shapes = [t.shape for t in half.teacher.module.state_dict().values()]
    assert shapes  # the same as the student's, so values are compared
    for value in tensors(saved):
        for weight in half.teacher.module.state_dict().values():
            assert value.shape != weight.shape or not torch.equal(value, weight)
    whole, expected, _ = run(2)
    resumed, distiller, _ = run(2, path)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(distiller.state_dict(), expected.state_dict(), rtol=0, atol=0)
    fresh = make()[1].state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in half.state_dict().items())
    plain = fit(Plain(), Distiller(make_net()))
    plain.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"] == {}


def test_generations_in_one_process() -> None:
    distiller, logits = Distiller(), []
    inputs = make_data().tensors[0]
    for generation in range(3):
        torch.manual_seed(generation)
        module = Plain()
        fit(module, distiller, max_epochs=3)
        if distiller.teacher is not None:  # still the generation before
            torch.testing.assert_close(distiller.teacher(inputs), logits[-1])
            assert "distill/soft_loss" in module.logged[0]
        first, last = (module.logged[step]["distill/loss"] for step in (0, -2))  # the same batch
        assert last < first
        logits.append(module(inputs).detach())
        distiller = Distiller(Teacher(module), **SETTINGS)
    assert not torch.equal(logits[1], logits[2])


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Several(Plain):
    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs), self.model(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = F.cross_entropy(self(batch[0])[0], batch[1])
        return loss


@pytest.mark.parametrize(
    ("module", "path", "error", "message"),
    [
        (Plain(calls="model"), "", RuntimeError, "LightningModule must be called once.*got 0"),
        (Plain(calls="twice"), "", RuntimeError, "called once in training_step, got 2 calls"),
        (Plain(calls="twice"), "model", RuntimeError, "submodule 'model' must be called once"),
        (Plain(), "net", ValueError, "path must be that of a submodule, got 'net'"),
        (
            Several(),
            "",
            TypeError,
            r"in which it is clear .* got tuple of \[8, 3\], \[8, 3\]: give",
        ),
        (Manual(), "", ValueError, "automatic_optimization must be True, got False"),
    ],
)
def test_modules_that_do_not_fit_are_refused(
    module: Any, path: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(module, Distiller(make_net()), path=path)
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("collate", "got"),
    [
        (
            lambda rows: {0: torch.stack([r[0] for r in rows]), 1: torch.zeros(8).long()},
            r"dict of \[8, 4\], \[8\]",
        ),
        (
            lambda rows: (torch.stack([r[0] for r in rows]), torch.zeros(8).long(), 1, 2),
            r"tuple of \[8, 4\], \[8\], int, int",
        ),
    ],
)
def test_other_batches_are_refused(collate: Any, got: str) -> None:
    trainer = make_trainer(DistillationCallback(Distiller(make_net())))
    with pytest.raises(TypeError, match=rf"batch must be \(inputs, labels\) or.*got .*{got}: use"):
        trainer.fit(Plain(), DataLoader(make_data(), 8, collate_fn=collate))


class Fitting:
    """Stand-in for a trainer, with the attributes that `on_fit_start` reads."""

    def __init__(self, module: Any, world_size: int) -> None:
        self.optimizers, self.world_size = [module.configure_optimizers()], world_size


def test_projections_that_would_differ_are_refused() -> None:
    module = Plain()
    callback = DistillationCallback(projecting(module))
    with pytest.raises(ValueError, match=r"be attached .* after .*, got 1 in 2 processes"):
        callback.on_fit_start(Fitting(module, 2), module)


def test_the_teacher_and_the_projections_move_to_the_students_device() -> None:
    module = Plain()
    distiller = projecting(module)
    module.to("meta")
    DistillationCallback(distiller).on_fit_start(Fitting(module, 1), module)
    parameters = [*distiller.parameters(), *distiller.teacher.module.parameters()]
    assert {p.device.type for p in parameters} == {"meta"}


@pytest.mark.parametrize("before", [True, False])
def test_the_student_is_attached_where_the_fit_starts(before: bool) -> None:
    teacher, module, twin = make_net(), Plain(), Plain()
    twin.load_state_dict(module.state_dict())
    terms: dict[str, Any] = {"hint": {"student": "0", "project": (8, 8)}}
    torch.manual_seed(3)
    expected = Distiller(teacher, **SETTINGS, terms=terms, student=twin.model)
    start = copy.deepcopy(expected.state_dict())
    fit(twin, expected, path="model")
    distiller = Distiller(
        teacher, **SETTINGS, terms=terms, student=module.model if before else None
    )
    callback = DistillationCallback(distiller, path="model")
    callback.load_state_dict(start)  # as of a checkpoint, read before the fit starts
    trainer = make_trainer(callback)
    trainer.fit(module, DataLoader(make_data(), 8))
    torch.testing.assert_close(module.state_dict(), twin.state_dict())
    torch.testing.assert_close(callback.state_dict(), expected.state_dict())
    pairs = zip(callback.state_dict().values(), start.values(), strict=True)
    assert start
    assert not any(torch.equal(trained, first) for trained, first in pairs)
    assert distiller.attached == before
    if not before:  # and so the distiller can be used for another student
        assert not any(part._forward_hooks for part in module.modules())
        fit(Plain(), distiller, path="model")


def test_batches_of_a_seeded_view_are_those_of_the_module(tmp_path: Path) -> None:
    module, twin, teacher = Plain(), Plain(), make_net()
    twin.load_state_dict(module.state_dict())
    data = TensorDataset(2 * make_data().tensors[0], make_data().tensors[1])  # as Plain's inputs
    targets = selfkd.cache_logits(teacher, data, tmp_path, views=1, exact=True)
    trainer = make_trainer(DistillationCallback(Distiller(targets=targets, **SETTINGS)))
    trainer.fit(module, DataLoader(selfkd.SeededView(make_data(), 0), 8))
    fit(twin, Distiller(teacher, **SETTINGS))
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=1e-3, atol=1e-4)


class Keyed(Plain):
    """Module of mapping batches, whose student takes several arguments and returns a mapping."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.model = KeyedNet()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        given = {name: value for name, value in batch.items() if name in ("x", "scale", "labels")}
        output = self.model(given.pop("x"), **given)
        return output["logits"].sum()

    def on_train_batch_end(self, *args: Any) -> None:
        pass


class KeyedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.given = make_net(), []

    def forward(self, x: Tensor, scale: Tensor, labels: Tensor | None = None) -> Any:
        self.given.append(labels)
        return {"logits": self.net(x * scale), "features": [x]}


@pytest.mark.parametrize(
    ("name", "alpha"), [("labels", 0.7), ("label", 0.7), ("target", 0.7), ("y", 0.7), ("z", 1.0)]
)
def test_mapping_batches_and_students_of_several_arguments(name: str, alpha: float) -> None:
    rows = DataLoader(
        [
            {"x": x, "scale": x.new_tensor([2.0]), name: y, "idx": torch.tensor(0)}
            for x, y in make_data()
        ],
        IMAGES,
    )
    module, teacher = Keyed(), KeyedNet()
    start = copy.deepcopy(module.model.net)
    distiller = Distiller(teacher, temperature=3.0, alpha=alpha)
    make_trainer(DistillationCallback(distiller, path="model")).fit(module, rows)
    inputs, labels = make_data().tensors
    teacher_logits = teacher.net(2 * inputs)
    loss = distillation_terms(
        start(2 * inputs), teacher_logits, labels, temperature=3.0, alpha=alpha
    ).loss
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(start.parameters()))])
    torch.testing.assert_close(module.gradients, [expected])
    assert distiller.teacher.module.given == [None]  # the teacher computes no loss of its own


def test_inputs_of_a_recorded_call() -> None:
    class Wide(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0]

    def inputs(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _Call(module, args, kwargs, None).inputs(labels)

    x, y, labels = torch.zeros(1), torch.ones(1), torch.tensor([1])
    compiled = torch.compile(KeyedNet())
    assert inputs(Wide(), x) is x
    assert inputs(KeyedNet(), {"x": x, "labels": labels})["labels"] is labels
    for net in (KeyedNet(), compiled):
        assert inputs(net, x, scale=y) == {"x": x, "scale": y}
        assert inputs(net, x, y, labels) == {"x": x, "scale": y}
        assert inputs(net, x=x, labels=labels) is x
    with pytest.raises(TypeError, match=r"Wide must have names for several inputs, got \*args"):
        inputs(Wide(), x, y)


def test_mappings_with_several_labels_are_refused() -> None:
    rows = [{"x": x, "scale": torch.ones(1), "label": y, "target": y} for x, y in make_data()]
    trainer = make_trainer(DistillationCallback(Distiller(KeyedNet()), path="model"))
    with pytest.raises(ValueError, match=r"must have one key of .*, got label, target: use"):
        trainer.fit(Keyed(), DataLoader(rows, 8))


class Recorded(Plain):
    """Records the dtype of its logits, and the loss that the fit gets."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        self.dtype_of_logits = logits.dtype
        return {"loss": F.cross_entropy(logits, batch[1])}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss = outputs["loss"]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
        ("bf16-mixed", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("project", [True, False])
def test_precisions(precision: str, dtype: torch.dtype, project: bool) -> None:
    module, teacher = Recorded(), make_net()
    terms: dict[str, Any] = {"hint": {"student": "0", "project": (8, 8)}} if project else {}
    distiller = Distiller(teacher, **SETTINGS, terms=terms, student=module.model)
    start = copy.deepcopy(module.model)
    callback = DistillationCallback(distiller, path="model")
    make_trainer(callback, precision=precision).fit(module, DataLoader(make_data(), IMAGES))
    inputs, labels = make_data().tensors
    expected = distillation_terms(start(inputs), teacher(inputs), labels, **SETTINGS)
    assert module.dtype_of_logits == dtype
    assert module.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    if not project:
        torch.testing.assert_close(module.loss.float(), expected.loss.detach(), rtol=0.02, atol=0)
    assert all(p.dtype == next(module.parameters()).dtype for p in distiller.parameters())
    assert {p.dtype for p in distiller.teacher.module.parameters()} == {torch.float32}


class Validating(Plain):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))


def test_validation_and_several_loaders_are_as_without() -> None:
    runs, module = [], Validating()
    for callbacks in ([], [DistillationCallback(Distiller(make_net(), alpha=0.0))]):
        twin = Validating()
        twin.load_state_dict(module.state_dict())
        trainer = make_trainer(*callbacks)
        loader = DataLoader(make_data(), 8)
        trainer.fit(twin, loader, [loader, loader])
        metrics = trainer.callback_metrics
        runs.append({name: value for name, value in metrics.items() if name.startswith("val")})
    assert len(runs[0]) == 2
    assert runs[0] == runs[1]


def test_students_that_cannot_be_trained_are_refused() -> None:
    class Frozen(Plain):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).detach().requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).sum() + self.model[0].bias.sum()

    with pytest.raises(ValueError, match="student_logits must have a graph to train the student"):
        fit(Frozen(), Distiller(make_net()))


@pytest.mark.slow
def test_projections_stay_equal_in_processes_that_lightning_starts() -> None:
    module = Plain()
    callback = DistillationCallback(projecting(module))
    trainer = make_trainer(callback, Equal(), devices=2, strategy="ddp_fork")
    trainer.fit(module, DataLoader(make_data(), 4))


class Equal(pl.Callback):
    """Compares the projections and the student of two processes where the fit ends."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (callback,) = (c for c in trainer.callbacks if isinstance(c, DistillationCallback))
        for parameter in [*callback.distiller.parameters(), *pl_module.parameters()]:
            parts = [torch.zeros_like(parameter) for _ in range(2)]
            torch.distributed.all_gather(parts, parameter.detach())
            assert torch.equal(*parts)
            assert parameter.grad is not None


# --- in YAML -----------------------------------------------------------------------------------


def constant_targets(index: Tensor, view: int) -> Tensor:
    return torch.zeros(len(index), CLASSES)


def some_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    return (student_logits - teacher_logits).square().mean()


@pytest.mark.parametrize(
    ("distiller", "expected"),
    [
        ("{alpha: 0.0}", "Distiller(None, temperature=3.5, alpha=0.0)"),
        ("{teacher: {class_path: NET}}", "Distiller(Teacher(Net, 15 parameters), temp"),
        (
            "{class_path: selfkd.Distiller, init_args: {temperature: 2, teacher: "
            "{class_path: selfkd.Teacher, init_args: {module: {class_path: NET}}}}}",
            "Distiller(Teacher(Net, 15 parameters), temperature=2.0",
        ),
        (
            "{average: logits, weights: [0.5, 0.5], teacher: {class_path: selfkd.Ensemble, "
            "init_args: {members: [{class_path: NET}, {class_path: NET}]}}}",
            "Distiller(Ensemble([Teacher(Net",
        ),
        ("{targets: HERE.constant_targets}", "Distiller(<function constant_targets"),
        (
            "{teacher: {class_path: NET}, terms: {hint: {student: '0', weight: 0.5, project: "
            "[8, 8]}, own: {loss: HERE.some_loss}}}",
            "Distiller(Teacher(Net",
        ),
    ],
)
def test_it_is_built_from_yaml(distiller: str, expected: str) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[pl.Callback])
    text = distiller.replace("NET", f"{__name__}.Net").replace("HERE", __name__)
    config = parser.parse_args(
        [
            "--callbacks=[{class_path: selfkd.integrations.lightning.DistillationCallback, "
            f"init_args: {{path: model, distiller: {text}}}}}]"
        ]
    )
    (callback,) = parser.instantiate(config).callbacks
    assert repr(callback.distiller).startswith(expected)
    if "terms" in distiller:
        hint, own = callback.distiller.terms.values()
        assert (hint.weight, hint.project, own.loss) == (0.5, (8, 8), some_loss)


class Net(nn.Sequential):
    """A teacher that a YAML names."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, CLASSES))


# --- the mixin ---------------------------------------------------------------------------------


class Mixed(DistillationMixin, Plain):
    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, *index = batch
        return self.distillation_loss(
            self(2 * inputs), labels, inputs=2 * inputs, index=index[0] if index else None
        )


def test_the_mixin_is_the_same_loss() -> None:
    teacher = make_net()
    module = Mixed(Distiller(teacher, **SETTINGS))
    plain = Plain()
    plain.load_state_dict(module.state_dict())  # which has nothing of the teacher
    make_trainer(max_epochs=2).fit(module, DataLoader(make_data(), 8))
    fit(plain, Distiller(teacher, **SETTINGS), max_epochs=2)
    torch.testing.assert_close(module.gradients, plain.gradients)
    ours, theirs = (
        [{k: v for k, v in log.items() if k.startswith("distill/")} for log in m.logged]
        for m in (module, plain)
    )
    assert ours == theirs
    assert set(ours[0]) == {"distill/loss", "distill/hard_loss", "distill/soft_loss"}


class MixedManual(DistillationMixin, Plain):
    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller, self.automatic_optimization = distiller, False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.distillation_loss({"logits": self(2 * inputs)}, labels, inputs=2 * inputs)
        self.manual_backward(loss)
        optimizer.step()


def test_the_mixin_with_manual_optimisation_and_outputs_with_logits() -> None:
    module, plain, teacher = MixedManual(Distiller()), Plain(), make_net()
    module.distiller = Distiller(teacher, **SETTINGS)
    plain.load_state_dict(module.state_dict())
    make_trainer().fit(module, DataLoader(make_data(), 8))
    fit(plain, Distiller(teacher, **SETTINGS))
    torch.testing.assert_close(module.state_dict(), plain.state_dict())


def test_the_mixin_moves_them_too() -> None:
    module = Mixed(Distiller())
    module.distiller = projecting(module)
    module.to("meta")
    inputs, labels = (tensor.to("meta") for tensor in make_data().tensors)
    module.log_dict = lambda *args, **kwargs: None
    assert module.distillation_loss(module(inputs), labels, inputs=inputs).device.type == "meta"


def test_the_mixin_is_for_lightning_modules() -> None:
    with pytest.raises(TypeError, match="self must be a LightningModule, got DistillationMixin"):
        DistillationMixin().distillation_loss(torch.ones(1, 2), torch.tensor([0]))


def test_without_lightning_the_extra_is_named() -> None:
    code = "import sys; sys.modules['lightning'] = None; import selfkd.integrations.lightning"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: lightning must be installed" in result.stderr
    assert "pip install 'selfkd[lightning]'" in result.stderr
