"""Distillation losses of intermediate features: feature maps, similarities, tokens, attention.

Each loss is a mean over the batch in float32 or wider, in autocast too. The teacher's tensors are
detached. A row of zeros, which has no direction, gets no gradient where rows are normalised.
`selfkd.distill.features.Features` captures the features that these losses compare.
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

from selfkd.losses.distillation import check_floating

_MIN_MAGNITUDE = 1e-12
"""Magnitude below which a value counts as 0."""
_MIN_KERNEL = 1e-7


class Projection(nn.Module):
    """A trained linear map from the student's channels to the teacher's.

    A 1x1 convolution of feature maps, a linear layer of vectors and tokens, with the same
    parameters. The caller trains them: give `projection.parameters()` to the student's optimiser.

    Args:
        student_channels: Channels of the input features.
        teacher_channels: Channels of the output features.

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
            ValueError: Features of another number of dimensions or channels.
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
    """Pool the larger feature map to the size of the smaller by adaptive average pooling.

    Height and width are treated separately.

    Args:
        student_features: Features `[batch, channels, height, width]`.
        teacher_features: Features of the same layout, of any channels and sizes.

    Returns:
        Both features, with the smaller height and the smaller width.

    Raises:
        ValueError: Features that are not feature maps.

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

    over all elements. The paper's half sum over the elements of a sample is `elements / 2` times
    this: its weight beta is `beta * elements / 2` here. Of `MSELoss()`, as in RepDistiller,
    published weights hold here.

    Args:
        student_features: Features `[batch, ...]`, after a `Projection` to the teacher's channels
            and, for feature maps, `reconcile`.
        teacher_features: Features of the same shape. Never gets a gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that do not match.
        TypeError: Features that are not floating point.

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

    This is the mean of the authors' code, at most 2 / positions, so that published weights hold
    here. The paper has ||q_s - q_t||_2, not squared, of a sample: `sqrt(positions / loss)` times
    this, so that no weight here is that of the paper's formula throughout.

    Attention maps a of different sizes are pooled to the smaller (see `reconcile`). A map of zeros
    has q = 0.

    Args:
        student_features: Features `[batch, channels, height, width]`.
        teacher_features: Features of the same layout, of any channels and sizes. Never gets a
            gradient.
        power: Exponent of |F|, at least 1: below 1 the gradient at 0 is not finite.

    Returns:
        Scalar.

    Raises:
        ValueError: A power out of range, or features that are not feature maps of one batch.
        TypeError: Features that are not floating point.

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
    student, teacher = (unit(a.flatten(start_dim=1)) for a in maps)
    return F.mse_loss(student, teacher)


def similarity_preserving(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity-preserving distillation: similarity of activations between samples of a batch.

        ||G_s - G_t||_F^2 / batch^2        G = A A^T, rows of L2 norm 1, A = [batch, -1]

    A row of zeros stays zero, and then gets a gradient from the other rows' similarities only. The
    loss depends on how a batch is split. Published weights hold here.

    Args:
        student_features: Features `[batch, ...]`.
        teacher_features: Features `[batch, ...]` of any sizes. Never gets a gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: Features of different batches.
        TypeError: Features that are not floating point.

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
        unit(_gram(features.flatten(start_dim=1), _max_magnitude(features)))
        for features in (student, teacher)
    )
    return F.mse_loss(student, teacher)


def pkt(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Probabilistic knowledge transfer (PKT): similarity distribution over the other samples.

        mean_i KL(p_t(.|i) || p_s(.|i))        p(j|i) = K_ij / sum_{k != i} K_ik,  j != i
        K_ij = (1 + cos(x_i, x_j)) / 2 + 1e-7

    The paper's sum over i is `batch` times this. The authors' code has the mean over batch^2, which
    is `1 / batch` times this (some percent less, as it counts j = i): a weight of 30,000 at a batch
    of 64 is 469 here. A vector of zeros has cos = 0 and no gradient. The loss depends on how a
    batch is split.

    Args:
        student_features: Features `[batch, ...]`.
        teacher_features: Features `[batch, ...]` of any sizes. Never gets a gradient.

    Returns:
        Scalar, in nats; 0 for a batch of 1 or 2.

    Raises:
        ValueError: Features of different batches.
        TypeError: Features that are not floating point.

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


def every_other(student_layers: int, teacher_layers: int) -> list[int]:
    """Evenly spaced layers of the teacher, one for each layer of the student, ending with the last.

        floor((i + 1) teacher_layers / student_layers) - 1        i = 0, 1, ...

    Where the teacher's number of layers is no multiple of the student's, the steps between layers
    differ by 1 at most.

    Args:
        student_layers: Number of the student's layers, at least 1.
        teacher_layers: Number of the teacher's layers, at least `student_layers`.

    Returns:
        Indices of the teacher's layers, counted from 0.

    Raises:
        ValueError: A teacher of fewer layers than the student, or a student of none.

    >>> every_other(6, 12), every_other(4, 6)
    ([1, 3, 5, 7, 9, 11], [0, 2, 3, 5])

    Reference:
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020,
        https://arxiv.org/abs/1909.10351
    """
    if student_layers < 1 or teacher_layers < student_layers:
        raise ValueError(
            f"teacher_layers must be at least student_layers ({student_layers}), which must be at "
            f"least 1, got {teacher_layers}"
        )
    return [(layer + 1) * teacher_layers // student_layers - 1 for layer in range(student_layers)]


def hidden_state_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    *,
    layer_map: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared error of hidden states, layer by layer.

        mean over layers i, valid tokens and width of (H_s[i] - H_t[layer_map[i]])^2

    TinyBERT's sum over layers is `layers` times this: its weight beta is `beta * layers` here.

    Args:
        student_states: Hidden states `[batch, tokens, width]` of each layer, the embeddings left
            out or mapped too.
        teacher_states: Hidden states of the same shape, of as many layers or more. Never gets a
            gradient.
        layer_map: Index of the teacher's state for each state of the student; `every_other` if not
            given.
        mask: Validity of each token `[batch, tokens]`, bool or integer, 0 for padding. Padding is
            not read, so that it may be NaN.

    Returns:
        Scalar; 0 if no token is valid.

    Raises:
        ValueError: An impossible map, or shapes that do not match.
        TypeError: States that are not floating point, or a mask that is.

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
    """Cosine distance of hidden states.

        mean over valid tokens of 1 - cos(h_s, h_t)

    Published weights hold here. DistilBERT's 5 KL + 2 CE + 1 cosine is alpha = 5 / 7 with a weight
    of 1 / 7.

    The cosine with a vector of zeros is 0, without a gradient.

    Args:
        student_hidden: Hidden states `[batch, tokens, width]`, or `[batch, width]`.
        teacher_hidden: Hidden states of the same shape. Never gets a gradient.
        mask: Validity of each token `[batch, tokens]`, or `[batch]`, bool or integer, 0 for
            padding. Padding is not read, so that it may be NaN.

    Returns:
        Scalar in [0, 2]; 0 if no token is valid.

    Raises:
        ValueError: Shapes that do not match.
        TypeError: States that are not floating point, or a mask that is.

    >>> cosine_embedding(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0]] * 2))
    tensor(0.6464)

    Reference:
        Sanh et al., "DistilBERT, a distilled version of BERT", 2019,
        https://arxiv.org/abs/1910.01108
    """
    student, teacher, valid = _tokens(student_hidden, teacher_hidden, mask)
    cosines = (student * teacher).sum(dim=-1)
    for states in (student, teacher):  # a faster backward pass than that of a norm
        squares = states.square().sum(dim=-1)
        cosines = cosines * squares.masked_fill(squares < _MIN_MAGNITUDE**2, math.inf).rsqrt()
    return _mean_of_valid(1 - cosines, valid)


def attention_matrices(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of attention matrices.

        mean over the batch's valid pairs (query, key), and over heads, of (A_s - A_t)^2

    which is ||A_s - A_t||_F^2 / tokens^2 of each head if all tokens are valid. If the numbers of
    heads differ, the means over heads are compared. Published weights hold here, one term a layer,
    since TinyBERT adds up its layers.

    Args:
        student: Attention matrices `[batch, heads, tokens, tokens]`: scores before the softmax, as
            in TinyBERT, or probabilities. Scores of -inf are for masked tokens only.
        teacher: Attention matrices of the same shape, with any number of heads. Never gets a
            gradient.
        mask: Validity of each token `[batch, tokens]`, bool or integer, 0 for padding. Rows and
            columns of padding are not read, so that they may be NaN.

    Returns:
        Scalar; 0 if no token is valid.

    Raises:
        ValueError: Shapes that do not match.
        TypeError: Matrices that are not floating point, or a mask that is.

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
    student, teacher = _in_float32(named)
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
    """Attention map `sum_c |F_c|^power` up to a factor a sample, `[batch, 1, height, width]`."""
    if power == 2:  # up to 3 times as fast on a CPU
        return _scale_down(features.square().sum(dim=1, keepdim=True), (2, 3), _MIN_MAGNITUDE**2)
    norms = torch.linalg.vector_norm(features, power, dim=1, keepdim=True)
    return _scale_down(norms, (2, 3)).pow(power)


class _Pkt(torch.autograd.Function):
    """PKT of rows with an analytic gradient, in half as many operations."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        units, norms = _units_and_norms(student)
        kernel = _kernel(units)
        p_s, p_t = (_neighbour_probabilities(k) for k in (kernel, _kernel(unit(teacher))))
        ctx.save_for_backward(student, units, norms, kernel, p_t)
        return (p_t * (p_t / p_s).log()).sum(dim=1).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        student, units, norms, kernel, p_t = ctx.saved_tensors
        if torch.is_grad_enabled():  # double backward
            units, norms = _units_and_norms(student)
            kernel = _kernel(units)
        batch = len(units)
        sums = kernel.sum(dim=1, keepdim=True).clamp_min(_MIN_KERNEL)
        grad_kernel = (1 / sums - p_t / kernel) * (grad / batch)
        grad_kernel = F.pad(grad_kernel.reshape(batch - 1, batch), (0, 1)).flatten()
        grad_kernel = F.pad(grad_kernel, (1, 0)).view(batch, batch)  # 0 where i = j
        with torch.autocast(units.device.type, enabled=False):
            grad_units = (grad_kernel + grad_kernel.t()) @ units
        radial = (units * grad_units).sum(dim=-1, keepdim=True) * units
        return (grad_units - radial) / norms, None


