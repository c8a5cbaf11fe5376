"""`python -m selfkd.targets`: list, verify, clear out and show the cached logits of teachers."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from selfkd.analysis.soft_targets import TEMPERATURES
from selfkd.cli.output import print_data, print_error, safe_output
from selfkd.cli.teacher import print_targets
from selfkd.cli.terminal import make_console, print_lines
from selfkd.config import Config, from_tree, merge_settings, refuse_foreign, to_tree
from selfkd.loading.choose import open_run
from selfkd.loading.teachers import find_teacher
from selfkd.losses.sequences import SampledTargets
from selfkd.losses.sparse import rest_mass
from selfkd.results import FORMAT, Row, to_row
from selfkd.soft_targets.manifest import Manifest
from selfkd.soft_targets.shards import check_shard, draws
from selfkd.soft_targets.store import SoftTargets, open_store
from selfkd.soft_targets.upkeep import StoreInfo, list_stores, remove_store, sweep
from selfkd.storage.remote import RemotePath, as_path
from selfkd.tasks import make_task
from selfkd.tasks.task import Task
from selfkd.text import one_line
from selfkd.worker.jobs import run_job
from selfkd.worker.teachers import read_targets

DIFFER, USAGE = 1, 2
NOTHING_OUTSIDE = ("data.download=false", "targets.root=null", "tracking.entity=null")
TOLERANCE = 0.01
"""Tolerance of a cached logit, in half precision: nats, and as much of its size."""


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    console = make_console()
    try:
        path = as_path(arguments.path).expanduser()
        if arguments.do == "show":
            return _show(console, path, arguments)
        of_run = (path / "config.yaml").exists()
        roots = [path / "targets" if of_run else path, path / "written"]  # of logits, of text
        for root in roots:
            if root != path and not isinstance(root, RemotePath) and root.is_symlink():
                return _fault(f"PATH must hold no symlink: name the folder it is to, got {root}")
        roots = [root for root in roots if root.is_dir()]
        if not roots and of_run:
            return _fault(
                f"PATH must hold soft targets, got {arguments.path}, a run whose teachers' logits "
                "are not cached, or lie in the folder of its targets.root"
            )
        if not roots:
            return _fault(f"PATH must be a targets folder or a run folder, got {arguments.path}")
        if arguments.do == "ls":
            return _list(console, roots)
        if arguments.do == "gc":
            return _clear(console, roots, sure=arguments.yes)
        return _verify(console, roots, rows=arguments.rows, settings=arguments.settings)
    except (ValueError, OSError) as error:
        return _fault(str(error))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m selfkd.targets", description="The cached logits of teachers."
    )
    commands = parser.add_subparsers(dest="do", required=True, metavar="COMMAND")
    described = {
        "ls": "list the cached logits of each teacher",
        "verify": "run the teachers again on some rows and compare",
        "gc": "remove what no run refers to",
        "show": "show what a teacher knows beside the labels",
    }
    for name, text in described.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "show":
            _add_show(command)
        else:
            command.add_argument("path", metavar="PATH", help="targets folder, or a run folder")
        if name == "gc":
            command.add_argument("--yes", action="store_true", help="remove without asking")
        if name == "verify":
            command.add_argument("--rows", type=_positive, default=16, help="rows of each view")
        if name in ("verify", "show"):
            command.add_argument(
                "--set",
                metavar="KEY=VALUE",
                action="append",
                default=[],
                dest="settings",
                help="change the config of the run, for example --set data.root=PATH",
            )
    return parser


def _add_show(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("path", metavar="RUN", help="run folder")
    add(
        "--temperatures",
        metavar="T",
        type=_temperature,
        nargs="+",
        default=TEMPERATURES,
        help="temperatures of the entropies; default: 1 2 4 10",
    )
    add(
        "--at",
        metavar="T",
        type=_temperature,
        default=1.0,
        help="temperature of the nearest wrong classes; default: 1",
    )
    add("--generation", metavar="K", type=int, help="generation whose teacher is shown")
    add("--arm", metavar="NAME", help="arm of a study whose teacher is shown")
    add("--cache", action="store_true", help="run a teacher whose cached logits are gone")
    add("--format", choices=("table", "json"), default="table")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _stores(roots: Sequence[Path]) -> list[StoreInfo]:
    return [info for root in roots for info in list_stores(root)]


def _list(console: Console, roots: Sequence[Path]) -> int:
    stores = _stores(roots)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("teacher", "data"):
        table.add_column(column, no_wrap=True)
    for column in ("rows", "views", "format", "shards", "MB", "runs"):
        table.add_column(column, justify="right", no_wrap=True)
    for info in stores:
        manifest = info.manifest
        known = ["", "", "text"] if info.is_text else ["?", "?", "damaged manifest"]
        if manifest is not None:
            known = [f"{manifest.images:,}", str(manifest.views), _format(manifest)]
        table.add_row(
            *(one_line(info.path.parent.name), one_line(info.path.name)),
            *known,
            f"{info.present}/{info.expected}",
            f"{info.bytes / 1e6:.1f}",
            str(len(info.users)),
        )
    console.print(table)
    console.print(f"{len(stores)} stores, {sum(info.bytes for info in stores) / 1e6:.1f} MB")
    return 0


def _clear(console: Console, roots: Sequence[Path], *, sure: bool) -> int:
    found = _stores(roots)
    stores = [info for info in found if info.unused]
    for info in found:
        for fault in info.damaged:
            print_lines(console, [f"kept {info.path}: {fault}"])
    for info in stores:
        print_lines(console, [f"{info.path}: {info.bytes / 1e6:.1f} MB, no run refers to it"])
    if stores and not sure:
        if not sys.stdin.isatty():
            return _fault("--yes must be given where there is no terminal; nothing was removed")
        sure = console.input(f"remove {len(stores)} stores? [y/N] ").strip().lower() == "y"
    if sure:
        for info in stores:
            remove_store(info.path)
    swept = [path for root in roots for path in sweep(root)]
    count = len(stores) if sure else 0
    console.print(f"removed {count} stores and {len(swept)} files of killed writers")
    return 0


def _show(console: Console, path: Path, arguments: argparse.Namespace) -> int:
    folder, config, _ = open_run(path)
    found = find_teacher(folder, config, generation=arguments.generation, arm=arguments.arm)
    root = folder.targets(found.config)
    own = merge_settings(found.config, settings=[*NOTHING_OUTSIDE, *arguments.settings], flags={})
    given = [setting.partition("=")[0] for setting in arguments.settings]
    refuse_foreign(own, path / "config.yaml", confirmed=given)
    rows = [
        {"hash": model.hash, "checkpoint": str(folder.file(model.checkpoint))}
        | ({} if model.weight is None else {"weight": model.weight})
        for model in found.models
    ]
    task = make_task(to_tree(own))
    if arguments.cache:
        _cache(task, own, root, folder.path, rows)
    try:
        known = read_targets(
            task,
            str(root),
            rows,
            temperatures=arguments.temperatures,
            temperature=arguments.at,
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the cached logits of {found.title} are gone ({error}): add --cache, which runs it "
            "once on the training items"
        ) from None
    known = replace(known, teacher=found.title, students=found.students)
    if arguments.format == "json":
        return print_data(json.dumps({"format": FORMAT, **to_row(known)}) + "\n")
    print_targets(console, known)
    return 0


def _cache(task: Task, config: Config, root: Path, run: Path, teachers: Sequence[Row]) -> None:
    """Cache the logits of teachers where they are not there."""
    for teacher in teachers:
        manifest = task.manifest(teacher["hash"], {})
        place = {"targets": str(root), "run": str(run), "checkpoint": teacher["checkpoint"]}
        for view in range(manifest.views):
            for shard in range(manifest.shards):
                payload = {"config": to_tree(config), **place, "view": view, "shard": shard}
                list(run_job("cache_teacher_logits", payload))


def _verify(console: Console, roots: Sequence[Path], *, rows: int, settings: Sequence[str]) -> int:
    stores = _stores(roots)
    if not stores:
        raise ValueError(f"PATH must hold soft targets, got {roots[0]}, where there are none")
    unknown = 0
    for info in stores:
        name, root = f"{info.path.parent.name}/{info.path.name}", info.path.parents[1]
        if info.is_text:
            print_lines(console, [f"{name}: text, whose hashes students check as they read it"])
            continue
        if info.manifest is None:
            print_lines(console, [f"{name}: {info.damaged[0]}"])
            return DIFFER
        try:
            fault = next(_faults(root, info, info.manifest, rows, settings), None)
        except FileNotFoundError as error:
            unknown += 1
            print_lines(console, [f"{name}: cannot be checked: {error}"])
            continue
        if fault is not None:
            print_lines(console, [f"{name}: {fault}"])
            return DIFFER
        print_lines(console, [f"{name}: {rows} rows a view are as the teacher predicts"])
    return USAGE if unknown else 0


def _faults(
    root: Path, info: StoreInfo, manifest: Manifest, rows: int, settings: Sequence[str]
) -> Iterator[str]:
    """Yield the faults of a store: damaged shards, then rows that differ."""
    for view in range(manifest.views):
        for shard in range(manifest.shards):
            state = check_shard(root, manifest, view=view, shard=shard)
            if state != "whole":
                yield f"shard {shard} of view {view} is {state}"
    checkpoint, config = _origin(root, info, manifest, settings)
    task = make_task(to_tree(config))
    digest = task.digest(checkpoint)
    pools: list[dict[str, Any]] = [{}]  # a task need not have the other
    if config.transfer is not None:
        pools.append({"of": "transfer"})
    same = [pool for pool in pools if task.manifest(digest, {}, **pool).data == manifest.data]
    if not same:
        yield "the data or its views are not those of the cached logits"
    if digest != manifest.teacher:
        yield f"{checkpoint} is not the teacher whose logits are cached"
    cached = open_store(root, [manifest.teacher], data=manifest.data)
    generator = torch.Generator().manual_seed(0)
    for view in range(manifest.views):
        sample = torch.randperm(manifest.images, generator=generator)[:rows].sort().values
        for row in sample.tolist():
            (logits,) = task.predict_batches(checkpoint, range(row, row + 1), view=view, **same[0])
            off = _distance(cached, manifest, logits, row, view)
            if off > TOLERANCE:
                yield f"row {row} of view {view} differs by {off:.3g} from the teacher's logits"


def _origin(
    root: Path, info: StoreInfo, manifest: Manifest, settings: Sequence[str]
) -> tuple[str, Config]:
    """Return the teacher's checkpoint and config, by which nothing is fetched or written."""
    file = info.path / "manifest.json"
    checkpoint, tree = (manifest.origin.get(key) for key in ("checkpoint", "config"))
    if not isinstance(checkpoint, str) or not isinstance(tree, dict):
        raise ValueError(f"{file} is damaged: origin must have a checkpoint and a config")
    elsewhere = isinstance(as_path(checkpoint), RemotePath) and not isinstance(root, RemotePath)
    if elsewhere or not as_path(checkpoint).exists():
        raise FileNotFoundError(
            f"its checkpoint {checkpoint} is {'remote' if elsewhere else 'gone'}"
        )
    config = merge_settings(from_tree(tree), settings=[*NOTHING_OUTSIDE, *settings], flags={})
    given = [setting.partition("=")[0] for setting in settings]
    refuse_foreign(config, file, confirmed=given)
    return checkpoint, config


