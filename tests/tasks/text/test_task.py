"""The task of text: tokens as rows, cached logits read token by token, exact resume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from text_trials import make_trial

from selfkd.analysis import metrics
from selfkd.config import Config, load_config, to_tree
from selfkd.results import CachedFormat, Row
from selfkd.soft_targets.shards import write_shard
from selfkd.soft_targets.store import open_store
from selfkd.storage.checkpoint import load_tensors
from selfkd.tasks import make_task
from selfkd.tasks.task import Split
from selfkd.tasks.text.data import _sample, encode_examples, load_text
from selfkd.tasks.text.example import Example
from selfkd.tasks.text.task import TextTask
from selfkd.tasks.text.tokenizer import make_tokenizer
from selfkd.worker.jobs import run_job

TEXT = " ".join(f"the {word} is {word * 2 % 7} of {word % 5}." for word in range(400))
SETTINGS = [
    "data={name: text, context: 8, tokenizer: chars}",
    "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}",
    "train={steps: 12, epochs: 3, batch_size: 4, warmup_steps: 2}",
    "checkpoint={seconds: null, epochs: 1}",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    return tmp_path / "text"


def start(root: Path, *settings: str) -> tuple[Config, TextTask]:
    config = load_config(
        settings=[*SETTINGS, f"data.root={root}", *settings], flags={"task": "text"}
    )
    task = make_task(to_tree(config))
    assert isinstance(task, TextTask)
    return config, task


def with_teacher(root: Path, tmp_path: Path, *settings: str) -> tuple[Config, TextTask, list[Row]]:
    """Return a task with a teacher whose logits are cached."""
    config, task = start(root, "targets.shard_size=1000", *settings)
    trial = make_trial(config, tmp_path / "teacher" / "student.safetensors")
    *_, last = task.train(trial)
    manifest = task.manifest(last["hash"], {})
    for shard in range(manifest.shards):
        logits = task.predict_batches(str(trial.path), manifest.rows(shard))
        write_shard(tmp_path / "targets", manifest, view=0, shard=shard, logits=logits)
    return config, task, [{"hash": last["hash"], "checkpoint": str(trial.path)}]


def test_the_facts_are_of_tokens(root: Path) -> None:
    _, task = start(root)
    facts = task.check()
    # an end token is predicted at the end of each document
    assert sum(facts.items.values()) == len(TEXT) + 3
    assert (facts.unit, facts.metric, facts.mode) == ("tokens", "nll", "min")
    assert facts.outputs == len(set(TEXT)) + 2
    assert "divided by position, 80/10/10 %" in facts.notes[0]
    assert len(set(facts.fingerprints.values())) == 3


def test_fingerprints_cover_context_and_tokenizer(root: Path) -> None:
    digests = {
        start(root, *more)[1].fingerprint
        for more in ([], ["data.context=9"], ["data.tokenizer=bpe:260"], ["seed=0"])
    }
    assert len(digests) == 3


def test_a_tokenizer_is_trained_and_read_again(root: Path, tmp_path: Path) -> None:
    _, task = start(root, "data.tokenizer=bpe:300")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(task.data.tokenizer)
    _, other = start(root, f"data.tokenizer={folder}")
    assert other.data.vocabulary == 300
    assert torch.equal(other.data.splits["test"].ids, task.data.splits["test"].ids)
    tree = json.loads(task.data.tokenizer)
    del tree["model"]["vocab"]["<|endoftext|>"]
    tree["added_tokens"] = []
    folder = tmp_path / "endless"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="must have an end token"):
        start(root, f"data.tokenizer={folder}")


def test_rows_do_not_depend_on_how_they_are_asked_for(root: Path) -> None:
    config, task = start(root)
    torch.manual_seed(0)
    network = task.make(config.model)
    whole = task.predict_with(network, "test")
    assert whole.shape == (len(task.labels("test")), task.data.vocabulary)
    parts = [
        logits
        for n in range(0, len(whole), 13)
        for logits in task.batches(network, "test", range(n, min(n + 13, len(whole))))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    # the second row of the second window, from the two tokens before it in that window
    tokens = task.data.splits["test"].ids[8:10]
    torch.testing.assert_close(network(tokens[None]).logits[0, 1], whole[9])


def test_many_logits_are_measured_on_spread_windows(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, task = start(root)
    torch.manual_seed(0)
    network = task.make(config.model)
    whole, all_tokens = task.predict_with(network, "test"), task.data.splits["test"]
    most = 100
    monkeypatch.setattr("selfkd.tasks.text.data.MOST_LOGITS", most * task.data.vocabulary)
    load_text.cache_clear()
    _, few = start(root)
    load_text.cache_clear()
    tokens = few.data.splits["test"]
    assert f"and {len(tokens.scored)} of the {len(all_tokens):,} tokens of test" in few.data.note
    assert most * 0.8 < len(tokens.scored) <= most
    assert len(few.data.splits["train"]) == len(task.data.splits["train"])
    assert few.fingerprint == task.fingerprint
    assert few.data.fingerprints["test"] != task.data.fingerprints["test"]
    # seven of the eight rows of each window, from the first to the last
    numbers = torch.linspace(0, all_tokens.windows - 1, tokens.windows).long()
    rows = torch.cat([torch.arange(n * 8, min(n * 8 + 8, len(whole)))[:-1] for n in numbers])
    torch.testing.assert_close(few.predict_with(network, "test"), whole[rows])
    assert torch.equal(few.labels("test"), task.labels("test")[rows])
    found = [each.evaluate({"test": each.predict_with(network, "test")}) for each in (task, few)]
    ratio = [each["test_bits_per_byte"] / each["test_nll"] for each in found]
    assert ratio[1] == pytest.approx(ratio[0], rel=0.01)
    assert [len(prompt) for prompt in tokens.prompts([0, 1])] == [2, 2]


def test_many_prompts_are_measured_on_spread_ones(tmp_path: Path) -> None:
    examples = [Example(f"{n} + 1 =", f" {n + 1}") for n in range(50)]
    tokenizer, end = make_tokenizer("chars", [str(each) for each in examples])
    whole = encode_examples(tokenizer, end, examples, 16)
    few, kept = _sample(whole, examples, len(whole.scored) // 5)
    assert len(kept) == few.windows
    assert len(whole.scored) // 6 < len(few.scored) <= len(whole.scored) // 5
    assert (kept[0], kept[-1]) == (examples[0], examples[-1])
    wanted = encode_examples(tokenizer, end, kept, 16)
    assert torch.equal(few.ids, wanted.ids)
    assert torch.equal(few.labels, wanted.labels)
    assert few.bytes == wanted.bytes


def test_metrics_are_of_tokens_and_bytes(root: Path) -> None:
    config, task = start(root)
    logits: dict[Split, torch.Tensor] = {"test": task.predict_with(task.make(config.model), "test")}
    found = task.evaluate(logits)
    nll = float(F.cross_entropy(logits["test"], task.labels("test")))
    tokens = len(task.labels("test"))
    assert found["test_nll"] == pytest.approx(nll)
    assert found["test_perplexity"] == pytest.approx(math.exp(nll))
    assert found["test_bits_per_byte"] == pytest.approx(nll / math.log(2) * tokens / (tokens - 1))
    assert found["test_token_accuracy"] == metrics.accuracy(logits["test"], task.labels("test"))
    assert task.hits(logits["test"], "test") is None
    diagnostics = task.diagnose(logits, logits)["test"].metrics
    assert diagnostics["agreement"] == 1
    assert diagnostics["kl"] == pytest.approx(0, abs=1e-6)
    assert task.pictures("test", [0]) == []
    assert task.unseen(logits) is None


def test_a_student_learns_from_the_cached_tokens(root: Path, tmp_path: Path) -> None:
    config, task, teachers = with_teacher(root, tmp_path, "train.steps=90", "train.batch_size=8")
    rows = list(task.train(make_trial(config, tmp_path / "s" / "student.safetensors", teachers)))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["val_nll"] < rows[0]["val_nll"] < math.log(task.data.vocabulary) + 0.2
    assert rows[-1]["soft_loss"] < rows[0]["soft_loss"]
    assert rows[-1]["hash"] == task.digest(str(tmp_path / "s" / "student.safetensors"))
    # what is stored of a row is the teacher's own, but for a shift
    stored = open_store(tmp_path / "targets", [teachers[0]["hash"]], data=task.data_key)
    found = stored(torch.tensor([1007]), 0)
    (own,) = task.predict_batches(teachers[0]["checkpoint"], range(1007, 1008))
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found.float(), own - own.max(), atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        ["targets.top_k=5"],
        ["targets.samples=64"],
        ["distill.average=logits"],
        ["distill.alpha=0.5", "distill.temperature=2.0"],
    ],
)
def test_targets_of_any_kind_are_read_by_tokens(
    root: Path, tmp_path: Path, settings: list[str]
) -> None:
    config, task, teachers = with_teacher(root, tmp_path, *settings)
    found = []
    for each in (teachers, teachers * 2):  # the mean of twice the same is the same
        if config.targets.top_k is None or len(each) == 1:
            path = tmp_path / f"s{len(each)}" / "student.safetensors"
            *_, last = task.train(make_trial(config, path, each))
            found.append([last["loss"], last["val_nll"]])
    assert found[-1] == pytest.approx(found[0], rel=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["train.ema=0.9", "model.args.dropout=0.1", "train.accumulate=2"],
        ["distill.live=true", "distill.on_policy=0.7", "model.args.dropout=0.1", "train.ema=0.9"],
    ],
)
def test_an_interrupted_training_ends_the_same(
    root: Path, tmp_path: Path, settings: list[str]
) -> None:
    config, task, teachers = with_teacher(root, tmp_path, *settings)
    path = tmp_path / "whole" / "student.safetensors"
    whole = list(task.train(make_trial(config, path, teachers)))
    again = tmp_path / "again" / "student.safetensors"
    for parts in (1, 2):
        rows = task.train(make_trial(config, again, teachers))
        list(islice(rows, parts))
        rows.close()  # type: ignore[attr-defined]
        torch.manual_seed(99)
    resumed = list(task.train(make_trial(config, again, teachers)))
    assert [without_time(row) for row in resumed] == [without_time(row) for row in whole]
    assert task.digest(str(again)) == task.digest(str(path))


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.context=2000"], "data.context must be at most the tokens of each split, got 2000"),
        (["data.tokenizer=bpe:100"], "data.tokenizer must be bpe:N with N from 257"),
        (["data.tokenizer=/no/such"], "data.tokenizer must be bpe:N, chars or a folder"),
        (["model.name=resnet18"], "model.name must be selfkd_gpt or hf with task text"),
        (["model.args.widht=8"], "got 'widht': did you mean width"),
        (["model.args.dropout=a"], r"dropout must be in \[0, 1\], got 'a'"),
        (["model.args.heads=3"], "width must be a multiple of heads"),
        (["search.metric=val_f1"], "search.metric must be one of val_nll, val_token_accuracy"),
        (["targets.top_k=5000"], r"targets.top_k must be in \[1,"),
    ],
)
def test_what_does_not_fit_is_named(root: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(root, *settings)[1].check()


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all logits of a teacher too many."""
    monkeypatch.setattr("selfkd.tasks.text.cached.STORE_BYTES", 10_000)


