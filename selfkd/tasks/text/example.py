"""A prompt and what is to follow it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A prompt and what is to follow it.

    >>> example = Example("1 + 2 =", " 3")
    >>> str(example), example.is_right(" 1, 3"), example.is_right(" 13")
    ('1 + 2 = 3', True, False)
    """

    prompt: str
    completion: str
    rationale: str = ""
    """Text between the two, such as the steps of a calculation."""
    place: str = field(default="", compare=False)
    """File and line that it stands in, for messages."""

    def __str__(self) -> str:
        return self.prompt + self.rationale + self.completion

    def is_right(self, written: str) -> bool:
        """Say whether a text that follows the prompt ends in the completion, as a word."""
        wanted, found = self.completion.strip(), written.strip()
        before = found[: len(found) - len(wanted)]
        return found.endswith(wanted) and not before[-1:].isalnum()
