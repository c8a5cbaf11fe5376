"""Generation: seeded, in the order of the prompts, ended by the end token or by the context."""

from __future__ import annotations

import torch

from selfkd.tasks.text.generate import generate
from selfkd.tasks.text.models import make_gpt

PROMPTS = [torch.tensor([0, 1, 2]), torch.tensor([0, 3]), torch.tensor([0, 4, 5])]


def test_draws_are_those_of_the_seed() -> None:
    torch.manual_seed(0)
    network = make_gpt(20, 8, width=8).train()
    state = torch.get_rng_state()
    first, again, other = (
        generate(network, PROMPTS, end=0, context=8, seed=seed) for seed in (1, 1, 2)
    )
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_a_text_ends_with_the_end_token_or_the_context() -> None:
    torch.manual_seed(0)
    network = make_gpt(20, 8, width=8)
    for seed in range(5):
        for prompt, written in zip(
            PROMPTS, generate(network, PROMPTS, end=0, context=8, seed=seed), strict=True
        ):
            ends = (written == 0).nonzero()[:, 0].tolist()
            assert ends == [len(written) - 1] or (
                not ends and len(prompt) + len(written) == 9  # whose last token is not fed
            )


def test_greedy_text_is_the_most_probable() -> None:
    torch.manual_seed(0)
    network = make_gpt(20, 8, width=8).eval()
    prompt = torch.tensor([0, 3])
    (written,) = generate(network, [prompt], end=0, context=8, seed=0, greedy=True, most=3)
    whole = torch.cat([prompt, written])
    with torch.no_grad():
        predicted = network(whole[None]).logits[0].argmax(dim=-1)
    assert torch.equal(predicted[1 : 1 + len(written)], written)
