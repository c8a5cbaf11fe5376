"""The run folder: a ledger of what is done."""

from __future__ import annotations

import secrets
from pathlib import Path

from selfkd.config import RESUMABLE, Config, differences, dump_config, from_tree, parse_yaml
from selfkd.errors import ConfigError
from selfkd.results import Row
from selfkd.storage.files import cache_folder, link, load_json, save_json, save_text
from selfkd.storage.remote import RemotePath, as_path


class RunFolder:
    """The ledger of a run: what is in it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @classmethod
    def create(cls, path: Path, config: Config, *, command: str = "generations") -> RunFolder:
        """Start a new run folder, of one of the commands.

        Raises:
            ConfigError: it exists already, or cannot be written.
        """
        if path.exists() and not _never_began(path):
            raise ConfigError(
                f"run folder {path} exists already: continue it with --resume {path}, "
                "or choose another --name"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            save_text(path / "run_id", f"{path.name}-{secrets.token_hex(4)}", patience=0)
            save_text(path / "command", command, patience=0)
            save_text(path / "config.yaml", dump_config(config), patience=0)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"run folder {path} must be writable: {reason}") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, Config]:
        """Open a run folder to continue it.

        Raises:
            ConfigError: it is no run folder.
        """
        config = path / "config.yaml"
        if not config.is_file():
            raise ConfigError(f"--resume must be a run folder (with a config.yaml), got {path}")
        return cls(path), from_tree(parse_yaml(config.read_text(), str(config)))

    def check_command(self, command: str) -> None:
        """Check that a run is continued by the command that it was started by.

        Raises:
            ConfigError: it was another.
        """
        started_by = (self.path / "command").read_text()
        if started_by != command:
            raise ConfigError(
                f"{self.path} was started by selfkd.{started_by}: continue it with "
                f"python -m selfkd.{started_by} --resume {self.path}"
            )

    def check_change(self, old: Config, new: Config) -> None:
        """Check that a changed config is no other experiment.

        Raises:
            ConfigError: with what differs.
        """
        refused = [line for line in differences(old, new) if not line.startswith(RESUMABLE)]
        if refused:
            raise ConfigError(
                f"{self.path} was started with another config, so it cannot be resumed with this "
                "one; start a new run, or leave out:\n  " + "\n  ".join(refused)
            )
        done = len(self.results())
        if new.most_rounds + 1 < done:
            raise ConfigError(f"rounds must be at least the {done - 1} done, got {new.most_rounds}")

    def keep(self, config: Config, data: Row) -> None:
        """Write down the config of this start and the facts of the data.

        Raises:
            ConfigError: the run was started on other data.
        """
        path = self.path / "data.json"
        known = load_json(path) if path.exists() else data
        changed = [  # facts that an older run did not write down are no change
            f"{key}: {known[key]} -> {data.get(key)}"
            for key in known
            if known[key] != data.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{self.path} was started on other data, so it cannot be resumed on this:\n  "
                + "\n  ".join(changed)
            )
        save_json(path, data)
        save_text(self.path / "config.yaml", dump_config(config))

    @property
    def run_id(self) -> str:
        """The name of this run among all runs of that name, made when it began."""
        return (self.path / "run_id").read_text()

    @property
    def local(self) -> Path:
        """A folder of this machine: the run folder itself where it is one."""
        if not isinstance(self.path, RemotePath):
            return self.path
        return cache_folder() / "runs" / self.run_id

    def bring(self, name: str) -> None:
        """Put into remote storage what was written to the local folder of that name."""
        if self.local != self.path:
            for file in (self.local / name).rglob("*"):
                if file.is_file() and not file.is_symlink():
                    link(file, self.path / file.relative_to(self.local))

    def targets(self, config: Config) -> Path:
        """Return where the soft targets lie."""
        root = config.targets.root
        return self.path / "targets" if root is None else as_path(root).expanduser().absolute()

    def generation(self, generation: int) -> Path:
        """Return the folder of a generation."""
        return self.path / f"generation_{generation:03d}"

    def results(self) -> list[Row]:
        """Return the results of the finished generations, in order."""
        results: list[Row] = []
        while (path := self.generation(len(results)) / "result.json").exists():
            results.append(load_json(path))
        return results

    def relative(self, path: Path) -> str:
        """Return a path as the ledger keeps it, so that a run folder can be moved."""
        return str(path.relative_to(self.path))


def _never_began(path: Path) -> bool:
    """Whether a folder is what a start leaves that is killed before its config is written."""
    return path.is_dir() and all(
        file.name in ("run_id", "command") or file.name.startswith(".") for file in path.iterdir()
    )
