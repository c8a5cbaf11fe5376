"""What is measured of a classifier, where classes are missing or none is confused."""

from __future__ import annotations

import pytest
import torch

from selfkd.tasks.images.evaluate import diagnosis


def test_a_class_without_images_and_a_perfect_model() -> None:
    logits = 9 * torch.eye(3)[:2]
    labels = torch.tensor([0, 1])
    found = diagnosis(logits, labels, names="abc", temperature=1.0, teacher_logits=logits)
    assert found.class_accuracy == (1.0, 1.0, None)
    assert found.confusions == found.teacher_confusions == ()
    assert (found.metric("agreement"), found.metric("kl")) == (1.0, pytest.approx(0))
