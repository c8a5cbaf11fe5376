"""Checks of the further terms of the loss: what they need of the teacher and is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from selfkd.config.schema import TERMS, Config, choices_of_terms
from selfkd.distill.loss_names import LOSSES

_NOT_OF_TEXT = {
    "attention": "which compares feature maps",
    "crd": "which compares one vector an item",
    "rkd_angle": "which compares all triples of a batch, of tokens too many",
}
"""Losses that tokens do not go with, and why."""


def terms_faults(config: Config) -> Iterator[tuple[str, str]]:
    """Yield keys and faults of the further terms of a config's loss, searched or set.

    Args:
        config: Config to check.
    """
    own, searched = config.distill.terms, config.search.space
    weighted = [key for key in searched if key.startswith(f"{TERMS}.")]
    if own and not any(term.weight for term in own) and not weighted and TERMS not in searched:
        yield TERMS, "must have a weight above 0, got 0 for all"
    for terms in choices_of_terms(config):
        fault = _fault(config, [term for term in terms if isinstance(term, Mapping)])
        if fault is not None:
            yield TERMS, fault
            return


def _fault(config: Config, terms: list[Mapping[str, Any]]) -> str | None:
    """Return what is wrong with a list of terms, if anything is."""
    names = {
        whether: [
            str(term.get("name")) for term in terms if (term.get("student") is not None) == whether
        ]
        for whether in (True, False)
    }
    layers, logits = ", ".join(names[True]), ", ".join(names[False])
    if terms and config.distill.mode == "traces":
        return "has no effect with distill.mode traces, where text is all that teachers give"
    if (transfer := config.transfer) is not None:
        labelled = {name for name, loss in LOSSES.items() if loss.labels and not transfer.labels}
        needing = labelled | {name for name, loss in LOSSES.items() if loss.memory}
        if found := sorted(needing.intersection(names[True] + names[False])):
            return f"must be without {found[0]} with data.transfer, which it has no labels of"
    members = config.members
    if layers and "specialists" in (members.source, *members.compare):
        return f"must be of logits with specialists, whose layers differ, got {layers}"
    for name in (*names[True], *names[False]) if config.task == "text" else ():
        if name in _NOT_OF_TEXT:
            return f"must be other losses with task text, got {name}, {_NOT_OF_TEXT[name]}"
    given = [key for key in ("top_k", "samples") if getattr(config.targets, key) is not None]
    if logits and given and not layers and not config.distill.live:
        return (
            f"{logits} need all logits of the teacher: leave out targets.{given[0]}, or set "
            "distill.live=true"
        )
    return None
