"""The errors that selfkd raises on purpose."""


class ConfigError(ValueError):
    """A user's mistake: every fault on a line of its own, with its source, key and value."""


class LockedError(ConfigError):
    """Another driver works in the run folder."""


class RunError(RuntimeError):
    """A run cannot go on: says why, and what to do."""


class NonFiniteLossError(ArithmeticError):
    """Training diverged; says at which epoch and step."""
