"""The task of predicting the next token of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.config import CheckpointConfig, ModelConfig
from selfkd.config.schema import HF, TRAINED_TOKENIZER
from selfkd.models import parameters_count
from selfkd.results import Diagnostics, Facts, Row, Unseen
from selfkd.soft_targets.manifest import Manifest
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks.common import optimizer_of
from selfkd.tasks.task import Split
from selfkd.tasks.text import evaluate
from selfkd.tasks.text.export import FOLDER, export_model
from selfkd.tasks.text.networks import TextNetworks
from selfkd.tasks.text.pretrained import check_causal, folder_hash
from selfkd.tasks.text.tokenizer import has_tokens_of
from selfkd.tasks.text.train import train_language_model
from selfkd.training.trial import Trial

METRICS = (
    "val_nll",
    "val_token_accuracy",
)  # of what training reports, what is measured on validation


class TextTask(TextNetworks):
    """The task of a config; see `selfkd.tasks.task.Task`. A row, or item, is a token."""

    def check(self) -> Facts:
        """Make the config's networks; return the facts of them and of the text.

        Raises:
            ValueError: They do not fit; says what must be otherwise.
        """
        config, data, train = self.config, self.data, self.config.train
        if config.search.metric not in METRICS:
            raise ValueError(
                f"search.metric must be one of {', '.join(METRICS)}, got {config.search.metric}"
            )
        networks = {
            "model": self.make(config.model),
            "student": self.make(config.student or config.model),
        }
        weights = self._check_folder(config.model, networks["model"])
        if config.student is not None:
            weights |= self._check_folder(config.student, networks["student"])
        for model in config.members.models:
            weights |= self._check_folder(model, self.make(model))
        optimizer_of(networks["student"], train)
        sizes = {name: parameters_count(network) for name, network in networks.items()}
        if train.init == "teacher" and sizes["model"] != sizes["student"]:
            raise ValueError("train.init must be fresh when student differs from model")
        if train.init == "teacher" and (config.student or config.model).args.get("lora"):
            raise ValueError("train.init must be fresh with lora, whose adapters begin anew")
        return Facts(
            items={split: len(tokens) for split, tokens in data.splits.items()},
            unit="tokens",
            items_an_input=data.context,
            metric="nll",
            mode="min",
            further=("perplexity", "bits_per_byte", "token_accuracy"),
            outputs=data.vocabulary,
            parameters=sizes,
            fingerprints={str(split): mark for split, mark in data.fingerprints.items()},
            weights=weights,
            export=FOLDER,
            notes=(data.note,),
        )

    def _check_folder(self, model: ModelConfig, network: nn.Module) -> dict[str, str]:
        """Check the model of a folder against this text; return the folder's hash by its path.

        Raises:
            ValueError: It has another tokenizer, or is not causal.
        """
        if model.name != HF:
            return {}
        path, fresh = str(model.args["path"]), bool(model.args.get("fresh"))
        if not fresh and not has_tokens_of(path, self.data.tokenizer):
            raise ValueError(
                f"data.tokenizer must be that of the model of {path}, whose tokens its outputs "
                f"are, got {self.config.data.tokenizer}: data.tokenizer={path}; a teacher of "
                "another tokenizer is distilled from by text that it writes"
            )
        check_causal(network, path)
        return {path: folder_hash(path, weights=not fresh)}

    def export(self, checkpoint: str, folder: Path, card: str) -> None:
        """Write a model as a folder that `AutoModelForCausalLM.from_pretrained` opens.

        Args:
            checkpoint: File of the model.
            folder: Folder to write, whose parent exists.
            card: Text of its card, as Markdown.
        """
        tokenizer = self.config.data.tokenizer
        export_model(
            folder,
            self.load(checkpoint)[0].cpu(),
            tokenizer=self.data.tokenizer,
            end=self.data.end,
            context=self.data.context,
            card=card,
            source=None if TRAINED_TOKENIZER.fullmatch(tokenizer) else tokenizer,
        )

    def import_weights(self, source: CheckpointConfig, save: Path) -> str | None:
        """Refuse weights from elsewhere.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"weights from elsewhere are only imported with task images, got {source.path}: "
            "give the folder of a run"
        )

    def digest(self, checkpoint: str) -> str:
        """Return the hash that a checkpoint's logits are cached under."""
        return str(load_tensors(as_path(checkpoint))[1]["hash"])

    def networks(self, checkpoint: str) -> Iterator[nn.Module]:
        """Yield the network of a checkpoint."""
        yield self.load(checkpoint)[0]

    def refresh(self, network: nn.Module) -> None:
        """Do nothing: no layer has statistics of its inputs."""

    def example(self, items: int) -> Tensor:
        """Return inputs of so many windows."""
        return torch.zeros((items, self.data.context), dtype=torch.int64, device=self.device)

    # --- training and predicting ---

    def train(self, trial: Trial, **options: Any) -> Iterator[Row]:
        """Train a language model; see `selfkd.tasks.text.train.train_language_model`."""
        return train_language_model(self, trial, **options)

    def predict(
        self,
        checkpoint: str,
        split: Split,
        *,
        view: int | None = None,
        items: range | None = None,
    ) -> Tensor:
        """Return the logits of a checkpoint, one row a token.

        Args:
            checkpoint: File of the model.
            split: Split that is predicted.
            view: View of the text, of which there is one.
            items: Rows that are predicted; all when not given.
        """
        return self.logits(self.load(checkpoint)[0], split, items)

    def predict_with(self, network: nn.Module, split: Split) -> Tensor:
        """Return the logits of a network that was made for this text."""
        return self.logits(network, split, None)

    def manifest(self, teacher: str, origin: Mapping[str, Any]) -> Manifest:
        """Return the manifest of a teacher's cached logits, one row a token."""
        return Manifest(
            teacher=teacher,
            data=self.data_key,
            fingerprint=self.fingerprint,
            recipe={},
            views=1,
            images=len(self.data.splits["train"]),
            classes=self.data.vocabulary,
            top_k=self.config.targets.top_k,
            shard_size=self.config.targets.shard_size,
            origin=dict(origin),
        )

    # --- evaluation ---

    def evaluate(self, logits: Mapping[Split, Tensor]) -> dict[str, float]:
        """Return nll, perplexity, bits_per_byte and token_accuracy of each split."""
        found: dict[str, float] = {}
        for split, own in logits.items():
            found |= evaluate.measure(split, own, self.data.splits[split])
        return found

    def hits(self, logits: Tensor, split: Split) -> Tensor:
        """Return for each row whether its token is predicted."""
        return logits.argmax(dim=-1) == self.labels(split)

    def scores(self, logits: Tensor, split: Split) -> Tensor:
        """Return the NLL of each window, as its part of the mean over all tokens."""
        return evaluate.window_nll(logits, self.data.splits[split])

    def unseen(self, logits: Mapping[Split, Tensor]) -> Unseen | None:
        """Return None: students are trained on all of the training text."""
        return None

    def diagnose(
        self, logits: Mapping[Split, Tensor], teacher_logits: Mapping[Split, Tensor]
    ) -> dict[str, Diagnostics]:
        """Return calibration, and fidelity to the teacher where there is one, of each split."""
        return {
            split: evaluate.diagnosis(own, self.labels(split), teacher_logits.get(split))
            for split, own in logits.items()
        }

    def pictures(self, split: Split, items: Sequence[int]) -> list[bytes]:
        """Return no pictures: tokens have none."""
        return []

    def confusable(self, checkpoint: str, clusters: int) -> list[Sequence[int]]:
        """Refuse specialists, which are of classes.

        Raises:
            ValueError: Always.
        """
        raise ValueError("specialists are only with task images")
