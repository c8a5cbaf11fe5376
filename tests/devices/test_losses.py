"""Every loss on a GPU that is not there: its tensors' devices, and nothing that waits for it."""

import inspect
from functools import partial

import pytest
import torch
from fake_cuda import fake_cuda
from torch import Tensor

from selfkd import losses
from selfkd.losses import ContrastiveMemory, LinearLogits, Projection

BATCH, CLASSES, MEMBERS, TOKENS, WIDTH = 4, 5, 3, 6, 8
HEAD = {"temperature": 2.0, "alpha": 0.5}
OF_SETTINGS = ("Average", "Divergence", "every_other", "liger_fits")
NO_GRADIENT = ("permute_nontarget", "soft_targets", "teacher_free_logits", "confidence_weights")


def draw(*shape, **options):
    return torch.randn(*shape, device="cuda", **options)


def cases():
    """Return a function from nothing to tensors for each loss, several of some.

    What is made once, before training, is made at its first call.
    """
    hidden = partial(draw, BATCH, TOKENS, WIDTH, requires_grad=True)
    tokens = partial(draw, BATCH, TOKENS, CLASSES)
    student = partial(draw, BATCH, CLASSES, requires_grad=True)
    teacher = partial(draw, BATCH, CLASSES)
    members = partial(draw, MEMBERS, BATCH, CLASSES, dtype=torch.float16)
    maps = partial(draw, BATCH, WIDTH, 4, 4)
    own = partial(draw, BATCH, WIDTH, 4, 4, requires_grad=True)
    vectors = partial(draw, BATCH, WIDTH)

    def labels():
        return torch.zeros(BATCH, dtype=torch.int64, device="cuda")

    def of_tokens():
        return torch.zeros(BATCH, TOKENS, dtype=torch.int64)  # counted without waiting for a GPU

    def mask(device="cuda"):
        return torch.ones(BATCH, TOKENS, dtype=torch.bool, device=device)

    def head():
        return LinearLogits(draw(BATCH, TOKENS, 7), draw(CLASSES, 7), draw(CLASSES))

    def sampled():
        return losses.sampled_targets(tokens(), 3, temperature=2.0)

    def crd():
        memory()
        contrast = memories[0].draw(torch.arange(BATCH, device="cuda"), negatives=5)
        ours, theirs = draw(BATCH, WIDTH, requires_grad=True), vectors()
        loss = losses.crd_loss(ours, theirs, memories[0], contrast)
        loss.backward()
        memories[0].update(ours, theirs, contrast)
        return loss.detach()

    def memory():
        if not memories:
            memories.append(ContrastiveMemory(9, WIDTH, labels=torch.arange(9) % 3).to("cuda"))
        return memories[0].student

    def projection():
        if not made:
            made.append(Projection(WIDTH, 7).to("cuda"))
        return made[0](own())

    memories, made = [], []
    weights = [0.5, 0.25, 0.25]
    terms, sequence = losses.distillation_terms, losses.sequence_terms
    linear, several = losses.linear_sequence_terms, losses.multi_label_terms
    found = {
        "distillation_terms": lambda: terms(student(), teacher(), labels(), **HEAD),
        "distillation_terms of members": lambda: terms(
            student(), members(), labels(), weights=weights, label_smoothing=0.1, **HEAD
        ),
        "distillation_terms of logits": lambda: terms(
            student(), members(), labels(), weights=weights, average="logits", **HEAD
        ),
        "distillation_terms of soft labels": lambda: terms(
            student(), members(), teacher().softmax(-1), label_smoothing=0.1, **HEAD
        ),
        "distillation_loss": lambda: losses.distillation_loss(
            student(), members(), labels(), **HEAD
        ),
        "hard_loss": lambda: losses.hard_loss(student(), labels(), label_smoothing=0.1),
        "soft_targets": lambda: losses.soft_targets(members(), temperature=2.0, weights=weights),
        "ensemble_logits": lambda: losses.ensemble_logits(members(), weights=weights),
        "sparse_terms": lambda: losses.sparse_terms(
            student(), losses.sparsify(teacher(), 2), labels(), **HEAD
        ),
        "sparse_terms of members": lambda: losses.sparse_terms(
            student(), losses.sparsify(members(), 2), labels(), weights=weights, **HEAD
        ),
        "sparsify": lambda: losses.sparsify(teacher(), 2),
        "regression_terms": lambda: losses.regression_terms(
            student(), members(), teacher(), alpha=0.5, weights=weights
        ),
        "multi_label_terms": lambda: several(
            student(), members(), teacher().sigmoid(), weights=weights, **HEAD
        ),
        "sequence_terms": lambda: sequence(
            tokens(requires_grad=True), tokens(), of_tokens(), **HEAD
        ),
        "sequence_terms with a mask": lambda: sequence(
            tokens(requires_grad=True), tokens(), of_tokens(), mask=mask("cpu"), **HEAD
        ),
        "sequence_terms of Jensen and Shannon": lambda: sequence(
            tokens(requires_grad=True), tokens(), of_tokens(), divergence="js", **HEAD
        ),
        "sequence_terms of members": lambda: sequence(
            tokens(requires_grad=True),
            draw(MEMBERS, BATCH, TOKENS, CLASSES),
            of_tokens(),
            weights=weights,
            **HEAD,
        ),
        "sequence_terms of the largest": lambda: sequence(
            tokens(requires_grad=True), losses.sparsify(tokens(), 2), of_tokens(), **HEAD
        ),
        "sequence_terms of samples": lambda: sequence(
            tokens(requires_grad=True), sampled(), of_tokens(), **HEAD
        ),
        "sampled_targets": sampled,
        "linear_sequence_terms": lambda: linear(
            hidden(), draw(CLASSES, WIDTH, requires_grad=True), head(), of_tokens(), **HEAD
        ),
        "linear_sequence_terms of samples": lambda: linear(
            hidden(), draw(CLASSES, WIDTH, requires_grad=True), sampled(), of_tokens(), **HEAD
        ),
        "LinearLogits": lambda: linear(
            hidden(),
            draw(CLASSES, WIDTH, requires_grad=True),
            head(),
            of_tokens(),
            label_smoothing=0.1,
            **HEAD,
        ),
        "ContrastiveMemory": memory,
        "crd_loss": crd,
        "Projection": projection,
        "attention_transfer": lambda: losses.attention_transfer(own(), maps()),
        "attention_matrices": lambda: losses.attention_matrices(
            draw(BATCH, 2, TOKENS, TOKENS, requires_grad=True),
            draw(BATCH, 2, TOKENS, TOKENS),
            mask=mask(),
        ),
        "cosine_embedding": lambda: losses.cosine_embedding(
            hidden(), hidden().detach(), mask=mask()
        ),
        "hidden_state_loss": lambda: losses.hidden_state_loss(
            [hidden()], [hidden().detach()], mask=mask()
        ),
        "hint_loss": lambda: losses.hint_loss(own(), maps()),
        "pkt": lambda: losses.pkt(own(), maps()),
        "reconcile": lambda: losses.reconcile(own(), draw(BATCH, 7, 2, 2))[0],
        "similarity_preserving": lambda: losses.similarity_preserving(own(), maps()),
        "rkd_distance": lambda: losses.rkd_distance(student(), vectors()),
        "rkd_angle": lambda: losses.rkd_angle(student(), vectors()),
        "confidence_weighted_loss": lambda: losses.confidence_weighted_loss(
            student(), teacher(), labels()
        ),
        "confidence_weights": lambda: losses.confidence_weights(teacher()),
        "dist_loss": lambda: losses.dist_loss(student(), teacher()),
        "dkd_loss": lambda: losses.dkd_loss(student(), teacher(), labels(), temperature=2.0),
        "hard_teacher_loss": lambda: losses.hard_teacher_loss(student(), teacher()),
        "jensen_shannon": lambda: losses.jensen_shannon(student(), teacher(), temperature=2.0),
        "logit_mse": lambda: losses.logit_mse(student(), teacher(), centre=True),
        "permute_nontarget": lambda: losses.permute_nontarget(teacher(), generator=None),
        "reverse_kl": lambda: losses.reverse_kl(student(), teacher(), temperature=2.0),
        "soft_cross_entropy": lambda: losses.soft_cross_entropy(
            student(), teacher(), temperature=2.0
        ),
        "standardize_logits": lambda: losses.standardize_logits(student()),
        "standardized_loss": lambda: losses.standardized_loss(
            student(), teacher(), temperature=2.0
        ),
        "teacher_free_logits": lambda: losses.teacher_free_logits(
            labels(), classes=CLASSES, confidence=0.9
        ),
    }
    return found


