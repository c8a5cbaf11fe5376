"""A small network distilled from a larger one: hints, attention and logits in one loss.

    python examples/features.py

The teacher is four times as wide. The student learns from labels only, from the teacher's logits,
and from its features as well, which a learned projection maps to the teacher's width.
"""

import torch
from torch import Tensor, nn

from selfkd import Distiller
from selfkd.data import Data, load_data
from selfkd.distill.terms import FeatureTerm, LogitTerm
from selfkd.losses.features import attention_transfer
from selfkd.losses.logits import dist_loss

EPOCHS, BATCH, NARROW, WIDE = 12, 25, 6, 24


def make_model(width: int) -> nn.Module:
    """Return a network of two convolutions for 8x8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


def relations(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Say how alike the rankings of classes and images are."""
    return dist_loss(student_logits, teacher_logits, temperature=4.0)


def train(data: Data, model: nn.Module, distiller: Distiller) -> dict[str, float]:
    """Train a model; return the terms of its last step, and its validation accuracy."""
    parameters = [*model.parameters(), *distiller.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for inputs, labels, _ in data.batches("train", batch_size=BATCH, generator=generator):
            terms = distiller(model(inputs), labels, inputs=inputs)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
    distiller.detach()
    with torch.no_grad():
        inputs, labels, _ = next(data.batches("val", batch_size=400))
        accuracy = (model.eval()(inputs).argmax(dim=1) == labels).float().mean().item()
    return {name: value.item() for name, value in terms.items()} | {"val_accuracy": accuracy}


def main() -> None:
    """Train and print."""
    data = load_data("digits")
    torch.manual_seed(0)
    teacher = make_model(WIDE)
    print(f"teacher: {train(data, teacher, Distiller())['val_accuracy']:.2%}")
    further = {
        "hint": FeatureTerm("2", weight=0.5, project=(2 * NARROW, 2 * WIDE)),
        "attention": FeatureTerm("[13]", loss=attention_transfer, weight=50.0),
        "relations": LogitTerm(relations, weight=0.5),
    }
    for name, terms in {"labels only": None, "logits": {}, "logits and features": further}.items():
        torch.manual_seed(1)
        student = make_model(NARROW)
        of = None if terms is None else teacher
        found = train(data, student, Distiller(of, terms=terms, student=student))
        parts = ", ".join(f"{key} {value:.3f}" for key, value in found.items() if key != "loss")
        print(f"student, {name}: {parts}")


if __name__ == "__main__":
    main()
