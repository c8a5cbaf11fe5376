"""Documents of text: files, splits, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.tasks.text.documents import load_documents


def folder(tmp_path: Path, **files: str | bytes) -> str:
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        raw = content.encode() if isinstance(content, str) else content
        (tmp_path / f"{stem}.{suffix}").write_bytes(raw)
    return str(tmp_path)


def test_pydoc_is_divided_whole_and_by_the_seed() -> None:
    found = load_documents("pydoc", None, 0)
    again, other = load_documents("pydoc", None, 0), load_documents("pydoc", None, 1)
    assert found == again
    assert found.splits["test"] != other.splits["test"]
    sizes = {split: sum(map(len, texts)) for split, texts in found.splits.items()}
    whole = sum(sizes.values())
    assert 0.05 < sizes["test"] / whole < 0.11
    assert 0.05 < sizes["val"] / whole < 0.11
    assert "pydoc of Python 3." in found.note


def test_a_document_alone_is_divided_by_position(tmp_path: Path) -> None:
    text = "".join(chr(97 + number % 26) for number in range(1000))
    found = load_documents("text", folder(tmp_path, one_txt=text), 0)
    assert found.splits["train"] == [text[:800]]
    assert found.splits["val"] == [text[800:900]]
    assert found.splits["test"] == [text[900:]]
    assert "by position, 80/10/10 %" in found.note


def test_a_test_split_of_its_own_stays(tmp_path: Path) -> None:
    root = folder(tmp_path, train_txt="a" * 100, test_txt="b" * 10)
    found = load_documents("text", root, 0)
    assert found.splits == {"train": ["a" * 90], "val": ["a" * 10], "test": ["b" * 10]}
    assert "by position, 90/10 %" in found.note


def test_lines_are_documents(tmp_path: Path) -> None:
    lines = "\n".join(f'{{"text": "{letter * 10}"}}' for letter in "abcdefghijklmnopqrst")
    found = load_documents("text", folder(tmp_path, a_jsonl=lines), 3)
    assert sorted(map(len, found.splits.values())) == [2, 2, 16]
    assert "20 documents divided whole" in found.note


def test_few_long_documents_leave_no_split_empty(tmp_path: Path) -> None:
    root = folder(tmp_path, a_txt="a" * 50, b_txt="b" * 60, c_txt="c" * 70)
    found = load_documents("text", root, 0)
    assert [len(found.splits[split][0]) for split in ("train", "val", "test")] == [70, 60, 50]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"must have text in .txt or .jsonl files, got none in"),
        ({"a_txt": "  \n"}, r"must have text in .txt or .jsonl files, got none in"),
        ({"test_txt": "abc"}, r"must have training text"),
        ({"a_txt": b"ab\xff"}, r"a\.txt must be UTF-8, got byte 0xff at position 2"),
        ({"a_jsonl": '{"text": "a"}\n\n{"txt": "a"}'}, r'a\.jsonl, line 3: must have "text", got'),
        ({"a_jsonl": '{"text": "a"}\n{"text": 3}'}, r'line 2: must have "text"'),
        ({"a_jsonl": "[]"}, r'line 1: must have "text", got list'),
        ({"a_jsonl": "{"}, r"line 1: must be JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_documents("text", folder(tmp_path, **files), 0)


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("digits", None, "data.name must be pydoc, arithmetic or text"),
        ("text", None, "data.root must be a folder"),
        ("text", "/no/such", "data.root must be a folder .* got /no/such"),
    ],
)
def test_bad_datasets_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, root: str | None, message: str
) -> None:
    monkeypatch.delenv("SELFKD_DATA", raising=False)
    with pytest.raises(ValueError, match=message):
        load_documents(name, root, 0)
