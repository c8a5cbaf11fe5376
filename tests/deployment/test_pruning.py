"""Networks of any kind, pruned by torch-pruning's graph and made again from their tensors."""

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from selfkd.deployment.pruning import prune_channels
from selfkd.deployment.reshape import check_size, reshape

pytest.importorskip("torch_pruning")


class Branches(nn.Module):
    """Grouped and depthwise convolutions, with a classifier that is no linear layer."""

    def __init__(self, width: int = 8, groups: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.classifier = nn.Conv2d(2 * width, 10, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.grouped(self.stem(images))).relu()
        return self.classifier(self.depthwise(self.expand(features)).relu()).mean(dim=(2, 3))


class Torch(nn.Module):
    """An attention of torch's own, whose layers are left whole, and layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.hidden = nn.Linear(12, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images[:, 0])
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.hidden(tokens).relu().mean(dim=1))


def _vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        depth=1,
        embed_dim=24,
        num_heads=3,
        in_chans=1,
        num_classes=10,
    )


MAKERS = {"branches": Branches, "torch": Torch, "vit": _vit}
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("maker", "share", "remarks"),
    [
        ("branches", 0.5, ["grouped convolutions lose as many channels in each group: grouped"]),
        ("branches", 0.3, ["rounded to whole channels: 0.312 to 0.5", "in each group: grouped"]),
        ("torch", 0.5, ["left whole: embed"]),
        ("vit", 0.5, ["all attention heads stay, with fewer dimensions each: blocks.0.attn.qkv"]),
        ("vit", 0.4, ["rounded to whole", "all attention heads stay"]),
    ],
)
def test_a_pruned_network_is_made_again_from_its_tensors(maker, share, remarks):
    torch.manual_seed(0)
    network = MAKERS[maker]().eval()
    size = sum(parameter.numel() for parameter in network.parameters())
    found = prune_channels(network, IMAGES[:2], share)
    assert len(found) == len(remarks)
    assert all(remark in line for remark, line in zip(remarks, found, strict=True)), found
    assert not any("depthwise" in line for line in found)
    again = reshape(MAKERS[maker]().eval(), network.state_dict(), share)
    assert sum(parameter.numel() for parameter in again.parameters()) < 0.9 * size
    with torch.no_grad():
        assert again(IMAGES).isfinite().all()  # fresh weights
        again.load_state_dict(network.state_dict())
        assert torch.equal(again(IMAGES), network(IMAGES))
        assert again(IMAGES).shape == (3, 10)


def test_pruning_is_the_same_each_time():
    network = Branches().eval()
    others = [deepcopy(network) for _ in range(2)]
    for other in others:
        prune_channels(other, IMAGES[:2], 0.5)
    states = [other.state_dict() for other in others]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("network", "share", "message"),
    [
        (
            Branches(),
            0.8,
            r"leave a channel of grouped, which has 4 in each of 2 groups: at most 0",
        ),
        (Branches(4, 1), 0.8, r"a channel of stem, which has 4: at most 0.75, got 0.8"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0.5, "a layer to prune"),
    ],
)
def test_a_share_that_empties_a_layer_is_refused(network, share, message):
    with pytest.raises(ValueError, match=message):
        prune_channels(network, IMAGES[:2], share)


class Fixed(nn.Module):
    """A network whose code has the number of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 8)
        self.last = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(images.flatten(1)).reshape(-1, 8))


def test_what_torch_pruning_does_not_understand_is_refused():
    with pytest.raises(ValueError, match="torch-pruning cannot prune Fixed: "):
        prune_channels(Fixed().eval(), IMAGES[:2], 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("stem.bias"), r"stem.bias .* at most \[8\], got \[\]"),
        (lambda state: state.update({"stem.bias": torch.ones(9)}), r"at most \[8\], got \[9\]"),
        (lambda state: state.update({"stem.bias": torch.ones(0)}), r"at most \[8\], got \[0\]"),
        (lambda state: state.update({"stem.bias": torch.ones(2, 2)}), r"at most \[8\], got"),
    ],
)
def test_tensors_of_another_network_are_refused(change, message):
    state = Branches().state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        reshape(Branches(), state, 0.5)


def test_a_network_that_is_far_larger_than_its_tensors_is_refused():
    with pytest.raises(ValueError, match="at least 1/100 of the"):
        check_size(Branches(64), Branches(1, 1).state_dict())
