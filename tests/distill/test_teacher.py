import copy
import pickle
from collections import UserDict
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn import functional as F
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.models import make_cnn


def network(classes=4):
    """Network with batch norm and dropout, which differ between train and eval mode."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(6, classes),
    )


def images(batch=5):
    return torch.randn(batch, 3, 6, 6)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(student, teacher, *, steps=3):
    student.train()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(steps):
        inputs = images()
        loss = F.mse_loss(student(inputs), teacher(inputs))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# The copy and the original


def test_training_the_original_does_not_change_the_teacher():
    student = network()
    teacher = Teacher(student)
    before, inputs = state(teacher.module), images()
    logits = teacher(inputs)
    train(student, teacher)
    assert not same(before, state(student))
    assert same(before, state(teacher.module))
    assert torch.equal(teacher(inputs), logits)


def test_each_generation_has_its_own_teacher():
    """The born-again bug: teacher and student one object, so a model distils from itself."""
    student, teachers, inputs = network(), [], images()
    for _ in range(3):
        teachers.append(Teacher(student))
        train(student, teachers[-1])
    logits = [teacher(inputs) for teacher in teachers]
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])
    pointers = [p.data_ptr() for t in teachers for p in t.module.parameters()]
    pointers += [p.data_ptr() for p in student.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_making_a_teacher_leaves_the_original_as_it_was():
    student = network()
    student(images()).sum().backward()
    before = state(student)
    teacher = Teacher(student)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    assert same(before, state(student))


def test_the_teacher_equals_the_original_in_eval_mode():
    student, inputs = network(), images()
    student(inputs)
    assert torch.equal(Teacher(student)(inputs), student.eval()(inputs))


# State before and after


def test_batch_norm_statistics_stay_under_a_parent_that_trains():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = network()
            self.teacher = Teacher(network())

    parent = Parent()
    before = state(parent.teacher.module)
    parent.train()
    train(parent.student, parent.teacher)
    assert same(before, state(parent.teacher.module))
    assert not any("teacher" in name for name, _ in parent.named_parameters())
    assert not any("teacher" in name for name in parent.state_dict())
    assert not any("teacher" in name for name, _ in parent.named_modules())


def test_eval_mode_holds_even_if_train_is_called_on_the_inner_module():
    teacher, inputs = Teacher(network()), images()
    logits, before = teacher(inputs), state(teacher.module)
    teacher.module.train()
    assert torch.equal(teacher(inputs), logits)
    teacher.module[1].train()  # the root is still in eval mode
    assert torch.equal(teacher(inputs), logits)
    assert same(before, state(teacher.module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_stays_under_autocast(dtype):
    teacher, student = Teacher(network()), network()
    before = state(teacher.module)
    with torch.autocast("cpu", dtype=dtype):
        inputs = images()
        logits = teacher(inputs)
        loss = F.mse_loss(student(inputs).float(), logits.float())
    loss.backward()
    assert logits.dtype == dtype
    assert not logits.requires_grad
    assert same(before, state(teacher.module))
    assert {value.dtype for value in teacher.module.parameters()} == {torch.float32}


def test_a_teacher_run_in_inference_mode_can_still_be_distilled_from():
    teacher, student = Teacher(network()), network()
    before = state(teacher.module)
    with torch.inference_mode():
        teacher(images())
    train(student, teacher)
    assert same(before, state(teacher.module))


def test_running_it_draws_no_random_numbers():
    teacher, inputs = Teacher(network()), images()
    before = torch.get_rng_state()
    teacher(inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_are_not_changed():
    stats = ((0.5,) * 3, (0.2,) * 3), ((0.4,) * 3, (0.3,) * 3)
    teacher, inputs = Teacher(network(), input_stats=stats[0], trained_stats=stats[1]), images()
    before = inputs.clone()
    teacher(inputs)
    assert torch.equal(inputs, before)


# No graph


def test_logits_have_no_graph_even_if_the_inputs_do():
    inputs = images().requires_grad_()
    logits = Teacher(network())(inputs)
    assert logits.shape == (5, 4)
    assert not logits.requires_grad
    assert logits.grad_fn is None
    assert inputs.requires_grad


def test_a_module_that_turns_gradients_on_leaves_no_graph():
    class Stubborn(nn.Linear):
        def forward(self, inputs):
            with torch.enable_grad():
                return super().forward(inputs) + torch.zeros(4, requires_grad=True)

    logits = Teacher(Stubborn(3, 4))(torch.randn(2, 3).requires_grad_())
    assert not logits.requires_grad


def test_no_graph_is_recorded_even_if_the_inner_module_is_unfrozen():
    class Asked(nn.Linear):
        def forward(self, inputs):
            grad_enabled.append(torch.is_grad_enabled())
            return super().forward(inputs)

    grad_enabled = []
    teacher = Teacher(Asked(3, 4))
    teacher.module.requires_grad_(True)
    assert not teacher(torch.randn(2, 3)).requires_grad
    assert grad_enabled == [False]


def test_the_loss_reaches_the_student_only():
    student, teacher, inputs = network(), Teacher(network()), images()
    F.mse_loss(student(inputs), teacher(inputs)).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


# Other things people do with it


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))]
)
def test_a_duplicate_has_the_same_logits_and_shares_nothing(duplicate):
    stats = {"input_stats": ([0.5] * 3, [0.2] * 3), "trained_stats": ([0.4] * 3, [0.3] * 3)}
    teacher, inputs = Teacher(network(), **stats), images()
    twin = duplicate(teacher)
    assert torch.equal(twin(inputs), teacher(inputs))
    twin.module[0].weight.data.zero_()
    assert teacher.module[0].weight.any()


def test_a_compiled_student_is_distilled_from_it():
    student, teacher = network(), Teacher(network())
    before = state(student)
    train(torch.compile(student, backend="eager"), teacher, steps=1)
    assert not same(before, state(student))


def test_a_teacher_inside_a_compiled_loss_stays_frozen():
    student, teacher, inputs = network(), Teacher(network()), images()
    before = state(teacher.module)

    @torch.compile(backend="eager", fullgraph=True)
    def loss(inputs):
        return F.mse_loss(student(inputs), teacher(inputs))

    loss(inputs).backward()
    assert student[0].weight.grad is not None
    assert teacher.module[0].weight.grad is None
    assert same(before, state(teacher.module))


def test_wrappers_are_taken_off():
    student, inputs = network(), images()
    wrapped = torch.compile(
        nn.DataParallel(torch.compile(student, backend="eager")), backend="eager"
    )
    teacher = Teacher(wrapped)
    assert type(teacher.module) is nn.Sequential
    assert teacher.module is not student
    assert torch.equal(teacher(inputs), student.eval()(inputs))


def test_to_moves_network_and_statistics():
    stats = {"input_stats": ([0.5] * 3, [0.2] * 3), "trained_stats": ([0.4] * 3, [0.3] * 3)}
    teacher = Teacher(network(), **stats)
    assert teacher.to("meta") is teacher
    assert teacher(images().to("meta")).device.type == "meta"
    ensemble = Ensemble([network(), network()])
    assert ensemble.to("meta") is ensemble
    assert ensemble(images().to("meta")).shape == (2, 5, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_teacher_on_a_gpu():
    stats = {"input_stats": ([0.5] * 3, [0.2] * 3), "trained_stats": ([0.4] * 3, [0.3] * 3)}
    teacher, inputs = Teacher(network(), **stats), images()
    expected = teacher(inputs)
    before = state(teacher.module)
    teacher.to("cuda")
    torch.testing.assert_close(teacher(inputs.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda"):
        assert teacher(inputs.cuda()).dtype == torch.float16
    assert same(before, {name: value.cpu() for name, value in state(teacher.module).items()})


def test_its_name_says_what_it_is():
    assert repr(Teacher(nn.Linear(3, 2))) == "Teacher(Linear, 8 parameters)"
    assert repr(Ensemble([nn.Linear(3, 2)])) == "Ensemble([Teacher(Linear, 8 parameters)])"


# What is copied, and what is run as it is


def weight_norm_lstm():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.utils.weight_norm(nn.LSTM(3, 4, batch_first=True), "weight_hh_l0")

        def forward(self, inputs):
            return self.lstm(inputs.flatten(2).transpose(1, 2))[0][:, -1]

    return Last()


def spectral_norm():
    module = nn.utils.spectral_norm(nn.Linear(108, 4))
    return nn.Sequential(nn.Flatten(), module)


def run_before(module):
    module.train()
    module(images())  # leaves tensors with a graph in the module
    return module


class Keeps(nn.Linear):
    """A module that keeps what it computed."""

    def __init__(self):
        super().__init__(108, 4)
        self.seen = {"features": []}

    def forward(self, inputs):
        self.seen["features"].append(super().forward(inputs.flatten(1)))
        return self.seen["features"][-1]


class KeepsInObject(Keeps):
    """A module that keeps what it computed where no container shows it."""

    def forward(self, inputs):
        self.result = SimpleNamespace(logits=super().forward(inputs))
        return self.result.logits


HARD_TO_COPY = {
    "weight_norm": lambda: nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(108, 4))),
    "weight_norm of an LSTM": weight_norm_lstm,
    "parametrised weight_norm": lambda: nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(108, 4))
    ),
    "spectral_norm": spectral_norm,
    "traced": lambda: torch.jit.trace(network().eval(), images()),
    "scripted": lambda: torch.jit.script(network()),
    "script inside": lambda: nn.Sequential(network(), torch.jit.script(nn.Linear(4, 4))),
    "exported": lambda: torch.export.export(network().eval(), (images(),)).module(),
    "keeps tensors": Keeps,
    "keeps tensors in an object": KeepsInObject,
    "quantised": lambda: torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HARD_TO_COPY)
def test_modules_that_are_hard_to_copy(name):
    module, inputs = HARD_TO_COPY[name](), images()
    run_before(module) if name not in ("exported", "traced") else None
    modes = [getattr(part, "training", None) for part in module.modules()]
    trained = [parameter.requires_grad for parameter in module.parameters()]
    teacher, itself = Teacher(module), Teacher(module, copy=False)
    before = [tensor.clone() for tensor in teacher.module.parameters()]
    logits = teacher(inputs)
    torch.testing.assert_close(itself(inputs), logits)
    assert not logits.requires_grad
    assert not itself(inputs).requires_grad
    assert itself.module is module
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert all(map(torch.equal, teacher.module.parameters(), before))
    # the module itself is as it was
    assert [getattr(part, "training", None) for part in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == trained
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(teacher(inputs), logits)


def test_a_module_run_as_it_is_keeps_its_modes_and_its_place():
    module, inputs = network(), images()
    module[1].eval()  # frozen statistics
    module[5].register_forward_hook(lambda *args: seen.append(args[0].training))
    modes, seen = [part.training for part in module.modules()], []
    teacher = Teacher(torch.compile(module, backend="eager"), copy=False)
    assert torch.equal(teacher(inputs), Teacher(module)(inputs))
    assert seen == [False, False]
    assert [part.training for part in module.modules()] == modes
    assert teacher.to("meta").module is teacher.module
    assert teacher(inputs).device.type == "cpu"
    module.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Teacher(module, copy=False)(inputs)
    assert [part.training for part in module.modules()] == modes


def test_a_moving_average_is_followed_where_it_is_not_copied():
    module, inputs = network(), images()
    copied, followed = Teacher(module), Teacher(module, copy=False)
    before = copied(inputs)
    with torch.no_grad():
        module[6].bias.add_(1)
    assert torch.equal(copied(inputs), before)
    torch.testing.assert_close(followed(inputs), before + 1)


class NotCopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copy of me")


class Kept(nn.Linear):
    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NotCopied(3, 2), r"got NotCopied \(no copy of me\)"),
        (nn.Sequential(Kept(3, 2)), "__deepcopy__ that keeps parameters of the original"),
        (nn.Linear(3, 2, device="meta"), "got some on the meta device"),
    ],
)
def test_a_module_that_cannot_be_copied_is_told_the_way_out(module, message):
    with pytest.raises(ValueError, match=rf"{message}.*Teacher\(module, copy=False\) runs it"):
        Teacher(module)
    assert Teacher(module, copy=False).module is module
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(2), lambda: nn.LazyBatchNorm1d()])
def test_a_lazy_module_is_run_before_it_is_copied(make):
    module = nn.Sequential(make())
    with pytest.raises(ValueError, match="got some of a lazy module: run it on a batch first"):
        Teacher(module)
    module(torch.ones(3, 4))
    assert Teacher(module)(torch.ones(3, 4)).shape == module(torch.ones(3, 4)).shape


def test_an_offloaded_module_is_run_where_it_is():
    module, inputs = network(), images()
    expected = Teacher(module)(inputs)
    cpu_offload(module, execution_device="cpu")
    with pytest.raises(ValueError, match="got some on the meta device"):
        Teacher(module)
    teacher = Teacher(module, copy=False).to("cpu")
    torch.testing.assert_close(teacher(inputs.double()), expected)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_a_forward_of_the_original_is_bound_to_the_copy_or_refused():
    module, inputs = network(), images()
    module.forward = torch.compile(module.forward, backend="eager")
    teacher = Teacher(module)
    before = teacher(inputs)
    with torch.no_grad():
        module[6].bias.add_(1)
    assert torch.equal(teacher(inputs), before)
    module = network()
    forward = module.forward
    module.forward = lambda inputs: 2 * forward(inputs)
    with pytest.raises(ValueError, match=r"forward of Sequential replaced by a function.*copy=Fal"):
        Teacher(module)
    module.forward = lambda inputs: inputs.flatten(1)
    assert torch.equal(Teacher(module)(inputs), inputs.flatten(1))


# What a module is given


class Doubles(nn.Module):
    """A module that notes what it is called with."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=dtype)

    def forward(self, x, ids=None, *, more=None):
        self.given = {"x": x, "ids": ids, "more": more}
        return {"logits": self.linear(x)}


