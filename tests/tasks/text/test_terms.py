"""Further terms of the loss on text: what they compare, over which tokens, and how they resume."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from text_trials import make_trial

from selfkd.config import Config, load_config, to_tree
from selfkd.distill.features import Features
from selfkd.losses import attention_matrices, cosine_embedding, hidden_state_loss, logit_mse
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.tasks import make_task
from selfkd.tasks.text.batches import Batch
from selfkd.tasks.text.data import IGNORED
from selfkd.tasks.text.loss import make_loss
from selfkd.tasks.text.task import TextTask
from selfkd.tasks.text.terms import make_further

HIDDEN = "{name: hidden_state, student: transformer.h.0, teacher: transformer.h.1, project: true}"
COSINE = "{name: cosine, student: transformer.ln_f, project: true, weight: 0.5}"
MATRICES = "{name: attention_matrices, student: transformer.h.0.attn, weight: 3}"
LOGITS = "{name: logit_mse, weight: 0.1}"
SETTINGS = [
    "data={name: text, context: 12, tokenizer: chars}",
    "model={name: selfkd_gpt, args: {depth: 2, width: 8, heads: 2}}",
    "student={name: selfkd_gpt, args: {depth: 1, width: 4, heads: 1}}",
    "train={steps: 4, epochs: 2, batch_size: 8, warmup_steps: 0}",
    "checkpoint={seconds: null, epochs: 1}",
]


def start(tmp_path: Path, terms: str, *settings: str) -> tuple[Config, TextTask]:
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / "a.txt").write_text("0123456789+=: " * 40)
    root = f"data.root={tmp_path / 'text'}"
    given = [*SETTINGS, root, f"distill.terms={terms}", *settings]
    config = load_config(settings=given, flags={"task": "text"})
    task = make_task(to_tree(config))
    assert isinstance(task, TextTask)
    return config, task


def make_teacher(config: Config, task: TextTask, path: Path) -> Row:
    torch.manual_seed(0)
    digest = task.save(path, task.make(config.model), config.model, {})
    return {"hash": digest, "checkpoint": str(path)}


def test_terms_are_means_over_the_tokens_that_count(tmp_path: Path) -> None:
    config, task = start(tmp_path, f"[{HIDDEN}, {COSINE}, {MATRICES}, {LOGITS}]")
    assert config.student is not None
    teacher = make_teacher(config, task, tmp_path / "teacher.safetensors")
    trial = make_trial(config, tmp_path / "s" / "a.safetensors", [teacher])
    student = task.make(config.student)
    further = make_further(task, trial, student)
    assert further is not None
    loss = make_loss(task, trial, further=further)
    data = task.data.splits["train"]
    windows = torch.arange(2)
    labels = data.labels_of(windows).clone()
    labels[0, 5:] = IGNORED
    batch = Batch(data.inputs(windows), labels, None, data.rows(windows))
    valid = labels != IGNORED
    logits = student(batch.inputs).logits
    terms = loss(logits, batch, batch.total)
    network = task.load(teacher["checkpoint"])[0].eval()
    network.set_attn_implementation("eager")
    with (
        Features(student, ["transformer.h.0", "transformer.ln_f"]) as own,
        Features(network, ["transformer.h.1", "transformer.ln_f"], detach=True) as other,
        Features(student, ["transformer.h.0.attn"], attention=True) as matrices,
        Features(network, ["transformer.h.0.attn"], attention=True, detach=True) as others,
    ):
        again, teacher_logits = student(batch.inputs).logits, network(batch.inputs).logits
    torch.testing.assert_close(again, logits)
    projections = further.projections
    states = projections["hidden_state_0"](own["transformer.h.0"])
    expected = {
        "hidden_state": hidden_state_loss([states], [other["transformer.h.1"]], mask=valid),
        "cosine": cosine_embedding(
            projections["cosine_0"](own["transformer.ln_f"]), other["transformer.ln_f"], mask=valid
        ),
        "attention_matrices": attention_matrices(
            matrices["transformer.h.0.attn"], others["transformer.h.0.attn"], mask=valid
        ),
        "logit_mse": logit_mse(again[valid], teacher_logits[valid], centre=True),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach())
    weights = {"hidden_state": 1.0, "cosine": 0.5, "attention_matrices": 3.0, "logit_mse": 0.1}
    total = terms["soft_loss"] + sum(weights[name] * value for name, value in expected.items())
    torch.testing.assert_close(terms["loss"], total)


def test_a_trial_resumes_with_its_projections_which_no_model_has(tmp_path: Path) -> None:
    config, task = start(tmp_path, f"[{HIDDEN}, {LOGITS}]")
    teacher = make_teacher(config, task, tmp_path / "teacher.safetensors")
    found = []
    for name, stopped in (("whole", False), ("stopped", True)):
        path = tmp_path / name / "student.safetensors"
        if stopped:
            with closing(task.train(make_trial(config, path, [teacher]))) as rows:
                next(rows)
        rows = task.train(make_trial(config, path, [teacher]))
        last = list(rows)[-1]
        found.append((last["hash"], last["hidden_state"]))
        assert not [key for key in load_tensors(path)[0] if "hidden" in key]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ("[{name: hint, student: transformer.h.5}]", r"hint: student's path must be .*h\.0"),
        ("[{name: hint, student: transformer.h.0}]", r"hint: .*one shape.*\[4\].*\[8\].*project"),
        (
            "[{name: pkt, student: transformer.wpe}]",
            r"pkt: features must be of tokens, \[2, 12, …\], got",
        ),
        ("[{name: reverse_kl, args: {temperature: 0}}]", "reverse_kl: temperature must be > 0"),
    ],
)
def test_terms_are_tried_before_training(tmp_path: Path, terms: str, said: str) -> None:
    config, task = start(tmp_path, terms)
    with pytest.raises(ValueError, match=said):
        task.check([{"name": config.model.name, "args": config.model.args}])


def test_terms_of_logits_need_all_of_them(tmp_path: Path) -> None:
    _, task = start(tmp_path, f"[{LOGITS}]")
    task.samples = 8
    with pytest.raises(ValueError, match=r"logit_mse need all logits.*8 samples"):
        task.check()
