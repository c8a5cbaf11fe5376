"""Losses, features, cached logits, training and its resume: on the device as on the CPU."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from setting import Row, Setting, digits
from torch import Tensor, nn

from selfkd import losses
from selfkd.data.augmentation import Views
from selfkd.distill.distiller import Distiller
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.losses import LinearLogits
from selfkd.models import make_model
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.shards import write_shard
from selfkd.soft_targets.store import SoftTargets, open_store
from selfkd.training.fit import Training, fit
from selfkd.training.optimizers import make_average, make_optimizer, make_scheduler
from selfkd.training.predict import evaluate, predict_batches

BATCH, CLASSES, MEMBERS, TOKENS, WIDTH = 16, 10, 3, 12, 24
HEAD = {"temperature": 3.0, "alpha": 0.6}
SHARES = [0.5, 0.3, 0.2]
Loss = Callable[..., Any]


def exact_float32() -> None:
    """Let float32 be float32, so that the CPU's values can be expected."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss_cases() -> dict[str, tuple[Loss, list[Tensor]]]:
    """Return functions of a student's tensor and others, by name, with the tensors."""
    rows, others = draw(BATCH, CLASSES, seed=1), draw(BATCH, CLASSES, seed=2)
    members = draw(MEMBERS, BATCH, CLASSES, seed=3)
    labels = torch.arange(BATCH) % CLASSES
    maps, own = draw(BATCH, WIDTH, 4, 4, seed=4), draw(BATCH, WIDTH, 4, 4, seed=5)
    tokens, known = draw(BATCH, TOKENS, CLASSES, seed=6), draw(BATCH, TOKENS, CLASSES, seed=7)
    targets = (torch.arange(BATCH * TOKENS) % CLASSES).view(BATCH, TOKENS)
    targets = targets.masked_fill(targets == 3, -100)
    hidden, weight = draw(BATCH, TOKENS, WIDTH, seed=8), draw(CLASSES, WIDTH, seed=9)
    of_teacher = [draw(BATCH, TOKENS, 8, seed=10), draw(CLASSES, 8, seed=11)]
    terms, sequence = losses.distillation_terms, losses.sequence_terms
    return {
        "distillation_terms": (lambda s, t, y: terms(s, t, y, **HEAD).loss, [rows, others, labels]),
        "of members": (
            lambda s, t, y: terms(s, t, y, weights=SHARES, **HEAD).loss,
            [rows, members, labels],
        ),
        "sparse_terms": (
            lambda s, t, y: losses.sparse_terms(s, losses.sparsify(t, 4), y, **HEAD).loss,
            [rows, others, labels],
        ),
        "multi_label_terms": (
            lambda s, t, y: losses.multi_label_terms(s, t, y, **HEAD).loss,
            [rows, others, others.sigmoid()],
        ),
        "regression_terms": (
            lambda s, t, y: losses.regression_terms(s, t, y, alpha=0.5).loss,
            [rows, others, members[0]],
        ),
        "sequence_terms": (
            lambda s, t, y: sequence(s, t, y, **HEAD).loss,
            [tokens, known, targets],
        ),
        "reverse KL of tokens": (
            lambda s, t, y: sequence(s, t, y, divergence="reverse_kl", **HEAD).loss,
            [tokens, known, targets],
        ),
        "linear_sequence_terms": (
            lambda s, w, y, *t: (
                losses.linear_sequence_terms(
                    s, w, LinearLogits(*t), y, label_smoothing=0.1, **HEAD
                ).loss
            ),
            [hidden, weight, targets, *of_teacher],
        ),
        "dkd_loss": (
            lambda s, t, y: losses.dkd_loss(s, t, y, temperature=3.0),
            [rows, others, labels],
        ),
        "dist_loss": (losses.dist_loss, [rows, others]),
        "standardized_loss": (
            lambda s, t: losses.standardized_loss(s, t, temperature=3.0),
            [rows, others],
        ),
        "reverse_kl": (lambda s, t: losses.reverse_kl(s, t, temperature=3.0), [rows, others]),
        "jensen_shannon": (
            lambda s, t: losses.jensen_shannon(s, t, temperature=3.0),
            [rows, others],
        ),
        "hint_loss": (losses.hint_loss, [own, maps]),
        "attention_transfer": (losses.attention_transfer, [own, maps]),
        "similarity_preserving": (losses.similarity_preserving, [own, maps]),
        "pkt": (losses.pkt, [own, maps]),
        "rkd_distance": (losses.rkd_distance, [rows, others]),
        "rkd_angle": (losses.rkd_angle, [rows, others]),
    }


