"""Selfkd's own networks, pruned to the named network of a smaller width."""

import pytest
import torch
from torch import nn

from selfkd.config import ModelConfig
from selfkd.deployment.named import narrower, prune_to
from selfkd.models import make_model

pytest.importorskip("torch_pruning")

NETWORKS = [
    ("selfkd_mlp", {"width": 12, "depth": 3, "drop_rate": 0.1}, {"width": 6}),
    ("selfkd_cnn", {"width": 6}, {"width": 3}),
    ("selfkd_densenet", {"depth": 16, "growth_rate": 6}, {"growth_rate": 3}),
    (
        "selfkd_densenet",
        {"depth": 13, "growth_rate": 4, "bottleneck": False, "compression": 1.0},
        {"growth_rate": 2},
    ),
    ("selfkd_resnet8", {"width": 6}, {"width": 3}),
    ("selfkd_resnet20", {"width": 4}, {"width": 2}),
    ("selfkd_wrn28", {"depth": 10, "k": 4}, {"k": 2}),
    ("selfkd_preresnet20", {"depth": 10, "k": 4}, {"k": 2}),
]


def _make(name: str, args: dict[str, object], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = make_model(name, args, num_classes=10, in_chans=1, image_size=8)
    for module in network.modules():  # as after a training
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize(("name", "args", "narrow"), NETWORKS)
def test_a_pruned_network_is_the_named_one_bit_for_bit(name, args, narrow):
    network = _make(name, args)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = narrower(ModelConfig(name=name, args=args), 0.5)
    assert found.model.args == {**args, **narrow}
    assert found.remarks == ()
    target = _make(name, found.model.args, seed=1)
    images = torch.randn(5, 1, 8, 8)
    pruned = prune_to(network, target, images[:2])
    with torch.no_grad():
        assert torch.equal(pruned(images), target(images))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@torch.no_grad()
def _kill_every_second_channel(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight[1::2] = module.bias[1::2] = 0
        if isinstance(module, nn.Conv2d | nn.Linear):
            if module.weight.shape[1] not in (1, 64):  # channels or pixels of the images
                module.weight[:, 1::2] = 0
            if len(module.weight) != 10:
                module.weight[1::2] = 0
                if module.bias is not None:
                    module.bias[1::2] = 0


@pytest.mark.parametrize(("name", "args", "narrow"), [NETWORKS[n] for n in (0, 1, 2, 4, 5)])
def test_channels_without_weights_go_and_nothing_else_changes(name, args, narrow):
    network = _make(name, args)
    _kill_every_second_channel(network)
    target = _make(name, {**args, **narrow}, seed=1)
    images = torch.randn(5, 1, 8, 8)
    prune_to(network, target, images[:2])
    with torch.no_grad():
        torch.testing.assert_close(target(images), network(images), rtol=1e-4, atol=1e-5)
        assert network(images).std() > 1e-3


@pytest.mark.parametrize(
    ("name", "args", "share", "message"),
    [
        ("selfkd_cnn", {"width": 1}, 0.5, "narrowest .* features.0.conv has 1 channels"),
        ("selfkd_cnn", {"width": 8}, 0.99, r"in \[0.125, 0.875\] .* 0 of the 8 .* got 0.99"),
        ("selfkd_cnn", {"width": 8}, 0.01, r"in \[0.125, 0.875\] .* 8 of the 8 .* got 0.01"),
        ("selfkd_mlp", {"depth": 0}, 0.5, "hidden layer"),
        ("selfkd_preresnet20", {}, 0.5, "selfkd_preresnet20 of k 1"),
        ("selfkd_wrn28", {"k": 2}, 0.5, "selfkd_wrn28 of k 2, the narrowest"),
        ("selfkd_wrn28", {}, 0.9, r"in \[0.1, 0.8\] .* 16 of the 160 channels"),
    ],
)
def test_a_share_that_leads_to_no_network_is_refused(name, args, share, message):
    with pytest.raises(ValueError, match=message):
        narrower(ModelConfig(name=name, args=args), share)


@pytest.mark.parametrize(
    ("name", "width", "share", "left"),
    [("selfkd_cnn", 8, 0.3, 6), ("selfkd_densenet", 12, 0.3, 8), ("selfkd_wrn28", 10, 0.25, 8)],
)
def test_a_share_is_rounded_to_the_nearest_width_and_said(name, width, share, left):
    key = {"selfkd_densenet": "growth_rate", "selfkd_wrn28": "k"}.get(name, "width")
    found = narrower(ModelConfig(name=name, args={key: width, "drop_rate": 0.1}), share)
    assert found.model.args == {key: left, "drop_rate": 0.1}
    assert f"is rounded to {left} of {width}" in found.remarks[0]


def test_weights_that_are_no_numbers_are_refused():
    network = _make("selfkd_cnn", {"width": 4})
    network.get_parameter("features.2.conv.weight").data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got \w+ in features.2.conv.weight"):
        prune_to(network, _make("selfkd_cnn", {"width": 2}), torch.zeros(2, 1, 8, 8))
