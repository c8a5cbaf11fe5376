"""Documents of text: files, splits, and what is refused by name."""

from __future__ import annotations

import email
import json
import platform
import textwrap
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from selfkd.tasks.text.docstrings import read_docstrings
from selfkd.tasks.text.documents import Example, load_documents


def folder(tmp_path: Path, **files: str | bytes) -> str:
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        raw = content.encode() if isinstance(content, str) else content
        (tmp_path / f"{stem}.{suffix}").write_bytes(raw)
    return str(tmp_path)


def row(prompt: str, completion: str, **more: object) -> str:
    return json.dumps({"prompt": prompt, "completion": completion, **more})


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


def test_docstrings_are_read_in_the_order_of_the_sources(tmp_path: Path) -> None:
    source = """
    '''First.'''
    import nothing_of_this_name
    class A:
        "Second."
        async def a(self):
            r"third \\d"
            if 1:
                def b(): "fourth"
    try: pass
    except A:
        def c(): "fifth"
    x = "none"
    def d(): return "none"
    """
    for name, text in {
        "b.py": '"last"',
        "a/b.py": textwrap.dedent(source),
        "a/bad.py": "print 3",
        "a/none.py": "1",
        "test/a.py": "'none'",
        "a/site-packages/a.py": "'none'",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    ordered = "\n\n".join(["First.", "Second.", r"third \d", "fourth", "fifth"])
    assert read_docstrings(tmp_path) == [ordered, "last"]
    with pytest.raises(ValueError, match="must have the sources of Python's standard library"):
        read_docstrings(tmp_path / "nothing")


def test_docstrings_are_named_by_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: Path(email.__file__).parent)
    found = load_documents("docstrings", None, 0)
    assert f"docstrings of Python {platform.python_version()}: " in found.note
    assert all(found.splits.values())


@pytest.mark.slow
def test_docstrings_are_those_of_this_python() -> None:
    found = load_documents("docstrings", None, 0)
    sizes = {split: sum(len(str(text)) for text in own) for split, own in found.splits.items()}
    assert 1e6 < sum(sizes.values()) < 3e6
    assert 0.05 < sizes["test"] / sum(sizes.values()) < 0.11


