"""The one schema: frozen, strict dataclasses, read from YAML, `--set` and flags."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic.dataclasses import dataclass

from selfkd.config.space import Distribution, Point
from selfkd.errors import ConfigError
from selfkd.storage.remote import PLAIN_URI, has_password

Tree = dict[str, Any]
STORAGES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _without_password(value: str) -> str:
    if has_password(value):
        raise ValueError(PLAIN_URI)
    return value


Place = Annotated[str, AfterValidator(_without_password)]

RESERVED_ARGS = (
    *("model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
    *("cache_dir", "scriptable", "exportable", "no_jit", "model_cls", "variant", "model_cfg"),
    *("feature_cfg", "pretrained_strict", "pretrained_filter_fn", "kwargs_filter"),
    *("pretrained_model_args",),
)
"""What timm takes for itself: where weights come from, and how they are loaded."""


def _plain_args(args: dict[str, Any]) -> dict[str, Any]:
    for key, value in args.items():
        if key == "pretrained" and isinstance(value, bool):
            continue
        if key in RESERVED_ARGS:
            raise ValueError(f"must be arguments of the network alone, got {key}")
        if not _is_plain(value):
            raise ValueError(
                f"{key} must be true, false, a number, a word without / : . or a list of these, "
                f"got {value!r}"
            )
    return args


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    if isinstance(value, str):
        return re.fullmatch(r"[\w+ -]*", value) is not None
    return value is None or isinstance(value, bool | int | float)


ModelArgs = Annotated[dict[str, Any], AfterValidator(_plain_args)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataConfig:
    """What is learnt from."""

    name: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, cifar100, folder, or a timm data set name."""
    root: Place | None = None
    """Where the data lies; the environment variable SELFKD_DATA when it is not given."""
    download: bool = False
    """Fetch the data into root when it is not there."""
    train_size: int | None = Field(default=None, ge=1)
    """How many training images, stratified by label; all of them when not given."""
    val_size: int | None = Field(default=None, ge=1)
    """How many images are held out to choose by; each data set has its own default."""
    classes: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Train on images of these classes alone; validation and test keep all."""
    image_size: int | None = Field(default=None, ge=1)
    """Side in pixels that a folder's images are resized and cropped to."""
    in_memory: bool | None = None
    """Hold all images as one tensor; by size when not given."""
    workers: int = Field(default=2, ge=0)
    """Processes that decode images which are not in memory."""
    crop: float | None = Field(default=None, gt=0, le=1)
    """Random resized crop: smallest share of the area that is kept."""
    flip: bool = False
    """Mirror half of the images."""
    jitter: int = Field(default=0, ge=0)
    """Shift by up to so many pixels, filled with zeros (the same as pad and crop)."""
    views: int | None = Field(default=None, ge=1)
    """How many augmented views of an image are labelled; 1 without augmentation, else 8."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """A network: any name that `timm.create_model` knows."""

    name: str = "selfkd_cnn"
    args: ModelArgs = Field(default_factory=dict)
    """Keyword arguments of the network: numbers, words and lists of them. `pretrained: true` begins
    with timm's own weights."""

    @classmethod
    def of_checkpoint(cls, model: object) -> ModelConfig:
        """Return the network that a file describes, of whatever origin.

        Arguments that say where weights come from are left out: the weights are in the file.

        Args:
            model: `name` and `args`, as a checkpoint's metadata has them.

        Raises:
            ValueError: it is none, or an argument is not plain.
        """
        if not isinstance(model, Mapping) or not isinstance(args := model.get("args"), Mapping):
            raise ValueError(f"model must have a name and args, got {model!r}")
        kept = {key: value for key, value in args.items() if key not in RESERVED_ARGS}
        try:
            return cls(name=model.get("name"), args=kept)  # type: ignore[arg-type]
        except ValidationError as error:
            faults = "; ".join(_faults(error, {}))
            raise ValueError(f"model must be described by plain values: {faults}") from None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig:
    """One training run."""

    epochs: int = Field(default=40, ge=1)
    batch_size: int = Field(default=20, ge=1)
    optimizer: str = "sgd"
    """A timm optimiser name: sgd (with Nesterov momentum), adamw, …"""
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, gt=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["cosine", "step", "none"] = "cosine"
    """Learning rate by timm's schedulers; `step` divides it by 10 at 1/2 and 3/4 of the epochs."""
    warmup_epochs: int = Field(default=0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    clip_grad: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of the weights; off when not given."""
    amp: Literal["none", "bfloat16", "float16"] = "none"
    """Mixed precision."""
    compile: bool = False
    """Run the student through torch.compile."""
    init: Literal["fresh", "teacher"] = "fresh"
    """Where a born-again student's weights start from."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DistillConfig:
    """What a student learns from its teacher. `alpha` weighs the soft term."""

    temperature: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=0.9, ge=0, le=1)
    average: Literal["probabilities", "logits"] = "probabilities"
    """How the members of an ensemble are averaged."""
    teacher: str = "previous"
    """previous (best of the last generation), lineage (ensemble of the best of all earlier ones)
    or top:m (ensemble of the m best trials of the last one)."""
    live: bool = False
    """Ask the teacher at every step rather than read its stored answers."""

    @field_validator("teacher")
    @classmethod
    def _known_teacher(cls, value: str) -> str:
        if not re.fullmatch(r"previous|lineage|top:[1-9]\d*", value):
            raise ValueError(f"must be previous, lineage or top:m with m >= 1, got {value!r}")
        return value


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TargetsConfig:
    """The stored answers of teachers."""

    root: Place | None = None
    """Folder that runs may share, so that no teacher is asked twice; the run's own by default."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep only an image's largest logits, for very many classes; all of them when not given."""
    shard_size: int = Field(default=16_384, ge=1)
    """Images that one labelling job answers and one file holds."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CheckpointConfig:
    """A trained network from elsewhere."""

    path: Place
    """A safetensors or state-dict file."""
    model: str
    """Its timm name."""
    args: ModelArgs = Field(default_factory=dict)
    """Keyword arguments of the model."""
    classes: Place | None = None
    """YAML or JSON list of its class names, in the order of its logits; the data's when not
    given."""
    mean: list[float] | None = None
    """By channel, of the pixels in [0, 1] that it was trained on; the data's when not given."""
    std: list[float] | None = None