def test_samples_are_cached_where_all_logits_are_too_many(root: Path, many: None) -> None:
    _, task = start(root)
    facts, whole = task.check(), len(task.data.splits["train"]) * 2 * task.data.vocabulary
    assert facts.cached == CachedFormat(words="8 samples at T = 1", row_bytes=16, shard_size=16_384)
    assert facts.fixed == ("distill.temperature",)
    assert (
        f"as all logits of {facts.outputs} tokens would take {whole / 1000:.0f} kB"
        in (facts.notes[1])
    )
    assert start(root, "targets.samples=8")[1].data_key == task.data_key
    for settings, row_bytes in (
        (["targets.top_k=5"], 5 * 4 + 28),
        (["targets.samples=3"], 6),
        (["targets.top_k=5", "distill.temperature=2"], 48),
    ):
        cached = start(root, *settings)[1].check().cached
        assert cached is not None
        assert cached.row_bytes == row_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill.temperature=2"], "distill.temperature: must be 1, got 2.0: 8 samples at T = 1"),
        (["search.points=[{distill.temperature: 2}]"], "points.0.distill.temperature: must be 1"),
        (["search.space={distill.temperature: {choice: [1, 2]}}"], "temperature: must be left out"),
        (["distill.average=logits"], "distill.average: must be probabilities, got logits"),
        (["distill.divergence=js"], "distill.divergence: must be forward_kl, got js"),
    ],
)
def test_what_samples_cannot_go_with_is_named(
    root: Path, many: None, settings: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(root, *settings)[1].check()


def test_shards_are_of_whole_windows_and_bounded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, task = start(root, "targets.shard_size=1003")
    assert task.manifest("", {}).shard_size == 1000
    monkeypatch.setattr("selfkd.soft_targets.manifest.SHARD_BYTES", 1500)
    manifest = start(root)[1].manifest("", {})
    assert (manifest.shard_size, manifest.row_bytes) == (32, 42)  # 35 rows would fit


def test_a_store_of_another_context_is_not_used(root: Path, tmp_path: Path) -> None:
    _, task, teachers = with_teacher(root, tmp_path)
    config, other = start(root, "data.context=9")
    trial = make_trial(config, tmp_path / "s" / "student.safetensors", teachers)
    with pytest.raises(FileNotFoundError, match="no such store"):
        list(other.train(trial))
    assert other.data_key != task.data_key


@pytest.mark.parametrize("form", ["targets.top_k=null", "targets.samples=4"])
def test_interrupted_caching_ends_with_the_same_bits(
    root: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, (teacher,) = with_teacher(root, tmp_path, form)
    monkeypatch.setattr("selfkd.tasks.text.networks.EVAL_VALUES", 5_000)  # several batches a shard
    monkeypatch.setattr("selfkd.worker.jobs.make_task", stopping := Stopping(config))

    def cache(folder: Path) -> list[str]:
        return [
            str(row["state"])
            for shard in range(stopping.task.manifest("", {}).shards)
            for row in run_job(
                "cache_teacher_logits",
                {
                    "config": to_tree(config),
                    "checkpoint": teacher["checkpoint"],
                    "targets": str(folder),
                    "view": 0,
                    "shard": shard,
                    "run": str(tmp_path),
                },
            )
        ]

    whole = cache(tmp_path / "whole")
    stopping.after = 9
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "again")
    done = len(list((tmp_path / "again").rglob("*.safetensors")))
    assert 0 < done < len(whole)
    damaged = next((tmp_path / "again").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    stopping.after = None
    states = cache(tmp_path / "again")
    assert states == ["remade", *["kept"] * (done - 1), *["written"] * (len(whole) - done)]
    first, second = (
        [load_tensors(path) for path in sorted((tmp_path / name).rglob("*.safetensors"))]
        for name in ("whole", "again")
    )
    assert [facts["hash"] for _, facts in first] == [facts["hash"] for _, facts in second]


class Stopping:
    """Task that stops after some batches of a teacher's logits, as if killed."""

    def __init__(self, config: Config) -> None:
        self.task = make_task(to_tree(config))
        self.predict_batches = self.task.predict_batches
        self.after: int | None = None

    def __call__(self, tree: Any) -> Any:
        self.task.predict_batches = self._predict  # type: ignore[method-assign]
        return self.task

    def _predict(
        self, checkpoint: str, items: range, *, view: int, **of: Any
    ) -> Iterator[torch.Tensor]:
        for logits in self.predict_batches(checkpoint, items, view=view, **of):
            if self.after == 0:
                raise KeyboardInterrupt
            if self.after is not None:
                self.after -= 1
            yield logits


def test_a_model_of_another_context_is_refused(root: Path, tmp_path: Path) -> None:
    config, task = start(root)
    path = tmp_path / "a.safetensors"
    task.save(path, task.make(config.model), config.model, {})
    assert task.load(str(path))[1].context == 8
    with pytest.raises(ValueError, match=r"must have data.context 9, got 8"):
        start(root, "data.context=9")[1].load(str(path))
    with pytest.raises(ValueError, match="must have the tokenizer of this run"):
        start(root, "data.tokenizer=bpe:300")[1].load(str(path))


def test_what_is_not_installed_is_said_with_the_pip_line(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'selfkd\[text\]'"):
        start(root)
