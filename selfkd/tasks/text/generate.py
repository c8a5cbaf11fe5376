"""Text that a language model writes: batches of prompts of one length, by seeds of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 256
"""Most prompts that are continued at once."""


@torch.no_grad()
def generate(
    network: nn.Module,
    prompts: Sequence[Tensor],
    *,
    end: int,
    context: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    most: int | None = None,
) -> list[Tensor]:
    """Return what a model writes after each prompt, with the end token where it came to that.

    Prompts of one length are continued together. The draws depend on the seed, the prompts and
    their order. The model predicts in eval mode and is then put back into its previous mode.

    Args:
        network: Causal language model of `transformers`.
        prompts: Tokens of each prompt, int64 `[length]`.
        end: Id of the end token.
        context: Number of tokens that the model sees at most.
        seed: Seed of the draws.
        temperature: Temperature that tokens are sampled at.
        top_p: Probability of the smallest set of most probable tokens that is sampled from.
        greedy: Whether the most probable token is taken, without draws.
        most: Most tokens after a prompt; as many as the context has room for when not given.

    Returns:
        Tokens after each prompt, int64 `[written]` on the CPU, in the order of the prompts.
    """
    from transformers import GenerationConfig

    model: Any = network
    training, device = network.training, next(network.parameters()).device
    network.eval()
    written: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(prompts)
    lengths = sorted({len(prompt) for prompt in prompts})
    for length in lengths:
        numbers = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        room = context + 1 - length if most is None else min(most, context + 1 - length)
        if room < 1:
            continue
        sampling = {} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=not greedy,
            eos_token_id=end,
            pad_token_id=end,
            use_cache=True,
            **sampling,
        )
        for first in range(0, len(numbers), BATCH):
            own = numbers[first : first + BATCH]
            inputs = torch.stack([prompts[number] for number in own]).to(device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed((seed * 1_000_003 + length * 10_007 + first) % 2**63)
                found = model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=config,
                )
            for number, row in zip(own, found[:, length:].cpu(), strict=True):
                ends = (row == end).nonzero()[:, 0].tolist()
                written[number] = row[: ends[0] + 1] if ends else row
    network.train(training)
    return written
