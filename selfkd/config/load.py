"""Reading a config from YAML, `--set` and flags, and writing it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from selfkd.config.schema import Config, Tree, flat, from_tree, leaves, put, to_tree
from selfkd.config.validate import settings_faults
from selfkd.errors import ConfigError
from selfkd.results import FORMAT
from selfkd.storage.files import check_depth, read_text
from selfkd.storage.remote import as_path, secret_fault


class _Loader(yaml.SafeLoader):
    """Safe loader of YAML 1.1 in which 1e-3 is a number; duplicate keys and aliases are refused.

    A few lines of aliases to aliases stand for more than a memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                problem="aliases (*name) are not allowed",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag in _NO_KEYS:
                raise yaml.constructor.ConstructorError(
                    problem="keys must be text", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
            if key.tag != _MERGE:
                key.tag = "tag:yaml.org,2002:str"  # an arm of the name `no` is not one named False
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        number = int(self.construct_yaml_int(node))
        if abs(number) >= 10**1000:  # the schema says what is right, in messages that name it
            raise yaml.constructor.ConstructorError(
                problem="numbers must have fewer than 1,000 digits", problem_mark=node.start_mark
            )
        return number

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if re.search("[\ud800-\udfff]", text):
            raise yaml.constructor.ConstructorError(
                problem="text must be Unicode, not half a character", problem_mark=node.start_mark
            )
        return text


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes text which `_Loader` would read as a number."""


LARGEST = 2**19
"""Largest number of characters of a config, which take seconds to read."""
_MERGE = "tag:yaml.org,2002:merge"
_NO_KEYS = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:binary")


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),  # of linear time
        list("-+0123456789."),
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
for _tag in ("binary", "set"):  # no JSON has them
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_tag}",
        _Loader.construct_undefined,  # type: ignore[type-var]
    )


class _TextLoader(_Loader):
    """Loader whose scalars are all text: `no`, `01` and `1e3` stay as they are written."""


_TextLoader.yaml_implicit_resolvers = {}


def parse_names(text: str, source: str) -> Any:
    """Parse YAML whose scalars are names, so that all of them are text.

    Args:
        text: YAML text.
        source: Name of its source, for messages.

    Raises:
        ConfigError: The text is not YAML, or has duplicate keys or aliases.

    >>> parse_names("[no, 01, 1e3, null]", "x.yaml")
    ['no', '01', '1e3', 'null']
    """
    return _parse(text, source, _TextLoader)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML safely; `1e-3` is a number.

    Args:
        text: YAML text.
        source: Name of its source, for messages.

    Raises:
        ConfigError: The text is not YAML, or has duplicate keys or aliases.

    >>> parse_yaml("lr: 1e-3", "x.yaml")
    {'lr': 0.001}
    """
    return _parse(text, source, _Loader)


def _parse(text: str, source: str, loader: type[_Loader]) -> Any:
    try:
        tree = yaml.load(text, loader)  # noqa: S506 - derived from SafeLoader
        check_depth(tree)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: of 5,000 digits
        raise ConfigError(f"{source}: must be YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{source}: must be YAML, and is nested too deeply") from None
    return tree


def load_yaml(path: Path) -> Any:
    """Read a YAML file safely.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is no text of at most `LARGEST` characters; the message names it.
        ConfigError: It is not YAML.
    """
    text = read_text(path)
    if len(text) > LARGEST:
        raise ConfigError(f"{path}: must have at most {LARGEST:,} characters, got {len(text):,}")
    return parse_yaml(text, str(path))


def load_config(
    path: str | Path | None = None,
    *,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Read a config: flags over `--set` over YAML over defaults.

    Args:
        path: YAML file, such as the config.yaml of a run.
        settings: Texts `dotted.key=value`, as of `--set`.
        flags: Parsed values by dotted key; None values are ignored.

    Raises:
        ConfigError: Keys or values are invalid; the message lists every fault, one a line.

    >>> load_config(settings=["train.lr=1e-2"], flags={"rounds": 2}).train.lr
    0.01
    """
    tree: Tree = {}
    sources: dict[str, str] = {}
    if path is not None:
        try:
            tree = load_yaml(as_path(path)) or {}
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            if secret_fault(str(path)):
                raise ConfigError(f"--config: {error}") from None
            raise ConfigError(f"--config must be a readable file, got {path}: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: must be a mapping of config keys, got {tree!r}")
        if tree.get("format") == FORMAT:  # of a run folder
            del tree["format"]
        sources = {key: str(path) for key, _ in leaves(tree, "", inner=True)}
        for section in ("tracking", "members"):
            if section in tree:
                put(tree, section, tree.pop(section))
        data = tree.get("data")
        if isinstance(data, dict) and "augment" in data:
            put(tree, "data.augment", data.pop("augment"))
    return _overlay(tree, sources, settings, flags or {})


def merge_settings(config: Config, *, settings: Sequence[str], flags: Mapping[str, Any]) -> Config:
    """Return a config with flags over `--set` over its own values.

    Args:
        config: Config to change.
        settings: Texts `dotted.key=value`, as of `--set`.
        flags: Parsed values by dotted key; None values are ignored.

    Raises:
        ConfigError: Keys or values are invalid; the message lists every fault, one a line.
    """
    return _overlay(to_tree(config), {}, settings, flags)


def _overlay(
    tree: Tree, sources: dict[str, str], settings: Sequence[str], flags: Mapping[str, Any]
) -> Config:
    faults = []
    given: list[tuple[str, Any, str]] = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            faults.append(f"--set must be dotted.key=value, got {setting!r}")
            continue
        try:
            given.append((key, parse_yaml(text, f"--set {key}"), "--set"))
        except ConfigError as error:
            faults.append(str(error))
    given += [(key, value, "command line") for key, value in flags.items() if value is not None]
    first = ("task", "distill.mode")  # whose defaults others extend
    for key, value, source in sorted(
        given, key=lambda each: first.index(each[0]) if each[0] in first else len(first)
    ):
        put(tree, key, value)
        sources |= {k: source for k, _ in leaves({key: value}, "", inner=True)}
    try:
        config = from_tree(tree, sources)
        faults.extend(settings_faults(config, sources))
    except ConfigError as error:
        faults.append(str(error))
        with suppress(ConfigError):  # the search space may be valid all the same
            faults.extend(settings_faults(from_tree({"search": tree.get("search")}), sources))
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def dump_config(config: Config) -> str:
    """Return a config as YAML."""
    return dump_yaml(to_tree(config))


def dump_yaml(tree: Tree) -> str:
    """Return nested dictionaries as YAML that `parse_yaml` reads as the same."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
    return text


def differences(old: Config, new: Config) -> list[str]:
    """Return `key: old -> new` for each value that differs between two configs."""
    before, after = flat(old), flat(new)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


RESUMABLE = (
    *("rounds", "tracking.", "resources.", "storage", "name", "data.root", "data.download"),
    *("data.transfer.root", "targets.root", "checkpoint.", "controls", "confirm.", "deploy."),
)
"""Beginnings of the dotted keys that may change when a run is resumed."""


def resume_invariant(config: Config) -> dict[str, Any]:
    """Return the values of a config that may not change when a run is resumed, by dotted key."""
    return {key: value for key, value in flat(config).items() if not key.startswith(RESUMABLE)}
