"""Error and size of the k largest logits of a teacher, by what is known of the rest's mass.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.rest

For each teacher, over 40 temperatures from 1 to 20 and over the rows: the largest loss of a student
equal to the teacher, in nats, which should be 0, with the rest spread evenly and interpolated; with
it interpolated, the largest error of the bucket's probability and of its log-sum-exp, in nats, and
the largest loss from T = 20 to 200. Bytes of a row: as a store keeps it, and with all logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from selfkd.losses.sparse import SparseLogits, bucket_log_probabilities, sparsify
from selfkd.soft_targets.manifest import row_bytes

TEMPERATURES = torch.logspace(0, torch.tensor(20.0).log10().item(), 40).tolist()
HIGH = torch.logspace(torch.tensor(20.0).log10().item(), torch.tensor(200.0).log10().item(), 10)


def digits(epochs: int) -> Tensor:
    """Return the logits of a network trained on two thirds of scikit-learn's digits, for all."""
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(epochs):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model(images).detach()


def zipf(power: float, classes: int, noise: float) -> Tensor:
    """Return the logits of probabilities that fall as a power of the rank, with noise."""
    ranks = torch.arange(1, classes + 1).log()
    return noise * torch.randn(16, classes) - power * ranks


def teachers() -> Iterable[tuple[str, Tensor, int]]:
    """Yield name, logits and k."""
    for epochs in (5, 30, 200):
        yield f"digits, {epochs} epochs", digits(epochs), 3
    torch.manual_seed(0)
    for power, classes, k in ((1.0, 32_000, 20), (1.2, 1_000, 20), (2.0, 50_000, 256),
                              (3.0, 5_000, 20), (3.0, 50_000, 64)):  # fmt: skip
        yield f"rank^-{power:g}, {classes:,}", zipf(power, classes, 0.3), k
    yield "rank^-2, 50,000, noisy", zipf(2.0, 50_000, 1.5), 256
    yield "normal, 1,000", 2 * torch.randn(16, 1_000), 20
    yield "flat, 1,000", torch.zeros(1, 1_000), 20


def errors(logits: Tensor, sparse: SparseLogits, temperature: float) -> tuple[float, float, float]:
    """Return the largest loss of the teacher itself, and errors of probability and logarithm."""
    classes = logits.shape[-1]
    log_q = bucket_log_probabilities(sparse, temperature, classes, torch.float64)
    log_p = F.log_softmax(logits.double() / temperature, -1)
    others = log_p.scatter(-1, sparse.indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([log_p.gather(-1, sparse.indices), others], -1)
    difference = log_q - log_p
    loss = temperature**2 * (log_q.exp() * difference).sum(-1)
    probability = (log_q.exp() - log_p.exp())[:, -1].abs()
    logarithm = (difference[:, -1] - difference[:, 0]).abs()  # of the bucket alone
    return loss.max().item(), probability.max().item(), logarithm.max().item()


def main() -> None:
    warnings.simplefilter("ignore")
    print("                              bytes a row   largest loss of the teacher itself   errors")
    print("teacher                    k  k kept    all   even interpolated  T > 20     q     log q")
    for name, logits, k in teachers():
        sparse = sparsify(logits, k)
        even = sparse._replace(rest_grid=None)
        spread = max(errors(logits, even, t)[0] for t in TEMPERATURES)
        loss, q, log_q = (
            max(each)
            for each in zip(*(errors(logits, sparse, t) for t in TEMPERATURES), strict=True)
        )
        high = max(errors(logits, sparse, t)[0] for t in HIGH.tolist())
        size = row_bytes(logits.shape[-1], top_k=k)
        print(
            f"{name:23} {k:4} {size:7} {2 * logits.shape[-1]:6} {spread:6.3f} {loss:10.1e} "
            f"{high:10.1e} {q:9.1e} {log_q:7.1e}"
        )


if __name__ == "__main__":
    main()
