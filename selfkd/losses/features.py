"""Distillation of what is inside: feature maps, relations within a batch, tokens, attention.

Each loss is a mean over the batch in float32 or wider, in autocast too. The teacher's tensors are
detached; only `crd_loss` says otherwise. Gradients are finite also where a tensor is 0.
`selfkd.layers.Features` captures what these losses compare.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 1e-12
"""Magnitudes below it count as 0, so that a division has a bounded gradient."""
_LEAST_KERNEL = 1e-7


class Projection(nn.Module):
    """A learned linear map from the student's channels to the teacher's.

    A 1x1 convolution of maps, a linear layer of vectors and tokens, with the same parameters. They
    are the caller's to optimise: give `projection.parameters()` to the student's optimiser.

    Args:
        student_channels: of the features that it is given.
        teacher_channels: of the features that it returns.

    >>> projection = Projection(16, 64)
    >>> projection(torch.zeros(2, 16, 8, 8)).shape, projection(torch.zeros(2, 5, 16)).shape
    (torch.Size([2, 64, 8, 8]), torch.Size([2, 5, 64]))

    Reference:
        Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, https://arxiv.org/abs/1412.6550
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(student_channels, teacher_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[batch, channels, height, width]`, `[batch, channels]` or `[batch, tokens, width]`.

        Raises:
            ValueError: features of another number of dimensions or channels.
        """
        weight, bias = self.linear.weight, self.linear.bias
        if features.ndim not in (2, 3, 4):
            raise ValueError(
                "features must be [batch, channels], [batch, tokens, width] or "
                f"[batch, channels, height, width], got {list(features.shape)}"
            )
        channels = features.shape[1 if features.ndim == 4 else -1]
        if channels != weight.shape[1]:
            raise ValueError(f"features must have {weight.shape[1]} channels, got {channels}")
        if features.ndim == 4:
            return F.conv2d(features, weight[:, :, None, None], bias)
        return F.linear(features, weight, bias)


def reconcile(student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
    """Pool the larger map to the size of the smaller, by adaptive average; each side by itself.

    Args:
        student_features: `[batch, channels, height, width]`.
        teacher_features: the same, with channels and sizes of its own.

    Returns:
        Both, of the lesser height and the lesser width.

    Raises:
        ValueError: features that are no maps.

    >>> student, teacher = reconcile(torch.zeros(2, 3, 8, 4), torch.zeros(2, 5, 4, 4))
    >>> student.shape, teacher.shape
    (torch.Size([2, 3, 4, 4]), torch.Size([2, 5, 4, 4]))
    """
    _check_maps(student_features, teacher_features)
    height = min(student_features.shape[2], teacher_features.shape[2])
    width = min(student_features.shape[3], teacher_features.shape[3])
    student, teacher = (
        features
        if features.shape[2:] == (height, width)
        else F.adaptive_avg_pool2d(features, (height, width))
        for features in (student_features, teacher_features)
    )
    return student, teacher


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared error of features.

        mean (F_s - F_t)^2

    over all elements; the paper takes half the sum over a sample's.

    Args:
        student_features: `[batch, ...]`, after a `Projection` to the teacher's channels and, of
            maps, `reconcile`.
        teacher_features: of the same shape. Never gets a gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes that do not match.
        TypeError: features that are not floating point.

    >>> hint_loss(torch.zeros(2, 3), torch.full((2, 3), 2.0))
    tensor(4.)

    Reference:
        Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, https://arxiv.org/abs/1412.6550
    """
    student, teacher = _pair(student_features, teacher_features)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_features must be {list(teacher.shape)} as teacher_features are, got "
            f"{list(student.shape)}: Projection maps channels, reconcile pools heights and widths"
        )
    return F.mse_loss(student, teacher)


def attention_transfer(
    student_features: Tensor, teacher_features: Tensor, *, power: float = 2
) -> Tensor:
    """Attention transfer: where, not what, the channels respond.

        mean over batch and positions of (q_s - q_t)^2
        q = a / ||a||_2        a = sum_c |F_c|^power, flattened over positions

    the mean that the authors' code takes, at most 2 / positions; the paper has ||q_s - q_t||_2.
    The maps a of different sizes are pooled to the smaller (see `reconcile`). A map of zeros has
    q = 0.

    Args:
        student_features: `[batch, channels, height, width]`.
        teacher_features: the same, with channels and sizes of its own. Never gets a gradient.
        power: at least 1, as |F|^power has no finite gradient at 0 below.

    Returns:
        Scalar.

    Raises:
        ValueError: a power out of range, features that are no maps or not of one batch.
        TypeError: features that are not floating point.

    >>> features = torch.rand(2, 3, 8, 8)
    >>> attention_transfer(features, 8 * features)
    tensor(0.)
    >>> attention_transfer(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, 0.0]]]]), power=1)
    tensor(0.4000)

    Reference:
        Zagoruyko, Komodakis, "Paying More Attention to Attention", 2017,
        https://arxiv.org/abs/1612.03928
    """
    if not 1 <= power < math.inf:
        raise ValueError(f"power must be at least 1 and finite, got {power}")
    student, teacher = _pair(student_features, teacher_features)
    _check_maps(student, teacher)
    maps = reconcile(_attention_map(student, power), _attention_map(teacher, power))
    student, teacher = (_unit(a.flatten(start_dim=1)) for a in maps)
    return F.mse_loss(student, teacher)


def similarity_preserving(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity-preserving distillation: which samples of a batch excite the network alike.

        ||G_s - G_t||_F^2 / batch^2        G = A A^T, each row by its L2 norm, A = [batch, -1]

    A row of zeros stays one. Depends on how a batch is split.

    Args:
        student_features: `[batch, ...]`.
        teacher_features: `[batch, ...]`, of any other sizes. Never gets a gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: features of different batches.
        TypeError: features that are not floating point.

    >>> similarity_preserving(torch.eye(2), 3 * torch.eye(2))
    tensor(0.)
    >>> similarity_preserving(torch.eye(2), torch.ones(2, 5))
    tensor(0.2929)

    Reference:
        Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019,
        https://arxiv.org/abs/1907.09682
    """
    student, teacher = _pair(student_features, teacher_features)
    student, teacher = (
        _unit(_gram(features.flatten(start_dim=1), _largest(features)))
        for features in (student, teacher)
    )
    return F.mse_loss(student, teacher)


def pkt(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Probabilistic knowledge transfer: of each sample, which others are its neighbours.

        mean_i KL(p_t(.|i) || p_s(.|i))        p(j|i) = K_ij / sum_{k != i} K_ik,  j != i
        K_ij = (1 + cos(x_i, x_j)) / 2 + 1e-7

    as the paper; the authors' code also counts j = i, and divides by batch^2. A vector of zeros has
    cos = 0. Depends on how a batch is split.

    Args:
        student_features: `[batch, ...]`.
        teacher_features: `[batch, ...]`, of any other sizes. Never gets a gradient.

    Returns:
        Scalar, in nats; 0 for a batch of 1 or 2.

    Raises:
        ValueError: features of different batches.
        TypeError: features that are not floating point.

    >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> pkt(features, 5 * features)
    tensor(0.)
    >>> pkt(features, torch.ones(3, 4))
    tensor(4.6796)

    Reference:
        Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
        2018, https://arxiv.org/abs/1803.10837
    """
    student, teacher = _pair(student_features, teacher_features)
    loss: Tensor = _Pkt.apply(student.flatten(start_dim=1), teacher.flatten(start_dim=1))
    return loss


class ContrastiveMemory:
    """What `crd_loss` remembers: an embedding of each image by student and by teacher.

    A step draws, computes the loss, and updates after the backward pass:

        contrast = memory.draw(indices, negatives=16384, generator=generator)
        loss = crd_loss(student_embeddings, teacher_embeddings, memory, contrast)
        loss.backward()
        memory.update(student_embeddings, teacher_embeddings, contrast)

    `state_dict` has all that a run changes. The generator that is drawn from is the caller's.

    Args:
        images: how many there are.
        dim: of the embeddings.
        labels: class of each image `[images]`; with them negatives are images of other classes,
            without them any other images.
        temperature: T, above 0.
        momentum: share of the old row that an update keeps, in [0, 1).
        generator: of the first rows, drawn on its device.

    Raises:
        ValueError: a setting out of range, labels that are not one an image or all the same.

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
        """log Z of the student's and of the teacher's scores; NaN until the first update."""
        self._fixed = False  # known without waiting for a GPU
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
        """The tensors that a run changes, not copied."""
        return {
            "student": self.student, "teacher": self.teacher, "log_constants": self.log_constants
        }  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors that a run changes."""
        return {name: tensor.clone() for name, tensor in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: other names or shapes than this memory has.
        """
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        expected = {name: list(tensor.shape) for name, tensor in self.state.items()}
        if shapes != expected:
            raise ValueError(f"state must be of {expected}, got {shapes}")
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self._fixed = not bool(self.log_constants.isnan().any())

    def to(self, device: torch.device | str | int) -> ContrastiveMemory:
        """Move to `device` in place and return itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def draw(
        self, indices: Tensor, *, negatives: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw the images that each image of a batch is compared with, with replacement.

        Args:
            indices: which image each row of the batch is, `[batch]`, each at most once.
            negatives: how many a row, at least 1.
            generator: drawn from on its own device.

        Returns:
            Indices `[batch, 1 + negatives]`, a row's own image first.

        Raises:
            ValueError: `negatives` out of range; on the CPU, an index out of range or twice.
            TypeError: indices that are not int64.
        """
        if negatives < 1:
            raise ValueError(f"negatives must be >= 1, got {negatives}")
        _check_indices(indices, len(self.student))
        device = self.student.device
        indices = indices.to(device)
        shape = (len(indices), negatives)
        source = device if generator is None else generator.device
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=source)
        own = self._classes[indices]
        count, start = self._counts[own][:, None], self._starts[own][:, None]
        # a place among all images sorted by class, those of the own class left out
        place = (uniform.to(device) * (len(self.student) - count)).long()
        others = self._by_class[place + count * (place >= start)]
        return torch.cat([indices[:, None], others], dim=1)

    @torch.no_grad()
    def update(
        self, student_embeddings: Tensor, teacher_embeddings: Tensor, contrast: Tensor
    ) -> None:
        """Move the rows of a batch towards its embeddings; the first time, fix the constants Z.

            row = unit(momentum row + (1 - momentum) unit(embedding))

        Call it after the backward pass, which reads the rows.

        Args:
            student_embeddings: `[batch, dim]`.
            teacher_embeddings: `[batch, dim]`.
            contrast: what `draw` returned.

        Raises:
            ValueError, TypeError: as `crd_loss`.
        """
        embeddings = _embeddings(student_embeddings, teacher_embeddings, self, contrast)
        if not self._fixed:
            scores = _scores(*embeddings, self, contrast)
            self.log_constants.copy_(_log_constants(scores, len(self.student)))
            self._fixed = True
        indices = contrast[:, 0]
        for bank, rows in zip((self.student, self.teacher), embeddings, strict=True):
            mixed = self.momentum * bank[indices] + (1 - self.momentum) * rows
            bank.index_copy_(0, indices, _unit(mixed).to(bank.dtype))


def crd_loss(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    memory: ContrastiveMemory,
    contrast: Tensor,
) -> Tensor:
    """Contrastive representation distillation: noise-contrastive estimation of the same image.

        - mean over the batch of [log h_0 + sum_k log(1 - h_k)]        h = P / (P + negatives / n)
        P_k = exp(<unit(x), row_k> / T) / Z        n = number of images

    with x of the student and rows of the teacher, plus the same the other way round. k = 0 is the
    image itself, k >= 1 are the negatives. Z is n times the mean of exp over the first batch, then
    kept. As the authors' code, without its 1e-7. Changes nothing: `memory.update` does.

    Args:
        student_embeddings: `[batch, dim]`, of a `Projection` of the student's features.
        teacher_embeddings: `[batch, dim]`, of a `Projection` of the teacher's. Here the gradient
            does pass, as the paper learns both maps: detach the features before they are
            projected, or the embeddings where the map is not to be learned.
        memory: of rows `[n, dim]`, T and Z.
        contrast: what `memory.draw` returned for the batch.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: shapes that do not match.
        TypeError: embeddings that are not floating point, indices that are not int64.

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
    stored = memory.log_constants.to(scores.dtype)
    log_z = torch.where(stored.isnan(), _log_constants(scores.detach(), images), stored)
    log_odds = scores - log_z[:, None, None] - math.log(negatives / images)
    log_h, log_not_h = F.logsigmoid(log_odds[..., 0]), F.logsigmoid(-log_odds[..., 1:])
    return -(log_h + log_not_h.sum(dim=-1)).mean(dim=-1).sum()


def every_other(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer for each of the student's, evenly spaced and ending with the last.

        (i + 1) teacher_layers / student_layers - 1        i = 0, 1, ...

    Args:
        student_layers: how many, at least 1.
        teacher_layers: how many, a multiple of `student_layers`.

    Returns:
        Indices of the teacher's layers, counted from 0.

    Raises:
        ValueError: no such map.

    >>> every_other(6, 12)
    [1, 3, 5, 7, 9, 11]

    Reference:
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020,
        https://arxiv.org/abs/1909.10351
    """
    if student_layers < 1 or teacher_layers < 1 or teacher_layers % student_layers:
        raise ValueError(
            f"teacher_layers must be a multiple of student_layers ({student_layers}), "
            f"got {teacher_layers}: give a layer_map"
        )
    step = teacher_layers // student_layers
    return [(layer + 1) * step - 1 for layer in range(student_layers)]


def hidden_state_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    *,
    layer_map: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared error of hidden states, layer by layer.

        mean over layers i, valid tokens and width of (H_s[i] - H_t[layer_map[i]])^2

    TinyBERT adds the layers up: multiply by their number for that.

    Args:
        student_states: `[batch, tokens, width]` of each layer, embeddings left out or mapped too.
        teacher_states: the same, of more layers. Never gets a gradient.
        layer_map: for each state of the student the index of the teacher's; none is `every_other`.
        mask: `[batch, tokens]`, bool or integer, 0 where a token is padding. What stands there
            is not read, be it NaN.

    Returns:
        Scalar; 0 where no token is valid.

    Raises:
        ValueError: an impossible map, shapes that do not match.
        TypeError: states that are not floating point, a mask that is.

    >>> states = [torch.full((1, 3, 2), float(layer)) for layer in range(4)]
    >>> hidden_state_loss(states[:2], states)  # 0 with 1, 1 with 3
    tensor(2.5000)

    Reference:
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020,
        https://arxiv.org/abs/1909.10351
    """
    if layer_map is None:
        layer_map = every_other(len(student_states), len(teacher_states))
    if not student_states or len(layer_map) != len(student_states):
        raise ValueError(
            f"layer_map must have one layer for each of the student's {len(student_states)}, "
            f"at least 1, got {len(layer_map)}"
        )
    if not all(0 <= layer < len(teacher_states) for layer in layer_map):
        raise ValueError(
            f"layer_map must be of layers in [0, {len(teacher_states)}), got {list(layer_map)}"
        )
    losses = (
        _token_mean_square(student, teacher_states[layer], mask)
        for student, layer in zip(student_states, layer_map, strict=True)
    )
    # one by one, so that in the backward pass a layer's gradient is added while it is in cache
    return functools.reduce(operator.add, losses) / len(student_states)


def cosine_embedding(
    student_hidden: Tensor, teacher_hidden: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Distance in direction of hidden states.

        mean over valid tokens of 1 - cos(h_s, h_t)

    The cosine with a vector of zeros is 0.

    Args:
        student_hidden: `[batch, tokens, width]`, or `[batch, width]`.
        teacher_hidden: of the same shape. Never gets a gradient.
        mask: `[batch, tokens]`, or `[batch]`, bool or integer, 0 where a token is padding. What
            stands there is not read, be it NaN.

    Returns:
        Scalar in [0, 2]; 0 where no token is valid.

    Raises:
        ValueError: shapes that do not match.
        TypeError: states that are not floating point, a mask that is.

    >>> cosine_embedding(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0]] * 2))
    tensor(0.6464)

    Reference:
        Sanh et al., "DistilBERT, a distilled version of BERT", 2019,
        https://arxiv.org/abs/1910.01108
    """
    student, teacher, valid = _tokens(student_hidden, teacher_hidden, mask)
    cosines = (student * teacher).sum(dim=-1)
    for states in (student, teacher):  # backward is faster than that of a norm
        cosines = cosines * states.square().sum(dim=-1).clamp_min(_LEAST**2).rsqrt()
    return _mean_of_valid(1 - cosines, valid)


def attention_matrices(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of attention matrices.

        mean over the batch's valid pairs (query, key), and over heads, of (A_s - A_t)^2

    that is ||A_s - A_t||_F^2 of each head by tokens^2 where all are valid. Where the numbers of
    heads differ, the mean over heads is compared.

    Args:
        student: `[batch, heads, tokens, tokens]`, scores before the softmax as TinyBERT has, or
            probabilities. Scores of -inf are for masked tokens only.
        teacher: the same, with heads of its own. Never gets a gradient.
        mask: `[batch, tokens]`, bool or integer, 0 where a token is padding. Its rows and columns
            are not read, be they NaN.

    Returns:
        Scalar; 0 where no token is valid.

    Raises:
        ValueError: shapes that do not match.
        TypeError: matrices that are not floating point, a mask that is.

    >>> attention_matrices(torch.eye(2)[None, None], torch.zeros(1, 3, 2, 2))
    tensor(0.5000)

    Reference:
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020,
        https://arxiv.org/abs/1909.10351
    """
    named = {"student": student, "teacher": teacher}
    for name, matrices in named.items():
        if matrices.ndim != 4 or matrices.shape[2] != matrices.shape[3]:
            raise ValueError(
                f"{name} must be [batch, heads, tokens, tokens], got {list(matrices.shape)}"
            )
    student, teacher = _wide(named)
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student must have {teacher.shape[2]} tokens as teacher has, got {student.shape[2]}"
        )
    valid = _valid(mask, (len(student), student.shape[3]), student.device)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (a.mean(dim=1, keepdim=True) for a in (student, teacher))
    difference = student - teacher
    if valid is not None:
        valid = (valid[:, None, :, None] & valid[:, None, None, :]).expand_as(difference)
        difference = difference.masked_fill(~valid, 0.0)
    return _mean_of_valid(difference.square(), valid)


def _attention_map(features: Tensor, power: float) -> Tensor:
    """`sum_c |F_c|^power` times a constant of each sample, `[batch, 1, height, width]`."""
    if power == 2:  # up to 3 times as fast on a CPU
        return _scaled(features.square().sum(dim=1, keepdim=True), (2, 3), _LEAST**2)
    norms = torch.linalg.vector_norm(features, power, dim=1, keepdim=True)
    return _scaled(norms, (2, 3)).pow(power)


class _Pkt(torch.autograd.Function):
    """`pkt` of rows, with its gradient written out: half as many operations."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        units, norms = _units_and_norms(student)
        kernel = _kernel(units)
        p_s, p_t = (_shares(k) for k in (kernel, _kernel(_unit(teacher))))
        ctx.save_for_backward(student, units, norms, kernel, p_t)
        return (p_t * (p_t / p_s).log()).sum(dim=1).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        student, units, norms, kernel, p_t = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated in turn
            units, norms = _units_and_norms(student)
            kernel = _kernel(units)
        batch = len(units)
        sums = kernel.sum(dim=1, keepdim=True).clamp_min(_LEAST_KERNEL)
        pull = (1 / sums - p_t / kernel) * (grad / batch)
        pull = F.pad(pull.reshape(batch - 1, batch), (0, 1)).flatten()
        pull = F.pad(pull, (1, 0)).view(batch, batch)  # 0 where i = j
        with torch.autocast(units.device.type, enabled=False):
            pull = (pull + pull.t()) @ units
        return (pull - (units * pull).sum(dim=-1, keepdim=True) * units) / norms, None


def _kernel(units: Tensor) -> Tensor:
    """Twice the kernel of each row with each other one, `[batch, batch - 1]`."""
    with torch.autocast(units.device.type, enabled=False):
        cosines = units @ units.t()
    batch = len(cosines)
    others = cosines.flatten()[1:].view(batch - 1, batch + 1)[:, :-1].reshape(batch, batch - 1)
    return others.clamp(min=-1).add_(1).add_(2 * _LEAST_KERNEL)


def _shares(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum(dim=1, keepdim=True).clamp_min(_LEAST_KERNEL)


class _Gram(torch.autograd.Function):
    """`(A / c) (A / c)^T` with one product backward, where `A @ A.t()` has two."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, by: Tensor | None) -> Tensor:
        scaled = vectors if by is None else vectors / by
        ctx.save_for_backward(vectors, scaled, by)
        return scaled @ scaled.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        vectors, scaled, by = ctx.saved_tensors
        pull = grad + grad.t()
        if by is not None:
            pull = pull / by
            if torch.is_grad_enabled():  # to be differentiated in turn
                scaled = vectors / by
        with torch.autocast(vectors.device.type, enabled=False):
            return pull @ scaled, None


def _gram(vectors: Tensor, by: Tensor | None = None) -> Tensor:
    """Products of all pairs of rows, each row divided by a constant."""
    with torch.autocast(vectors.device.type, enabled=False):
        product: Tensor = _Gram.apply(vectors, by)
    return product


def _scaled(values: Tensor, dims: tuple[int, ...], least: float = _LEAST) -> Tensor:
    """By the largest magnitude, a constant to the gradient, so that no power over- or underflows.

    Only for what is normalised afterwards, where the scale has no part in value and gradient.
    """
    return values / values.detach().abs().amax(dims, keepdim=True).clamp_min(least)


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude, a constant to the gradient, for the same purpose."""
    low, high = torch.aminmax(values.detach())
    return torch.maximum(-low, high).clamp_min(_LEAST)


def _unit(vectors: Tensor) -> Tensor:
    """Rows by their L2 norm; those of zeros stay."""
    return _units_and_norms(vectors)[0]


def _units_and_norms(vectors: Tensor) -> tuple[Tensor, Tensor]:
    largest = vectors.detach().abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    scaled = vectors / largest  # of norm >= 1, unless nearly 0
    norms = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp_min(0.5)
    return scaled / norms, largest * norms


def _scores(
    student: Tensor, teacher: Tensor, memory: ContrastiveMemory, contrast: Tensor
) -> Tensor:
    """`<unit(x), row> / T` of the student's and of the teacher's, `[2, batch, 1 + negatives]`."""
    scores = [
        _products(anchors, bank.to(anchors.dtype), contrast)
        for anchors, bank in ((student, memory.teacher), (teacher, memory.student))
    ]
    return torch.stack(scores) / memory.temperature


def _products(anchors: Tensor, bank: Tensor, contrast: Tensor) -> Tensor:
    """Of each anchor with its rows of the bank, the way that takes less memory."""
    with torch.autocast(anchors.device.type, enabled=False):
        if len(bank) <= contrast.shape[1] * bank.shape[1]:
            return (anchors @ bank.t()).gather(1, contrast)
        return torch.bmm(bank[contrast], anchors[..., None])[..., 0]


def _log_constants(scores: Tensor, images: int) -> Tensor:
    """`log Z`, two of them: n times the mean of the exponentials."""
    scores = scores.flatten(start_dim=1)
    return torch.logsumexp(scores, dim=1) + math.log(images / scores.shape[1])


def _embeddings(
    student: Tensor, teacher: Tensor, memory: ContrastiveMemory, contrast: Tensor
) -> tuple[Tensor, Tensor]:
    """Return unit vectors, checked; neither detached."""
    named = {"student_embeddings": student, "teacher_embeddings": teacher}
    expected = [len(contrast), memory.student.shape[1]]
    for name, embeddings in named.items():
        _check_floating(name, embeddings)
        if list(embeddings.shape) != expected:
            raise ValueError(f"{name} must be {expected}, got {list(embeddings.shape)}")
    if contrast.dtype != torch.int64:
        raise TypeError(f"contrast must be indices of torch.int64, got {contrast.dtype}")
    if contrast.ndim != 2 or contrast.shape[1] < 2 or not len(contrast):
        raise ValueError(
            f"contrast must be [batch, 1 + negatives], as draw returns, got {list(contrast.shape)}"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return _unit(student.to(dtype)), _unit(teacher.to(dtype))


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


def _token_mean_square(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    student, teacher, valid = _tokens(student, teacher, mask)
    if valid is None:
        return F.mse_loss(student, teacher)
    total = F.mse_loss(student, teacher, reduction="sum")
    return total / (student.shape[-1] * valid.sum().clamp_min(1))


def _tokens(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both, checked and wide, 0 where they are not valid, and which are."""
    student, teacher = _wide({"student_hidden": student, "teacher_hidden": teacher})
    if student.shape != teacher.shape or student.ndim not in (2, 3):
        raise ValueError(
            "student's states must be [batch, tokens, width] as the teacher's "
            f"{list(teacher.shape)}, got {list(student.shape)}: Projection maps widths"
        )
    valid = _valid(mask, student.shape[:-1], student.device)
    if valid is not None:
        student, teacher = (
            states.masked_fill(~valid[..., None], 0.0) for states in (student, teacher)
        )
    return student, teacher, valid


def _valid(mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    if mask.is_floating_point():
        raise TypeError(f"mask must be bool or integer, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask must be {list(shape)}, got {list(mask.shape)}")
    return mask.to(device).bool()


def _mean_of_valid(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean()
    return values.masked_fill(~valid, 0.0).sum() / valid.sum().clamp_min(1)


def _check_maps(student_features: Tensor, teacher_features: Tensor) -> None:
    for name, features in _named(student_features, teacher_features).items():
        if features.ndim != 4 or not features.numel():
            raise ValueError(
                f"{name} must be [batch, channels, height, width], got {list(features.shape)}"
            )


def _named(student_features: Tensor, teacher_features: Tensor) -> dict[str, Tensor]:
    return {"student_features": student_features, "teacher_features": teacher_features}


def _pair(student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
    return _wide(_named(student_features, teacher_features))


def _wide(named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return student and teacher of one batch in float32 or wider, the teacher detached."""
    for name, tensor in named.items():
        _check_floating(name, tensor)
        if tensor.ndim < 2 or not tensor.numel():
            raise ValueError(f"{name} must be [batch, ...] and not empty, got {list(tensor.shape)}")
    (student_name, student), (teacher_name, teacher) = named.items()
    if len(student) != len(teacher):
        raise ValueError(
            f"{teacher_name} must have a batch of {len(student)} as {student_name} has, "
            f"got {len(teacher)}"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    teacher = teacher.detach()
    if student.dtype != dtype or teacher.dtype != dtype:  # a call that does nothing takes time too
        student, teacher = student.to(dtype), teacher.to(dtype)
    return student, teacher


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