@pytest.mark.parametrize(
    "of_teacher", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("copied", [True, False])
def test_floating_inputs_are_cast_to_its_dtype(dtype, of_teacher, copied):
    teacher = Teacher(Doubles(of_teacher), copy=copied)
    inputs = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    ids = torch.arange(4)
    nested = {"x": inputs, "ids": ids, "more": [(inputs, ids)], "unknown": inputs}
    assert teacher(nested).dtype == of_teacher
    given = teacher.module.given
    assert given["x"].dtype == given["more"][0][0].dtype == of_teacher
    assert given["ids"].dtype == given["more"][0][1].dtype == torch.int64
    assert not given["x"].requires_grad
    assert inputs.dtype == nested["more"][0][0].dtype == dtype
    assert torch.equal(teacher(inputs), teacher(nested))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.freeze(torch.jit.script(network().eval())),
        lambda: torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), {nn.Linear}
        ),
    ],
)
def test_weights_that_are_no_parameters_are_of_single_precision(make, dtype):
    logits = Teacher(make())(images().to(dtype))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_cast_under_autocast(dtype):
    teacher, inputs = Teacher(network()), images().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = teacher(inputs)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), teacher(inputs), rtol=0.05, atol=0.05)


def test_inputs_of_weights_in_8_bits_keep_the_dtype_of_the_rest():
    module = Doubles(torch.float64)
    module.register_parameter("first", nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), False))
    assert Teacher(module, copy=False)(torch.ones(1, 3)).dtype == torch.float64


