"""Generated problems: results, splits that share none, and what is scored of them."""

from __future__ import annotations

import re

import pytest
import torch

from selfkd.config import Config, load_config
from selfkd.tasks.text.arithmetic import make_splits
from selfkd.tasks.text.data import TextData, encode_examples, load_text
from selfkd.tasks.text.example import Example
from selfkd.tasks.text.tokenizer import make_tokenizer, read_tokenizer


def configure(*settings: str) -> Config:
    return load_config(
        settings=["data.name=arithmetic", "data.train_size=500", "data.val_size=50", *settings],
        flags={"task": "text"},
    )


def load(*settings: str) -> TextData:
    config = configure(*settings)
    return load_text(config.data, config.seed)


def solve(prompt: str) -> list[int]:
    """Return the results one after the other, by an evaluation that is not that of the package."""
    digits, signs = re.findall(r"\d", prompt), re.findall(r"[+x-]", prompt)
    results = [int(digits[0])]
    for sign, digit in zip(signs, digits[1:], strict=True):
        results.append(eval(f"{results[-1]}{sign.replace('x', '*')}{digit}") % 10)
    return results[1:]


def test_problems_are_solved_step_by_step() -> None:
    problems = make_splits(200, 20, seed=3)["train"]
    for problem in problems:
        assert re.fullmatch(r"\d([+x-]\d){5}=", problem.prompt)
        results = "".join(map(str, solve(problem.prompt)))
        assert (problem.rationale, problem.completion) == (results[:-1], f" {results[-1]}")
        assert problem.is_right(problem.rationale + problem.completion)
        assert problem.is_right(problem.completion)
        assert not problem.is_right(f"{problem.rationale} {(solve(problem.prompt)[-1] + 1) % 10}")
        assert not problem.is_right(results)  # the last step is apart
    assert {sign for each in problems for sign in each.prompt} == set("0123456789+-x=")


def test_no_problem_stands_in_two_splits() -> None:
    splits = make_splits(3000, 500, seed=0)
    prompts = [problem.prompt for problems in splits.values() for problem in problems]
    assert len(set(prompts)) == len(prompts) == 4000
    fewer, other = make_splits(100, 500, seed=0), make_splits(100, 500, seed=1)
    assert fewer["test"] == splits["test"]
    assert fewer["val"] == splits["val"]
    assert fewer["train"] == splits["train"][:100]
    assert other["test"] != splits["test"]


def test_the_defaults_just_fit() -> None:
    config = load_config(settings=["data.name=arithmetic"], flags={"task": "text"})
    assert (config.data.tokenizer, config.data.context) == ("chars", 19)
    assert config.train.batch_size == 32
    data = load()
    assert data.splits["train"].bounds.diff().unique().tolist() == [19]
    assert data.vocabulary == 17  # 10 digits, 3 operators, =, space, end and unknown
    with pytest.raises(ValueError, match=r"data.context must be at least 19, the tokens of .* 18"):
        load("data.context=18")


@pytest.mark.parametrize(("rationales", "length", "scored"), [(True, 19, 7), (False, 15, 3)])
def test_rationales_are_part_of_the_text_or_not(rationales: bool, length: int, scored: int) -> None:
    data = load(f"data.rationales={str(rationales).lower()}")
    assert data.tokenizer == load().tokenizer  # a teacher with them suits students without
    for split, tokens in data.splits.items():
        assert tokens.bounds.diff().unique().tolist() == [length]
        assert len(tokens.scored) == scored * tokens.windows
        example, decode = data.examples[split][7], read_tokenizer(data.tokenizer).decode
        window = torch.tensor([7])
        start, *text = tokens.inputs(window)[0].tolist()
        assert start == data.end
        assert decode(text) == str(example)
        assert bool(example.rationale) == rationales
        assert decode(tokens.prompts([7])[0][1:].tolist()) == example.prompt
        *written, end = tokens.labels_of(window)[0, -scored:].tolist()
        assert decode(written) == example.rationale + example.completion
        assert end == data.end


def test_rationales_have_a_weight_of_their_own() -> None:
    examples = [Example("1+1=", " 2", "abc"), Example("1+2=", " 3")]
    tokenizer, end = make_tokenizer("chars", [str(each) for each in examples])
    tokens = encode_examples(tokenizer, end, examples, 10, rationale_weight=0.5)
    assert tokens.weights is not None
    assert tokens.weights.tolist() == [*[0] * 4, *[0.5] * 3, *[1] * 3, *[0] * 4, *[1] * 3]


def test_the_fingerprint_is_of_problems_and_what_is_scored() -> None:
    digests = [
        load(*more).fingerprints["train"]
        for more in ([], ["data.rationales=false"], ["seed=1"], ["data.train_size=400"])
    ]
    assert len(set(digests)) == len(digests)
    assert load("data.rationale_weight=0.5").fingerprints["train"] == digests[0]
    assert "500 problems for training, 50 for validation and as many for test" in load().note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.name=pydoc"], "data.train_size: only with data.name arithmetic"),
        (["data.train_size=20000000"], "data.train_size must be at most 10,000,000 with arith"),
        (["data.train_size=0"], "data.train_size: must be greater than or equal to 1"),
    ],
)
def test_numbers_of_problems_are_checked(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(*settings)
