import math
import pickle
from functools import partial

import pytest
import timm
import torch
from torch import nn

from selfkd.models import (
    known_args,
    make_cnn,
    make_densenet,
    make_mlp,
    make_model,
    make_resnet,
    make_wide_resnet,
    parameters_count,
)

SMALL = {
    "selfkd_mlp": {"width": 8},
    "selfkd_cnn": {"width": 4},
    "selfkd_resnet8": {"width": 4},
    "selfkd_resnet20": {"width": 4},
    "selfkd_resnet32": {"width": 4},
    "selfkd_resnet56": {"width": 2},
    "selfkd_preresnet20": {"depth": 10},
    "selfkd_wrn28": {"depth": 10, "k": 1},
    "selfkd_densenet": {"depth": 10, "growth_rate": 4},
}
CIFAR10 = {"num_classes": 10, "in_chans": 3}


def small(name, *, num_classes=10, in_chans=1, image_size=8, **args):
    return make_model(
        name,
        {**SMALL[name], **args},
        num_classes=num_classes,
        in_chans=in_chans,
        image_size=image_size,
    )


def test_every_reference_network_is_in_timms_registry():
    assert set(timm.list_models("selfkd_*")) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("in_chans", "image_size", "num_classes"), [(1, 8, 10), (1, 28, 3), (3, 32, 100)]
)
def test_logits_have_the_given_shape(name, in_chans, image_size, num_classes):
    model = small(name, in_chans=in_chans, image_size=image_size, num_classes=num_classes)
    logits = model(torch.randn(2, in_chans, image_size, image_size))
    assert logits.shape == (2, num_classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_is_trained(name):
    model = small(name)
    nn.functional.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_decides_the_initialisation(name):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(torch.cat([value.flatten() for value in small(name).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", SMALL)
def test_networks_look_like_timms(name):
    model = small(name, num_classes=7)
    inputs = torch.randn(2, 1, 8, 8)
    model.eval()
    features = model.forward_features(inputs)
    assert torch.equal(model.forward_head(features), model(inputs))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert model.num_classes == model.get_classifier().out_features == 7
    assert model.in_chans == 1
    assert model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg["architecture"] == name
    model.get_submodule(model.pretrained_cfg["classifier"])
    model.reset_classifier(4)
    assert model.num_classes == 4
    assert model(inputs).shape == (2, 4)
    model.reset_classifier(0)
    assert torch.equal(model(inputs), pooled)


@pytest.mark.parametrize("name", SMALL)
def test_dropout_acts_in_training_only(name):
    model = small(name, drop_rate=0.5)
    inputs = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize("name", SMALL)
def test_a_pickled_network_has_the_same_logits(name):
    model = small(name).eval()
    inputs = torch.randn(2, 1, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs), model(inputs))


@pytest.mark.parametrize(
    ("make", "args", "published"),
    [
        # He et al. 2015, table 6
        (make_resnet, {"depth": 20}, "0.27M"),
        (make_resnet, {"depth": 32}, "0.46M"),
        (make_resnet, {"depth": 44}, "0.66M"),
        (make_resnet, {"depth": 56}, "0.85M"),
        (make_resnet, {"depth": 110}, "1.7M"),
        # Zagoruyko and Komodakis 2016, table 4
        (partial(make_model, "selfkd_preresnet20", image_size=32), CIFAR10, "0.27M"),
        (make_wide_resnet, {"depth": 40, "k": 1}, "0.6M"),
        (make_wide_resnet, {"k": 2}, "1.5M"),
        (make_wide_resnet, {"depth": 40, "k": 2}, "2.2M"),
        (make_wide_resnet, {"depth": 16, "k": 8}, "11.0M"),
        (make_wide_resnet, {"depth": 22, "k": 8}, "17.2M"),
        (make_wide_resnet, {}, "36.5M"),
        (make_wide_resnet, {"k": 12}, "52.5M"),
        # Huang et al. 2017, table 2
        (make_densenet, {}, "0.8M"),
        (make_densenet, {"depth": 250, "growth_rate": 24}, "15.3M"),
        (make_densenet, {"depth": 190, "growth_rate": 40}, "25.6M"),
        (make_densenet, {"depth": 40, "bottleneck": False, "compression": 1}, "1.0M"),
        (make_densenet, {"depth": 100, "bottleneck": False, "compression": 1}, "7.0M"),
        # Furlanello et al. 2018 say 16.1M: neither bottlenecks nor compression left out come closer
        (make_densenet, {"depth": 90, "growth_rate": 60, "num_classes": 100}, "15.2M"),
        (
            make_densenet,
            {"depth": 90, "growth_rate": 60, "num_classes": 100, "compression": 1},
            "22.0M",
        ),
        (
            make_densenet,
            {"depth": 90, "growth_rate": 60, "num_classes": 100, "bottleneck": False},
            "74.1M",
        ),
    ],
)
def test_parameters_are_as_many_as_published(make, args, published):
    with torch.device("meta"):
        count = parameters_count(make(**args))
    decimals = len(published.rstrip("M").split(".")[1])
    assert f"{count / 1e6:.{decimals}f}M" == published


def test_parameters_of_the_mlp():
    assert parameters_count(make_mlp(width=800)) == 784 * 800 + 800 + 800 * 800 + 800 + 8010
    assert parameters_count(make_mlp(depth=0, img_size=(4, 6), in_chans=3)) == 72 * 10 + 10


def test_convolutions_start_from_hes_distribution():
    torch.manual_seed(0)
    convolution = make_cnn(width=64).features[4].conv
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.01)


def test_the_shortcut_that_halves_is_zero_padding():
    block = make_resnet(depth=8, width=4).features[2]
    inputs = torch.randn(2, 4, 7, 7)
    shortcut = block.downsample(inputs)
    assert shortcut.shape == (2, 8, 4, 4) == block.conv1(inputs).shape
    assert torch.equal(shortcut[:, :4], inputs[:, :, ::2, ::2])
    assert not shortcut[:, 4:].any()


def test_a_wide_block_activates_before_it_branches():
    block = make_wide_resnet(depth=10, k=2).features[1]
    nn.init.zeros_(block.norm1.weight)
    assert not block(torch.randn(2, 16, 8, 8)).any()


def test_a_dense_layer_keeps_what_it_was_given():
    layer = make_densenet(depth=10, growth_rate=4).features[1]
    inputs = torch.randn(2, 8, 5, 5)
    outputs = layer(inputs)
    assert outputs.shape == (2, 12, 5, 5)
    assert torch.equal(outputs[:, :8], inputs)


def test_dropout_on_the_pixels():
    model = make_mlp(width=8, input_drop_rate=0.5)
    inputs = torch.randn(2, 1, 28, 28)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_depth_counts_the_weighted_layers():
    def weighted(model):
        return sum(
            isinstance(module, nn.Linear)
            or (isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3))
            for module in model.modules()
        )

    assert weighted(make_resnet(depth=20, width=2)) == 20
    assert weighted(make_wide_resnet(depth=16, k=1)) == 16 - 3 + 1  # less the shortcuts; the head
    densenet = make_densenet(depth=40, growth_rate=2, bottleneck=False)
    assert weighted(densenet) == 40 - 2  # less the 1x1 transitions


def test_a_network_learns():
    torch.manual_seed(0)
    model = small("selfkd_cnn", num_classes=2)
    inputs, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 2
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimiser.step()
    assert (model(inputs).argmax(1) == labels).all()


@pytest.mark.parametrize(
    ("make", "args", "message"),
    [
        (make_mlp, {"width": 0}, "width must be at least 1, got 0"),
        (make_mlp, {"depth": -1}, "depth must be at least 0, got -1"),
        (make_cnn, {"width": 0}, "width must be at least 1, got 0"),
        (make_resnet, {"depth": 18}, r"depth must be 6n \+ 2 \(8, 14, 20, \.\.\.\), got 18"),
        (make_resnet, {"depth": 2}, "got 2"),
        (make_resnet, {"width": 0}, "width must be at least 1, got 0"),
        (make_wide_resnet, {"depth": 26}, r"depth must be 6n \+ 4 .*, got 26"),
        (make_wide_resnet, {"k": 0}, "k must be at least 1, got 0"),
        (make_densenet, {"depth": 9}, "depth must be at least 10, got 9"),
        (make_densenet, {"depth": 6, "bottleneck": False}, "depth must be at least 7, got 6"),
        (make_densenet, {"growth_rate": 0}, "growth_rate must be at least 1, got 0"),
        (make_densenet, {"compression": 0}, r"compression must be in \(0, 1\], got 0"),
        (make_densenet, {"compression": math.nan}, r"compression must be in \(0, 1\], got nan"),
    ],
)
def test_impossible_shapes_are_refused(make, args, message):
    with pytest.raises(ValueError, match=message):
        make(**args)


def test_timms_own_names_work_with_and_without_a_tag():
    for name in ("resnet10t", "resnet10t.c3_in1k"):
        model = make_model(name, num_classes=3, in_chans=1, image_size=28)
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 3)


