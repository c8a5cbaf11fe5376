"""Folders of small models of several families, as `save_pretrained` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from selfkd.tasks.text.pretrained import make_architecture, quiet
from selfkd.tasks.text.tokenizer import make_tokenizer

TEXT = " ".join(f"the {word} is {word * 2 % 7} of {word % 5}." for word in range(300))
ROWS, TOKENS = 320, 300
"""Rows of the embeddings, padded, and tokens of the tokenizer."""
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32, "vocab_size": ROWS}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": ROWS, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2},
    "llama": {**SIZES, "num_key_value_heads": 1},
    "qwen2": {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt_neox": SIZES,
}


def write(folder: Path, family: str, **more: Any) -> Path:
    """Write the folder of a model in half precision, with its tokenizer."""
    torch.manual_seed(1)
    network: Any = make_architecture({"model_type": family, **FAMILIES.get(family, SIZES), **more})
    with quiet():
        network.to(torch.bfloat16).save_pretrained(folder)
    tokenizer, _ = make_tokenizer(f"bpe:{TOKENS}", [TEXT])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder
