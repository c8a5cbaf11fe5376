"""Class names as people write them down."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.config.names import describe_classes, load_class_names
from selfkd.errors import ConfigError

ODD = ["no", "yes", "01", "1e3", "null", "2024-01-01", "0x1F", "1_000", "on", "~", ".5", "é"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.yaml", "".join(f"- {name}\n" for name in ODD)),
        ("a.yml", f"[{', '.join(ODD)}]"),
        ("a", f"[{', '.join(ODD)}]"),
        ("a.yaml", "names:\n" + "".join(f"  {n}: {name}\n" for n, name in enumerate(ODD))),
        ("a.yaml", "nc: 12\nnames:\n" + "".join(f"- {name}\n" for name in ODD)),
        ("a.txt", "\ufeff" + "\r\n".join([*ODD, ""])),
        ("a.names", "\n".join(ODD)),
        ("a.json", '["no", "yes", "01", 1e3, "null", "2024-01-01", "0x1F", "1_000", "on", "~", '
        '".5", "\\u00e9"]'),
    ],
)  # fmt: skip
def test_names_stay_as_they_are_written(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    assert load_class_names(tmp_path / file) == ODD


@pytest.mark.parametrize(
    "text",
    [
        "{1: dog, 0: cat}",
        "{cat: 0, dog: 1}",
        "{names: {0: cat, 1: dog}}",
        "{id2label: {0: cat, 1: dog}}",
        "- cat\n- dog\n",
    ],
)
def test_mappings_are_read_by_their_indices(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert load_class_names(tmp_path / "a.yaml") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.yaml", "cat"),
        ("a.yaml", ""),
        ("a.yaml", "[[a, b]]"),
        ("a.yaml", "{0: 1, 1: 0}"),
        ("a.yaml", "{0: cat, 2: dog}"),
        ("a.json", "[null]"),
        ("a.json", "["),
        ("a.txt", "\n"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=rf"{file} must be (JSON|a list of class names)"):
        load_class_names(tmp_path / file)


def test_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.txt must be text in UTF-8: save it as such$"):
        load_class_names(tmp_path / "a.txt")


def test_long_lists_are_cut_and_what_differs_is_named() -> None:
    ours = [f"n{number}" for number in range(1000)]
    theirs = [*ours[:-1], "other"]
    assert describe_classes(theirs, ours) == (
        f"1,000 classes ({', '.join(map(repr, ours[:10]))}, … and 990 more) instead of 1,000 "
        f"({', '.join(map(repr, ours[:10]))}, … and 990 more); not among them: 'n999'; "
        "unknown: 'other'"
    )
    assert describe_classes(["False"], ["no"]) == "1 class ('False') instead of 1 ('no')"