@pytest.mark.parametrize("prompted", [False, True])
def test_saved_data_sets_are_read(tmp_path: Path, prompted: bool) -> None:
    def rows(split: str, number: int) -> Dataset:
        texts = [f"{split} {row}" for row in range(number)]
        if not prompted:
            return Dataset.from_dict({"text": texts, "id": range(number)})
        rationales = [None, *texts[1:]]
        return Dataset.from_dict({"prompt": texts, "completion": texts, "rationale": rationales})

    whole = {"train": rows("train", 5), "validation": rows("val", 2), "test": rows("test", 1)}
    DatasetDict({**whole, "other": rows("other", 3)}).save_to_disk(tmp_path / "all")
    found = load_documents("text", str(tmp_path / "all"), 0)
    assert {split: len(own) for split, own in found.splits.items()} == {
        "train": 5,
        "val": 2,
        "test": 1,
    }
    assert "left out: 3 of split other" in found.note
    first, second = found.splits["train"][:2]
    if prompted:
        assert first == Example("train 0", "train 0")
        assert second == Example("train 1", "train 1", "train 1")
    else:
        assert (first, second) == ("train 0", "train 1")
    rows("any", 20).save_to_disk(tmp_path / "one")
    found = load_documents("text", str(tmp_path / "one"), 0)
    assert sum(map(len, found.splits.values())) == 20
    assert len(found.splits["test"]) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"txt": ["a"], "id": [1]}, r"must have columns \"text\", or .*, got txt, id"),
        ({"text": ["a", None]}, r'row 1: "text" must be text, got NoneType'),
        ({"prompt": ["a"]}, r"row 0: must have .*, got prompt"),
    ],
)
def test_saved_data_sets_are_checked(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        load_documents("text", str(tmp_path / "saved"), 0)


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


def test_lines_may_be_prompts(tmp_path: Path) -> None:
    lines = [row(f"{n}+1=", f" {n + 1}", rationale=None if n % 2 else "steps") for n in range(30)]
    lines += [row("7+1=", " eight")] * 3
    found = load_documents("text", folder(tmp_path, a_JSONL="\ufeff" + "\r\n".join(lines)), 0)
    assert "33 prompts divided whole" in found.note
    prompts = [
        {piece.prompt for piece in pieces if isinstance(piece, Example)}
        for pieces in found.splits.values()
    ]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 30  # none in two
    assert sum(map(len, found.splits.values())) == 33
    assert Example("4+1=", " 5", "steps") in [p for own in found.splits.values() for p in own]


def test_folders_are_read_as_those_of_images(tmp_path: Path) -> None:
    for name, content in {
        "train/deep/er/a.TXT": b"\xef\xbb\xbfone\r\ntwo",
        "train/.hidden.txt": b"\xff",
        "train/__pycache__/b.txt": b"\xff",
        "train/c.md": b"\xff",
        "train/empty.txt": b" \n",
        "validation/a.txt": b"three",
        "test.jsonl": b'{"text": "four"}\n\n{"text": "one\\ntwo"}\n',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "train" / "loop").symlink_to(tmp_path)
    (tmp_path / "train" / "again.txt").symlink_to(tmp_path / "train/deep/er/a.TXT")
    (tmp_path / "train" / "gone.txt").symlink_to(tmp_path / "nothing")
    found = load_documents("text", str(tmp_path), 0)
    assert found.splits == {"train": ["one\ntwo"], "val": ["three"], "test": ["four", "one\ntwo"]}
    assert "1 document also in another split; left out: 1 .md" in found.note
    for kind in ("1 hidden", "1 circular link", "1 broken link", "1 empty document"):
        assert kind in found.note
    assert "1 link to a file that is read" in found.note
    (tmp_path / "test.txt").symlink_to(tmp_path / "train/deep/er/a.TXT")
    with pytest.raises(ValueError, match=r"each file in one split, got a link in another one"):
        load_documents("text", str(tmp_path), 0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"must have .txt or .jsonl files, got none in"),
        ({"a_md": "a", "b_md": "b"}, r"got none in .* \(left out: 2 \.md\)"),
        ({"a_txt": "  \n"}, r"must have text, got none in"),
        ({"test_txt": "abc"}, r"must have training text"),
        ({"a_txt": "abc", "val_txt": "\n"}, r"must have text for val, got empty files of it"),
        ({"a_txt": b"ab\xff"}, r"a\.txt must be UTF-8, got byte 0xff at position 2"),
        (
            {"a_txt": "ab".encode("utf-16-le")},
            r"must be text in UTF-8, got byte 0x00 at position 1",
        ),
        ({"a_jsonl": '{"text": "a"}\n\n{"txt": "a"}'}, r"a\.jsonl, line 3: must have .*, got txt"),
        ({"a_jsonl": '{"text": "a"}\n{"text": 3}'}, r'line 2: "text" must be text, got int'),
        ({"a_jsonl": "[]"}, r'line 1: must have "text", or "prompt" and "completion", got list'),
        ({"a_jsonl": "{}"}, r"line 1: must have .*, got no keys"),
        ({"a_jsonl": "{"}, r"line 1: must be JSON"),
        ({"a_jsonl": "[" * 100_000}, r"line 1: must be JSON"),
        ({"a_jsonl": r'{"text": "\ud800"}'}, r"line 1: \"text\" must be Unicode, got half a char"),
        ({"a_jsonl": '{"prompt": "a"}'}, r"line 1: must have .*, got prompt"),
        ({"a_jsonl": row("a", "b", text="c")}, r"line 1: must have .*, got both"),
        ({"a_jsonl": row("", "b")}, r'line 1: "prompt" must not be empty'),
        ({"a_jsonl": row("a", " ")}, r"line 1: \"completion\" must not be empty, got ' '"),
        ({"a_jsonl": row("a", "b", rationale=1)}, r'line 1: "rationale" must be text, got int'),
        (
            {"a_jsonl": row("a", "b"), "readme_txt": "text"},
            r"not both, got a prompt in .*a\.jsonl, line 1 and a document in .*readme\.txt",
        ),
        ({"a_jsonl": row("a", "b")}, r"at least 3 different prompts, to draw val and test from"),
        (
            {"train_jsonl": f"{row('a', 'b')}\n{row('c', 'd')}", "test_jsonl": row("c", "e")},
            r"got 'c' in train \(.*train\.jsonl, line 2\) and in test \(.*test\.jsonl, line 1\)",
        ),
    ],
)
def test_bad_files_are_named(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_documents("text", folder(tmp_path, **files), 0)


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("digits", None, "data.name must be pydoc, docstrings, arithmetic or text"),
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
