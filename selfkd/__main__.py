"""`selfkd <command>`: the same as `python -m selfkd.<command>`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from selfkd import __version__
from selfkd.cli.output import safe_output

COMMANDS = (
    *("budget", "capacity", "config", "dashboard", "deploy", "ensemble", "generations"),
    *("report", "response", "study", "submit", "targets"),
)


@safe_output()
def main() -> int:
    """Run a sub-command; return its exit code."""
    if sys.argv[1:2] == ["--version"]:
        print(f"selfkd {__version__}")  # noqa: T201
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked_for_help = sys.argv[1:2] in (["-h"], ["--help"])
        usage = (
            f"usage: selfkd {{{','.join(COMMANDS)}}} …   (selfkd COMMAND --help, selfkd --version)"
        )
        print(usage, file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    code: int = command_module(sys.argv[1]).main(sys.argv[2:])
    return code


def command_module(name: str) -> ModuleType:
    """Return the module of a command, which has its `main` and `make_parser`."""
    return importlib.import_module(f"selfkd.{name}" + ".__main__" * (name == "config"))


if __name__ == "__main__":
    raise SystemExit(main())
