"""Distillation of token logits, in chunks: what is kept is the gradient and one chunk."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.distillation import (
    Average,
    DistillationTerms,
    check_labels,
    check_settings,
    hard_loss,
    is_nan,
    unchecked_terms,
)
from selfkd.losses.fused import weigh
from selfkd.losses.sparse import SparseLogits, check_sparse, unchecked_sparse_terms


class SampledTargets(NamedTuple):
    """Classes drawn from a teacher, token by token: an unbiased account of its soft targets."""

    indices: Tensor
    """`[..., samples]`, int64, with repetition."""
    weights: Tensor
    """`[..., samples]`: p / (samples q) of a class of probability p that is drawn with q."""
    log_p: Tensor
    """`[..., samples]`: log p of each."""
    temperature: float
    """T of p, at which alone they can teach."""

    def to(self, device: torch.device | str | int) -> SampledTargets:
        """Return a copy on `device`."""
        return _each(self, lambda tensor: tensor.to(device))


class LinearLogits(NamedTuple):
    """A teacher's logits `hidden @ weight.T + bias`, made chunk by chunk, never held as a whole."""

    hidden: Tensor
    """`[batch, length, width]`, of its last layer."""
    weight: Tensor
    """`[vocabulary, width]`, of its linear head."""
    bias: Tensor | None = None
    """`[vocabulary]`."""

    def to(self, device: torch.device | str | int) -> LinearLogits:
        """Return a copy on `device`."""
        bias = None if self.bias is None else self.bias.to(device)
        return LinearLogits(self.hidden.to(device), self.weight.to(device), bias)


TokenTeacher = Tensor | SparseLogits | SampledTargets | LinearLogits
"""`[batch, length, vocabulary]`, or `[batch, length, k]` of those that know less. Of an ensemble
logits, or the largest of them, may be `[members, batch, length, ...]`."""

_Teacher = TypeVar("_Teacher", Tensor, SparseLogits, SampledTargets, LinearLogits, TokenTeacher)
_Rows = Tensor | slice


class _Settings(NamedTuple):
    temperature: float
    alpha: float
    label_smoothing: float
    average: Average
    weights: Sequence[float] | Tensor | None


