"""The training loop: its steps, its metrics, and what it must not change."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from predictions import predict
from scipy.special import log_softmax, softmax
from torch import nn

from selfkd.analysis import metrics
from selfkd.data import Data, Split, load_data
from selfkd.data.augmentation import Views
from selfkd.distill.distiller import Distiller
from selfkd.errors import NonFiniteLossError
from selfkd.models import make_model
from selfkd.training.fit import Training, fit
from selfkd.training.optimizers import make_average, make_optimizer, make_scheduler
from selfkd.training.predict import evaluate

CLASSES = 3


def make_split(images, seed):
    """One bright quarter of the image for each class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % CLASSES
    pixels = torch.randint(0, 160, (images, 1, 4, 4), generator=generator, dtype=torch.uint8)
    for label, (row, column) in enumerate([(0, 0), (0, 2), (2, 0)]):
        pixels[labels == label, :, row : row + 2, column : column + 2] += 60
    return Split(pixels, labels)


def make_data(images=60):
    splits = (make_split(images, seed=0), make_split(45, seed=1), make_split(30, seed=2))
    return Data("quarters", *splits, ("a", "b", "c"), 4, (0.4,), (0.2,), "abc")


def make_student(seed=0, norm=False, dropout=0.0):
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(16, 12)]
    layers += [nn.BatchNorm1d(12)] if norm else []
    return nn.Sequential(*layers, nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, CLASSES))


def sgd(student, lr=0.1):
    return torch.optim.SGD(student.parameters(), lr=lr)


def run(student, data=None, distiller=None, **changes):
    settings = {"epochs": 3, "batch_size": 20, "lr": 0.1, "seed": 0} | changes
    lr, seed = settings.pop("lr"), settings.pop("seed")
    settings.setdefault("optimizer", sgd(student, lr))
    parts = ("optimizer", "scheduler", "average", "device", "precision")
    own = {name: settings.pop(name) for name in parts if name in settings}
    training = Training(student=student, generator=torch.Generator().manual_seed(seed), **own)
    return fit(training, data or make_data(), distiller or Distiller(), **settings)


def weights(student):
    return {name: value.clone() for name, value in student.state_dict().items()}


def assert_equal_weights(one, two):
    assert all(torch.equal(one[name], two[name]) for name in one | two)


def make_inputs(data, split="train"):
    images = getattr(data, split).images
    return (images.double() / 255 - data.mean[0]) / data.std[0]


# --- what an epoch reports ---


def test_one_row_an_epoch_and_learning():
    data = make_data()
    student = make_student()
    rows = list(run(student, data, epochs=15))
    assert [row["epoch"] for row in rows] == list(range(1, 16))
    for row in rows:
        assert row.keys() == {
            *("epoch", "loss", "hard_loss", "lr", "val_accuracy", "val_nll", "seconds")
        }
        assert {type(value) for value in row.values()} == {int, float}
        assert row["loss"] == row["hard_loss"]
        assert row["lr"] == 0.1
    losses = [row["loss"] for row in rows]
    assert losses[0] > 0.8
    assert losses[-1] < 0.4 * losses[0]
    assert all(after < before for before, after in itertools.pairwise(losses[:5]))
    assert rows[-1]["val_accuracy"] > 0.9
    seconds = [row["seconds"] for row in rows]
    assert 0 < seconds[0] < seconds[-1] < 60


def test_val_metrics_are_those_of_the_student_after_the_epoch():
    data = make_data()
    student = make_student(dropout=0.3)
    for row in run(student, data):
        copy = make_student().eval()
        copy.load_state_dict(student.state_dict())
        logits = copy(make_inputs(data, "val").float()).detach()
        assert row["val_accuracy"] == pytest.approx(metrics.accuracy(logits, data.val.labels))
        assert row["val_nll"] == pytest.approx(metrics.nll(logits, data.val.labels), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0])
def test_terms_are_reported_before_they_are_weighted(alpha):
    data = make_data()
    teacher_logits = 3 * torch.randn(60, CLASSES, generator=torch.Generator().manual_seed(5))
    distiller = Distiller(
        targets=lambda index, view: teacher_logits[index], temperature=2.0, alpha=alpha
    )
    student = make_student()
    with torch.no_grad():
        logits = student(make_inputs(data).float()).double().numpy()
    (row,) = run(student, data, distiller, epochs=1, lr=0.0)
    hard = -log_softmax(logits, axis=1)[range(60), data.train.labels].mean()
    p_t = softmax(teacher_logits.double().numpy() / 2, axis=1)
    kl = (p_t * (np.log(p_t) - log_softmax(logits / 2, axis=1))).sum(1).mean()
    assert row["hard_loss"] == pytest.approx(hard, rel=1e-5)
    assert row["soft_loss"] == pytest.approx(4 * kl, rel=1e-5)
    assert row["loss"] == pytest.approx((1 - alpha) * hard + alpha * 4 * kl, rel=1e-5)