def test_every_loss_has_a_case():
    public = {name for name, value in vars(losses).items() if inspect.isroutine(value)}
    tried = {name.partition(" ")[0] for name in cases()}

    assert public - set(OF_SETTINGS) <= tried


@pytest.fixture(params=["none", "bfloat16", "float16"])
def precision(request):
    return request.param


@pytest.mark.parametrize("name", cases())
def test_a_loss_stays_on_the_gpu_and_waits_for_nothing(name, precision, monkeypatch):
    case = cases()[name]
    monkeypatch.setattr("selfkd.losses.sequences.liger_fits", lambda *args, **kwargs: False)
    with fake_cuda() as waits:
        case()  # what is made once
        waits.clear()
        with torch.autocast("cuda", getattr(torch, precision, torch.bfloat16), precision != "none"):
            found = case()
            total = found if isinstance(found, Tensor) else found[0]
        if total.requires_grad:
            total.sum().backward()

        tensors = [tensor for tensor in as_list(found) if isinstance(tensor, Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        assert waits.found == []


def as_list(found):
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize("left", ["student", "teacher", "labels"])
def test_an_argument_left_on_the_cpu_is_refused(left):
    with fake_cuda():
        given = {
            "student": draw(BATCH, CLASSES, requires_grad=True),
            "teacher": draw(BATCH, CLASSES),
            "labels": torch.zeros(BATCH, dtype=torch.int64, device="cuda"),
        }
        given[left] = given[left].detach().cpu()

        with pytest.raises(RuntimeError, match="same device"):
            losses.distillation_terms(*given.values(), **HEAD)


def test_labels_of_sequences_on_the_gpu_are_waited_for_once():
    with fake_cuda() as waits:
        student, teacher = draw(BATCH, TOKENS, CLASSES, requires_grad=True), draw(1, 1, 1)
        labels = torch.zeros(BATCH, TOKENS, dtype=torch.int64, device="cuda")

        losses.sequence_terms(student, teacher.expand_as(student), labels, **HEAD)

    assert [found.partition(" ")[0] for found in waits.found] == ["aten::nonzero"]
