"""Your own PyTorch loop, born again: three lines of it are selfkd's, marked below.

    python examples/plain_loop.py

The same loop trains generation 0 on labels, two born-again generations, and a last student of the
ensemble of all three, on four seeds. Of the 300 labels 27 % are wrong: a network learns those by
heart, a student of its soft targets less so.
"""

import torch
from scipy import stats
from torch import Tensor, nn

from selfkd import Distiller, Ensemble, Teacher
from selfkd.data import Data, load_data

EPOCHS, BATCH, SEEDS = 20, 25, 4


def make_model() -> nn.Module:
    """Return a small network for 8x8 digits, with fresh weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def train(data: Data, distiller: Distiller, seed: int) -> nn.Module:
    """Train a network by whatever the distiller says: labels, a teacher, an ensemble."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for inputs, labels, _ in data.batches("train", batch_size=BATCH, generator=generator):
            terms = distiller(model(inputs), labels, inputs=inputs)  # selfkd
            optimizer.zero_grad()
            terms["loss"].backward()  # selfkd
            optimizer.step()
        scheduler.step()
    return model.eval()


@torch.no_grad()
def accuracy(data: Data, model: nn.Module) -> float:
    """Return the share of test images that a model gets right; nothing is chosen by it."""
    right: list[Tensor] = [
        model(inputs).argmax(dim=1) == labels
        for inputs, labels, _ in data.batches("test", batch_size=400)
    ]
    return torch.cat(right).float().mean().item()


def lineage(data: Data, seed: int) -> list[float]:
    """Return the test accuracy of three generations and of the student of all of them."""
    models = [train(data, Distiller(), seed=4 * seed)]
    for generation in (1, 2):
        teacher = Teacher(models[-1])
        distiller = Distiller(teacher, temperature=4.0, alpha=0.9)  # selfkd
        models.append(train(data, distiller, seed=4 * seed + generation))
    distil_all = Distiller(Ensemble(models), temperature=4.0, alpha=0.9)
    models.append(train(data, distil_all, seed=4 * seed + 3))
    return [accuracy(data, model) for model in models]


def main() -> None:
    """Train and print means over the seeds, with the paired gains and their 95 % intervals."""
    torch.set_num_threads(1)  # more are slower for so small a network
    data = load_data("digits", train_size=300, label_noise=0.3)
    first, *others = zip(*(lineage(data, seed) for seed in range(SEEDS)), strict=True)
    print(f"generation 0: {sum(first) / SEEDS:.2%}")
    names = ["generation 1", "generation 2", "student of all three"]
    for name, found in zip(names, others, strict=True):
        gains = [100 * (after - before) for after, before in zip(found, first, strict=True)]
        low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
        mean = sum(gains) / SEEDS
        print(f"{name}: {sum(found) / SEEDS:.2%}, {mean:+.1f} points [{low:+.1f}, {high:+.1f}]")


if __name__ == "__main__":
    main()
