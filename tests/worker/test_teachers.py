"""What is read of cached teacher logits for the report."""

from types import SimpleNamespace

import pytest
import torch

from selfkd.config import from_tree
from selfkd.worker import teachers

LABELS = torch.tensor([0, -1, 2, -1, -1])


def read(monkeypatch, *, preset: str, labels: torch.Tensor):
    logits = torch.eye(3)[labels.clamp(min=0)]

    class Stored:
        classes, members = 3, 1

        def __call__(self, items: torch.Tensor, view: int) -> torch.Tensor:
            return logits[items]

    task = SimpleNamespace(
        config=from_tree({"data": {"augment": {"preset": preset}}}),
        manifest=lambda key, extra: SimpleNamespace(data=None),
        cached_labels=lambda: labels,
        output_names=lambda outputs: [str(output) for output in outputs],
    )
    monkeypatch.setattr(teachers, "open_store", lambda *args, **kwargs: Stored())
    return teachers.read_targets(task, "targets", [{"hash": "0" * 16}])


@pytest.mark.parametrize(("preset", "noted"), [("strong", True), ("light", False)])
def test_how_many_images_are_mixed_and_left_out_is_said(monkeypatch, preset, noted):
    found = read(monkeypatch, preset=preset, labels=LABELS)

    said = ("3 of 5 training images are left out, as their first view is mixed with another image",)
    assert (found.items, found.notes) == (2, said if noted else ())


def test_where_all_images_are_mixed_it_says_so(monkeypatch):
    with pytest.raises(ValueError, match="all 5 training images are mixed with another in their"):
        read(monkeypatch, preset="strong", labels=torch.full((5,), -1))