def test_arguments_of_the_user_win():
    model = make_model(
        "selfkd_mlp",
        {"img_size": 4, "num_classes": 5, "width": 6},
        num_classes=10,
        in_chans=1,
        image_size=8,
    )
    assert model(torch.zeros(1, 1, 4, 4)).shape == (1, 5)
    assert model.num_features == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", r"must be a timm model name, got 'resnet5': did you mean resnet50,"),
        ("selfkd_resnet21", r"did you mean .*selfkd_resnet20"),
        ("resnet50.a1", r"did you mean resnet50\."),
        ("zzzzqq", r"got 'zzzzqq': timm\.list_models\(\) has them all"),
        ("hf-hub:timm/resnet10t.c3_in1k", "must be a timm model name"),
        ("", "must be a timm model name"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(name, message):
    with pytest.raises(ValueError, match=rf"^model\.name .*{message}"):
        make_model(name, num_classes=10, in_chans=1, image_size=8)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("selfkd_mlp", {"width": "wide"}, "'str'"),
        ("selfkd_resnet20", {"depth": 19}, "depth must be 6n"),
        ("selfkd_cnn", {"pretrained": True}, "No pretrained weights exist"),
    ],
)
def test_wrong_arguments_are_refused_naming_model_and_argument(name, args, message):
    with pytest.raises(ValueError, match=rf"^model\.args must suit '{name}', got .*{message}"):
        make_model(name, args, num_classes=10, in_chans=1, image_size=8)


