"""Seconds of losses at 1,000 to 128,000 classes beside compiled plain code and Liger."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from setting import Row, Setting
from torch import Tensor, nn

from selfkd.losses import LinearLogits, distillation_terms, linear_sequence_terms, sequence_terms

T, ALPHA = 2.0, 0.5


def plain(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as most write it."""
    soft = F.kl_div(
        F.log_softmax(student / T, dim=-1), F.softmax(teacher / T, dim=-1), reduction="batchmean"
    )
    return (1 - ALPHA) * F.cross_entropy(student, labels) + ALPHA * T**2 * soft


def ours(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return distillation_terms(student, teacher, labels, temperature=T, alpha=ALPHA).loss


def in_chunks(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    terms = sequence_terms(student[None], teacher[None], labels[None], temperature=T, alpha=ALPHA)
    return terms.loss


def _step(loss: Callable[..., Tensor], student: Tensor, *others: Tensor) -> None:
    student.grad = None
    loss(student, *others).backward()


def check_kernels(setting: Setting) -> list[Row]:
    """Measure forward and backward passes of the loss."""
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"selfkd": ours}
    ways["in chunks"] = in_chunks
    if not setting.quick:
        ways["compiled plain"] = torch.compile(plain)  # type: ignore[assignment]
    found = []
    sizes = (1000, 10_000, 128_000)
    for classes in (100, 1000) if setting.quick else sizes:
        rows = max(16, min(4096, 2**27 // classes)) if not setting.quick else 16
        student = torch.randn(rows, classes, device=setting.device, requires_grad=True)
        teacher = torch.randn(rows, classes, device=setting.device)
        labels = torch.randint(classes, (rows,)).to(setting.device)
        expected = plain(student, teacher, labels)
        times = {}
        for way, loss in ways.items():
            torch.testing.assert_close(
                loss(student, teacher, labels), expected, rtol=1e-3, atol=1e-4
            )
            step = partial(_step, loss, student, teacher, labels)
            times[way] = setting.seconds_of(step, seconds=setting.seconds / 12)
        first = times["selfkd"]
        note = ", ".join(f"{way} {own / first:.2f}" for way, own in times.items() if own != first)
        found.append(Row(f"loss of {rows:,} x {classes:,}", f"{first * 1e3:.2f} ms", note))
    return found


def check_heads(setting: Setting) -> list[Row]:
    """Measure the loss of hidden states, whose logits are never held at once."""
    batch, length, width, classes = (2, 8, 16, 100) if setting.quick else (2, 512, 1024, 128_000)
    device = setting.device
    hidden = torch.randn(batch, length, width, device=device, requires_grad=True)
    head = nn.Linear(width, classes, bias=False).to(device)
    teacher = LinearLogits(torch.randn(batch, length, width, device=device), head.weight.detach())
    labels = torch.randint(classes, (batch, length))
    found = {}
    installed = importlib.util.find_spec("liger_kernel") is not None and device == "cuda"
    for way, smoothing in {"selfkd": 1e-6, **({"Liger": 0.0} if installed else {})}.items():

        def step(smoothing: float = smoothing) -> None:
            hidden.grad = head.weight.grad = None
            linear_sequence_terms(
                hidden, head.weight, teacher, labels.to(device) if smoothing == 0 else labels,
                temperature=T, alpha=ALPHA, label_smoothing=smoothing,
            ).loss.backward()  # fmt: skip

        found[way] = setting.seconds_of(step, seconds=setting.seconds / 6)
    note = f"Liger {found['Liger'] / found['selfkd']:.2f}" if installed else "Liger not there"
    what = f"loss of {batch * length:,} hidden states x {classes:,}"
    return [Row(what, f"{found['selfkd'] * 1e3:.1f} ms", note)]
