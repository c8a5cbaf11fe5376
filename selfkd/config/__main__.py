"""`python -m selfkd.config`: the resolved config, with the meaning of each key above it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from selfkd.cli.options import USAGE, config_flags, config_parser
from selfkd.cli.output import print_data, print_error, safe_output
from selfkd.config.load import load_config
from selfkd.config.reference import commented_yaml, json_schema
from selfkd.errors import ConfigError


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = config_parser(
        "config", "Print the resolved config as YAML, with the meaning of each key above it."
    )
    parser.add_argument(
        "--rounds", metavar="N|auto", help="born-again generations after generation 0"
    )
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of a config file"
    )
    return parser


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    if arguments.schema:
        return print_data(json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n")
    flags = config_flags(arguments)
    if arguments.rounds is not None:
        digits = arguments.rounds.isdecimal()
        flags["rounds"] = int(arguments.rounds) if digits else arguments.rounds
    try:
        config = load_config(arguments.config, settings=arguments.settings, flags=flags)
    except ConfigError as error:
        print_error(str(error))
        return USAGE
    return print_data(commented_yaml(config))


if __name__ == "__main__":
    raise SystemExit(main())
