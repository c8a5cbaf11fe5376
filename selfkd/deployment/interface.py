"""What an exported network takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LEAST_CALIBRATION = 32
"""Smallest number of images that the ranges of activations are measured on."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Names and axes of the input and the output of an exported network."""

    input: str
    """Name of the input, such as images or tokens."""
    output: str = "logits"
    """Name of the output."""
    axes: Mapping[int, str] = field(default_factory=lambda: {0: "batch"})
    """Names of the axes of the input that may have any size."""
    longest: Mapping[str, int] = field(default_factory=dict)
    """Largest sizes of these axes, where they have one."""
    timed: tuple[int, ...] = (1, 128)
    """Numbers of inputs whose prediction is timed."""
