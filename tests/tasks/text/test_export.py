"""Models as folders that `transformers` opens: the same logits, the tokenizer, the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Count, make_run
from model_folders import FAMILIES, TEXT, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfkd.config import Config, load_config
from selfkd.experiments.ensemble import compress
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.loading.model import load
from selfkd.results.metrics import find_metric
from selfkd.tasks.text.pretrained import quiet

SETTINGS = [
    "train={steps: 4, epochs: 2, batch_size: 2, warmup_steps: 1}",
    "search.trials=1",
    "confirm.seeds=0",
]


def start(tmp_path: Path, *settings: str, command: str = "generations") -> tuple[Config, RunFolder]:
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    data = f"data={{name: text, root: {tmp_path / 'text'}, context: 16}}"
    config = load_config(settings=[*SETTINGS, data, *settings], flags={"task": "text"})
    return config, RunFolder.create(tmp_path / "run", config, command=command)


def opened(folder: Path) -> tuple[Any, Any]:
    with quiet():
        network = AutoModelForCausalLM.from_pretrained(folder)
        return network.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", ["selfkd_gpt", "lora", *FAMILIES])
def test_chosen_models_are_opened_by_transformers(tmp_path: Path, family: str) -> None:
    if family == "selfkd_gpt":
        model = "{name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}"
        config, folder = start(tmp_path, f"model={model}", "data.tokenizer=chars", "rounds=1")
    else:
        source = write(tmp_path / "model", "gpt2" if family == "lora" else family)
        (source / "chat_template.jinja").write_text("{{ messages }}")
        more = ["model.args.lora=2"] if family == "lora" else []
        model = f"model={{name: hf, args: {{path: {source}}}}}"
        config, folder = start(tmp_path, model, "rounds=0", *more)
    jobs = Count()
    (*_, last) = born_again(make_run(config, folder, do=jobs)).generations
    written = folder.generation(last.generation) / "pretrained"
    assert {file.name for file in written.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "README.md"),
    }
    network, tokenizer = opened(written)
    inputs = torch.randint(len(tokenizer), (2, 16))
    own = load(folder.path, generation=last.generation).model.network
    assert torch.equal(network(inputs).logits, own(inputs).logits)
    ids = tokenizer("the 5 is 3.").input_ids
    assert tokenizer.decode(ids) == "the 5 is 3."
    assert len(tokenizer) == network.config.vocab_size
    end = (tokenizer.eos_token_id, network.config.eos_token_id, network.generation_config)
    assert {end[0], end[1], end[2].eos_token_id, end[2].pad_token_id} == {0}
    assert (tokenizer.chat_template is None) == (family == "selfkd_gpt")
    card = (written / "README.md").read_text()
    assert f"`{last.hash}`" in card
    nll = find_metric("nll").with_unit(last.metrics["test_nll"])
    assert f"test NLL: {nll}\n" in card
    assert folder.facts.fingerprints["train"] in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (written / "config.json").read_text()
    exports = [payload["folder"] for kind, payload in jobs.jobs if kind == "export"]
    assert len(exports) == len(set(exports)) == config.most_rounds + 1
    if family != "selfkd_gpt":
        return
    teacher = folder.results()[0].hash
    assert f"distilled from the teacher `{teacher}` with temperature T = 1, weight alpha =" in card
    # what is missing is written again, and nothing else
    (written / "README.md").unlink()
    born_again(make_run(config, folder, do=(again := Count())))
    assert [payload["folder"] for kind, payload in again.jobs if kind == "export"] == [str(written)]


def test_the_student_of_an_ensemble_is_one(tmp_path: Path) -> None:
    model = "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}"
    config, folder = start(tmp_path, model, "members=2", "data.tokenizer=chars", command="ensemble")
    summary = compress(make_run(config, folder))
    network, tokenizer = opened(folder.path / "student" / "pretrained")
    inputs = torch.randint(len(tokenizer), (2, 16))
    assert torch.equal(network(inputs).logits, load(folder.path).model.network(inputs).logits)
    card = (folder.path / "student" / "pretrained" / "README.md").read_text()
    assert f"model `{summary.chosen.hash}`, student of an ensemble" in card
    assert "distilled from the teachers `" in card


def test_an_interrupted_export_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "model={name: selfkd_gpt, args: {depth: 1, width: 8, heads: 2}}"
    config, folder = start(tmp_path, model, "rounds=0", "data.tokenizer=chars")
    with monkeypatch.context() as patch:
        patch.setattr("selfkd.tasks.text.export.save_json", None)
        with pytest.raises(RuntimeError):
            born_again(make_run(config, folder))
    assert not (folder.generation(0) / "pretrained" / "README.md").exists()
    born_again(make_run(config, folder))
    opened(folder.generation(0) / "pretrained")
