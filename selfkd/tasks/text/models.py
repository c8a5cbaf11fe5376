"""Causal language models by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from selfkd.config.schema import HF, did_you_mean
from selfkd.tasks.text.pretrained import make_pretrained


def make_gpt(
    vocabulary: int,
    context: int,
    *,
    depth: int = 2,
    width: int = 64,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """Return a GPT-2 of `transformers` with random weights; embedding and head are not tied.

    Fresh weights have the standard deviation 1 / sqrt(width), embeddings of tokens 1: with smaller
    embeddings, wider and deeper models learn badly at the learning rates that suit small ones, and
    by GPT-2's 0.02 for all, narrow models do.

    Args:
        vocabulary: Number of tokens.
        context: Number of positions.
        depth: Number of blocks.
        width: Size of the hidden states, a multiple of `heads`.
        heads: Number of attention heads.
        dropout: Probability of dropout, everywhere.

    >>> sum(p.numel() for p in make_gpt(20, 8, depth=1, width=4, heads=2).parameters())
    444

    Reference:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    for name, value in (("depth", depth), ("width", width), ("heads", heads)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout!r}")
    if width % heads:
        raise ValueError(f"width must be a multiple of heads ({heads}), got {width}")
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=context,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        tie_word_embeddings=False,
        initializer_range=width**-0.5,
    )
    model = GPT2LMHeadModel(config)
    nn.init.normal_(model.transformer.wte.weight)
    return cast(nn.Module, model)


MODELS: dict[str, Callable[..., nn.Module]] = {"selfkd_gpt": make_gpt, HF: make_pretrained}


def make_language_model(
    name: str, args: Mapping[str, Any], *, vocabulary: int, context: int
) -> nn.Module:
    """Return a language model by its name, initialised with torch's global generator.

    Args:
        name: `selfkd_gpt`, or `hf`, the model of a folder.
        args: Keyword arguments of the network.
        vocabulary: Number of tokens.
        context: Number of positions.

    Raises:
        ValueError: An unknown name, or arguments that it does not accept.
    """
    if name not in MODELS:
        known = " or ".join(MODELS)
        raise ValueError(f"model.name must be {known} with task text, got {name!r}")
    make = MODELS[name]
    known_args = list(inspect.signature(make).parameters)[2:]
    for key in args:
        if key not in known_args:
            close = did_you_mean(key, known_args)
            raise ValueError(f"model.args must be arguments of {name!r}, got {key!r}{close}")
    try:
        return prepare(make(vocabulary, context, **args))
    except (RuntimeError, TypeError, ValueError) as error:
        if name == HF and isinstance(error, ValueError):  # which names the folder and its fault
            raise
        raise ValueError(f"model.args must suit {name!r}, got {dict(args)}: {error}") from None


def prepare(network: nn.Module) -> nn.Module:
    """Return a model of `transformers` as all are used: no cache in training, plain sampling."""
    from transformers import GenerationConfig

    model: Any = network
    model.config.use_cache = False
    # whatever `generate` is not told it takes from here, such as a folder's own temperature
    model.generation_config = GenerationConfig()
    return network
