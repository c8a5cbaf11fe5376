"""Contrastive representation distillation (CRD): the loss and its memory bank of embeddings.

Computed in float32 or wider, in autocast too. An embedding of zeros, which has no direction, gets
no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.distillation import check_floating
from selfkd.losses.features import unit


class ContrastiveMemory:
    """Memory bank of `crd_loss`: the student's and the teacher's embedding of each image.

    A training step draws negatives, computes the loss, and updates after the backward pass:

        contrast = memory.draw(indices, negatives=16384, generator=generator)
        loss = crd_loss(student_embeddings, teacher_embeddings, memory, contrast)
        loss.backward()
        memory.update(student_embeddings, teacher_embeddings, contrast)

    `state_dict` holds everything that training changes, except the caller's random generator.

    Args:
        images: Number of images, at least 2.
        dim: Dimension of the embeddings, at least 1.
        labels: Class of each image `[images]`. With labels, negatives are images of other classes;
            without, any other images.
        temperature: Temperature T, above 0.
        momentum: Share of the old row that an update keeps, in [0, 1).
        generator: Random generator of the initial rows, which are drawn on its device.

    Raises:
        ValueError: A setting out of range, labels of another shape, or labels of a single class.

    >>> memory = ContrastiveMemory(10, 4, labels=torch.arange(10) % 2)
    >>> contrast = memory.draw(torch.tensor([3, 8]), negatives=5)
    >>> contrast[:, 0], (contrast[:, 1:] % 2).tolist()
    (tensor([3, 8]), [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])

    Reference:
        Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020,
        https://arxiv.org/abs/1910.10699
    """

    def __init__(
        self,
        images: int,
        dim: int,
        *,
        labels: Tensor | None = None,
        temperature: float = 0.07,
        momentum: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        if images < 2 or dim < 1:
            raise ValueError(f"images must be >= 2 and dim >= 1, got {images} and {dim}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if labels is not None and labels.shape != (images,):
            raise ValueError(f"labels must be [{images}], one an image, got {list(labels.shape)}")
        self.temperature, self.momentum = temperature, momentum
        device = None if generator is None else generator.device
        bound = math.sqrt(3 / dim)  # rows of norm 1 on average
        self.student, self.teacher = (
            torch.empty(images, dim, device=device).uniform_(-bound, bound, generator=generator)
            for _ in range(2)
        )
        self.log_constants = torch.full((2,), math.nan, device=device)
        """Normalising constants log Z of the student's and the teacher's scores; NaN until the
        first update."""
        self._constants_known = False  # a Python flag, so that a GPU is not waited for
        self._set_classes(torch.arange(images) if labels is None else labels)

    def _set_classes(self, labels: Tensor) -> None:
        device = self.student.device
        _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise ValueError("labels must be of 2 classes or more, got 1")
        self._classes, self._counts = classes.to(device), counts.to(device)
        self._starts = self._counts.cumsum(0) - self._counts
        self._by_class = self._classes.argsort(stable=True)

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that training changes, not copied."""
        return {
            "student": self.student, "teacher": self.teacher, "log_constants": self.log_constants
        }  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors that training changes."""
        return {name: tensor.clone() for name, tensor in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: Names or shapes that differ from those of this memory.
        """
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        expected = {name: list(tensor.shape) for name, tensor in self.state.items()}
        if shapes != expected:
            raise ValueError(f"state must be of {expected}, got {shapes}")
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self._constants_known = not bool(self.log_constants.isnan().any())

    def to(self, device: torch.device | str | int) -> ContrastiveMemory:
        """Move the tensors to `device` in place and return self."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def draw(
        self, indices: Tensor, *, negatives: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw the negatives of each image of a batch, with replacement.

        Args:
            indices: Image of each row of the batch, `[batch]`, each at most once.
            negatives: Number of negatives a row, at least 1.
            generator: Random generator, used on its own device.

        Returns:
            Indices `[batch, 1 + negatives]`, each row's own image first.

        Raises:
            ValueError: Number of negatives out of range; on the CPU, an index out of range or
                given twice.
            TypeError: Indices that are not int64.
        """
        if negatives < 1:
            raise ValueError(f"negatives must be >= 1, got {negatives}")
        _check_indices(indices, len(self.student))
        device = self.student.device
        indices = indices.to(device, non_blocking=True)
        shape = (len(indices), negatives)
        source = device if generator is None else generator.device
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=source)
        own = self._classes[indices]
        count, start = self._counts[own][:, None], self._starts[own][:, None]
        # a position among all images sorted by class, skipping those of the row's own class
        uniform = uniform.to(device, non_blocking=True)
        position = (uniform * (len(self.student) - count)).long()
        others = self._by_class[position + count * (position >= start)]
        return torch.cat([indices[:, None], others], dim=1)

    @torch.no_grad()
    def update(
        self, student_embeddings: Tensor, teacher_embeddings: Tensor, contrast: Tensor
    ) -> None:
        """Move the rows of a batch towards its embeddings; the first call also fixes Z.

            row = unit(momentum row + (1 - momentum) unit(embedding))

        To be called after the backward pass, which reads the rows.

        Args:
            student_embeddings: Embeddings `[batch, dim]`.
            teacher_embeddings: Embeddings `[batch, dim]`.
            contrast: Result of `draw` for the batch.

        Raises:
            ValueError, TypeError: Same as `crd_loss`.
        """
        embeddings = _embeddings(student_embeddings, teacher_embeddings, self, contrast)
        if not self._constants_known:
            scores = _scores(*embeddings, self, contrast)
            self.log_constants.copy_(_log_constants(scores, len(self.student)))
            self._constants_known = True
        indices = contrast[:, 0]
        for bank, rows in zip((self.student, self.teacher), embeddings, strict=True):
            mixed = self.momentum * bank[indices] + (1 - self.momentum) * rows
            bank.index_copy_(0, indices, unit(mixed).to(bank.dtype))


