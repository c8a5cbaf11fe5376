"""Loading of image files in folders: root/train/<class>/<image>, root/validation/…, root/test/…

Links are followed. Left out is what is hidden at any depth, and files of types that Pillow does
not decode.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from unicodedata import normalize

import torch

from selfkd.text import one_line

from .batches import Split
from .listing import ListedFiles, Listing, keep_listing
from .sources import Source
from .stream import Files, Pictures, Stream, Survey, survey

_SYSTEM = frozenset(
    ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__")
)

PARTS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
"""Splits by the names that folders and splits of saved data sets have."""
_PLURAL = ("broken link", "circular link", "special file", "system folder")
MOST_TYPES = 8
"""Number of types that are named of what is left out."""


def open_folder(root: Path, image_size: int | None) -> Source:
    """Open a folder of images as a source; without a test folder, val is the test split.

    Raises:
        FileNotFoundError: There is no training folder, or no other beside it.
        ValueError: A class without a training image, no image at all, or training images alone.
    """
    listing = keep_listing(root, PARTS, suffixes(), lambda: _list(root))
    parts = {
        part: (Files(root, files.paths), files.labels) for part, files in listing.parts.items()
    }
    left_out = Counter(listing.left_out)
    return make_source(str(root), parts, listing.classes, image_size, left_out)


def _list(root: Path) -> Listing:
    left_out = Counter[str]()
    folders = _part_folders(root, left_out)
    names = {part: _class_names(root / name, left_out) for part, name in folders.items()}
    class_names = names["train"]
    written = {normalize("NFC", name): name for name in class_names}  # macOS writes NFD
    parts = {}
    for part, folder in folders.items():
        own = {name: name for name in names[part] if name in class_names}
        for name in set(names[part]) - own.keys():
            own.setdefault(written.get(normalize("NFC", name), name), name)
        if unknown := sorted(own.keys() - set(class_names)):
            raise ValueError(
                f"every class must have a training image, got none of {unknown[0]!r}, which is in "
                f"{root / folder}; classes in train are {_few(class_names)}"
            )
        paths = [f"{folder}/{own[name]}" if name in own else None for name in class_names]
        parts[part] = _list_images(root, folder, paths, left_out)
    return Listing(class_names, parts, dict(left_out))


def _part_folders(root: Path, left_out: Counter[str]) -> dict[str, str]:
    """Return the names of the splits' folders by split, train first.

    Args:
        root: Folder that they are in.
        left_out: Number of files that are not read, by type; other folders are counted here.
    """
    found, others = dict[str, str](), list[str]()
    names = [entry.name for entry in _entries(root, Counter()) if _is_folder(entry)]
    for name in sorted(names, key=[*PARTS, *names].index):
        part = PARTS.get(name)
        if part is None or part in found:
            others.append(name)
        else:
            found[part] = name
    if "train" not in found:
        has = f"but {_few(names)}" if names else "nor any other"
        raise FileNotFoundError(
            f"data.root must hold train/<class>/<image>, got {root}, which has no folder 'train' "
            f"{has}"
        )
    if len(found) == 1:
        has = f", which has {_few(others)} there" if others else ""
        raise FileNotFoundError(
            f"data.root must hold a folder 'test' or 'val' beside 'train', got {root}{has}"
        )
    for name in [name for part, name in found.items() if part != "train"]:
        if (root / name).resolve() == (root / "train").resolve():
            raise ValueError(f"data.root must hold {name} apart from train, got a link in {root}")
    left_out.update(f"folder {name}" for name in others)
    return found


def _few(names: Sequence[str]) -> str:
    more = f", … and {len(names) - MOST_TYPES:,} more" if len(names) > MOST_TYPES else ""
    return f"{', '.join(map(repr, names[:MOST_TYPES]))}{more}"


def make_source(
    name: str,
    parts: Mapping[str, tuple[Pictures, Sequence[int]]],
    class_names: tuple[str, ...],
    image_size: int | None,
    left_out: Counter[str],
) -> Source:
    """Return pictures in folders, or of a saved data set, as a source.

    Args:
        name: Folder, for messages.
        parts: Pictures and labels of `train` and perhaps of `val` and `test`. Where there is no
            test, val is the test split; where there is neither, both are taken from train.
        class_names: Names of the classes.
        image_size: Height and width in pixels; chosen by the pictures if not given.
        left_out: Number of files that are not read, by type.
    """
    looked = survey(parts["train"][0])
    size = image_size or looked.size
    splits = {
        part: Split(Stream(pictures, torch.arange(len(labels)), size, "RGB"), torch.tensor(labels))
        for part, (pictures, labels) in parts.items()
    }
    pool = splits["train"]
    val = splits.get("val") if "test" in splits else None
    held_out = default_val_size(len(pool), len(class_names))
    images = sum(map(len, splits.values()))
    return Source(
        pool,
        class_names,
        val_size=held_out if val is None else len(val),
        test=splits.get("test", splits.get("val")),
        val=val,
        test_size=held_out if len(splits) == 1 else 0,
        note=describe(name, images, class_names, image_size, looked, left_out),
    )


def default_val_size(images: int, classes: int) -> int:
    """Default size of the validation split: a tenth of the images, at least one for each class."""
    return max(classes, images // 10)


def describe(
    name: str,
    images: int,
    class_names: Sequence[str],
    image_size: int | None,
    looked: Survey,
    left_out: Counter[str],
) -> str:
    """Return a line on what is read of a data set, and at which size.

    Args:
        name: Folder or name of the data set.
        images: Number of images that are read.
        class_names: Names of the classes.
        image_size: Height and width in pixels that were given.
        looked: Sizes that the pictures have.
        left_out: Number of files that are not read, by type.

    Returns:
        The line; empty where nothing is left out, and the size is that of all pictures or given.

    Example:
        >>> looked = Survey((8, 64, 500), grey=False)
        >>> describe("pets", 3, ("cat", "dog"), None, looked, Counter({".txt": 2, "hidden": 1}))
        'pets: 3 images of 2 classes, read at 64x64 pixels (shorter sides are 8 to 500, the median \
64; data.image_size sets the size); left out: 2 .txt, 1 hidden'
    """
    size, low, high = image_size or looked.size, looked.sides[0], looked.sides[-1]
    line = f"{name}: {images:,} images of {len(class_names)} classes, read at {size}x{size} pixels"
    chosen = image_size is None and not low == high == size
    if chosen:
        median = looked.sides[(len(looked.sides) - 1) // 2]
        sides = f"{low} to {high}, the median {median}" if low < high else str(low)
        line += f" (shorter sides are {sides}; data.image_size sets the size)"
    if left_out:
        line += f"; left out: {list_left_out(left_out)}"
    return one_line(line) if chosen or left_out else ""


def list_left_out(left_out: Counter[str]) -> str:
    """Return the numbers of files by type, those of the most frequent types by name.

    >>> list_left_out(Counter({".md": 2, "hidden": 1}))
    '2 .md, 1 hidden'
    """
    named = sorted(kind for kind, _ in left_out.most_common(MOST_TYPES))
    words = [
        f"{left_out[kind]:,} {kind}" + ("s" if left_out[kind] > 1 and kind in _PLURAL else "")
        for kind in named
    ]
    rest = left_out.total() - sum(left_out[kind] for kind in named)
    return ", ".join([*words, f"{rest:,} of other types"] if rest else words)


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the file types that Pillow decodes by itself."""
    from PIL import EpsImagePlugin, Image, ImageFile

    Image.preinit()  # those of frequent types first, which are then the first to be asked
    types = Image.registered_extensions()  # registers all plugins
    without = {"MPEG"}  # recognised only
    for name, (factory, _) in Image.OPEN.items():
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile):
            without.add(name)
    if not EpsImagePlugin.has_ghostscript():
        without.add("EPS")
    read = Image.OPEN.keys() - without
    # Pillow has the JPEG plugin open MPO, a JPEG of several frames
    return frozenset(suffix for suffix, name in types.items() if name in {*read, "MPO"})


