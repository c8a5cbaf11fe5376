"""`selfkd.load`: the model of a run, ready for images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from selfkd.errors import ConfigError
from selfkd.loading.card import PLACE, card_of_run, plain_card
from selfkd.loading.choose import choose, open_run
from selfkd.loading.hub import push_folder, write_folder
from selfkd.losses import Average
from selfkd.results import Model
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import read_text, save_text
from selfkd.storage.remote import as_path
from selfkd.storage.temporary import TemporaryFolder
from selfkd.tasks import is_known, load_ensemble, load_predictor
from selfkd.tasks.task import Predictor

EXPORTED = "model.safetensors"
MakeModel = Callable[[], nn.Module]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicts of images, one row an image."""

    probabilities: Tensor
    """Probabilities `[images, classes]`, float32 on the CPU."""
    classes: tuple[str, ...] = ()
    """Names of the classes."""

    @property
    def labels(self) -> Tensor:
        """Class indices `[images]` of the largest probabilities."""
        return self.probabilities.argmax(dim=1)

    @property
    def confidences(self) -> Tensor:
        """Probabilities `[images]` of the predicted classes."""
        return self.probabilities.amax(dim=1)

    @property
    def names(self) -> list[str]:
        """Name of each predicted class, its number where it has none."""
        return [self._name(label) for label in self.labels.tolist()]

    def top(self, count: int = 5) -> list[list[tuple[str, float]]]:
        """Return the most probable classes of each image with their probabilities.

        >>> Predictions(torch.tensor([[0.25, 0.75]]), ("cat", "dog")).top(2)
        [[('dog', 0.75), ('cat', 0.25)]]
        """
        values, labels = self.probabilities.topk(min(count, self.probabilities.shape[1]), dim=1)
        rows = zip(labels.tolist(), values.tolist(), strict=True)
        return [
            [(self._name(label), value) for label, value in zip(*row, strict=True)] for row in rows
        ]

    def _name(self, label: int) -> str:
        return self.classes[label] if self.classes else str(label)

    def __len__(self) -> int:
        return len(self.probabilities)

    def __repr__(self) -> str:
        pairs = zip(self.names, self.confidences.tolist(), strict=True)
        shown = [f"{name} {value:.0%}" for name, value in list(pairs)[:8]]
        return f"Predictions({', '.join(shown)}{', …' if len(self) > 8 else ''})"


