"""Causal language models of text."""

import importlib.util

from selfkd.errors import ConfigError

NEEDED = ("transformers", "tokenizers")


def check_installed() -> None:
    """Check that what language models take is installed.

    Raises:
        ConfigError: A package is missing; says how to install it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"task text needs {' and '.join(missing)}: pip install 'selfkd[text]'")
