"""Log-probabilities made elsewhere: the same store as of a teacher that is here, or an error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfkd
from selfkd.losses import SparseLogits
from selfkd.soft_targets import logprobs
from selfkd.soft_targets.tokens import TokenTargets

tokenizers = pytest.importorskip("tokenizers")

K = 5
TEXTS = ["the cat sat on the mat", "ein Bär", "the dog's day: naïve ☃", "a"]


def make_tokenizer(kind: str = "bytes") -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    if kind == "bytes":
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet)
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<0x0A>"])
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


TOKENIZER = make_tokenizer()
VOCABULARY = TOKENIZER.get_vocab_size()
ITEMS = [{"input_ids": TOKENIZER.encode(text).ids} for text in TEXTS]


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids).cumsum(dim=1))


def text_of(number: int) -> str:
    return TOKENIZER.decode([number]) or TOKENIZER.id_to_token(number)


def bytes_of(number: int) -> list[int]:
    names = logprobs.TokenStrings(TOKENIZER)._ids
    return list(next(data for data, each in names.items() if each == number))


def distributions(item: Any) -> list[dict[int, float]]:
    """The largest log-probabilities of each token after the first, and that of the token itself."""
    ids = item["input_ids"]
    log_p = Language()(torch.tensor([ids]))[0].detach().log_softmax(-1)
    found = []
    for place in range(len(ids) - 1):
        values, tokens = log_p[place].topk(K)
        row = dict(zip(tokens.tolist(), values.tolist(), strict=True))
        found.append({ids[place + 1]: log_p[place, ids[place + 1]].item()} | row)
    return found


def vllm(item: Any) -> Any:
    rows = [
        {
            str(token): {"logprob": value, "rank": 1, "decoded_token": text_of(token)}
            for token, value in row.items()
        }
        for row in distributions(item)
    ]
    return {"prompt_token_ids": item["input_ids"], "prompt_logprobs": [None, *rows]}


def vllm_output(item: Any) -> Any:
    """A request of vLLM whose last two tokens are what it wrote."""
    ids, whole = item["input_ids"], vllm(item)["prompt_logprobs"]
    cut = max(1, len(ids) - 2)
    written = {"token_ids": ids[cut:], "logprobs": whole[cut:]}
    return {
        "prompt_token_ids": ids[:cut], "prompt_logprobs": whole[:cut], "outputs": [written]
    }  # fmt: skip


def plain(item: Any) -> Any:
    rows = [sorted(row.items(), key=lambda pair: -pair[1])[: K + 1] for row in distributions(item)]
    return {
        "ids": [[token for token, _ in row] for row in rows],
        "logprobs": [[value for _, value in row] for row in rows],
        "input_ids": item["input_ids"],
    }


def chat(item: Any, *, batch: bool = False) -> Any:
    content = []
    for own, row in zip(item["input_ids"][1:], distributions(item), strict=True):
        named = [
            {"token": text_of(token), "logprob": value, "bytes": bytes_of(token)}
            for token, value in row.items()
        ]
        first = next(each for each in named if each["bytes"] == bytes_of(own))
        content.append({**first, "top_logprobs": named})
    line = {"choices": [{"logprobs": {"content": content}}]}
    return {"custom_id": "a", "response": {"status_code": 200, "body": line}} if batch else line


def completion(item: Any) -> Any:
    """A completions API with `echo`, of which tokens that are no characters have their bytes."""

    def name(token: int) -> str:
        text = text_of(token)
        escaped = "".join(f"\\x{byte:02x}" for byte in bytes_of(token))
        return f"bytes:{escaped}" if "\ufffd" in text else text

    rows = [{name(token): value for token, value in row.items()} for row in distributions(item)]
    tokens = [name(token) for token in item["input_ids"]]
    return {"choices": [{"logprobs": {"tokens": tokens, "top_logprobs": [None, *rows]}}]}


def write(path: Path, lines: list[Any]) -> Path:
    file = path / "teacher.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return file


FORMS: dict[str, Callable[[Any], Any]] = {
    "vllm": vllm, "vllm output": vllm_output, "ids": plain, "chat": chat,
    "batch of chat": lambda item: chat(item, batch=True), "completion": completion,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_store_of_the_teacher(form: str, tmp_path: Path) -> None:
    file = write(tmp_path, [FORMS[form](item) for item in ITEMS])
    needs_tokenizer = form not in ("ids", "vllm output")
    more = {"tokenizer": TOKENIZER} if needs_tokenizer else {"vocabulary": VOCABULARY}
    found = selfkd.import_logprobs(file, ITEMS, tmp_path / "imported", top_k=K, **more)
    cached = selfkd.cache_logits(Language(), ITEMS, tmp_path / "cached", top_k=K)
    assert isinstance(found, TokenTargets)
    assert isinstance(cached, TokenTargets)
    index = torch.arange(len(ITEMS))
    theirs, ours = cached.rows(index, 30), found.rows(index, 30)
    lengths = torch.tensor([len(item["input_ids"]) for item in ITEMS])
    assert (ours >= 0).sum(dim=1).equal(lengths - 1)
    assert ours[:, 0][:3].ge(0).all()
    expected, imported = cached(theirs[ours >= 0]), found(ours[ours >= 0])
    assert isinstance(imported, SparseLogits)
    assert isinstance(expected, SparseLogits)
    assert imported.indices.equal(expected.indices)
    assert imported.rest_grid is None
    torch.testing.assert_close(imported.values, expected.values, atol=2e-3, rtol=0)
    torch.testing.assert_close(imported.rest, expected.rest, atol=2e-3, rtol=0)


def test_an_import_is_found_again_and_shards_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, [vllm(item) for item in ITEMS])
    monkeypatch.setattr(logprobs, "SHARD_ROWS", 3)
    more = {"vocabulary": VOCABULARY, "top_k": K}
    parts = selfkd.import_logprobs(file, ITEMS, tmp_path / "parts", **more)
    monkeypatch.setattr(logprobs, "entries_of", None)  # the file is not read again
    again = selfkd.import_logprobs(file, ITEMS, tmp_path / "parts", **more)
    monkeypatch.undo()
    whole = selfkd.import_logprobs(file, ITEMS, tmp_path / "whole", **more)
    opened = selfkd.load_logits(tmp_path / "parts")
    assert len(list((tmp_path / "parts").rglob("shard_*"))) > 2
    rows = torch.arange(sum(len(item["input_ids"]) - 1 for item in ITEMS))
    for one, *others in zip(*(t(rows, 0)[:3] for t in (whole, parts, again, opened)), strict=True):
        assert all(one.equal(other) for other in others)


def test_a_completion_has_rows_of_its_own_tokens_only(tmp_path: Path) -> None:
    lines = [vllm_output(item) | {"prompt_logprobs": None} for item in ITEMS[:3]]
    file = write(tmp_path, lines)
    found = selfkd.import_logprobs(file, ITEMS[:3], tmp_path, vocabulary=VOCABULARY, top_k=K)
    assert isinstance(found, TokenTargets)
    length = len(ITEMS[0]["input_ids"])
    (rows,) = found.rows(torch.tensor([0]), length)
    assert (rows >= 0).nonzero()[:, 0].tolist() == [length - 3, length - 2]


def test_rows_of_fewer_tokens_are_filled_from_the_rest(tmp_path: Path) -> None:
    lines = [{"ids": [[3, 7], [4]], "logprobs": [[math.log(0.5), math.log(0.3)], [math.log(0.9)]]}]
    file = write(tmp_path, lines)
    found: Any = selfkd.import_logprobs(file, [[1, 2, 3]], tmp_path, vocabulary=11, top_k=2)
    (values, indices, rest, _) = found(torch.tensor([0, 1]))
    assert indices.tolist() == [[3, 7], [4, 0]]
    whole = torch.cat([values.float(), rest[:, None]], dim=1).softmax(-1)
    expected = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.01, 0.09]])
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)


def test_texts_of_another_kind_of_tokenizer(tmp_path: Path) -> None:
    made = make_tokenizer("spaces")
    ids = made.encode("the cat").ids
    names = {made.id_to_token(token).replace("▁", " "): -1.0 - n for n, token in enumerate(ids)}
    line = {"logprobs": {"top_logprobs": [None, *[names | {"\n": -9.0}] * (len(ids) - 1)]}}
    found: Any = selfkd.import_logprobs(write(tmp_path, [line]), [ids], tmp_path, tokenizer=made)
    assert found(torch.tensor([0])).indices[0].tolist() == [
        *ids, made.token_to_id("<0x0A>")
    ]  # fmt: skip


def test_a_part_of_a_character_without_bytes_is_of_the_rest(tmp_path: Path) -> None:
    own = TOKENIZER.id_to_token(ITEMS[0]["input_ids"][1]).replace("Ġ", " ")
    line = {"logprobs": {"top_logprobs": [None, {own: -0.5, "\ufffd": -2.0}]}}
    items = [ITEMS[0]["input_ids"][:2]]
    with pytest.warns(UserWarning, match="tokens in .* that are parts of a character"):
        selfkd.import_logprobs(write(tmp_path, [line]), items, tmp_path, tokenizer=TOKENIZER)


IDS = [[1, 2, 3], [4, 5]]
GOOD: list[Any] = [
    {"prompt_logprobs": [None, {"2": -0.5, "7": -2.0}, {"3": -0.7, "7": -2.0}]},
    {"prompt_logprobs": [None, {"5": -0.5, "8": -3.0}]},
]


def changed(line: int, **keys: Any) -> list[Any]:
    return [{**each, **keys} if number == line else each for number, each in enumerate(GOOD)]


def logprobs_of(*rows: Any) -> Any:
    return {"prompt_logprobs": [None, *rows]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (GOOD[:1], "must have a line for each of the 2 items, got 1"),
        ([*GOOD, GOOD[0]], "line for each of the 2 items, got more"),
        (changed(1, prompt_logprobs=[None, {"6": -0.5}]), r"line 3: .* token 5 there, got \[6\]"),
        (changed(1, **logprobs_of({"5": -0.5}, {"5": -0.5})), "line 3: .* item's 2 tokens, got"),
        (changed(1, **logprobs_of({"5": -0.5, "11": -1})), r"line 3: tokens must be in \[0, 11\)"),
        (changed(0, **logprobs_of({"2": 3.5}, {"3": -1})), "line 1: log-prob.* at most 0, got 3.5"),
        (changed(1, **logprobs_of({"5": -0.1, "8": -0.1})), "line 3: probabilities must sum to at"),
        (changed(1, prompt_logprobs=[[5]]), r"line 3: must have {id: log-probability} for each"),
        (changed(0, **logprobs_of({"2": -1}, None)), "line 1: .* of all tokens after the first"),
        (
            changed(1, prompt_token_ids=[4, 9]),
            r"line 3: .* dataset's tokens \[4, 5\], got \[4, 9\]",
        ),
        (changed(1, index=0), "line 3: index must be 1, the number of the item, got 0"),
        ([GOOD[0], {"text": "a"}], "line 3: logprobs must be of a form"),
        ([GOOD[0], [1]], "line 3: must be an object, got list"),
        ([GOOD[0], {"ids": [[1, 2]], "logprobs": [[-1]]}], "line 3: must have a log-.*1 of 2 tok"),
        ([GOOD[0], {"ids": [[1, 1]], "logprobs": [[-1, -2]]}], "different ones, got 1 twice"),
        ([GOOD[0], {"ids": [[True]], "logprobs": [[-1]]}], "must be ids or texts, got True"),
        ([GOOD[0], {"ids": [[1]], "logprobs": [[None]]}], "line 3: log-probabilities must be num"),
        ([GOOD[0], {"logprobs": {"top_logprobs": [{"a": -1}]}}], "tokenizer must be given for tok"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_left(
    lines: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        selfkd.import_logprobs(write(tmp_path, lines), IDS, tmp_path / "store", vocabulary=11)
    assert not list((tmp_path / "store").rglob("*.*"))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("zzz", "tokens must be those of tokenizer, got 'zzz'"),
        ("the", "dataset's text, with token"),
    ],
)
def test_texts_must_be_the_tokenizers_and_the_datasets(
    token: str, message: str, tmp_path: Path
) -> None:
    line = completion(ITEMS[0])
    line["choices"][0]["logprobs"]["tokens"][2] = token
    line["choices"][0]["logprobs"]["top_logprobs"][2][token] = -9.0
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        selfkd.import_logprobs(write(tmp_path, [line]), ITEMS[:1], tmp_path, tokenizer=TOKENIZER)
    other = vllm(ITEMS[0])
    next(iter(other["prompt_logprobs"][1].values()))["decoded_token"] = "zzz"
    with pytest.raises(ValueError, match="got 'zzz' as token"):
        selfkd.import_logprobs(write(tmp_path, [other]), ITEMS[:1], tmp_path, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="vocabulary or tokenizer must be given"):
        selfkd.import_logprobs(tmp_path / "teacher.jsonl", ITEMS[:1], tmp_path)
    for damaged in (b'{"prompt_logprobs": [null,\n', b"\xff\n", b"[" * 100_000):
        (tmp_path / "teacher.jsonl").write_bytes(damaged)
        with pytest.raises(ValueError, match="line 1: must be JSON"):
            selfkd.import_logprobs(tmp_path / "teacher.jsonl", ITEMS[:1], tmp_path, vocabulary=9)
    with pytest.raises(ValueError, match="dataset must have items, got none"):
        selfkd.import_logprobs(tmp_path / "teacher.jsonl", [], tmp_path, vocabulary=9)


def test_teachers_must_be_of_the_same_tokens(tmp_path: Path) -> None:
    """As many rows of other tokens are not averaged."""
    row = [[1, 2], [-0.5, -2.0]]
    teachers = []
    for counts in ((2, 1), (1, 2)):
        lines = [{"ids": [row[0]] * n, "logprobs": [row[1]] * n} for n in counts]
        file = tmp_path / f"{counts[0]}.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        selfkd.import_logprobs(file, [[1, 2, 3]] * 2, tmp_path, vocabulary=9)
        teachers.append(logprobs._digest(file))
    with pytest.raises(ValueError, match=f"{teachers[1]}.* must be of the tokens of {teachers[0]}"):
        selfkd.load_logits(tmp_path, teachers=teachers)
