"""A second task, of next letters: what is above tasks knows the protocol and metric names."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine import Recorder, make_run
from torch import Tensor, nn

from selfkd.analysis.metrics import agreement
from selfkd.cli.tables import chosen_table, summary_table
from selfkd.config import CheckpointConfig, Config, ModelConfig, Tree, from_tree, load_config
from selfkd.distill.distiller import Distiller
from selfkd.experiments.ensemble import compress
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.study import compare_arms
from selfkd.reporting import comparison_page, plain, tables, words
from selfkd.reporting.across_runs import compare
from selfkd.reporting.page import write_report
from selfkd.reporting.read import Run, read_run
from selfkd.results import Diagnostics, Facts, GenerationsSummary, Row, TrialResult, Unseen
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.soft_targets.store import open_store
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.rows import load_row
from selfkd.tasks.task import Pool, Split, Task
from selfkd.tracking import rows
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
    """The task of predicting the next letter from the last one: the more often seen, the surer.

    Models are compared by what they are chosen by: perplexity, or NLL with perplexity beside it.
    """

    evaluated: tuple[Split, ...] = ("test",)
    device = "cpu"
    fixed: tuple[str, ...] = ()

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
        by_nll = self.config.search.metric == "val_nll"
        self.measures = ("nll", "perplexity") if by_nll else ("perplexity",)

    def check(self, teachers: Sequence[Mapping[str, Any]] = ()) -> Facts:
        return Facts(
            items={str(split): count for split, count in SIZES.items()},
            unit="letters",
            metric=self.measures[0],
            mode="min",
            further=self.measures[1:],
            outputs=LETTERS,
            parameters={"model": LETTERS**2, "student": LETTERS**2},
            fingerprints={"train": self.fingerprint},
            fixed=self.fixed,
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

    def export(self, checkpoint: str, folder: Path, card: str) -> None:
        raise NotImplementedError

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

    def predict(self, checkpoint: str, split: Split) -> Tensor:
        return self.predict_with(self.load(checkpoint)[0], split)

    def predict_batches(
        self, checkpoint: str, items: range, *, view: int, of: Pool = "train"
    ) -> Iterator[Tensor]:
        yield from self.predict(checkpoint, "train")[items.start : items.stop].split(50)

    @torch.no_grad()
    def predict_with(self, network: nn.Module, split: Split) -> Tensor:
        logits: Tensor = network(self.items[split][0])
        return logits

    def manifest(self, teacher: str, origin: Mapping[str, Any], *, of: Pool = "train") -> Manifest:
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

    def evaluate(
        self, logits: Mapping[Split, Tensor], networks: Iterable[nn.Module] = (), **options: Any
    ) -> dict[str, float]:
        found = {}
        for split, own in logits.items():
            nll = float(F.cross_entropy(own, self.labels(split)))
            values = {"nll": nll, "perplexity": math.exp(nll)}
            found |= {f"{split}_{name}": values[name] for name in self.measures}
        return found

    def fidelity(self, logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
        return {"agreement": agreement(logits, teacher_logits)}

    def measure_samples(
        self, checkpoint: str, teachers: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        return {}

    def hits(
        self, logits: Tensor, split: Split, networks: Iterable[nn.Module] = (), **options: Any
    ) -> Tensor:
        return logits.argmax(dim=-1) == self.labels(split)

    def scores(self, logits: Tensor, split: Split, networks: Iterable[nn.Module] = ()) -> Tensor:
        return self.hits(logits, split).double()

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


@pytest.fixture(autouse=True, scope="module")
def letters() -> Iterator[None]:
    def make_task(tree: Tree) -> Task:
        return Letters(tree)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("jobs", "evaluate", "ensembling"):
            patch.setattr(f"selfkd.worker.{module}.make_task", make_task)
        patch.setattr("selfkd.worker.ensembling.TIMED_SECONDS", 0.001)
        yield


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


def test_what_a_task_fixes_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "fixed", ("distill.temperature",))
    more = ("rounds=1", "confirm.seeds=0", "search.points=[{distill.temperature: 1}]")
    config, folder = start(tmp_path, *more, "search.trials=3")
    born_again(make_run(config, folder))
    found = [load_row(TrialResult, path) for path in folder.path.glob("generation_001/*/result*")]
    assert [trial.point.keys() for trial in found] == [{"distill.alpha"}] * 3


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


# --- a task whose models are compared by NLL, of which less is better ---

BY_NLL = ("search={metric: val_nll, trials: 3}", "rounds=1")


@pytest.fixture(scope="module")
def by_nll(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs of two generations, the second of ten times as many epochs."""
    found = []
    for epochs in (1, 10):
        place = tmp_path_factory.mktemp("by_nll")
        settings = [each for each in SETTINGS if not each.startswith("search")]
        config = load_config(settings=[*settings, *BY_NLL, f"train.epochs={epochs}"])
        folder = RunFolder.create(place / f"{epochs}_epochs", config)
        born_again(make_run(config, folder))
        found.append(read_run(folder.path))
    return found


