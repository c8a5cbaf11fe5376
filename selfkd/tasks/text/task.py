"""The task of predicting the next token of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfkd.analysis.verdicts import short
from selfkd.config import TERMS, CheckpointConfig, ModelConfig, choices_of_terms
from selfkd.config.schema import HF, TRAINED_TOKENIZER
from selfkd.config.tasks import sampled_faults
from selfkd.deployment.interface import Interface
from selfkd.distill.loss_names import describe_terms
from selfkd.losses import Average
from selfkd.models import parameters_count
from selfkd.results import Diagnostics, Facts, Row, Unseen, to_row
from selfkd.soft_targets.manifest import Manifest, row_bytes, rows_of_shard
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import link
from selfkd.storage.remote import as_path
from selfkd.tasks.common import (
    Averaged,
    check_init,
    describe_cached,
    named_networks,
    optimizer_of,
    spread,
)
from selfkd.tasks.task import SPLITS, Pool, Split
from selfkd.tasks.text import evaluate
from selfkd.tasks.text.cached import caches_logits
from selfkd.tasks.text.export import FOLDER, export_model
from selfkd.tasks.text.networks import EVAL_VALUES, TextNetworks
from selfkd.tasks.text.pretrained import check_causal, folder_hash
from selfkd.tasks.text.terms import try_terms
from selfkd.tasks.text.tokenizer import has_tokens_of
from selfkd.tasks.text.train import train_language_model
from selfkd.tasks.text.transfer import check_text_leaks
from selfkd.tasks.text.write import WrittenText
from selfkd.training.trial import Trial

METRICS = (
    "val_nll",
    "val_token_accuracy",
)  # of what training reports, what is measured on validation
MATCHED = "val_exact_match"  # of examples as well
FURTHER = ("perplexity", "bits_per_byte", "token_accuracy")
OF_TEACHER = ("agreement", "kl", "own_nll", "draft_acceptance")
OF_SAMPLES = ("distinct_1", "distinct_2", "distinct_3", "unended")


class TextTask(TextNetworks):
    """The task of a config; see `selfkd.tasks.task.Task`. A row, or item, is a token."""

    def check(self, teachers: Sequence[Mapping[str, Any]] = ()) -> Facts:
        """Make the config's networks; return the facts of them and of the text.

        Args:
            teachers: Networks that may teach, with which the further terms of the loss are tried.

        Raises:
            ValueError: They do not fit; says what must be otherwise.
        """
        config, data, train = self.config, self.data, self.config.train
        metrics = (*METRICS, MATCHED) if self.data.examples["test"] else METRICS
        if config.search.metric not in metrics:
            only = "" if MATCHED in metrics else f" ({MATCHED} is of prompts and completions)"
            raise ValueError(
                f"search.metric must be one of {', '.join(metrics)}, got "
                f"{config.search.metric}{only if config.search.metric == MATCHED else ''}"
            )
        if config.write.keep == "right" and not data.examples["train"]:
            raise ValueError(
                f"write.keep must be all without completions to compare with, got right and "
                f"data.name {data.name}"
            )
        models = named_networks(config)
        networks = {name: self.make(model) for name, model in models.items()}
        weights = dict[str, str]()
        for name, model in models.items():
            weights |= self._check_folder(model, networks[name])
        for model in config.members.models:
            weights |= self._check_folder(model, self.make(model))
        optimizer_of(networks["student"], train)
        sizes = {name: parameters_count(network) for name, network in networks.items()}
        check_init(self, teachers)
        if any(choices := choices_of_terms(config)):
            self._try_terms(networks["student"], teachers, choices)
        metric = self._metric
        matched = metric == "exact_match"
        further = (*(["exact_match"] if self.data.examples["test"] else []), "nll", *FURTHER)
        manifest = self.manifest("", {})
        notes = list(self._check_cached(manifest))
        prints = {str(split): own for split, own in data.fingerprints.items()}
        if (transfer := self.transfer) is not None:
            notes.append(check_text_leaks(transfer, config.data, config.seed, data))
            prints["transfer"] = transfer.fingerprint
        return Facts(
            items={split: len(tokens) for split, tokens in data.splits.items()},
            unit="tokens",
            items_an_input=data.context,
            metric=metric,
            mode="max" if matched else "min",
            further=tuple(name for name in (*further, *OF_TEACHER, *OF_SAMPLES) if name != metric),
            counts={
                split: min(len(data.examples[split]), evaluate.CHECKED)
                for split in SPLITS
                if matched
            },
            counted="prompts" if matched else "",
            outputs=data.vocabulary,
            parameters=sizes,
            prompts=data.splits["train"].windows,
            fingerprints=prints,
            transfer=0 if transfer is None else len(transfer.tokens),
            weights=weights,
            export=FOLDER,
            cached=describe_cached(manifest) if caches_logits(config) else None,
            fixed=("distill.temperature",) if self.samples is not None else (),
            notes=(data.note, *notes),
        )

    def _try_terms(
        self,
        student: nn.Module,
        teachers: Sequence[Mapping[str, Any]],
        choices: Sequence[Sequence[Mapping[str, Any]]],
    ) -> None:
        """Try further terms of the loss with networks that may teach.

        Raises:
            ValueError: One cannot be computed, or needs logits that are not cached.
        """
        found = [
            self.load(row["checkpoint"])[0]
            if "checkpoint" in row
            else self.make(ModelConfig(name=row["name"], args=row["args"]))
            for row in teachers
        ]
        try_terms(self, student.eval(), found, choices)
        for terms in choices:
            cached = terms and not any(term.get("student") for term in terms)
            if cached and self.samples is not None and not self.config.distill.live:
                raise ValueError(
                    f"{TERMS}: {describe_terms(terms)} need all logits of the teacher, of which "
                    f"{self.samples} samples a token are cached: set distill.live=true"
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

    @property
    def _metric(self) -> str:
        """Metric that models are compared by: exact match where it is chosen by, or exact.

        Of prompts and completions of any text it is NLL: few open texts are matched exactly.
        """
        matched = self.config.search.metric == MATCHED or self.data.name == "arithmetic"
        return "exact_match" if matched and self.data.examples["test"] else "nll"

    def _check_cached(self, manifest: Manifest) -> Iterator[str]:
        """Yield what is to be said of the cached teacher logits.

        Raises:
            ValueError: Samples are cached of themselves, which other settings cannot go with.
        """
        if not caches_logits(self.config):
            return
        total = short(manifest.images * manifest.row_bytes)
        note = f"teacher logits: {manifest.words} a token, {total}B a teacher"
        if self.samples is not None and self.config.targets.samples is None:
            why = f"as all logits of {manifest.classes:,} tokens would take " + short(
                manifest.images * row_bytes(manifest.classes)
            )
            of = (
                f"{manifest.words} are cached of a token, {why}B: targets.top_k=N for the N largest"
            )
            if found := list(sampled_faults(self.config, {}, of)):
                raise ValueError("\n".join(found))
            note += f", {why}B; T is 1 and not searched"
        yield note

    def import_weights(self, source: CheckpointConfig, save: Path) -> str | None:
        """Save the network of a file that selfkd wrote as a checkpoint.

        Raises:
            ValueError: The file is from elsewhere, or not of this network or this data.
        """
        path = as_path(source.path)
        try:
            facts = self.load(source.path)[1]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"weights of task text must be a file that selfkd has written for this data, got "
                f"{path} ({error}): or give the folder of a run"
            ) from None
        wanted = {"name": source.model, "args": dict(source.args)}
        if facts.model != wanted:
            raise ValueError(f"{path} must be the network {wanted}, and is {facts.model}")
        link(path, save)
        return None

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

    def predict(self, checkpoint: str, split: Split) -> Tensor:
        """Return the logits of a checkpoint, one row a token that is scored."""
        return self.logits(self.load(checkpoint)[0], split)

    def predict_batches(
        self, checkpoint: str, items: range, *, view: int = 0, of: Pool = "train"
    ) -> Iterator[Tensor]:
        """Yield the logits of a checkpoint for rows of the training text, to be cached.

        Args:
            checkpoint: File of the model.
            items: Rows, one a token.
            view: Number of the view of the text, of which there is one.
            of: Whether the rows are those of training, or of the transfer set.
        """
        return self.batches(self.load(checkpoint)[0], of, items)

    def predict_with(self, network: nn.Module, split: Split, *, like: str | None = None) -> Tensor:
        """Return the logits of a network that was made for this text."""
        return self.logits(network, split)

    def manifest(self, teacher: str, origin: Mapping[str, Any], *, of: Pool = "train") -> Manifest:
        """Return the manifest of a teacher's cached logits, one row a token.

        Shards are of whole windows where these have a length.
        """
        each = row_bytes(self.data.vocabulary, top_k=self.top_k, samples=self.samples)
        window = 1 if self.data.splits["train"].starts is not None else self.data.context
        tokens, fingerprint = self.pool(of)
        return Manifest(
            teacher=teacher,
            data=self.key_of(fingerprint),
            fingerprint=fingerprint,
            recipe={},
            views=1,
            images=len(tokens),
            classes=self.data.vocabulary,
            top_k=self.top_k,
            samples=self.samples,
            shard_size=rows_of_shard(self.config.targets.shard_size, each, multiple=window),
            origin=dict(origin),
        )

    def write(self, checkpoint: str, root: Path, *, shard: int, run: Path) -> Row:
        """Write text by a teacher on the training prompts of a shard, unless it is there."""
        state, found = WrittenText(self, root).write(checkpoint, shard, run=run)
        return {"state": state, **to_row(found)}

    # --- deployment ---

    def interface(self) -> Interface:
        """Return what a network of this text takes and gives when it is exported."""
        context = self.data.context
        most = max(1, EVAL_VALUES // (context * self.data.vocabulary))
        return Interface(
            input="tokens",
            axes={0: "batch", 1: "length"},
            longest={"length": context},
            timed=(1, min(most, 128)),
        )

    def combined(
        self,
        checkpoints: Sequence[str],
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> nn.Module:
        """Return the network of a checkpoint, or the average of several as one."""
        first, *others = [self.load(checkpoint)[0] for checkpoint in checkpoints]
        return Averaged([first, *others], average, weights) if others else first

    def inputs(self, split: Split, most: int, *, like: str | None = None) -> Tensor:
        """Return windows of tokens `[items, context]`, padded at their ends."""
        tokens = self.data.splits[split]
        return tokens.inputs(torch.tensor(spread(tokens.windows, most)))

    def calibration(self, most: int, *, like: str | None = None) -> None:
        """Return nothing: ranges are measured at each prediction."""

    # --- evaluation ---

    def evaluate(
        self,
        logits: Mapping[Split, Tensor],
        networks: Iterable[nn.Module] = (),
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> dict[str, float]:
        """Return nll, perplexity, bits_per_byte and token_accuracy of each split.

        Of examples also exact_match and, where there are any, the share of texts without an end
        (unended), if the networks are given that write them.
        """
        found: dict[str, float] = {}
        members = list(networks) if any(self.data.examples[split] for split in logits) else []
        for split, own in logits.items():
            measured = evaluate.measure(split, own, self.data.splits[split])
            matched = evaluate.measure_matches(
                self.data, split, *members, average=average, weights=weights
            )
            by_match = self._metric == "exact_match"
            found |= {**matched, **measured} if by_match else {**measured, **matched}
        return found

    def fidelity(self, logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
        """Return agreement, KL and draft acceptance of a student and its teacher on test."""
        return evaluate.fidelity(logits, teacher_logits)

    def measure_samples(
        self, checkpoint: str, teachers: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Return own NLL and distinct n-grams of what a model writes after test prompts.

        What a model without a teacher writes is scored by itself: the own NLL of a student that
        writes the same.

        Args:
            checkpoint: File of the model.
            teachers: `checkpoint`, perhaps `weight`, of each of its teachers.
        """
        network = self.load(checkpoint)[0].eval()
        weights = [teacher["weight"] for teacher in teachers if "weight" in teacher]
        return evaluate.measure_samples(
            network,
            [self.load(teacher["checkpoint"])[0].eval() for teacher in teachers] or [network],
            self.data,
            seed=self.config.seed,
            average=self.config.distill.average,
            weights=weights or None,
        )

    def hits(
        self,
        logits: Tensor,
        split: Split,
        networks: Iterable[nn.Module] = (),
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> Tensor | None:
        """Return for each prompt whether its text is right; None where models are compared by NLL.

        Tokens of a text depend on each other, and a test of items does not hold for them. Without
        networks no text is generated, and NLL is all that can be compared.
        """
        members = list(networks)
        if self._metric != "exact_match" or not members:
            return None
        return evaluate.match(self.data, split, members, average=average, weights=weights).right

    def scores(self, logits: Tensor, split: Split, networks: Iterable[nn.Module] = ()) -> Tensor:
        """Return the NLL of each window, as its part of the mean over all tokens.

        Where models are compared by exact match, 1 of each prompt whose text is right, else 0.
        """
        hits = self.hits(logits, split, networks)
        if hits is not None:
            return hits.double()
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
