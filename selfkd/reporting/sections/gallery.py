"""The test images on which just one of two generations is right."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

from selfkd.reporting import words
from selfkd.reporting.read import Run
from selfkd.results import Example

PNG = b"\x89PNG\r\n\x1a\n"
MOST = 12


@dataclass(frozen=True)
class Picture:
    """A picture with what two models say of it."""

    data: str
    """PNG file in base64."""
    label: str
    predictions: tuple[str, str]
    """Class and confidence of each model."""


@dataclass(frozen=True)
class Gallery:
    """Pictures of both kinds."""

    text: str
    names: tuple[str, str]
    """Names of the models."""
    rows: tuple[tuple[str, tuple[Picture, ...]], ...]
    """Titles with their pictures."""
    alt: str = "Test image"
    """What a picture is of, for those who do not see it."""


def make_gallery(run: Run) -> Gallery | None:
    """Return the pictures that tell generation 0 and the best later one apart, if there are any."""
    found = run.examples
    if found is None:
        return None
    first, best = (f"generation {number}" for number in found.generations)
    right, wrong = found.counts
    rows = [
        (f"{best} right, {first} wrong", _pictures(run, found.gained)),
        (f"{first} right, {best} wrong", _pictures(run, found.lost)),
    ]
    kept = tuple((title, pictures) for title, pictures in rows if pictures)
    if not kept:
        return None
    text = (
        f"Of the test {run.data.unit}, {right} are predicted rightly by {best} alone and {wrong} "
        f"by {first} alone. Shown are those where the probability of the label changes most."
    )
    return Gallery(text, (first, best), kept)


def _pictures(run: Run, examples: Sequence[Example]) -> tuple[Picture, ...]:
    found = []
    for each in examples[:MOST]:
        data = encode_png(each.picture)
        if data is None:
            continue
        first, second = (
            f"{run.class_name(label)} ({words.number(confidence, '.0%')})"
            for label, confidence in zip(each.predicted, each.confidence, strict=True)
        )
        found.append(Picture(data, run.class_name(each.label), (first, second)))
    return tuple(found)


def encode_png(text: str) -> str | None:
    """Return a PNG file in base64, encoded anew; None of anything else."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return base64.b64encode(data).decode() if data.startswith(PNG) else None
