"""Features captured inside a network, in every wrapper, and layers copied from a teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from selfkd import Teacher
from selfkd.distill.features import Features
from selfkd.distill.layers import copy_layers, unwrap


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.linear(x))
        return out


class Net(nn.Module):
    """Network in which every activation overwrites the features before it."""

    def __init__(self, blocks: int = 11) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(blocks)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.act(self.stem(x))))
        return out

    def expected(self, x: Tensor) -> dict[str, Tensor]:
        """Output of each layer, computed without overwriting."""
        outputs = {"stem": self.stem(x)}
        x = F.relu(outputs["stem"])
        for index, block in enumerate(self.blocks):
            outputs[f"blocks.{index}.linear"] = block.linear(x)
            x = outputs[f"blocks.{index}"] = F.relu(block.linear(x))
        return outputs | {"head": self.head(x)}


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def assert_captured(captured: Features, net: Net, inputs: Tensor) -> None:
    """Check the captured values and the gradients through them."""
    expected = net.expected(inputs)
    torch.testing.assert_close(captured["stem"], expected["stem"])
    blocks = [expected[f"blocks.{index}.linear"] for index in range(len(net.blocks))]
    for ours, theirs in zip(captured["blocks.*.linear"], blocks, strict=True):
        torch.testing.assert_close(ours, theirs)
    parameters = [net.stem.weight, net.blocks[1].linear.weight]
    torch.testing.assert_close(
        torch.autograd.grad(captured["blocks.*.linear"][1].square().sum(), parameters),
        torch.autograd.grad(blocks[1].square().sum(), parameters),
    )


PATHS = ["stem", "blocks.*.linear"]

# --- what is captured --------------------------------------------------------------------------


def test_captures_before_in_place_activations_overwrite(net: Net, inputs: Tensor) -> None:
    logits = net(inputs)
    with Features(net, PATHS) as captured:
        assert torch.equal(net(inputs), logits)
    assert (net.expected(inputs)["stem"] < 0).any()  # there was something to overwrite
    assert_captured(captured, net, inputs)


def test_the_model_trains_the_same_while_it_is_looked_at(net: Net, inputs: Tensor) -> None:
    parameters = list(net.parameters())
    expected = torch.autograd.grad(net(inputs).square().sum(), parameters)
    with Features(net, PATHS):
        actual = torch.autograd.grad(net(inputs).square().sum(), parameters)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_clones_only_what_would_be_overwritten(net: Net, inputs: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
        for name in ("stem", "blocks.0", "head")
    ]
    with Features(net, ["stem", "blocks.0", "head"]) as captured:
        net(inputs)
    for handle in handles:
        handle.remove()
    shared = [captured[name].data_ptr() == seen[name].data_ptr() for name in seen]
    assert shared == [False, True, True]


def test_an_alias_of_what_would_be_overwritten_is_saved(inputs: Tensor) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Flatten(), nn.Identity(), nn.ReLU(inplace=True))
    with Features(net, ["0", "1", "2"]) as captured:
        net(inputs)
    for path in ("0", "1", "2"):
        torch.testing.assert_close(captured[path], net[0](inputs))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        out += x
        return out


def test_other_overwriting_is_noticed_and_clone_prevents_it(inputs: Tensor) -> None:
    net = Residual()
    with Features(net, ["linear"]) as captured:
        net(inputs)
    with pytest.raises(RuntimeError, match="'linear' must keep its output, got it overwritten"):
        captured["linear"]
    with Features(net, ["linear"], clone=True) as captured:
        net(inputs)
    torch.testing.assert_close(captured["linear"], net.linear(inputs))


def test_wildcards_stay_between_dots_and_follow_the_modules(net: Net, inputs: Tensor) -> None:
    paths = ["blocks.*", "blocks.[02].linear", "blocks.1?", "*"]
    with Features(net, paths) as captured:
        net(inputs)
    expected = net.expected(inputs)
    blocks = [expected[f"blocks.{index}"] for index in range(11)]  # 10 after 9, not after 1
    for path, values in [
        ("blocks.*", blocks),
        ("blocks.[02].linear", [expected[f"blocks.{index}.linear"] for index in (0, 2)]),
        ("blocks.1?", [blocks[10]]),
    ]:
        assert len(captured[path]) == len(values)
        for ours, theirs in zip(captured[path], values, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(captured["*"]) == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_detach_leaves_out_the_graph(
    net: Net, inputs: Tensor, mode: Callable[[], torch.no_grad]
) -> None:
    with mode(), Features(net, PATHS, detach=True) as captured:
        net(inputs)
    assert not captured["stem"].requires_grad
    torch.testing.assert_close(captured["stem"], net.expected(inputs)["stem"].detach())


def test_each_forward_pass_forgets_the_one_before(net: Net, inputs: Tensor) -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor, first: bool) -> Tensor:
            out: Tensor = self.one(x) if first else self.two(x)
            return out

    model = Chooses()
    with Features(model, ["one", "two"]) as captured:
        model(inputs, True)
        assert torch.equal(captured["one"], model.one(inputs))
        model(inputs, False)
        with pytest.raises(RuntimeError, match="'one' must have run in the block, got no output"):
            captured["one"]
    with captured, pytest.raises(RuntimeError, match="'two' must have run"):
        captured["two"]


def test_of_several_outputs_the_first_tensor_is_taken(inputs: Tensor) -> None:
    lstm = nn.LSTM(4, 3)
    with Features(nn.ModuleDict({"lstm": lstm}), ["lstm"]) as captured:
        outputs, _ = lstm(inputs)
    assert torch.equal(captured["lstm"], outputs)

    class Words(nn.Module):
        def forward(self, x: Tensor, output: Any) -> Any:
            return output

    other, words = inputs + 1, Words()
    for output in ({"x": inputs, "y": None}, BaseModelOutputWithPooling(inputs, other)):
        with Features(words, [""]) as captured:
            words(inputs, output)
        assert captured[""] is inputs
    message = "'' must return a tensor, a tuple with one, or a mapping with one only, got"
    for output in ({"x": inputs, "y": other}, {}, (), "text", None):
        with Features(words, [""]), pytest.raises(TypeError, match=message):
            words(inputs, output)


def test_hooks_are_gone_afterwards_also_after_an_error(net: Net, inputs: Tensor) -> None:
    def hooks() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()
        )

    with Features(net, PATHS):
        assert hooks() == 1 + 12 + 12
    assert hooks() == 0
    with pytest.raises(RuntimeError, match="cannot be multiplied"), Features(net, PATHS):
        net(inputs[:, :2])
    assert hooks() == 0
    features = Features(net, PATHS)
    with features, pytest.raises(RuntimeError, match="entered once at a time"), features:
        pass
    assert hooks() == 0


# --- wrappers ----------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [DataParallel, DistributedDataParallel])
def test_works_inside_parallel_wrappers(
    net: Net, inputs: Tensor, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = wrap(net)
    with Features(model, PATHS) as captured:
        model(inputs)
    assert_captured(captured, net, inputs)


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
def test_works_inside_fsdp_whose_student_is_no_teacher(net: Net, inputs: Tensor) -> None:
    shard = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
    net.stem = shard(net.stem)
    model = shard(net)
    assert unwrap(model) is unwrap(torch.compile(model)) is net
    with Features(model, PATHS) as captured:
        logits = model(inputs)
        assert captured["stem"].shape == (5, 8)
        assert len(captured["blocks.*.linear"]) == 11
    assert torch.equal(model(inputs), logits)
    with pytest.raises(ValueError, match="module must have its parameters whole, got shards of Fu"):
        Teacher(model)


def test_data_parallel_over_several_devices_is_refused(net: Net) -> None:
    model = DataParallel(net)
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match="model must be on one device of DataParallel, got 2"):
        Features(torch.compile(model, backend="eager"), ["stem"])


STYLES = ["outside", "itself", "block", "wrapped block"]


def compiled(net: Net, style: str, fullgraph: bool) -> nn.Module:
    torch._dynamo.reset()
    if style == "outside":
        model: nn.Module = torch.compile(net, backend="aot_eager", fullgraph=fullgraph)
        return model
    if style == "itself":
        net.compile(backend="aot_eager", fullgraph=fullgraph)
    elif style == "block":
        net.blocks[1].compile(backend="aot_eager", fullgraph=fullgraph)
    else:
        net.blocks[1] = torch.compile(net.blocks[1], backend="aot_eager", fullgraph=fullgraph)
    return net


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_works_compiled(inputs: Tensor, style: str, fullgraph: bool) -> None:
    net = Net(blocks=2)
    model = compiled(net, style, fullgraph)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):  # each time other hooks, but compiled once
        with Features(model, PATHS) as captured:
            model(inputs)
        assert_captured(captured, net, inputs)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1


@pytest.mark.parametrize("style", STYLES)
def test_validation_outside_the_block_does_not_disturb_a_compiled_model(
    inputs: Tensor, style: str
) -> None:
    net = Net(blocks=2)
    model = compiled(net, style, True)
    for _ in range(3):
        with Features(model, PATHS) as captured:
            model.train()(inputs)
        assert_captured(captured, net, inputs)
        with torch.no_grad():
            model.eval()(inputs)


@pytest.mark.parametrize("style", STYLES)
def test_a_graph_without_hooks_is_noticed_or_guarded_against(inputs: Tensor, style: str) -> None:
    model = compiled(Net(blocks=2), style, True)
    model(inputs)
    with Features(model, PATHS) as captured:
        model(inputs)
    with pytest.raises(RuntimeError, match=r"compiled without hooks.*skip_nnmodule_hook_guards"):
        captured["blocks.*.linear"]

    net = Net(blocks=2)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        model = compiled(net, style, True)
        for _ in range(3):
            model(inputs)
            with Features(model, PATHS) as captured:
                model(inputs)
            assert_captured(captured, net, inputs)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["stm"], r"path must be that of a submodule \(stem, \.\.\.\), got 'stm'"),
        (["stem", "blocks.99"], r"blocks\.9.*got 'blocks\.99'"),
        (["bloks.*"], r"path must be that of a submodule .*got 'bloks\.\*'"),
        (["blocks"[:3] + ".*.linear"], r"got 'blo\.\*\.linear'"),
        ([], "paths must be a list of at least one path, got"),
        ("stem", "paths must be a list of at least one path, got 'stem'"),
    ],
)
def test_paths_that_are_none_are_refused(net: Net, paths: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Features(net, paths)


def test_what_is_not_captured_is_refused(net: Net) -> None:
    with pytest.raises(KeyError, match=r"path must be one of \['stem'\], got 'head'"):
        Features(net, ["stem"])["head"]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        Features(lambda x: x, ["stem"])


# --- copies ------------------------------------------------------------------------------------


def make_encoder(layers: int) -> nn.Module:
    norm = [nn.BatchNorm1d(4)]
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), *norm) for _ in range(layers)))


def test_layers_start_from_the_teachers() -> None:
    teacher, student = make_encoder(4), make_encoder(2)
    teacher(torch.randn(9, 4))  # batch-norm statistics of its own
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wrapped = torch.compile(student, backend="eager")
    names = copy_layers(wrapped, DataParallel(teacher), {"0.0": "1.0", "1": "3"})
    assert names[:3] == ["0.0.weight", "0.0.bias", "1.0.weight"]
    assert "1.1.running_mean" in names
    assert len(names) == 2 + 7
    for name in names:
        source = {"0": "1", "1": "3"}[name[0]] + name[1:]
        assert torch.equal(student.state_dict()[name], before[source])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
            assert parameter.requires_grad
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"0": "3", "2": "3"}, r"path must be that of a submodule .*got '2'"),
        ({"0": "3", "1": "3.00"}, r"path must be that of a submodule \(3\.0, .*got '3\.00'"),
        ({"0": "3", "1": "4"}, r"'1' of the student must have '0\.weight' of shape \[5, 4\]"),
        ({"0": "3", "1": "5"}, r"'1\.weight' of shape None as '5' of the teacher, got \[4\]"),
        ({"0": "3", "1.0": "3"}, r"must have '0\.weight' of shape \[4, 4\] .* got None"),
    ],
)
def test_nothing_is_copied_where_anything_does_not_fit(
    mapping: dict[str, str], message: str
) -> None:
    teacher, student = make_encoder(4), make_encoder(2)
    teacher.append(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    teacher.append(nn.Sequential(nn.Linear(4, 4)))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        copy_layers(student, teacher, mapping)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
