"""Trained language models without their data: texts become probabilities of the next token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.distill.outputs import take_logits
from selfkd.losses import Average
from selfkd.tasks.common import Averaged, open_checkpoint
from selfkd.tasks.text import check_installed
from selfkd.tasks.text.generate import generate
from selfkd.tasks.text.networks import NetworkFacts, rebuild
from selfkd.tasks.text.tokenizer import read_tokenizer, vocabulary_of

PADDING = -1


@dataclass(frozen=True)
class TextPredictor:
    """A language model and its tokenizer; see `selfkd.tasks.task.Predictor`."""

    network: nn.Module
    """Network from padded tokens `[batch, length]` to logits of the token after each text."""
    facts: NetworkFacts

    @cached_property
    def _tokenizer(self) -> Any:
        return read_tokenizer(self.facts.tokenizer)

    @property
    def names(self) -> tuple[str, ...]:
        """Texts of the tokens, in the order of the logits."""
        numbers = range(self.facts.vocabulary)
        return tuple(self._tokenizer.decode([n], skip_special_tokens=False) for n in numbers)

    def inputs(self, items: Any, *, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        """Yield the tokens of texts, an end token before them as at the start of a document.

        Args:
            items: One text or several; of long ones the end counts.
            batch_size: Number of texts in a batch.
            device: Device of the inputs.

        Raises:
            TypeError: An item that is no text.
            ValueError: A text with half a character.
        """
        alone = isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable)
        texts = [items] if alone else list(items)
        for text in texts:
            _check_text(text, "items must be texts")
        for start in range(0, len(texts), batch_size):
            rows = [
                [self.facts.end, *self._tokenizer.encode(text, add_special_tokens=False).ids]
                for text in texts[start : start + batch_size]
            ]
            tokens = [torch.tensor(row[-self.facts.context :]) for row in rows]
            padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PADDING)
            yield padded.to(device)

    def example(self) -> Tensor:
        """Return the tokens of one window that fills the context."""
        return torch.zeros((1, self.facts.context), dtype=torch.int64)

    def generate(
        self,
        prompt: str,
        *,
        most: int | None,
        temperature: float,
        top_p: float,
        greedy: bool,
        seed: int,
    ) -> str:
        """Return what the model writes after a text, up to its end token.

        Args:
            prompt: Text.
            most: Most tokens that it writes; as many as its context has room for when not given.
            temperature: Temperature that tokens are sampled at.
            top_p: Probability of the smallest set of most probable tokens that is sampled from.
            greedy: Whether the most probable token is taken, without draws.
            seed: Seed of the draws.

        Raises:
            TypeError: Several models, whose average writes no text, or a prompt that is no text.
            ValueError: A text that leaves no room, or sampling that is not possible.
        """
        if not isinstance(self.network, NextToken):
            raise TypeError("model must be a single one to write text, got the average of several")
        _check_text(prompt, "prompt must be text")
        if most is not None and type(most) is not int:
            raise TypeError(f"most must be a whole number, got {most!r}")
        if not temperature > 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature must be above 0 and top_p in (0, 1], got {temperature} and {top_p}"
            )
        end, context = self.facts.end, self.facts.context
        ids = [end, *self._tokenizer.encode(prompt, add_special_tokens=False).ids]
        if len(ids) > context:
            raise ValueError(
                f"prompt must have at most {context - 1} tokens, as the model sees {context} with "
                f"the end token before it, got {len(ids) - 1}"
            )
        if most is not None and most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        (written,) = generate(
            self.network.network,
            [torch.tensor(ids)],
            end=end,
            context=context,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            greedy=greedy,
            most=most,
        )
        own = [token for token in written.tolist() if token != end]
        text: str = self._tokenizer.decode(own, skip_special_tokens=True)
        return text


def _check_text(text: object, must: str) -> None:
    """Raise TypeError for what is no text, ValueError for half a character in it."""
    if not isinstance(text, str):
        raise TypeError(f"{must}, got {type(text).__name__}")
    if half := next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None):
        raise ValueError(f"{must} in Unicode, got half a character, {half!r}")


class NextToken(nn.Module):
    """A language model as a classifier of the next token.

    Args:
        network: Language model from tokens to logits of each position.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[batch, vocabulary]` after padded texts `[batch, length]`."""
        last = (tokens != PADDING).sum(dim=1) - 1
        logits = take_logits(self.network(tokens.clamp(min=0)), "model")
        return logits[torch.arange(len(tokens), device=tokens.device), last]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors of the language model by its own names."""
        return self.network.state_dict(*args, **kwargs)


def load_language_model(checkpoint: str) -> TextPredictor:
    """Return a language model in eval mode.

    Args:
        checkpoint: Its file.

    Raises:
        ValueError: It is damaged, or its network cannot be made.
    """
    check_installed()
    tensors, facts = open_checkpoint(checkpoint, NetworkFacts)
    _check_facts(checkpoint, facts)
    network = rebuild(checkpoint, tensors, facts)
    return TextPredictor(NextToken(network).eval(), facts)


def _check_facts(checkpoint: str, facts: NetworkFacts) -> None:
    """Raise ValueError for a tokenizer or an end token that the outputs are not of."""
    try:
        size = vocabulary_of(read_tokenizer(facts.tokenizer))
        if size > facts.vocabulary:
            raise ValueError(f"its tokenizer must have {facts.vocabulary} tokens, got {size}")
        if not 0 <= facts.end < facts.vocabulary:
            raise ValueError(f"its end token must be in [0, {facts.vocabulary}), got {facts.end}")
    except ValueError as error:
        raise ValueError(f"{checkpoint} cannot be rebuilt: {error}") from None


def load_mean(
    checkpoints: Sequence[str], *, average: Average, weights: Sequence[float] | None
) -> TextPredictor:
    """Return the average of language models of one tokenizer.

    Args:
        checkpoints: File of each.
        average: What is averaged.
        weights: Weight of each; all alike when not given.

    Raises:
        ValueError: One is damaged, of another tokenizer, or its network cannot be made.
    """
    members = [load_language_model(checkpoint) for checkpoint in checkpoints]
    facts = members[0].facts
    if any(
        (m.facts.tokenizer, m.facts.context) != (facts.tokenizer, facts.context) for m in members
    ):
        raise ValueError(f"{checkpoints[0]} must have tokenizer and context of all others")
    networks = [member.network for member in members]
    return TextPredictor(Averaged(networks, average, weights).eval(), facts)