class LoadedModel:
    """A trained model in eval mode, with its classes and the preprocessing of its evaluation.

    It is made by `selfkd.load`.
    """

    def __init__(
        self, predictor: Predictor, *, checkpoint: Mapping[str, Any], card: str, title: str
    ) -> None:
        self._predictor = predictor
        self.model: nn.Module = predictor.network
        """Network from normalised inputs `[batch, channels, height, width]` to logits."""
        self.classes: tuple[str, ...] = predictor.names
        """Names of the classes, in the order of the logits."""
        self.checkpoint: dict[str, Any] = dict(checkpoint)
        """Metadata of its file: network, classes, normalisation, hash."""
        self.card = card
        """Text of its model card, as Markdown."""
        self.title = title
        """Name of the model within its run, such as generation 3."""

    def predict(self, images: Any, *, batch_size: int = 256) -> Predictions:
        """Predict images, scaled and normalised as in the run's evaluation.

        Args:
            images: One image or several: files, Pillow images, uint8 arrays or tensors, or
                floating ones with pixels in [0, 1]; arrays are `[height, width, channels]`,
                tensors `[channels, height, width]`, with a batch in front where there are several.
                Of a model of arrays: rows of features `[N, F]`, not yet standardised, or a
                DataFrame. For a network of your own (`make_model`): its inputs, as a tensor.
            batch_size: Number of images that are predicted at once.

        Returns:
            Probabilities, labels and names, one row an image.

        Raises:
            TypeError: An image of another type, or an output that is no tensor.
            ValueError: An image that cannot be used, or an output that is not `[batch, classes]`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        training, found = self.model.training, []
        self.model.eval()
        try:
            with torch.inference_mode():
                for inputs in self._predictor.inputs(
                    images, batch_size=batch_size, device=self.device
                ):
                    found.append(_checked(self.model(inputs)).float().softmax(dim=1).cpu())
        finally:
            self.model.train(training)
        width = len(self.classes)
        return Predictions(torch.cat(found) if found else torch.zeros(0, width), self.classes)

    def generate(
        self,
        prompt: str,
        *,
        most: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        greedy: bool = False,
        seed: int = 0,
    ) -> str:
        """Return what a language model writes after a text, the same for the same seed.

        Args:
            prompt: Text.
            most: Most tokens that it writes; as many as its context has room for when not given.
            temperature: Temperature that tokens are sampled at.
            top_p: Probability of the smallest set of most probable tokens that is sampled from.
            greedy: Whether the most probable token is taken, without draws.
            seed: Seed of the draws.

        Raises:
            TypeError: The model is no language model, or an average of several.
            ValueError: A text that leaves no room, or sampling that is not possible.
        """
        write: Callable[..., str] | None = getattr(self._predictor, "generate", None)
        if write is None:
            raise TypeError(f"model must be a language model to write text, got {self!r}")
        return write(
            prompt, most=most, temperature=temperature, top_p=top_p, greedy=greedy, seed=seed
        )

    @property
    def device(self) -> torch.device:
        """Device of the network, on which it predicts."""
        tensor = next(self.model.parameters(), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def to(self, device: torch.device | str) -> Self:
        """Move the network to a device; return self."""
        self.model.to(device)
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the model to a folder that `selfkd.load` reads, and that a hub shows.

        Args:
            folder: Folder to write, on a disk or behind a URI: `model.safetensors`, `config.json`
                and the card `README.md`.

        Raises:
            ValueError: The model is an ensemble, whose members are saved each by itself, or the
                folder is that of a run.
        """
        place = as_path(folder).expanduser()
        if (place / "config.yaml").exists():
            raise ValueError(f"folder must be one of the model's own, got the run folder {place}")
        if self.checkpoint.get("ensemble"):
            raise ValueError(f"model must be a single one to be saved, got {self.title}")
        return write_folder(place, self.model, self.checkpoint, self.card)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the model with its card to the Hugging Face hub, or to what HF_ENDPOINT names.

        Args:
            repo_id: Name of the repository, `user/name`; it is created where there is none.
            private: Whether a repository that is created can be seen by its owner alone.
            token: Access token; that of `hf auth login` or HF_TOKEN when not given.

        Returns:
            Address of the repository.

        Raises:
            ImportError: huggingface_hub is not installed.
            ValueError: The model is an ensemble.
        """
        with TemporaryFolder() as temporary:
            folder = self.save(temporary.path / "model")
            save_text(folder / "README.md", self.card.replace(PLACE, repo_id))
            return push_folder(folder, repo_id, private=private, token=token)

    def __repr__(self) -> str:
        name = (self.checkpoint.get("model") or {}).get("name") or type(self.model).__name__
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"LoadedModel({self.title}: {name}{classes})"


def load(
    run: str | Path,
    *,
    generation: int | None = None,
    ensemble: bool = False,
    make_model: MakeModel | None = None,
) -> LoadedModel:
    """Load the chosen model of a run, with its classes and preprocessing.

    The chosen model of generations is that of the best one on validation, `search.metric`: by the
    mean over the fresh seeds where all were replicated, else by the chosen trials; the test split
    has no say. That of an ensemble run is the distilled student. A run that is going on gives what
    is done. Nothing that is read from the folder is run.

    Args:
        run: Run folder, on a disk or behind a URI such as `s3://bucket/runs/NAME`; a folder that
            `LoadedModel.save` has written; or the `.safetensors` file of one model.
        generation: Number of the generation whose model is loaded.
        ensemble: Whether to load the ensemble of all generations, or of an ensemble run's teachers.
        make_model: Function that makes the network, for one that was trained by a function of
            yours: its architecture is not in the folder.

    Raises:
        ValueError: There is no such model, or not yet, or a file is damaged.

    >>> load("runs/nowhere")
    Traceback (most recent call last):
    selfkd.errors.ConfigError: run must be a run folder (with a config.yaml), a folder that `save` \
