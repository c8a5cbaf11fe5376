"""Text that teachers write: the same bits however often it is made, read as data only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfkd.config import load_config, to_tree
from selfkd.tasks.text import data, write
from selfkd.tasks.text.data import IGNORED, Tokens
from selfkd.tasks.text.documents import Documents, Example
from selfkd.tasks.text.example import read_row
from selfkd.tasks.text.task import TextTask
from selfkd.tasks.text.write import WrittenText
from selfkd.training.trial import Trial

EXAMPLES = [Example(f"{a}+{b}=", f" {(a + b) % 10}", f"{a}{b}") for a in range(5) for b in range(5)]
TEXT = " ".join(f"{word} is {word * 2 % 7}." for word in range(60))
TINY = [
    "data.tokenizer=chars",
    "data.context=10",
    "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}",
    "train={steps: 4, epochs: 2, batch_size: 4, warmup_steps: 1}",
    "distill.mode=traces",
    "targets.shard_size=100",
]
Make = Callable[..., tuple[TextTask, list[dict[str, Any]]]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A task of examples or of documents, with teachers of random weights."""

    def make(
        *settings: str, texts: Sequence[Any] = EXAMPLES, teachers: int = 1
    ) -> tuple[TextTask, list[dict[str, Any]]]:
        found = Documents({"train": texts, "val": texts[:9], "test": texts[:9]}, "")
        monkeypatch.setattr(data, "load_documents", lambda *_, **__: found)
        data.load_text.cache_clear()
        task = TextTask(to_tree(load_config(settings=[*TINY, *settings], flags={"task": "text"})))
        rows = []
        for number in range(teachers):
            torch.manual_seed(number)
            file = tmp_path / f"teacher_{number}.safetensors"
            network = task.make(task.config.model)
            rows.append({"hash": task.save(file, network, task.config.model, {"n": number})})
            rows[-1]["checkpoint"] = str(file)
        return task, rows

    yield make
    data.load_text.cache_clear()  # of texts that no other test has


def write_all(task: TextTask, root: Path, teachers: Sequence[dict[str, Any]]) -> list[str]:
    shards = WrittenText(task, root).shards
    return [
        task.write(teacher["checkpoint"], root, shard=shard, run=root.parent)["state"]
        for teacher in teachers
        for shard in range(shards)
    ]


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("shard_*.json*"))}


def says(monkeypatch: pytest.MonkeyPatch, task: TextTask, text: Callable[[int], str]) -> None:
    """Let teachers write what is given by the number of the prompt, in place of generation."""
    tokenizer, prompts = write.read_tokenizer(task.data.tokenizer), iter(range(1000))
    monkeypatch.setattr(
        write,
        "generate",
        lambda network, inputs, **options: [
            torch.tensor(
                tokenizer.encode(text(next(prompts) % len(EXAMPLES)).rstrip("|")).ids
                + [0] * text(0).endswith("|"),
                dtype=torch.int64,
            )
            for _ in inputs
        ],
    )


def pairs(tokens: Tokens) -> list[list[tuple[tuple[int, ...], int]]]:
    """What each window is trained to predict: a token after those before it."""
    found = []
    for window in torch.arange(tokens.windows):
        inputs, labels = tokens.inputs(window[None])[0], tokens.labels_of(window[None])[0]
        scored = (labels != IGNORED).nonzero()[:, 0].tolist()
        found.append([(tuple(inputs[: row + 1].tolist()), int(labels[row])) for row in scored])
    return found