@pytest.mark.parametrize(
    "make",
    [
        lambda: BatchEncoding({"x": torch.ones(2, 3)}),
        lambda: UserDict(x=torch.ones(2, 3)),
        lambda: MappingProxyType({"x": torch.ones(2, 3)}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("scripted", [False, True])
def test_mappings_are_keyword_arguments(make, scripted):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x)

    module = Net()
    teacher = Teacher(torch.jit.script(module) if scripted else module)
    assert torch.equal(teacher(make()), teacher(torch.ones(2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_are_arguments_where_more_than_one_is_needed(kind, scripted):
    class Sum(nn.Linear):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return F.linear(first + second, self.weight, self.bias)

    module, inputs = Sum(3, 2), torch.ones(4, 3)
    teacher = Teacher(torch.jit.script(module) if scripted else module)
    logits = teacher(kind([inputs, inputs.double()]))
    torch.testing.assert_close(logits, module(inputs, inputs).detach())
    with pytest.raises(TypeError, match="must be Tensor, not"):  # given as it is
        Teacher(nn.Linear(3, 2))(kind([inputs, inputs]))


def test_a_module_may_take_the_mapping_itself():
    class Whole(nn.Linear):
        def forward(self, batch, **options):
            return super().forward(batch["x"])

    class Any(nn.Linear):
        def forward(self, *args, **kwargs):
            return super().forward(kwargs["x"])

    for kind in (Whole, Any):
        teacher = Teacher(kind(3, 2))
        expected = F.linear(torch.ones(2, 3), teacher.module.weight, teacher.module.bias)
        assert torch.equal(teacher({"x": torch.ones(2, 3), "other": None}), expected)


def test_a_model_of_transformers_is_a_teacher():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=8, num_labels=3)  # fmt: skip
    module = BertForSequenceClassification(config).eval()
    batch = BatchEncoding(
        {"input_ids": torch.tensor([[1, 2], [3, 4]]), "attention_mask": torch.ones(2, 2).long()}
    )
    with torch.no_grad():
        expected = module(**batch).logits
    assert torch.equal(Teacher(module)(batch), expected)
    assert Ensemble([module] * 2)(batch).shape == (2, 2, 3)


def test_members_of_different_precision():
    ensemble = Ensemble([network(), network().to(torch.bfloat16)])
    assert ensemble(images()).shape == (2, 5, 4)


def test_nested_inputs_are_not_renormalised():
    teacher = Teacher(network(), input_stats=INPUT, trained_stats=TRAINED)
    with pytest.raises(
        TypeError, match="inputs must be a tensor where a teacher renormalises them"
    ):
        teacher({"input": images()})


# Inputs normalised otherwise

INPUT = ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
TRAINED = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Echo(nn.Module):
    """Module that returns its inputs as logits, one for each pixel and channel."""

    def forward(self, inputs):
        return inputs.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_inputs_are_normalised_as_the_teacher_was_trained(dtype):
    pixels = np.random.default_rng(0).uniform(size=(4, 3, 5, 5))

    def normalised(stats):
        mean, std = (np.array(values)[:, None, None] for values in stats)
        return (pixels - mean) / std

    teacher = Teacher(Echo(), input_stats=INPUT, trained_stats=TRAINED)
    assert "renormalised" in repr(teacher)
    logits = teacher(torch.tensor(normalised(INPUT), dtype=dtype))
    assert logits.dtype == dtype
    tolerance = 5e-3 if dtype == torch.float16 else 1e-5
    expected = normalised(TRAINED).reshape(4, -1)
    np.testing.assert_allclose(logits.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "stats",
    [
        {},
        {"input_stats": INPUT},
        {"input_stats": INPUT, "trained_stats": INPUT},
        {"input_stats": INPUT, "trained_stats": tuple(map(list, INPUT))},
    ],
)
def test_inputs_are_passed_on_where_nothing_differs(stats):
    inputs = images()
    teacher = Teacher(Echo(), **stats)
    assert torch.equal(teacher(inputs), inputs.flatten(1))
    assert "renormalised" not in repr(teacher)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"trained_stats": TRAINED}, "input_stats must be given with trained_stats, got None"),
        (
            {"input_stats": ((0.5,), (0.2,)), "trained_stats": TRAINED},
            r"trained_stats must have as many channels as input_stats \(1\), got 3",
        ),
        ({"input_stats": ((0.5, 0.5), (0.2,))}, "input_stats must be a mean and a std for each"),
        ({"input_stats": ((), ())}, "input_stats must be a mean and a std for each channel"),
        ({"input_stats": ((0.5,), (0.0,))}, "input_stats must have a std above 0"),
        ({"input_stats": ((0.5,), (float("nan"),))}, "input_stats must have a std above 0"),
        ({"input_stats": ((float("nan"),), (0.2,))}, "input_stats must have finite means"),
    ],
)
def test_wrong_statistics_are_refused(stats, message):
    with pytest.raises(ValueError, match=message):
        Teacher(Echo(), **stats)


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 4), (3, 5, 5)])
def test_inputs_of_other_channels_are_refused(shape):
    """A `[batch, 1, height, width]` would silently become three channels."""
    teacher = Teacher(Echo(), input_stats=INPUT, trained_stats=TRAINED)
    with pytest.raises(ValueError, match=r"inputs must be \[batch, 3, height, width\]"):
        teacher(torch.zeros(shape))


