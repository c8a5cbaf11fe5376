"""Distillation of token logits chunk by chunk, so that only the gradient and one chunk are held."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from selfkd.losses.averaging import Average, exponents
from selfkd.losses.distillation import (
    DistillationTerms,
    check_classes,
    check_labels,
    check_settings,
    check_tensor,
    is_nan,
    unchecked_terms,
)
from selfkd.losses.divergences import Divergence, SoftTerm, divergence_terms
from selfkd.losses.fused import weighted_sum
from selfkd.losses.moving import send
from selfkd.losses.sparse import SparseLogits, check_sparse, unchecked_sparse_terms


class SampledTargets(NamedTuple):
    """Classes sampled from a teacher for each token: an unbiased estimate of its soft targets.

    The classes alone are enough where they are drawn from the teacher's softmax at T = 1.
    """

    indices: Tensor
    """Sampled classes `[..., samples]`, int64, with repetition."""
    weights: Tensor | None = None
    """Importance weights `[..., samples]`: p / (samples q) of a class with probability p that is
    drawn with probability q; 1 / samples, as of q = p, when None."""
    log_p: Tensor | None = None
    """Log-probabilities log p of the sampled classes, `[..., samples]`. Without them the entropy
    of the teacher is unknown, and the soft loss is T^2 times the cross-entropy, not the KL: larger
    by a constant, with the same gradient."""
    temperature: float = 1.0
    """Temperature T of p, at which the student must be trained too."""

    def to(self, device: torch.device | str | int) -> SampledTargets:
        """Return a copy on `device`."""
        return self.map(lambda tensor: send(tensor, device))

    def map(self, change: Callable[[Tensor], Tensor]) -> SampledTargets:
        """Return the targets with `change` applied to each of their tensors."""
        indices, weights, log_p, temperature = self
        return SampledTargets(
            change(indices),
            None if weights is None else change(weights),
            None if log_p is None else change(log_p),
            temperature,
        )


class LinearLogits(NamedTuple):
    """Teacher logits `hidden @ weight.T + bias`, computed chunk by chunk, never held as a whole."""

    hidden: Tensor
    """Hidden states of the last layer, `[batch, length, width]`."""
    weight: Tensor
    """Weight of the linear head, `[vocabulary, width]`."""
    bias: Tensor | None = None
    """Bias of the linear head, `[vocabulary]`."""

    def to(self, device: torch.device | str | int) -> LinearLogits:
        """Return a copy on `device`."""
        bias = None if self.bias is None else self.bias.to(device)
        return LinearLogits(self.hidden.to(device), self.weight.to(device), bias)


TokenTeacher = Tensor | SparseLogits | SampledTargets | LinearLogits
"""Teacher of a sequence: `[batch, length, vocabulary]`, or `[batch, length, k]` if sparse or
sampled. Full or sparse logits of an ensemble may be `[members, batch, length, ...]`."""

_Teacher = TypeVar("_Teacher", Tensor, SparseLogits, SampledTargets, LinearLogits, TokenTeacher)
_Rows = Tensor | slice
_LN_2 = math.log(2)


class _Settings(NamedTuple):
    """Settings of the loss, as arguments of `unchecked_terms`."""

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
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    vocabulary: int | None = None,
    chunk: int = 64,
) -> DistillationTerms:
    """Distillation loss of token logits, with its two terms by name.

        hard_loss = sum_i CE(y_i, p_s,i) / n
        soft_loss = sum_i T^2 D(p_t,i^T, p_s,i^T) / n                p^T = softmax(z / T)
        loss      = (1 - alpha) hard_loss + alpha soft_loss

        forward_kl: D = KL(p_t || p_s)                         reverse_kl: D = KL(p_s || p_t)
        js:         D = beta KL(p_t || m) + (1 - beta) KL(p_s || m),  m = beta p_t + (1 - beta) p_s

    over the n valid tokens of the whole batch, so that tokens of short and long rows have the same
    weight. Logits and labels must be aligned: for a causal model `student_logits[:, :-1]` with
    `labels[:, 1:]`. The mean of the losses of micro-batches with different n is not the loss of
    the whole batch: give their total n as `normalizer` and add the losses up.

    GKD, TRL and Liger have no T^2: their loss is `1 / T ** 2` times this soft loss, the same at
    T = 1. GKD's paper takes the mean over the tokens of each text first, then over texts.

    The gradient is computed together with the loss, chunk by chunk. The extra memory is the
    gradient, of the size of the logits, and work for one chunk. The loss allows a single backward
    pass, without double backward.

    Args:
        student_logits: Logits `[batch, length, vocabulary]`, floating point. Computed in float32 or
            wider.
        teacher: Logits `[batch, length, vocabulary]` or `SparseLogits` `[batch, length, k]`, either
            also `[members, ...]` of an ensemble; `LinearLogits`; or `SampledTargets`
            `[batch, length, samples]` drawn at this T. Never gets a gradient.
        labels: Next token at each position, `[batch, length]`, int64; also on the CPU where the
            logits are on a GPU, which then need not be waited for to count the valid tokens.
        temperature: Temperature T, above 0.
        alpha: Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`.
        ignore_index: Label of invalid tokens, which enter neither term.
        mask: Validity of each token `[batch, length]`, bool; a token counts if its label is valid
            too.
        label_smoothing: Label smoothing of the hard term, in [0, 1].
        average: Whether an ensemble's `probabilities` or `logits` are averaged.
        weights: Weights of the ensemble's members in that average, with sum 1.
        normalizer: Divisor in place of n, above 0.
        divergence: Divergence of the soft term: `forward_kl`, `reverse_kl` or `js`, the generalised
            Jensen-Shannon divergence. The last two need full logits or `LinearLogits`: the k
            largest or sampled logits of a teacher do not determine them.
        beta: Weight of the teacher in the mixture m of `js`, in [0, 1]. At 0 and 1, where the
            divergence would vanish, it is `forward_kl` and `reverse_kl`, as in GKD.
        vocabulary: Number of the first classes over which the soft term is computed, with softmax
            over these; the hard term is over all classes of the student. For models of one
            tokenizer whose vocabularies are padded to different sizes, with full logits or
            `LinearLogits`; all classes, which must then be as many, if not given.
        chunk: Number of tokens computed at once, at least 1.

    Returns:
        Scalars of at least float32, 0 if no token is valid. Only `loss` carries the graph.

    Raises:
        ValueError: A setting out of range, shapes that do not match, or (checked on the CPU only) a
            label out of range or NaN teacher logits.
        TypeError: Sparse logits that are not floating point, or labels or classes that are not
            int64.
        RuntimeError: A second backward pass, or one with `create_graph=True`.

    >>> student_logits = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]], requires_grad=True)
    >>> teacher_logits, labels = torch.zeros(1, 2, 2), torch.tensor([[0, -100]])
    >>> terms = sequence_terms(student_logits, teacher_logits, labels, temperature=2.0, alpha=0.5)
    >>> [round(term.item(), 4) for term in terms]
    [0.3037, 0.1269, 0.4805]

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes", 2024, https://arxiv.org/abs/2306.13649
    """
    settings = _Settings(temperature, alpha, label_smoothing, average, weights)
    soft = SoftTerm(divergence, beta, vocabulary).checked()
    if student_logits.ndim != 3 or not student_logits.is_floating_point():
        raise ValueError(
            "student_logits must be floating-point [batch, length, vocabulary], got "
            f"{student_logits.dtype} {list(student_logits.shape)}"
        )
    tokens = _Tokens(
        student_logits, teacher, labels, ignore_index, mask, settings, normalizer, soft
    )
    flat = student_logits.detach().flatten(0, 1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    if not (student_logits.requires_grad and torch.is_grad_enabled()):
        return tokens.terms(lambda rows: flat[rows].to(wide), None, chunk)
    # in float16 a mean over many tokens would underflow before a gradient scaler is applied
    dtype = wide if flat.dtype == torch.float16 else flat.dtype
    gradient = flat.new_empty(0, dtype=dtype)

    def collect(rows: _Rows, logits_gradient: Tensor) -> None:
        nonlocal gradient
        share = len(logits_gradient) / tokens.count
        if len(logits_gradient) == len(flat) and logits_gradient.dtype == dtype:  # one chunk
            gradient = logits_gradient.mul_(share)
            return
        if not len(gradient):
            gradient = torch.zeros_like(flat, dtype=dtype)
        gradient[rows] = logits_gradient.mul_(share).to(dtype)

    terms = tokens.terms(lambda rows: flat[rows].to(wide), collect, chunk)
    if not len(gradient):  # no token is valid
        gradient = torch.zeros_like(flat, dtype=dtype)
    loss = _PrecomputedGradients.apply(terms.loss, [gradient], student_logits)
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
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    vocabulary: int | None = None,
    chunk: int = 64,
) -> DistillationTerms:
    """Distillation loss of the logits `hidden @ weight.T + bias`, which are never held as a whole.

    The terms are those of `sequence_terms`. The logits of a chunk are computed, used for the loss
    and the gradients of `hidden`, `weight` and `bias`, and dropped. The extra memory is these
    gradients, in float32 or wider, and work for one chunk; it does not grow with length times
    vocabulary. With `LinearLogits` as teacher, no memory does. Losses without T^2, such as Liger's,
    are `1 / T ** 2` times this soft loss.

    With `LinearLogits` on a GPU, in float32 without autocast, without label smoothing and with a
    gradient, the loss is computed by `liger-kernel` if it is installed (`selfkd[liger]`). In half
    precision `liger-kernel` computes the divergence in that precision too, so it is not used.

    Args:
        hidden: Hidden states of the model's last layer, `[batch, length, width]`.
        weight: Weight of the linear head, `[vocabulary, width]`.
        teacher: Teacher of any kind that `sequence_terms` accepts.
        labels: Next token at each position, `[batch, length]`, int64; also on the CPU where the
            logits are on a GPU, which then need not be waited for to count the valid tokens.
        temperature: Temperature T, above 0.
        alpha: Weight of the soft term, in [0, 1]; the hard term gets `1 - alpha`.
        bias: Bias of the linear head, `[vocabulary]`.
        ignore_index: Label of invalid tokens, which enter neither term.
        mask: Validity of each token `[batch, length]`, bool.
        label_smoothing: Label smoothing of the hard term, in [0, 1].
        average: Whether an ensemble's `probabilities` or `logits` are averaged.
        weights: Weights of the ensemble's members in that average, with sum 1.
        normalizer: Divisor in place of the number of valid tokens, above 0.
        divergence: Divergence of the soft term: `forward_kl`, `reverse_kl` or `js`.
        beta: Weight of the teacher in the mixture of `js`, in [0, 1].
        vocabulary: Number of the first classes over which the soft term is computed.
        chunk: Number of tokens computed at once, at least 1.

    Returns:
        Scalars of at least float32. Only `loss` carries the graph, to hidden, weight and bias.

    Raises:
        ValueError, TypeError, RuntimeError: Same as `sequence_terms`.

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
    soft = SoftTerm(divergence, beta, vocabulary).checked()
    if hidden.ndim != 3 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "hidden must be [batch, length, width] and weight [vocabulary, width], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {list(weight.shape[:1])}, got {list(bias.shape)}")
    # a view in the shape of the logits, for the checks
    like = hidden.detach()[..., :1].expand(*hidden.shape[:2], len(weight))
    tokens = _Tokens(like, teacher, labels, ignore_index, mask, settings, normalizer, soft)
    teacher = tokens.given
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if (
        needs_gradient
        and isinstance(teacher, LinearLogits)
        and len(tokens.rows)
        and tokens.is_whole
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
    hidden_gradient, weight_gradient, *bias_gradient = gradients

    def collect(rows: _Rows, logits_gradient: Tensor) -> None:
        logits_gradient.mul_(len(logits_gradient))
        cast = logits_gradient.to(dtype)  # not yet divided by n, which would underflow in float16
        if hidden_gradient is not None:
            hidden_gradient[rows] = (cast @ head).to(hidden_gradient.dtype)
        if weight_gradient is not None:
            weight_gradient.add_(cast.T @ flat[rows])
        for total in bias_gradient:
            if total is not None:
                total.add_(logits_gradient.sum(0))

    terms = tokens.terms(logits_of, collect, chunk)
    for gradient in gradients:
        if gradient is not None:
            gradient.div_(tokens.count)
    loss = _PrecomputedGradients.apply(terms.loss, gradients, *inputs)
    return terms._replace(loss=loss)


def liger_fits(*tensors: Tensor | None, label_smoothing: float = 0.0) -> bool:
    """Whether `liger-kernel` is installed and computes the loss of `sequence_terms` for these.

    Args:
        *tensors: Tensors of student and teacher, or None.
        label_smoothing: Label smoothing of the hard term, in [0, 1].

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

    temperature, alpha, soft = tokens.settings.temperature, tokens.settings.alpha, tokens.soft
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - alpha,
        weight_soft_loss=alpha * temperature**2,  # Liger's soft loss has no T^2
        # at 0 Liger's divergence is KL(p_t || p_s), at 1 KL(p_s || p_t)
        beta={"forward_kl": 0.0, "reverse_kl": 1.0}.get(soft.divergence, soft.beta),
        temperature=temperature,
        compiled=hidden.is_cuda,
        return_soft_hard_loss=True,
    )
    student, states = (h.flatten(0, 1)[tokens.rows] for h in (hidden, teacher.hidden.detach()))
    labels = tokens.labels[tokens.rows]
    total, soft, hard = loss(
        student, weight, states, teacher.weight.detach(), labels, bias, teacher.bias
    )
    scale = len(tokens.rows) / tokens.count  # Liger's loss is a mean over the valid tokens
    return DistillationTerms(
        total * scale, hard.detach() * scale, temperature**2 * soft.detach() * scale
    )


def sampled_targets(
    teacher_logits: Tensor,
    samples: int,
    *,
    temperature: float,
    generator: torch.Generator | None = None,
    exponent: float = 1.0,
) -> SampledTargets:
    """Sample classes for each token, with importance weights that make the loss unbiased.

        i_j ~ q,  q = p^exponent / sum p^exponent,  w_j = p(i_j) / (samples q(i_j))

    with p the teacher's softmax at T. For any f, sum_j w_j f(i_j) has the mean sum_i p_i f(i), so
    that the loss and its gradient equal the full ones on average, whereas the k largest logits
    alone make the student overconfident. An `exponent` below 1 draws rare tokens more often.

    Args:
        teacher_logits: Logits `[..., vocabulary]`.
        samples: Number of draws for each token, with repetition, at least 1.
        temperature: Temperature T, above 0, at which the student must be trained too.
        generator: Random generator of the draws, on the logits' device.
        exponent: Exponent of p in the sampling distribution q, above 0.

    Returns:
        Sampled classes `[..., samples]` with their weights and log-probabilities, without a graph.

    Raises:
        ValueError: A setting out of range.

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
    """Valid tokens of a batch with their labels and teacher, all that a loss needs but the logits.

    Args:
        student_logits: Logits of the student, for the checks of shapes only.
        teacher: Teacher of a sequence.
        labels: Next token at each position, `[batch, length]`.
        ignore_index: Label of invalid tokens.
        mask: Validity of each token `[batch, length]`, bool.
        settings: Settings of the loss.
        normalizer: Divisor in place of the number of valid tokens.
        soft: Settings of the soft term.
    """

    def __init__(
        self,
        student_logits: Tensor,
        teacher: TokenTeacher,
        labels: Tensor,
        ignore_index: int,
        mask: Tensor | None,
        settings: _Settings,
        normalizer: float | Tensor | None,
        soft: SoftTerm,
    ) -> None:
        check_settings(
            settings.temperature, settings.alpha, settings.average, settings.label_smoothing
        )
        check_classes(student_logits.shape)
        check_tensor("labels", labels)
        self.given = teacher = _cut(teacher, student_logits, soft)
        _check_teacher(teacher, student_logits[..., : soft.vocabulary], settings)
        self.soft, self.is_whole = soft, soft.is_whole(student_logits.shape[-1])
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
            valid = valid & mask.to(valid.device)
        rows = valid.flatten().nonzero()[:, 0]
        flat, device = labels.flatten(), student_logits.device
        if len(rows):
            check_labels(flat[rows], student_logits.shape[-1])
        self.rows, self.labels = (part.to(device, non_blocking=True) for part in (rows, flat))
        self.shape = shape
        self.count = max(1, len(self.rows)) if normalizer is None else normalizer
        self.axis = int(_has_members(teacher))  # the dimension of the tokens
        self.teacher = _map_tensors(teacher, lambda t: t.detach().flatten(self.axis, self.axis + 1))
        self.settings = settings

    def terms(
        self,
        logits_of: Callable[[_Rows], Tensor],
        collect: Callable[[_Rows, Tensor], None] | None,
        chunk: int,
    ) -> DistillationTerms:
        """Return the terms without a graph.

        `collect` gets the rows of each chunk and the gradient of the chunk's mean loss.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        sums = torch.zeros(2, dtype=torch.float64, device=self.labels.device)
        dtype = torch.float32
        for rows in self._chunks(chunk):
            logits = logits_of(rows).detach()
            hard, soft, gradient = self._chunk_terms(logits, rows, collect is not None)
            dtype = hard.dtype
            sums += torch.stack([hard, soft]) * len(logits)
            if collect is not None and gradient is not None:
                collect(rows, gradient)
        hard, soft = (sums / self.count).to(dtype).unbind()
        if is_nan(soft):
            self._check_no_nan()
        return DistillationTerms(weighted_sum(hard, soft, self.settings.alpha), hard, soft)

    def _chunks(self, chunk: int) -> Sequence[_Rows]:
        if len(self.rows) == len(self.labels):  # slices are views, an index would copy
            return [slice(start, start + chunk) for start in range(0, len(self.rows), chunk)]
        return torch.split(self.rows, chunk) if len(self.rows) else ()

    def _chunk_terms(
        self, logits: Tensor, rows: _Rows, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hard loss, soft loss and, if wanted, the gradient of their weighted sum."""
        key = (slice(None),) * self.axis + (rows,)
        teacher, labels = _map_tensors(self.teacher, lambda tensor: tensor[key]), self.labels[rows]
        if isinstance(teacher, SampledTargets):
            with torch.no_grad():
                return _sampled_terms(logits, teacher, labels, self.settings, with_gradient)
        with torch.set_grad_enabled(with_gradient):
            logits.requires_grad_(with_gradient)
            terms = self._logits_terms(logits, teacher, labels)
        gradient = torch.autograd.grad(terms.loss, logits)[0] if with_gradient else None
        return terms.hard_loss, terms.soft_loss, gradient

    def _logits_terms(
        self, logits: Tensor, teacher: Tensor | SparseLogits | LinearLogits, labels: Tensor
    ) -> DistillationTerms:
        settings = self.settings._asdict()
        if isinstance(teacher, SparseLogits):
            del settings["average"]
            return unchecked_sparse_terms(logits, teacher, labels, **settings)
        if isinstance(teacher, LinearLogits):
            with torch.no_grad():
                teacher = F.linear(*teacher)
        if self.soft.divergence != "forward_kl" or not self.is_whole:
            return divergence_terms(logits, teacher, labels, **settings, soft=self.soft)
        return unchecked_terms(logits, teacher, labels, **settings)

    def _check_no_nan(self) -> None:
        """Raise ValueError for NaN teacher logits, naming the token."""
        found = torch.zeros_like(self.labels, dtype=torch.bool)

        def find_nan(tensor: Tensor) -> Tensor:
            others = tuple(dim for dim in range(tensor.ndim) if dim != self.axis)
            nan = tensor.isnan()
            found.logical_or_(nan.any(others) if others else nan)
            return tensor

        _map_tensors(self.teacher, find_nan)
        rows = self.rows[found[self.rows]]
        if len(rows):
            row, token = divmod(int(rows[0]), self.shape[1])
            raise ValueError(
                f"teacher must have numbers for soft_loss, got nan in token {token} of row {row}"
            )


def _sampled_terms(
    logits: Tensor,
    teacher: SampledTargets,
    labels: Tensor,
    settings: _Settings,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hard loss, soft loss and, if wanted, the gradient of their weighted sum.

    With W the sum of a token's weights w, the gradient of its soft term is, by logit k,

        T (W p_s,k^T - sum_j w_j [i_j = k])

    and at T = 1 both terms share one softmax.
    """
    temperature, alpha, smoothing, *_ = settings
    indices, weights, log_p, _ = teacher
    rows, classes = logits.shape
    known = labels[:, None]
    p_s, total_s, log_p_s = _softmax(logits, temperature, torch.cat([indices, known], dim=-1))
    log_p_1, log_p_s = log_p_s[:, -1:], log_p_s[:, :-1]
    if temperature != 1:
        p_1, total_1, log_p_1 = _softmax(logits, 1.0, known)
    hard = -log_p_1.mean()
    if smoothing:
        hard = (1 - smoothing) * hard - smoothing * F.log_softmax(logits, dim=-1).mean()
    if weights is None:
        weights = log_p_s.new_full((), 1 / indices.shape[-1]).expand(indices.shape)
    weights = weights.to(log_p_s.dtype)
    information = -log_p_s if log_p is None else log_p - log_p_s
    soft = temperature**2 * (weights * information).sum(-1).mean()
    if not with_gradient:
        return hard, soft, None
    soft_weight, hard_weight = alpha * temperature / rows, (1 - alpha) / rows
    mass = weights.sum(-1, keepdim=True) * soft_weight
    if temperature == 1:
        gradient = p_s.mul_((mass + hard_weight) / total_s)
    else:
        gradient = p_s.mul_(mass / total_s).addcmul_(p_1, hard_weight / total_1)
    gradient.scatter_add_(-1, indices, weights * -soft_weight)
    if hard_weight:
        gradient.scatter_(-1, known, -hard_weight * (1 - smoothing), reduce="add")
        gradient.sub_(hard_weight * smoothing / classes)
    return hard, soft, gradient


def _softmax(logits: Tensor, temperature: float, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unnormalised softmax at T, its totals, and log-probabilities at places of each row.

    Powers of 2 as in `selfkd.losses.fused`, which are several times as fast on a CPU.
    """
    x = torch.empty_like(logits)
    exponents(logits, 1 / (_LN_2 * temperature), out=x)
    at_places = x.gather(-1, places)
    total = x.exp2_().sum(-1, keepdim=True)
    return x, total, (at_places - total.log2()).mul_(_LN_2)


def _map_tensors(teacher: _Teacher, change: Callable[[Tensor], Tensor]) -> _Teacher:
    """Return the teacher with `change` applied to each of its tensors of tokens."""
    if isinstance(teacher, Tensor):
        return change(teacher)
    if isinstance(teacher, LinearLogits):
        return teacher._replace(hidden=change(teacher.hidden))
    return teacher.map(change)


def _cut(teacher: TokenTeacher, student_logits: Tensor, soft: SoftTerm) -> TokenTeacher:
    """Return the teacher over the vocabulary that is compared."""
    if isinstance(teacher, SparseLogits | SampledTargets):
        kind = type(teacher).__name__
        if soft.divergence != "forward_kl":
            raise ValueError(
                f"divergence must be 'forward_kl' where teacher is {kind}, got "
                f"{soft.divergence!r}: others need full logits or LinearLogits"
            )
        if soft.vocabulary is not None:
            raise ValueError(
                f"vocabulary must be None where teacher is {kind}, got {soft.vocabulary}: cut the "
                "teacher's logits before"
            )
        return teacher
    if soft.vocabulary is None:
        return teacher
    classes = len(teacher.weight) if isinstance(teacher, LinearLogits) else teacher.shape[-1]
    if soft.vocabulary > min(student_logits.shape[-1], classes):
        raise ValueError(
            f"vocabulary must be at most that of the student, {student_logits.shape[-1]}, and of "
            f"the teacher, {classes}, got {soft.vocabulary}"
        )
    if isinstance(teacher, LinearLogits):
        bias = None if teacher.bias is None else teacher.bias[: soft.vocabulary]
        return LinearLogits(teacher.hidden, teacher.weight[: soft.vocabulary], bias)
    return teacher[..., : soft.vocabulary]


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
        shapes = [list(tensor.shape) for tensor in teacher[:3] if tensor is not None]
        if shapes != [[*shape[:2], shapes[0][-1]]] * len(shapes):
            raise ValueError(f"teacher must be sampled {[*shape[:2], 'samples']}, got {shapes}")
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


class _PrecomputedGradients(torch.autograd.Function):
    """A loss with its gradients, all computed before, for a single backward pass."""

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
                "backward must be called once on the loss of a sequence, as its gradient is not "
                "kept: compute the loss again, or add the losses up before"
            )
        gradients, ctx.gradients = ctx.gradients, None
        unscaled = grad_loss.device.type == "cpu" and grad_loss.item() == 1
        return None, None, *(
            None if gradient is None
            else (gradient if unscaled else gradient.mul_(grad_loss)).view(shape).to(dtype)
            for gradient, shape, dtype in gradients
        )  # fmt: skip