def test_nothing_is_downloaded_unless_pretrained(monkeypatch):
    loads = []
    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", lambda *args, **kwargs: loads.append(kwargs)
    )
    make_model("resnet10t.c3_in1k", num_classes=3, in_chans=1, image_size=28)
    assert not loads
    make_model("resnet10t", {"pretrained": True}, num_classes=3, in_chans=1, image_size=28)
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("selfkd_cnn", {"depth": 3}),
        ("selfkd_mlp", {"widht": 3}),
        ("resnet10t", {"widht": 3}),
        ("resnet18", {"features_only": True}),
        ("resnet18", {"out_indices": [1]}),
        ("regnety_002", {"no_such": 1}),
    ],
)
def test_unknown_arguments_are_refused(name, args):
    (key,) = args
    with pytest.raises(ValueError, match=f"model.args must be arguments of '{name}', got '{key}'"):
        make_model(name, args, num_classes=3, in_chans=1, image_size=32)


def test_a_close_name_is_suggested():
    with pytest.raises(ValueError, match=r"got 'widht': did you mean width\?"):
        make_model("selfkd_mlp", {"widht": 3}, num_classes=3, in_chans=1, image_size=8)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet18", {"drop_rate": 0.1}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "depth": 1}),
        ("regnety_002", {"drop_path_rate": 0.1, "wa": 30.0}),
        ("selfkd_resnet8", {"width": 4}),
    ],
)
def test_arguments_of_the_class_and_its_config_are_known(name, args):
    make_model(name, args, num_classes=3, in_chans=3, image_size=32)


def test_reading_the_arguments_of_a_network_draws_no_random_numbers():
    known_args.cache_clear()
    torch.manual_seed(0)
    known_args("resnet18")
    drawn = torch.rand(1)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(0)))
