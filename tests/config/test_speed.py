"""Settings of speed: what the table resolves to, and what keeps a run at its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.optim import list_optimizers

from selfkd.config import ModelConfig, dump_config, from_tree, load_config
from selfkd.config.speed import TABLE, kind_of, with_speed
from selfkd.config.tasks import FUSED
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import RunFolder
from selfkd.models import make_model
from selfkd.training.optimizers import has_fused


def speed(*settings: str) -> tuple[bool | None, bool | None]:
    train = with_speed(load_config(settings=settings)).train
    return train.channels_last, train.fused


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("selfkd_mlp", "mlp"),
        ("selfkd_cnn", "convolutional"),
        ("resnet18", "convolutional"),
        ("wide_resnet50_2", "convolutional"),
        ("tf_efficientnet_b0", "convolutional"),
        ("vit_tiny_patch16_224", "transformer"),
        ("swin_tiny_patch4_window7_224", "transformer"),
        ("mixer_b16_224", "other"),
    ],
)
def test_defaults_are_those_of_device_and_network(device: str, name: str, kind: str) -> None:
    gpu = f"resources.gpu={int(device == 'cuda')}"
    found = speed(f"model.name={name}", f"student.name={name}", gpu)
    assert kind_of(ModelConfig(name=name)) == kind
    assert found == TABLE[device, kind]  # type: ignore[index]


def test_text_and_arrays_have_the_defaults_of_their_networks() -> None:
    assert speed("task=text") == TABLE["cpu", "text"]
    assert speed("model.name=selfkd_mlp", "student.name=selfkd_mlp") == TABLE["cpu", "mlp"]


def test_one_convolutional_network_of_several_is_enough() -> None:
    mixed = "student=[{name: selfkd_mlp}, {name: selfkd_cnn}]"
    assert speed("model.name=selfkd_mlp", mixed, "rounds=2")[0] is True
    assert speed("model.name=selfkd_mlp", "student.name=selfkd_mlp")[0] is False


def test_what_is_given_is_kept_and_resolving_twice_changes_nothing() -> None:
    for value in ("true", "false"):
        assert speed(f"train.channels_last={value}", f"train.fused={value}") == (
            (value == "true",) * 2
        )
    config = with_speed(load_config())
    assert with_speed(config) is config


def test_an_optimiser_without_a_fused_step_gets_none_and_is_refused_by_name() -> None:
    assert speed("train.optimizer=lion")[1] is False
    space = "search.space={train.optimizer: {choice: [sgd, lion]}}"
    assert speed(space)[1] is False
    for wrong in ("train.optimizer=lion", space):
        with pytest.raises(ConfigError, match=r"train.fused: must be false .* lion, .* no fused"):
            load_config(settings=["train.fused=true", wrong])
    with pytest.raises(ConfigError, match=r"train.channels_last: must be false with task text"):
        load_config(settings=["task=text", "train.channels_last=true"])


def test_an_arm_without_a_fused_step_is_named_and_others_may_have_one() -> None:
    mixed = "study.arms={a: {set: {train.fused: true}}, b: {set: {train.optimizer: lamb}}}"
    assert load_config(settings=[mixed]).study.arms["a"].set == {"train.fused": True}
    both = "study.arms={a: {}, b: {set: {train.optimizer: lamb, train.fused: true}}}"
    with pytest.raises(ConfigError, match=r"^study.arms.b.set: train.fused: must be false with"):
        load_config(settings=[both])
    with pytest.raises(ConfigError, match=r"^study.arms.b.set: train.fused: must be false with"):
        load_config(settings=["train.fused=true", mixed])


def test_the_optimisers_with_a_fused_step_are_torchs() -> None:
    known = []
    for name in list_optimizers():
        try:
            known.append(name) if has_fused(name) else None
        except AssertionError:  # of apex and bitsandbytes, which need a GPU
            continue
    assert tuple(known) == FUSED


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "vgg11_bn"])
def test_the_kind_by_name_is_that_of_the_layers(name: str) -> None:
    with torch.device("meta"):
        network = make_model(name, num_classes=2, in_chans=3, image_size=224)
    convolutions = sum(isinstance(part, torch.nn.Conv2d) for part in network.modules())
    assert (kind_of(ModelConfig(name=name)) == "convolutional") == (convolutions > 1)


def test_a_run_folder_holds_what_was_resolved(tmp_path: Path) -> None:
    config = with_speed(load_config())
    RunFolder.create(tmp_path / "run", config, command="generations", numbered=False)
    _, stored = RunFolder.open(tmp_path / "run")
    assert (stored.train.channels_last, stored.train.fused) == TABLE["cpu", "convolutional"]


def test_a_run_of_a_version_without_them_goes_on_as_it_began(tmp_path: Path) -> None:
    """Its config.yaml lacks the keys, its hash was taken without them, and both stay valid."""
    path = tmp_path / "run"
    folder = RunFolder.create(path, load_config(), command="generations", numbered=False)
    older = "\n".join(
        line
        for line in (folder.path / "config.yaml").read_text().splitlines()
        if "channels_last" not in line and "fused" not in line
    )
    (folder.path / "config.yaml").write_text(older + "\n")
    from selfkd.config import config_hash, flat

    keys = {key for key in flat(load_config()) if key not in ("train.channels_last", "train.fused")}
    (folder.path / "config.hash").write_text(config_hash(load_config(), of=keys))

    folder, stored = RunFolder.open(folder.path)
    assert (stored.train.channels_last, stored.train.fused) == (False, False)
    resumed = with_speed(load_config(), stored)  # as with --config and --resume
    assert resumed.train == stored.train
    folder.check_change(stored, resumed)
    edited = older.replace("lr: 0.05", "lr: 0.5")
    (folder.path / "config.yaml").write_text(edited)
    _, other = RunFolder.open(folder.path)
    with pytest.raises(ConfigError, match="was edited where a run may not change"):
        folder.check_change(other, other)


def test_a_run_goes_on_in_the_precision_that_its_workers_have_decided() -> None:
    """With --resume and the YAML file that it was started with."""
    given = load_config(settings=["train.amp=auto"])
    stored = with_speed(load_config(settings=["train.amp=bfloat16", "train.tf32=true"]))
    assert with_speed(given, stored) == stored
    other = load_config(settings=["train.amp=float16", "train.tf32=false"])
    assert with_speed(other, stored).train.amp == "float16"
    assert with_speed(other, stored).train.tf32 is False


def test_a_dumped_config_is_read_as_it_was(tmp_path: Path) -> None:
    config = with_speed(load_config())
    (tmp_path / "x.yaml").write_text(dump_config(config))
    assert (
        load_config(tmp_path / "x.yaml")
        == config
        == from_tree({"train": {"channels_last": True, "fused": True}})
    )
