"""Exported folders: card, config, weights; nothing of the user's machine is in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from run_folders import generations_run

import selfkd
from selfkd.loading.card import card_of_run, plain_card
from selfkd.loading.choose import Chosen, open_run
from selfkd.storage.files import load_json, save_json


def card(run: Path, number: int = 1) -> str:
    folder, config, facts = open_run(run)
    result = folder.results()[number]
    chosen = Chosen(title=f"generation {number}", models=result.models, point=result.point)
    return card_of_run(folder, config, facts, chosen)


def test_an_exported_folder_is_loaded_back(lineage: Path, tmp_path: Path) -> None:
    model = selfkd.load(lineage)
    folder = model.save(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "config.json", "model.safetensors"),
    ]
    again = selfkd.load(folder)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert torch.equal(again.predict(images).probabilities, model.predict(images).probabilities)
    assert again.checkpoint == model.checkpoint
    assert again.card == model.card == (folder / "README.md").read_text()
    config = load_json(folder / "config.json")
    assert (config["library_name"], config["model"]["name"]) == ("selfkd", "selfkd_mlp")
    assert config["classes"] == list(model.classes)


def test_a_run_folder_is_not_written_into(lineage: Path) -> None:
    with pytest.raises(ValueError, match="must be one of the model's own, got the run folder"):
        selfkd.load(lineage).save(lineage)


def test_the_card_has_head_sentence_table_settings_command_and_snippet(tmp_path: Path) -> None:
    run = generations_run(tmp_path / "a", settings=("train.lr=0.1", "data.train_size=150"))
    summary = load_json(run / "summary.json")
    said = "born-again generations are better than generation 0: +1.00 points [+0.50, +1.50]"
    verdict = {"name": "a", "to": "b", "sentences": [said]}
    save_json(run / "summary.json", summary | {"verdict": verdict})
    text = card(run)
    _, head, body = text.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["library_name"] == "selfkd"
    assert facts["pipeline_tag"] == "image-classification"
    assert "license" not in facts
    assert f"\n\nB{said[1:]}.\n\n" in body
    mean, gain = (summary["confirmations"][1][key] for key in ("mean", "first"))
    ends = f"{mean['value']:.2%} [{mean['low']:.2%}, {mean['high']:.2%}]"
    points, low, high = (100 * gain[end] for end in ("value", "low", "high"))
    gained = f"{points:+.2f} points [{low:+.2f}, {high:+.2f}]"
    assert f" | {ends} | {gained} |" in body
    assert "- data: digits, 200 train, 400 val, 1,197 test images, 10 classes\n" in body
    result = load_json(run / "generation_001" / "result.json")
    assert f"T = {result['temperature']:.3g}, weight alpha = {result['alpha']:.3g}" in body
    assert "python -m selfkd.generations --rounds 2" in body
    assert "--set data.train_size=150" in body
    assert "--set train.lr=0.1" in body
    assert 'selfkd.load(snapshot_download("USER/NAME"))' in body


def test_no_place_or_secret_of_the_machine_is_in_it(tmp_path: Path) -> None:
    settings = (
        *("data.name=folder", "data.root=/home/jane/pictures", "targets.root=s3://bucket/targets"),
        *(
            "params.out=/home/jane/out",
            "params.more=[s3://key:hidden@bucket/a]",
            "storage=/home/jane",
        ),
    )
    text = card(generations_run(tmp_path / "a", settings=settings))
    for secret in ("jane", "hidden", "bucket", str(tmp_path)):
        assert secret not in text
    assert "…" in text


def test_names_are_no_markup(tmp_path: Path) -> None:
    text = card(generations_run(tmp_path / "a|b`<script>[c](d)"))
    assert "\n# a\\|b\\`\\<script\\>[c\\](d)\n" in text


@pytest.mark.parametrize("name", [None, "selfkd_mlp"])
def test_a_file_alone_has_a_card_too(name: str | None) -> None:
    facts = {"model": {"name": name, "args": {}}, "classes": ["a"]} if name else {}
    assert (name or "of a function of the user's own") in plain_card(facts)
