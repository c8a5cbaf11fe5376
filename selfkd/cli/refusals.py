"""Names in a command that other processes could not read: relative ones, and those not in UTF-8."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from selfkd.cli.signals import inside_job
from selfkd.config import Config
from selfkd.config.paths import relative_paths
from selfkd.errors import ConfigError


def refuse_relative(config: Config | None, *named: tuple[str, str | None]) -> None:
    """Refuse relative paths in a Ray job, whose working folder is not that of its workers.

    Args:
        config: Config of the run, whose paths are looked at.
        named: Further paths, by name.

    Raises:
        ConfigError: One of them is relative.
    """
    surroundings = ("SELFKD_DATA", os.environ.get("SELFKD_DATA"))
    faults = relative_paths(config, surroundings, *named) if inside_job() else []
    if faults:
        raise ConfigError("\n".join(faults))


def refuse_other_encodings(named: Mapping[str, object]) -> None:
    """Refuse names that are no UTF-8, which neither Ray nor W&B has a way to pass on.

    Args:
        named: Values of a command, by name; the working folder is looked at as well.

    Raises:
        ConfigError: One of them is not, or the working folder is gone.
    """
    try:
        working = os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the working folder must be there, got one that was removed ({error.strerror}): "
            "go to another with cd"
        ) from None
    for name, value in {"the working folder": working, **named}.items():
        if any(0xD800 <= ord(character) < 0xE000 for character in str(value)):
            raise ConfigError(f"{name} must be UTF-8, got {value}{_of_another_locale(value)}")


def _of_another_locale(value: object) -> str:
    """Return the way out where a text is UTF-8, and the locale of this process is not."""
    try:
        os.fsencode(str(value)).decode("utf-8")
    except UnicodeError:
        return ""
    return f", by a locale of {sys.getfilesystemencoding()}: set PYTHONUTF8=1"
