"""Accuracy per generation over several runs: a table with intervals, and a picture.

    for seed in 0 1 2 3 4; do python -m selfkd.generations --seed $seed --name digits-$seed; done
    python examples/plot_generations.py runs/digits-* --output accuracy.svg

Each run has its own split and seeds. Its accuracy of a generation is the mean over its fresh seeds
or lineages, or that of the chosen model where there are none; the ensemble is the one of its chosen
models. The interval is Student's t over the runs, of the accuracy and of the paired difference to
generation 0 of the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats


def load_accuracy(runs: Sequence[Path]) -> np.ndarray:
    """Return test accuracy `[runs, generations + 1]`; the last column is the ensemble."""
    rows = []
    for run in runs:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        replicated = [row["mean"]["value"] for row in summary["confirmations"]]
        chosen = [row["test_accuracy"] for row in summary["generations"]]
        rows.append([*(replicated or chosen), summary["ensemble"]["test_accuracy"]])
    if len({len(row) for row in rows}) != 1:
        raise ValueError("runs must have the same number of generations")
    return np.array(rows)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return mean and half the 95 % interval of Student's t over runs."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)


def main() -> None:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="SVG or PNG file (needs matplotlib)")
    arguments = parser.parse_args()
    accuracy = load_accuracy(arguments.runs)
    names = [str(generation) for generation in range(accuracy.shape[1] - 1)] + ["ensemble"]
    print(f"{len(accuracy)} runs: test accuracy, mean and 95 % interval")
    for column, name in enumerate(names):
        mean, half = interval(accuracy[:, column])
        gain, gain_half = interval(accuracy[:, column] - accuracy[:, 0])
        versus = f"   vs generation 0: {gain:+.2%} ± {gain_half:.2%}" if column else ""
        print(f"{name:>9}: {mean:.2%} ± {half:.2%}{versus}")
    if arguments.output:
        draw(accuracy, names, arguments.output)


def draw(accuracy: np.ndarray, names: Sequence[str], output: Path) -> None:
    """Draw every run as a thin line, the means with their intervals above them."""
    import matplotlib

    matplotlib.use("svg" if output.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in accuracy:
        axes.plot(names[:-1], 100 * run[:-1], color="0.8", linewidth=1, zorder=1)
        axes.scatter(names[-1:], 100 * run[-1:], color="0.8", s=12, zorder=1)
    means, halves = np.array([interval(column) for column in accuracy.T]).T
    axes.errorbar(
        names, 100 * means, 100 * halves, fmt="o", color="#1f5fbf", capsize=4, linewidth=2, zorder=2
    )
    axes.set_xlabel("generation (0: labels only)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{len(accuracy)} runs, mean and 95 % interval", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.93")
    figure.savefig(output)


if __name__ == "__main__":
    main()
