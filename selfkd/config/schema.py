"""Schema of the configuration, as frozen, strict dataclasses with the reference of each key."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from selfkd.config.space import Distribution, Point
from selfkd.distill.loss_names import check_term
from selfkd.errors import ConfigError, cut_text
from selfkd.results import find_metric
from selfkd.storage.remote import secret_fault

Tree = dict[str, Any]
MOST_ROUNDS = 10_000
STORAGES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _without_password(value: str) -> str:
    if fault := secret_fault(value):
        raise ValueError(fault)
    return value


def _in_single_precision(value: float) -> float:
    if not 1e-37 <= value <= 1e37:
        raise ValueError(f"must be in [1e-37, 1e37], as single precision has it, got {value}")
    return value


Single = Annotated[float, AfterValidator(_in_single_precision)]
Seconds = Annotated[float, Field(le=1e9)]  # for longer, the system's clocks do not wait
Place = Annotated[str, AfterValidator(_without_password)]

RESERVED_ARGS = (
    *("model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
    *("cache_dir", "scriptable", "exportable", "no_jit", "model_cls", "variant", "model_cfg"),
    *("feature_cfg", "pretrained_strict", "pretrained_filter_fn", "kwargs_filter"),
    *("pretrained_model_args",),
)
"""Arguments of timm's own functions: where weights come from, and how they are loaded."""
SOURCE_ARGS = (*RESERVED_ARGS, "path")
"""Arguments that a checkpoint drops, as its weights come from itself."""


MOST_VIEWS = 10_000
AUGMENTED_VIEWS = 8
"""Number of augmented views of each image where `data.views` is not given."""
LARGEST_SIDE = 4096  # pixels: two images of more take a network minutes, and its memory
SHAPES = ("image_size", "crop", "flip", "jitter")
ARRAYS = "arrays"
"""Name of the data set whose items are vectors of features."""
HF = "hf"
"""Name of the language models of `transformers` that are read from a folder, `model.args.path`."""


def _plain_args(args: dict[str, Any]) -> dict[str, Any]:
    for key, value in args.items():
        if key == "pretrained" and isinstance(value, bool):
            continue
        if key in SOURCE_ARGS:
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


