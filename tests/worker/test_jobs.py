"""The jobs of a worker, on digits and a tiny network, in this process."""

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss
from torch import nn

from selfkd.analysis.metrics import ece
from selfkd.config import load_config, to_tree
from selfkd.data import load_data
from selfkd.data.augmentation import Views
from selfkd.errors import NonFiniteLossError
from selfkd.results import Evaluation, from_row
from selfkd.storage.checkpoint import load_tensors, save_tensors, tensors_hash
from selfkd.tasks.images import networks
from selfkd.worker.jobs import run_job

TINY = (
    "data.train_size=200",
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train={epochs: 2, lr: 0.1, batch_size: 50}",
)
AUGMENTED = ("data.jitter=1", "data.views=3", "train.epochs=4")


def make_tree(*settings):
    return to_tree(load_config(settings=[*TINY, *settings]))


class Jobs:
    """Jobs in a folder of their own; what goes in and comes out is JSON, as between processes."""

    def __init__(self, folder):
        self.folder = folder
        self.targets = folder / "targets"

    def job(self, kind, *settings, **payload):
        payload = {"config": make_tree(*settings), **payload}
        rows = run_job(kind, json.loads(json.dumps(payload)))
        return [json.loads(json.dumps(row)) for row in rows]

    def train(self, name, *settings, generation=0, seed=1, teachers=()):
        """The rows, and the student as a teacher of others."""
        config = load_config(settings=[*TINY, *settings])
        model = to_tree(config)["student" if generation and config.student else "model"]
        student = str(self.folder / name / "student.safetensors")
        rows = self.job(
            "train",
            *settings,
            stage=f"generation-{generation}",
            model=model,
            seed=seed,
            teachers=list(teachers),
            targets=str(self.targets),
            student=student,
        )
        return rows, {"hash": rows[-1]["hash"], "checkpoint": student}

    def cache(self, teacher, *settings):
        """How many views were written, of one shard each."""
        views = load_config(settings=[*TINY, *settings]).data.views or 1
        place = {"targets": str(self.targets), "run": str(self.folder), "shard": 0}
        rows = [
            row
            for view in range(views)
            for row in self.job(
                "cache_teacher_logits",
                *settings,
                checkpoint=teacher["checkpoint"],
                view=view,
                **place,
            )
        ]
        return sum(row["state"] != "kept" for row in rows)

    def evaluate(self, name, *settings, teachers=()):
        (row,) = self.job(
            "evaluate",
            *settings,
            student=str(self.folder / name / "student.safetensors"),
            predictions=self.predictions(name),
            teachers=list(teachers),
        )
        return from_row(Evaluation, row).metrics

    def predictions(self, name):
        return str(self.folder / name / "predictions.safetensors")

    def ensemble(self, *names):
        members = [
            {
                "hash": load_tensors(self.folder / name / "student.safetensors")[1]["hash"],
                "predictions": self.predictions(name),
            }
            for name in names
        ]
        ensemble = {"members": members, "average": "probabilities"}
        (row,) = self.job("average", ensembles=[ensemble])
        (measured,) = row["rows"]
        return from_row(Evaluation, measured).metrics