def test_less_nll_is_chosen_and_is_better(by_nll: list[Run]) -> None:
    for run in by_nll:
        assert run.get("search.mode") == "min"  # as is known of NLL
        for generation in run.generations:
            assert generation.result is not None
            found = [trial.metrics["val_nll"] for trial in generation.trials]
            assert generation.result.metrics["val_nll"] == min(found)
        means = [sum(g.confirmation.validation) for g in run.generations if g.confirmation]
        assert run.best is not None
        assert run.best.generation == means.index(min(means))
        verdict = run.verdict
        assert verdict is not None
        assert verdict.difference is not None
        assert re.search(r"[+-]\S+ nats \[.+\] in test NLL over 3 fresh", verdict.sentences[0])
        if verdict.outcome != "none":
            assert (verdict.outcome == "better") == (verdict.difference.value < 0)


def test_runs_are_compared_by_nll(by_nll: list[Run]) -> None:
    short, long = by_nll
    found = compare(long, short)
    assert found is not None
    assert found.difference.high is not None
    assert found.difference.high < 0
    assert re.match(r"10_epochs is better than 1_epochs: -\S+ nats \[-\S+, -\S+\]", found.verdict)
    assert "10_epochs is better" in comparison_page.verdicts([short, long])[0]
    assert comparison_page.comparisons_table([found]).head[2] == "test NLL, nats"
    assert comparison_page.runs_table(by_nll).head[5] == "test NLL"
    assert long.facts is not None
    other = replace(long, facts=replace(long.facts, metric="perplexity"))
    assert comparison_page.runs_table([short, other]).rows[1][5].startswith("perplexity ")
    page = comparison_page.comparison_page([short, long])
    assert page.lead is not None
    assert page.lead.text.startswith("NLL on test of the last model of each run: 1_epochs ")
    assert "test_perplexity" in comparison_page.record_fields(by_nll)
    assert comparison_page.records(long)[0]["val_nll"] == long.results[0].metrics["val_nll"]


def test_tables_and_lines_are_of_nll(by_nll: list[Run]) -> None:
    _, run = by_nll
    facts, summary = run.facts, RunFolder(run.path).summary(GenerationsSummary)
    assert facts is not None
    assert summary is not None
    table = summary_table(summary, facts.metric)
    assert table.head[:3] == ("generation", "test NLL, 3 seeds", "vs gen. 0, nats")
    chosen = chosen_table(summary, facts.metric, facts.further)
    assert chosen.head[1:5] == ("val NLL", "test NLL", "perplexity", "agreement")
    nll, perplexity = (run.results[0].metrics[f"test_{name}"] for name in ("nll", "perplexity"))
    assert chosen.rows[0][2:4] == (f"{nll:#.4g}", f"{perplexity:.4g}")
    found = tables.results_table(run).head
    assert found[3:8] == (
        "val NLL",
        "test NLL",
        "fresh seeds",
        "vs gen. 0, nats",
        "vs previous, nats",
    )
    head, *rows_of = plain.short_table(summary)
    assert head[1] == "test NLL"
    assert " nats" in rows_of[1][head.index("gain [95 %]")]
    text = " ".join(words.headlines(run))
    assert re.search(r"The ensemble of all 2 generations has test NLL [\d.]+ nats\.", text)
    assert "right on" not in text
    report = write_report(run.path).read_text()
    for words_of in ("Test NLL over generation 0", "test NLL, less is better", "NLL on validation"):
        assert words_of in report
    assert "accuracy" not in re.sub(r"<script.*?</script>|<style.*?</style>", "", report)


def test_wandb_has_nll_of_trials_and_generations(by_nll: list[Run]) -> None:
    _, run = by_nll
    first, last = run.results
    found = rows.best_and_last([first, last], last, run.metric)
    assert found["best_test_nll"] == last.metrics["test_nll"]
    assert found["best_val_nll"] == last.metrics["val_nll"]
    trials = run.generations[1].trials
    assert rows.trial_summary(trials[0])["trial_val_nll"] == trials[0].metrics["val_nll"]
    best = min(trials, key=lambda trial: rows.trial_rank(trial, metric=run.metric, mode=run.mode))
    assert best.trial == last.trial
    assert rows.validation_summaries(run.metric, run.mode)["val_nll"] == "min"
    confirmed = run.generations[1].confirmation
    assert confirmed is not None
    assert "confirmed/test_nll" in rows.confirmation_row(confirmed)


def test_a_student_keeps_a_share_of_less_nll(tmp_path: Path) -> None:
    settings = [each for each in SETTINGS if not each.startswith("search")]
    more = ("members.count=3", "confirm.seeds=3", "distill={temperature: 1.0, alpha: 1.0}")
    config = load_config(settings=[*settings, *BY_NLL, *more, "search.space={}"])
    folder = RunFolder.create(tmp_path / "run", config, command="ensemble")
    summary = compress(make_run(config, folder))
    room = summary.teacher.metrics["test_nll"] - summary.rows[-2].metrics["test_nll"]
    assert (summary.share is not None) == (room < 0)
    assert "nats" in summary.verdict.sentences[0]
    text = write_report(folder.path).read_text()
    assert "NLL on test, with 95 % intervals" in text