def test_label_smoothing_is_torchs():
    data = make_data()
    student = make_student()
    logits = student(make_inputs(data).float()).detach()
    for smoothing in (0.0, 0.2):
        distiller = Distiller(label_smoothing=smoothing)
        (row,) = run(student, data, distiller, epochs=1, lr=0.0)
        expected = F.cross_entropy(logits, data.train.labels, label_smoothing=smoothing)
        assert row["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_test_split_is_not_read():
    rows = list(run(make_student(), replace(make_data(), test=None)))
    assert len(rows) == 3


def test_nothing_is_trained_before_the_first_row_is_requested():
    student = make_student()
    before = weights(student)
    rows = run(student)
    assert_equal_weights(weights(student), before)
    next(rows)
    after_one = weights(student)
    rows.close()
    assert_equal_weights(weights(student), after_one)


# --- order, views and seeds ---


class Recorder:
    """A distiller that records its arguments."""

    def __init__(self):
        self.calls = []

    def __call__(self, logits, labels, *, inputs, index, view):
        self.calls.append((logits.detach(), labels, inputs, index, view))
        return {"loss": F.cross_entropy(logits.float(), labels)}


def test_each_image_comes_once_an_epoch_with_its_label_and_index():
    data = make_data()
    distiller = Recorder()
    student = make_student()
    orders = []
    for _ in run(student, data, distiller, batch_size=25, epochs=2):
        calls, distiller.calls = distiller.calls, []
        assert [len(index) for *_, index, _ in calls] == [25, 25, 10]
        for _, labels, inputs, index, view in calls:
            assert torch.equal(labels, data.train.labels[index])
            torch.testing.assert_close(inputs, make_inputs(data)[index].float())
            assert view == 0
        orders.append(torch.cat([index for *_, index, _ in calls]).tolist())
        assert sorted(orders[-1]) == list(range(60))
    assert orders[0] != orders[1] != list(range(60))


class SpyViews:
    """Views that record their arguments."""

    def __init__(self, count):
        self.views = Views(jitter=1, count=count)
        self.count, self.at = count, self.views.at
        self.is_identity = self.mixes = False
        self.repeated = self.views.repeated
        self.calls = []

    def __call__(self, images, index, view):
        self.calls.append((view, index.tolist()))
        return self.views(images, index, view)

    def inputs(self, data, index, view):
        images = self.views(data.train.images[index], index, view)
        return ((images.double() / 255 - data.mean[0]) / data.std[0]).float()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_epoch_e_sees_view_e_mod_v_and_so_does_the_distiller(count):
    data = make_data()
    views, distiller = SpyViews(count), Recorder()
    rows = run(make_student(), data, distiller, views=views, epochs=5, batch_size=60)
    list(rows)
    assert [view for view, _ in views.calls] == [epoch % count for epoch in range(5)]
    for (view, index), call in zip(views.calls, distiller.calls, strict=True):
        _, _, inputs, call_index, call_view = call
        assert (view, index) == (call_view, call_index.tolist())
        torch.testing.assert_close(inputs, views.inputs(data, call_index, view))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_same_seed_gives_the_same_weights_bit_by_bit(dropout):
    def trained(seed):
        student = make_student(norm=True, dropout=dropout)
        rows = list(run(student, seed=seed, views=Views(jitter=1, count=2)))
        for row in rows:
            del row["seconds"]
        return weights(student), rows

    one, rows = trained(0)
    again, rows_again = trained(0)
    assert_equal_weights(one, again)
    assert rows == rows_again
    other, _ = trained(1)
    assert not torch.equal(one["1.weight"], other["1.weight"])


def test_the_order_comes_from_the_generator_alone():
    one, two = make_student(), make_student()
    list(run(one))
    torch.manual_seed(99)
    list(run(two))
    assert_equal_weights(weights(one), weights(two))


# --- modes ---


class Spy(nn.Module):
    """Records the mode of each forward pass, and whether gradients are enabled."""

    def __init__(self):
        super().__init__()
        self.inner = make_student(norm=True, dropout=0.2)
        self.modes = []

    def forward(self, inputs):
        modes = {module.training for module in self.modules()}
        self.modes.append((modes, torch.is_grad_enabled()))
        return self.inner(inputs)


def test_the_student_trains_in_train_mode_after_each_validation_too():
    student = Spy().eval()  # as a caller may pass it
    steps, validations = [({True}, True)] * 3, [({False}, False)]
    for _ in run(student, epochs=3):
        assert student.modes == steps + validations
        assert student.training
        student.modes.clear()
        student.eval()  # as an evaluation by the caller may leave it


@pytest.mark.parametrize("training", [True, False])
def test_predict_changes_nothing_and_makes_no_graph(training):
    data = make_data()
    student = make_student(norm=True, dropout=0.5).train(training)
    before = weights(student)
    logits = predict(student, data, "val")
    assert {module.training for module in student.modules()} == {training}
    assert_equal_weights(weights(student), before)  # batch-norm statistics among them
    assert not logits.requires_grad
    assert logits.dtype == torch.float32
    evaluate(student, data)
    assert_equal_weights(weights(student), before)
    assert {module.training for module in student.modules()} == {training}
    expected = student.eval()(make_inputs(data, "val").float())
    torch.testing.assert_close(logits, expected.detach())


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_predict_keeps_the_order_of_the_images(monkeypatch, split):
    monkeypatch.setattr("selfkd.training.predict.EVAL_BATCH", 7)
    data = make_data()
    student = make_student().eval()
    expected = student(make_inputs(data, split).float()).detach()
    torch.testing.assert_close(predict(student, data, split), expected)
    measured = evaluate(student, data, split)
    labels = getattr(data, split).labels
    assert measured == {
        "accuracy": pytest.approx(metrics.accuracy(expected, labels)),
        "nll": pytest.approx(metrics.nll(expected, labels)),
    }


def test_predict_uses_the_given_view():
    data = make_data()
    student = make_student().eval()
    views = SpyViews(3)
    logits = predict(student, data, "train", views=views, view=2)
    seen = views.inputs(data, torch.arange(60), 2)
    torch.testing.assert_close(logits, student(seen).detach())


# --- the step ---


def test_clip_grad_bounds_the_step():
    def step(clip_grad):
        student = make_student()
        before = weights(student)
        (_,) = run(student, epochs=1, batch_size=60, lr=1.0, clip_grad=clip_grad)
        changes = [(value - before[name]).norm() for name, value in weights(student).items()]
        return float(torch.stack(changes).norm())

    free = step(None)
    assert step(free / 2) == pytest.approx(free / 2, rel=1e-3)
    assert step(free * 2) == pytest.approx(free, rel=1e-5)


def test_a_step_is_plain_gradient_descent():
    data = make_data()
    student, reference = make_student(), make_student()
    list(run(student, data, epochs=2, batch_size=60, lr=0.2))
    for _ in range(2):
        loss = F.cross_entropy(reference(make_inputs(data).float()), data.train.labels)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= 0.2 * gradient
    for name, value in weights(student).items():
        torch.testing.assert_close(value, reference.state_dict()[name])


@pytest.mark.parametrize("decay", [0.4, 0.9999])
def test_the_moving_average_is_warmed_up_and_evaluated(decay):
    data = make_data()
    student = make_student(norm=True)
    average = make_average(student, decay=decay)
    steps, expected = 0, [torch.zeros_like(p, dtype=torch.double) for p in student.parameters()]
    optimizer = sgd(student, 0.3)

    def follow(*_):
        nonlocal steps, expected
        d = min(decay, (1 + steps) / (10 + steps)) if steps else 0.0
        now = [p.detach().double() for p in student.parameters()]
        expected = [d * e + (1 - d) * n for e, n in zip(expected, now, strict=True)]
        steps += 1

    optimizer.register_step_post_hook(follow)
    rows = list(run(student, data, optimizer=optimizer, average=average))
    for mean, parameter in zip(expected, average.module.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), mean, rtol=1e-4, atol=1e-6)
    assert rows[-1]["val_nll"] == evaluate(average.module, data)["nll"]
    assert rows[-1]["val_nll"] != evaluate(student, data)["nll"]
    assert student.training
    assert steps == 9


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_student_that_keeps_what_it_computed_is_averaged():
    student = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(16, CLASSES)))
    average = make_average(student, decay=0.5)
    rows = list(run(student, average=average))
    assert rows[-1]["val_nll"] < rows[0]["val_nll"]


