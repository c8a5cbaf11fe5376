"""Whole commands against Ray Tune alone: born-again generations, and an ensemble of ten.

    python tests/benchmarks/search.py --root MNIST [--rows generations,ensemble,teacher] [--times 1]
    python tests/benchmarks/search.py --root MNIST --epochs 1 --trials 4 --members 4 --processes

MNIST, a network of two layers of 800 units, 3 epochs, 8 trials, no fresh seeds, no tracking: the
same network, optimiser, learning rate, batch and clipping on both sides, `plain_tune.py` as a
careful person writes it. The row `teacher` has a teacher five times the size of its student.

Commands are run in turn, as often as `--times` says. Printed are seconds of wall time, and CPU
seconds of the command and of all it has started; the ratio is that of the least of each side. On a
machine with other work the CPU seconds are what to judge by.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from processes import measure

HERE = Path(__file__).parent
SPACE = "{distill.temperature: {loguniform: [1, 20]}, distill.alpha: {uniform: [0, 1]}}"
STUDENT = 240  # units of a student with a fifth of the parameters of 800 units


def selfkd(row: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return selfkd's command of a row."""
    settings = [
        *("data.name=mnist", f"data.root={options.root}", "data.val_size=10000"),
        "model={name: selfkd_mlp, args: {width: 800, depth: 2}}",
        *(f"train.epochs={options.epochs}", "train.batch_size=128", "train.lr=0.1"),
        *("train.weight_decay=0", "train.clip_grad=1.0", f"search.trials={options.trials}"),
        f"search.space={SPACE}",
        *("confirm.seeds=0", "tracking=none", f"storage={folder}", "name=run"),
    ]
    if row == "ensemble":
        command = ["ensemble", "--members", str(options.members)]
        settings.append("confirm.baseline=false")
    else:
        command = ["generations", "--rounds", str(options.rounds if row == "generations" else 1)]
    if row == "teacher":
        settings.append(f"student={{name: selfkd_mlp, args: {{width: {STUDENT}, depth: 2}}}}")
    name, *more = command
    sets = [word for setting in settings for word in ("--set", setting)]
    return [options.python, "-m", f"selfkd.{name}", *more, *sets]


def plain(row: str, options: argparse.Namespace) -> list[str]:
    """Return the command of a row with Ray Tune alone."""
    what = "ensemble" if row == "ensemble" else "generations"
    more = ["--width", str(STUDENT), "--rounds", "1"] if row == "teacher" else []
    if row == "generations":
        more = ["--rounds", str(options.rounds)]
    counts = ["--trials", str(options.trials), "--epochs", str(options.epochs)]
    members = ["--members", str(options.members)] if row == "ensemble" else []
    script = str(HERE / "plain_tune.py")
    return [sys.executable, script, what, "--root", options.root, *counts, *members, *more]


def say_ratios(row: str, own: list[list[float]], other: list[list[float]]) -> None:
    """Print the ratio of the least of each, wall and CPU, and the range of those of pairs."""
    wall, cpu = (min(a[n] for a in own) / min(b[n] for b in other) for n in (0, 1))
    print(f"{row:12}  ratio  {wall:8.3f} {cpu:7.3f}", end="")
    if len(own) > 1:
        pairs = sorted(a[0] / b[0] for a, b in zip(own, other, strict=True))
        print(f"  wall of each pair: {pairs[0]:.3f} to {pairs[-1]:.3f}", end="")
    print("\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", default=os.environ.get("SELFKD_DATA"), help="folder of MNIST")
    parser.add_argument("--rows", default="generations,ensemble,teacher")
    parser.add_argument("--times", type=int, default=1, help="number of runs of each command")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--only", choices=["selfkd", "plain"], help="one side alone")
    parser.add_argument("--python", default=sys.executable, help="Python with selfkd installed")
    parser.add_argument("--processes", action="store_true", help="list each kind of process, too")
    parser.add_argument("--out", action="store_true", help="print what the commands print")
    options = parser.parse_args()
    if options.root is None:
        parser.error("--root must be given, or SELFKD_DATA")
    options.root = str(Path(options.root).resolve())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    print(f"{os.cpu_count()} cores\n{'':12}  {'':6}   wall s   CPU s", flush=True)
    for row in options.rows.split(","):
        runs: dict[str, list[list[float]]] = {"plain": [], "selfkd": []}
        for _ in range(options.times):
            for side in ("plain", "selfkd"):
                if options.only not in (None, side):
                    continue
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    own = selfkd(row, options, folder) if side == "selfkd" else plain(row, options)
                    wall, each = measure(own, folder, environment)
                    text = (folder / "out.txt").read_text(encoding="utf-8")
                spent = Counter[str]()  # of all processes of a name
                for process, seconds in each:
                    spent[process] += seconds
                found = [wall, sum(spent.values())]
                print(f"{row:12}  {side:6} {found[0]:8.1f} {found[1]:7.1f}", flush=True)
                for process, seconds in spent.most_common(12):
                    if options.processes:
                        print(f"    {seconds:7.1f}  {process}")
                if options.out:
                    print(text)
                runs[side].append(found)
        if all(runs.values()):
            say_ratios(row, runs["selfkd"], runs["plain"])


if __name__ == "__main__":
    main()