@pytest.mark.parametrize("texts", [EXAMPLES, [TEXT]], ids=["examples", "documents"])
def test_students_predict_what_was_written_after_each_prompt(
    make: Make, tmp_path: Path, texts: Sequence[Any]
) -> None:
    task, teachers = make("write.samples=2", texts=texts)
    root = tmp_path / "written"
    assert set(write_all(task, root, teachers)) == {"written"}
    written = WrittenText(task, root)
    tokens = written.load(teachers)
    assert int(tokens.bounds.diff().max()) <= task.data.context
    each = [text for n in range(written.shards) for text in written.read(teachers[0]["hash"], n)]
    train = task.data.splits["train"]
    assert sorted(text.window for text in each) == sorted(2 * list(range(train.windows)))
    (prompts,) = [train.prompts([text.window for text in each])]
    for text, prompt, predicted in zip(each, prompts, pairs(tokens), strict=True):
        whole = (*prompt.tolist(), *text.ids)
        wanted = [(whole[:n], whole[n]) for n in range(len(prompt), len(whole))]
        # of a text beyond the context by a token, that may be missing
        assert predicted == wanted or (predicted == wanted[:-1] and len(whole) == 11)
    first, second = each[: len(each) // 2], each[len(each) // 2 :]
    assert [text.ids for text in first] != [text.ids for text in second]


def test_what_is_missing_or_damaged_is_made_again_bit_for_bit(make: Make, tmp_path: Path) -> None:
    task, teachers = make(teachers=2)
    root = tmp_path / "written"
    write_all(task, root, teachers)
    before = files(root)
    assert len(before) == 4 * WrittenText(task, root).shards >= 12
    missing, cut, changed = sorted((root / teachers[0]["hash"]).rglob("shard_*.jsonl"))
    unhashed, *_ = sorted((root / teachers[1]["hash"]).rglob("shard_*.jsonl"))
    missing.unlink()
    cut.write_bytes(before[cut][:-7])
    changed.write_bytes(before[changed].replace(b"+", b"-", 1))
    unhashed.with_suffix(".json").unlink()  # a kill came between
    torch.manual_seed(99)
    states = write_all(task, root, teachers)
    assert states[:4] == ["written", "remade", "remade", "written"]
    assert set(states[4:]) <= {"kept"}
    assert files(root) == before


def test_other_sampling_or_prompts_have_files_of_their_own(make: Make, tmp_path: Path) -> None:
    changes = (
        [],
        *(["write.temperature=2"], ["write.top_p=0.5"], ["write.seed=1"], ["write.samples=2"]),
        *(["data.context=11"], ["data.tokenizer=bpe:260"], ["targets.shard_size=90"]),
    )
    keys = [WrittenText(make(*change)[0], tmp_path).key for change in changes]
    assert len(set(keys)) == len(changes)
    same = (["write.keep=right"], ["data.rationale_weight=2"], ["train.lr=0.5"])
    assert {WrittenText(make(*change)[0], tmp_path).key for change in same} == {keys[0]}


def test_only_texts_that_are_right_are_kept_when_asked(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, teachers = make("write.keep=right")
    root, wrong = tmp_path / "written", {3, 4}
    says(monkeypatch, task, lambda n: "9" if n in wrong else str(EXAMPLES[n])[4:] + "|")
    counts = [
        task.write(teachers[0]["checkpoint"], root, shard=n, run=tmp_path)
        for n in range(WrittenText(task, root).shards)
    ]
    assert sum(row["texts"] for row in counts) == len(EXAMPLES)
    assert sum(row["right"] for row in counts) == len(EXAMPLES) - 2
    assert WrittenText(task, root).load(teachers).windows == len(EXAMPLES) - 2
    task, _ = make("write.keep=all")
    assert WrittenText(task, root).load(teachers).windows == len(EXAMPLES)


def test_tokens_before_the_completion_weigh_as_a_rationale(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, teachers = make("data.rationale_weight=0.25", teachers=2)
    says(monkeypatch, task, lambda n: str(EXAMPLES[n])[4:] + "|")
    root = tmp_path / "written"
    write_all(task, root, teachers)
    tokens = WrittenText(task, root).load(teachers[:1])
    gold = task.data.splits["train"]
    assert torch.equal(tokens.ids, gold.ids)
    assert torch.equal(tokens.weights, gold.weights)  # type: ignore[arg-type]
    weighted = [{**row, "weight": weight} for row, weight in zip(teachers, (0.2, 0.6), strict=True)]
    both = WrittenText(task, root).load(weighted)
    assert both.windows == 2 * len(EXAMPLES)
    halves: Tensor = torch.cat([0.5 * gold.weights, 1.5 * gold.weights])  # type: ignore[operator]
    torch.testing.assert_close(both.weights, halves)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: line | {"ids": [999]}, "ids must be tokens"),
        (lambda line: line | {"ids": [1.5]}, "ids must be tokens"),
        (lambda line: line | {"ids": "1"}, "ids must be tokens"),
        (lambda line: line | {"ids": [1] * 99}, "ids must be at most"),
        (lambda line: line | {"window": 10**6}, "window must be one"),
        (lambda line: line | {"window": line["window"] + 1}, "a text for each prompt"),
        (lambda line: [1], "window must be one"),
    ],
)
def test_files_of_others_are_data_only(
    make: Make, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    """Also those whose hash is right."""
    task, (teacher,) = make()
    root = tmp_path / "written"
    write_all(task, root, [teacher])
    path = next(path for path in files(root) if path.suffix == ".jsonl")
    first, *rest = path.read_text().splitlines(keepends=True)
    lines = "".join([json.dumps(change(json.loads(first))) + "\n", *rest])
    path.write_text(lines)
    beside = path.with_suffix(".json")
    digest = hashlib.sha256(lines.encode()).hexdigest()
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"sha256": digest}))
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*{said}.*remove it and resume"):
        WrittenText(task, root).load([teacher])
    with pytest.raises(ValueError, match="teacher must be a hash"):
        WrittenText(task, root).read("../../elsewhere", 0)


