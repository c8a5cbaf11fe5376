"""Your own PyTorch loop, born again: three lines of it are selfkd's, marked below.

    python examples/plain_loop.py

The same loop trains generation 0 on labels, two born-again generations, and a last student of the
ensemble of all three. One seed of a small set: what it prints shows how, not how well.
"""

import torch
from torch import Tensor, nn

from selfkd import Distiller, Ensemble, Teacher
from selfkd.data import Data, load_data

EPOCHS, BATCH = 20, 25


def make_model() -> nn.Module:
    """Return a small network for 8x8 digits, with fresh weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(data: Data, distiller: Distiller, seed: int) -> nn.Module:
    """Train a network by whatever the distiller says: labels, a teacher, an ensemble."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for inputs, labels, _ in data.batches("train", batch_size=BATCH, generator=generator):
            terms = distiller(model(inputs), labels, inputs=inputs)  # selfkd
            optimizer.zero_grad()
            terms["loss"].backward()  # selfkd
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(data: Data, model: nn.Module) -> float:
    """Return the share of validation images that a model gets right."""
    right: list[Tensor] = [
        model(inputs).argmax(dim=1) == labels
        for inputs, labels, _ in data.batches("val", batch_size=400)
    ]
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Train and print."""
    data = load_data("digits")
    models = [train(data, Distiller(), seed=0)]
    for generation in (1, 2):
        teacher = Teacher(models[-1])
        distiller = Distiller(teacher, temperature=4.0, alpha=0.9)  # selfkd
        models.append(train(data, distiller, seed=generation))
    distil_all = Distiller(Ensemble(models), temperature=4.0, alpha=0.9)
    last = train(data, distil_all, seed=3)
    for generation, model in enumerate(models):
        print(f"generation {generation}: {accuracy(data, model):.2%}")
    print(f"student of all three: {accuracy(data, last):.2%}")


if __name__ == "__main__":
    main()
