"""Reproduce the published results: run what is asked for, keep what comes out, write the table.

    python examples/anchors/run.py --data PATH                  # all, about 5 core-hours
    python examples/anchors/run.py --data PATH a01_teacher a02_a03_student  # some, a teacher first
    python examples/anchors/run.py --table                      # RESULTS.md again, no training

PATH holds torchvision's MNIST folder. Everything is run by selfkd's own commands, two one-thread
trials at a time; what was interrupted goes on. `--tenth` runs a tenth of the epochs on few seeds,
to see that all parts work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a17_ridge import compare
from anchors import ANCHORS, RESULTS, RUNS, Row, Run

from selfkd.config import OF_TASK, Config, dump_config, from_tree, load_config, resume_invariant
from selfkd.experiments.run_folder import RunFolder

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "tune_configs" / "anchors"
DROPPED = ("checkpoint", "predictions", "diagnostics", "mcnemar", "history", "hash", "models")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; return the exit code of the first command that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [run.name for run in RUNS]
    parser.add_argument(
        "names", nargs="*", metavar="RUN", help=f"of {', '.join(names)}; all if none"
    )
    parser.add_argument("--data", metavar="PATH", help="SELFKD_DATA when not given")
    parser.add_argument("--runs", default="runs/anchors", help="folder of the run folders")
    parser.add_argument("--tenth", action="store_true", help="a tenth of the epochs, few seeds")
    parser.add_argument("--table", action="store_true", help="write RESULTS.md and stop")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in names]
    if unknown:
        parser.error(f"RUN must be of {', '.join(names)}, got {unknown[0]}")
    runs = Path(arguments.runs)
    if not arguments.table:
        for run in RUNS:
            if run.name in (arguments.names or names):
                code = reproduce(run, runs, data=arguments.data, tenth=arguments.tenth)
                if code:
                    return code
    if not arguments.tenth:
        (HERE / "RESULTS.md").write_text(results_page(), encoding="utf-8")
    return 0


def reproduce(run: Run, runs: Path, *, data: str | None = None, tenth: bool = False) -> int:
    """Run one, or what is left of it, and keep its result; return the command's exit code."""
    folder = runs / run.name
    command = [sys.executable, "-m", f"selfkd.{run.command}"]
    if (folder / "config.yaml").exists():
        command += ["--resume", str(folder)]
    else:
        path = CONFIGS / f"{run.name}.yaml"
        if tenth:
            path = runs / f"{run.name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dump_config(shrunk(load_config(CONFIGS / path.name))), encoding="utf-8")
        command += ["--config", str(path), "--name", run.name, "--set", f"storage={runs}"]
        command += ["--set", f"data.root={data}"] if data else []
        command += ["--from", str(runs / run.teacher)] if run.teacher else []
    command += ["--train", str(HERE / run.train)] if run.train else []
    code = subprocess.run(command, check=False).returncode  # noqa: S603 - our own command
    if code == 0:
        target = (runs if tenth else RESULTS) / f"{run.name}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(collect(run, folder), indent=1) + "\n", encoding="utf-8")
    return code


def shrunk(config: Config) -> Config:
    """Return a config with a tenth of the epochs, two seeds and two trials."""
    tree = dataclasses.asdict(config)
    tree["train"]["epochs"] = _tenth(config.train.epochs)
    tree["search"]["trials"] = min(2, config.search.trials)
    tree["confirm"]["seeds"] = min(2, config.confirm.seeds)
    if config.members.count:
        tree["members"]["count"] = 2
    for arm in tree["study"]["arms"].values():
        if "train.epochs" in arm["set"]:
            arm["set"]["train.epochs"] = _tenth(arm["set"]["train.epochs"])
    return from_tree(tree)


def _tenth(epochs: int) -> int:
    return max(1, epochs // 10)


def collect(run: Run, folder: Path) -> Row:
    """Return the result of a finished run: its settings, what came out, machine and time."""
    _, config = RunFolder.open(folder)
    machine = json.loads((folder / "environment.json").read_text(encoding="utf-8"))[-1]
    facts = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    trials = [
        json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("trial_*/result.json")
    ]
    summary = _without(json.loads((folder / "summary.json").read_text(encoding="utf-8")), DROPPED)
    if run.train:  # of ridge regression: generations beside their closed form
        rows = compare(folder)
        summary["closed_form"] = [
            {"test_mse": row.test_mse, "difference": row.difference} for row in rows
        ]
    return {
        "config": settings(config),
        "machine": {key: machine[key] for key in ("cpu", "cpus", "gpus", "versions")},
        "core_minutes": round(sum(trial["train_seconds"] for trial in trials) / 60, 1),
        "test_items": facts["items"].get("test"),
        "summary": summary,
    }


def settings(config: Config) -> Row:
    """Return what makes a run what it is, by dotted key: nothing of where it was made."""
    aside = (
        "members.runs",
        *(key for task, keys in OF_TASK.items() if task != config.task for key in keys),
        *(["search."] if config.study.arms else []),
    )  # a study searches nothing
    kept = resume_invariant(config) | {"confirm.seeds": config.confirm.seeds}
    return {key: value for key, value in kept.items() if not key.startswith(aside)}


def _without(tree: Any, keys: Sequence[str]) -> Any:
    if isinstance(tree, dict):
        return {key: _without(value, keys) for key, value in tree.items() if key not in keys}
    return [_without(value, keys) for value in tree] if isinstance(tree, list) else tree


def results_page() -> str:
    """Return RESULTS.md, from the stored results and the notes beside them."""
    lines = [
        "| # | experiment | published | accepted | measured, mean ± standard deviation over seeds "
        "| seeds | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    remarks, made, done = [], [], set()
    for anchor in ANCHORS:
        path = RESULTS / f"{anchor.run}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        found = anchor.judge(result)
        seeds = result["config"]["confirm.seeds"] or 1
        lines.append(
            f"| {anchor.key} | {anchor.title} | {anchor.published} | {anchor.accept} | "
            f"{found.measured} | {seeds} | **{found.outcome}** |"
        )
        if found.remark:
            remarks.append(f"- {anchor.key}: {found.remark}.")
        if anchor.run not in done:
            done.add(anchor.run)
            run = next(run for run in RUNS if run.name == anchor.run)
            more = f" --from runs/{run.teacher}" if run.teacher else ""
            more += f" --train examples/anchors/{run.train}" if run.train else ""
            made.append(
                f"| {anchor.run} | `python -m selfkd.{run.command} --config "
                f"tune_configs/anchors/{run.name}.yaml --name {run.name}{more}` | "
                f"{result['core_minutes']:.1f} | {_machine(result)} |"
            )
    notes = (HERE / "notes.md").read_text(encoding="utf-8") if (HERE / "notes.md").exists() else ""
    head = ["| run | command | core-minutes | hardware |", "|---|---|---|---|"]
    title = "# The published results, reproduced\n\nWritten by `python examples/anchors/run.py`.\n"
    tables = "\n".join(lines) + "\n\n" + "\n".join(remarks)
    return f"{title}\n{tables}\n\n## How\n\n" + "\n".join([*head, *made]) + f"\n\n{notes}"


def _machine(result: Row) -> str:
    machine = result["machine"]
    versions = machine["versions"]
    gpus = ", ".join(map(str, machine["gpus"])) or "no GPU"
    return f"{machine['cpus']} cores of {machine['cpu']}, {gpus}, torch {versions['torch']}"


if __name__ == "__main__":
    raise SystemExit(main())