def test_logits_are_taken_of_the_students_output():
    class Output(nn.Sequential):
        def forward(self, inputs):
            return {"logits": super().forward(inputs), "features": inputs}

    data, plain = make_data(), make_student()
    expected = list(run(plain, data))
    student = Output(*make_student())
    rows = list(run(student, data))
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert [row["val_nll"] for row in rows] == [row["val_nll"] for row in expected]
    assert torch.equal(predict(student, data, "val"), predict(plain, data, "val"))
    student.forward = lambda inputs: [inputs, inputs]
    with pytest.raises(TypeError, match=r"student must return a tensor of logits.*got list of \["):
        next(run(student, data))


def test_a_student_that_cannot_be_trained_is_refused():
    student = make_student()
    optimizer = sgd(student)
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="student_logits must have a graph to train the student"):
        next(run(student, optimizer=optimizer))


def test_biases_and_norms_are_not_decayed():
    student = make_student(norm=True)
    optimizer = make_optimizer(student, name="sgd", lr=0.1, momentum=0.7, weight_decay=0.01)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: decays[id(p)] for name, p in student.named_parameters()}
    assert {name for name, decay in found.items() if decay == 0.01} == {"1.weight", "5.weight"}
    assert set(found.values()) == {0.0, 0.01}
    (group, *_) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.7, True)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_timms_optimisers_train(name):
    student = make_student()
    lr = 0.1 if name == "sgd" else 0.01
    optimizer = make_optimizer(student, name=name, lr=lr, momentum=0.9, weight_decay=1e-4)
    rows = list(run(student, optimizer=optimizer, epochs=4))
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("name", ["sdg", "", "SGD-typo"])
def test_an_unknown_optimiser_is_refused_with_names(name):
    with pytest.raises(
        ValueError, match=rf"train\.optimizer must be a timm optimiser \(.*\), got '{name}'"
    ):
        make_optimizer(make_student(), name=name, lr=0.1, momentum=0.9, weight_decay=0)


