"""Model cards, made from runs: what the model is worth, what it is of, how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfkd.analysis.verdicts import NOT_COMPARED
from selfkd.config import RESUMABLE, Config, flat
from selfkd.config.speed import of_table
from selfkd.experiments.run_folder import RunFolder
from selfkd.loading.choose import Chosen, distill_of
from selfkd.reporting.plain import headline, short_table
from selfkd.reporting.words import sentence
from selfkd.results import EnsembleSummary, Facts, GenerationsSummary, Summary
from selfkd.storage.remote import without_secrets
from selfkd.text import one_line, shell_quote

_KINDS: Mapping[str, type[GenerationsSummary] | type[EnsembleSummary]] = {
    "generations": GenerationsSummary,
    "ensemble": EnsembleSummary,
}
PLACE = "USER/NAME"
"""What stands for the repository in a card, until it is pushed to one."""
_LEFT_OUT = ("seed", "members.runs", "members.checkpoints", "generation_0")
_PLACE = re.compile(r"^([/~\\]|\.{1,2}/|[A-Za-z]:[\\/])|://")  # a path of somebody's machine


def card_of_run(folder: RunFolder, config: Config, facts: Facts | None, chosen: Chosen) -> str:
    """Return the model card of a run's model, as Markdown.

    No path, address or name of the user's machine is in it.

    Args:
        folder: Run folder.
        config: Config of the run.
        facts: Facts of its data, where they are known.
        chosen: Model that the card is of.
    """
    summary: Summary | None = folder.summary(_KINDS[folder.command])
    command = _command(folder.command, config, facts)
    said = headline(summary) if summary is not None else ""
    lines = [
        f"This model is {chosen.title} of a run of selfkd, {_made_by(folder.command)}.",
        sentence(_quoted(said)) if said else "",
        "" if summary is None else _results(summary),
        "## How it was made",
        "\n".join(_made(config, facts, chosen)),
        f"```bash\n{command}\n```",
    ]
    task = config.inputs if facts is None or facts.function is None else None
    return _card(folder.path.name, lines, task=task)


def plain_card(metadata: Mapping[str, Any]) -> str:
    """Return the model card of a file without its run.

    Args:
        metadata: Metadata of its checkpoint.
    """
    model = metadata.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    known = "features" if "features" in metadata else "images"
    line = f"- network: `{_quoted(name)}`" if name else "- network: of a function of the user's own"
    return _card(
        name or "model",
        ["A model of selfkd.", line],
        task=metadata.get("task", known if "classes" in metadata else None),
    )


_TAGS = {
    "images": "image-classification",
    "features": "tabular-classification",
    "text": "text-generation",
}
_ITEMS = {"images": '"image.png"', "features": "features", "text": '"The value of "'}


def _card(title: str, lines: Sequence[str], *, task: str | None) -> str:
    tags = ["knowledge-distillation", "self-distillation", "selfkd", "pytorch"]
    head = [
        "---",
        "library_name: selfkd",
        *([f"pipeline_tag: {_TAGS[task]}"] if task in _TAGS else []),
    ]
    head += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    item = _ITEMS.get(task or "")
    network = "" if item else ", make_model=lambda: MyNetwork()"
    use = [
        "## Use",
        "```python\nimport selfkd\nfrom huggingface_hub import snapshot_download\n\n"
        f'model = selfkd.load(snapshot_download("{PLACE}"){network})  # or its folder\n'
        + (f"print(model.predict({item}).top(3))\n```" if item else "```"),
        "The license is not set: it is for the owner of the data and the weights to choose.",
    ]
    body = [f"# {_quoted(title)}", *filter(None, lines), *use]
    return without_secrets("\n".join(head) + "\n\n" + "\n\n".join(body) + "\n")


def _made_by(command: str) -> str:
    if command == "ensemble":
        return "which distils an ensemble into one model"
    return "which trains born-again generations, each distilled from the one before"


def _results(summary: Summary) -> str:
    """Return the table of a run, its intervals at 95 %."""
    given = any(row.given for row in getattr(summary, "confirmations", ()))
    base = "generation 0, one given model" if given else "what was trained on labels only"
    note = "mean: over fresh seeds that nothing was chosen on; "
    alone = isinstance(summary, GenerationsSummary | EnsembleSummary) and summary.alone
    note += f"{NOT_COMPARED}." if alone else f"gain: its difference to {base}."
    return f"## Results\n\n{_markdown(short_table(summary))}\n\n{note}"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    rows = [[_quoted(row[0]), *row[1:]] for row in table]
    rows.insert(1, ["---", *["---:"] * (len(table[0]) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _quoted(text: object) -> str:
    """Return a text as one line that is no mark-up."""
    return re.sub(r"([|<>`]|\](?=[(\[:]))", r"\\\1", one_line(str(text)))


def _made(config: Config, facts: Facts | None, chosen: Chosen) -> Iterator[str]:
    model = config.network(chosen.generation) if chosen.point is not None else config.model
    if facts is None or facts.function is None:
        arguments = (
            f" {_quoted(json.dumps(_masked(model.args), ensure_ascii=False))}" if model.args else ""
        )
        yield f"- network: {model.name}{arguments}"
        sizes = "" if facts is None else _sizes(facts)
        yield f"- data: {_quoted(config.data.name)}{sizes}"
    distill = distill_of(config, chosen)
    if chosen.given:
        yield "- given to the run as its generation 0, not trained by it"
    elif distill is not None and distill.mode == "traces":
        yield "- trained on text of its teachers"
    elif distill is not None:
        temperature, alpha = distill.temperature, distill.alpha
        yield f"- distilled with temperature T = {temperature:.3g}, weight alpha = {alpha:.3g}"
    else:
        yield "- trained on labels only" if chosen.average is None else "- an average of models"
    yield f"- seed: {config.seed}"


def _sizes(facts: Facts) -> str:
    sizes = [f"{count:,} {name}" for name, count in facts.items.items()]
    of = f", {facts.outputs} classes" if facts.outputs else ""
    return f", {', '.join(sizes)} {facts.unit}{of}" if sizes else of


def _command(name: str, config: Config, facts: Facts | None) -> str:
    """Return the command that makes such a run, without the places of a machine."""
    words, default = [f"python -m selfkd.{name}"], flat(Config()) | of_table(config)
    if facts is not None and facts.function is not None:
        path, _, function = facts.function.rpartition(":")
        words.append(f"--train {shell_quote(f'{Path(path).name}:{function}')}")
    if name == "generations":
        words.append(f"--rounds {config.rounds}")
    if config.generation_0.path is not None:
        words.append("--from FILE")
    for key, value in flat(config).items():
        kept = key == "controls" or not key.startswith((*RESUMABLE, *_LEFT_OUT))
        if kept and value != default.get(key):
            words.append(
                f"--set {shell_quote(f'{key}={json.dumps(_masked(value), ensure_ascii=False)}')}"
            )
    words.append(f"--seed {config.seed}")
    return one_line(" ".join(words))


def _masked(value: Any) -> Any:
    """Return plain data without the paths in it."""
    if isinstance(value, dict):
        return {key: _masked(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(part) for part in value]
    return "…" if isinstance(value, str) and _PLACE.search(value) else value
