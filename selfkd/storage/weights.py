"""Weights in files from elsewhere: read without running code, found by a network's own names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfkd.storage.foreign import (
    LISTED,
    NAMED,
    SAVE_ALONE,
    Inert,
    describe_content,
    is_module,
    read_weights,
    state_of,
)

Shapes = Mapping[str, Sequence[int]]
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments of names that `torch.compile`, data parallelism and sharding put into them."""
COUNTERS = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")
"""Ends of names that are no weights: they may be missing, or left over."""
DEEPEST = 4  # levels of keys
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?)([._\d]|$)|(^|[._])ema", re.IGNORECASE)
_PART = re.compile(r"\d+-of-\d+$")


@dataclass(frozen=True)
class Weights:
    """The weights of a network, found in a file."""

    tensors: Mapping[str, Tensor]
    """Tensors by the network's own names."""
    note: str | None = None
    """What is to be said: which of several were taken."""


def find_weights(path: Path, wanted: Shapes, *, key: str | None = None, outputs: int) -> Weights:
    """Return a network's weights from a file of any make.

    They may stand under any key, at most four levels deep, and their names may have any prefix.
    Where there are several sets an average (EMA, SWA) is taken before what it is of.

    Args:
        path: Safetensors file, or one of `torch.save`: a state dict, a checkpoint around it or a
            whole module; `.npz`; or the index (JSON) of a sharded checkpoint.
        wanted: Shapes of the network's tensors by name.
        key: Name of the set to take, where there are several.
        outputs: Number of the network's classes, for messages.

    Raises:
        ValueError: It has none for this network: says what it has, and the way out.
    """
    tree = read_weights(path)
    groups = list(_groups(tree, ()))
    if not groups:
        raise ValueError(f"it has no tensors by name: {SAVE_ALONE}; {describe_content(tree)}")
    sets = {label: found for group in groups for label, found in _complete(*group, wanted)}
    if not sets:
        part = " (it is one part of several: give their index, ….index.json)"
        why = _describe_misfit(groups, wanted, outputs) + part * bool(_PART.search(path.stem))
        raise ValueError(f"{why}; {describe_content(tree)}")
    if key is not None:
        named = [label for label in sets if _is_named(label, key)]
        if len(named) != 1:
            raise ValueError(f"weights must be one of {_listed(sets)}, got {key!r}")
        return Weights(_finite(sets[named[0]]))
    averages = [label for label in sets if _AVERAGE.search(label)]
    others = [label for label in sets if label not in averages]
    among = averages or others
    if len(among) > 1 and not _same([sets[label] for label in among]):
        raise ValueError(
            f"it has several sets of weights for this network, {_listed(among)}: choose one by "
            f"`weights`, such as weights: {among[0] or others[-1]}"
        )
    note = None
    if averages and others:
        note = (
            f"has the average {averages[0]!r} beside the weights {_listed(others)}: the average is "
            f"taken, and `weights: {others[0] or 'raw'}` takes the latter"
        )
    return Weights(_finite(sets[among[0]]), note)


