"""What the forward of a model takes, in any wrapper."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import nn

from selfkd.distill.layers import unwrap


class Signature(NamedTuple):
    """Inputs that a model's forward takes."""

    names: frozenset[str]
    """Names of the inputs."""
    takes_any: bool
    """Whether further inputs of any name are taken (`**kwargs` without types)."""


_SIGNATURES: WeakKeyDictionary[nn.Module, Signature] = WeakKeyDictionary()


def bare(model: Any) -> Any:
    """Return the model inside wrappers of compilation, data parallelism and peft.

    >>> bare(torch.compile(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    model = unwrap(model)
    if hasattr(model, "peft_config") and hasattr(model, "base_model"):
        base = getattr(model, "get_base_model", None)  # a PeftMixedModel has none
        return unwrap(model.base_model.model if base is None else base())
    return model


def config_of(model: nn.Module) -> Any:
    """Return the configuration of a model of transformers in any wrapper, None of another."""
    config = getattr(bare(model), "config", None)
    return config if hasattr(config, "get_text_config") else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model of transformers has an encoder and a decoder."""
    config = config_of(model)
    return config is not None and bool(getattr(config.get_text_config(), "is_encoder_decoder", 0))


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the keyword by which a language model of transformers keeps no keys and values.

    In eval mode it would copy and keep those of all layers, which only generation reads.
    """
    keeps = config_of(model) is not None and "use_cache" in signature_of(model).names
    return {"use_cache": False} if keeps else {}


def signature_of(model: nn.Module) -> Signature:
    """Return the inputs that the forward of a model in any wrapper takes.

    Of `**kwargs` with types, as transformers' models have them, these names are taken.
    """
    model = bare(model)
    if model in _SIGNATURES:
        return _SIGNATURES[model]
    _SIGNATURES[model] = _read_signature(model)
    return _SIGNATURES[model]


def _read_signature(model: nn.Module) -> Signature:
    if isinstance(model, torch.jit.ScriptModule):
        schema: Any = model.forward.schema  # type: ignore[attr-defined]
        arguments = schema.arguments[1:]
        return Signature(frozenset(argument.name for argument in arguments), False)
    parameters = inspect.signature(model.forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {parameter.name for parameter in parameters if parameter.kind in named}
    further = [p.annotation for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    typed = [kind for annotation in further for kind in get_args(annotation)]
    for kind in typed:
        names |= getattr(kind, "__annotations__", {}).keys()
    return Signature(frozenset(names), bool(further) and not typed)
