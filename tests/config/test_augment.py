"""What views cannot go with, each one message."""

import re

import pytest
from pydantic import TypeAdapter

from selfkd.config import from_tree, load_config
from selfkd.config.augment import check_views, is_augmented
from selfkd.config.tasks import FREE, INSIDE
from selfkd.config.validate import check_study
from selfkd.errors import ConfigError
from selfkd.results import Point

STRONG = "data.augment=strong"
WAY = "leave it out, or set data.augment.mixup and data.augment.cutmix to 0"


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            ["data.views=fresh"],
            "data.views: must be a number where teacher logits are cached, got fresh: set "
            "distill.live=true, which runs the teacher at each step, or data.views=N, whose logits "
            "take N times the space",
        ),
        (
            [STRONG, "data.repeats=4", "data.views=2"],
            "data.repeats: must be at most data.views (2), got 4",
        ),
        (
            [STRONG, "data.repeats=10"],
            "data.repeats: must be at most data.views (8, the number when not given), got 10",
        ),
        (
            [STRONG, "data.repeats=3"],
            "train.batch_size: must be a multiple of data.repeats (3), got 20",
        ),
        (
            ["data.jitter=1", "data.repeats=2", "data.transfer.name=digits"],
            "data.repeats: must be 1 with data.transfer, got 2",
        ),
        (
            [STRONG, "controls=[class_mean]", "confirm.seeds=3"],
            f"controls: class_mean is of one label an image: {WAY}",
        ),
        (
            [STRONG, "controls=[cwtm]", "confirm.seeds=3"],
            f"controls: cwtm weights the cross-entropy with one label an image: {WAY}",
        ),
        (
            [STRONG, "controls=[teacher_free]", "confirm.seeds=3"],
            f"controls: teacher_free is made of one label an image: {WAY}",
        ),
        (
            [STRONG, "distill.terms=[{name: dkd}]"],
            f"distill.terms: must be without dkd, which has one label an image: {WAY}",
        ),
        (
            ["data.jitter=1", "data.repeats=2", "distill.terms=[{name: crd, student: head}]"],
            "distill.terms: must be without crd, which has each image once, with repeats",
        ),
        (
            ["data.name=arrays", "data.root=x.csv", STRONG],
            "data: augment must be left out with name arrays, whose features are no pixels, got "
            "'strong'",
        ),
        (
            ["data.name=arrays", "data.root=x.csv", "data.augment={mixup: 0.2}"],
            "data: augment must be left out with name arrays, whose features are no pixels, got "
            "{'mixup': 0.2}",
        ),
        (
            ["data.name=arrays", "data.root=x.csv", "data.views=fresh"],
            "data: views must be left out with name arrays, whose features are no pixels, got "
            "'fresh'",
        ),
        (
            ["task=text", "data.views=fresh"],
            "data.views: only with task images, got 'fresh' with task text",
        ),
        (
            ["data.flip=true", "data.augment={preset: light, flip: false}"],
            "data.augment.flip: must be true with data.flip true, got False: set data.flip=false",
        ),
        (
            ["data.test_size=30000"],
            "data.test_size: must be less than or equal to 4096, got 30000",
        ),
        (
            ["data.image_size=4097"],
            "data.image_size: must be less than or equal to 4096, got 4097",
        ),
        (
            ["data.augment=true"],
            "data.augment.preset: must be 'none', 'light' or 'strong', got True",
        ),
        (
            ["task=text", "data.repeats=2"],
            "data.repeats: only with task images, got 2 with task text",
        ),
        (
            ["data.augment.magnitude=15"],
            "data.augment.magnitude: must be of operations randaugment, got 15: set "
            "data.augment.operations=randaugment, or leave it out",
        ),
        (
            ["data.augment={operations: trivialaugment, count: 3}"],
            "data.augment.count: must be of operations randaugment, got 3: set "
            "data.augment.operations=randaugment, or leave it out",
        ),
        (
            ["data.augment.mix_probability=0.5"],
            "data.augment.mix_probability: must be of images that are mixed, got 0.5: set "
            "data.augment.mixup or data.augment.cutmix, or leave it out",
        ),
        (
            ["task=text", STRONG],
            "data.augment.preset: only with task images, got 'strong' with task text",
        ),
    ],
)
def test_one_message(settings, fault):
    with pytest.raises(ConfigError) as error:
        load_config(settings=settings)
    assert [line.removeprefix("--set: ") for line in str(error.value).splitlines()] == [fault]


