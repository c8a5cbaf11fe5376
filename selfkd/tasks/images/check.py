"""Whether the networks of a config fit its images, and the facts of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from selfkd.config import AugmentConfig, ModelConfig, choices_of_terms
from selfkd.data import fingerprint
from selfkd.data.transfer import check_leaks
from selfkd.distill.outputs import describe_output, take_logits
from selfkd.distill.teacher import Teacher
from selfkd.models import parameters_count
from selfkd.results import Facts
from selfkd.results.trial import CachedFormat
from selfkd.tasks.common import check_init, named_networks, optimizer_of
from selfkd.tasks.images.augment import FRESH, describe_views
from selfkd.tasks.images.networks import ImageNetworks
from selfkd.tasks.images.terms import try_terms
from selfkd.training.ranks import smallest_batch

METRICS = ("val_accuracy", "val_nll")  # of what training reports, what is measured on validation


def check_images(
    task: ImageNetworks, teachers: Sequence[Mapping[str, Any]], *, cached: CachedFormat
) -> Facts:
    """Try the config's networks on two images; return the facts of them and of the data.

    Args:
        task: Data and networks.
        teachers: Networks that may teach, with which the further terms of the loss are tried.
        cached: Form of the cached teacher logits.

    Raises:
        ValueError: They do not fit; says what must be otherwise.
    """
    config, data, train = task.config, task.data, task.config.train
    if config.search.metric not in METRICS:
        raise ValueError(
            f"search.metric must be one of {', '.join(METRICS)}, got {config.search.metric}: "
            "a training function of your own reports others"
        )
    networks = {name: _tried(task, model) for name, model in named_networks(config).items()}
    for network in (*networks.values(), *(_tried(task, model) for model in config.members.models)):
        # on GPUs the statistics of several workers are synchronised
        workers = 1 if task.device == "cuda" else config.resources.workers
        images = len(data.train)
        smallest_batch(network, batch_size=train.batch_size, images=images, ranks=workers)
    optimizer_of(networks["student"], train)
    sizes = {name: parameters_count(network) for name, network in networks.items()}
    check_init(task, teachers)
    if any(choices := choices_of_terms(config)):
        found = [_teacher_of(task, row) for row in teachers]
        try_terms(task, networks["student"], found, choices)
    splits = {"train": data.train, "val": data.val, "test": data.test}
    notes = [data.note] if data.note else []
    own = config.data
    new = own.augment != AugmentConfig() or own.repeats > 1 or own.views == "fresh"
    said = []
    if new and not task.views.is_identity:
        said.append(describe_views(task.views, repeats=own.repeats))
    if data.test_size != (size := data.image_size):
        of = f"{data.test_size} x {data.test_size} pixels in validation and test"
        said.append(f"{of}, {size} x {size} in training")
    if said:
        notes.append(f"images: {'; '.join(said)}")
    prints = {
        "train": data.fingerprint,
        "val": fingerprint(data.val, mean=data.mean, std=data.std),
        "test": fingerprint(data.test, mean=data.mean, std=data.std),
    }
    if task.transfer is not None:
        notes.append(check_leaks(task.transfer, data))
        prints["transfer"] = task.transfer.fingerprint
    return Facts(
        items={name: len(split.labels) for name, split in splits.items()},
        outputs=data.num_classes,
        names=data.class_names,
        views=1 if task.views.count == FRESH else task.views.count,
        parameters=sizes,
        fingerprints=prints,
        transfer=0 if task.transfer is None else len(task.transfer),
        notes=tuple(notes),
        unit="images" if data.features is None else "rows",
        cached=cached,
    )


def _teacher_of(task: ImageNetworks, row: Mapping[str, Any]) -> Teacher:
    """Return a network that may teach, of a checkpoint or with random weights."""
    if "checkpoint" in row:
        return task.teacher(row["checkpoint"])
    return Teacher(task.make(ModelConfig(name=row["name"], args=row["args"])))


def _tried(task: ImageNetworks, model: ModelConfig) -> nn.Module:
    """Return a network whose logits of two images are as they should be."""
    network = task.make(model).eval()
    inputs, _, _ = task.two_images()
    size, classes = task.data.image_size, task.data.num_classes
    try:
        with torch.no_grad():
            output = network(inputs)
    except Exception as error:
        what = f"{size}x{size} images"
        if task.data.features is not None:
            what = f"[N, {len(task.data.features)}] features, such as selfkd_mlp"
        raise ValueError(
            f"model must take {what}, got {model.name!r} with {model.args}: {error}"
        ) from error
    try:
        shape = str(list(take_logits(output, "model").shape))
    except TypeError:
        shape = describe_output(output)
    if shape != str([2, classes]):
        raise ValueError(
            f"model must give {classes} logits an image, got {model.name!r} with {model.args}, "
            f"which gives {shape} for 2 images"
        )
    if (other := task.data.test_size) != size:
        try:
            with torch.no_grad():
                network(next(task.data.batches("val", batch_size=2, device=task.device))[0])
        except Exception as error:
            raise ValueError(
                f"data.test_size must be a size that {model.name!r} with {model.args} takes, as it "
                f"does {size}, got {other}: {error}"
            ) from error
    return network
