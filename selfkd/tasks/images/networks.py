"""The data of a config and its networks: made, saved, loaded, as students and as teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, FiniteFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from selfkd.config import Config, DataConfig, ModelConfig, Tree, from_tree
from selfkd.config.names import describe_classes
from selfkd.config.schema import TransferConfig
from selfkd.config.speed import with_speed
from selfkd.data import Data, load_data
from selfkd.data.load import load_rest
from selfkd.data.transfer import FOLDER, TransferSet, load_transfer
from selfkd.deployment.reshape import PRUNED, check_size, pruned_share, reshape
from selfkd.distill.teacher import Teacher
from selfkd.models import make_model, parameters_count
from selfkd.results import Parts
from selfkd.results.row import ROW
from selfkd.soft_targets.manifest import data_key
from selfkd.storage.checkpoint import save_tensors
from selfkd.storage.files import inside
from selfkd.storage.remote import as_path
from selfkd.storage.rows import load_row
from selfkd.tasks.common import check_class_mean, check_top_k, open_checkpoint
from selfkd.tasks.images.augment import make_views
from selfkd.tasks.task import SPLITS, ModelFacts, Split
from selfkd.training.device import precision_of, prepare_device

LARGEST_ARGUMENT = 10_000
"""Largest number in the arguments of a foreign network, unless its tensors are larger."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class NetworkFacts(ModelFacts):
    """Metadata of a classifier's checkpoint."""

    classes: tuple[str | int, ...] = Field(min_length=1)
    """Names of the classes, in the order of the logits."""
    mean: tuple[FiniteFloat, ...] = Field(min_length=1)
    std: tuple[FiniteFloat, ...] = Field(min_length=1)
    image_size: int = Field(default=0, ge=0, le=LARGEST_ARGUMENT)
    """Height and width of its images in pixels; 0 where they are not known."""
    features: tuple[str, ...] | None = None
    """Names of the features that it takes, where it takes no images."""
    specialist: tuple[int, ...] = ()
    """Classes that a specialist tells apart; all others are its last one."""
    dustbin_shift: FiniteFloat = 0.0
    """Number that is added to the logit of a specialist's last class."""
    pruned: float | None = Field(default=None, gt=0, lt=1)
    """Share of its channels that was pruned, where its tensors are smaller than its name
    says."""


def _split_settings(config: DataConfig, seed: int) -> dict[str, Any]:
    """Return the arguments by which data and the rest of their training images are loaded."""
    transfer = config.transfer
    reserve = (transfer.size or 0) if transfer and _is_same(config, transfer) else 0
    return {
        "root": config.root,
        "download": config.download,
        "train_size": config.train_size,
        "val_size": config.val_size,
        "classes": config.classes,
        "image_size": config.image_size,
        "label_column": config.label_column,
        "reserve": reserve,
        "seed": seed,
    }


def _is_same(config: DataConfig, transfer: TransferConfig) -> bool:
    """Whether a transfer set is of the labelled data set; a folder is one of images alone."""
    return transfer.name == config.name != FOLDER and transfer.root in (None, config.root)


def _load_data(config: DataConfig, seed: int, device: str) -> Data:
    settings = _split_settings(config, seed)
    more = {key: getattr(config, key) for key in ("label_noise", "in_memory", "test_size")}
    return _load(config.name, tuple((settings | more).items()), device)


@lru_cache(maxsize=1)
def _load(name: str, settings: tuple[tuple[str, Any], ...], device: str) -> Data:
    return load_data(name, **dict(settings)).to(device)


@lru_cache(maxsize=1)
def _load_transfer(config: DataConfig, seed: int, device: str) -> TransferSet:
    own = config.transfer
    if own is None:
        raise ValueError("data.transfer must be given, got none")
    settings = _split_settings(config, seed)
    return load_transfer(
        own.name,
        _load_data(config, seed, device),
        root=own.root or (None if own.name == FOLDER else config.root),
        size=own.size,
        weight=own.weight,
        labelled=own.labels,
        rest=partial(load_rest, config.name, **settings) if _is_same(config, own) else None,
        label_column=config.label_column,
        fixed=config.image_size is None and config.name != FOLDER and "/" not in config.name,
        download=config.download,
        in_memory=config.in_memory,
        seed=seed,
    ).to(device)