def crd_loss(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    memory: ContrastiveMemory,
    contrast: Tensor,
) -> Tensor:
    """Contrastive representation distillation: noise-contrastive estimation of matching images.

        - mean over the batch of [log h_0 + sum_k log(1 - h_k)]        h = P / (P + negatives / n)
        P_k = exp(<unit(x), row_k> / T) / Z        n = number of images

    with x of the student and rows of the teacher, plus the same the other way round. k = 0 is the
    image itself, k >= 1 are the negatives. Z is n times the mean of exp over the first batch, and
    is then kept. Follows the authors' code, without its 1e-7, so that published weights hold here,
    though it is a sum over negatives: with more of them it is larger. The memory is only read here;
    `memory.update` changes it.

    Args:
        student_embeddings: Embeddings `[batch, dim]`, from a `Projection` of the student's
            features.
        teacher_embeddings: Embeddings `[batch, dim]`, from a `Projection` of the teacher's
            features. They do get a gradient, since the paper trains both projections: detach the
            features before projecting them, or the embeddings if the projection is fixed.
        memory: Memory bank with rows `[n, dim]`, T and Z.
        contrast: Result of `memory.draw` for the batch.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: Shapes that do not match.
        TypeError: Embeddings that are not floating point, indices that are not int64.

    >>> memory = ContrastiveMemory(6, 4)
    >>> contrast = memory.draw(torch.tensor([0, 1]), negatives=3)
    >>> crd_loss(torch.zeros(2, 4), torch.zeros(2, 4), memory, contrast)  # P = 1 / n
    tensor(4.4987)

    Reference:
        Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020,
        https://arxiv.org/abs/1910.10699
    """
    embeddings = _embeddings(student_embeddings, teacher_embeddings, memory, contrast)
    scores = _scores(*embeddings, memory, contrast)
    images, negatives = len(memory.student), contrast.shape[1] - 1
    known = memory.log_constants.to(scores.dtype)
    log_z = torch.where(known.isnan(), _log_constants(scores.detach(), images), known)
    log_odds = scores - log_z[:, None, None] - math.log(negatives / images)
    log_h, log_not_h = F.logsigmoid(log_odds[..., 0]), F.logsigmoid(-log_odds[..., 1:])
    return -(log_h + log_not_h.sum(dim=-1)).mean(dim=-1).sum()


def _scores(
    student: Tensor, teacher: Tensor, memory: ContrastiveMemory, contrast: Tensor
) -> Tensor:
    """Scores `<unit(x), row> / T` of student and teacher, `[2, batch, 1 + negatives]`."""
    scores = [
        _products(anchors, bank.to(anchors.dtype), contrast)
        for anchors, bank in ((student, memory.teacher), (teacher, memory.student))
    ]
    return torch.stack(scores) / memory.temperature


def _products(anchors: Tensor, bank: Tensor, contrast: Tensor) -> Tensor:
    """Dot products of each anchor with its rows of the bank, the way that takes less memory."""
    with torch.autocast(anchors.device.type, enabled=False):
        if len(bank) <= contrast.shape[1] * bank.shape[1]:
            return (anchors @ bank.t()).gather(1, contrast)
        return torch.bmm(bank[contrast], anchors[..., None])[..., 0]


def _log_constants(scores: Tensor, images: int) -> Tensor:
    """Log Z of student and teacher, `[2]`: n times the mean of the exponentials."""
    scores = scores.flatten(start_dim=1)
    return torch.logsumexp(scores, dim=1) + math.log(images / scores.shape[1])


def _embeddings(
    student: Tensor, teacher: Tensor, memory: ContrastiveMemory, contrast: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the checked embeddings as unit vectors, neither detached."""
    named = {"student_embeddings": student, "teacher_embeddings": teacher}
    expected = [len(contrast), memory.student.shape[1]]
    for name, embeddings in named.items():
        check_floating(name, embeddings)
        if list(embeddings.shape) != expected:
            raise ValueError(f"{name} must be {expected}, got {list(embeddings.shape)}")
    if contrast.dtype != torch.int64:
        raise TypeError(f"contrast must be indices of torch.int64, got {contrast.dtype}")
    if contrast.ndim != 2 or contrast.shape[1] < 2 or not len(contrast):
        raise ValueError(
            f"contrast must be [batch, 1 + negatives], as draw returns, got {list(contrast.shape)}"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return unit(student.to(dtype)), unit(teacher.to(dtype))


def _check_indices(indices: Tensor, images: int) -> None:
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be torch.int64, got {indices.dtype}")
    if indices.ndim != 1 or not len(indices):
        raise ValueError(f"indices must be [batch], got {list(indices.shape)}")
    if indices.device.type != "cpu":  # a GPU is not waited for
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= images:
        raise ValueError(f"indices must be in [0, {images}), got {low if low < 0 else high}")
    if len(torch.unique(indices)) < len(indices):
        raise ValueError(f"indices must have each image at most once, got {indices.tolist()}")
