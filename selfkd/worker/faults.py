"""Jobs that say what is wrong with what they were given, rather than fail."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from selfkd.deployment import check_installed
from selfkd.errors import ConfigError
from selfkd.results import Row
from selfkd.training.device import ran_out

Job = Callable[..., Iterator[Row]]


def saying_faults(job: Job) -> Job:
    """Return a job that yields a user's mistake as `fault` rather than fail."""

    @wraps(job)
    def run(*arguments: Any, **options: Any) -> Iterator[Row]:
        try:
            check_installed()
        except ConfigError as error:  # on another machine than that of the command
            yield {"fault": f"{error} (on {platform.node()})"}
            return
        try:
            yield from job(*arguments, **options)
        except (ValueError, TypeError, FileNotFoundError) as error:
            if ran_out(error):
                raise
            yield {"fault": str(error)}

    return run
