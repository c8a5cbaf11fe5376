"""The text of a config and its networks: made, saved, loaded, run on windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from selfkd.config import Config, ModelConfig, Tree, from_tree
from selfkd.config.schema import HF
from selfkd.config.speed import with_speed
from selfkd.distill.outputs import take_logits
from selfkd.losses.moving import send, valid_rows
from selfkd.models import parameters_count
from selfkd.results.row import ROW, Row
from selfkd.soft_targets.manifest import data_key
from selfkd.storage.checkpoint import save_tensors
from selfkd.tasks.common import check_class_mean, check_top_k, open_checkpoint
from selfkd.tasks.task import SPLITS, ModelFacts, Pool, Split
from selfkd.tasks.text import check_installed
from selfkd.tasks.text.cached import choose_samples
from selfkd.tasks.text.data import IGNORED, Tokens, load_text
from selfkd.tasks.text.models import make_language_model, prepare
from selfkd.tasks.text.pretrained import (
    architecture_of,
    check_architecture,
    check_context,
    check_folder,
    make_architecture,
    merged,
)
from selfkd.tasks.text.tokenizer import read_tokenizer
from selfkd.tasks.text.transfer import TransferText, load_transfer_text
from selfkd.training.device import precision_of, prepare_device
from selfkd.training.predict import autocast, halving

EVAL_VALUES = 2**22
"""Most logits a batch of the evaluation."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class NetworkFacts(ModelFacts):
    """Metadata of a language model's checkpoint."""

    vocabulary: int
    """Number of tokens."""
    context: int
    """Number of tokens that it sees at most."""
    end: int
    """Id of the end token."""
    tokenizer: str
    """Text of its tokenizer.json."""
    architecture: Row | None = None
    """Config of a model of transformers, by which it is made without the folder it came from."""


