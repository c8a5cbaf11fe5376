"""Folders that a hub shows: weights, config, card; and their upload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from selfkd import __version__
from selfkd.results import FORMAT
from selfkd.storage.checkpoint import save_tensors
from selfkd.storage.files import save_json, save_text

_OF_A_MACHINE = ("from", "hash")  # a path, and what is computed anew


def write_folder(folder: Path, network: nn.Module, metadata: Mapping[str, Any], card: str) -> Path:
    """Write a model to a folder: `model.safetensors`, `config.json`, `README.md`.

    Args:
        folder: Folder to write.
        network: Network of the model.
        metadata: Metadata of its checkpoint.
        card: Text of its card.

    Returns:
        The folder.
    """
    facts = {key: value for key, value in metadata.items() if key not in _OF_A_MACHINE}
    digest = save_tensors(folder / "model.safetensors", network.state_dict(), facts)
    own = {"library_name": "selfkd", "selfkd_version": __version__, "format": FORMAT}
    save_json(folder / "config.json", own | facts | {"hash": digest})
    save_text(folder / "README.md", card)
    return folder


def push_folder(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload a folder to a repository of the hub, which is created where there is none.

    Args:
        folder: Folder to upload.
        repo_id: Name of the repository, `user/name`.
        private: Whether one that is created can be seen by its owner alone.
        token: Access token; the one of this machine when not given.

    Returns:
        Address of the repository.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ImportError(
            "huggingface_hub must be installed to push to the hub: pip install huggingface_hub"
        ) from None
    hub = HfApi(token=token)
    address = hub.create_repo(repo_id, private=private, exist_ok=True)
    hub.upload_folder(
        folder_path=folder, repo_id=address.repo_id, commit_message="Upload a model of selfkd"
    )
    return str(address)