@pytest.mark.parametrize(
    "settings",
    [
        ["data.views=fresh", "distill.live=true"],
        ["data.views=fresh", "rounds=0"],
        [STRONG, "data.repeats=4"],
        [STRONG, "data.repeats=10", "data.views=fresh", "distill.live=true"],
        [STRONG, "data.augment={magnitude: 15, count: 1, mix_probability: 1}"],
        ["data.views=8"],
        ["data={name: arrays, root: x.csv, views: 1, repeats: 1}"],
        [STRONG, "data.augment.mixup=0", "data.augment.cutmix=0", "distill.terms=[{name: dkd}]"],
        [STRONG, "controls=[seeds, dkpp, label_smoothing, hard]", "confirm.seeds=3"],
    ],
)
def test_what_goes_together(settings):
    assert load_config(settings=settings).data.views in (None, "fresh", 1, 8)


@pytest.mark.parametrize(
    ("arm", "fault"),
    [
        ("set: {data.views: fresh}", "set: data.views: must be a number where teacher logits"),
        ("set: {data.augment: strong}, target_transform: class_mean", "class_mean is of one label"),
        ("set: {data.augment.erase: 2}", "set: data.augment.erase: must be less than or equal"),
    ],
)
def test_arms_of_a_study_have_views_of_their_own(arm, fault):
    base = "{labels: {set: {data.views: fresh, data.augment: light}}, other: {teacher: labels, %s}}"
    with pytest.raises(ConfigError) as error:
        check_study(load_config(settings=[f"study.arms={base % arm}"]))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"study.arms.other{'.' if fault.startswith('set') else ': '}{fault}")


def test_students_of_an_ensemble_need_views_that_can_be_cached():
    """Whatever `rounds` says, which only generations read."""
    config = load_config(settings=["data.views=fresh", "rounds=0"])
    with pytest.raises(
        ConfigError, match=r"^data.views: must be a number where teacher logits are"
    ):
        check_views(config)
    check_views(config.at({"distill.live": True}))


def test_what_an_arm_may_set_can_be_written_down():
    keys = (*FREE, *(f"{beginning}preset" for beginning in INSIDE))
    assert TypeAdapter(Point).validate_python(dict.fromkeys(keys))


@pytest.mark.parametrize(
    ("settings", "augmented"),
    [
        ([], False),
        (["data.crop=1.0", "data.augment.mixup=0.0"], False),
        (["data.flip=true"], True),
        (["data.augment=light"], True),
        (["data.augment.color=0.4"], True),
        (["data.augment.cutmix=1"], True),
        (["data.augment.cutmix=1", "data.augment.mix_probability=0"], False),
        (["data.augment.operations=trivialaugment"], True),
    ],
)
def test_whether_views_of_an_image_differ(settings, augmented):
    assert is_augmented(load_config(settings=settings)) == augmented


def test_a_preset_in_a_file_may_be_a_word(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  name: digits\n  augment: strong\n")
    config = load_config(path, settings=["data.augment.mixup=0.1"])
    assert (config.data.augment.preset, config.data.augment.mixup) == ("strong", 0.1)
    assert config.data.augment.value("cutmix") == 1.0


@pytest.mark.parametrize("value", [5, True, None, ["light"], "bright"])
def test_what_is_no_preset_is_told_which_there_are(value):
    """As in a config.yaml that was edited, whose values no `--set` has gone through."""
    known = "must be none, light, strong or a mapping of its keys"
    with pytest.raises(
        ConfigError, match=rf"^data\.augment: {known}, got {re.escape(repr(value))}$"
    ):
        from_tree({"data": {"augment": value}})
    assert from_tree({"data": {"augment": "light"}}) == load_config(settings=["data.augment=light"])


def test_none_takes_back_what_was_set_before() -> None:
    known = ["data.augment={mixup: 0.3, color: 0.4}", "data.augment=none"]
    assert load_config(settings=known) == load_config()
    again = load_config(settings=[*known, "data.augment.erase=0.5"]).data.augment
    assert (again.preset, again.mixup, again.color, again.erase) == ("none", None, 0.0, 0.5)
    kept = load_config(settings=["data.augment={mixup: 0.3}", STRONG]).data.augment
    assert (kept.preset, kept.mixup) == ("strong", 0.3)