class TextNetworks:
    """The text of a config, and networks for it."""

    def __init__(self, tree: Tree) -> None:
        check_installed()
        self.config: Config = with_speed(from_tree(tree))
        self.device = prepare_device(self.config)
        self.precision = precision_of(self.config.train.amp, self.device)
        models = [self.config.model, *self.config.students]
        for path in [model.args.get("path") for model in models if model.name == HF]:
            if path in (None, self.config.data.tokenizer):  # said of the model, not its tokenizer
                check_folder(path, weights=False)
        self.data = load_text(replace(self.config.data, transfer=None), self.config.seed)
        self.fingerprint = self.data.fingerprints["train"]
        self.evaluated: tuple[Split, ...] = SPLITS
        self.top_k = check_top_k(self.config, self.data.vocabulary)
        check_class_mean(self.config, self.data.vocabulary)
        rows = len(self.data.splits["train"])
        self.samples = choose_samples(self.config, rows, self.data.vocabulary)
        self.data_key = self.key_of(self.fingerprint)

    def key_of(self, fingerprint: str) -> str:
        """Return the key that teacher logits of a text are cached under."""
        return data_key(fingerprint, {}, top_k=self.top_k, samples=self.samples)

    @cached_property
    def transfer(self) -> TransferText | None:
        """Transfer set that students of teachers are trained on; None where there is none."""
        if self.config.transfer is None or self.config.distill.mode == "traces":
            return None
        return load_transfer_text(self.config.data, self.config.seed)

    def pool(self, of: Pool) -> tuple[Tokens, str]:
        """Return what teacher logits are cached of, and its fingerprint.

        Raises:
            ValueError: There is no transfer set.
        """
        if of == "train":
            return self.data.splits["train"], self.fingerprint
        if self.transfer is None:
            raise ValueError("data.transfer must be given with a weight above 0, got none")
        return self.transfer.tokens, self.transfer.fingerprint

    def labels(self, split: Split) -> Tensor:
        """Return the tokens that the scored rows of a split predict."""
        tokens = self.data.splits[split]
        return tokens.labels[tokens.scored]

    def cached_labels(self) -> Tensor:
        """Return the token that each row of the training text predicts."""
        return self.data.splits["train"].labels

    def output_names(self, outputs: Sequence[int]) -> list[str]:
        """Return tokens as text, in quotes."""
        tokenizer = read_tokenizer(self.data.tokenizer)
        return [repr(tokenizer.decode([n], skip_special_tokens=False)) for n in outputs]

    def make(self, model: ModelConfig) -> nn.Module:
        """Return a fresh network for this text."""
        data = self.data
        return make_language_model(
            model.name, model.args, vocabulary=data.vocabulary, context=data.context
        ).to(self.device)

    def save(
        self, path: Path, network: nn.Module, model: ModelConfig, more: Mapping[str, Any]
    ) -> str:
        """Save a network with what it is loaded by; return its hash."""
        network = merged(network)
        facts = {
            "task": "text",
            "model": {"name": model.name, "args": model.args},
            **({"architecture": architecture_of(network)} if model.name == HF else {}),
            "vocabulary": self.data.vocabulary,
            "context": self.data.context,
            "end": self.data.end,
            "tokenizer": self.data.tokenizer,
            "data": self.data.name,
            "fingerprint": self.fingerprint,
            "parameters": parameters_count(network),
            **more,
        }
        return save_tensors(path, network.state_dict(), facts)

    def load(self, checkpoint: str) -> tuple[nn.Module, NetworkFacts]:
        """Return the network of a checkpoint, and its metadata.

        Raises:
            ValueError: It has another tokenizer or context, or is of no network that can be made.
        """
        tensors, facts = open_checkpoint(checkpoint, NetworkFacts)
        if facts.tokenizer != self.data.tokenizer:
            raise ValueError(
                f"{checkpoint} must have the tokenizer of this run, whose tokens its outputs are: "
                "got another one"
            )
        if facts.context != self.data.context:
            raise ValueError(
                f"{checkpoint} must have data.context {self.data.context}, got {facts.context}"
            )
        return rebuild(checkpoint, tensors, facts).to(self.device), facts

    @torch.no_grad()
    def run(
        self, network: nn.Module, tokens: Tokens, windows: range
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits `[rows, vocabulary]` and labels `[rows]` of windows, without the padding.

        Labels of rows that are not scored are `IGNORED`.

        The network predicts in eval mode and is then put back into its previous mode.
        """
        training = network.training
        network.eval()
        size = max(1, EVAL_VALUES // (tokens.context * self.data.vocabulary))

        def run(left: range, size: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
            for start in range(left.start, left.stop, size):
                batch = torch.arange(start, min(start + size, left.stop))
                with autocast(self.device, self.precision):
                    inputs = send(tokens.inputs(batch), self.device)
                    logits = take_logits(network(inputs), "model")
                valid = tokens.rows(batch) < len(tokens)
                found = valid_rows(logits, valid).float().cpu(), tokens.labels_of(batch)[valid]
                yield len(batch), found

        yield from halving(windows, size, run)
        network.train(training)

    def logits(self, network: nn.Module, split: Split) -> Tensor:
        """Return the logits of the scored rows of a split, float32 on the CPU."""
        tokens = self.data.splits[split]
        found = torch.empty(len(tokens.scored), self.data.vocabulary)
        start = 0
        for logits, labels in self.run(network, tokens, range(tokens.windows)):
            scored = logits[labels != IGNORED]
            found[start : start + len(scored)] = scored
            start += len(scored)
        return found

    def batches(self, network: nn.Module, split: Split | Pool, rows: range) -> Iterator[Tensor]:
        """Yield the logits of rows of a split batch by batch, float32 on the CPU.

        Args:
            network: Language model.
            split: Split whose rows are predicted, or the transfer set.
            rows: Rows that are predicted, whose windows are run whole.
        """
        tokens = self.pool(split)[0] if split == "transfer" else self.data.splits[split]
        windows = tokens.windows_of(rows)
        start = int(tokens.bounds[windows.start])
        for logits, _ in self.run(network, tokens, windows):
            end = start + len(logits)
            yield logits[max(rows.start - start, 0) : len(logits) - max(end - rows.stop, 0)]
            start = end


def rebuild(checkpoint: str, tensors: Mapping[str, Tensor], facts: NetworkFacts) -> nn.Module:
    """Return the network of a checkpoint with its weights.

    What the metadata describe is compared with the tensors before any memory is taken for it.

    Args:
        checkpoint: Name of its file, for messages.
        tensors: Tensors by name.
        facts: Metadata.

    Raises:
        ValueError: The network cannot be made, or has other tensors.
    """
    model = ModelConfig(**facts.model)

    def make() -> nn.Module:
        return make_language_model(
            model.name, model.args, vocabulary=facts.vocabulary, context=facts.context
        )

    try:
        if facts.context < 1:
            raise ValueError(f"context must be at least 1, got {facts.context}")
        if model.name == HF:
            return _rebuild_architecture(tensors, facts)
        most = max([len(tensors), *(size for tensor in tensors.values() for size in tensor.shape)])
        for number in (facts.vocabulary, facts.context, *model.args.values()):
            if isinstance(number, int | float) and number > most:
                raise ValueError(f"sizes must be those of its tensors, got {number}")
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            described = {name: tensor.shape for name, tensor in make().state_dict().items()}
        if described != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError(f"its tensors must be those of {model.name} with {model.args}")
        network = make()
        network.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        first = str(error).splitlines()[:2]
        raise ValueError(f"{checkpoint} cannot be rebuilt: {' '.join(first)}") from None
    return network


def _rebuild_architecture(tensors: Mapping[str, Tensor], facts: NetworkFacts) -> nn.Module:
    """Return a model that came from a folder, which is not read again.

    Raises:
        ValueError: Its config is not there, not of its tensors, or not of its text.
    """
    if facts.architecture is None:
        raise ValueError("it must have the config of its architecture, got none")
    check_architecture(facts.architecture, tensors)
    network = prepare(make_architecture(facts.architecture))
    network.load_state_dict(tensors)
    model: Any = network
    rows = model.get_output_embeddings().weight.shape[0]
    if rows != facts.vocabulary:
        raise ValueError(f"it must have {facts.vocabulary} outputs, got {rows}")
    check_context(network, facts.context, "its model")
    return network