Source = Literal["members", "snapshots", "soup", "greedy_soup", "weighted", "specialists"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class MembersConfig:
    """The many teachers of `selfkd.ensemble`. `members: 5` is short for `members: {count: 5}`,
    a list of models for `members: {models: […]}`."""

    count: int | None = Field(default=None, ge=1)
    """Members trained here: one a model, else 5, else none where others are given."""
    models: list[ModelConfig] = Field(default_factory=list)
    """Their networks, taken in turn; `model` for all when not given."""
    same_init: bool = False
    """Start all members of one network from the same weights, as soups need."""
    runs: list[Place] = Field(default_factory=list)
    """Run folders whose models are members (`--from`)."""
    checkpoints: list[CheckpointConfig] = Field(default_factory=list)
    """Trained networks from elsewhere."""
    source: Source = "members"
    """The teacher that is made of them: the ensemble of the members; of the snapshots of one run;
    the mean of their weights, all or greedily chosen; the ensemble with weights fitted on
    validation; or a generalist (the best member) with specialists."""
    compare: list[Source] = Field(default_factory=list)
    """Further teachers to make and to show in the table."""
    use: int | None = Field(default=None, ge=1)
    """How many members teach, the best on validation first; all when not given."""

    def sources(self) -> list[Source]:
        """Return every teacher that is asked for, without the search space's."""
        return list(dict.fromkeys(["members", self.source, *self.compare]))

    def trained(self) -> int:
        """Return how many members are trained here."""
        given = self.runs or self.checkpoints
        return self.count or len(self.models) or (0 if given else 5)


Control = Literal["seeds", "label_smoothing", "dkpp", "cwtm", "teacher_free"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ConfirmConfig:
    """The chosen setting and the labels-only baseline, trained again on the same fresh seeds."""

    seeds: int = Field(default=3, ge=0)
    """How many; 0 leaves the confirmation out."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CapacityConfig:
    """Students of growing size, of the same teachers."""

    key: str = Field(default="model.args.width", pattern=r"^(model|student)\.(name|args\.\w+)$")
    """What makes a student larger: an argument of its network, or the network itself
    (`model.name`). It is of `student` where that is given; the teachers keep their size."""
    values: list[Any] = Field(default_factory=lambda: [2, 4, 8, 16, 32], min_length=1)
    """Of the key, one a student."""
    search: bool = False
    """Search T and alpha (`search.space`) for each size, `search.trials` trials each; else all
    students get `distill.temperature` and `distill.alpha`."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ArmConfig:
    """One setting of a study, trained on each seed."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted config keys and values in which it differs from the config."""
    teacher: str | list[str] | None = None
    """Arms that teach it, those of the same seed, or `members` (those of `--from`); it learns from
    labels only when not given."""
    target_transform: Literal["none", "permuted", "confidence", "virtual"] = "none"
    """Transform of the teacher logits: none; permuted below the largest (DKPP); reduced to the
    teacher's confidence, which weighs the labels (CWTM); or the logits of a virtual teacher that
    knows the labels alone (teacher-free)."""
    average: list[str] = Field(default_factory=list)
    """Arms whose ensemble this is, seed by seed: nothing is trained."""
    seeds: int | None = Field(default=None, ge=1)
    """How many, from the first on; `confirm.seeds` when not given."""

    @property
    def teachers(self) -> list[str]:
        """The names of those that teach it."""
        return [self.teacher] if isinstance(self.teacher, str) else self.teacher or []


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ContrastConfig:
    """Two arms of a study whose difference is asked for."""

    arm: str
    to: str
    """The arm that it is compared with."""
    reference: str | None = None
    """An arm, or `members`: which fraction of the gap from `to` to it is closed?"""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class StudyConfig:
    """`selfkd.study`: settings side by side, on the same seeds."""

    arms: dict[str, ArmConfig] = Field(default_factory=dict)
    """By name; an arm stands after those that teach it."""
    compare: list[ContrastConfig] = Field(default_factory=list)
    """What is asked; each arm with the first one when not given."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SearchConfig:
    """The trials of a generation."""

    trials: int = Field(default=8, ge=1)
    metric: str = "val_accuracy"
    """What the best trial is chosen by; a training function of your own may report another."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better, or less."""
    algorithm: Literal["sobol", "random", "optuna"] = "sobol"
    scheduler: Literal["none", "asha"] = "none"
    """Early stopping of trials."""
    space: dict[str, Any] = Field(
        default_factory=lambda: {
            "distill.temperature": {"loguniform": [1, 20]},
            "distill.alpha": {"uniform": [0, 1]},
        }
    )
    """Dotted config keys and their distributions."""
    labels_only_space: dict[str, Any] = Field(default_factory=dict)
    """The same for generation 0 alone, for example `train.label_smoothing`."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ResourcesConfig:
    """What one trial gets; fractions are allowed."""

    cpu: float = Field(default=1.0, gt=0)
    gpu: float = Field(default=0.0, ge=0)
    wait: float | None = Field(default=None, ge=0)
    """Seconds to wait for a node that has them; when not given, as long as an autoscaler is
    starting nodes."""
    workers: int = Field(default=1, ge=1)
    """Processes, with `cpu` and `gpu` each, that train one student together by sharing each batch;
    they may be on several nodes."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class KeptConfig:
    """How often a trial keeps what it goes on from if it is interrupted, at ends of epochs."""

    seconds: float | None = Field(default=30.0, ge=0)
    """So long after the last time; 0 is after every epoch, none is never."""
    epochs: int | None = Field(default=None, ge=1)
    """So many epochs after the last time, if that is sooner."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrackingConfig:
    """W&B. `tracking: none` is short for `tracking: {mode: none}`."""

    mode: Literal["auto", "online", "offline", "none"] = "auto"
    """auto: online when there is a key and the host answers, else offline."""
    project: str = Field(default="selfkd", min_length=1)
    entity: str | None = None
    wait: float = Field(default=30.0, gt=0)
    """The most seconds to wait at the end for what is not sent yet."""
    upload_targets: bool = False
    """Send the teachers' stored answers, too, and not only say where they are."""
    alerts: bool = False
    """Send an alert with the verdict when the run ends."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Config:
    """A whole run of `selfkd.generations`, `ensemble`, `capacity` or `study`."""

    rounds: int | Literal["auto"] = 5
    """`selfkd.generations`: born-again generations after generation 0; `auto` goes on until two in
    a row show no evidence of a gain, at most to `rounds_max`."""
    rounds_max: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)
    """Of the split, the views, the search and every trial."""
    name: str | None = Field(default=None, pattern=r"^[\w][\w.-]*$")
    storage: Place = "runs"
    """Folder that holds the run folders, or its URI, such as s3://bucket/runs."""
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(args={"width": 16}))
    student: ModelConfig | None = None
    """The network that is taught, of generations 1, 2, …, when it differs from `model`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Settings of a training function of your own (`--train`)."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    targets: TargetsConfig = Field(default_factory=TargetsConfig)
    members: MembersConfig = Field(default_factory=MembersConfig)
    """`selfkd.ensemble`, `selfkd.capacity` and `selfkd.study`: who teaches."""
    confirm: ConfirmConfig = Field(default_factory=ConfirmConfig)
    """How the result is believed."""
    controls: list[Control] = Field(default_factory=list)
    """`selfkd.generations`: what else could have made the gain, at equal cost: an ensemble of
    seeds, label smoothing, dkpp (the teacher's doubts in random order), cwtm (labels, weighted by
    how sure the teacher is), teacher_free."""
    capacity: CapacityConfig = Field(default_factory=CapacityConfig)
    """`selfkd.capacity`: which students."""
    study: StudyConfig = Field(default_factory=StudyConfig)
    """`selfkd.study`: which settings are compared."""
    search: SearchConfig = Field(default_factory=SearchConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    checkpoint: KeptConfig = Field(default_factory=KeptConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @field_validator("rounds", mode="before")
    @classmethod
    def _rounds_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 0):
            raise ValueError(f"must be a whole number of at least 0, or auto, got {value!r}")
        return value

    @field_validator("storage")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        scheme = value.partition("://")[0] if "://" in value else None
        if scheme is not None and (scheme not in STORAGES or "?" in value):
            raise ValueError(
                "must be a folder that all nodes see, or a URI that starts with one of "
                f"{', '.join(STORAGES)} and has no query, got {value.partition('?')[0]!r}"
            )
        return value

    @field_validator("student", mode="before")
    @classmethod
    def _named_student(cls, value: Any) -> Any:
        if isinstance(value, dict) and set(value) <= {"args"}:
            raise ValueError("must have a name: set student.name, also where it is model.name")
        return value

    @property
    def most_rounds(self) -> int:
        """The most born-again generations that there will be."""
        return self.rounds_max if self.rounds == "auto" else self.rounds

    def space(self, *, with_teacher: bool) -> dict[str, Distribution]:
        """Return the search space with a teacher, or without: no keys that are about one."""
        specs = dict(self.search.space)
        if not with_teacher:
            specs = {key: spec for key, spec in specs.items() if not key.startswith(OF_TEACHERS)}
            specs |= self.search.labels_only_space
        return {key: Distribution.parse(spec) for key, spec in specs.items()}

    def at(self, point: Point) -> Config:
        """Return this config with the values of a point of the search space.

        >>> Config().at({"distill.alpha": 0.5}).distill.alpha
        0.5
        """
        tree = to_tree(self)
        for key, value in point.items():
            put(tree, key, value)
        return from_tree(tree)


_ADAPTER = TypeAdapter(Config)
OF_TEACHERS = ("distill.", "members.")
_FREE = re.compile(r"params\b|(model|student)\.args\b|search\.(labels_only_)?space\b|study\.arms\b")


def to_tree(config: Config) -> Tree:
    """Return a config as plain nested dictionaries."""
    return dataclasses.asdict(config)


def from_tree(tree: Tree, sources: Mapping[str, str] | None = None) -> Config:
    """Make a config from nested dictionaries.

    Raises:
        ConfigError: with every fault; `sources` says for a dotted key where it was given.
    """
    try:
        # as JSON: in strict mode only JSON objects become dataclasses
        return _ADAPTER.validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error, sources or {}))) from None


def _faults(error: ValidationError, sources: Mapping[str, str]) -> Iterator[str]:
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        key = ".".join(path)
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            section = ".".join(path[:-1])
            known = [k for k in known_keys() if k.rpartition(".")[0] == section]
            message = f"unknown key{did_you_mean(key, known)}"
        elif fault["type"] == "value_error":
            message = fault["msg"].removeprefix("Value error, ")
        else:
            condition = fault["msg"].removeprefix("Input should be ").removeprefix("String should ")
            message = f"must be {condition}, got {fault['input']!r}".replace("be match", "match")
        yield f"{locate_key(key, sources)}: {message}"


def locate_key(key: str, sources: Mapping[str, str]) -> str:
    """Return a key after its source: its own, one of something in it, or of what it is in."""
    inside = [k for k in sources if k.startswith(f"{key}.")]
    around = [key[: dot.start()] for dot in re.finditer(r"\.", key)][::-1]
    source = next((sources[k] for k in (key, *inside, *around) if k in sources), None)
    return f"{source}: {key}" if source else key


def did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if not known:
        return ""
    return f": did you mean {', '.join(close)}?" if close else f" (known: {', '.join(known)})"


def known_keys() -> list[str]:
    tree = to_tree(Config())
    tree["student"] = to_tree(Config())["model"]
    return [key for key, _ in leaves(tree, "", inner=True)]


def leaves(tree: Tree, prefix: str, *, inner: bool = False) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        free = (".args", "space", "params", ".arms")
        nested = isinstance(value, dict) and not dotted.endswith(free)
        if inner or not nested:
            yield dotted, value
        if nested:
            yield from leaves(value, f"{dotted}.", inner=inner)


def put(tree: Tree, key: str, value: Any) -> None:
    """Set a value by its dotted key; of a section only what is given changes."""
    if key == "tracking" and isinstance(value, str):
        key = "tracking.mode"
    if key == "members" and isinstance(value, int | list):
        key = "members.count" if isinstance(value, int) else "members.models"
    if isinstance(value, dict) and value and not _FREE.match(key):
        for inner, inner_value in value.items():
            put(tree, f"{key}.{inner}", inner_value)
        return
    inside_space = re.match(r"(search)\.(space|labels_only_space)\.(.+)", key)
    *parents, last = inside_space.groups() if inside_space else key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            whole = inside_space and parent == "space"
            tree[parent] = dict(SearchConfig().space) if whole else {}
        tree = tree[parent]
    tree[last] = value