# --- learning rates ---


def learning_rates(schedule, epochs, warmup_epochs, lr=0.4, steps=3):
    """Return the learning rate of the optimiser at each step."""
    student = make_student()
    optimizer = sgd(student, lr)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    scheduler = make_scheduler(
        optimizer,
        schedule=schedule,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        steps_per_epoch=steps,
    )
    rows = list(run(student, optimizer=optimizer, scheduler=scheduler, epochs=epochs))
    assert [row["lr"] for row in rows] == rates[steps - 1 :: steps]
    assert len(rates) == epochs * steps
    return rates


@pytest.mark.parametrize(("epochs", "warmup"), [(6, 0), (6, 2), (4, 3), (1, 0), (2, 2)])
def test_a_linear_warm_up_and_then_half_a_cosine(epochs, warmup):
    rates = learning_rates("cosine", epochs, warmup)
    rise = [0.04 + (0.4 - 0.04) * step / (3 * warmup) for step in range(3 * warmup)]
    fall = 3 * (epochs - warmup)
    cosine = [0.4 * 0.5 * (1 + math.cos(math.pi * step / fall)) for step in range(fall)]
    assert rates == pytest.approx(rise + cosine)


@pytest.mark.parametrize("epochs", [1, 2, 4, 8, 9])
@pytest.mark.parametrize("warmup", [0, 1])
def test_step_divides_by_ten_at_a_half_and_at_three_quarters(epochs, warmup):
    rates = learning_rates("step", epochs, min(warmup, epochs // 2), steps=3)
    for step in range(3 * min(warmup, epochs // 2), 3 * epochs):
        done = (step + 1) / (3 * epochs)  # timm's steps drop one update early
        expected = 0.4 * 0.1 ** ((done >= 0.5) + (done >= 0.75))
        assert rates[step] == pytest.approx(expected), step


def test_no_schedule_keeps_the_rate():
    assert learning_rates("none", 3, 0) == [0.4] * 9
    assert (
        make_scheduler(
            sgd(make_student()), schedule="none", epochs=3, warmup_epochs=0, steps_per_epoch=3
        )
        is None
    )


# --- precision and compilation ---


def test_bfloat16_runs_on_the_cpu_and_comes_close():
    distiller = Recorder()
    student = make_student()
    rows = list(run(student, distiller=distiller, precision="bfloat16", epochs=6))
    assert {logits.dtype for logits, *_ in distiller.calls} == {torch.bfloat16}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    plain = list(run(make_student(), epochs=6))
    for row, expected in zip(rows, plain, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.02)
        assert row["val_nll"] == pytest.approx(expected["val_nll"], abs=0.02)
    assert rows[-1]["loss"] != plain[-1]["loss"]


def test_predict_in_bfloat16_gives_float32():
    data, student = make_data(), make_student()
    logits = predict(student, data, "val", precision="bfloat16")
    exact = predict(student, data, "val")
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, atol=0.05, rtol=0)


def test_a_compiled_student_is_the_same_student(monkeypatch):
    compiled, passes = [], []

    def compile_(module):
        compiled.append(module)
        return lambda inputs: passes.append(len(inputs)) or module(inputs)

    monkeypatch.setattr(torch, "compile", compile_)
    student, plain = make_student(), make_student()
    list(run(student, compiled=True))
    list(run(plain))
    assert compiled == [student]
    assert passes == [20] * 9
    assert_equal_weights(weights(student), weights(plain))


# --- divergence ---


def test_a_diverging_student_is_reported_with_epoch_and_step():
    with pytest.raises(
        NonFiniteLossError,
        match=r"loss must be finite, got (nan|inf) at epoch \d+, step \d+: lower train\.lr or set",
    ):
        list(run(make_student(), lr=1e30, epochs=10))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("batch_size", "bad", "epoch", "step", "calls"),
    [
        (20, 1, 1, 1, 3),  # noticed at the end of the epoch
        (20, 5, 2, 2, 6),
        (1, 70, 2, 10, 100),  # or at the hundredth step, whichever is first
        (1, 101, 2, 41, 120),
    ],
)
def test_the_step_that_diverged_is_named(value, batch_size, bad, epoch, step, calls):
    count = 0

    def distiller(logits, labels, **_):
        nonlocal count
        count += 1
        return {"loss": logits.sum() * 0 + (value if count == bad else 1.0)}

    rows = []
    with pytest.raises(NonFiniteLossError, match=rf"got {value} at epoch {epoch}, step {step}:"):
        rows.extend(run(make_student(), distiller=distiller, batch_size=batch_size, lr=0.0))
    assert count == calls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["none", "bfloat16", "float16"])
def test_cached_logits_and_mixed_precision_on_a_gpu(precision):
    data = load_data("digits").to("cuda")
    torch.manual_seed(0)
    student = make_model("selfkd_cnn", {"width": 8}, num_classes=10, in_chans=1, image_size=8)
    student.cuda()
    logits = torch.randn(200, 10).half()
    training = Training(
        student=student,
        optimizer=make_optimizer(student, name="sgd", lr=0.01, momentum=0.9, weight_decay=0.0),
        generator=torch.Generator().manual_seed(0),
        device="cuda",
        precision=precision,
    )
    distiller = Distiller(targets=lambda index, view: logits[index.cpu()])
    rows = list(fit(training, data, distiller, epochs=3, batch_size=20))
    assert rows[-1]["soft_loss"] < rows[0]["soft_loss"]


def test_a_student_that_diverges_at_its_last_step_is_not_complete():
    data = load_data("digits")
    torch.manual_seed(0)
    student = make_model("selfkd_mlp", {"width": 8}, num_classes=10, in_chans=1, image_size=8)
    training = Training(
        student=student,
        optimizer=make_optimizer(student, name="sgd", lr=1e38, momentum=0.9, weight_decay=0.0),
        generator=torch.Generator().manual_seed(0),
    )
    rows = fit(training, data, Distiller(), epochs=1, batch_size=200)
    with pytest.raises(NonFiniteLossError, match=r"validation loss must be finite.* epoch 1"):
        list(rows)


# --- batches of one ---


def steps_of(student, images, **settings):
    """Return the indices of each training step."""
    steps = []

    class Recorder(Distiller):
        def __call__(self, logits, labels, **more):
            steps.append(more["index"].tolist())
            return super().__call__(logits, labels, **more)

    list(run(student, make_data(images), Recorder(), epochs=1, **settings))
    return steps


def test_batch_normalisation_never_sees_one_image():
    usual = steps_of(make_student(), images=41)
    merged = steps_of(make_student(norm=True), images=41)
    assert [len(step) for step in usual] == [20, 20, 1]
    assert merged == [usual[0], usual[1] + usual[2]]
    assert steps_of(make_student(norm=True), images=42) == steps_of(make_student(), images=42)


def test_batches_of_one_are_refused_before_training():
    student = make_student(norm=True)
    before = [parameter.clone() for parameter in student.parameters()]
    with pytest.raises(ValueError, match=r"train\.batch_size must be at least 2 with batch norm"):
        list(run(student, batch_size=1))
    with pytest.raises(ValueError, match=r"data\.train_size must be at least 2 with batch norm"):
        list(run(student, make_data(images=1)))
    assert all(map(torch.equal, before, student.parameters()))
    assert len(steps_of(make_student(), images=3, batch_size=1)) == 3
