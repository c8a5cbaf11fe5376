"""Self-distillation of kernel ridge regression against its closed form (Mobahi et al., 2020).

    python -m selfkd.generations --config tune_configs/anchors/a17_ridge.yaml \\
      --train examples/anchors/a17_ridge.py:train_ridge --name a17_ridge
    python examples/anchors/a17_ridge.py runs/a17_ridge

With K = V diag(d) V' the Gram matrix of the training points and c the strength of regularisation,
each round multiplies what is fitted by d / (d + c) once more, so generation g fits

    y_g = V diag(d / (d + c))^(g + 1) V' y

and, the labels' noise being in the small d, error falls at first where c is small, and then rises.

Mobahi, Farajtabar, Bartlett, "Self-Distillation Amplifies Regularization in Hilbert Space", 2020,
https://arxiv.org/abs/2002.05715
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selfkd.experiments.run_folder import RunFolder
from selfkd.storage.checkpoint import load_tensors
from selfkd.training.trial import Trial

Array = NDArray[np.float64]

WIDTH, TRAIN, VAL, NOISE = 0.1, 60, 2000, 0.7
TEST = torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None]


class Ridge(nn.Module):
    """Kernel ridge regression with a Gaussian kernel, `[batch, 1]` to `[batch, 1]`."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.register_buffer("points", points)
        self.coefficients = nn.Parameter(torch.zeros_like(points))

    def forward(self, inputs: Tensor) -> Tensor:
        return gram(inputs, self.get_buffer("points")) @ self.coefficients

    @torch.no_grad()
    def fit(self, values: Tensor, c: float) -> None:
        """Minimise |values - K a|^2 + c a' K a over the coefficients a."""
        points = self.get_buffer("points")
        system = gram(points, points) + c * torch.eye(len(points), dtype=points.dtype)
        self.coefficients.copy_(torch.linalg.solve(system, values))


def gram(one: Tensor, other: Tensor) -> Tensor:
    """Return the kernel between all points of one and of another set."""
    return torch.exp(-((one - other.T) ** 2) / (2 * WIDTH**2))


def truth(points: Tensor) -> Tensor:
    """Return what is to be learnt, without noise."""
    return torch.sin(math.pi * points)


def make_data(points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points in [-1, 1] and noisy values, `[points, 1]`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.rand(points, 1, generator=generator, dtype=torch.float64) - 1
    noise = torch.randn(points, 1, generator=generator, dtype=torch.float64)
    return inputs, truth(inputs) + NOISE * noise


def train_ridge(trial: Trial) -> None:
    """Fit the labels in generation 0, then what the generation before answers."""
    points, values = make_data(TRAIN, seed=0)
    student = Ridge(points)
    teacher = trial.distiller(student).teacher
    student.fit(values if teacher is None else teacher(points), trial.params["c"])
    val_points, val_values = make_data(VAL, seed=1)
    with torch.no_grad():
        metrics = {
            "val_mse": (student(val_points) - val_values).square().mean().item(),
            "test_mse": (student(TEST) - truth(TEST)).square().mean().item(),
        }
    trial.report(metrics, student=student)


class Comparison(NamedTuple):
    """A generation beside its closed form."""

    val_mse: float
    """As the training function reported it, on noisy values."""
    test_mse: float
    """The same against the truth."""
    closed_mse: float
    """`test_mse` of the closed form."""
    fitted: Array
    """Predictions of the saved student for the training points."""
    difference: float
    """Between student and closed form, the largest on training and test points."""


def closed_form(c: float, generation: int) -> tuple[Array, Array]:
    """Return a generation's predictions for the training and the test points."""
    points, values = make_data(TRAIN, seed=0)
    eigenvalues, vectors = np.linalg.eigh(gram(points, points).numpy())
    shrinking = eigenvalues / (eigenvalues + c)
    before = shrinking**generation * (vectors.T @ values.numpy()[:, 0])
    coefficients = vectors @ (before / (eigenvalues + c))
    return vectors @ (shrinking * before), gram(TEST, points).numpy() @ coefficients


def compare(run: Path) -> list[Comparison]:
    """Return each generation of a finished run beside its closed form."""
    folder, config = RunFolder.open(run)
    points, _ = make_data(TRAIN, seed=0)
    student, rows = Ridge(points), []
    for result in folder.results():
        student.load_state_dict(load_tensors(folder.path / result.models[0].checkpoint)[0])
        with torch.no_grad():
            fitted, tested = (student(inputs)[:, 0].numpy() for inputs in (points, TEST))
        closed, closed_tested = closed_form(config.params["c"], result.generation)
        rows.append(
            Comparison(
                val_mse=result.metrics["val_mse"],
                test_mse=result.metrics["test_mse"],
                closed_mse=float(np.square(closed_tested - truth(TEST).numpy()[:, 0]).mean()),
                fitted=fitted,
                difference=float(np.abs([*(fitted - closed), *(tested - closed_tested)]).max()),
            )
        )
    return rows


def shape(errors: Sequence[float]) -> str:
    """Say how errors go over the generations.

    >>> shape([3.0, 1.0, 2.0]), shape([1.0, 2.0])
    ('U-shaped, lowest in generation 1', 'rising from generation 0 on')
    """
    lowest = int(np.argmin(errors))
    steps = np.diff(errors)
    if not ((steps[:lowest] < 0).all() and (steps[lowest:] > 0).all()):
        return "of another shape"
    if 0 < lowest < len(errors) - 1:
        return f"U-shaped, lowest in generation {lowest}"
    return "falling" if lowest else "rising from generation 0 on"


def main(runs: Sequence[str]) -> None:
    """Print each run beside its closed form."""
    for run in map(Path, runs):
        rows = compare(run)
        print(f"{run}\ngeneration  val MSE  test MSE  closed form  largest difference")
        for number, row in enumerate(rows):
            print(
                f"{number:>10}  {row.val_mse:7.5f}  {row.test_mse:8.5f}  {row.closed_mse:11.5f}  "
                f"{row.difference:18.1e}"
            )
        print(f"test error is {shape([row.test_mse for row in rows])}")


if __name__ == "__main__":
    main(sys.argv[1:])
