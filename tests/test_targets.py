"""Stored soft targets: the right row of the right view of the right teacher, or an error."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from selfkd.checkpoint import save_tensors
from selfkd.targets import SoftTargets, data_key, load_targets, save_targets, target_path

KEY = {"teacher": "t1", "data": "d1"}
IMAGES, CLASSES = 20, 5


def make_logits(seed, rows=IMAGES, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, classes, generator=generator)


def shifted(logits):
    return logits - logits.amax(dim=1, keepdim=True)


# --- which row is served ---


def test_rows_follow_the_image_through_any_order(tmp_path):
    logits = make_logits(0)
    save_targets(tmp_path, logits, **KEY, view=0)
    targets = load_targets(tmp_path, ["t1"], data="d1", views=1, images=IMAGES)
    for seed in range(3):
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))
        for index in order.split(7):
            served = targets(index, 0)
            assert served.shape == (len(index), CLASSES)
            np.testing.assert_allclose(served.float(), shifted(logits)[index], atol=0.02)
            assert torch.equal(served.argmax(1), logits[index].argmax(1))


def test_each_view_has_its_own_answers(tmp_path):
    views = [make_logits(seed) for seed in range(3)]
    for view, logits in enumerate(views):
        save_targets(tmp_path, logits, **KEY, view=view)
    targets = load_targets(tmp_path, ["t1"], data="d1", views=3, images=IMAGES)
    index = torch.tensor([4, 0, 4])
    for view in range(7):
        expected = shifted(views[view % 3])[index]
        np.testing.assert_allclose(targets(index, view).float(), expected, atol=0.02)


def test_several_teachers_come_as_members_in_the_order_asked_for(tmp_path):
    logits = {teacher: make_logits(seed) for seed, teacher in enumerate(["a", "b", "c"])}
    for teacher, answers in logits.items():
        save_targets(tmp_path, answers, teacher=teacher, data="d1", view=0)
    index = torch.tensor([3, 1])
    targets = load_targets(tmp_path, ["c", "a"], data="d1", views=1, images=IMAGES)
    served = targets(index, 0)
    assert served.shape == (2, 2, CLASSES)
    for member, teacher in zip(served, ["c", "a"], strict=True):
        np.testing.assert_allclose(member.float(), shifted(logits[teacher])[index], atol=0.02)


def test_members_and_views_are_not_mixed_up():
    views = [[torch.full((4, 2), 10.0 * member + view) for view in range(2)] for member in range(3)]
    served = SoftTargets(views)(torch.tensor([0]), 3)
    assert served[:, 0, 0].tolist() == [1.0, 11.0, 21.0]


def test_serving_changes_nothing_and_makes_no_graph(tmp_path):
    save_targets(tmp_path, make_logits(0).requires_grad_(), **KEY, view=0)
    targets = load_targets(tmp_path, ["t1"], data="d1", views=1, images=IMAGES)
    first = targets(torch.arange(IMAGES), 0)
    assert not first.requires_grad
    kept = first.clone()
    first.zero_()
    assert torch.equal(targets(torch.arange(IMAGES), 0), kept)


# --- half precision ---


@pytest.mark.parametrize("temperature", [1, 4, 20])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1, 0), (5, 0), (30, 0), (300, 0), (5, 30_000), (5, -30_000), (5, 1e6), (1e5, 0), (1e30, 0)],
)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_half_precision_hardly_changes_the_soft_targets(
    tmp_path, temperature, scale, offset, classes
):
    generator = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn(50, classes, generator=generator) + offset
    save_targets(tmp_path, logits, **KEY, view=0)
    served = load_targets(tmp_path, ["t1"], data="d1", views=1, images=50)(torch.arange(50), 0)
    assert served.isfinite().all()
    expected = softmax(logits.double().numpy() / temperature, axis=1)
    found = softmax(served.double().numpy() / temperature, axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_precision_are_stored(tmp_path, dtype):
    logits = torch.tensor([[60_000.0, -60_000.0, 59_000.0]], dtype=dtype)
    save_targets(tmp_path, logits, **KEY, view=0)
    served = load_targets(tmp_path, ["t1"], data="d1", views=1, images=1)(torch.tensor([0]), 0)
    assert served[0, 0] == 0
    assert served.isfinite().all()


# --- what is refused ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused(tmp_path, value):
    logits = make_logits(0)
    logits[7, 2] = value
    logits[9, 0] = value
    with pytest.raises(ValueError, match=rf"teacher logits must be finite, got {value} in row 7"):
        save_targets(tmp_path, logits, **KEY, view=0)
    assert list(tmp_path.iterdir()) == []


def test_what_has_not_been_labelled_is_named(tmp_path):
    save_targets(tmp_path, make_logits(0), **KEY, view=0)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*t1/d1/view_001\.safetensors"):
        load_targets(tmp_path, ["t1"], data="d1", views=2, images=IMAGES)
    with pytest.raises(FileNotFoundError, match=r"t2/d1/view_000\.safetensors"):
        load_targets(tmp_path, ["t1", "t2"], data="d1", views=1, images=IMAGES)


@pytest.mark.parametrize(
    "wrong", [{"teacher": "t2"}, {"data": "d2"}, {"view": 1}, {"teacher": "t2", "view": 3}]
)
def test_answers_of_something_else_are_refused(tmp_path, wrong):
    """As after a copy by hand: the file is whole but stands in another one's place."""
    other = {**KEY, "view": 0, **wrong}
    path = save_targets(tmp_path, make_logits(0), **other)
    place = target_path(tmp_path, **KEY, view=0)
    place.parent.mkdir(parents=True, exist_ok=True)
    path.rename(place)
    with pytest.raises(
        ValueError, match=r"view_000\.safetensors must hold .*'t1'.*, got .*: remove it and resume"
    ):
        load_targets(tmp_path, ["t1"], data="d1", views=1, images=IMAGES)


