"""The errors that selfkd raises on purpose, and the text of any other."""

LONGEST = 2000  # characters of an error's text, which rows, messages and W&B repeat


class ConfigError(ValueError):
    """A user's mistake: every fault on a line of its own, with its source, key and value."""


class LockedError(ConfigError):
    """Another driver works in the run folder."""


class RunError(RuntimeError):
    """A run cannot go on: says why, and what to do."""


class RayLostError(RunError):
    """Ray has died, or did not start: nothing can be trained any more."""


class NonFiniteLossError(ArithmeticError):
    """Training diverged; says at which epoch and step."""


class DeviceMemoryError(RuntimeError):
    """The memory of a GPU does not do for a job; says what it was taken by."""


def describe_error(error: BaseException) -> str:
    """Return the type and text of an error that some code has raised; a long text is cut.

    >>> describe_error(ValueError("too wide")), describe_error(KeyboardInterrupt())
    ('ValueError: too wide', 'KeyboardInterrupt')
    """
    try:
        text = str(error).strip()
    except Exception:  # noqa: BLE001 - a class of the user's may have no text at all
        text = ""
    return cut_text(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def cut_text(text: str, most: int = LONGEST) -> str:
    """Return a text that can be written anywhere: head and tail of a long one.

    >>> cut_text("a" * 30 + "b" * 30, 20)
    'aaaaaaaaaa … 40 characters … bbbbbbbbbb'
    """
    text = text.encode(errors="backslashreplace").decode()  # lone surrogates cannot be printed
    left_out = len(text) - most
    if left_out <= 0:
        return text
    half = most // 2
    return f"{text[:half]} … {left_out:,} characters … {text[-half:]}"