class ImageNetworks:
    """The images of a config, and networks for them."""

    def __init__(self, tree: Tree) -> None:
        self.config: Config = with_speed(from_tree(tree))
        self.device = prepare_device(self.config)
        self.precision = precision_of(self.config.train.amp, self.device)
        self.data = _load_data(self.config.data, self.config.seed, self.device)
        self.fingerprint = self.data.fingerprint
        # the bias of classes without training images is fitted on validation
        self.evaluated: tuple[Split, ...] = SPLITS if self.config.data.classes else SPLITS[1:]
        self.views = make_views(
            self.config.data,
            seed=self.config.seed,
            channels=self.data.in_chans,
            size=self.data.image_size,
        )
        self.top_k = check_top_k(self.config, self.data.num_classes)
        check_class_mean(self.config, self.data.num_classes)
        self.data_key = self.key_of(self.data.fingerprint)

    def key_of(self, fingerprint: str) -> str:
        """Return the key that teacher logits of images are cached under."""
        return data_key(fingerprint, self.views.recipe, top_k=self.top_k)

    @cached_property
    def transfer(self) -> TransferSet | None:
        """Transfer set that students of teachers are trained on; None where there is none."""
        if self.config.transfer is None:
            return None
        return _load_transfer(self.config.data, self.config.seed, self.device)

    def require_transfer(self) -> TransferSet:
        """Return the transfer set.

        Raises:
            ValueError: There is none.
        """
        if self.transfer is None:
            raise ValueError("data.transfer must be given with a weight above 0, got none")
        return self.transfer

    def labels(self, split: Split) -> Tensor:
        """Return a split's labels, on the CPU."""
        labels: Tensor = getattr(self.data, split).labels.cpu()
        return labels

    def two_images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, labels and indices of two training images."""
        data, two = self.data, range(len(self.data.train.labels))[:2]
        found = data.batches("train", batch_size=2, rows=two, views=self.views, device=self.device)
        return next(found)

    def cached_labels(self) -> Tensor:
        """Return the label of each training image; -1 of one whose first view is mixed."""
        labels, size = self.labels("train"), self.data.image_size
        whole = self.views.are_whole(torch.arange(len(labels)), 0, (size, size))
        return torch.where(whole, labels, -1)

    def output_names(self, outputs: Sequence[int]) -> list[str]:
        """Return the names of classes."""
        return [str(self.data.class_names[output]) for output in outputs]

    def make(self, model: ModelConfig) -> nn.Module:
        """Return a fresh network for this data."""
        return self._make(model).to(self.device)

    def _make(self, model: ModelConfig) -> nn.Module:
        return make_model(
            model.name,
            model.args,
            num_classes=self.data.num_classes,
            in_chans=self.data.in_chans,
            image_size=self.data.image_size,
        )

    def save(
        self, path: Path, network: nn.Module, model: ModelConfig, more: Mapping[str, Any]
    ) -> str:
        """Save a network with what it is loaded by; return its hash."""
        data = self.data
        facts = {
            "model": {"name": model.name, "args": model.args},
            "classes": list(data.class_names),
            "in_chans": data.in_chans,
            "image_size": data.test_size,
            "mean": list(data.mean),
            "std": list(data.std),
            "data": data.name,
            "fingerprint": data.fingerprint,
            **({} if data.features is None else {"features": list(data.features)}),
            "parameters": parameters_count(network),
            **({} if (share := pruned_share(network)) is None else {PRUNED: share}),
            **more,
        }
        return save_tensors(path, network.state_dict(), facts)

    def load(self, checkpoint: str) -> tuple[nn.Module, NetworkFacts]:
        """Return the network of a checkpoint, and its metadata.

        What the metadata describe is compared with the tensors before any memory is taken for it.

        Raises:
            ValueError: It was trained for other classes, or is of no network that can be made.
        """
        tensors, facts = open_checkpoint(checkpoint, NetworkFacts)
        here = self.data.class_names
        if sorted(map(str, facts.classes)) != sorted(map(str, here)):
            raise ValueError(
                f"{checkpoint} was trained for other classes than {self.data.name}'s: "
                f"{describe_classes(facts.classes, here)}"
            )
        if facts.features != self.data.features:
            own = "images" if self.data.features is None else f"{len(self.data.features)} features"
            raise ValueError(
                f"{checkpoint} was trained on other inputs than the {own} of {self.data.name}: "
                + ("images" if facts.features is None else ", ".join(facts.features[:8]))
            )
        model = ModelConfig(**facts.model)
        network = rebuild(checkpoint, tensors, facts, lambda: self._make(model))
        return network.to(self.device), facts

    def teacher(self, checkpoint: str) -> Teacher:
        """Return a checkpoint's network as a teacher of this data, its classes in order."""
        return self.as_teacher(*self.load(checkpoint))

    def as_teacher(self, network: nn.Module, facts: NetworkFacts, *, copy: bool = True) -> Teacher:
        """Return a network as a teacher of this data.

        Args:
            network: Network with the normalisation and the order of classes of a checkpoint.
            facts: Metadata of that checkpoint.
            copy: Whether the network is copied.
        """
        return Teacher(
            network,
            input_stats=(self.data.mean, self.data.std),
            trained_stats=(facts.mean, facts.std),
            columns=[facts.classes.index(name) for name in self.data.class_names],
            copy=copy,
        )


