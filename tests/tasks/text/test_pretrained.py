"""Models of `transformers` in folders: read, checked, made again without the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_folders import FAMILIES, TEXT, TOKENS, write
from torch import nn

from selfkd.config import Config, ModelConfig, load_config, to_tree
from selfkd.config.paths import with_absolute_paths
from selfkd.errors import ConfigError
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.tasks.text.pretrained import folder_hash, quiet
from selfkd.tasks.text.task import TextTask
from selfkd.training.trial import Trial


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text(TEXT)

    def find(family: str) -> Path:
        folder = root / family
        return folder if folder.exists() else write(folder, family)

    return find


def start(folder: Path, *settings: str) -> tuple[Config, TextTask]:
    own = [
        f"model={{name: hf, args: {{path: {folder}}}}}",
        f"data={{name: text, root: {folder.parent / 'text'}, context: 16}}",
        "train={steps: 4, epochs: 2, batch_size: 2, warmup_steps: 1}",
    ]
    config = load_config(settings=[*own, *settings], flags={"task": "text"})
    return config, TextTask(to_tree(config))


def test_a_folder_whose_weights_or_config_change_has_another_hash(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders(next(iter(FAMILIES))), tmp_path / "model")
    whole, config = (folder_hash(str(folder), weights=weights) for weights in (True, False))
    weights = next(folder.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert folder_hash(str(folder), weights=True) != whole
    assert folder_hash(str(folder), weights=False) == config
    weights.write_bytes(content)
    assert folder_hash(str(folder), weights=True) == whole
    change(folder, initializer_range=0.5)
    assert folder_hash(str(folder), weights=False) != config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_the_one_of_the_folder_and_needs_it_no_more(
    folders: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder = shutil.copytree(folders(family), tmp_path / "model")
    (tmp_path / "text").symlink_to(folders(family).parent / "text")
    config, task = start(folder)
    assert config.data.tokenizer == str(folder)
    assert config.train.lr == 5e-5
    facts = task.check()
    assert facts.outputs == TOKENS
    assert list(facts.weights) == [str(folder)]
    network = task.make(config.model).eval()
    with quiet():
        own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = torch.randint(TOKENS, (2, 16))
    # rows beyond the tokenizer are left out
    assert torch.equal(network(inputs).logits, own(inputs).logits[..., :TOKENS])
    path = tmp_path / "student.safetensors"
    task.save(path, network, config.model, {})
    shutil.rmtree(folder)
    again, found = task.load(str(path))
    assert torch.equal(again.eval()(inputs).logits, network(inputs).logits)
    assert found.model["args"] == {}  # a checkpoint names no folder
    assert str(tmp_path) not in json.dumps(found.architecture)


def test_students_start_from_the_folder_and_fresh_ones_do_not(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders("qwen2")
    config, task = start(folder)
    trial = Trial(
        config=config,
        stage="generation-0",
        seed=3,
        model=config.model,
        path=tmp_path / "student.safetensors",
        targets=tmp_path,
        teachers=(),
    )
    rows = list(task.train(trial))
    own, trained = task.make(config.model).state_dict(), load_tensors(trial.path)[0]
    assert rows[-1]["hash"] == task.digest(str(trial.path))
    assert all(0 < (own[name] - trained[name]).abs().max() < 1e-2 for name in own)
    assert torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"])
    config, task = start(folder, "model.args.fresh=true")
    assert config.train.lr != 5e-5
    torch.manual_seed(0)
    one = task.make(config.model).state_dict()
    torch.manual_seed(0)
    same, other = (task.make(config.model).state_dict() for _ in range(2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], own[name])


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_adapters_alone_are_trained_and_saved_within_the_weights(
    folders: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    config, task = start(folders(family), "model.args.lora=2", "train.lr=0.01", "train.ema=0.9")
    path = tmp_path / "student.safetensors"
    model = ModelConfig(name="hf", args={"path": config.model.args["path"]})
    whole = task.make(model).state_dict()
    network = task.make(config.model)
    trained = [name for name, each in network.named_parameters() if each.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    trial = Trial(
        config=config,
        stage="generation-0",
        seed=3,
        model=config.model,
        path=path,
        targets=tmp_path,
        teachers=(),
    )
    list(task.train(trial))
    again, _ = task.load(str(path))  # without peft
    found = again.state_dict()
    assert type(again).__module__.startswith("transformers")
    changed = {name for name in whole if not torch.equal(whole[name], found[name])}
    assert changed
    assert all("norm" not in name and "embed" not in name for name in changed)
    with pytest.raises(ValueError, match=r"train\.init must be fresh with lora"):
        start(folders(family), "model.args.lora=2", "train.init=teacher")[1].check()


def test_peft_is_named_where_it_is_missing(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, task = start(folders("gpt2"), "model.args.lora=2")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match="lora needs peft, got lora 2: pip install peft"):
        task.make(config.model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.context=40"], r"data.context must be at most 32, the positions of the model of"),
        (["data.tokenizer=bpe:280"], r"data.tokenizer must be that of the model of .*data.tokeniz"),
        (["data.tokenizer=bpe:330"], r"data.tokenizer must have at most 320 tokens, .*got 330"),
        (["model.args.path=gpt2"], "folder that save_pretrained has written .*hf download.*got"),
        (["model.args={}"], "model.args.path must be a folder .* got none"),
        (["model.args.fresh=2"], "fresh must be true or false, got 2"),
        (["model.args.lora=0"], "lora must be a whole number of at least 1, got 0"),
        (["model.args.lora_alpha=3"], "lora must be a whole number of at least 1, got None"),
        (["model.args={path: ., fresh: true, lora: 2}"], "lora must be left out with fresh"),
        (["model.args.depth=2"], "model.args must be arguments of 'hf', got 'depth'"),
    ],
)
def test_what_does_not_fit_is_named(
    folders: Callable[[str], Path], settings: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(folders("llama"), "data.tokenizer=bpe:300", *settings)[1].check()


def change(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change(f, auto_map={"AutoModelForCausalLM": "own.Model"}), r"own\.Model\), whi"),
        (lambda f: change(f, quantization_config={"bits": 4}), "plain weights, got quantised"),
        (lambda f: change(f, model_type="t5"), "causal language model of transformers, got 't5'|f"),
        (as_pickle, r"\.safetensors files, got pytorch_model.bin, pickled .*save_pretrained"),
        (lambda f: (f / "model.safetensors").unlink(), r"\.safetensors files, got none"),
        (lambda f: (f / "config.json").unlink(), "must have a config.json"),
        (lambda f: (f / "adapter_config.json").touch(), "whole model, got an adapter: merge it"),
        (lambda f: (f / "config.json").write_text("{"), "config.json must be JSON: Expecting"),
        (lambda f: change(f, n_layer=10**8), "of its tensors, got n_layer 100000000"),
        (lambda f: change(f, n_embd=64), r"weights of its config.json, got transformer.* \[\d+"),
        (without_a_weight, "must have all weights of its model, got no "),
        (lambda f: (f / "tokenizer.json").unlink(), "folder with a tokenizer.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "must be a causal language"),
    ],
)
def test_a_folder_that_is_not_safe_or_not_whole_is_refused(
    folders: Callable[[str], Path], tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    (tmp_path / "text").symlink_to(folders("gpt2").parent / "text")
    folder = shutil.copytree(folders("gpt2"), tmp_path / "model")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        start(folder)[1].check()


def test_a_model_that_sees_later_tokens_is_refused(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "text").symlink_to(folders("gpt2").parent / "text")
    folder = write(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="must be causal, got a BertLMHeadModel"):
        start(folder)[1].check()


def test_paths_are_only_of_hf_and_made_absolute() -> None:
    with pytest.raises(ConfigError, match=r"args\.path must be left out but with name hf"):
        load_config(settings=["model={name: selfkd_cnn, args: {path: a}}"])
    with pytest.raises(ConfigError, match="path must be a folder on this machine, got 's3:"):
        load_config(settings=["model={name: hf, args: {path: 's3://b/a'}}"], flags={"task": "text"})
    model = "{name: hf, args: {path: a/b}}"
    settings = [f"model={model}", f"student={model}", f"members.models=[{model}]"]
    config = with_absolute_paths(load_config(settings=settings, flags={"task": "text"}))
    named = [config.model, config.student, *config.members.models]
    assert {each.args["path"] for each in named if each} == {str(Path("a/b").absolute())}


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": None},
        {"architecture": {"num_hidden_layers": 10**9}},
        {"architecture": {"intermediate_size": 10**12}},
        {"architecture": {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}},
        {"architecture": {"model_type": "/etc/passwd"}},
        {"architecture": {"model_type": "gpt2"}},
        {"architecture": {"max_position_embeddings": 8}},
        {"vocabulary": 299},
        {"model": {"name": "hf", "args": {"path": "/no/such"}}, "architecture": None},
    ],
)
def test_metadata_that_are_not_of_the_tensors_are_refused(
    folders: Callable[[str], Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    config, task = start(folders("llama"))
    path = tmp_path / "student.safetensors"
    task.save(path, task.make(config.model), config.model, {})
    tensors, facts = load_tensors(path)
    own = change.get("architecture")
    own = {"architecture": facts["architecture"] | own} if own else {}
    save_tensors(path, tensors, {**facts, **change, **own})
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        task.load(str(path))


def test_code_named_in_a_checkpoint_is_not_looked_for(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    config, task = start(folders("llama"))
    path = tmp_path / "student.safetensors"
    network: nn.Module = task.make(config.model)
    task.save(path, network, config.model, {})
    tensors, facts = load_tensors(path)
    evil = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "_name_or_path": "/evil"}
    evil |= {"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels"}
    save_tensors(path, tensors, facts | {"architecture": facts["architecture"] | evil})
    found: Any = task.load(str(path))[0]
    assert "evil" not in json.dumps(found.config.to_dict(), default=str)
    assert found.config._attn_implementation in ("sdpa", "eager")
