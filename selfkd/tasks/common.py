"""What every task does alike: its checkpoints, fresh networks and averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from selfkd.config import TERMS, Config, ModelConfig, TrainConfig
from selfkd.config.tasks import values_of
from selfkd.deployment.reshape import PRUNED, reshape
from selfkd.distill.initial import CHOICES, match_layers, start_from_layers
from selfkd.distill.named_terms import term_keys
from selfkd.distill.outputs import take_logits
from selfkd.distill.teacher import Teacher
from selfkd.losses import Average, ensemble_logits
from selfkd.models import parameters_count
from selfkd.results import CachedFormat, Row, from_row
from selfkd.soft_targets.manifest import Manifest
from selfkd.soft_targets.transforms import OF_LABELS, Transform, class_mean_fault
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks.task import ModelFacts
from selfkd.training.optimizers import make_optimizer
from selfkd.training.trial import Trial

Facts = TypeVar("Facts", bound=ModelFacts)
Network = TypeVar("Network", bound=nn.Module | Teacher)


class Maker(Protocol):
    """The part of a task that makes and loads networks."""

    config: Config

    def make(self, model: ModelConfig) -> nn.Module:
        """Return a fresh network for the task's data."""

    def load(self, checkpoint: str) -> tuple[nn.Module, ModelFacts]:
        """Return the network of a checkpoint, and its metadata."""


def check_top_k(config: Config, outputs: int) -> int | None:
    """Return `targets.top_k`.

    Raises:
        ValueError: It is not below the number of outputs.
    """
    top_k = config.targets.top_k
    if top_k is not None and top_k >= outputs:
        raise ValueError(f"targets.top_k must be in [1, {outputs - 1}], got {top_k}")
    return top_k


def check_class_mean(config: Config, outputs: int) -> None:
    """Check that there can be a mean soft target of each output, where it is wanted.

    Raises:
        ValueError: The outputs are too many.
    """
    arms = (arm.target_transform for arm in config.study.arms.values())
    if "class_mean" in (*config.controls, *arms) and (fault := class_mean_fault(outputs)):
        raise ValueError(fault)


def named_networks(config: Config) -> dict[str, ModelConfig]:
    """Return the networks of a config by their names in `Facts.parameters`.

    Of a chain, `student` is the last one, and `student_N` that of generation N.

    >>> named_networks(Config())["student"].args
    {'width': 8}
    """
    chain = config.students if config.is_chain else ()
    of_generations = {f"student_{number}": model for number, model in enumerate(chain, start=1)}
    return {"model": config.model, "student": config.network(), **of_generations}


def describe_cached(manifest: Manifest) -> CachedFormat:
    """Return how a store's logits are cached."""
    return CachedFormat(
        words=manifest.words, row_bytes=manifest.row_bytes, shard_size=manifest.shard_size
    )


def open_checkpoint(checkpoint: str, kind: type[Facts]) -> tuple[dict[str, Tensor], Facts]:
    """Return the tensors and the metadata of a checkpoint.

    Args:
        checkpoint: Its file.
        kind: Type of the task's metadata.

    Raises:
        ValueError: It is damaged, or of no network that can be made.
    """
    tensors, found = load_tensors(as_path(checkpoint))
    try:
        facts = from_row(kind, found)
        model = ModelConfig.of_checkpoint(facts.model)
    except ValueError as error:
        task = found.get("task", "images" if "classes" in found else None)
        of = "" if task is None else f" (it is a model of task {task})"
        raise ValueError(f"{checkpoint} cannot be rebuilt: {error}{of}") from None
    return tensors, replace(facts, model={"name": model.name, "args": model.args})


def make_fresh(task: Maker, trial: Trial, start: Mapping[str, Any]) -> nn.Module:
    """Return a network to be trained, the same on all ranks.

    Args:
        task: Task that makes it.
        trial: Student and its teachers.
        start: `checkpoint` to start the weights from, or `seed` of the initialisation; with `fresh`
            the checkpoint gives the number of channels alone, where they were pruned.
    """
    torch.manual_seed(start.get("seed", trial.seed))
    network = task.make(trial.model)
    if "checkpoint" in start:
        tensors, facts = load_tensors(as_path(start["checkpoint"]))
        if (share := facts.get(PRUNED)) is not None:
            network = reshape(network, tensors, share)
        if not start.get("fresh"):
            network.load_state_dict(tensors)
    elif (init := task.config.train.init) != "fresh" and trial.teachers:
        checkpoint = trial.teachers[0]["checkpoint"]
        if init == "teacher":
            network.load_state_dict(load_tensors(as_path(checkpoint))[0])
        else:
            with torch.random.fork_rng(devices=[]):  # drawn from as by a fresh start
                teacher = task.load(checkpoint)[0]
            _start_from(network, teacher, init)
    if "seed" in start:
        torch.manual_seed(trial.seed)
    return network


def _start_from(student: nn.Module, teacher: nn.Module, init: str | Mapping[str, str]) -> None:
    """Copy layers of a teacher into its student.

    Args:
        student: Fresh network.
        teacher: Network of the teacher.
        init: `train.init`: a name of `selfkd.distill.initial.CHOICES`, or a map of paths.

    Raises:
        ValueError: The layers do not fit.
    """
    mapping = match_layers(student, teacher, CHOICES[init]) if isinstance(init, str) else init
    start_from_layers(student, teacher, mapping)