def rebuild(
    checkpoint: str,
    tensors: Mapping[str, Tensor],
    facts: NetworkFacts,
    make: Callable[[], nn.Module],
) -> nn.Module:
    """Return the network of a checkpoint with its weights.

    What the metadata describe is compared with the tensors before any memory is taken for it.

    Args:
        checkpoint: Name of its file, for messages.
        tensors: Tensors by name.
        facts: Metadata.
        make: Function that makes the network which they describe.

    Raises:
        ValueError: The network cannot be made, or has other tensors.
    """
    try:
        if facts.pruned is not None:
            make = _pruned(facts.pruned, tensors, make)
        _check_shapes(facts, tensors, make)
        network = make()
        network.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        first = str(error).splitlines()[:2]
        raise ValueError(f"{checkpoint} cannot be rebuilt: {' '.join(first)}") from None
    return network


def parts_of(checkpoint: str) -> list[str]:
    """Return the file of a network, or those that a generalist's JSON file names."""
    path = as_path(checkpoint)
    if path.suffix != ".json":
        return [checkpoint]
    folder = path.parent
    parts = load_row(Parts, path).parts
    return [str(inside(folder.parent, f"{folder.name}/{part}")) for part in parts]


def _check_shapes(
    facts: NetworkFacts, tensors: Mapping[str, Tensor], make: Callable[[], nn.Module]
) -> None:
    """Check that a foreign network has tensors of these shapes; it takes no memory to know."""
    sizes = [size for tensor in tensors.values() for size in tensor.shape]
    most = max([LARGEST_ARGUMENT, *sizes])
    for number in _numbers(facts.model["args"]):
        if abs(number) > most:
            raise ValueError(f"model.args must be of its tensors' sizes, got {number}")
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            described = make().state_dict()
    except (RuntimeError, ValueError):  # some compute while they are made: the real one tells
        return
    for name, tensor in described.items():
        if name in tensors and tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{name} must be {list(tensor.shape)}, got {list(tensors[name].shape)}"
            )
    if others := described.keys() ^ tensors.keys():
        name = facts.model["name"]
        raise ValueError(f"its tensors must be those of {name}, unlike {min(others)}")


def _pruned(
    share: float, tensors: Mapping[str, Tensor], make: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    """Return a function that makes a network with the channels of a pruned one.

    Raises:
        ValueError: The one that it was pruned from would be far larger.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        check_size(make(), tensors)
    return lambda: reshape(make(), tensors, share)


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers in plain data."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value