def _kernel(units: Tensor) -> Tensor:
    """Twice the kernel of each row with every other row, `[batch, batch - 1]`."""
    with torch.autocast(units.device.type, enabled=False):
        cosines = units @ units.t()
    batch = len(cosines)
    others = cosines.flatten()[1:].view(batch - 1, batch + 1)[:, :-1].reshape(batch, batch - 1)
    return others.clamp(min=-1).add_(1).add_(2 * _MIN_KERNEL)


def _neighbour_probabilities(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum(dim=1, keepdim=True).clamp_min(_MIN_KERNEL)


class _Gram(torch.autograd.Function):
    """Gram matrix `(A / c) (A / c)^T`, with one backward product where `A @ A.t()` has two."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, by: Tensor | None) -> Tensor:
        scaled = vectors if by is None else vectors / by
        ctx.save_for_backward(vectors, scaled, by)
        return scaled @ scaled.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        vectors, scaled, by = ctx.saved_tensors
        grad_product = grad + grad.t()
        if by is not None:
            grad_product = grad_product / by
            if torch.is_grad_enabled():  # double backward
                scaled = vectors / by
        with torch.autocast(vectors.device.type, enabled=False):
            return grad_product @ scaled, None


def _gram(vectors: Tensor, by: Tensor | None = None) -> Tensor:
    """Dot products of all pairs of rows, each row divided by a constant."""
    with torch.autocast(vectors.device.type, enabled=False):
        product: Tensor = _Gram.apply(vectors, by)
    return product


def _scale_down(values: Tensor, dims: tuple[int, ...], least: float = _MIN_MAGNITUDE) -> Tensor:
    """Divide by the largest magnitude, without a gradient, so that no power over- or underflows.

    Only for values that are normalised afterwards, so that the scale cancels out.
    """
    return values / values.detach().abs().amax(dims, keepdim=True).clamp_min(least)


def _max_magnitude(values: Tensor) -> Tensor:
    """Largest magnitude, without a gradient, as the divisor of values normalised afterwards."""
    low, high = torch.aminmax(values.detach())
    return torch.maximum(-low, high).clamp_min(_MIN_MAGNITUDE)


def unit(vectors: Tensor) -> Tensor:
    """Rows divided by their L2 norm; rows of zeros stay zero and get no gradient."""
    return _units_and_norms(vectors)[0]


def _units_and_norms(vectors: Tensor) -> tuple[Tensor, Tensor]:
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest < _MIN_MAGNITUDE, math.inf)
    scaled = vectors / largest  # of norm >= 1, unless 0
    # not `vector_norm`, whose second derivative at 0 is NaN
    norms = scaled.square().sum(dim=-1, keepdim=True).clamp_min(0.25).sqrt()
    return scaled / norms, largest * norms


def _token_mean_square(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    student, teacher, valid = _tokens(student, teacher, mask)
    if valid is None:
        return F.mse_loss(student, teacher)
    total = F.mse_loss(student, teacher, reduction="sum")
    return total / (student.shape[-1] * valid.sum().clamp_min(1))


def _tokens(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both checked states in float32 or wider, 0 at invalid tokens, and the validity."""
    student, teacher = _in_float32({"student_hidden": student, "teacher_hidden": teacher})
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
    return mask.to(device, non_blocking=True).bool()


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
    return _in_float32(_named(student_features, teacher_features))


def _in_float32(named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return checked tensors of student and teacher in float32 or wider, the teacher detached."""
    for name, tensor in named.items():
        check_floating(name, tensor)
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
    if student.dtype != dtype or teacher.dtype != dtype:  # a call without effect takes time too
        student, teacher = student.to(dtype), teacher.to(dtype)
    return student, teacher