@pytest.fixture
def jobs(tmp_path):
    return Jobs(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two networks of generation 0 that are not changed by any test."""
    jobs = Jobs(tmp_path_factory.mktemp("trained"))
    jobs.rows, jobs.teacher = jobs.train("one")
    jobs.other = jobs.train("two", seed=2)[1]
    return jobs


def weights(model):
    return load_tensors(Path(model["checkpoint"]))[0]


def history(rows):
    hidden = ("seconds", "hash", "checkpoint")
    return [{k: v for k, v in row.items() if k not in hidden} for row in rows]


def numpy_logits(teacher, split):
    """The network's logits, worked out from its weights alone."""
    data = load_data("digits", train_size=200)
    images = getattr(data, split).images.double().numpy().reshape(-1, 64)
    state = {name: tensor.double().numpy() for name, tensor in weights(teacher).items()}
    (w1,) = (value for value in state.values() if value.shape == (16, 64))
    (b1,) = (value for value in state.values() if value.shape == (16,))
    (w2,) = (value for value in state.values() if value.shape == (10, 16))
    (b2,) = (value for value in state.values() if value.shape == (10,))
    hidden = np.maximum((images / 255 - data.mean[0]) / data.std[0] @ w1.T + b1, 0)
    return hidden @ w2.T + b2


# --- check ---


def test_check_gives_the_facts(jobs):
    (row,) = jobs.job("check", "data.jitter=1", "student={name: selfkd_mlp, args: {width: 8}}")
    prints = row["facts"].pop("fingerprints")
    assert prints["train"] == load_data("digits", train_size=200).fingerprint
    assert prints.keys() == {"train", "val", "test"}
    assert len(set(prints.values())) == 3
    assert row == {
        "facts": {
            "items": {"train": 200, "val": 400, "test": 1197},
            "transfer": 0,
            "unit": "images",
            "items_an_input": 1,
            "metric": "accuracy",
            "mode": "max",
            "further": ["nll", "ece"],
            "counts": {},
            "counted": "",
            "outputs": 10,
            "names": list("0123456789"),
            "views": 8,
            "parameters": {"model": 1210, "student": 64 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10},
            "weights": {},
            "export": None,
            "function": None,
            "prompts": 0,
            "cached": {"words": "10 logits", "row_bytes": 20, "shard_size": 16_384},
            "fixed": [],
            "notes": [],
        }
    }


def test_augmentation_is_said_in_words(jobs):
    (row,) = jobs.job("check", "data.augment=strong", "data.repeats=5")
    assert row["facts"]["notes"] == [
        "images: shift of 1 pixel, randaugment 2 x 9, erase 0.25, mixup 0.8 or cutmix 1 of 50%; "
        "8 views of each image, 5 in a batch"
    ]


@pytest.mark.parametrize(
    ("settings", "views"),
    [
        ([], 1),
        (["data.flip=true"], 8),
        (["data.crop=0.5"], 8),
        (["data.jitter=1", "data.views=2"], 2),
        (["data.views=2"], 1),
        (["data.augment=light"], 8),
        (["data.augment=strong", "data.views=fresh", "distill.live=true"], 1),
    ],
)
def test_there_are_eight_views_where_images_are_augmented(jobs, settings, views):
    (row,) = jobs.job("check", *settings)
    assert row["facts"]["views"] == views


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["model.name=selfkd_mpl"], "model.name must be a timm model name, got 'selfkd_mpl': did"),
        (["student.name=selfkd_mpl"], "model.name must be a timm model name, got 'selfkd_mpl'"),
        (["model.args.widt=3"], "model.args must be arguments of 'selfkd_mlp', got 'widt'"),
        (["model.args.width=0"], "model.args must suit 'selfkd_mlp', got {'width': 0"),
        (["model.args.num_classes=3"], "model must give 10 logits an image, got 'selfkd_mlp' with"),
        (
            ["model={name: vit_tiny_patch16_224, args: {depth: 1}}"],
            "model must take 8x8 images, got 'vit_tiny_patch16_224' with {'depth': 1}: ",
        ),
        (["data.name=digts"], "data.name must be one of digits, digit_pairs, mnist,"),
        (["data.name=mnist"], "data.root must be given for mnist, got none: pass"),
        (["data.name=mnist", "data.root=/nowhere"], "data.root must be an existing folder"),
        (["data.train_size=9"], "data.train_size must be at least the number of classes (10)"),
        (["data.val_size=1800"], "data.val_size must be in [1, "),
        (
            ["data.test_size=9"],
            "data.test_size must be a size that 'selfkd_mlp' with {'width': 16, 'depth': 1} takes, "
            "as it does 8, got 9: ",
        ),
        (["data.jitter=8"], "jitter must be less than the image size 8, got 8"),
        (["train.optimizer=sdg"], "train.optimizer must be a timm optimiser (adabelief, "),
        (["resources.gpu=1"], "resources.gpu must be 0 where torch finds no GPU, got 1"),
        (
            ["train.init=teacher", "student={name: selfkd_mlp, args: {width: 8}}"],
            "train.init must be fresh when student differs from model",
        ),
    ],
)
def test_check_names_a_mistake(jobs, monkeypatch, settings, fault):
    monkeypatch.delenv("SELFKD_DATA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = jobs.job("check", *settings)
    assert row.keys() == {"fault"}
    assert row["fault"].startswith(fault)


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (lambda z: [z, z], "which gives list of [2, 10], [2, 10] for 2 images"),
        (lambda z: {"logits": z[:, None]}, "which gives [2, 1, 10] for 2 images"),
        (lambda z: z.missing, "model must take 8x8 images, got 'selfkd_mlp' with"),
        (lambda z: {"logits": z}, None),
    ],
)
def test_check_names_a_network_whose_output_is_no_logits(jobs, monkeypatch, output, fault):
    class Network(nn.Linear):
        def forward(self, inputs):
            return output(super().forward(inputs.flatten(1)))

    monkeypatch.setattr("selfkd.tasks.images.networks.make_model", lambda *_, **__: Network(64, 10))
    (row,) = jobs.job("check")
    assert (fault in row["fault"]) if fault else "facts" in row