def test_from_timm_reads_the_published_statistics():
    module = Echo()
    module.pretrained_cfg = {"url": "https://example.com", "mean": TRAINED[0], "std": TRAINED[1]}
    inputs = images()
    expected = Teacher(module, input_stats=INPUT, trained_stats=TRAINED)(inputs)
    assert torch.equal(Teacher.from_timm(module, input_stats=INPUT)(inputs), expected)
    assert torch.equal(Teacher.from_timm(module)(inputs), inputs.flatten(1))
    wrapped = torch.compile(module, backend="eager")
    assert torch.equal(Teacher.from_timm(wrapped, input_stats=INPUT)(inputs), expected)


@pytest.mark.parametrize("module", [nn.Linear(3, 2), make_cnn(width=2)])
def test_from_timm_refuses_a_module_without_published_weights(module):
    with pytest.raises(ValueError, match="must be a timm model with pretrained weights, got"):
        Teacher.from_timm(module, input_stats=INPUT)


# What is not a teacher


@pytest.mark.parametrize("wrong", [None, lambda inputs: inputs, Teacher(nn.Linear(3, 2)), "resnet"])
def test_only_modules_become_teachers(wrong):
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got"):
        Teacher(wrong)


def test_outputs_that_are_no_logits_are_refused():
    class Two(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs), inputs

    with pytest.raises(TypeError, match=r"must return a tensor of logits.*, got tuple"):
        Teacher(Two(3, 2))(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"must return \[batch, classes\], got \[2, 1, 3\]"):
        Teacher(nn.Identity())(torch.zeros(2, 1, 3))