def sequence_terms(
    student_logits: Tensor,
    teacher: TokenTeacher,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    average: Average = "probabilities",
    weights: Sequence[float] | Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk: int = 64,
) -> DistillationTerms:
    """Distillation loss of token logits, with its two terms by name.

        hard_loss = sum_i CE(y_i, p_s,i) / n
        soft_loss = sum_i T^2 KL(p_t,i^T || p_s,i^T) / n             p^T = softmax(z / T)
        loss      = (1 - alpha) hard_loss + alpha soft_loss

    over the n valid tokens of the whole batch, so that a token weighs the same in a short row as in
    a long one. Logits and labels must be aligned: for a causal model `student_logits[:, :-1]` with
    `labels[:, 1:]`. Over micro-batches of unlike n the mean of these losses is not that of the
    whole: give the n of all of them as `normalizer` and add the losses up.

    The gradient is computed with the loss, chunk by chunk: it, of the size of the logits, and work
    for one chunk are the extra memory. It can be had once, and not differentiated in turn.

    Args:
        student_logits: `[batch, length, vocabulary]`, floating point. Computed in float32 or
            wider.
        teacher: logits `[batch, length, vocabulary]`, `SparseLogits` `[batch, length, k]`, either
            also `[members, ...]` of an ensemble, `LinearLogits`, or `SampledTargets`
            `[batch, length, samples]` drawn at this T. Never gets a gradient.
        labels: the token to follow, `[batch, length]`, int64.
        temperature: T, above 0.
        alpha: weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`.
        ignore_index: the label of tokens that are not valid: they enter neither term.
        mask: `[batch, length]`, bool: true for tokens that count, if their labels do.
        label_smoothing: of the hard term, in [0, 1].
        average: of an ensemble's `probabilities` or `logits`.
        weights: of the ensemble's members in that average, with sum 1.
        normalizer: what takes the place of n, above 0.
        chunk: tokens computed at once, at least 1.

    Returns:
        Scalars of at least float32, 0 where no token is valid. Only `loss` carries the graph.

    Raises:
        ValueError: a setting out of range, shapes that do not match, a label out of range, a
            teacher's NaN (values are looked at on the CPU only).
        TypeError: logits that are not floating point, labels that are not int64.
        RuntimeError: in backward, where the gradient is asked for twice or differentiated.

    >>> student_logits = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]], requires_grad=True)
    >>> teacher_logits, labels = torch.zeros(1, 2, 2), torch.tensor([[0, -100]])
    >>> terms = sequence_terms(student_logits, teacher_logits, labels, temperature=2.0, alpha=0.5)
    >>> [round(term.item(), 4) for term in terms]
    [0.3037, 0.1269, 0.4805]

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    settings = _Settings(temperature, alpha, label_smoothing, average, weights)
    if student_logits.ndim != 3 or not student_logits.is_floating_point():
        raise ValueError(
            "student_logits must be floating-point [batch, length, vocabulary], got "
            f"{student_logits.dtype} {list(student_logits.shape)}"
        )
    tokens = _Tokens(student_logits, teacher, labels, ignore_index, mask, settings, normalizer)
    flat = student_logits.detach().flatten(0, 1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    if not (student_logits.requires_grad and torch.is_grad_enabled()):
        return tokens.terms(lambda rows: flat[rows].to(wide), None, chunk)
    # in float16 a mean over many tokens vanishes before a gradient scaler could save it
    dtype = wide if flat.dtype == torch.float16 else flat.dtype
    gradient = torch.zeros_like(flat, dtype=dtype)

    def collect(rows: _Rows, logits_gradient: Tensor) -> None:
        gradient[rows] = logits_gradient.div_(tokens.count).to(dtype)

    terms = tokens.terms(lambda rows: flat[rows].to(wide), collect, chunk)
    loss = _GradientsAtHand.apply(terms.loss, [gradient], student_logits)
    return terms._replace(loss=loss)


def linear_sequence_terms(
    hidden: Tensor,
    weight: Tensor,
    teacher: TokenTeacher,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    average: Average = "probabilities",
    weights: Sequence[float] | Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk: int = 64,
) -> DistillationTerms:
    """`sequence_terms` of the logits `hidden @ weight.T + bias`, which are never held as a whole.

    A chunk's logits are made, used for the loss and the gradients of `hidden`, `weight` and `bias`,
    and dropped. The extra memory is these gradients, in float32 or wider, and work for one chunk;
    it does not grow with length times vocabulary. With `LinearLogits` as teacher nothing does.

    There, on a GPU, in float32 without autocast, without label smoothing and with a gradient,
    `liger-kernel` does it if installed (`selfkd[liger]`): its loss is this one. In half precision
    it takes the divergence in that precision too, so there it is not used.

    Args:
        hidden: `[batch, length, width]`, of the model's last layer.
        weight: `[vocabulary, width]` of the linear head.
        teacher: as for `sequence_terms`.
        labels: `[batch, length]`, int64.
        temperature: T, above 0.
        alpha: weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`.
        bias: `[vocabulary]` of the head.
        ignore_index: the label of tokens that are not valid.
        mask: `[batch, length]`, bool.
        label_smoothing: of the hard term, in [0, 1].
        average: of an ensemble's `probabilities` or `logits`.
        weights: of the ensemble's members in that average, with sum 1.
        normalizer: what takes the place of the number of valid tokens, above 0.
        chunk: tokens computed at once, at least 1.

    Returns:
        Scalars of at least float32. Only `loss` carries the graph, to hidden, weight and bias.

    Raises:
        ValueError, TypeError, RuntimeError: as `sequence_terms`.

    >>> hidden, weight = torch.ones(1, 2, 3, requires_grad=True), torch.eye(4, 3)
    >>> teacher_logits, labels = torch.zeros(1, 2, 4), torch.tensor([[0, 3]])
    >>> terms = linear_sequence_terms(
    ...     hidden, weight, teacher_logits, labels, temperature=2.0, alpha=0.5
    ... )
    >>> torch.allclose(
    ...     terms.loss,
    ...     sequence_terms(
    ...         hidden @ weight.T, teacher_logits, labels, temperature=2.0, alpha=0.5
    ...     ).loss,
    ... )
    True

    Reference:
        Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024,
        https://arxiv.org/abs/2410.10989
    """
    settings = _Settings(temperature, alpha, label_smoothing, average, weights)
    if hidden.ndim != 3 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "hidden must be [batch, length, width] and weight [vocabulary, width], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {list(weight.shape[:1])}, got {list(bias.shape)}")
    like = hidden.detach()[..., :1].expand(*hidden.shape[:2], len(weight))  # of the logits' shape
    tokens = _Tokens(like, teacher, labels, ignore_index, mask, settings, normalizer)
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if (
        needs_gradient
        and isinstance(teacher, LinearLogits)
        and len(tokens.rows)
        and liger_fits(*inputs, *teacher, label_smoothing=label_smoothing)
    ):
        return _liger_terms(hidden, weight, bias, teacher, tokens)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat, head, *shift = (tensor.detach().to(dtype) for tensor in inputs)
    flat = flat.flatten(0, 1)
    wide = torch.promote_types(dtype, torch.float32)

    def logits_of(rows: _Rows) -> Tensor:
        return F.linear(flat[rows], head, *shift).to(wide)

    if not needs_gradient:
        return tokens.terms(logits_of, None, chunk)
    gradients = [
        torch.zeros_like(cast, dtype=torch.promote_types(tensor.dtype, wide))
        if tensor.requires_grad
        else None
        for tensor, cast in zip(inputs, (flat, head, *shift), strict=True)
    ]
    of_hidden, of_weight, *of_bias = gradients

    def collect(rows: _Rows, logits_gradient: Tensor) -> None:
        small = logits_gradient.to(dtype)  # not yet divided by n: float16 would lose it
        if of_hidden is not None:
            of_hidden[rows] = (small @ head).to(of_hidden.dtype)
        if of_weight is not None:
            of_weight.add_(small.T @ flat[rows])
        for total in of_bias:
            if total is not None:
                total.add_(logits_gradient.sum(0))

    terms = tokens.terms(logits_of, collect, chunk)
    for gradient in gradients:
        if gradient is not None:
            gradient.div_(tokens.count)
    loss = _GradientsAtHand.apply(terms.loss, gradients, *inputs)
    return terms._replace(loss=loss)


def liger_fits(*tensors: Tensor | None, label_smoothing: float = 0.0) -> bool:
    """Whether `liger-kernel` is there for these tensors, and its loss equals `sequence_terms`.

    >>> liger_fits(torch.ones(1, 2, 3), torch.ones(4, 3))  # not on a GPU
    False
    """
    return (
        label_smoothing == 0
        and all(t.is_cuda and t.dtype == torch.float32 for t in tensors if t is not None)
        and not torch.is_autocast_enabled("cuda")
        and importlib.util.find_spec("liger_kernel") is not None
    )


def _liger_terms(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: LinearLogits, tokens: _Tokens
) -> DistillationTerms:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    temperature, alpha = tokens.settings.temperature, tokens.settings.alpha
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - alpha,
        weight_soft_loss=alpha * temperature**2,  # its soft loss is without T^2
        beta=0.0,  # the end at which its divergence is KL(p_t || p_s)
        temperature=temperature,
        compiled=hidden.is_cuda,
        return_soft_hard_loss=True,
    )
    student, states = (h.flatten(0, 1)[tokens.rows] for h in (hidden, teacher.hidden.detach()))
    labels = tokens.labels[tokens.rows]
    total, soft, hard = loss(
        student, weight, states, teacher.weight.detach(), labels, bias, teacher.bias
    )
    share = len(tokens.rows) / tokens.count  # it takes the mean
    return DistillationTerms(
        total * share, hard.detach() * share, temperature**2 * soft.detach() * share
    )


def sampled_targets(
    teacher_logits: Tensor,
    samples: int,
    *,
    temperature: float,
    generator: torch.Generator | None = None,
    exponent: float = 1.0,
) -> SampledTargets:
    """Draw classes of each token so that what they teach is right on average.

        i_j ~ q,  q = p^exponent / sum p^exponent,  w_j = p(i_j) / (samples q(i_j))

    with p the teacher's softmax at T. For any f, sum_j w_j f(i_j) has the mean sum_i p_i f(i): so
    the loss and its gradient equal the full ones on average, where the largest k logits alone would
    teach too sure a student. An `exponent` below 1 draws rare tokens more often.

    Args:
        teacher_logits: `[..., vocabulary]`.
        samples: draws of each token, with repetition, at least 1.
        temperature: T, above 0; the student must be taught at the same.
        generator: of the draws, on the logits' device.
        exponent: of the distribution that is drawn from, above 0.

    Raises:
        ValueError: a setting out of range.

    >>> targets = sampled_targets(torch.zeros(2, 3, 1000), 8, temperature=1.0)
    >>> targets.indices.shape, targets.weights[0, 0, :2]
    (torch.Size([2, 3, 8]), tensor([0.1250, 0.1250]))

    Reference:
        Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
        2025, https://arxiv.org/abs/2503.16870
    """
    check_settings(temperature, 0.0, "probabilities", 0.0)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not 0 < exponent < math.inf:
        raise ValueError(f"exponent must be > 0 and finite, got {exponent}")
    wide = torch.promote_types(teacher_logits.dtype, torch.float32)
    log_p = F.log_softmax(teacher_logits.detach().to(wide) / temperature, dim=-1)
    log_q = log_p if exponent == 1 else F.log_softmax(exponent * log_p, dim=-1)
    drawn = torch.multinomial(
        log_q.exp().flatten(0, -2), samples, replacement=True, generator=generator
    )
    indices = drawn.view(*log_p.shape[:-1], samples)
    log_p, log_q = log_p.gather(-1, indices), log_q.gather(-1, indices)
    return SampledTargets(indices, (log_p - log_q).exp() / samples, log_p, float(temperature))


class _Tokens:
    """The valid tokens of a batch, with all that the loss needs but the student's logits."""

    def __init__(
        self,
        student_logits: Tensor,
        teacher: TokenTeacher,
        labels: Tensor,
        ignore_index: int,
        mask: Tensor | None,
        settings: _Settings,
        normalizer: float | Tensor | None,
    ) -> None:
        check_settings(
            settings.temperature, settings.alpha, settings.average, settings.label_smoothing
        )
        _check_teacher(teacher, student_logits, settings)
        shape = student_logits.shape[:2]
        if labels.shape != shape:
            raise ValueError(f"labels must be {list(shape)}, got {list(labels.shape)}")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be class indices of torch.int64, got {labels.dtype}")
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}"
            )
        if isinstance(normalizer, int | float) and not 0 < normalizer < math.inf:
            raise ValueError(f"normalizer must be > 0 and finite, got {normalizer}")
        valid = labels != ignore_index
        if mask is not None:
            valid = valid & mask
        self.rows = valid.flatten().nonzero()[:, 0]
        self.shape = shape
        self.count = max(1, len(self.rows)) if normalizer is None else normalizer
        self.axis = int(_has_members(teacher))  # of the tokens
        self.teacher = _each(teacher, lambda t: t.detach().flatten(self.axis, self.axis + 1))
        self.labels = labels.flatten()
        self.settings = settings
        if len(self.rows):
            check_labels(self.labels[self.rows], student_logits.shape[-1])

    def terms(
        self,
        logits_of: Callable[[_Rows], Tensor],
        collect: Callable[[_Rows, Tensor], None] | None,
        chunk: int,
    ) -> DistillationTerms:
        """Return the terms without a graph; `collect` gets each chunk's gradient, as of a sum."""
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        sums = torch.zeros(2, dtype=torch.float64, device=self.labels.device)
        dtype = torch.float32
        for rows in self._chunks(chunk):
            with torch.set_grad_enabled(collect is not None):
                logits = logits_of(rows).detach().requires_grad_(collect is not None)
                terms = self._of_chunk(logits, rows)
            dtype = terms.loss.dtype
            sums += torch.stack([terms.hard_loss, terms.soft_loss]) * len(logits)
            if collect is not None:
                (gradient,) = torch.autograd.grad(terms.loss, logits)
                collect(rows, gradient.mul_(len(logits)))
        hard, soft = (sums / self.count).to(dtype).unbind()
        if is_nan(soft):
            self._check_no_nan()
        return DistillationTerms(weigh(hard, soft, self.settings.alpha), hard, soft)

    def _chunks(self, chunk: int) -> Sequence[_Rows]:
        if len(self.rows) == len(self.labels):  # views, where an index would copy
            return [slice(start, start + chunk) for start in range(0, len(self.rows), chunk)]
        return torch.split(self.rows, chunk) if len(self.rows) else ()

    def _of_chunk(self, logits: Tensor, rows: _Rows) -> DistillationTerms:
        place = (slice(None),) * self.axis + (rows,)
        teacher, labels = _each(self.teacher, lambda tensor: tensor[place]), self.labels[rows]
        settings = self.settings._asdict()
        if isinstance(teacher, SampledTargets):
            return _sampled_terms(logits, teacher, labels, self.settings)
        if isinstance(teacher, SparseLogits):
            del settings["average"]
            return unchecked_sparse_terms(logits, teacher, labels, **settings)
        if isinstance(teacher, LinearLogits):
            with torch.no_grad():
                teacher = F.linear(*teacher)
        return unchecked_terms(logits, teacher, labels, **settings)

    def _check_no_nan(self) -> None:
        """Raise ValueError for a teacher's NaN, naming the token."""
        found = torch.zeros_like(self.labels, dtype=torch.bool)

        def look(tensor: Tensor) -> Tensor:
            others = tuple(dim for dim in range(tensor.ndim) if dim != self.axis)
            nan = tensor.isnan()
            found.logical_or_(nan.any(others) if others else nan)
            return tensor

        _each(self.teacher, look)
        rows = self.rows[found[self.rows]]
        if len(rows):
            row, token = divmod(int(rows[0]), self.shape[1])
            raise ValueError(
                f"teacher must have numbers for soft_loss, got nan in token {token} of row {row}"
            )


def _sampled_terms(
    logits: Tensor, teacher: SampledTargets, labels: Tensor, settings: _Settings
) -> DistillationTerms:
    hard = hard_loss(logits, labels, label_smoothing=settings.label_smoothing)
    log_p_s = F.log_softmax(logits / settings.temperature, dim=-1).gather(-1, teacher.indices)
    kl = (teacher.weights * (teacher.log_p - log_p_s)).sum(-1).mean()
    soft = settings.temperature**2 * kl
    return DistillationTerms(weigh(hard, soft, settings.alpha), hard.detach(), soft.detach())


def _each(teacher: _Teacher, change: Callable[[Tensor], Tensor]) -> _Teacher:
    """Return the teacher with its tensors of tokens changed."""
    if isinstance(teacher, Tensor):
        return change(teacher)
    if isinstance(teacher, SparseLogits):
        return SparseLogits(*map(change, teacher))
    if isinstance(teacher, LinearLogits):
        return teacher._replace(hidden=change(teacher.hidden))
    indices, weights, log_p, temperature = teacher
    return SampledTargets(change(indices), change(weights), change(log_p), temperature)


def _has_members(teacher: TokenTeacher) -> bool:
    if isinstance(teacher, SparseLogits):
        return teacher.values.ndim == 4
    return isinstance(teacher, Tensor) and teacher.ndim == 4


def _check_teacher(teacher: TokenTeacher, student_logits: Tensor, settings: _Settings) -> None:
    shape = list(student_logits.shape)
    if settings.weights is not None and not _has_members(teacher):
        raise ValueError("weights must be None where teacher is not [members, ...], got some")
    if isinstance(teacher, SparseLogits):
        check_sparse(teacher, student_logits)
        if _has_members(teacher) and settings.average == "logits":
            raise ValueError(
                "average must be 'probabilities' where teacher is SparseLogits of several "
                "members, got 'logits'"
            )
    elif isinstance(teacher, SampledTargets):
        shapes = {tensor.shape for tensor in teacher[:3]}
        if len(shapes) > 1 or list(teacher.indices.shape[:-1]) != shape[:2]:
            raise ValueError(
                f"teacher must be sampled {[*shape[:2], 'samples']}, got "
                f"{[list(tensor.shape) for tensor in teacher[:3]]}"
            )
        if teacher.temperature != settings.temperature:
            raise ValueError(
                f"temperature must be that of the sampled targets, {teacher.temperature}, got "
                f"{settings.temperature}"
            )
    elif isinstance(teacher, LinearLogits):
        hidden, weight, bias = teacher
        width = weight.shape[-1]
        if list(hidden.shape) != [*shape[:2], width] or list(weight.shape) != [shape[2], width]:
            raise ValueError(
                f"teacher must have hidden {[*shape[:2], 'width']} and weight "
                f"{[shape[2], 'width']}, got {list(hidden.shape)} and {list(weight.shape)}"
            )
        if bias is not None and list(bias.shape) != shape[2:]:
            raise ValueError(f"teacher must have bias {shape[2:]}, got {list(bias.shape)}")
    elif list(teacher.shape[-3:]) != shape or teacher.ndim > 4 or not len(teacher):
        raise ValueError(
            f"teacher must be {shape} as the student's logits are, or that for each of the "
            f"members, got {list(teacher.shape)}"
        )


class _GradientsAtHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = [
            (gradient, tensor.shape, tensor.dtype)
            for gradient, tensor in zip(gradients, inputs, strict=True)
        ]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph must be False for the loss of a sequence, got True: its gradient "
                "cannot be differentiated; distillation_terms of the flattened tokens can"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "backward must be called once on the loss of a sequence, as its gradient is given "
                "away: compute the loss again, or add the losses up before"
            )
        gradients, ctx.gradients = ctx.gradients, None
        unscaled = grad_loss.device.type == "cpu" and grad_loss.item() == 1
        return None, None, *(
            None if gradient is None
            else (gradient if unscaled else gradient.mul_(grad_loss)).view(shape).to(dtype)
            for gradient, shape, dtype in gradients
        )  # fmt: skip
