"""Flags of the commands that train: those for any key of the config, and those for common ones."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfkd.config.schema import known_keys
from selfkd.errors import ConfigError

USAGE = 2
FLAGS: dict[str, tuple[str, type, str, str]] = {
    "--task": ("task", str, "NAME", "images (classifiers) or text (language models)"),
    "--data": ("data.name", str, "NAME", "dataset; of text pydoc, docstrings, arithmetic or text"),
    "--data-root": ("data.root", str, "DIR", "folder of the dataset, or of your text"),
    "--labels": ("data.train_size", int, "N", "number of labelled training images, or of problems"),
    "--model": ("model.name", str, "NAME", "any of timm, or selfkd_*; of text selfkd_gpt or hf"),
    "--epochs": ("train.epochs", int, "N", "epochs of a training; of text, parts of its steps"),
    "--batch-size": ("train.batch_size", int, "N", "images, or windows of text, a step"),
    "--lr": ("train.lr", float, "X", "learning rate"),
    "--trials": ("search.trials", int, "N", "trials of each search"),
    "--seeds": ("confirm.seeds", int, "N", "fresh seeds on which the choice is replicated"),
    "--storage": ("storage", str, "DIR", "folder of the run folders, or its URI"),
    "--name": ("name", str, "NAME", "name of the run folder"),
    "--seed": ("seed", int, "N", "seed of the split, the search and all trials"),
}
"""Key, type, placeholder and meaning of each flag that stands for one key of the config."""
_ELSEWHERE = {
    **{"batch": "train.batch_size", "learning_rate": "train.lr", "wd": "train.weight_decay"},
    **{"t": "distill.temperature", "generations": "rounds", "dataset": "data.name"},
    **{"gpus": "resources.gpu", "cpus": "resources.cpu", "width": "model.args.width"},
    **{"wandb": "tracking.mode", "tracking": "tracking.mode", "project": "tracking.project"},
    **{"output": "storage", "output_dir": "storage", "runs": "storage"},
}
"""Keys by other names that people type."""


class Parser(argparse.ArgumentParser):
    """A parser that names the key which an unknown flag may mean."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the arguments; ends the process with code 2 where one is unknown."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            known = list(self._option_string_actions)
            self.exit(USAGE, f"error: {describe_unknown(rest, known)}\n")
        return found


def describe_unknown(words: Sequence[str], flags: Sequence[str] = ()) -> str:
    """Return what unknown arguments may mean.

    Args:
        words: Unknown words of a command line, flags with their values.
        flags: Flags that there are.

    >>> describe_unknown(["--alpha", "1"])
    '--alpha: unknown flag: did you mean --set distill.alpha=1?'
    """
    lines = []
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not flag.startswith("-"):
            continue
        if not equals and not "".join(words[number + 1 : number + 2]).startswith("-"):
            value = "".join(words[number + 1 : number + 2])
        guesses = [*difflib.get_close_matches(flag, flags, n=1, cutoff=0.8)]
        guesses += [f"--set {key}={value or '…'}" for key in _keys(flag.strip("-"))]
        meant = f": did you mean {' or '.join(guesses[:3])}?" if guesses else ""
        lines.append(f"{flag}: unknown flag{meant}")
    if not lines:
        run = (Path(words[0]) / "config.yaml").is_file()
        guesses = [f"{flag} {words[0]}" for flag in ("--from", "--resume") if flag in flags and run]
        meant = f": did you mean {' or '.join(guesses)}?" if guesses else ""
        return f"unknown argument: {' '.join(words)}{meant}"
    if not all("did you mean" in line for line in lines):
        lines.append("--help lists the flags, --help-config KEY says what a key of --set means")
    return "\n".join(lines)


def _keys(name: str) -> list[str]:
    """Return the keys of the config that a flag may mean, the likeliest first."""
    name = name.replace("-", "_")
    keys = [key for key in known_keys() if not key.startswith(("study", "student."))]
    ends: dict[str, list[str]] = {}
    for key in keys:
        ends.setdefault(key.rpartition(".")[2], []).append(key)
        ends.setdefault(key.replace(".", "_"), []).append(key)
    if name in keys:
        return [name]
    if name in _ELSEWHERE:
        return [_ELSEWHERE[name]]
    close = difflib.get_close_matches(name, ends, n=1, cutoff=0.75)
    return ends.get(name) or (ends[close[0]] if close else [])


class _HelpConfig(argparse.Action):
    """Prints what a key of the config means, and ends the process."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        from selfkd.config.reference import describe_key  # reads the schema's source

        try:
            text = describe_key(str(values))
        except ConfigError as error:
            parser.exit(USAGE, f"error: {error}\n")
        flag = next((flag for flag, (key, *_) in FLAGS.items() if key == values), None)
        more = f"\n    flag: {flag}" if flag else ""
        print(f"{text}{more}")  # noqa: T201
        parser.exit()


def config_parser(name: str, description: str) -> Parser:
    """Return a parser of the flags that make a config."""
    parser = Parser(
        prog=f"python -m selfkd.{name}", description=description, conflict_handler="resolve"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, see tune_configs/")
    for flag, (key, kind, metavar, text) in FLAGS.items():
        parser.add_argument(flag, type=kind, metavar=metavar, dest=key, help=text)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="set any config key, for example --set train.weight_decay=1e-3",
    )
    parser.add_argument(
        "--help-config", metavar="KEY", action=_HelpConfig, help="say what a config key means"
    )
    return parser


def config_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags of `config_parser` by dotted key."""
    return {key: getattr(arguments, key) for key, *_ in FLAGS.values()}


def base_parser(name: str, description: str) -> Parser:
    """Return a parser of the flags that all commands have that train."""
    parser = config_parser(name, description)
    parser.add_argument("--resume", metavar="RUN", help="run folder to continue")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="say what would be trained, how much is written and about how long it takes; start "
        "nothing",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print all tables, what explains them, and Ray's log"
    )
    parser.add_argument("--quiet", action="store_true", help="print the table and errors only")
    return parser


def add_members(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that have several teachers."""
    parser.add_argument("--members", type=int, help="number of models that are trained")
    add_from(parser, "run folder whose models are members; may be given several times")


def add_from(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the flag of commands that take models of earlier runs."""
    parser.add_argument("--from", metavar="RUN", action="append", dest="runs", help=text)
