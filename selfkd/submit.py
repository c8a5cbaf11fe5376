"""`python -m selfkd.submit`: run a command of selfkd as a job on a Ray cluster, from outside."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import selfkd
from selfkd import capacity, deploy, ensemble, study
from selfkd.cli.command import FAILED
from selfkd.cli.options import USAGE
from selfkd.cli.output import print_error, safe_output
from selfkd.cli.signals import INTERRUPTED, interruptible
from selfkd.config import load_config, load_yaml
from selfkd.config.paths import relative_paths
from selfkd.errors import ConfigError
from selfkd.generations import make_parser as generations_parser
from selfkd.storage.remote import secret_fault

if TYPE_CHECKING:
    from selfkd.execution.submission import End

COMMANDS = {
    "generations": generations_parser,
    "ensemble": ensemble.make_parser,
    "capacity": capacity.make_parser,
    "study": study.make_parser,
    "deploy": deploy.make_parser,
}
FILES = "files"
"""Folder of the job with the files that the command names."""
FILE_OPTIONS = ("--config", "--train", "--make-model", "--checkpoint")
OF_FUNCTIONS = ("--train", "--make-model")
"""Those among them that name a function of a file."""
RUN_FOLDER = re.compile(r"^selfkd: .*; run folder (.+)$", re.MULTILINE)
NOT_FOUND = 127
"""Exit code of a shell that does not know the program."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options before `--`."""
    parser = argparse.ArgumentParser(
        prog="python -m selfkd.submit",
        description="Run a command of selfkd as a job on a Ray cluster: its package and the files "
        "that the command names travel, data, runs and caches do not. Prints the job's log, and "
        "ends with its exit code; Ctrl-C stops the job, which can be continued.",
        usage=f"%(prog)s [options] -- {{{','.join(COMMANDS)}}} [options of the command]",
    )
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS"),
        help="address of the head's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS)",
    )
    parser.add_argument("--name", help="name of the job (default: generated and printed)")
    parser.add_argument(
        "--working-dir",
        metavar="DIR",
        type=Path,
        help="upload this whole folder, but for what its .gitignore and .rayignore list; "
        "the files that the command names lie in it",
    )
    parser.add_argument(
        "--runtime-env",
        metavar="FILE",
        type=Path,
        help="YAML or JSON file of a Ray runtime environment: pip packages, env_vars, …",
    )
    parser.add_argument(
        "--env",
        metavar="NAME",
        action="append",
        default=[],
        help="give the job this variable of your environment; may be given several times",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        default="python",
        help="interpreter on the cluster (default: the python on the PATH of the head's Ray, or "
        "that of the runtime environment's pip packages)",
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="print the job's id once it is submitted, and end"
    )
    return parser


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    parser = make_parser()
    options, unknown = parser.parse_known_args(words[:split])
    command = words[split + 1 :]
    if not command or command[0] not in COMMANDS:
        parser.error(f"after -- must come one of {', '.join(COMMANDS)} with its options")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (the command's stand after --)")
    arguments = COMMANDS[command[0]]().parse_args(command[1:])
    try:
        with interruptible():
            return _submit(options, words[:split], command, arguments)
    except (RuntimeError, ValueError, OSError) as error:
        print_error(str(error))
        return USAGE if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt:
        _say("stopped; no job was submitted")
        return INTERRUPTED


def _submit(
    options: argparse.Namespace,
    given: list[str],
    command: list[str],
    arguments: argparse.Namespace,
) -> int:
    check(options, arguments)
    from selfkd.execution import (
        submission as remote,  # ray takes seconds: after all checks that do not need it
    )

    client = remote.open_client(options.address)
    job = options.name or f"selfkd-{command[0]}-{datetime.now():%m%d-%H%M%S}-{secrets.token_hex(2)}"
    at = f"--address {shlex.quote(options.address)} {shlex.quote(job)}"
    staging = tempfile.TemporaryDirectory(prefix="selfkd-submit-")
    with staging as folder:
        staged = stage(Path(folder), command, arguments, working_dir=options.working_dir)
        environment = runtime_env(options, Path(folder))
        words = [options.python, "-m", f"selfkd.{staged[0]}", *staged[1:]]
        with remote.kept(_say) as heard:
            try:
                entrypoint = shlex.join(words)
                remote.submit(client, job=job, entrypoint=entrypoint, runtime_env=environment)
                staging.cleanup()  # all of it has been sent, and the job may take days
                if options.no_wait and not heard:
                    print(job)  # noqa: T201
                    _say(f"follow it: ray job logs --follow {at}\nstop it:   ray job stop {at}")
                    return 0
                _say(f"submitted {job} to {options.address}")
                log = _Log()
                end = remote.follow(client, job, write=log.write, say=_say, heard=heard)
            except KeyboardInterrupt:
                _say(f"left {job}, which may be running; stop it: ray job stop {at}")
                return INTERRUPTED
    if end.status not in ("SUCCEEDED", "FAILED", "STOPPED"):
        _say(f"left {job}, which is {end.status}; stop it: ray job stop {at}")
        return INTERRUPTED
    if end.status == "STOPPED":
        _say(f"stopped {job}{_resume(given, command, arguments, log.run_folder)}")
        return INTERRUPTED
    return _code(end, job, log)


def check(options: argparse.Namespace, arguments: argparse.Namespace) -> None:
    """Check what can be checked before anything is sent.

    Raises:
        ConfigError: Something is wrong; the message lists all of it.
    """
    if not options.address:
        raise ConfigError("--address must be given, http://HEAD:8265 of the head's dashboard")
    if fault := secret_fault(options.address):
        raise ConfigError(f"--address {fault}")
    if "://" not in options.address:
        options.address = f"http://{options.address}"
    options.address = options.address.rstrip("/")
    if importlib.util.find_spec("aiohttp") is None or importlib.util.find_spec("ray") is None:
        raise ConfigError("jobs need ray[default]: pip install 'selfkd[cluster]'")
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        raise ConfigError(f"--env must name set variables, got {', '.join(missing)}")
    named = [("--resume", arguments.resume)]
    named += [("--from", run) for run in getattr(arguments, "runs", None) or ()]
    named += [("--from", getattr(arguments, "given", None))]
    config = None
    if arguments.resume is None or arguments.config:
        config = load_config(arguments.config, settings=arguments.settings)
        named += [("storage", config.storage)] if arguments.resume is None else []
    train = ("--train", getattr(arguments, "train", None))
    found = ((name, secret_fault(path)) for name, path in [*named, train] if path)
    faults = [f"{name}: {fault}" for name, fault in found if fault]
    faults += relative_paths(config, *named)
    if faults:
        raise ConfigError("\n".join(faults))


def stage(
    folder: Path,
    command: Sequence[str],
    arguments: argparse.Namespace,
    *,
    working_dir: Path | None = None,
) -> list[str]:
    """Copy what is uploaded into a folder: this package's source and the files of the command.

    Args:
        folder: Empty folder.
        command: Name of a command and its options.
        arguments: The same, parsed.
        working_dir: Folder of the user's that is uploaded whole, and that these files lie in.

    Returns:
        The command with the paths of the files in the job.

    Raises:
        ConfigError: A file is missing, or lies outside the working folder.
    """
    source = Path(selfkd.__file__).parent
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(source, folder / "selfkd", ignore=unwanted)
    staged = list(command)
    for option in FILE_OPTIONS:
        given = getattr(arguments, option[2:].replace("-", "_"), None)
        if given is None:
            continue
        of_function = option in OF_FUNCTIONS
        name, colon, function = given.rpartition(":") if of_function else (given, "", "")
        path = Path(name).expanduser()
        if not path.is_file() or (of_function and not colon):
            kind = "path/file.py:function" if of_function else "a readable file"
            raise ConfigError(f"{option} must be {kind}, got {given}")
        if working_dir is None:
            in_job = Path(FILES) / option[2:] / path.name
            (folder / in_job).parent.mkdir(parents=True)
            shutil.copyfile(path, folder / in_job)
        elif path.resolve().is_relative_to(working_dir.resolve()):
            in_job = path.resolve().relative_to(working_dir.resolve())
        else:
            raise ConfigError(f"{option} must lie in --working-dir {working_dir}, got {given}")
        staged = _put(staged, option, f"{in_job}{colon}{function}")
    return staged


def _put(words: Sequence[str], option: str, value: str) -> list[str]:
    """Give an option of a command line another value, however the option is written."""
    words = list(words)
    for place, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if len(flag) > 2 and option.startswith(flag):  # argparse accepts unique prefixes
            if equals:
                words[place] = f"{option}={value}"
            else:
                words[place + 1] = value
    return words


def runtime_env(options: argparse.Namespace, staged: Path) -> dict[str, Any]:
    """Return the job's runtime environment.

    Raises:
        ConfigError: Its file is not as it must be.
    """
    path: Path | None = options.runtime_env
    environment: dict[str, Any] = {}
    if path is not None:
        try:
            environment = load_yaml(path) or {}
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--runtime-env must be a readable file, got {path}: {error}"
            ) from None
        if not isinstance(environment, dict):
            raise ConfigError(f"{path}: must be a mapping of runtime environment fields")
        if "working_dir" in environment:
            raise ConfigError(f"{path}: working_dir must be given as --working-dir DIR")
    if options.working_dir is None:
        environment["working_dir"] = str(staged)
    elif options.working_dir.is_dir():
        environment["working_dir"] = str(options.working_dir)
        modules = environment.get("py_modules") or []
        environment["py_modules"] = [*modules, str(staged / "selfkd")]
    else:
        raise ConfigError(f"--working-dir must be a folder, got {options.working_dir}")
    if options.env:
        named = {name: os.environ[name] for name in options.env}
        environment["env_vars"] = {**(environment.get("env_vars") or {}), **named}
        _say(
            f"note: the values of {', '.join(options.env)} become part of the job's runtime "
            "environment, which anyone with the cluster's token can read (ray job list)"
        )
    return environment


