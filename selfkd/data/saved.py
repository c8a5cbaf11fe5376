"""Loading of image data sets that the library `datasets` has saved by `save_to_disk`."""

import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folder import PARTS, make_source
from .sources import Source
from .stream import State, file_states

if TYPE_CHECKING:
    from PIL.Image import Image

_STATE = "state.json"


@dataclass(frozen=True, eq=False)
class SavedPictures:
    """Pictures of a split of a saved data set."""

    name: str
    """Folder of the split, for messages."""
    dataset: Any
    """Split of the library's, whose only column has files that are not decoded."""
    column: str
    """Name of that column."""
    digest: str
    """Hash of the split, as it was saved."""

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, number: int) -> "Image":
        """Open a picture without decoding it; what is not on this machine is not fetched."""
        from PIL import Image

        stored = self.dataset[number][self.column]
        if stored is None:
            raise ValueError("there is none")
        if stored["bytes"] is not None:
            return Image.open(io.BytesIO(stored["bytes"]))
        if "://" in (stored["path"] or "://"):
            raise ValueError(f"it is at {stored['path']}, not saved with the data set")
        return Image.open(stored["path"])

    def where(self, number: int) -> str:
        """Return the place of a picture."""
        return f"image {number} of {self.name}"

    def key(self, number: int) -> str:
        """Return a name that identifies a picture without decoding it."""
        return f"{self.digest}[{number}]"

    def states(self, numbers: Sequence[int]) -> list[State] | None:
        """Return the states of the files of the split, and which rows of it the pictures are."""
        return table_states(self.dataset, self.column, numbers)


def table_states(dataset: Any, column: str, numbers: Sequence[int]) -> list[State] | None:
    """Return what changes with the content of pictures in the files of a table.

    Args:
        dataset: Data set of the library's, whose pictures are not decoded.
        column: Name of their column.
        numbers: Rows.

    Returns:
        The states of the files, and a row for each picture; None where the table is not of files,
        or a picture is in a file of its own.
    """
    files = [os.path.realpath(each["filename"]) for each in dataset.cache_files]
    chunks = dataset.data.column(column).chunks
    if not files or any(chunk.field("bytes").null_count for chunk in chunks):
        return None
    found = file_states(files)
    return None if found is None else found + [(f"{column}[{n}]", 0, 0, 0) for n in numbers]


def is_saved(root: Path) -> bool:
    """Return whether a folder is a saved data set, or has one in `train`."""
    return any((root / name).is_file() for name in ("dataset_dict.json", _STATE, f"train/{_STATE}"))


def open_saved(root: Path, image_size: int | None) -> Source:
    """Open a saved data set as a source, its splits as the folders train, val and test.

    Raises:
        ValueError: The library is missing, or a data set that is damaged, without a training split,
            or without one column of images and one of classes.
    """
    left_out, parts, class_names = Counter[str](), {}, dict[str, tuple[str, ...]]()
    found = load_saved(root)
    for name, dataset in found.items():
        part = PARTS.get(name)
        if part is None or part in parts:
            left_out[f"of split {name}"] = len(dataset)
            continue
        place = f"{root} (split {name})" if len(found) > 1 else str(root)
        folder = root / name if (root / name).is_dir() else root
        pictures, labels, names = _split(dataset, place, folder)
        parts[part], class_names[name] = (pictures, labels), names
    if "train" not in parts:
        raise ValueError(
            f"data.root must hold a data set with a split train, got {', '.join(found)} in {root}"
        )
    names = class_names["train"]
    for name, other in class_names.items():
        if other != names:
            raise ValueError(
                f"every split must have the classes {', '.join(names)}, got {', '.join(other)} in "
                f"{root} (split {name})"
            )
    return make_source(str(root), parts, names, image_size, left_out)


def load_saved(root: Path) -> Mapping[str, Any]:
    """Return the splits of a saved data set by name; a single one is that of training.

    Raises:
        ValueError: The library is missing, or the data set is damaged.
    """
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:  # or another module of that name
        raise ValueError(
            f"data.root holds a data set of the library datasets, which is not installed, in "
            f"{root}: pip install 'selfkd[datasets]'"
        ) from None
    folders = {"": root}
    if not any((root / name).is_file() for name in ("dataset_dict.json", _STATE)):
        folders = {state.parent.name: state.parent for state in sorted(root.glob(f"*/{_STATE}"))}
    try:
        loaded = {name: load_from_disk(str(folder)) for name, folder in folders.items()}
    except Exception as error:  # damaged files may end in any error
        raise ValueError(
            f"data.root must hold an intact saved data set, got {root} ({error})"
        ) from error
    whole = loaded.get("")
    if isinstance(whole, DatasetDict):
        return dict(whole)
    return loaded if whole is None else {"train": whole}


def _split(
    dataset: Any, place: str, folder: Path
) -> tuple[SavedPictures, list[int], tuple[str, ...]]:
    """Return pictures, labels and names of the classes of a split."""
    from datasets import ClassLabel, Image

    image = _column(dataset, Image, "images", place, "cast_column(NAME, datasets.Image())")
    label = _column(dataset, ClassLabel, "classes", place, "class_encode_column(NAME)")
    dataset = dataset.with_format(None)
    labels = list(dataset[label])
    if unknown := sum(number is None or number < 0 for number in labels):
        raise ValueError(
            f"every image must have a class, got {unknown:,} of {len(labels):,} without one in "
            f"{place}: leave them out before you save it"
        )
    files = dataset.select_columns([image]).cast_column(image, Image(decode=False))
    digest = str(json.loads((folder / _STATE).read_text(encoding="utf-8"))["_fingerprint"])
    pictures = SavedPictures(place, files, image, digest)
    return pictures, labels, tuple(dataset.features[label].names)


def _column(dataset: Any, kind: type, words: str, place: str, way: str) -> str:
    """Return the name of the only column of a type."""
    features: Mapping[str, Any] = dataset.features
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"data.root must hold one column of {words}, got {', '.join(found)} in {place}: save "
            f"it without the others, by dataset.remove_columns"
        )
    known = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    raise ValueError(
        f"data.root must hold a column of {words}, got {known} in {place}: save it after "
        f"dataset.{way}"
    )
