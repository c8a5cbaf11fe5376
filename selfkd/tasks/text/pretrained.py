"""Causal language models of `transformers`: from a folder, from plain data, with adapters."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from selfkd.distill.outputs import take_logits
from selfkd.results import Row
from selfkd.storage.files import load_json, parse_json
from selfkd.storage.remote import as_path

SAVE_AGAIN = "AutoModelForCausalLM.from_pretrained(…).save_pretrained(FOLDER)"
LARGEST_SIZE = 2**24
"""Largest number in the architecture of a checkpoint, unless its tensors are larger."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NOT_KEPT = (
    *("auto_map", "transformers_version", "dtype", "torch_dtype", "architectures"),
    *("attn_implementation", "experts_implementation", "id2label", "label2id", "use_cache"),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def make_pretrained(
    vocabulary: int,
    context: int,
    *,
    path: str | None = None,
    fresh: bool = False,
    lora: int | None = None,
    lora_alpha: int | None = None,
) -> nn.Module:
    """Return the causal language model of a folder, in float32.

    Its outputs are the tokens of the tokenizer: rows of the embedding beyond them, by which
    vocabularies are padded, are left out.

    Args:
        vocabulary: Number of tokens.
        context: Number of tokens that it is to see at most.
        path: Folder, as `save_pretrained` writes it.
        fresh: Whether its weights are random, and only its architecture is that of the folder.
        lora: Rank of low-rank adapters of all linear layers, which alone are trained; all weights
            are when not given.
        lora_alpha: Scale of the adapters times their rank; twice the rank when not given.

    Raises:
        ValueError: No such folder, weights or code that are not safe to read, or sizes that do not
            suit the text.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
        https://arxiv.org/abs/2106.09685
    """
    if type(fresh) is not bool:
        raise ValueError(f"fresh must be true or false, got {fresh!r}")
    if fresh and lora is not None:
        raise ValueError(f"lora must be left out with fresh, whose weights are random, got {lora}")
    folder = check_folder(path, weights=not fresh)
    described = _without_extras(load_json(folder / "config.json"))
    if fresh:
        described |= dict.fromkeys(_TOKENS) | {"vocab_size": vocabulary}
        network = make_architecture(described)
    else:
        network = _read_weights(folder, described)
        _fit_vocabulary(network, vocabulary, str(folder))
    check_context(network, context, f"the model of {folder}")
    architecture_of(network)  # which a checkpoint must be able to keep
    if lora is not None or lora_alpha is not None:
        network = _with_adapters(network, lora, lora_alpha)
    return network


def check_folder(path: str | None, *, weights: bool) -> Path:
    """Return the folder of a model, whose files are safe to read.

    Args:
        path: Folder, as `save_pretrained` writes it.
        weights: Whether its weights are wanted.

    Raises:
        ValueError: It is no such folder; says what to do.
    """
    if path is None or not as_path(path).is_dir():
        got = "none" if path is None else path
        raise ValueError(
            "model.args.path must be a folder that save_pretrained has written (nothing is "
            f"downloaded: `hf download NAME --local-dir FOLDER` does), got {got}"
        )
    folder = as_path(path)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} must be a whole model, got an adapter: merge it into its model first "
            "(PeftModel.merge_and_unload) and save that"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} must have a config.json, as save_pretrained writes, got none")
    try:
        described = parse_json((folder / "config.json").read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} must be JSON: {error}") from None
    if not isinstance(described, Mapping) or not isinstance(described.get("model_type"), str):
        raise ValueError(f"{folder / 'config.json'} must have a model_type, got none")
    if remote := described.get("auto_map"):
        name = next(iter(remote.values()), remote) if isinstance(remote, Mapping) else remote
        raise ValueError(
            f"{folder / 'config.json'} must be of a model in transformers itself, got code of its "
            f"own (auto_map: {name}), which is never run: save the model by its class in "
            "transformers, if it has one"
        )
    if described.get("quantization_config"):
        raise ValueError(
            f"{folder} must have plain weights, got quantised ones (quantization_config), which "
            "are not trained: take the model that they were made from"
        )
    if weights and not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
        got = f"{pickled[0]}, pickled weights, which may run code" if pickled else "none"
        raise ValueError(
            f"{folder} must have weights in .safetensors files, got {got}: save it again with "
            f"{SAVE_AGAIN}"
        )
    return folder


def folder_hash(path: str, *, weights: bool) -> str:
    """Return a hash of a model's folder: of its config, and of its weights where they are wanted.

    Args:
        path: Folder, as `save_pretrained` writes it.
        weights: Whether the weights are read.
    """
    folder, digest = as_path(path), hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors") if weights else ())]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def check_context(network: nn.Module, context: int, name: str) -> None:
    """Raise ValueError for a context of more tokens than a model has positions."""
    config: Any = network.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < context:
        raise ValueError(
            f"data.context must be at most {positions:,}, the positions of {name}, got {context:,}"
        )


@torch.no_grad()
def check_causal(network: nn.Module, name: str) -> None:
    """Raise ValueError for a model whose predictions depend on later tokens, such as a BERT."""
    training, device = network.training, next(network.parameters()).device
    network.eval()
    tokens = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]], device=device)
    first, second = take_logits(network(tokens), "model")[:, 0]
    network.train(training)
    if not (first - second).abs().max() <= 1e-5 * first.abs().max():
        raise ValueError(
            f"the model of {name} must be causal, got a {type(network).__name__} whose predictions "
            "depend on later tokens"
        )