def test_students_of_another_tokenizer_read_it_as_data(make: Make, tmp_path: Path) -> None:
    task, teachers = make()
    root = tmp_path / "written"
    write_all(task, root, teachers)
    lines = [line for path in sorted(root.rglob("*.jsonl")) for line in path.open()]
    found = [read_row(json.loads(line) | {"completion": "x"}, "") for line in lines]
    assert [each.prompt for each in found] == [example.prompt for example in EXAMPLES]  # type: ignore[union-attr]
    assert all(isinstance(json.loads(line)["completion"], str) for line in lines)


def test_a_student_is_trained_on_what_its_teacher_has_written(make: Make, tmp_path: Path) -> None:
    task, teachers = make()
    root = tmp_path / "written"
    trial = Trial(
        config=task.config,
        stage="generation-1",
        seed=5,
        model=task.config.model,
        path=tmp_path / "s" / "student.safetensors",
        targets=root,
        teachers=teachers,
    )
    with pytest.raises(FileNotFoundError, match="shard_00000"):
        list(task.train(trial))
    write_all(task, root, teachers)
    rows = list(task.train(trial))
    assert [set(row) & {"loss", "soft_loss"} for row in rows] == [{"loss"}, {"loss"}]
    assert rows[-1]["hash"]


def test_documents_have_nothing_to_be_right(make: Make) -> None:
    task, _ = make("write.keep=right", texts=[TEXT])
    with pytest.raises(ValueError, match=r"write\.keep must be all without completions"):
        task.check()
    assert make(texts=[TEXT])[0].check().prompts == len(task.data.splits["train"].bounds) - 1


def test_special_tokens_of_prompts_and_completions_are_kept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, teachers = make("write.keep=right")
    tokenizer = write.read_tokenizer(task.data.tokenizer)
    tokenizer.add_special_tokens(["0", "="])  # as the markers of a chat
    monkeypatch.setattr(write, "read_tokenizer", lambda text: tokenizer)
    says(monkeypatch, task, lambda n: f"{EXAMPLES[n].completion}|")
    row = task.write(teachers[0]["checkpoint"], tmp_path, shard=0, run=tmp_path)
    assert row["right"] == row["texts"] > 0
    (file, *_) = sorted(tmp_path.rglob("shard_*.jsonl"))
    first = json.loads(file.read_text().splitlines()[0])
    assert (first["prompt"], first["completion"]) == ("0+0=", " 0")