def _format(manifest: Manifest) -> str:
    if manifest.samples is not None:
        return f"{manifest.samples} samples"
    return f"{manifest.classes} logits" if manifest.top_k is None else f"top {manifest.top_k}"


def _distance(
    cached: SoftTargets, manifest: Manifest, logits: Tensor, row: int, view: int
) -> float:
    """Return the largest difference of a row, relative to 1 and the size of its logits.

    Of samples it is the probability by which a draw misses the class that it was given.
    """
    found = cached(torch.tensor([row]), view)
    shifted = logits[0].float() - logits[0].max()
    if isinstance(found, SampledTargets):
        upper = shifted.double().softmax(dim=0).cumsum(dim=0)
        lower = torch.cat([upper.new_zeros(1), upper[:-1]])
        uniform = draws(manifest, view, range(row, row + 1))[0]
        below, above = (ends[found.indices[0]] for ends in (lower, upper))
        return float(torch.maximum(below - uniform, uniform - above).max())
    if isinstance(found, Tensor):
        there, here = found[0].float(), shifted.clamp(min=torch.finfo(torch.float16).min)
    else:
        rest, grid = rest_mass(shifted, found.indices[0])
        there = torch.cat([found.values[0].float(), found.rest[0].float()[None]])
        here = torch.cat([shifted[found.indices[0]], rest[None]])
        if found.rest_grid is not None:
            there, here = torch.cat([there, found.rest_grid[0]]), torch.cat([here, grid])
    return float(((there - here).abs() / (1 + here.abs())).max())


def _fault(text: str) -> int:
    print_error(text)
    return USAGE


if __name__ == "__main__":
    raise SystemExit(main())
