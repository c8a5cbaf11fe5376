"""The parts for a loop of one's own work where what runs a search is absent."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = ("ray", "wandb", "plotly", "sklearn", "optuna", "pandas", "datasets")
PROGRAM = f"""
import importlib, importlib.util, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {BLOCKED}
        return None if absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
import selfkd, selfkd.losses
from selfkd import Distiller, Ensemble, Teacher, distillation_loss, make_model

torch.manual_seed(0)
network = lambda: make_model("selfkd_cnn", {{"width": 4}}, num_classes=3, in_chans=1, image_size=8)
inputs, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
student, teachers = network(), [network(), network()]
term = {{"student": "head", "teacher": "head", "weight": 0.1}}
for teacher in (None, Teacher(teachers[0]), Ensemble(teachers)):
    distiller = Distiller(teacher, temperature=2.0, alpha=0.5) if teacher else Distiller()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    terms = distiller(student(inputs), labels, inputs=inputs)
    optimizer.zero_grad()
    terms["loss"].backward()
    optimizer.step()
    print(sorted(terms), float(terms["loss"]) > 0)
logits = torch.randn(6, 3)
print(float(distillation_loss(logits, logits.flip(0), labels, temperature=2.0, alpha=0.5)) > 0)
from selfkd.integrations.timm import DistillationTask, WithIndex
for name in ("lightning", "transformers"):
    if importlib.util.find_spec(name):
        importlib.import_module("selfkd.integrations." + name)
from selfkd.soft_targets.store import SoftTargets
print(sorted({{name.partition(".")[0] for name in sys.modules}} & set({BLOCKED})))
"""


def test_losses_teachers_and_integrations_work_without_ray_wandb_plotly_and_scikit_learn() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "['hard_loss', 'loss'] True"
    assert lines[1:3] == ["['hard_loss', 'loss', 'soft_loss'] True"] * 2
    assert lines[3:] == ["True", "[]"]
