"""The reference of the config: keys with type, default and the text under each field, as data."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache, reduce
from itertools import pairwise
from operator import or_
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter

from selfkd.config.load import dump_yaml
from selfkd.config.schema import Config, ModelConfig
from selfkd.errors import ConfigError

WIDTH = 100
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_CONFIG = Config()
_NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_DISTRIBUTION = {
    "type": "object",
    "properties": {
        **dict.fromkeys(("uniform", "loguniform", "randint"), _NUMBERS),
        "choice": {"type": "array", "minItems": 1},
    },
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 1,
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the config."""

    name: str
    type: str
    default: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Section:
    """The keys of one dataclass of the schema."""

    name: str
    meaning: str
    keys: list[Key]


def config_sections(
    cls: type = Config, name: str = "top level", meaning: str = "", given: object = _CONFIG
) -> Iterator[Section]:
    """Yield the sections of the config, the top level first.

    Args:
        cls: Dataclass of the schema.
        name: Dotted key of the section.
        meaning: Text under the key.
        given: Default of the section, where there is one.
    """
    prefix = "" if cls is Config else f"{name}."
    texts = field_docstrings(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    keys: list[Key] = []
    inside: list[tuple[Any, str, str, object]] = []
    for field in dataclasses.fields(cls):
        dotted, hint, text = prefix + field.name, hints[field.name], texts.get(field.name, "")
        info = cls.__pydantic_fields__[field.name]  # type: ignore[attr-defined]
        value = None if info.is_required() else info.get_default(call_default_factory=True)
        value = getattr(given, field.name, value)
        if dataclasses.is_dataclass(hint):
            inside.append((hint, dotted, text, value))
            continue
        default = "required" if info.is_required() else f"`{json.dumps(value)}`"
        keys.append(Key(dotted, describe_type(hint, info.metadata), default, text))
        of = get_origin(hint)
        each = ".NAME" if of is dict else ".each" if of is list else ""
        inside += [
            (part, dotted + each, "", None)
            for part in get_args(hint)
            if isinstance(part, type) and dataclasses.is_dataclass(part) and part is not ModelConfig
        ]
    own = _one_line(inspect.getdoc(cls))
    yield Section(name, own if own == meaning else f"{own} {meaning}".strip(), keys)
    for section in inside:
        yield from config_sections(*section)


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the text under each field of a dataclass."""
    return _docstrings(cls.__module__)[cls.__name__]


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return the text under each field of each class of a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        node.name: dict(_field_texts(node)) for node in tree.body if isinstance(node, ast.ClassDef)
    }


def _field_texts(cls: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, text in pairwise(cls.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(words))),
            ):
                yield name, _one_line(words)


def describe_type(hint: Any, limits: Sequence[object] = ()) -> str:
    """Return a type in the words of YAML."""
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType) and type(None) in parts:
        some = reduce(or_, (part for part in parts if part is not type(None)))
        return f"{describe_type(some, limits)}, or null"
    if limits:
        bounds = [
            f"{words} {getattr(limit, kind):g}"
            for limit in limits
            for kind, words in LIMITS.items()
            if hasattr(limit, kind)
        ]
        return ", ".join([describe_type(hint), *bounds])
    if origin is Annotated:
        return describe_type(parts[0])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in parts)
    if origin in (list, tuple):
        return f"list of {describe_type(parts[0])}"
    if hint is ModelConfig:
        return "network as in [model](#model)"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    return names.get(hint, "any value")


def describe_key(key: str) -> str:
    """Return what a key, or each key of a section, means, in lines of text.

    Args:
        key: Dotted key, or the name of a section.

    Raises:
        ConfigError: There is no such key.

    >>> print(describe_key("train.lr"))
    train.lr: number, above 0 (default 0.05)
        Learning rate, after the warm-up and before the schedule lowers it.
    """
    sections = {section.name: section for section in config_sections()}
    keys = {known.name: known for section in sections.values() for known in section.keys}
    texts = [_describe(keys[key])] if key in keys else []
    parts = [name for name in (key, f"{key}.each", f"{key}.NAME") if name in sections]
    for section in [sections[name] for name in parts]:
        texts += [_fill(section.meaning, ""), *map(_describe, section.keys)]
    inner = [name for name in sections if name.startswith(f"{key}.") and name not in parts]
    texts += [f"sections: {', '.join(inner)}"] if parts and inner else []
    if texts:
        return "\n\n".join(texts)
    ends: dict[str, list[str]] = {}
    for name in [*sections, *keys]:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
        ends.setdefault(name, []).append(name)
    close = difflib.get_close_matches(key, ends, n=3, cutoff=0.6)
    meant = list(dict.fromkeys(name for word in close for name in ends[word]))
    known = f" (sections: {', '.join(sections)})"
    raise ConfigError(
        f"{key}: unknown key" + (f": did you mean {', '.join(meant[:4])}?" if meant else known)
    )


def _describe(key: Key) -> str:
    kind = re.sub(r"\[(\w+)\]\(#\w+\)", r"\1", key.type).replace("`", "")
    given = key.default.strip("`")
    default = given if given == "required" else f"default {given}"
    return f"{key.name}: {kind} ({default})\n{_fill(key.meaning, '    ')}"


def _fill(text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        WIDTH - 20,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def commented_yaml(config: Config) -> str:
    """Return a config as YAML that has the meaning of each key above it.

    >>> print(commented_yaml(Config()).splitlines()[9])
    seed: 0
    """
    return "".join(_commented(config, ""))


def _commented(section: Any, indent: str) -> Iterator[str]:
    texts = field_docstrings(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if texts.get(field.name):
            yield f"{_fill(texts[field.name], f'{indent}# ')}\n"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield f"{indent}{field.name}:\n"
            yield from _commented(value, f"{indent}  ")
        else:
            plain = TypeAdapter(Any).dump_python(value, mode="json")
            yield textwrap.indent(dump_yaml({field.name: plain}), indent)
        if not indent:
            yield "\n"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file, for editors: with the text under each field."""
    tree: dict[str, Any] = TypeAdapter(Config).json_schema()
    _add_texts(tree, Config)
    definitions = tree["$defs"]
    for cls in _dataclasses(Config):
        _add_texts(definitions[cls.__name__], cls)
    search = definitions["SearchConfig"]["properties"]
    for name in ("space", "labels_only_space"):
        search[name]["additionalProperties"] = _DISTRIBUTION
    # what stands for a section, in short
    short = {"tracking": [definitions["TrackingConfig"]["properties"]["mode"]]}
    short["members"] = [
        {"type": "integer", "minimum": 1},
        {"type": "array", "items": {"$ref": "#/$defs/ModelConfig"}},
    ]
    for name, others in short.items():
        whole = tree["properties"][name]
        text = whole.pop("description")
        tree["properties"][name] = {"anyOf": [whole, *others], "description": text}
    data = definitions["DataConfig"]["properties"]
    preset = definitions["AugmentConfig"]["properties"]["preset"]
    data["augment"] = {"anyOf": [data["augment"], preset]} | {
        "description": data["augment"].pop("description")
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Config of selfkd"}
    return head | tree


def _dataclasses(cls: type) -> set[type]:
    """Return the dataclasses of a schema's fields, at any depth."""
    found: set[type] = set()
    for hint in typing.get_type_hints(cls).values():
        parts = [hint, *get_args(hint)]
        for part in [part for part in parts if dataclasses.is_dataclass(part)]:
            found |= {typing.cast(type, part)} | _dataclasses(typing.cast(type, part))
    return found


def _add_texts(tree: dict[str, Any], cls: type) -> None:
    """Add the texts of a dataclass to its schema, and leave out titles that repeat the names."""
    tree.pop("title", None)
    tree["description"] = _one_line(inspect.getdoc(cls))
    texts = field_docstrings(cls)
    for name in [field.name for field in dataclasses.fields(cls)]:
        known = tree["properties"].pop(name)  # in the order of the fields
        known.pop("title", None)
        tree["properties"][name] = {**known, "description": texts[name]}


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