def check_losses(setting: Setting) -> list[Row]:
    """Compare values and gradients of losses with those of the CPU."""
    exact_float32()
    worst, of = 0.0, ""
    for name, (loss, tensors) in loss_cases().items():
        found = []
        for device in ("cpu", setting.device):
            here = [tensor.to(device) for tensor in tensors]
            here[0] = here[0].clone().requires_grad_()
            value = loss(*here)
            value.backward()
            gradient = here[0].grad
            assert gradient is not None
            assert value.device.type == torch.device(device).type, f"{name} on {value.device}"
            found.append((value.detach().cpu(), gradient.cpu()))
        (value, gradient), (other, others) = found
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
        apart = float((others - gradient).norm() / gradient.norm().clamp(min=1e-12))
        assert apart < 1e-3, f"gradient of {name} is {apart:.1e} apart from that of the CPU"
        if apart >= worst:
            worst, of = apart, name
    return [Row(f"{len(loss_cases())} losses as on the CPU", f"{worst:.1e}", f"largest, {of}")]


def check_views(setting: Setting) -> list[Row]:
    """Compare the pixels of views with those of the CPU."""
    images, index = digits().train.images[:64], torch.arange(64)
    assert isinstance(images, Tensor)
    count = 0
    for options in ({"crop": 0.5, "flip": True, "jitter": 2}, {"crop": 0.3}, {"jitter": 1}):
        views = Views(**options, count=3)  # type: ignore[arg-type]
        for view in range(3):
            here = views(images.to(setting.device), index, view).cpu()
            assert torch.equal(here, views(images, index, view)), options
            count += 1
    return [Row("views bit-equal to those of the CPU", f"{count} of {count}")]


