"""The run folder: what is done, and where everything lies."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path
from typing import TypeVar

from selfkd import __version__
from selfkd.config import (
    LARGEST,
    RESUMABLE,
    Config,
    config_hash,
    differences,
    dump_config,
    from_tree,
    load_yaml,
)
from selfkd.config.schema import leaves
from selfkd.config.speed import SPEED_KEYS
from selfkd.errors import ConfigError
from selfkd.results import FORMAT, STUDENT, Facts, GenerationResult
from selfkd.storage.files import (
    cache_folder,
    inside,
    link,
    odd_entries,
    read_text,
    remove_file,
    save_text,
    temporaries,
)
from selfkd.storage.remote import RemotePath, as_path
from selfkd.storage.rows import load_row, save_row

COMMANDS = ("generations", "ensemble", "capacity", "study", "deploy")
"""Names of the commands that make run folders."""
HASH = "config.hash"  # of what may not change
BEST = "best.safetensors"
"""File of the model to take, in a finished run's folder."""
EXAMPLES = "examples.json"
"""File of the items that tell generation 0 and the best later one apart, in a run's folder."""
TEACHER = "teacher.json"
"""File of what the teacher's soft targets hold, in a run's folder."""
T = TypeVar("T")
_SETTLE_SECONDS = 0.2


