"""A file that predicts with an exported network, without torch or selfkd."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from pprint import pformat
from string import Template
from typing import Any, Literal

from selfkd.deployment.interface import Interface
from selfkd.storage.files import save_text

PREDICTOR = "predict.py"
TOKENIZER = "tokenizer.json"


def write_predictor(
    folder: Path,
    metadata: Mapping[str, Any],
    interface: Interface,
    *,
    task: Literal["images", "text"],
    file: str = "int8.onnx",
) -> dict[str, str]:
    """Write `predict.py` beside an exported network, for text its tokenizer as well.

    It stands alone: onnxruntime and numpy are what it imports, of text also tokenizers; Pillow
    where it reads pictures. What it knows of the model stands in it as literals.

    Args:
        folder: Folder of the networks.
        metadata: Metadata of the checkpoint: of images `classes`, `mean`, `std` and `image_size`,
            of arrays `features` in place of the last; of text `tokenizer`, `context` and `end`.
        interface: Names of the network's input.
        task: Kind of data.
        file: Name of the network that it predicts with, when told no other.

    Returns:
        The files by name, relative to the parent of `folder`.

    Raises:
        ValueError: The metadata have not what it needs, as those of a network that a function of
            the user's own has trained.
    """
    facts: dict[str, Any] = {"file": file, "input": interface.input}
    texts, kind = dict[str, str](), "features" if "features" in metadata else task
    try:
        if task == "text":
            facts |= {"context": metadata["context"], "end": metadata["end"]}
            texts[TOKENIZER] = metadata["tokenizer"]
        else:
            facts |= {
                "classes": [str(name) for name in metadata["classes"]],
                "mean": tuple(metadata["mean"]),
                "std": tuple(metadata["std"]),
            }
            if kind == "features":
                facts["names"] = list(metadata["features"])
            else:
                facts["size"] = metadata["image_size"]
    except KeyError as error:
        raise ValueError(f"metadata must have {error} for {PREDICTOR}, got none") from None
    template = files("selfkd.deployment").joinpath("templates", f"{kind}.txt")
    literals = {name: pformat(fact, width=100, compact=True) for name, fact in facts.items()}
    texts[PREDICTOR] = Template(template.read_text(encoding="utf-8")).substitute(literals)
    for name, text in texts.items():
        save_text(folder / name, text)
    return {name: f"{folder.name}/{name}" for name in texts}