def make_architecture(described: Mapping[str, Any]) -> nn.Module:
    """Return a model of `transformers` with random weights, without reading any file.

    Args:
        described: Config of the model with its `model_type`, as plain data.

    Raises:
        ValueError: It is of no causal language model of transformers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        try:
            config = AutoConfig.for_model(**_without_extras(described))
            network: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # noqa: BLE001 - a config is checked by libraries of their own
            raise ValueError(
                f"config.json must be of a causal language model of transformers, got "
                f"{described.get('model_type')!r}: {_first_line(error)}"
            ) from None
    return network


def architecture_of(network: nn.Module) -> Row:
    """Return the config of a model as plain data, without paths, by which it can be made again.

    Raises:
        ValueError: It is no plain data.
    """
    config: Any = network.config
    described = _without_extras(config.to_dict())
    try:
        row: Row = json.loads(json.dumps(described, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json must be plain data to be kept: {error}") from None
    return row


def check_architecture(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check an architecture of unknown origin before time or memory is taken for it.

    Args:
        described: Config of the model as plain data.
        tensors: Tensors by name that are to be its own.

    Raises:
        ValueError: A number that its tensors cannot be of, or other tensors.
    """
    _check_sizes(described, {name: tensor.shape for name, tensor in tensors.items()})
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = make_architecture(described)
    found = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if found != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"its tensors must be those of a {described.get('model_type')}")
    held = sum(tensor.numel() for tensor in tensors.values())
    beside = sum(buffer.numel() for buffer in network.buffers())
    if beside > held + LARGEST_SIZE:
        raise ValueError(f"its sizes must be those of its tensors, got {beside:,} values beside")


def _check_sizes(described: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError for a number that tensors of these shapes cannot be of."""
    most = max([LARGEST_SIZE, *(size for shape in shapes.values() for size in shape)])
    for key, number in _numbers(described, ""):
        counted = any(part in key for part in ("layer", "num_", "block", "depth"))
        if isinstance(number, int) and abs(number) > (len(shapes) + 1024 if counted else most):
            raise ValueError(f"sizes must be those of its tensors, got {key} {number}")


def merged(network: nn.Module) -> nn.Module:
    """Return a model whose adapters are added to its weights; one without adapters as it is."""
    if not hasattr(network, "merge_and_unload"):
        return network
    whole: nn.Module = copy.deepcopy(network).merge_and_unload()  # type: ignore[operator]
    return whole


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what transformers and peft print of loading and saving to themselves."""
    from transformers.utils import logging as messages

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


def _read_weights(folder: Path, described: Row) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    described |= {"pad_token_id": None}  # whose row of the embedding would not be trained
    with quiet():
        try:
            _check_sizes(described, _shapes(folder))
            config = AutoConfig.for_model(**described)
            network, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # noqa: BLE001 - files are read by libraries of their own
            raise ValueError(
                f"{folder} must be a causal language model of transformers: {_first_line(error)}"
            ) from None
    if odd := sorted(report["mismatched_keys"]):
        name, found, own = odd[0]
        raise ValueError(
            f"{folder} must have the weights of its config.json, got {name} {list(found)} instead "
            f"of {list(own)}"
        )
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder} must have all weights of its model, got no {missing[0]}{more}")
    loaded: nn.Module = network
    return loaded


def _shapes(folder: Path) -> dict[str, Sequence[int]]:
    """Return the shapes of a folder's tensors, of which none is read."""
    shapes = dict[str, Sequence[int]]()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _fit_vocabulary(network: Any, vocabulary: int, folder: str) -> None:
    """Leave out the rows of a padded vocabulary."""
    rows = network.get_input_embeddings().weight.shape[0]
    if rows < vocabulary:
        raise ValueError(
            f"data.tokenizer must have at most {rows:,} tokens, the vocabulary of the model of "
            f"{folder}, got {vocabulary:,}: take its own, data.tokenizer={folder}, or train on "
            "text that it writes (distill.mode traces)"
        )
    if rows > vocabulary:
        with quiet():
            network.resize_token_embeddings(vocabulary)


def _with_adapters(network: nn.Module, rank: int | None, alpha: int | None) -> nn.Module:
    if type(rank) is not int or rank < 1:
        raise ValueError(f"lora must be a whole number of at least 1, got {rank!r}")
    alpha = 2 * rank if alpha is None else alpha
    if type(alpha) is not int or alpha < 1:
        raise ValueError(f"lora_alpha must be a whole number of at least 1, got {alpha!r}")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError(f"lora needs peft, got lora {rank}: pip install peft") from None
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with quiet():
        adapted: nn.Module = get_peft_model(network, config)
    return adapted


def _without_extras(described: Mapping[str, Any]) -> Row:
    """Return the config of a model without what names files, code or a way to compute."""
    return {
        key: _without_extras(value) if isinstance(value, Mapping) else value
        for key, value in described.items()
        if not key.startswith("_") and key not in _NOT_KEPT
    }


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(part, name)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]
    return first.partition(" Should contain one of")[0][:300]  # a list of all models