def _finite(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors, none of which is NaN as after a training that has diverged."""
    bad = [n for n, t in tensors.items() if t.is_floating_point() and t.float().isnan().any()]
    if bad:
        raise ValueError(
            f"{_some(f'{len(bad)} of {len(tensors)} tensors have NaN', bad)}: its training "
            "has diverged, so give weights from before that"
        )
    return tensors


# --- sets of tensors ---


def _groups(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield the tensors by name of each mapping and module, with the keys that led to it."""
    if is_module(value):
        yield ".".join(path), dict(state_of(value, "", 0))
        return
    items = {**value, **vars(value)} if isinstance(value, Inert) else value
    if isinstance(value, list | tuple):  # such as (state dict, epoch)
        items = {str(number): part for number, part in enumerate(value[:LISTED])}
    if not isinstance(items, Mapping):
        return
    named = {key: part for key, part in items.items() if isinstance(key, str)}
    tensors = {key: part for key, part in named.items() if isinstance(part, Tensor)}
    if tensors:
        yield ".".join(path), tensors
    if len(path) < DEEPEST:
        for key, part in named.items():
            yield from _groups(part, (*path, key))


def _complete(
    label: str, group: Mapping[str, Tensor], wanted: Shapes
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield the sets of a group that are the network's, each with its name in the file."""
    for tensors in _variants(group, wanted):
        found = dict(_fitting(tensors, wanted))
        if found:
            yield from ((_joined(label, prefix), own) for prefix, own in found.items())
            return


def _fitting(
    tensors: Mapping[str, Tensor], wanted: Shapes
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield the network's tensors for each prefix under which there is nothing else."""
    fitting, claimed = [], set[str]()
    for prefix in _prefixes(tensors, wanted):
        missing, _, reshaped = _differences(tensors, wanted, prefix)
        if not missing and not reshaped:
            fitting.append(prefix)
            claimed |= {f"{prefix}{name}" for name in wanted}
    for prefix in fitting:
        _, extra, _ = _differences(tensors, wanted, prefix)
        if not set(extra) - claimed:
            found = {n: tensors[f"{prefix}{n}"] for n in wanted if f"{prefix}{n}" in tensors}
            counters = {n: torch.zeros(tuple(wanted[n])) for n in wanted.keys() - found.keys()}
            yield prefix, {**found, **counters}


def _joined(label: str, prefix: str) -> str:
    return ".".join(part for part in (label, prefix.rstrip(".")) if part)


def _variants(group: Mapping[str, Tensor], wanted: Shapes) -> list[Mapping[str, Tensor]]:
    """Return tensors as they are named, and without wrappers that the network itself has not."""
    own = {part for name in wanted for part in name.split(".")}
    drop = [wrapper for wrapper in WRAPPERS if wrapper not in own]
    names = {key: ".".join(p for p in key.split(".") if p not in drop) for key in group}
    if len(set(names.values())) < len(group) or all(old == new for old, new in names.items()):
        return [group]
    return [group, {names[key]: tensor for key, tensor in group.items()}]


def _prefixes(tensors: Mapping[str, Tensor], wanted: Shapes) -> list[str]:
    """Return what may stand before the network's names, the likeliest first."""
    ends: dict[str, list[str]] = {}
    for key in tensors:
        parts = key.split(".")
        for start in range(min(len(parts), DEEPEST + 2)):
            prefix = "".join(f"{part}." for part in parts[:start])
            ends.setdefault(".".join(parts[start:]), []).append(prefix)
    return [p for p, _ in Counter(p for name in wanted for p in ends.get(name, ())).most_common()]


def _differences(
    tensors: Mapping[str, Tensor], wanted: Shapes, prefix: str
) -> tuple[list[str], list[str], list[str]]:
    """Return the names that are missing, those that are left over, and those of other shapes."""
    missing, reshaped = [], []
    for name, shape in wanted.items():
        found = tensors.get(f"{prefix}{name}")
        if found is None:
            missing.append(name)
        elif list(found.shape) != list(shape):
            reshaped.append(name)
    names = {f"{prefix}{name}" for name in wanted}
    extra = [key for key in tensors if key.startswith(prefix) and key not in names]
    return _weights(missing), _weights(extra), reshaped


def _weights(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.endswith(COUNTERS)]


def _is_named(label: str, key: str) -> bool:
    """Say whether a set goes by a name: its whole name, or one of the keys that lead to it."""
    return label == key or key in label.split(".") or (key == "raw" and not label)


def _same(sets: Sequence[Mapping[str, Tensor]]) -> bool:
    first, *others = sets
    return all(torch.equal(first[name], each[name]) for each in others for name in first)


# --- words ---


def _describe_misfit(
    groups: Sequence[tuple[str, Mapping[str, Tensor]]], wanted: Shapes, outputs: int
) -> str:
    """Return in what the set that is nearest to the network differs, why, and the way out."""
    best, most = None, (0, 0)
    for tensors in (each for _, group in groups for each in _variants(group, wanted)):
        for prefix in _prefixes(tensors, wanted)[:LISTED]:
            found = _differences(tensors, wanted, prefix)
            rank = (len(wanted) - len(found[0]), -len(found[1]))
            if best is None or rank > most:
                best, most = (tensors, prefix, *found), rank
    if best is None:
        few = ", ".join(list(wanted)[:NAMED])
        return (
            f"it is of another network, as none of its tensors has a name of this one's ({few}, "
            "…): give the network that it was saved from by model and args"
        )
    tensors, prefix, missing, extra, reshaped = best
    shapes = [
        f"{name} {list(tensors[prefix + name].shape)} instead of {list(wanted[name])}"
        for name in reshaped
    ]
    parts = [
        _some(f"{len(missing)} of {len(wanted)} tensors missing", missing),
        _some(f"{len(extra)} left over", extra),
        _some(f"{len(reshaped)} of another shape", shapes),
    ]
    pairs = [(list(tensors[prefix + name].shape), list(wanted[name])) for name in reshaped]
    head = not pairs and all(list(wanted[name][:1]) == [outputs] for name in missing)
    if missing and not extra and head:
        why = "it has no last layer: train one for these classes first"
    elif missing and head and _same_shapes(tensors, extra, wanted, missing):
        pairs_of_names = zip(extra, missing, strict=True)
        renamed = ", ".join(f"{old} to {prefix}{new}" for old, new in pairs_of_names)
        why = f"its last layer has another name: rename {renamed} in the file"
    elif missing or extra:
        why = (
            "it is of another network or depth: give model and args as it was trained with, if it "
            "is one of timm's or selfkd's"
        )
    else:
        why = _of_shapes(pairs, outputs)
    return f"{', '.join(filter(None, parts))}: {why}"


def _same_shapes(
    tensors: Mapping[str, Tensor], extra: Sequence[str], wanted: Shapes, missing: Sequence[str]
) -> bool:
    """Say whether tensors that are left over have the shapes of those that are missing."""
    return [list(tensors[name].shape) for name in extra] == [list(wanted[n]) for n in missing]


def _of_shapes(pairs: Sequence[tuple[list[int], list[int]]], outputs: int) -> str:
    """Return the likely reason for shapes that differ, each as it is and as it should be."""
    heads = [a[0] for a, b in pairs if a and b and b[0] == outputs and a[1:] == b[1:]]
    if len(heads) == len(pairs):
        return (
            f"it was trained for {heads[0]} classes, and the data have {outputs}: give the data "
            "that it was trained on, or train its last layer on these first"
        )
    (found, own), *others = pairs
    if not others and len(own) > 1 and own[:1] + own[2:] == found[:1] + found[2:]:
        channels = f"{found[1]} channel{'s' * (found[1] > 1)}"
        return f"it was trained for inputs of {channels}, and the data have {own[1]}"
    return "it is of another width or size: give model and args as it was trained with"


def _some(text: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"{text} ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})"


def _listed(labels: Mapping[str, Any] | Sequence[str]) -> str:
    """Return names of sets; that without a key is called raw."""
    return ", ".join(repr(label or "raw") for label in labels)
