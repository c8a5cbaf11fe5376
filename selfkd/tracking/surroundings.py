"""What W&B reads of its surroundings: variables, files of settings, and folders of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from selfkd.errors import ConfigError
from selfkd.storage.remote import without_secrets
from selfkd.text import one_line
from selfkd.tracking.temporary import import_wandb

KEPT = (
    *("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CREDENTIALS_FILE"),
    *("WANDB_BASE_URL", "WANDB_APP_URL", "WANDB_ENTITY", "WANDB_ORGANIZATION"),
    *("WANDB_USERNAME", "WANDB_USER_EMAIL", "WANDB_HOST", "WANDB_INSECURE_DISABLE_SSL"),
    *("WANDB_HTTP_PROXY", "WANDB_HTTPS_PROXY", "WANDB_X_EXTRA_HTTP_HEADERS"),
    *("WANDB_FILE_PUSHER_TIMEOUT", "WANDB_ERROR_REPORTING"),
    *("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_CORE_DEBUG"),
)
"""Variables that speak of an account, its host and this machine.

All others speak of one run, such as that of a sweep's agent, of which a command has many with names
and settings of their own.
"""
_NAMING = (
    *("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_DISABLED"),
    *("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_ID"),
)
"""Variables by which runs are wanted in W&B, or wanted not to be."""
_OWN = {"WANDB_SILENT": "true", "WANDB_SAGEMAKER_DISABLE": "true"}
MODES: dict[str, Literal["online", "offline", "none"]] = {
    **{"online": "online", "run": "online", "shared": "online"},
    **{"offline": "offline", "dryrun": "offline", "disabled": "none"},
}
"""Modes of W&B, with what they are here."""
_OF_A_RUN = (
    *("sweep_id", "sweep_param_path", "launch", "launch_config_path", "run_id", "run_name"),
    *("run_group", "run_job_type", "run_tags", "run_notes", "resume", "resume_from", "fork_from"),
)
LONGEST, NOT_IN_NAMES = 128, "/\\#?%:"
"""What W&B takes as the name of a project."""


@contextmanager
def own_surroundings() -> Iterator[None]:
    """Hide the variables of another run from W&B; a user's own function finds them afterwards."""
    given = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    hidden = {name: value for name, value in given.items() if name not in KEPT or not value}
    own = dict(_OWN)
    if (usual := os.environ.get("TMPDIR")) and not _writable(Path(usual), make=False):
        hidden["TMPDIR"], own["TMPDIR"] = usual, tempfile.gettempdir()  # which looks elsewhere
    for name in hidden:
        del os.environ[name]
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
        for name, value in hidden.items():
            os.environ.setdefault(name, value)  # W&B sets the address of its own process


@contextmanager
def of_no_other_run() -> Iterator[None]:
    """Hide from W&B what it has read of another run in this process, such as a sweep's function."""
    from wandb.sdk import wandb_setup

    found = wandb_setup.singleton().settings
    usual = {name: type(found).model_fields[name].default for name in _OF_A_RUN}
    before = {name: getattr(found, name) for name in _OF_A_RUN}
    given = {name: value for name, value in before.items() if value != usual[name]}
    for name in given:
        setattr(found, name, usual[name])
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(found, name, value)


def clean_environment() -> dict[str, str]:
    """Return the environment of a command of W&B's, without the variables of another run."""
    with own_surroundings():
        return dict(os.environ)


def is_named() -> bool:
    """Return whether a variable says that runs are wanted in W&B, or not."""
    return any(map(os.environ.get, _NAMING))


def is_set_up() -> bool:
    """Return whether W&B may have been set up here, by a variable, a login or its own command."""
    return is_named() or any(map(os.path.isfile, (keys_file(), _settings_file(), "wandb/settings")))


def keys_file() -> str:
    """Return the file that `wandb login` writes a key to, where W&B looks for it."""
    if given := os.environ.get("NETRC"):
        return os.path.expanduser(given)
    usual, other = map(os.path.expanduser, ("~/.netrc", "~/_netrc"))
    return other if os.path.exists(other) and not os.path.exists(usual) else usual