def test_another_number_of_images_is_refused(tmp_path):
    save_targets(tmp_path, make_logits(0, rows=19), **KEY, view=0)
    with pytest.raises(ValueError, match=r"view_000\.safetensors must have 20 rows, got 19"):
        load_targets(tmp_path, ["t1"], data="d1", views=1, images=20)


def test_a_damaged_file_is_named(tmp_path):
    path = save_targets(tmp_path, make_logits(0), **KEY, view=0)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"view_000\.safetensors is damaged"):
        load_targets(tmp_path, ["t1"], data="d1", views=1, images=IMAGES)
    path.unlink()
    save_targets(tmp_path, make_logits(0), **KEY, view=0)  # made again
    assert load_targets(tmp_path, ["t1"], data="d1", views=1, images=IMAGES)


def test_a_file_of_other_tensors_is_refused(tmp_path):
    path = target_path(tmp_path, **KEY, view=0)
    save_tensors(path, {"logits": make_logits(0)}, {"student": "t1"})
    with pytest.raises(ValueError, match=r"view_000\.safetensors must hold"):
        load_targets(tmp_path, ["t1"], data="d1", views=1, images=IMAGES)


# --- keys ---


def test_the_key_depends_on_images_and_recipe():
    recipe = {"flip": True, "jitter": 2, "seed": 0}
    key = data_key("abc", recipe)
    assert key == data_key("abc", dict(reversed(recipe.items())))
    others = [("abd", recipe), *(("abc", {**recipe, name: 7}) for name in recipe), ("abc", {})]
    keys = {data_key(*other) for other in others}
    assert len(keys) == len(others)
    assert key not in keys


def test_the_place_names_teacher_data_and_view(tmp_path):
    path = save_targets(tmp_path, make_logits(0), teacher="t", data="d", view=12)
    assert path == tmp_path / "t" / "d" / "view_012.safetensors"
    assert path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["view_012.safetensors"]