# --- train ---


def test_a_student_is_saved_with_its_facts(trained):
    assert [row["epoch"] for row in trained.rows] == [1, 2]
    assert ["hash" in row for row in trained.rows] == [False, True]
    assert trained.rows[1]["loss"] < trained.rows[0]["loss"]
    tensors, facts = load_tensors(Path(trained.teacher["checkpoint"]))
    data = load_data("digits", train_size=200)
    assert len(tensors) == 4
    assert facts == {
        "model": {"name": "selfkd_mlp", "args": {"width": 16, "depth": 1}},
        "classes": list("0123456789"),
        "in_chans": 1,
        "image_size": 8,
        "mean": list(data.mean),
        "std": list(data.std),
        "data": "digits",
        "fingerprint": data.fingerprint,
        "stage": "generation-0",
        "seed": 1,
        "parameters": 1210,
        "hash": trained.teacher["hash"],
    }


@pytest.mark.parametrize("settings", [[], ["train.ema=0.9"], ["data.jitter=1"]])
def test_what_is_saved_is_what_was_measured(jobs, settings):
    rows, student = jobs.train("one", *settings)
    labels = load_data("digits", train_size=200).val.labels.numpy()
    logits = numpy_logits(student, "val")
    assert rows[-1]["val_accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert rows[-1]["val_nll"] == pytest.approx(log_loss(labels, softmax(logits, 1)), rel=1e-4)


def test_the_same_seed_gives_the_same_student_whatever_ran_before(jobs, trained):
    settings = ["model.args.drop_rate=0.2", "train.batch_size=40", *AUGMENTED]
    rows, student = jobs.train("a", *settings)
    jobs.train("b", "train.optimizer=adamw", "model.args.drop_rate=0.5", seed=5)
    torch.rand(7)
    again, student_again = jobs.train("c", *settings)
    assert student_again["hash"] == student["hash"]
    assert history(again) == history(rows)
    assert jobs.train("d", *settings, seed=2)[1]["hash"] != student["hash"]
    assert jobs.train("e")[1]["hash"] == trained.teacher["hash"]


SETTINGS = [
    "train.optimizer=adamw",
    "train.lr=0.05",
    "train.momentum=0.5",
    "train.weight_decay=0.1",
    "train.schedule=none",
    "train.schedule=step",
    "train.warmup_epochs=1",
    "train.label_smoothing=0.1",
    "train.clip_grad=0.1",
    "train.ema=0.5",
    "train.amp=bfloat16",
    "train.batch_size=40",
    "train.epochs=3",
    "model.args.drop_rate=0.1",
    "data.flip=true",
    "data.augment=light",
    "data.augment=strong",
    "data.augment.operations=trivialaugment",
    "data.augment.erase=0.5",
    "data.augment.color=0.4",
    "data.augment.mixup=0.5",
    "data.augment.cutmix=0.5",
    "data={jitter: 1, repeats: 2}",
    "data.train_size=199",
    "data.val_size=399",
    "seed=1",
]


def test_every_setting_counts(trained, jobs):
    hashes = [jobs.train("one", setting)[1]["hash"] for setting in SETTINGS]
    assert len({*hashes, trained.teacher["hash"]}) == len(SETTINGS) + 1, hashes


BORN_AGAIN_SETTINGS = [
    "train.label_smoothing=0.1",
    "distill.temperature=2",
    "distill.alpha=0.5",
    "distill.average=logits",
]


def test_every_setting_of_a_born_again_student_counts(trained, jobs):
    options = {"generation": 1, "teachers": [trained.teacher, trained.other]}
    hashes = [
        jobs.train("one", "distill.live=true", *settings, **options)[1]["hash"]
        for settings in [[], *([setting] for setting in BORN_AGAIN_SETTINGS)]
    ]
    assert len(set(hashes)) == len(BORN_AGAIN_SETTINGS) + 1


def test_the_seed_of_a_trial_is_of_the_order_too(trained, jobs):
    options = {"generation": 1, "teachers": [trained.teacher]}  # and of the same first weights
    settings = ["train.init=teacher", "distill.live=true"]
    one, two = (jobs.train("one", *settings, seed=seed, **options)[1] for seed in (1, 2))
    assert one["hash"] != two["hash"]


def test_the_rate_is_that_of_the_steps_there_are(jobs):
    """Seven steps an epoch: 200 images by 30, the last batch not full."""
    rows, _ = jobs.train("one", "train.batch_size=30", "train.epochs=3", "train.warmup_epochs=1")
    rates = [0.01 + 0.09 * 6 / 7, *(0.05 * (1 + math.cos(math.pi * s / 14)) for s in (6, 13))]
    assert [row["lr"] for row in rows] == pytest.approx(rates)


def test_the_seed_of_the_run_is_of_splits_and_views(jobs):
    (row,) = jobs.job("check", "seed=3")
    assert (
        row["facts"]["fingerprints"]["train"]
        == load_data("digits", train_size=200, seed=3).fingerprint
    )
    assert (
        row["facts"]["fingerprints"]["train"]
        != load_data("digits", train_size=200, seed=0).fingerprint
    )
    views = networks.ImageNetworks(make_tree("seed=3", "data.jitter=1", "data.crop=0.5")).views
    assert views == Views(crop=0.5, jitter=1, seed=3, count=8)


def test_label_noise_is_passed_on_and_by_the_seed_of_the_run():
    found = networks.ImageNetworks(make_tree("seed=3", "data.label_noise=0.5"))
    assert (
        found.fingerprint
        == load_data("digits", train_size=200, seed=3, label_noise=0.5).fingerprint
    )
    assert found.fingerprint != load_data("digits", train_size=200, seed=3).fingerprint


def test_compile_is_passed_on(jobs, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    jobs.train("one", "train.compile=true")
    assert len(compiled) == 1


def test_a_stopped_trial_saves_nothing(jobs):
    path = jobs.folder / "student.safetensors"
    rows = run_job(
        "train",
        {
            "config": make_tree(),
            "stage": "generation-0",
            "model": make_tree()["model"],
            "seed": 0,
            "teachers": [],
            "targets": str(jobs.targets),
            "student": str(path),
        },
    )
    next(rows)
    rows.close()
    assert not path.exists()


def test_the_error_of_a_diverged_trial_names_its_generation(jobs):
    with pytest.raises(
        NonFiniteLossError, match=r"generation 0: loss must be finite, got .* at epoch \d, step \d"
    ):
        jobs.train("one", "train.lr=1e30", "train.epochs=9")
    assert not (jobs.folder / "one").exists()


@pytest.mark.parametrize(("generation", "width"), [(0, 16), (1, 8), (2, 8)])
def test_born_again_students_may_be_another_network(jobs, trained, generation, width):
    settings = ["student={name: selfkd_mlp, args: {width: 8, depth: 1}}", "distill.live=true"]
    teachers = [trained.teacher] if generation else []
    _, student = jobs.train("one", *settings, generation=generation, teachers=teachers)
    facts = load_tensors(Path(student["checkpoint"]))[1]
    assert facts["parameters"] == 64 * width + width + width * 10 + 10
    assert facts["model"]["args"]["width"] == width
    assert facts["stage"] == f"generation-{generation}"


# --- born again ---


@pytest.mark.parametrize(
    "settings",
    [
        [],
        AUGMENTED,
        [*AUGMENTED, "data.flip=true"],
        [*AUGMENTED, "data.augment=strong"],
        [*AUGMENTED, "data.augment=strong", "data.repeats=2"],
    ],
)
@pytest.mark.parametrize(
    ("members", "average"), [(1, "probabilities"), (2, "probabilities"), (2, "logits")]
)
def test_cached_and_live_teacher_logits_train_the_same_student(
    jobs, trained, members, settings, average
):
    settings = [*settings, f"distill.average={average}", "distill={temperature: 3, alpha: 0.7}"]
    teachers = [trained.teacher, trained.other][:members]
    for teacher in teachers:
        jobs.cache(teacher, *settings)
    options = {"generation": 1, "seed": 3, "teachers": teachers}
    stored, student = jobs.train("stored", *settings, **options)
    live, alive = jobs.train("live", *settings, "distill.live=true", **options)
    for row, expected in zip(history(stored), history(live), strict=True):
        assert row == pytest.approx(expected, abs=1e-3)
        assert row["soft_loss"] > 0
    for name, value in weights(student).items():
        torch.testing.assert_close(value, weights(alive)[name], atol=1e-3, rtol=1e-3)


def test_each_epoch_may_have_views_of_its_own(jobs):
    """With as many views as epochs it is the same."""
    settings = ("data.augment=strong", "train.epochs=4")
    fresh = jobs.train("fresh", *settings, "rounds=0", "data.views=fresh")
    assert fresh[1]["hash"] == jobs.train("many", *settings, "data.views=4")[1]["hash"]
    assert fresh[1]["hash"] != jobs.train("few", *settings, "data.views=3")[1]["hash"]


def test_with_augmentation_each_view_has_logits_of_its_own(jobs, trained):
    """The test before this one would pass where augmentation did nothing."""
    jobs.cache(trained.teacher, *AUGMENTED)
    views = [
        load_tensors(path)[0]["logits"] for path in sorted(jobs.targets.rglob("*.safetensors"))
    ]
    assert [view.shape for view in views] == [(200, 10)] * 3
    assert (views[0] - views[1]).abs().max() > 1
    assert (views[1] - views[2]).abs().max() > 1


def test_cached_logits_are_those_of_the_training_images(jobs, trained):
    jobs.cache(trained.teacher)
    (path,) = jobs.targets.rglob("*.safetensors")
    stored = load_tensors(path)[0]["logits"].double().numpy()
    logits = numpy_logits(trained.teacher, "train")
    np.testing.assert_allclose(stored, logits - logits.max(1, keepdims=True), atol=0.01)


def test_each_view_is_cached_once(jobs, trained):
    assert jobs.cache(trained.teacher, *AUGMENTED) == 3
    files = sorted(jobs.targets.rglob("*"))
    times = [path.stat().st_mtime_ns for path in files]
    assert jobs.cache(trained.teacher, *AUGMENTED) == 0
    assert sorted(jobs.targets.rglob("*")) == files
    assert [path.stat().st_mtime_ns for path in files] == times
    next(jobs.targets.glob("*/*/view_001/shard_*")).unlink()
    assert jobs.cache(trained.teacher, *AUGMENTED) == 1
    assert jobs.cache(trained.teacher, *AUGMENTED, "data.views=5") == 2  # those there are kept
    assert jobs.cache(trained.teacher, *AUGMENTED, "data.flip=true") == 3
    assert jobs.cache(trained.teacher, *AUGMENTED, "data.train_size=100") == 3
    assert jobs.cache(trained.other, *AUGMENTED) == 3


@pytest.mark.parametrize("step", ["remember_user", "write_shard"])
def test_where_the_disk_is_full_the_way_out_is_said(jobs, trained, monkeypatch, step):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"selfkd.worker.jobs.{step}", full)
    said = r"targets.root must have room for the teacher logits, .*--set targets.root=FOLDER"
    with pytest.raises(OSError, match=said):
        jobs.cache(trained.teacher)


def test_a_teacher_without_cached_logits_is_an_error(jobs, trained):
    with pytest.raises(
        FileNotFoundError, match=r"no such store: .*: the teacher logits are not cached"
    ):
        jobs.train("one", generation=1, teachers=[trained.teacher])


def test_a_student_starts_afresh(jobs, trained):
    """It shares no weight with its teacher: with a rate of nearly 0 it stays where it began."""
    settings = ["train.lr=1e-30", "train.weight_decay=0", "distill.live=true"]
    before = Path(trained.teacher["checkpoint"]).read_bytes()
    _, student = jobs.train("fresh", *settings, generation=1, seed=1, teachers=[trained.teacher])
    _, again = jobs.train("again", *settings, generation=1, seed=1, teachers=[trained.other])
    _, beginner = jobs.train("beginner", *settings, generation=0, seed=1)
    hashes = {tensors_hash(weights(model)) for model in (student, again, beginner)}
    assert len(hashes) == 1
    for name, value in weights(trained.teacher).items():
        assert not torch.equal(value, weights(student)[name])
    _, kept = jobs.train(
        "kept", *settings, "train.init=teacher", generation=1, teachers=[trained.teacher]
    )
    assert tensors_hash(weights(kept)) == tensors_hash(weights(trained.teacher))
    assert Path(trained.teacher["checkpoint"]).read_bytes() == before


def test_a_teacher_is_not_changed_by_its_student(jobs, trained):
    before = Path(trained.teacher["checkpoint"]).read_bytes()
    options = {"generation": 1, "seed": 7, "teachers": [trained.teacher]}
    jobs.train("one", "distill.live=true", "train.init=teacher", **options)
    assert Path(trained.teacher["checkpoint"]).read_bytes() == before


def test_alpha_weighs_the_teacher(jobs, trained):
    options = {"generation": 1, "seed": 4, "teachers": [trained.teacher]}
    none, _ = jobs.train("none", "distill.live=true", "distill.alpha=0", **options)
    labels, _ = jobs.train("labels", seed=4)
    for row, expected in zip(none, labels, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["val_nll"] == pytest.approx(expected["val_nll"], rel=1e-5)
    little, _ = jobs.train("little", "distill.live=true", "distill.alpha=0.01", **options)
    alone, _ = jobs.train("alone", "distill.live=true", "distill.alpha=1", **options)
    assert [row["loss"] for row in alone] == [row["soft_loss"] for row in alone]
    assert alone[-1]["soft_loss"] < little[-1]["soft_loss"]


def test_training_and_caching_never_read_the_test_split(jobs, trained, monkeypatch):
    load = networks._load_data

    def without_test(*arguments):
        return networks.Data(**{**vars(load(*arguments)), "test": None})

    monkeypatch.setattr(networks, "_load_data", without_test)
    jobs.cache(trained.teacher)
    rows, _ = jobs.train("one", generation=1, teachers=[trained.teacher])
    assert len(rows) == 2


# --- evaluation, of one and of an average ---


def test_the_evaluation_is_that_of_the_weights_on_the_test_split(trained):
    found = trained.evaluate("one")
    labels = load_data("digits", train_size=200).test.labels
    logits = numpy_logits(trained.teacher, "test")
    right = logits.argmax(1) == labels.numpy()
    assert found == {
        "val_accuracy": trained.rows[-1]["val_accuracy"],
        "val_nll": pytest.approx(trained.rows[-1]["val_nll"]),
        "test_accuracy": pytest.approx(right.mean()),
        "test_errors": (~right).sum(),
        "test_nll": pytest.approx(log_loss(labels, softmax(logits, axis=1)), rel=1e-4),
        "test_ece": pytest.approx(ece(torch.from_numpy(logits), labels), abs=1e-4),
    }
    saved, facts = load_tensors(Path(trained.predictions("one")))
    assert facts["student"] == trained.teacher["hash"]
    np.testing.assert_allclose(saved["test"], logits, atol=1e-4)
    np.testing.assert_allclose(saved["val"], numpy_logits(trained.teacher, "val"), atol=1e-4)


def test_agreement_is_with_the_teachers_together(trained):
    one, two = (numpy_logits(teacher, "test") for teacher in (trained.teacher, trained.other))
    assert trained.evaluate("one", teachers=[trained.teacher])["agreement"] == 1.0
    expected = (one.argmax(1) == two.argmax(1)).mean()
    assert 0.2 < expected < 1
    found = trained.evaluate("one", teachers=[trained.other])["agreement"]
    assert found == pytest.approx(expected, abs=1e-6)
    both = softmax(one, axis=1) + softmax(two, axis=1)
    found = trained.evaluate("one", teachers=[trained.other, trained.teacher])["agreement"]
    assert found == pytest.approx((one.argmax(1) == both.argmax(1)).mean(), abs=1e-6)


def test_an_ensemble_of_the_same_twice_is_the_single(trained):
    single = trained.evaluate("one")
    twice = trained.ensemble("one", "one")
    assert twice["val_accuracy"] == trained.rows[-1]["val_accuracy"]
    for key in ("test_accuracy", "test_nll", "test_ece"):
        assert twice[key] == pytest.approx(single[key], rel=1e-5)


def test_an_ensemble_averages_probabilities(trained):
    trained.evaluate("one")
    trained.evaluate("two")
    found = trained.ensemble("one", "two")
    labels = {
        split: getattr(load_data("digits", train_size=200), split).labels
        for split in ("val", "test")
    }
    mean = {
        split: sum(
            softmax(numpy_logits(teacher, split), axis=1) / 2
            for teacher in (trained.teacher, trained.other)
        )
        for split in labels
    }
    right = {split: mean[split].argmax(1) == labels[split].numpy() for split in labels}
    assert found == {
        "val_accuracy": pytest.approx(right["val"].mean()),
        "val_nll": pytest.approx(log_loss(labels["val"], mean["val"]), rel=1e-4),
        "test_accuracy": pytest.approx(right["test"].mean()),
        "test_errors": (~right["test"]).sum(),
        "test_nll": pytest.approx(log_loss(labels["test"], mean["test"]), rel=1e-4),
        "test_ece": pytest.approx(
            ece(torch.from_numpy(mean["test"]).log(), labels["test"]), abs=1e-4
        ),
    }


def test_predictions_of_another_model_are_refused(trained):
    logits = {"val": torch.zeros(400, 10), "test": torch.zeros(1197, 10)}
    save_tensors(Path(trained.predictions("one")), logits, {"student": "another"})
    with pytest.raises(
        ValueError, match=r"one/predictions\.safetensors was written by another model"
    ):
        trained.ensemble("one")


def test_a_model_of_other_classes_is_refused(jobs, trained):
    tensors, facts = load_tensors(Path(trained.teacher["checkpoint"]))
    path = jobs.folder / "one" / "student.safetensors"
    save_tensors(path, tensors, {**facts, "classes": list("abcdefghij")})
    with pytest.raises(ValueError, match=r"student\.safetensors was trained for other classes"):
        jobs.evaluate("one")


def test_learning_works_at_all(jobs):
    """Twenty epochs on 200 digits, and a generation trained on soft targets alone."""
    rows, teacher = jobs.train("one", "train.epochs=20")
    assert rows[-1]["val_accuracy"] > 0.85
    jobs.cache(teacher)
    born_again, _ = jobs.train(
        "two", "train.epochs=20", "distill.alpha=1", generation=1, seed=9, teachers=[teacher]
    )
    assert born_again[-1]["val_accuracy"] > 0.85
    assert not math.isclose(born_again[-1]["val_nll"], rows[-1]["val_nll"])


def renamed_args(trained, jobs, args):
    tensors, facts = load_tensors(Path(trained.teacher["checkpoint"]))
    path = jobs.folder / "one" / "student.safetensors"
    model = facts["model"]
    save_tensors(path, tensors, {**facts, "model": {**model, "args": {**model["args"], **args}}})


def test_where_a_foreign_checkpoint_says_weights_come_from_is_left_out(
    jobs, trained, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    url = {"url": "http://127.0.0.1:9/timm.py", "num_classes": 10}
    renamed_args(trained, jobs, {"pretrained": True, "cache_dir": ".", "pretrained_cfg": url})
    assert jobs.evaluate("one")["test_accuracy"] == trained.evaluate("one")["test_accuracy"]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"act_layer": "os.system"}, "model must be described by plain values"),
        ({"act_layer": {"a": 1}}, "model must be described by plain values"),
        ({"features_only": True}, "model.args must be arguments of 'selfkd_mlp'"),
    ],
)
def test_a_foreign_checkpoint_of_no_plain_network_is_refused(jobs, trained, args, message):
    renamed_args(trained, jobs, args)
    with pytest.raises(ValueError, match=rf"student\.safetensors cannot be rebuilt: .*{message}"):
        jobs.evaluate("one")
