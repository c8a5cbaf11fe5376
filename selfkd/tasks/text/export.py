"""A language model as a folder that `transformers` opens, with its tokenizer and a card."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from selfkd.storage.files import read_text, replace, save_json, save_text
from selfkd.storage.remote import RemotePath, as_path
from selfkd.storage.temporary import TemporaryFolder
from selfkd.tasks.text.pretrained import quiet
from selfkd.tasks.text.tokenizer import read_tokenizer

FOLDER = "pretrained"
"""Name of the folder, in that of a generation."""
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- knowledge-distillation
- self-distillation
- selfkd
---

"""
_USE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
inputs = tokenizer(tokenizer.eos_token + "The value of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, do_sample=True, max_new_tokens=20)[0]))
```

A text begins with the end token, as in training, and has at most {context} tokens. The license is
not set: it is for the owner of the data and the weights to choose.
"""


def export_model(
    folder: Path,
    network: nn.Module,
    *,
    tokenizer: str,
    end: int,
    context: int,
    card: str,
    source: str | None = None,
) -> None:
    """Write a model as `save_pretrained` does, with its tokenizer; the card last.

    Args:
        folder: Folder to write, whose parent exists.
        network: Model of `transformers`, whose settings of generation are changed.
        tokenizer: Text of its tokenizer.json.
        end: Id of the end token.
        context: Number of tokens that it sees at most.
        card: Text of its card, as Markdown, without the part that is of its kind.
        source: Folder of the tokenizer, whose chat template is kept; none when not given.
    """
    from transformers import GenerationConfig

    model: Any = network
    model.config.use_cache = True
    model.config.bos_token_id = model.config.eos_token_id = end
    model.config.pad_token_id = None  # whose row of the embedding is not trained
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    token = read_tokenizer(tokenizer).id_to_token(end)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), token),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if template := _chat_template(source):
        described["chat_template"] = template
    parent = None if isinstance(folder, RemotePath) else folder.parent
    with TemporaryFolder(parent=parent) as temporary, quiet():
        model.save_pretrained(temporary.path / FOLDER)
        for file in sorted((temporary.path / FOLDER).iterdir()):
            replace(folder / file.name, partial(shutil.move, file))
    save_text(folder / "tokenizer.json", tokenizer)
    save_json(folder / "tokenizer_config.json", described)
    save_text(folder / "README.md", _HEAD + card + _USE.format(context=f"{context:,}"))


def _chat_template(source: str | None) -> str | None:
    if source is None:
        return None
    folder = as_path(source)
    with suppress(OSError):
        return read_text(folder / "chat_template.jinja")
    with suppress(OSError, ValueError):
        found = json.loads(read_text(folder / "tokenizer_config.json")).get("chat_template")
        return found if isinstance(found, str) else None
    return None
