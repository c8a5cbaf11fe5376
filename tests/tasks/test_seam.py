"""A second task, of next letters: what is above tasks knows the protocol and metric names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine import Recorder, make_run
from torch import Tensor, nn

from selfkd.cli.tables import chosen_table, summary_table
from selfkd.config import CheckpointConfig, Config, ModelConfig, Tree, from_tree, load_config
from selfkd.distill.distiller import Distiller
from selfkd.experiments.ensemble import compress
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.study import compare_arms
from selfkd.reporting.page import write_report
from selfkd.results import Diagnostics, Facts, Row, Unseen
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.store import open_store
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.tasks.task import Split, Task
from selfkd.training.trial import Trial

SIZES: dict[Split, int] = {"train": 300, "val": 80, "test": 90}
LETTERS = 8
SETTINGS = [
    "model={name: bigram}",
    "train={epochs: 2, lr: 1.0, batch_size: 30}",
    "search={trials: 2, metric: val_perplexity, mode: min}",
    "confirm.seeds=3",
]


class Letters:
    """The task of predicting the next letter from the last one: the more often seen, the surer."""

    evaluated: tuple[Split, ...] = ("test",)
    device = "cpu"

    def __init__(self, tree: Tree) -> None:
        self.config: Config = from_tree(tree)
        generator = torch.Generator().manual_seed(self.config.seed)
        odds = torch.rand((LETTERS, LETTERS), generator=generator) ** 4
        self.items: dict[Split, tuple[Tensor, Tensor]] = {}
        for split, count in SIZES.items():
            last = torch.randint(LETTERS, (count,), generator=generator)
            following = odds[last].multinomial(1, generator=generator)[:, 0]
            self.items[split] = last, following
        train = torch.stack(self.items["train"]).numpy().tobytes()
        self.fingerprint = hashlib.sha256(train).hexdigest()[:16]
        self.data_key = data_key(self.fingerprint, {})

    def check(self) -> Facts:
        return Facts(
            items={str(split): count for split, count in SIZES.items()},
            unit="letters",
            metric="perplexity",
            mode="min",
            outputs=LETTERS,
            parameters={"model": LETTERS**2, "student": LETTERS**2},
            fingerprints={"train": self.fingerprint},
        )

    def make(self, model: ModelConfig) -> nn.Module:
        return nn.Embedding(LETTERS, LETTERS)

    def save(
        self, path: Path, network: nn.Module, model: ModelConfig, more: Mapping[str, Any]
    ) -> str:
        facts = {"model": {"name": model.name, "args": model.args}, **more}
        return save_tensors(path, network.state_dict(), facts)

    def load(self, checkpoint: str) -> tuple[nn.Module, dict[str, Any]]:
        tensors, facts = load_tensors(Path(checkpoint))
        network = self.make(ModelConfig.of_checkpoint(facts["model"]))
        network.load_state_dict(tensors)
        return network, facts

    def import_weights(self, source: CheckpointConfig, save: Path) -> None:
        raise NotImplementedError

    def digest(self, checkpoint: str) -> str:
        return str(self.load(checkpoint)[1]["hash"])

    def networks(self, checkpoint: str) -> Iterator[nn.Module]:
        yield self.load(checkpoint)[0]

    def refresh(self, network: nn.Module) -> None:
        pass

    def example(self, items: int) -> Tensor:
        return torch.zeros(items, dtype=torch.int64)

    def train(self, trial: Trial, **options: Any) -> Iterator[Row]:
        torch.manual_seed(trial.seed)
        network, distill, train = self.make(trial.model), self.config.distill, self.config.train
        loss = Distiller()
        if trial.teachers:
            hashes = [teacher["hash"] for teacher in trial.teachers]
            targets = open_store(trial.targets, hashes, data=self.data_key)
            settings = {"temperature": distill.temperature, "alpha": distill.alpha}
            loss = Distiller(targets=targets, **settings)
        optimizer = torch.optim.SGD(network.parameters(), lr=train.lr)
        inputs, labels = self.items["train"]
        for epoch in range(1, train.epochs + 1):
            for index in torch.randperm(len(labels)).split(train.batch_size):
                terms = loss(network(inputs[index]), labels[index], index=index)
                optimizer.zero_grad()
                terms["loss"].backward()
                optimizer.step()
            row: Row = {"epoch": epoch, "seconds": 0.1 * epoch}
            row |= self.evaluate({"val": self.predict_with(network, "val")})
            if epoch == train.epochs:
                facts = {"stage": trial.stage, "seed": trial.seed}
                row["hash"] = self.save(trial.path, network, trial.model, facts)
                row["checkpoint"] = trial.path.name
            yield row

    def predict(
        self,
        checkpoint: str,
        split: Split,
        *,
        view: int | None = None,
        items: range | None = None,
    ) -> Tensor:
        logits = self.predict_with(self.load(checkpoint)[0], split)
        return logits if items is None else logits[items.start : items.stop]

    @torch.no_grad()
    def predict_with(self, network: nn.Module, split: Split) -> Tensor:
        logits: Tensor = network(self.items[split][0])
        return logits

    def manifest(self, teacher: str, origin: Mapping[str, Any]) -> Manifest:
        return Manifest(
            teacher=teacher,
            data=self.data_key,
            fingerprint=self.fingerprint,
            recipe={},
            views=1,
            images=SIZES["train"],
            classes=LETTERS,
            shard_size=self.config.targets.shard_size,
            origin=dict(origin),
        )

    def labels(self, split: Split) -> Tensor:
        return self.items[split][1]

    def evaluate(self, logits: Mapping[Split, Tensor]) -> dict[str, float]:
        return {
            f"{split}_perplexity": float(F.cross_entropy(own, self.labels(split)).exp())
            for split, own in logits.items()
        }

    def hits(self, logits: Tensor, split: Split) -> Tensor:
        return logits.argmax(dim=-1) == self.labels(split)

    def unseen(self, logits: Mapping[Split, Tensor]) -> Unseen | None:
        return None

    def diagnose(
        self, logits: Mapping[Split, Tensor], teacher_logits: Mapping[Split, Tensor]
    ) -> dict[str, Diagnostics]:
        return {}

    def pictures(self, split: Split, items: Sequence[int]) -> list[bytes]:
        return []

    def confusable(self, checkpoint: str, clusters: int) -> list[Sequence[int]]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_task(tree: Tree) -> Task:
        return Letters(tree)

    for module in ("jobs", "evaluate", "ensembling"):
        monkeypatch.setattr(f"selfkd.worker.{module}.make_task", make_task)
    monkeypatch.setattr("selfkd.worker.ensembling.TIMED_SECONDS", 0.001)


def start(tmp_path: Path, *settings: str) -> tuple[Config, RunFolder]:
    config = load_config(settings=[*SETTINGS, *settings])
    return config, RunFolder.create(tmp_path / "run", config)


def test_it_is_born_again_confirmed_and_reported(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=1", "targets.shard_size=128", "controls=[seeds]")
    events = Recorder()
    summary = born_again(make_run(config, folder, events=events))
    first, second = summary.generations
    assert first.metrics.keys() == {"val_perplexity", "test_perplexity"}
    assert second.metrics.keys() == {"val_perplexity", "test_perplexity", "agreement"}
    assert events.states == ["written"] * 3
    confirmed = summary.confirmations[1]
    assert confirmed.metric == "test_perplexity"
    assert summary.verdict is not None
    said = " ".join(summary.verdict.sentences)
    assert "%" not in said
    assert "points" not in said
    assert "test letters" in said
    head = chosen_table(summary, folder.facts.metric).head
    assert head[1:3] == ("val perplexity", "test perplexity")
    head = summary_table(summary, folder.facts.metric).head
    assert re.fullmatch(r"test perplexity, \d seeds", head[1])
    assert "val_perplexity" in write_report(folder.path).read_text()


def test_the_best_trial_has_the_least_perplexity(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=0", "confirm.seeds=0", "search.trials=4")
    (result,) = born_again(make_run(config, folder)).generations
    paths = folder.path.glob("generation_000/trial_*/result.json")
    found = [re.findall(r'"val_perplexity": ([\d.]+)', path.read_text())[-1] for path in paths]
    assert result.metrics["val_perplexity"] == min(map(float, found))


def test_an_ensemble_becomes_one_model(tmp_path: Path) -> None:
    config, folder = start(
        tmp_path, "members={count: 3, compare: [greedy_soup, weighted]}", "confirm.seeds=2"
    )
    summary = compress(make_run(config, folder))
    single, _, probabilities, *_, student = summary.rows
    assert probabilities.metrics["test_perplexity"] < single.metrics["test_perplexity"]
    assert student.runs
    assert "in test perplexity over 2 fresh seeds" in summary.verdict.sentences[0]


def test_arms_are_compared(tmp_path: Path) -> None:
    arms = "study.arms={short: {set: {train.epochs: 1}}, long: {set: {train.epochs: 8}}}"
    config, folder = start(tmp_path, arms)
    summary = compare_arms(make_run(config, folder))
    (found,) = summary.contrasts
    assert found.difference is not None
    assert found.difference.high is not None
    assert found.difference.high < 0
    assert summary.verdict is not None
    assert summary.verdict.sentences[0].startswith("long is better than short: -")