def _settings_file() -> str:
    """Return the file that W&B's commands write, such as `wandb offline`."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    return os.path.expanduser(f"{folder}/settings")


def settings() -> Any:
    """Return W&B's settings as they are now: its defaults, its files, and variables.

    Raises:
        ConfigError: W&B refuses one of them, or cannot be imported.
    """
    try:
        import_wandb()
        import wandb
    except Exception as error:  # of a damaged installation
        raise ConfigError(
            f"tracking.mode must be none where W&B cannot be imported ({one_line(str(error))}): "
            "pip install --force-reinstall wandb"
        ) from error
    found = wandb.Settings()
    file = _settings_file()
    with own_surroundings():
        try:
            found.settings_system = file
            found.update_from_system_settings()
            found.update_from_env_vars(dict(os.environ))
        except (ValueError, wandb.errors.UsageError) as error:
            raise ConfigError(_describe(error)) from None
    return found


def _describe(error: Exception) -> str:
    """Return in one line which of W&B's settings is wrong; no key or password is repeated."""
    faults: list[Any] = getattr(error, "errors", list)()  # of pydantic
    if not faults or not faults[0]["loc"]:
        return (
            f"W&B refuses its settings (variables that begin with WANDB_): {one_line(str(error))}"
        )
    fault, name = faults[0], f"WANDB_{faults[0]['loc'][0]}".upper()
    reason = fault["msg"].removeprefix("Value error, ")
    got = f", got {fault['input']}" if name.endswith(("_URL", "_PROXY")) else ""
    return one_line(f"{name} must be as W&B takes it: {reason}{without_secrets(got)}")


def wanted_mode() -> Literal["online", "offline", "none"] | None:
    """Return the mode that W&B is set to here, by a variable or a command of W&B; None if by none.

    Raises:
        ConfigError: W&B has no such mode.
    """
    if given := os.environ.get("WANDB_MODE"):
        if given not in MODES:
            raise ConfigError(
                f"WANDB_MODE must be one of {', '.join(MODES)}, got {given}: "
                "set it to one, or unset it"
            )
        return MODES[given]
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "none"
    mode = MODES[settings().mode]  # of `wandb offline`, `wandb disabled`
    return None if mode == "online" else mode


def split_project(
    project: str,
    entity: str | None,
    *,
    named: tuple[str, str] = ("tracking.project", "tracking.entity"),
) -> tuple[str | None, str]:
    """Return the owner and the name of a project, which may be written `OWNER/PROJECT`.

    Args:
        project: Project, with its owner or without.
        entity: Owner that is given apart.
        named: Names of both, for messages.

    Raises:
        ConfigError: W&B has no such names.

    >>> split_project("team/selfkd", None), split_project("selfkd", "team")
    (('team', 'selfkd'), ('team', 'selfkd'))
    """
    owner, slash, name = project.rpartition("/")
    if slash and owner and entity not in (None, owner):
        raise ConfigError(f"{named[0]} must be of {named[1]}, got {project} and {entity}: give one")
    faults = []
    if not _fits(name) or (slash and not _fits(owner)):
        faults.append(
            f"{named[0]} must be PROJECT or OWNER/PROJECT, each of 1 to {LONGEST} characters "
            f"and none of {NOT_IN_NAMES}, got {project}"
        )
    owners = {named[1]: entity}
    if entity is None and not slash:
        owners = {"WANDB_ENTITY": os.environ.get("WANDB_ENTITY") or None}
    for key, value in owners.items():
        if value is not None and not _fits(value):
            faults.append(
                f"{key} must be a user or team, with 1 to {LONGEST} characters and none of "
                f"{NOT_IN_NAMES}, got {value}"
            )
    if faults:
        raise ConfigError("\n".join(faults))
    return (owner or entity), name


def _fits(name: str) -> bool:
    return bool(name.strip()) and len(name) <= LONGEST and not set(name) & set(NOT_IN_NAMES)


def own_folders(folder: Path) -> dict[str, str]:
    """Return variables for W&B's own folders, where the usual ones cannot be written to.

    An artifact would fail, and W&B's process would print its log.

    Args:
        folder: Folder to have them in instead.
    """
    from wandb import env

    homeless = not os.environ.get("HOME")  # W&B's process does not look elsewhere for it
    return {
        name: str(folder / name.lower())
        for name, find in (
            ("WANDB_CACHE_DIR", env.get_cache_dir),
            ("WANDB_DATA_DIR", env.get_data_dir),
        )
        if (homeless and name not in os.environ) or not _writable(Path(find()))
    }


def _writable(folder: Path, *, make: bool = True) -> bool:
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
    except OSError:
        return False
    return True