TRAINED_TOKENIZER = re.compile(r"bpe:(\d+)|chars")
"""Tokenizers of text that a run trains itself; any other is a folder."""
ModelArgs = Annotated[dict[str, Any], AfterValidator(_plain_args)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TransferConfig:
    """Transfer set: further data that students with teachers are trained on."""

    name: Place
    """Name of the dataset, as in `data.name`: its items without an official split of validation or
    test; where it is `data.name` itself, its training items that are in no split. Or folder: images
    in `root` and its subfolders, without classes."""
    root: Place | None = None
    """Folder of the dataset; `data.root` when not given."""
    size: int | None = Field(default=None, ge=1)
    """Number of its items that are taken, by `seed`; all when not given."""
    weight: float = Field(default=0.5, ge=0, lt=1)
    """Share of each batch that is of the transfer set, in [0, 1): its items are added to the batch
    of labelled ones, of which an epoch has as many as without. At 0 none are, and the splits stay
    the same."""
    labels: bool = False
    """Whether its labels are trained on where it has them; else its items have the soft term
    alone."""


Preset = Literal["none", "light", "strong"]
PRESETS = get_args(Preset)
"""Names of augmentation that stand for a mapping."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AugmentConfig:
    """Augmentation by a preset, of which each part can be set apart. A view is a function of seed,
    image and view number: teacher and student see the same pixels."""

    preset: Preset = "none"
    """What the keys below are where they are not given. none: nothing. light: flip, and a random
    shift of an eighth of the image, or, of images of 64 pixels or more, a random resized crop of at
    least 0.35 of the area; `data.jitter` or `data.crop` take their place where they are set.
    strong: light, `operations: randaugment`, `erase: 0.25`, `mixup: 0.8`, `cutmix: 1.0` and
    `mix_probability: 0.5`. `data.augment: strong` is short for it; `data.augment: none` also takes
    back what was set apart before."""
    flip: bool | None = None
    """Whether half of the images are flipped left to right; in a preset but none those in colour,
    when not given."""
    operations: Literal["none", "randaugment", "trivialaugment"] | None = None
    """Operations on shape and colour, those of `torchvision.transforms.v2`: randaugment, `count` of
    them in sequence, each of one `magnitude`; or trivialaugment, one of random magnitude."""
    count: int = Field(default=2, ge=1, le=16)
    """Number of operations of randaugment."""
    magnitude: int = Field(default=9, ge=0, le=30)
    """Magnitude of randaugment, from 0, nothing, to 30, the largest."""
    color: float = Field(default=0.0, ge=0, le=1)
    """Colour jitter: largest change of brightness, contrast and saturation; 0.4 is usual."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Colour jitter: largest turn of the hue, as a share of the circle; 0.1 is usual."""
    erase: float | None = Field(default=None, ge=0, le=1)
    """Random erasing: probability that a box of 2 % to 33 % of an image is filled with zeros."""
    mixup: float | None = Field(default=None, ge=0, le=100)
    """Alpha of mixup, whose weights are of Beta(alpha, alpha); none at 0."""
    cutmix: float | None = Field(default=None, ge=0, le=100)
    """Alpha of cutmix; where mixup is on as well, each has half of the images that are mixed."""
    mix_probability: float | None = Field(default=None, ge=0, le=1)
    """Probability that an image is mixed, where mixup or cutmix are on; 1, or that of the preset,
    when not given."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others, so that labels are probabilities.

        >>> AugmentConfig(preset="strong").mixes, AugmentConfig(mixup=0.2, mix_probability=0).mixes
        (True, False)
        """
        alphas = (self.value("mixup"), self.value("cutmix"))
        return any(alphas) and self.value("mix_probability") > 0

    def value(self, key: str) -> Any:
        """Return what a key is, by the preset where it is not given."""
        own = getattr(self, key)
        if own is not None:
            return own
        strong = {"operations": "randaugment", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
        none = {"operations": "none", "mix_probability": 1.0}
        if self.preset == "strong":
            return {**strong, "mix_probability": 0.5}[key]
        return none.get(key, 0.0)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataConfig:
    """Dataset, splits and augmentation."""

    name: Place = "digits"
    """Name of the dataset: digits, digit_pairs (two digits side by side, 100 classes), mnist,
    fashion_mnist, cifar10, cifar100, folder (images in train/CLASS and test/CLASS, or a folder
    of `datasets.save_to_disk`), any name of `timm.data.create_dataset`, or arrays (features and
    labels: `root` is a .npz, .csv, .tsv or .parquet file, or a folder of these or of .npy
    files). Of text: pydoc (the manual in Python itself), the default there; docstrings (of
    Python's standard library); arithmetic (generated problems); or text (`root` has files .txt,
    or .jsonl with `{"text": …}` or `{"prompt": …, "completion": …}` a line, or is a folder of
    `datasets.save_to_disk`)."""
    root: Place | None = None
    """Folder of the dataset, or file of arrays; the environment variable SELFKD_DATA when not
    given."""
    label_column: str | None = None
    """Column of the labels in a table of `arrays`; the one named label, target, class or y, else
    the last, when not given."""
    download: bool = False
    """Whether to download the dataset into `root` where it is missing."""
    train_size: int | None = Field(default=None, ge=1)
    """Number of training images, stratified by class, all when not given; or of the training
    problems of arithmetic, 20,000 when not given."""
    val_size: int | None = Field(default=None, ge=1)
    """Number of validation images, by which trials are chosen; each dataset has its own default. Of
    arithmetic, number of the problems for validation and of those for test, 1,000 each when not
    given."""
    classes: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Classes whose images are trained on, by index: two or more; all when not given. Validation
    and test keep all."""
    label_noise: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training labels that are drawn anew, in [0, 1): uniformly from the classes that
    are trained on, the right one among them. By `seed`, the same in all trials and generations;
    validation and test keep their labels."""
    image_size: int | None = Field(default=None, ge=1, le=LARGEST_SIDE)
    """Side in pixels to which images are resized and cropped, at most 4096; when not given, that of
    the dataset, and of a folder or timm dataset the median of its training images' shorter sides,
    at most 64."""
    in_memory: bool | None = None
    """Whether to hold all images in memory rather than decode them batch by batch; when not given,
    up to 2 GB are held."""
    workers: int = Field(default=2, ge=0)
    """Number of processes that decode images which are not held in memory."""
    crop: float | None = Field(default=None, gt=0, le=1)
    """Random resized crop: smallest fraction of the area that is kept; no crop when not given."""
    flip: bool = False
    """Whether to flip half of the images left to right."""
    jitter: int = Field(default=0, ge=0)
    """Largest random shift in pixels, filled with zeros (the same as pad and crop)."""
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    """Further augmentation, `none`, `light`, `strong` or a mapping."""
    views: int | Literal["fresh"] | None = None
    """Number of augmented views of each image whose teacher logits are cached; epoch e is trained
    on view e mod `views`. 8 when not given, and always 1 without augmentation. Or fresh: each epoch
    has views of its own, where nothing is cached, on labels alone or with `distill.live`."""
    repeats: int = Field(default=1, ge=1, le=100)
    """Repeated augmentation: number of views of an image in a batch. An epoch has as many steps as
    with 1, on a part of the images. `train.batch_size` must be a multiple of it."""
    test_size: int | None = Field(default=None, ge=1, le=LARGEST_SIDE)
    """Side in pixels of the images of validation and test, and of those that a trained model is
    given; that of the training images when not given. After random resized crops, a larger one than
    in training is often better."""
    context: int = Field(default=64, ge=2, le=1_000_000)
    """Number of tokens that a language model sees at most; text is divided into windows of it."""
    tokenizer: Place = "bpe:1024"
    """Tokenizer of text: bpe:N, byte pairs with N tokens, or chars, one token a character, both
    trained on the training split; or a folder with a tokenizer.json."""
    rationales: bool = True
    """Whether the rationales of prompts are part of the text that is trained on, before the
    completion; without them, the completion follows the prompt."""
    rationale_weight: float = Field(default=1.0, gt=0, le=1000)
    """Weight of a token of a rationale in the loss; a token of the completion has weight 1."""
    transfer: TransferConfig | None = None
    """Transfer set, `{name, root, size, weight, labels}`, for students with teachers; they are
    trained on the training items alone when not given."""

    @field_validator("augment", mode="before")
    @classmethod
    def _preset_or_mapping(cls, value: Any) -> Any:
        if isinstance(value, str) and value in PRESETS:
            return AugmentConfig(preset=value)  # type: ignore[arg-type]
        if not isinstance(value, Mapping | AugmentConfig):
            raise ValueError(
                f"must be {', '.join(PRESETS)} or a mapping of its keys, got {value!r}"
            )
        return value

    @field_validator("views", mode="before")
    @classmethod
    def _views_or_fresh(cls, value: Any) -> Any:
        if value is None or value == "fresh":
            return value
        if type(value) is not int or not 1 <= value <= MOST_VIEWS:
            raise ValueError(
                f"must be a whole number from 1 to {MOST_VIEWS}, or fresh, got {value!r}"
            )
        return value

    def __post_init__(self) -> None:
        if self.name != ARRAYS:
            if self.label_column is not None:
                raise ValueError(
                    f"label_column must be left out but with name {ARRAYS}, got "
                    f"{self.label_column!r} with {self.name}"
                )
            return
        given = {key: getattr(self, key) for key in (*SHAPES, "test_size")}
        for key in ("views", "repeats"):
            given[key] = None if getattr(self, key) == 1 else getattr(self, key)
        default = vars(AugmentConfig())
        parts = {key: value for key, value in vars(self.augment).items() if value != default[key]}
        given["augment"] = parts["preset"] if parts.keys() == {"preset"} else parts
        for key, value in given.items():
            if value:
                raise ValueError(
                    f"{key} must be left out with name {ARRAYS}, whose features are no pixels, "
                    f"got {value!r}"
                )


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """Network."""

    name: str = "selfkd_cnn"
    """Name of the network: any of `timm.create_model`, selfkd's own small networks (`selfkd_*`)
    among them; of arrays, selfkd_mlp, the default there; of text, selfkd_gpt, or hf, a model of
    transformers in the folder `args.path`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the network: numbers, words and lists of them. `pretrained: true` starts
    from timm's pretrained weights; selfkd_gpt has `depth`, `width`, `heads` and `dropout`; hf has
    `path`, `fresh: true` for random weights, and `lora` and `lora_alpha` for adapters."""

    @field_validator("args")
    @classmethod
    def _plain(cls, args: dict[str, Any]) -> dict[str, Any]:
        own = dict(args)
        path = own.pop("path", "folder")
        if not isinstance(path, str) or not path or "://" in path:
            raise ValueError(f"path must be a folder on this machine, got {path!r}")
        _plain_args(own)
        return args

    def __post_init__(self) -> None:
        if self.name != HF and "path" in self.args:
            raise ValueError(f"args.path must be left out but with name {HF}, got {self.name}")

    @property
    def title(self) -> str:
        """Its name and arguments in words.

        >>> ModelConfig(name="selfkd_mlp", args={"width": 8, "depth": 1}).title
        'selfkd_mlp (width 8, depth 1)'
        """
        args = ", ".join(f"{key} {value}" for key, value in self.args.items())
        return f"{self.name} ({args})" if args else self.name

    @classmethod
    def of_checkpoint(cls, model: object) -> ModelConfig:
        """Return the network that the metadata of an untrusted checkpoint describes.

        Arguments that say where weights come from are dropped: the weights are in the file.

        Args:
            model: Mapping with `name` and `args`.

        Raises:
            ValueError: The metadata describes no network, or an argument is not a plain value.
        """
        if not isinstance(model, Mapping) or not isinstance(args := model.get("args"), Mapping):
            raise ValueError(f"model must have a name and args, got {model!r}")
        kept = {key: value for key, value in args.items() if key not in SOURCE_ARGS}
        try:
            return cls(name=model.get("name"), args=kept)  # type: ignore[arg-type]
        except ValidationError as error:
            faults = "; ".join(_faults(error, {}))
            raise ValueError(f"model must be described by plain values: {faults}") from None


_TAGS = ("~one", "~several")  # in the places of faults
Students = Annotated[
    Annotated[ModelConfig, Tag(_TAGS[0])]
    | Annotated[list[ModelConfig], Tag(_TAGS[1]), Field(min_length=1)],
    Discriminator(lambda value: _TAGS[isinstance(value, list | tuple)]),
]
Init = Annotated[
    Annotated[Literal["fresh", "teacher", "every_other", "first"], Tag(_TAGS[0])]
    | Annotated[dict[str, str], Tag(_TAGS[1]), Field(min_length=1)],
    Discriminator(lambda value: _TAGS[isinstance(value, dict)]),
]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig:
    """Training of one student."""

    epochs: int = Field(default=40, ge=1, le=1_000_000)
    """Number of passes over the training images; of text, number of equal parts of `steps`, at
    whose ends the model is validated and checkpoints are written."""
    steps: int = Field(default=300, ge=1, le=1_000_000_000)
    """Number of optimiser steps on text."""
    batch_size: int = Field(default=20, ge=1)
    """Images a step, over all workers of a trial; windows of text a step."""
    accumulate: int = Field(default=1, ge=1, le=1_000_000)
    """Number of batches of text whose gradients are added up for one optimiser step."""
    optimizer: str = "sgd"
    """Name of a timm optimiser: sgd (with Nesterov momentum), adamw, …"""
    lr: Single = Field(default=0.05, gt=0)
    """Learning rate, after the warm-up and before the schedule lowers it."""
    momentum: float = Field(default=0.9, gt=0, lt=1)
    """Momentum of the optimiser, where it has one."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay; biases and normalisation layers are exempt."""
    schedule: Literal["cosine", "step", "none"] = "cosine"
    """Schedule of the learning rate: cosine decay to 0; step, divided by 10 at 1/2 and 3/4 of the
    epochs; or none, a constant learning rate."""
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs of linear warm-up from a tenth of the learning rate, at the start of `epochs`."""
    warmup_steps: int = Field(default=30, ge=0)
    """Steps of linear warm-up from 0 on text, at the start of `steps`."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the labels' mass that is spread over all classes, in [0, 1)."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Largest L2 norm of the gradient; no clipping when not given."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is evaluated and saved in place
    of the student, warmed up over the steps n as min(ema, (1 + n) / (10 + n)); no average when not
    given."""
    amp: Literal["none", "bfloat16", "float16", "auto"] = "none"
    """Mixed precision of the student's forward pass; none is float32. auto is bfloat16 on a GPU
    that computes in it, float16 on another, and none on CPUs; the run's config.yaml has which."""
    tf32: bool | None = None
    """Whether a GPU multiplies float32 matrices and convolutions in TF32, with 10 bits after the
    point; on GPUs it does when not given."""
    channels_last: bool | None = None
    """Whether weights and images have their channels last in memory, which convolutions are fastest
    with on most processors; by device and kind of network when not given. It decides rounding."""
    fused: bool | None = None
    """Whether the optimiser's step is one kernel, where it has one, and soft targets of at most 200
    classes are computed once from the cached logits; by device and kind of network when not given.
    It decides rounding."""
    compile: bool = False
    """Whether to run the student through `torch.compile`."""
    init: Init = "fresh"
    """Initial weights of a student with a teacher: fresh, random; teacher, those of its teacher, a
    network of the same sizes; every_other, evenly spaced layers of a deeper teacher, with all else
    that fits; first, its first layers; or a mapping from paths of the student's submodules to those
    of the teacher's. Of several teachers those of the first, the best one."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TermConfig:
    """Further term of the loss, added with its weight."""

    name: str
    """Name of a loss of `selfkd.losses`, such as hint, attention, rkd_angle, crd or logit_mse."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the term, at least 0."""
    student: str | None = None
    """Path of the student's layer, as in `named_modules`, whose output is compared; its logits when
    not given."""
    teacher: str | None = None
    """Path of the teacher's layer; that of the student when not given."""
    project: bool = False
    """Whether a trained projection from the student's channels to the teacher's is put between, as
    layers of unlike width need."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the loss, by its own names, such as `temperature`, which is that of the
    soft term when not given."""

    def __post_init__(self) -> None:
        check_term(
            self.name,
            student=self.student,
            teacher=self.teacher,
            project=self.project,
            args=self.args,
        )


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DistillConfig:
    """Distillation loss, `(1 - alpha) CE(labels) + alpha T² KL(teacher || student)`, and its
    teacher."""

    temperature: Single = Field(default=3.5, gt=0)
    """Softmax temperature T of teacher and student in the soft term. 3.5, with an alpha of 0.65,
    loses least on five unlike tasks of images (docs/choosing.md)."""
    alpha: float = Field(default=0.65, ge=0, le=1)
    """Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What of an ensemble's members is averaged: their probabilities or their logits."""
    teacher: str = "previous"
    """Teacher of a generation: previous (best model of the last generation), lineage (ensemble of
    the best models of all earlier generations) or top:m (ensemble of the m best trials of the last
    generation)."""
    live: bool = False
    """Whether to run the teacher at every step rather than read its cached logits."""
    mode: Literal["tokens", "traces"] = "tokens"
    """What students of text are distilled from: tokens, the teacher's distribution of each token of
    the training text; or traces, text that each teacher writes on the training prompts (see
    `write`), by cross-entropy alone. Then T and alpha have no meaning, and the default search space
    is empty: the trials of a search differ by their seeds."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps on text whose batch the student itself has written on training prompts at
    T 1; their loss is the soft term alone. Needs `live`."""
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    """Divergence of the soft term on text: KL(teacher || student), KL(student || teacher), or the
    Jensen-Shannon divergence; the last two need all logits."""
    terms: list[TermConfig] = Field(default_factory=list)
    """Further terms of the loss of students with teachers, each `{name, weight, student, teacher,
    project, args}`: of logits, which are read from the cache, or of the layers `student` and
    `teacher`, for which the teacher runs at every step. In a search space,
    `distill.terms.NAME.weight` is the weight of a term, `distill.terms` the choice of them."""

    @field_validator("teacher")
    @classmethod
    def _known_teacher(cls, value: str) -> str:
        if not re.fullmatch(r"previous|lineage|top:[1-9]\d*", value):
            raise ValueError(f"must be previous, lineage or top:m with m >= 1, got {value!r}")
        return value

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher is run at each step: as `live` says, or as a term of layers needs."""
        return self.live or any(term.student is not None for term in self.terms)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TargetsConfig:
    """Cached teacher logits."""

    root: Place | None = None
    """Folder of the cached logits, which several runs may share; `targets` in the run folder when
    not given."""
    top_k: int | None = Field(default=None, ge=1)
    """Number of largest logits that are cached of each image or token, for very many classes; all
    when not given."""
    samples: int | None = Field(default=None, ge=1, le=1024)
    """Number of classes sampled from the teacher at T 1 that are cached of each token of text, in
    place of logits. 8 when not given and all logits of one teacher would take more than 1 GB or the
    vocabulary has more than 4,096 tokens. T is then 1, and alpha alone is searched by default."""
    shard_size: int = Field(default=16_384, ge=1)
    """Number of images, or of tokens, whose logits one job caches in one file."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class WriteConfig:
    """Text that a teacher writes, with `distill.mode: traces`."""

    temperature: Single = Field(default=1.0, gt=0)
    """Temperature that its tokens are sampled at."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Probability of the smallest set of most probable tokens that is sampled from."""
    samples: int = Field(default=1, ge=1, le=1024)
    """Number of texts a prompt."""
    keep: Literal["all", "right"] = "all"
    """Texts that students are trained on: all, or those whose completion is right."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the sampling."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CheckpointConfig:
    """Trained network in a file from elsewhere."""

    path: Place
    """File of the weights: safetensors, or of `torch.save` (state dict, checkpoint or module)."""
    weights: str | None = None
    """Name of the weights in a file that has several sets, such as `state_dict`; when not given, an
    average (EMA, SWA) where there is one, which is said."""
    model: str
    """Name of the network, of `timm.create_model`."""
    args: ModelArgs = Field(default_factory=dict)
    """Keyword arguments of the network: numbers, words and lists of them."""
    classes: Place | None = None
    """File with the list of class names in the order of the network's logits: YAML, JSON, or text
    with one a line; the order of the dataset when not given."""
    mean: list[float] | None = None
    """Mean of each channel, for pixels in [0, 1], by which the network's inputs are normalised;
    that of the dataset when not given."""
    std: list[float] | None = None
    """Standard deviation of each channel, for pixels in [0, 1]; given together with `mean`."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GivenConfig:
    """Model that is generation 0 of `selfkd.generations`, in place of one that is trained on
    labels."""

    path: Place | None = None
    """File of weights of `model`, or folder of an earlier run of generations or of an ensemble,
    whose model it is (`--from`); generation 0 is trained when not given."""
    weights: str | None = None
    """Name of the weights in a file that has several sets, such as `state_dict`; when not given, an
    average (EMA, SWA) where there is one, which is said."""
    classes: Place | None = None
    """File with the list of class names in the order of the logits: YAML, JSON, or text with one a
    line; the order of the dataset when not given."""
    mean: list[float] | None = None
    """Mean of each channel, for pixels in [0, 1], by which the inputs are normalised; that of the
    dataset when not given."""
    std: list[float] | None = None
    """Standard deviation of each channel, for pixels in [0, 1]; given together with `mean`."""


Source = Literal["members", "snapshots", "soup", "greedy_soup", "weighted", "specialists"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class MembersConfig:
    """Members of the teacher ensemble. `members: 5` is short for `members: {count: 5}`, a list of
    networks for `members: {models: […]}`."""

    count: int | None = Field(default=None, ge=1, le=10_000)
    """Number of members that the run trains on labels; when not given, one for each of `models`,
    else none where `runs` or `checkpoints` are given, else 5."""
    models: list[ModelConfig] = Field(default_factory=list)
    """Networks of the trained members, taken in turn; `model` for all when not given."""
    same_init: bool = False
    """Whether members of one network start from the same weights, as soups need."""
    runs: list[Place] = Field(default_factory=list)
    """Folders of earlier runs whose models become members (`--from`)."""
    checkpoints: list[CheckpointConfig] = Field(default_factory=list)
    """Trained networks from elsewhere that become members."""
    source: Source = "members"
    """Teacher that is made of the members: members (their ensemble), snapshots (ensemble of
    snapshots of one training run), soup (mean of the members' weights), greedy_soup (mean of
    greedily chosen ones), weighted (ensemble with weights fitted on validation) or specialists
    (best member with specialists for confusable classes)."""
    compare: list[Source] = Field(default_factory=list)
    """Further teachers, as of `source`, to build and evaluate beside it."""
    use: int | None = Field(default=None, ge=1)
    """Number of members in the teacher ensemble, the best on validation first; all when not
    given."""

    def sources(self) -> list[Source]:
        """Return all teachers to build, without those of a search space."""
        return list(dict.fromkeys(["members", self.source, *self.compare]))

    def trained(self) -> int:
        """Return the number of members that the run trains."""
        given = self.runs or self.checkpoints
        return self.count or len(self.models) or (0 if given else 5)


Control = Literal["seeds", "label_smoothing", "dkpp", "cwtm", "teacher_free", "hard", "class_mean"]
OF_ALL_LOGITS: dict[str, str] = {
    "dkpp": "permuted",
    "cwtm": "confidence",
    "hard": "hard",
    "class_mean": "class_mean",
}
"""Controls that need all logits of a teacher, and the transform of each."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ConfirmConfig:
    """Replication of the chosen settings and of the labels-only baseline on fresh seeds."""

    seeds: int = Field(default=6, ge=0, le=10_000)
    """Number of fresh seeds; 0 for no replication."""
    lineages: int = Field(default=0, ge=0, le=10_000)
    """Number of whole lineages, in place of `seeds`, in `selfkd.generations`: the chosen settings
    are repeated from generation 0 on, and each teacher is its own lineage's; 0 for none."""
    baseline: bool = True
    """Whether what the students are compared with is trained, too: the same from labels only, on
    the same fresh seeds (generation 0, and a student's own network), or in the search of
    `selfkd.ensemble`. Without it a run says nothing of a gain over labels only; a run that is
    resumed with it trains what is missing."""

    @property
    def replicas(self) -> int:
        """Number of times that a setting is replicated: on seeds, or in lineages."""
        return self.lineages or self.seeds


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CapacityConfig:
    """Students of several sizes with the same teachers, in `selfkd.capacity`."""

    key: str = Field(default="model.args.width", pattern=r"^(model|student)\.(name|args\.\w+)$")
    """Config key that sets the size of a student: an argument of its network, or the network itself
    (`model.name`); a key of `student` where that is given. The teachers keep their size."""
    values: list[Any] = Field(default_factory=lambda: [2, 4, 8, 16, 32], min_length=1)
    """Values of `key`, one for each student."""
    search: bool = False
    """Whether to search `search.space` for each size, in `search.trials` trials; else all students
    use `distill.temperature` and `distill.alpha`."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DeployConfig:
    """Compression and export of a trained model, in `selfkd.deploy`."""

    prune: float | None = Field(default=None, gt=0, lt=1)
    """Share of the channels of each layer that is pruned, the classifier's outputs left whole; not
    pruned when not given."""
    bits: Literal[2, 3, 4] | None = None
    """Bits of the weights of matrix products, which are fine-tuned rounded: 4 or 2 in a file, 3
    only simulated; none when not given."""
    max_drop: float | None = Field(default=None, ge=0)
    """Most points of validation accuracy, or nats a token, that the int8 file may be worse than
    the float model; past it there is no int8 file. Any drop is accepted when not given."""
    seeds: int = Field(default=5, ge=1, le=10_000)
    """Number of seeds of the fine-tuning after `prune` and with `bits`, each from labels and
    distilled from the float model."""
    lr: Single | None = Field(default=None, gt=0)
    """Learning rate of the fine-tuning; that of the model's own training when not given."""
    calibration: int = Field(default=512, ge=32, le=1_000_000)
    """Number of training images that the ranges of int8 activations are measured on."""
    ensemble: bool = False
    """Whether the ensemble of the run is exported, too, as one graph, and measured beside it."""

    @property
    def suffix(self) -> str:
        """End of the name of a fine-tuning's folder, by which others of the same start differ."""
        return "" if self.lr is None else f"-lr-{self.lr:g}"

    @property
    def trainings(self) -> int:
        """Number of models that are fine-tuned or trained."""
        return self.seeds * (3 * (self.prune is not None) + 2 * (self.bits is not None))


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ArmConfig:
    """Arm of a study: one setting, trained on each seed."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted config keys with the values in which the arm differs from the config."""
    teacher: str | list[str] | None = None
    """Earlier arm, or list of arms, whose models of the same seed are the teachers; or `members`,
    those of `--from`. The arm is trained on labels alone when not given."""
    target_transform: Literal["none", "permuted", "confidence", "virtual", "hard", "class_mean"] = (
        "none"
    )
    """Transform of the teacher logits: none; permuted, all but the largest in random order (DKPP);
    confidence, reduced to weights of the labels (CWTM); virtual, the logits of a virtual teacher
    built from the labels (teacher-free); hard, the teacher's arg max, at T = 1; or class_mean, the
    mean soft target of the training items of a class."""
    average: list[str] = Field(default_factory=list)
    """Earlier arms whose models are averaged seed by seed; such an arm trains nothing."""
    seeds: int | None = Field(default=None, ge=1, le=10_000)
    """Number of seeds, from the first on; `confirm.seeds` when not given."""

    @property
    def teachers(self) -> list[str]:
        """Names of the arm's teachers."""
        return [self.teacher] if isinstance(self.teacher, str) else self.teacher or []


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ContrastConfig:
    """Contrast of a study: the paired difference of two arms."""

    arm: str
    """Name of the arm."""
    to: str
    """Name of the arm that it is compared to."""
    reference: str | None = None
    """Reference: fraction of the gap to this arm, or to `members`, that is closed; none when not
    given."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class StudyConfig:
    """Arms and contrasts of `selfkd.study`."""

    arms: dict[str, ArmConfig] = Field(default_factory=dict)
    """Arms by name, each after its teachers."""
    compare: list[ContrastConfig] = Field(default_factory=list)
    """Contrasts; each arm with the first one when not given."""


SPACE: Tree = {
    "distill.temperature": {"loguniform": [1, 10]},
    "distill.alpha": {"uniform": [0.1, 1]},
}
"""Default search space: wide, as where labels are few and fit the soft targets help most, and where
networks are undertrained the labels must stay."""
PAPER: Point = {"distill.temperature": 1.0, "distill.alpha": 1.0}
"""Loss of born-again networks (Furlanello et al., 2018)."""


TEXT: Tree = {
    "data": {"name": "pydoc"},
    "train": {
        "epochs": 3,
        "batch_size": 12,
        "optimizer": "adamw",
        "lr": 1e-2,
        "weight_decay": 0.01,
        "clip_grad": 1.0,
    },
    "distill": {"temperature": 1.0, "alpha": 1.0},
    "search": {
        "metric": "val_nll",
        "space": {
            "distill.temperature": {"loguniform": [1, 2]},
            "distill.alpha": {"uniform": [0.5, 1]},
        },
    },
}
"""Defaults of `task: text` that differ: T = 1 and alpha = 1 are hard to beat on tokens."""
ARITHMETIC: Tree = {
    "data": {"tokenizer": "chars", "context": 19},
    "train": {"batch_size": 32, "lr": 6e-3, "steps": 1200},
}
"""Defaults of `data.name: arithmetic` that differ from those of text; its context just fits."""
HF_RATE = 5e-5
"""Learning rate by default of a model that starts from trained weights."""
_TEXT_SPACE: Tree = TEXT["search"]["space"]
ARRAYS_MODEL: Tree = {"name": "selfkd_mlp", "args": {"width": 128}}
TEXT_MODEL: Tree = {"name": "selfkd_gpt", "args": {"depth": 2, "width": 64, "heads": 4}}


def _default_space(tree: Tree) -> Tree:
    """Return the default search space of a config: none where T and alpha have no meaning."""
    if tree.get("task") != "text":
        return SPACE
    distill = tree.get("distill")
    traces = isinstance(distill, Mapping) and distill.get("mode") == "traces"
    return {} if traces else dict(TEXT["search"]["space"])


def without_default_temperature(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return a search space of text without T, where its range is the default one.

    >>> list(without_default_temperature(TEXT["search"]["space"]))
    ['distill.alpha']
    """
    key = "distill.temperature"
    return {name: spec for name, spec in space.items() if (name, spec) != (key, _TEXT_SPACE[key])}


def with_task_defaults(tree: Tree) -> Tree:
    """Return nested dictionaries of config keys with the defaults of their task.

    >>> with_task_defaults({"task": "text", "data": {"context": 8}})["data"]
    {'name': 'pydoc', 'context': 8}
    >>> with_task_defaults({"data": {"name": "arrays"}})["model"]
    {'name': 'selfkd_mlp', 'args': {'width': 128}}
    """
    found, data = dict(tree), tree.get("data")
    if tree.get("task") != "text":
        if isinstance(data, Mapping) and data.get("name") == ARRAYS:
            found["model"] = _named_model(tree, ARRAYS_MODEL)
        return found
    own_of = ARITHMETIC if isinstance(data, Mapping) and data.get("name") == "arithmetic" else {}
    own_defaults = copy.deepcopy(TEXT)
    own_defaults["search"]["space"] = copy.deepcopy(_default_space(tree))
    for section, defaults in own_defaults.items():
        defaults |= own_of.get(section, {})
        given = tree.get(section, {})
        found[section] = {**defaults, **given} if isinstance(given, Mapping) else given
    model = found["model"] = _named_model(tree, TEXT_MODEL)
    student = tree.get("student")
    students = student if isinstance(student, list) else [student]
    models = [each for each in (model, *students) if each is not None]
    folders = [folder for each in models if (folder := _folder_of(each)) is not None]
    if folders:
        _default(found["data"], tree.get("data"), "tokenizer", folders[0])
    if len(folders) == len(models) and not any(each["args"].get("fresh") for each in models):
        _default(found["train"], tree.get("train"), "lr", HF_RATE)
    return found


def _named_model(tree: Tree, default: Tree) -> Any:
    """Return the section of the network, the default one where there is none, with a name."""
    model = tree.get("model", copy.deepcopy(default))
    return {"name": default["name"], **model} if isinstance(model, Mapping) else model


def _default(section: Any, given: Any, key: str, value: Any) -> None:
    """Set a default of a section of the config, where it is one and was not given the key."""
    if isinstance(section, dict) and key not in (given or {}):
        section[key] = value


def _folder_of(model: Any) -> str | None:
    """Return the folder of a model of `hf`."""
    args = model.get("args") if isinstance(model, Mapping) and model.get("name") == HF else None
    path = args.get("path") if isinstance(args, Mapping) else None
    return path if isinstance(path, str) else None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SearchConfig:
    """Hyperparameter search."""

    trials: int = Field(default=8, ge=1, le=100_000)
    """Number of trials of each search, such as that of a generation."""
    metric: str = "val_accuracy"
    """Metric by which the best trial is chosen; user training functions may report others."""
    mode: Literal["max", "min"] = "max"
    """Whether larger (max) or smaller (min) values of the metric are better; as is known of the
    metric, when not given."""
    algorithm: Literal["sobol", "random", "optuna"] = "sobol"
    """Search algorithm: sobol (scrambled Sobol sequence), random, or optuna (TPE)."""
    scheduler: Literal["none", "asha"] = "none"
    """Early stopping of trials: none, or ASHA."""
    space: dict[str, Any] = Field(default_factory=lambda: copy.deepcopy(SPACE))
    """Search space: dotted config keys with `{uniform: [low, high]}`, `{loguniform: [low, high]}`,
    `{randint: [low, high]}` (both included) or `{choice: [value, …]}`."""
    labels_only_space: dict[str, Any] = Field(default_factory=dict)
    """Further search space of models trained on labels alone, such as generation 0."""
    points: list[Point] | None = None
    """Points that each search with teachers tries after the winner of the search before, as dotted
    keys with values, inside the space or not. With the default space and at least 4 trials, when
    not given: `distill.temperature` and `distill.alpha` with three of eight trials, so that the
    best of several seeds teaches, and the loss of the born-again paper, T 1 and alpha 1, with
    one. Of text, whose defaults are those: with three of eight trials, at least one."""

    @model_validator(mode="before")
    @classmethod
    def _mode_of_metric(cls, given: Any) -> Any:
        values = given.kwargs if isinstance(given, ArgsKwargs) else given
        if not isinstance(values, dict) or "mode" in values or "metric" not in values:
            return given
        values = {**values, "mode": find_metric(str(values["metric"])).mode}
        return ArgsKwargs((), values) if isinstance(given, ArgsKwargs) else values


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ResourcesConfig:
    """Resources of one trial."""

    cpu: float = Field(default=1.0, gt=0)
    """CPUs of each worker; fractions are allowed."""
    gpu: float = Field(default=0.0, ge=0)
    """GPUs of each worker: a part of one, or a whole number; with several workers a whole one."""
    wait: Seconds | None = Field(default=None, ge=0)
    """Seconds to wait for a node with these resources; when not given, as long as an autoscaler is
    starting nodes."""
    workers: int = Field(default=1, ge=1)
    """Number of processes that train one student together by sharing each batch; they may be on
    several nodes."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class KeptConfig:
    """Checkpoints of a trial, from which it resumes after an interruption; written at ends of
    epochs."""

    seconds: float | None = Field(default=30.0, ge=0)
    """Seconds between two checkpoints; 0 for one after every epoch, null to disregard time."""
    epochs: int | None = Field(default=None, ge=1)
    """Epochs between two checkpoints, if that is sooner; their number is disregarded when not
    given."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrackingConfig:
    """Tracking with W&B. `tracking: none` is short for `tracking: {mode: none}`."""

    mode: Literal["auto", "online", "offline", "none"] = "auto"
    """Mode of W&B: online, offline (files to sync later), none, or auto. That is online where there
    is an API key and the host responds, and else offline where W&B is asked for: by a key, a
    variable such as WANDB_MODE, or another key of `tracking`; none where it is not."""
    runs: Literal["all", "lineage"] = "all"
    """Runs in W&B: all, one for each trial beside that of the whole run, whose steps are the
    generations; or lineage, that of the whole run alone."""
    writers: list[Literal["csv", "tensorboard"]] = Field(default_factory=list)
    """Files in `tracking/` of the run folder, with W&B or without: csv, a table of the epochs of
    all trials and one of the generations; tensorboard, curves that TensorBoard reads."""
    project: str = Field(default="selfkd", min_length=1)
    """Name of the W&B project."""
    entity: str | None = None
    """User or team that owns the project; W&B's default entity when not given."""
    wait: Seconds = Field(default=30.0, gt=0)
    """Longest time in seconds to wait at the end of a run for data that are not sent yet."""
    upload_targets: bool = False
    """Whether to upload the cached teacher logits rather than reference their files."""
    alerts: bool = False
    """Whether to send an alert with the verdict when the run ends."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Config:
    """Run of `selfkd.generations`, `selfkd.ensemble`, `selfkd.capacity` or `selfkd.study`."""

    rounds: int | Literal["auto"] = 5
    """Number of born-again generations after generation 0, in `selfkd.generations`; auto continues
    until two generations, taken together, show no evidence of a gain over the one before, up to
    `rounds_max`."""
    rounds_max: int = Field(default=10, ge=1, le=MOST_ROUNDS)
    """Largest number of born-again generations with `rounds: auto`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed of the split, the views, the search and all trials."""
    name: str | None = Field(default=None, pattern=r"^[\w][\w.-]*$")
    """Name of the run and of its folder; the name of the dataset with date and time when not
    given."""
    storage: Place = "runs"
    """Folder of the run folders, or its URI, such as s3://bucket/runs."""
    task: Literal["images", "text"] = "images"
    """What is learnt: images (classifiers) or text (causal language models, which take
    `selfkd[text]` and have defaults of their own)."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Dataset, splits and augmentation."""
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(args={"width": 8}))
    """Network of generation 0, of the members and, without `student`, of the students."""
    generation_0: GivenConfig = Field(default_factory=GivenConfig)
    """Generation 0, where it is given."""
    student: Students | None = None
    """Network of the distilled students, such as generations 1, 2, …; `model` when not given. A
    list has one network a generation, `rounds` in all, such as a teacher assistant and what is
    distilled from it."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Settings of a user training function (`--train`), which reads them as `trial.params`."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Training of one student."""
    distill: DistillConfig = Field(default_factory=DistillConfig)
    """Distillation loss and teacher."""
    targets: TargetsConfig = Field(default_factory=TargetsConfig)
    """Cached teacher logits."""
    write: WriteConfig = Field(default_factory=WriteConfig)
    """Text that a teacher writes, with `distill.mode: traces`."""
    members: MembersConfig = Field(default_factory=MembersConfig)
    """Members of the teacher ensemble, in `selfkd.ensemble`, `selfkd.capacity` and
    `selfkd.study`."""
    confirm: ConfirmConfig = Field(default_factory=ConfirmConfig)
    """Replication on fresh seeds."""
    controls: list[Control] = Field(default_factory=list)
    """Controls of `selfkd.generations`, at equal cost: seeds (ensemble of as many models trained on
    labels), label_smoothing, dkpp (non-target teacher logits in random order), cwtm (labels
    weighted by the teacher's confidence), teacher_free (virtual teacher), hard (the teacher's arg
    max), class_mean (one mean soft target a class)."""
    capacity: CapacityConfig = Field(default_factory=CapacityConfig)
    """Students of several sizes, in `selfkd.capacity`."""
    study: StudyConfig = Field(default_factory=StudyConfig)
    """Arms and contrasts of `selfkd.study`."""
    deploy: DeployConfig = Field(default_factory=DeployConfig)
    """Compression and export of a trained model, in `selfkd.deploy`."""
    search: SearchConfig = Field(default_factory=SearchConfig)
    """Hyperparameter search."""
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    """Resources of one trial."""
    checkpoint: KeptConfig = Field(default_factory=KeptConfig)
    """Checkpoints of interrupted trials."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """Tracking with W&B."""

    @field_validator("rounds", mode="before")
    @classmethod
    def _rounds_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 0):
            raise ValueError(f"must be a whole number of at least 0, or auto, got {value!r}")
        if value != "auto" and value > MOST_ROUNDS:
            raise ValueError(f"must be at most {MOST_ROUNDS}, got {value!r}")
        return value

    @field_validator("storage")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        scheme = value.partition("://")[0] if "://" in value else None
        if scheme is not None and scheme not in STORAGES:
            raise ValueError(
                "must be a folder that all nodes see, or a URI that starts with one of "
                f"{', '.join(STORAGES)}, got {value!r}"
            )
        return value

    @field_validator("student", mode="before")
    @classmethod
    def _named_student(cls, value: Any) -> Any:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict) and set(each) <= {"args"}:
                raise ValueError("must have a name: set student.name, also where it is model.name")
        return value

    def __post_init__(self) -> None:
        search, space = self.search, _TEXT_SPACE
        sampled = self.task == "text" and self.targets.samples is not None
        if sampled:  # at T = 1
            space = without_default_temperature(space)
            search = dataclasses.replace(search, space=without_default_temperature(search.space))
            object.__setattr__(self, "search", search)
        if search.points is None:
            own = dict(zip(PAPER, (self.distill.temperature, self.distill.alpha), strict=True))
            points = [*(dict(own) for _ in range(3 * search.trials // 8)), dict(PAPER)]
            if self.task == "text":
                points = points[:-1] or [own]
                if sampled:
                    points = [{"distill.alpha": self.distill.alpha} for _ in points]
                default = search.space == space
            else:
                default = search.space == SPACE and search.trials >= 4
            search = dataclasses.replace(search, points=points if default else [])
            object.__setattr__(self, "search", search)

    @property
    def most_rounds(self) -> int:
        """Largest number of born-again generations."""
        return self.rounds_max if self.rounds == "auto" else self.rounds

    @property
    def students(self) -> tuple[ModelConfig, ...]:
        """Networks of the distilled students that are given, one a generation where several are."""
        if self.student is None:
            return ()
        return tuple(self.student) if isinstance(self.student, list) else (self.student,)

    @property
    def is_chain(self) -> bool:
        """Whether each generation of students has a network of its own."""
        return isinstance(self.student, list)

    def network(self, generation: int | None = None) -> ModelConfig:
        """Return the network of a generation.

        Args:
            generation: Its number, 0 for that of models without a teacher; the last one's when not
                given.

        >>> config = from_tree({"student": [{"name": "a"}, {"name": "b"}], "rounds": 2})
        >>> [config.network(generation).name for generation in range(3)]
        ['selfkd_cnn', 'a', 'b']
        """
        known = self.students
        if generation == 0 or not known:
            return self.model
        return known[-1 if generation is None else min(generation, len(known)) - 1]

    @property
    def inputs(self) -> Literal["images", "features", "text"]:
        """What a model is given."""
        return "features" if self.data.name == ARRAYS else self.task

    @property
    def transfer(self) -> TransferConfig | None:
        """Transfer set that is mixed in; None where there is none, or its weight is 0."""
        own = self.data.transfer
        return None if own is None or own.weight == 0 else own

    @property
    def steps_by_part(self) -> int | None:
        """Number of steps in each of `train.epochs` equal parts; None where epochs are passes."""
        return None if self.task == "images" else -(-self.train.steps // self.train.epochs)

    def space(self, *, with_teacher: bool) -> dict[str, Distribution]:
        """Return the search space by dotted key.

        Args:
            with_teacher: Whether the models have a teacher; without one, keys of `distill` and
                `members` are left out, and `labels_only_space` is added.
        """
        specs = dict(self.search.space)
        if not with_teacher:
            specs = {key: spec for key, spec in specs.items() if not key.startswith(OF_TEACHERS)}
            specs |= self.search.labels_only_space
        return {key: Distribution.parse(spec) for key, spec in specs.items()}

    @property
    def reads_cache(self) -> bool:
        """Whether any students of it may read what is cached of their teachers."""
        if self.distill.live:
            return False
        return any(
            not any(isinstance(term, Mapping) and term.get("student") for term in terms)
            for terms in choices_of_terms(self)
        )

    def arm_seeds(self, arm: ArmConfig) -> int:
        """Return the number of seeds that an arm of a study is trained on."""
        return arm.seeds or self.confirm.seeds

    def at(self, point: Point) -> Config:
        """Return this config with the values of a point of the search space.

        Args:
            point: Values by dotted key.

        Raises:
            ConfigError: A value is invalid; the message lists every fault.

        >>> Config().at({"distill.alpha": 0.5}).distill.alpha
        0.5
        """
        tree = to_tree(self)
        if TERMS in point:  # before the weights of those that it has
            put(tree, TERMS, point[TERMS])
        for key, value in point.items():
            if key != TERMS and not (TERMS in point and is_absent_term(tree, key)):
                put(tree, key, value)
        return from_tree(tree)


_ADAPTER = TypeAdapter(Config)
OF_TEACHERS = ("distill.", "members.")
TERMS = "distill.terms"
TERM_WEIGHT = re.compile(r"distill\.terms\.(\w+)\.weight")
"""Key of the weight of a term, by the name of its loss or its number from 0."""
_FREE = re.compile(
    r"params\b|(model|student)\.args\b|train\.init\b|search\.(labels_only_)?space\b|study\.arms\b"
)


def to_tree(config: Config) -> Tree:
    """Return a config as nested dictionaries."""
    # ten times as fast as dataclasses.asdict, for each of ten thousand trials
    tree: Tree = _ADAPTER.dump_python(config, warnings=False)
    return tree


def from_tree(tree: Tree, sources: Mapping[str, str] | None = None) -> Config:
    """Return the config of nested dictionaries.

    Args:
        tree: Nested dictionaries of config keys; missing keys get their defaults.
        sources: Where dotted keys were given, such as a file, for messages.

    Raises:
        ConfigError: Keys or values are invalid; the message lists every fault, one a line.
    """
    try:
        # as JSON: pydantic's strict mode makes dataclasses of JSON objects only
        return _ADAPTER.validate_json(json.dumps(with_task_defaults(tree), default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error, sources or {}))) from None


def _faults(error: ValidationError, sources: Mapping[str, str]) -> Iterator[str]:
    for fault in error.errors():
        path = [str(part) for part in fault["loc"] if part not in _TAGS]
        key = ".".join(path)
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            section = ".".join(path[:-1])
            known = [k for k in known_keys() if k.rpartition(".")[0] == section]
            message = f"unknown key{did_you_mean(key, known)}"
        elif fault["type"] == "missing":
            message = "must be given"
        elif fault["type"] == "value_error":
            message = fault["msg"].removeprefix("Value error, ")
        elif fault["type"] == "missing":
            message = "must be given"
        elif fault["type"] == "too_short":
            what = fault["ctx"]["field_type"].lower().replace("dictionary", "mapping")
            message = f"must be a {what} that is not empty, got {fault['input']!r}"
        else:
            condition = fault["msg"].removeprefix("Input should be ").removeprefix("String should ")
            given = cut_text(repr(fault["input"]), 200)
            message = f"must be {condition}, got {given}".replace("be match", "match")
        yield f"{locate_key(key, sources)}: {message}"


def locate_key(key: str, sources: Mapping[str, str]) -> str:
    """Return `source: key`, by the source of the key itself, of a key within it, or of its section.

    Args:
        key: Dotted config key.
        sources: Where dotted keys were given.
    """
    inside = [k for k in sources if k.startswith(f"{key}.")]
    around = [key[: dot.start()] for dot in re.finditer(r"\.", key)][::-1]
    source = next((sources[k] for k in (key, *inside, *around) if k in sources), None)
    return f"{source}: {key}" if source else key


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return the end of a message on an unknown word: close ones, else all known ones."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if not known:
        return ""
    return f": did you mean {', '.join(close)}?" if close else f" (known: {', '.join(known)})"


def known_keys() -> list[str]:
    """Return all dotted config keys, sections included."""
    tree = to_tree(Config())
    tree["student"] = to_tree(Config())["model"]
    tree["data"]["transfer"] = dataclasses.asdict(TransferConfig(name="digits"))
    return [key for key, _ in leaves(tree, "", inner=True)]


def leaves(tree: Tree, prefix: str, *, inner: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested dictionaries.

    Args:
        tree: Nested dictionaries.
        prefix: Text before each key.
        inner: Whether to yield sections, too.
    """
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        free = (".args", "space", "params", ".arms", ".init")
        nested = isinstance(value, dict) and not dotted.endswith(free)
        if inner or not nested:
            yield dotted, value
        if nested:
            yield from leaves(value, f"{dotted}.", inner=inner)


def flat(config: Config) -> dict[str, Any]:
    """Return the values of a config by dotted key."""
    return dict(leaves(to_tree(config), ""))


def get(config: Config, key: str) -> Any:
    """Return a value by its dotted key; None where there is none.

    >>> get(Config(), "model.args.width"), get(Config(), "params.lr")
    (8, None)
    """
    value: Any = to_tree(config)
    if TERM_WEIGHT.fullmatch(key):
        found = None if is_absent_term(value, key) else _find_term(value, key)
        return None if found is None else found.get("weight")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def choices_of_terms(config: Config) -> list[list[dict[str, Any]]]:
    """Return the lists of terms that the students of a config may have, as plain data."""
    found = [to_tree(config)["distill"]["terms"]]
    spec, points = config.search.space.get(TERMS), config.search.points or ()
    if isinstance(spec, dict) and isinstance(values := spec.get("choice"), list | tuple):
        found += values
    found += [point[TERMS] for point in points if TERMS in point]
    return [list(terms) for terms in found if isinstance(terms, list | tuple)]


def with_its_terms(config: Config, point: Point) -> Point:
    """Return a point with the first choice of terms that has the one whose weight it sets.

    Args:
        config: Config whose terms are a choice of its search space.
        point: Values by dotted key.
    """
    tree, weights = to_tree(config), [key for key in point if TERM_WEIGHT.fullmatch(key)]
    if TERMS in point or not any(is_absent_term(tree, key) for key in weights):
        return point
    for terms in choices_of_terms(config):
        tree["distill"]["terms"] = terms
        if not any(is_absent_term(tree, key) for key in weights):
            return {TERMS: terms, **point}
    return point


def is_absent_term(tree: Tree, key: str) -> bool:
    """Say whether a key is of the weight of a term that is not there."""
    match = TERM_WEIGHT.fullmatch(key)
    if match is None:
        return False
    names = [term.get("name") for term in _terms_of(tree) if isinstance(term, Mapping)]
    name = match[1]
    return not (int(name) < len(names) if name.isdecimal() else names.count(name) == 1)


def _terms_of(tree: Tree) -> list[Any]:
    """Return the terms of nested dictionaries of config keys, which may be of any shape."""
    distill = tree.get("distill")
    terms = distill.get("terms") if isinstance(distill, Mapping) else None
    return list(terms) if isinstance(terms, list | tuple) else []


def _find_term(tree: Tree, key: str) -> Any:
    """Return the term whose weight a key is.

    Raises:
        ConfigError: There is none, or several of its name.
    """
    (name,) = TERM_WEIGHT.fullmatch(key).groups()  # type: ignore[union-attr]
    terms = _terms_of(tree)
    names = [str(term.get("name")) for term in terms if isinstance(term, Mapping)]
    if is_absent_term(tree, key):
        if name in names:
            numbers = " or ".join(str(n) for n, other in enumerate(names) if other == name)
            raise ConfigError(f"{key}: {name} stands several times: {numbers} in its place")
        known = ", ".join(names) or "none"
        raise ConfigError(f"{key}: must be of a term of distill.terms ({known}), got {name}")
    return terms[int(name) if name.isdecimal() else names.index(name)]


def put(tree: Tree, key: str, value: Any) -> None:
    """Set a value by its dotted key; a section is merged, not replaced."""
    if key == "tracking" and isinstance(value, str):
        key = "tracking.mode"
    if key == "data.augment" and not isinstance(value, dict):
        if value == "none" and isinstance(data := tree.get("data"), dict):
            data.pop("augment", None)  # and nothing of what was set apart before
        key = "data.augment.preset"
    if key == "members" and isinstance(value, int | list):
        key = "members.count" if isinstance(value, int) else "members.models"
    if TERM_WEIGHT.fullmatch(key):
        terms = _terms_of(tree)
        number = terms.index(_find_term(tree, key))
        terms[number] = {**terms[number], "weight": value}
        tree["distill"]["terms"] = terms
        return
    if isinstance(value, dict) and value and not _FREE.match(key):
        for inner, inner_value in value.items():
            put(tree, f"{key}.{inner}", inner_value)
        return
    inside_space = re.match(r"(search)\.(space|labels_only_space)\.(.+)", key)
    *parents, last = inside_space.groups() if inside_space else key.split(".")
    default = _default_space(tree)
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            whole = inside_space and parent == "space"
            tree[parent] = copy.deepcopy(default) if whole else {}
        tree = tree[parent]
    tree[last] = value