def network(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return make_model("selfkd_cnn", {"width": width}, num_classes=10, in_chans=1, image_size=8)


def make_store(
    folder: Path, teachers: list[nn.Module], data: Any, device: str, views: Views | None = None
) -> SoftTargets:
    """Cache the logits of teachers for digits, as they are or in several views."""
    names = [f"teacher{n}" for n in range(len(teachers))]
    recipe, count = ({}, 1) if views is None else (dict(views.recipe), 2)
    key = data_key("digits", recipe)
    for name, teacher in zip(names, teachers, strict=True):
        manifest = Manifest(
            teacher=name, data=key, fingerprint="digits", recipe=recipe, views=count,
            images=len(data.train), classes=10,
        )  # fmt: skip
        for view in range(count):
            logits = predict_batches(
                teacher, data, "train", views=views, view=view, device=device,
            )  # fmt: skip
            write_shard(folder, manifest, view=view, shard=0, logits=logits)
    return open_store(folder, names, data=key)


def check_features(setting: Setting) -> list[Row]:
    """Compare a step with terms of layers, and an ensemble run live, with those of the CPU."""
    exact_float32()
    found = []
    terms = {"hint": {"student": "features.2", "teacher": "features.2", "weight": 0.5}}
    inputs, labels = draw(BATCH, 1, 8, 8, seed=1), torch.arange(BATCH) % 10
    for device in ("cpu", setting.device):
        student, teacher = network(0).to(device), network(1).to(device)
        live = Distiller(teacher, terms=terms, student=student)
        given, known = inputs.to(device), labels.to(device)
        value = live(student(given), known, inputs=given)["loss"]
        value.backward()
        average = Ensemble([network(2), Teacher(network(3))]).to(device)
        several = Distiller(average)(student(given), known, inputs=given)["loss"]
        first = next(student.parameters()).grad
        assert first is not None
        found.append([value.detach().cpu(), several.detach().cpu(), first.cpu()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    return [Row("a step with a hint, and an ensemble live, as on the CPU", "close")]


def train(
    data: Any, distiller: Any, device: str, *, precision: Any = "none", epochs: int, seed: int = 0,
    start: dict[str, Any] | None = None, until: int | None = None, compiled: bool = False,
) -> Training:  # fmt: skip
    """Train a student of digits; return the state of its training, of an epoch if wanted."""
    student = network(seed).to(device)
    optimizer = make_optimizer(student, name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
    training = Training(
        student=student,
        optimizer=optimizer,
        generator=torch.Generator().manual_seed(seed),
        scheduler=make_scheduler(
            optimizer, schedule="cosine", epochs=epochs, warmup_epochs=1, steps_per_epoch=10
        ),
        average=make_average(student, decay=0.99),
        device=device,
        precision=precision,
    )
    if start is not None:
        training.load_state_dict(start)
    views = Views(jitter=1, count=2)
    for row in fit(
        training, data, distiller, epochs=epochs, batch_size=60, views=views, clip_grad=1.0,
        compiled=compiled,
    ):  # fmt: skip
        if row["epoch"] == until:
            break
    return training


def check_training(setting: Setting) -> list[Row]:
    """Train with cached logits in each precision, and go on from half of it, bit for bit."""
    exact_float32()
    device, epochs = setting.device, 4 if setting.quick else 12
    data, rows = digits().to(device), []
    teacher = network(9, width=16).to(device)
    with tempfile.TemporaryDirectory() as folder:
        teachers = [teacher, network(8).to(device)]
        stored = make_store(Path(folder), teachers, data, device, Views(jitter=1, count=2))
        distiller = Distiller(targets=stored)
        torch.use_deterministic_algorithms(True, warn_only=True)
        whole = train(data, distiller, device, epochs=epochs)
        half = train(data, distiller, device, epochs=epochs, until=epochs // 2)
        state = copy.deepcopy(half.state_dict())
        resumed = train(data, distiller, device, epochs=epochs, start=state)
        for name, tensor in whole.best.state_dict().items():
            assert torch.equal(tensor, resumed.best.state_dict()[name]), f"{name} after a resume"
        rows.append(Row("a resumed training is bit-equal", "yes"))
        torch.use_deterministic_algorithms(False)
        plain = evaluate(whole.best, data, device=device)["accuracy"]
        rows.append(Row("accuracy on digits, float32", f"{plain:.3f}"))
        for precision in ("bfloat16", "float16"):
            if device == "cpu" and precision == "float16":
                continue
            own = train(data, distiller, device, precision=precision, epochs=epochs)
            found = evaluate(own.best, data, device=device, precision=precision)["accuracy"]
            scale = own.scaler.get_scale()
            note = f"scale of the loss {scale:g}" if own.scaler.is_enabled() else ""
            rows.append(Row(f"accuracy on digits, {precision}", f"{found:.3f}", note))
            assert own.scaler.is_enabled() == (precision == "float16")
            assert setting.quick or abs(found - plain) < 0.1, f"{precision}: {found} of {plain}"
        if setting.left > 20 and not setting.quick:
            own = train(data, distiller, device, epochs=2, compiled=True)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            rows.append(Row("graphs of a compiled training", f"{graphs}"))
        (logits,) = predict_batches(whole.best, data, "val", device=device)
        (here,) = predict_batches(copy.deepcopy(whole.best).cpu(), digits(), "val")
        torch.testing.assert_close(logits, here, rtol=1e-3, atol=1e-3)
    return rows