def check_init(task: Maker, teachers: Sequence[Mapping[str, Any]]) -> None:
    """Try what students start from.

    Args:
        task: Task whose config's students are tried.
        teachers: `checkpoint`, or `name` and `args`, of networks that may teach; none where they
            are not known yet.

    Raises:
        ValueError: A student cannot start from its teacher.
    """
    config, student = task.config, task.config.network()
    for init in values_of(config, "train.init"):
        if init != "fresh" and "lora" in student.args:
            raise ValueError("train.init must be fresh with lora, whose adapters begin anew")
        known = [{"name": config.model.name, "args": config.model.args}]
        for row in teachers or (known if init == "teacher" and not config.is_chain else ()):
            if init != "fresh":
                _try_start(task, student, row, init)


def _try_start(
    task: Maker, student: ModelConfig, teacher: Mapping[str, Any], init: str | Mapping[str, str]
) -> None:
    if "checkpoint" in teacher:
        network, named = task.load(teacher["checkpoint"])[0], teacher["checkpoint"]
    else:
        model = ModelConfig(name=teacher["name"], args=teacher["args"])
        network, named = task.make(model), model.title
    fresh = task.make(student)
    if init == "teacher":
        if parameters_count(fresh) != parameters_count(network):
            raise ValueError("train.init must be fresh when student differs from model")
        return
    try:
        _start_from(fresh, network, init)
    except ValueError as error:
        raise ValueError(
            f"train.init must suit the student {student.title} and its teacher {named}, got "
            f"{init}: {error}"
        ) from None


def teacher_weights(teachers: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return the weight of each of several teachers; None where all are alike.

    >>> teacher_weights([{"weight": 0.25}, {"weight": 0.75}]), teacher_weights([{"weight": 1.0}])
    ([0.25, 0.75], None)
    """
    if len(teachers) > 1 and "weight" in teachers[0]:
        return [teacher["weight"] for teacher in teachers]
    return None


def mixes_transfer(trial: Trial, transform: Transform) -> bool:
    """Return whether a student is trained on a transfer set, if there is one.

    It is not without teachers, nor where each item needs a label.
    """
    return bool(trial.teachers) and transform not in OF_LABELS


def try_each_term(
    config: Config,
    choices: Iterable[Sequence[Mapping[str, Any]]],
    teachers: Sequence[Network],
    compute: Callable[[Config, Network], None],
) -> None:
    """Compute further terms of the loss, one after the other, to each teacher.

    Args:
        config: Config of the student.
        choices: Lists of terms that it may have.
        teachers: Networks that may teach it.
        compute: Function that computes the only term of a config to a teacher.

    Raises:
        ValueError: One cannot be computed; names it.
    """
    for terms in choices:
        keys = term_keys([str(term["name"]) for term in terms])
        for key, term in zip(keys, terms, strict=True):
            own = config.at({TERMS: [term]})
            for teacher in teachers:
                try:
                    compute(own, teacher)
                except (TypeError, ValueError, RuntimeError) as error:
                    said = str(error).removeprefix(f"{key}: ")
                    raise ValueError(f"{TERMS}: {key}: {said}") from None


def training_facts(trial: Trial, bits: int | None) -> Row:
    """Return what the metadata of a checkpoint say of its training.

    Args:
        trial: Student and its teachers.
        bits: Bits that its weights were rounded to, if they were.
    """
    rounded = {} if bits is None else {"bits": bits}
    return {"stage": trial.stage, "seed": trial.seed, **rounded}


def optimizer_of(network: nn.Module, options: TrainConfig) -> torch.optim.Optimizer:
    """Return the config's optimiser of a network."""
    return make_optimizer(
        network,
        name=options.optimizer,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        fused=bool(options.fused),
    )


def add_projections(
    optimizer: torch.optim.Optimizer, projections: nn.Module | None, options: TrainConfig
) -> None:
    """Add the projections of a loss to an optimiser, without weight decay of their biases."""
    if projections is None:
        return
    for decays in (True, False):
        own = [weight for weight in projections.parameters() if (weight.ndim > 1) == decays]
        decay = options.weight_decay if decays else 0.0
        optimizer.add_param_group({"params": own, "weight_decay": decay})


def spread(items: int, most: int) -> list[int]:
    """Return numbers of evenly spaced items.

    Args:
        items: Number of items that there are.
        most: Largest number that is taken.

    >>> spread(10, 4), spread(3, 4)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    count = min(items, most)
    return [number * items // count for number in range(count)]


class Averaged(nn.Module):
    """The average of trained networks.

    Args:
        members: Networks from the same inputs to logits of the same outputs, or to an output with
            logits.
        average: What is averaged.
        weights: Weight of each; all alike when None.
    """

    def __init__(
        self, members: Sequence[nn.Module], average: Average, weights: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self._average: Average = average
        self._weights = weights

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits `[batch, outputs]`, of tokens `[batch, length, outputs]`."""
        found = [take_logits(member(inputs), "member") for member in self.members]
        rows = torch.stack(found).flatten(1, -2)
        logits = ensemble_logits(rows, average=self._average, weights=self._weights)
        return logits.reshape(found[0].shape)