def _class_names(folder: Path, left_out: Counter[str]) -> tuple[str, ...]:
    names, real = [], folder.resolve()
    for entry in _entries(folder, left_out):
        if not _is_folder(entry):
            left_out[f"{_kind(entry)} beside the classes"] += 1
        elif _is_circular(entry, {real, *real.parents}):
            left_out["circular link"] += 1
        else:
            names.append(entry.name)
    if not names:
        raise ValueError(f"data.root must hold train/<class>/<image>, got no class in {folder}")
    return tuple(names)


def _list_images(
    root: Path, part: str, folders: Sequence[str | None], left_out: Counter[str]
) -> ListedFiles:
    """List the image files of a part in the order of their paths, and their labels.

    Args:
        root: Folder of the data.
        part: Name of the part's folder, for messages.
        folders: Folder of each class, relative to `root`; None where it has none.
        left_out: Number of files that are not read, by type; counted here.
    """
    paths, labels = list[str](), list[int]()
    for label, folder in enumerate(folders):
        if folder is not None:
            found = list(walk(root / folder, folder, frozenset(), left_out, suffixes()))
            paths += found
            labels += [label] * len(found)
    if not paths:
        without = f" (left out: {list_left_out(left_out)})" if left_out else ""
        raise ValueError(f"data.root must hold images, got none in {root / part}{without}")
    return ListedFiles(paths, labels)


def walk(
    folder: Path,
    name: str,
    above: frozenset[Path],
    left_out: Counter[str],
    kinds: Collection[str],
) -> Iterator[str]:
    """Yield the files of some types under a folder in the order of their paths; links are followed.

    Args:
        folder: Folder to list.
        name: Its name, with which the files' names begin.
        above: Folders that it is in, by links or otherwise.
        left_out: Number of files that are not read, by type; counted here.
        kinds: Suffixes in lower case of the files.
    """
    real = folder.resolve()
    above |= {real, *real.parents}
    for entry in _entries(folder, left_out):
        path = f"{name}/{entry.name}"
        if not _is_folder(entry):
            kind = _kind(entry)
            if kind in kinds:
                yield path
            else:
                left_out[kind] += 1
        elif _is_circular(entry, above):
            left_out["circular link"] += 1
        else:
            yield from walk(Path(entry.path), path, above, left_out, kinds)


def _entries(folder: Path, left_out: Counter[str]) -> Iterator["os.DirEntry[str]"]:
    """Yield what is in a folder by name, without what is hidden or of an operating system."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.name in _SYSTEM:
            left_out["system folder"] += 1
        else:
            yield entry


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    # of links by `os.path`, which takes a link to itself
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_circular(entry: "os.DirEntry[str]", above: Collection[Path]) -> bool:
    return entry.is_symlink() and Path(entry.path).resolve() in above


def _kind(entry: "os.DirEntry[str]") -> str:
    """Return the suffix of a file in lower case, or what it is instead of a file."""
    link = entry.is_symlink()
    if link and not os.path.exists(entry.path):
        return "broken link"
    if not (os.path.isfile(entry.path) if link else entry.is_file()):
        return "special file"
    return os.path.splitext(entry.name)[1].lower() or "without suffix"