# Ensembles


def test_an_ensemble_stacks_its_members_logits_in_order():
    members = [Teacher(network()), network(), Teacher(network())]
    ensemble, inputs = Ensemble(members), images()
    logits = ensemble(inputs)
    assert len(ensemble) == 3
    assert logits.shape == (3, 5, 4)
    assert not logits.requires_grad
    for member_logits, member in zip(logits, members, strict=True):
        expected = member(inputs) if isinstance(member, Teacher) else Teacher(member)(inputs)
        assert torch.equal(member_logits, expected)


def test_members_given_as_modules_are_copied():
    student = network()
    ensemble, inputs = Ensemble([student]), images()
    before = ensemble(inputs)
    train(student, Teacher(network()))
    assert torch.equal(ensemble(inputs), before)


def test_members_with_different_numbers_of_classes_are_refused():
    ensemble = Ensemble([network(4), network(4), network(6)])
    with pytest.raises(ValueError, match=r"same number of classes, got \[4, 4, 6\]"):
        ensemble(images())


def test_ensembles_of_nothing_or_of_strangers_are_refused():
    with pytest.raises(ValueError, match="members must be at least one teacher, got none"):
        Ensemble([])
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got Ensemble"):
        Ensemble([Ensemble([network()])])


def test_a_duplicated_ensemble_has_the_same_logits():
    ensemble, inputs = Ensemble([network(), network()]), images()
    for twin in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(twin(inputs), ensemble(inputs))