class _Log:
    """Prints a job's log, and keeps what is needed of it."""

    def __init__(self) -> None:
        self.run_folder: str | None = None
        self.no_module = False
        self._line = ""

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if found := RUN_FOLDER.match(line):
                self.run_folder = found[1].strip()
            self.no_module |= line.startswith("ModuleNotFoundError:") or "No module named" in line


def _resume(
    given: Sequence[str],
    command: Sequence[str],
    arguments: argparse.Namespace,
    run_folder: str | None,
) -> str:
    """Return how to continue a job that was stopped, in words."""
    run = run_folder or arguments.resume
    if run is None:
        return " before its run had begun"
    kept = list(given)
    for place, word in enumerate(kept):  # the name of a job can be used once
        if word == "--name" or word.startswith("--name="):
            del kept[place : place + (1 if "=" in word else 2)]
            break
    words = ["python", "-m", "selfkd.submit", *kept, "--", command[0], "--resume", run]
    words += ["--train", arguments.train] if getattr(arguments, "train", None) else []
    return f"; continue with:\n  {shlex.join(words)}"


def _code(end: End, job: str, log: _Log) -> int:
    """Return the exit code of a job that has ended by itself, and print why it failed."""
    if end.status == "SUCCEEDED":
        return 0
    if end.code is None:
        _say(f"{job} could not be run: {end.message.strip()[-2000:]}")
        return FAILED
    code = end.code if end.code >= 0 else 128 - end.code
    _say(f"{job} failed with exit code {code}")
    if code == NOT_FOUND or log.no_module:
        _say(
            "the job's python is the one on the PATH of the head's Ray: where that is not the one "
            "with Ray, torch and timm, name it with --python PATH, or add packages by --runtime-env"
        )
    return code


def _say(text: str) -> None:
    print_error(text, kind="submit")


if __name__ == "__main__":
    raise SystemExit(main())
