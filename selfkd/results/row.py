"""What all rows of a run folder share: plain data, metrics by name, the format of the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

FORMAT = 1
"""Raised whenever a key of a run folder's files changes its meaning or its default."""
CHECKPOINT = "checkpoint.pt"
"""File in the folder of a trial that is not done."""
STUDENT = "student.safetensors"
"""File of a trained model in the folder of its trial."""
OWN = ("epoch", "seconds", "hash", "checkpoint", "note")
"""Keys of what a training reports that are no metrics."""

Row = dict[str, Any]
"""Plain data on its way between processes."""
T = TypeVar("T")
Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
"""Number that may be missing, such as the accuracy of a class without items: NaN, or null in JSON,
which knows no NaN."""


@plain_dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval; none where there is no telling."""

    value: Number
    low: float | None = None
    high: float | None = None

    def reversed(self) -> Interval:
        """Return the interval of the difference the other way round."""
        low, high = self.low, self.high
        return Interval(-self.value, None if high is None else -high, None if low is None else -low)


ROW = ConfigDict(extra="ignore", defer_build=True)


def to_row(value: object) -> Row:
    """Return a dataclass of this module as plain data."""
    kind: Any = type(value)
    row: Row = _adapter(kind).dump_python(value)
    return row


def from_row(kind: type[T], row: object) -> T:
    """Return plain data as a dataclass of this module.

    Raises:
        ValueError: A field is missing or of another type; says which.
    """
    try:
        of: Any = kind
        found: T = _adapter(of).validate_python(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where or 'all of it'}: {reason}") from None
    return found


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@dataclass(frozen=True, kw_only=True, config=ROW)
class Measured:
    """Anything with metrics by name: those named like another key stand in a mapping `metrics`."""

    metrics: dict[str, Number] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        known = cls._keys()
        metrics = {
            name: value
            for name, value in row.items()
            if name not in known
            and (value is None or isinstance(value, int | float))
            and not isinstance(value, bool)
        }
        own = {k: v for k, v in row.items() if k in known and k != "format"}
        named = own.pop("metrics", {})
        return {**own, "metrics": {**metrics, **named} if isinstance(named, Mapping) else named}

    @model_serializer(mode="wrap")
    def _spread(self, handler: SerializerFunctionWrapHandler) -> Row:
        row: Row = handler(self)
        metrics: Row = row.pop("metrics")
        known = self._keys()
        named = {name: value for name, value in metrics.items() if name in known}
        row = {name: value for name, value in row.items() if value is not None}
        row |= {name: value for name, value in metrics.items() if name not in known}
        return row | ({"metrics": named} if named else {})

    @classmethod
    def _keys(cls) -> set[str]:
        return {"format", *(field.name for field in fields(cls))}

    def metric(self, name: str) -> float | None:
        """Return a metric by its name; None where it was not measured."""
        return self.metrics.get(name)