class RunFolder:
    """A run's folder: what is in it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @classmethod
    def create(
        cls, path: Path, config: Config, *, command: str = "generations", numbered: bool = False
    ) -> RunFolder:
        """Start a new run folder, of one of the commands.

        Args:
            path: Folder to create.
            config: Config of the run.
            command: Command that the run is of.
            numbered: Whether the folder gets a number, -2, -3, … where there is one of its name.

        Raises:
            ConfigError: It exists already, or cannot be written.
        """
        if (length := len(dump_config(config))) > LARGEST:
            raise ConfigError(f"a config must have at most {LARGEST:,} characters, got {length:,}")
        left = not numbered and cls.check_new(path)
        token, name, number = secrets.token_hex(4), path.name, 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not _claim(path, f"{path.name}-{token}", left=left):
                if not numbered:
                    raise ConfigError(f"run folder {path} was created by another start just now")
                number += 1
                path = path.with_name(f"{name}-{number}")
            folder = cls(path)
            save_text(path / "run_id", f"{path.name}-{token}", patience=0)
            save_text(path / "command", command, patience=0)
            folder.save_config(config, patience=0)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"run folder {path} must be writable: {reason}; --set storage=FOLDER names another"
            ) from None
        return folder

    @staticmethod
    def check_new(path: Path) -> bool:
        """Return whether a start has left a folder there in which no run began.

        Raises:
            ConfigError: A run is there.
        """
        left = path.exists()
        if left and not _never_began(path):
            raise ConfigError(
                f"run folder {path} exists already: continue it with --resume {path}, "
                "or choose another --name"
            )
        return left

    @classmethod
    def open(
        cls, path: Path, *, flag: str = "--resume", of_file: str = ""
    ) -> tuple[RunFolder, Config]:
        """Open a run folder, to continue it or to read it.

        Args:
            path: Run folder.
            flag: Flag that names it, for messages.
            of_file: Way out in messages where it is a file.

        Raises:
            ConfigError: It is no run folder, or one of another format.
        """
        file = path / "config.yaml"
        if not file.is_file():
            hint = f": {of_file}" if of_file and path.is_file() else ""
            raise ConfigError(f"{flag} must be a run folder (with a config.yaml), got {path}{hint}")
        tree = load_yaml(file)
        found = tree.pop("format", None) if isinstance(tree, dict) else None
        if found != FORMAT:
            raise ConfigError(
                f"{path} is of format {found}, and selfkd {__version__} continues format {FORMAT}: "
                "continue it with the version that began it, or start a new run"
            )
        train = tree.setdefault("train", {})
        if isinstance(train, dict):  # of a version without these keys, which trained as with false
            tree["train"] = dict.fromkeys(SPEED_KEYS, False) | train
        return cls(path), from_tree(tree, dict.fromkeys(tree, str(file)))

    def exists(self) -> bool:
        """Return whether the folder is there, and still that of a run."""
        try:
            return (self.path / "config.yaml").exists()
        except OSError:  # the storage may be back when it is looked for
            return True

    def save_config(self, config: Config, *, patience: float | None = None) -> None:
        """Write config.yaml, and the hash of what may not change in it.

        Between the two writes the file of the hash has both, the one before and the one after, so
        that a run that is killed there goes on.
        """
        hashed, known = config_hash(config), self._hashes()
        both = list(dict.fromkeys([*known, hashed]))
        if both != known:
            save_text(self.path / HASH, "\n".join(both), patience=patience)
        text = f"format: {FORMAT}\n{dump_config(config)}"
        save_text(self.path / "config.yaml", text, patience=patience)
        if both != [hashed]:
            save_text(self.path / HASH, hashed, patience=patience)

    def _hashes(self) -> list[str]:
        return self._text(HASH).split() if (self.path / HASH).exists() else []

    def check_command(self, command: str) -> None:
        """Check that a run is continued by the command that it was started by.

        Raises:
            ConfigError: It was another.
        """
        started_by = self.command
        if started_by != command:
            raise ConfigError(
                f"{self.path} was started by selfkd.{started_by}: continue it with "
                f"python -m selfkd.{started_by} --resume {self.path}"
            )

    def check_entries(self) -> None:
        """Check that what is written to the folder stays in it, and that no file is waited for.

        Raises:
            ConfigError: A symlink leads out of it, or there is a pipe or device.
        """
        if isinstance(self.path, RemotePath):
            return
        for path, what in odd_entries(self.path):
            parts = path.relative_to(self.path).parts
            if not (parts[0] == "wandb" and len(parts) > 2 and path.is_file()):  # W&B's own logs
                raise ConfigError(
                    f"{path} must be a file or folder of the run folder, and is {what}: put one "
                    "there (the cached teacher logits go to another disk by targets.root)"
                )

    def check_change(self, old: Config, new: Config, *, free: tuple[str, ...] = ()) -> None:
        """Check that a changed config is no other experiment.

        Args:
            old: Config of the run.
            new: Config that it is continued with.
            free: Beginnings of further keys that may change.

        Raises:
            ConfigError: It is; says what differs.
        """
        known = {key for key, _ in leaves(load_yaml(self.path / "config.yaml"), "")}
        if not {config_hash(old), config_hash(old, of=known)} & set(self._hashes()):
            raise ConfigError(
                f"{self.path / 'config.yaml'} was edited where a run may not change (its hash is "
                f"not that of {HASH}): put it back, or start a new run with --config"
            )
        refused = [
            line for line in differences(old, new) if not line.startswith((*RESUMABLE, *free))
        ]
        if refused:
            raise ConfigError(
                f"{self.path} was started with another config, so it cannot be resumed with this "
                "one; start a new run, or leave out:\n  " + "\n  ".join(refused)
            )
        if bool(old.confirm.lineages) != bool(new.confirm.lineages):
            raise ConfigError(
                f"confirm.lineages must be given from the start of a run or not at all: it is "
                f"{old.confirm.lineages} in {self.path}, got {new.confirm.lineages}"
            )
        if new.confirm.replicas < old.confirm.replicas:
            name = "lineages" if old.confirm.lineages else "seeds"
            raise ConfigError(
                f"confirm.{name} must be at least the {old.confirm.replicas} of the run, "
                f"got {new.confirm.replicas}"
            )
        if old.confirm.baseline and not new.confirm.baseline:
            raise ConfigError(
                f"confirm.baseline must stay true as in {self.path}, which has or makes one, got "
                "false"
            )
        done = len(self.results())
        if new.most_rounds + 1 < done:
            raise ConfigError(f"rounds must be at least the {done - 1} done, got {new.most_rounds}")

    def keep(self, config: Config, facts: Facts) -> None:
        """Write down the config of this start and the facts of the data.

        Raises:
            ConfigError: The run was started on other data.
        """
        self.keep_facts("data.json", facts)
        self.save_config(config)

    def keep_facts(self, name: str, facts: Facts, *, where: str = "") -> None:
        """Write down facts of data and networks.

        Args:
            name: File of the run folder.
            facts: Facts of this start.
            where: Setting that they are of, for the message.

        Raises:
            ConfigError: The facts of an earlier start are others.
        """
        path = self.path / name
        known = load_row(Facts, path) if path.exists() else facts
        changed = [
            f"{key}: {value} -> {getattr(facts, key)}"
            for key, value in vars(known).items()
            if value != getattr(facts, key, value)
        ]
        if changed:
            raise ConfigError(
                f"{where}{self.path} was started on other data, so it cannot be resumed on this:"
                "\n  " + "\n  ".join(changed)
            )
        save_row(path, facts)

    @property
    def facts(self) -> Facts:
        """What is known of the data."""
        return load_row(Facts, self.path / "data.json")

    @property
    def run_id(self) -> str:
        """Name of this run among all runs of that name, made when it began."""
        found = self._text("run_id")
        if not re.fullmatch(r"\w[\w.-]{0,299}", found):
            raise ValueError(f"{self.path / 'run_id'} is damaged: it must be one word")
        return found

    @property
    def command(self) -> str:
        """Name of the command that started the run."""
        found = self._text("command")
        if found not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise ConfigError(f"{self.path / 'command'} must be one of {known}, got {found[:20]!r}")
        return found

    def _text(self, name: str) -> str:
        return read_text(self.path / name).strip()

    def keep_best(self, checkpoint: str) -> None:
        """Make a model the one that is taken from the run: a link to it, or a copy."""
        source = self.file(checkpoint)
        if source.exists():
            link(source, self.path / BEST)

    def file(self, name: str) -> Path:
        """Return a file by the name that a row of this folder has for it.

        Raises:
            ValueError: It is outside the folder.
        """
        return inside(self.path, name)

    @property
    def local(self) -> Path:
        """A folder of this machine: the run folder itself where it is one."""
        if not isinstance(self.path, RemotePath):
            return self.path
        return cache_folder() / "runs" / self.run_id

    def upload(self, name: str) -> None:
        """Put into remote storage what was written to the local folder of that name."""
        if self.local != self.path:
            for file in (self.local / name).rglob("*"):
                if file.is_file() and not file.is_symlink():
                    link(file, self.path / file.relative_to(self.local))

    def targets(self, config: Config) -> Path:
        """Return the folder of what teachers leave to students: cached logits, or text."""
        root, traces = config.targets.root, config.distill.mode == "traces"
        if root is None:
            return self.path / ("written" if traces else "targets")
        found = as_path(root).expanduser().absolute()
        return found / "written" if traces else found

    def generation(self, generation: int) -> Path:
        """Return the folder of a generation."""
        return self.path / f"generation_{generation:03d}"

    def results(self) -> list[GenerationResult]:
        """Return the results of the finished generations, in order."""
        results: list[GenerationResult] = []
        while (path := self.generation(len(results)) / "result.json").exists():
            results.append(load_row(GenerationResult, path))
        return results

    def summary(self, kind: type[T]) -> T | None:
        """Return the summary of a finished run; None where there is none."""
        path = self.path / "summary.json"
        return load_row(kind, path) if path.exists() else None

    def sweep(self) -> None:
        """Remove temporary files that killed writers have left; nobody writes any more."""
        if not isinstance(self.path, RemotePath):
            for path in list(temporaries(self.path)):
                remove_file(path)

    def relative(self, path: Path) -> str:
        """Return a path as rows keep it, so that a run folder can be moved."""
        return str(path.relative_to(self.path))


def trial_folder(stage: Path, number: int) -> Path:
    """Return the folder of a trial."""
    return stage / f"trial_{number:03d}"


def student_file(stage: Path, number: int) -> Path:
    """Return the file of a trial's student."""
    return trial_folder(stage, number) / STUDENT


def _claim(path: Path, run_id: str, *, left: bool) -> bool:
    """Create a folder; return whether it is this process's own, and not another's as well."""
    if not isinstance(path, RemotePath):
        try:
            path.mkdir(exist_ok=left)
        except FileExistsError:
            return False
        return True
    if not left and path.exists():
        return False
    save_text(path / "run_id", run_id, patience=0)
    time.sleep(_SETTLE_SECONDS)  # of several that write at the same moment the last one stands
    return (path / "run_id").read_text(encoding="utf-8") == run_id


def _never_began(path: Path) -> bool:
    """Whether a folder is what a start leaves that is killed before its config is written."""
    return path.is_dir() and all(
        file.name in ("run_id", "command", HASH) or file.name.startswith(".")
        for file in path.iterdir()
    )
