"""The views of a preset, for images of each size and colour."""

import pytest

from selfkd.config import from_tree
from selfkd.tasks.images.augment import make_views


@pytest.mark.parametrize(
    ("size", "channels", "crop", "jitter", "flip"),
    [
        (2, 1, None, 1, False),
        (7, 1, None, 1, False),
        (8, 1, None, 1, False),
        (28, 1, None, 3, False),
        (32, 3, None, 4, True),
        (64, 3, 0.35, 0, True),
        (224, 1, 0.35, 0, False),
    ],
)
def test_light_augments_images_of_any_size(size, channels, crop, jitter, flip):
    config = from_tree({"data": {"augment": {"preset": "light"}}}).data

    views = make_views(config, seed=0, channels=channels, size=size)

    assert (views.crop, views.jitter, views.flip) == (crop, jitter, flip)
    assert not views.is_identity
