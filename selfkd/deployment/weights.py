"""Weights that can be served."""

from __future__ import annotations

from torch import nn


def check_finite(network: nn.Module) -> None:
    """Check that all parameters and buffers of a network are numbers.

    Raises:
        ValueError: One is NaN or infinite; names it.

    >>> broken = nn.Linear(2, 2)
    >>> _ = nn.init.constant_(broken.bias, float("nan"))
    >>> check_finite(broken)
    Traceback (most recent call last):
    ...
    ValueError: weights must be finite, got NaN in bias: the model is broken, choose another one
    """
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            kind = "NaN" if tensor.isnan().any() else "infinity"
            raise ValueError(
                f"weights must be finite, got {kind} in {name}: the model is broken, choose "
                "another one"
            )