has written or a .safetensors file, got runs/nowhere
    """
    path = as_path(run).expanduser()
    if path.suffix == ".safetensors" or (path / EXPORTED).exists():
        if generation is not None or ensemble:
            raise ConfigError(f"generation and ensemble must be of a run folder, got {path}")
        return _load_file(path, make_model)
    folder, config, facts = open_run(path)
    chosen = choose(folder, config, generation=generation, ensemble=ensemble)
    if facts is not None and facts.function is not None and make_model is None:
        raise ConfigError(
            f"make_model must be given for {path}, whose models were trained by a function of your "
            "own: selfkd.load(…, make_model=lambda: MyNetwork())"
        )
    card = card_of_run(folder, config, facts, chosen)
    checkpoints = [str(folder.file(model.checkpoint)) for model in chosen.models]
    for checkpoint in checkpoints:
        if not as_path(checkpoint).exists():
            raise ConfigError(f"{chosen.title} must have its file, got none at {checkpoint}")
    if chosen.average is None:
        predictor, metadata = _load_one(checkpoints[0], make_model)
    else:
        average = cast("Average", chosen.average)
        predictor = _load_several(checkpoints, chosen.models, average, make_model)
        metadata = {"ensemble": checkpoints, "average": chosen.average}
        metadata["hash"] = "+".join(model.hash for model in chosen.models)
    return LoadedModel(predictor, checkpoint=metadata, card=card, title=chosen.title)


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    make_model: MakeModel | None = None,
) -> str:
    """Upload the chosen model of a run to the Hugging Face hub; see `LoadedModel.push_to_hub`.

    Args:
        run: Run folder, as of `load`.
        repo_id: Name of the repository, `user/name`.
        private: Whether a repository that is created can be seen by its owner alone.
        token: Access token; that of `hf auth login` or HF_TOKEN when not given.
        make_model: Function that makes the network, as of `load`.

    Returns:
        Address of the repository.
    """
    model = load(run, make_model=make_model)
    return model.push_to_hub(repo_id, private=private, token=token)


def _load_file(path: Path, make_model: MakeModel | None) -> LoadedModel:
    file = path if path.suffix == ".safetensors" else path / EXPORTED
    if not file.exists():
        raise ConfigError(f"run must be a file that is there, got {path}")
    predictor, metadata = _load_one(str(file), make_model)
    readme = file.with_name("README.md")
    card = read_text(readme) if file != path and readme.exists() else plain_card(metadata)
    return LoadedModel(predictor, checkpoint=metadata, card=card, title=file.stem)


def _load_one(checkpoint: str, make: MakeModel | None) -> tuple[Predictor, dict[str, Any]]:
    """Return a model, of images where it was trained by selfkd, with its metadata."""
    tensors, metadata = load_tensors(as_path(checkpoint))
    if is_known(metadata):
        return load_predictor(checkpoint, make), metadata
    if make is None:
        raise ConfigError(
            f"make_model must be given for {checkpoint}, which was trained by a function of your "
            "own: selfkd.load(…, make_model=lambda: MyNetwork())"
        )
    network = make()
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise ConfigError(f"make_model must make the network of {checkpoint}: {first}") from None
    return _OwnPredictor(network.eval()), metadata


def _load_several(
    checkpoints: Sequence[str],
    models: Sequence[Model],
    average: Average,
    make: MakeModel | None,
) -> Predictor:
    weights = [model.weight for model in models if model.weight is not None] or None
    if make is None:
        return load_ensemble(checkpoints, average=average, weights=weights)
    raise ConfigError(
        "ensemble must be False with make_model, whose outputs may be no logits: load each model "
        f"by its generation, got {len(checkpoints)} models"
    )


@dataclass(frozen=True)
class _OwnPredictor:
    """A network of the user's own, which takes its inputs as they are."""

    network: nn.Module
    names: tuple[str, ...] = ()

    def inputs(self, items: Any, *, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        if not isinstance(items, Tensor):
            raise TypeError(
                f"inputs of a network of your own must be a tensor, got {type(items).__name__}"
            )
        return (part.to(device) for part in torch.split(items, batch_size))

    def example(self) -> Tensor:
        raise TypeError(
            "inputs of a network of your own must be given, as only its code knows them"
        )


def _checked(logits: object) -> Tensor:
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return logits, got {type(logits).__name__}: call `.model`")
    if logits.ndim != 2:
        raise ValueError(
            f"model must return logits [batch, classes], got {list(logits.shape)}: call `.model`"
        )
    return logits
