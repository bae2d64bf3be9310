"""Losses from hidden states and output heads, a chunk of tokens at a time: full logits `[B, S, V]` never exist.

Each chunk's logits are made, used for the values and their gradient, and dropped. Values and gradients equal those of
the dense form. Beyond inputs and gradients it takes a few `[chunk, V]` buffers, whatever the number of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmdistill.objectives.divergences import DIVERGENCES
from llmdistill.objectives.taid import interpolate_logits

# Bytes of one float32 `[chunk, V]` buffer; a divergence and its gradient hold about ten of them at a time.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}

Term = Callable[[Tensor, slice], Tensor]
"""One loss term: (student logits `[n, V]`, which of the N tokens they are) -> `[n]`."""


@dataclass(frozen=True)
class Head:
    """The output layer of a causal language model: logits = soft_cap * tanh(scale * (W h + b) / soft_cap)."""

    weight: Tensor
    """`[V, H]`."""
    bias: Tensor | None = None
    """`[V]`."""
    scale: float = 1.0
    """Factor of the logits (Cohere, Granite and others), applied before the soft-cap."""
    soft_cap: float | None = None
    """Bound of the logits (Gemma 2 and others)."""

    @classmethod
    def of(cls, head: "Head | nn.Linear | Tensor") -> "Head":
        """A plain linear layer or its weight `[V, H]` as a `Head`."""
        if isinstance(head, nn.Linear):
            return cls(head.weight, head.bias)
        return cls(head) if isinstance(head, Tensor) else head

    def cropped(self, vocabulary_size: int) -> "Head":
        """The head of the first `vocabulary_size` ids; gradients reach the whole weight, as zeros beyond them."""
        if vocabulary_size == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary_size]
        return replace(self, weight=self.weight[:vocabulary_size], bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., H] -> [..., V]`, in the dtype of `matmul_dtype`, or above it where the head scales or caps."""
        dtype = matmul_dtype(hidden, self.weight)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        return self.scaled(nn.functional.linear(hidden.to(dtype), weight, bias))

    def scaled(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap of plain products `W h + b`."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            logits = self.soft_cap * torch.tanh(logits.to(dtype) / self.soft_cap)
        return logits


def chunked_divergence(
    student_hidden: Tensor,
    student_head: Head | nn.Linear | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | nn.Linear | Tensor,
    counted: Tensor,
    divergence: str | Callable[..., Tensor] = "forward_kl",
    t: float | None = None,
    chunk_bytes: int | None = None,
    **options,
) -> Tensor:
    """A divergence per token, equal in value and gradient to the dense one on the full logits of both models.

    Args:
        student_hidden: `[..., Hs]` last hidden states, already aligned with the tokens they predict; with gradient.
        student_head: its weight `[V, Hs]`, linear layer or `Head`; weight and bias receive gradients.
        teacher_hidden: `[..., Ht]`, a constant.
        teacher_head: likewise `[V, Ht]`, a constant.
        counted: bool `[...]`; the other tokens cost nothing and get 0, also as gradient.
        divergence: a name of `DIVERGENCES`, or a function of (student logits, target logits) of that form.
        t: where given, the target is the TAID mixture of both models' logits with this share of the teacher.
        chunk_bytes: size of one float32 `[chunk, V]` buffer; by default `CHUNK_BYTES` of the device.
        options: of the divergence.

    Returns:
        `[...]` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: unknown divergence, or heads of different vocabulary sizes.
    """
    student_head, teacher_head = Head.of(student_head), Head.of(teacher_head)
    _check_same_vocabulary(student_head, teacher_head)
    term = divergence_term(select_tokens(teacher_hidden, counted), teacher_head, divergence, t, **options)
    values, _ = chunked_terms(select_tokens(student_hidden, counted), student_head, [term], [1.0], chunk_bytes)
    return spread_tokens(values, counted)


def select_tokens(hidden: Tensor, counted: Tensor) -> Tensor:
    """The hidden states of the counted tokens: `[..., H]` and bool `[...]` -> `[N, H]`."""
    if hidden.shape[:-1] != counted.shape:
        raise ValueError(
            f"Hidden states of {tuple(hidden.shape[:-1])} tokens, but {tuple(counted.shape)} are labelled."
        )
    indices = counted.flatten().nonzero().squeeze(1)
    return hidden.flatten(0, -2).index_select(0, indices)


def spread_tokens(values: Tensor, counted: Tensor) -> Tensor:
    """Values of the counted tokens at their places, 0 elsewhere: `[N]` and bool `[...]` -> `[...]`."""
    return values.new_zeros(counted.shape).masked_scatter(counted, values)


def divergence_term(
    teacher_hidden: Tensor,
    teacher_head: Head,
    divergence: str | Callable[..., Tensor] = "forward_kl",
    t: float | None = None,
    **options,
) -> Term:
    """The term of `chunked_terms` that compares student and teacher (arguments as in `chunked_divergence`)."""
    if isinstance(divergence, str) and divergence not in DIVERGENCES:
        raise ValueError(f"Unknown divergence `{divergence}`: use one of {', '.join(DIVERGENCES)}.")
    function = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
    teacher_hidden = teacher_hidden.detach()
    head = replace(teacher_head, weight=teacher_head.weight.detach())

    def term(student_logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            target_logits = head.logits(teacher_hidden[rows])
            if t is not None:
                target_logits = interpolate_logits(student_logits, target_logits, t)
        return function(student_logits, target_logits, **options)

    return term


def label_term(labels: Tensor) -> Term:
    """The term of `chunked_terms` that is the cross-entropy of the labels `[N]`, in nats."""

    def term(student_logits: Tensor, rows: slice) -> Tensor:
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        return nn.functional.cross_entropy(student_logits.to(dtype), labels[rows], reduction="none")

    return term


def chunked_terms(
    student_hidden: Tensor,
    student_head: Head,
    terms: Sequence[Term],
    weights: Sequence[float],
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A weighted sum of loss terms of the same tokens, from one pass over the student's logits.

    Args:
        student_hidden: `[N, Hs]`, with gradient.
        student_head: `[V, Hs]`; weight and bias receive gradients where they ask for them.
        terms: at least one function of a chunk's student logits.
        weights: of the terms in the sum.
        chunk_bytes: size of one float32 `[chunk, V]` buffer; by default `CHUNK_BYTES` of the device.

    Returns:
        The sum `[N]`, with gradient, and each term `[T, N]` by itself, without. Both in float32 (float64 for float64
        inputs). The gradient is cheapest where every token has the same weight in what is back-propagated, as in a
        mean; else the logits are made once more.
    """
    chunk_bytes = chunk_bytes or CHUNK_BYTES.get(student_hidden.device.type, CHUNK_BYTES["cuda"])
    chunk = max(1, chunk_bytes // (4 * student_head.weight.shape[0]))
    loss = _Loss(student_hidden.detach(), student_head, terms, weights, chunk)
    return _ChunkedTerms.apply(student_hidden, student_head.weight, student_head.bias, loss)


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype a product of both runs in: autocast's where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class _ChunkedTerms(torch.autograd.Function):
    """Forward: values, and the gradients of their plain sum. Backward: scales them, which is all that a mean needs."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss):
        ctx.loss, ctx.needed = loss, ctx.needs_input_grad[:3] if loss.has_gradient else (False, False, False)
        values, ctx.gradients = loss.run(ctx.needed)
        ctx.mark_non_differentiable(values)
        return (loss.column_of_weights(values) * values).sum(0), values

    @staticmethod
    def backward(ctx, grad_sum, _):
        if (grad_sum == grad_sum[:1]).all():
            factor, gradients = grad_sum[:1].sum(), ctx.gradients
        else:
            factor, gradients = 1.0, ctx.loss.run(ctx.needed, grad_sum)[1]
        inputs = (ctx.loss.hidden, ctx.loss.head.weight, ctx.loss.head.bias)
        pairs = zip(gradients, inputs, strict=True)
        return *(None if gradient is None else (gradient * factor).to(like.dtype) for gradient, like in pairs), None


class _Loss:
    """One loss of N tokens: runs over their chunks, for values and gradients."""

    def __init__(self, hidden: Tensor, head: Head, terms: Sequence[Term], weights: Sequence[float], chunk: int):
        self.hidden, self.terms, self.weights, self.chunk = hidden, terms, weights, chunk
        self.has_gradient = torch.is_grad_enabled()  # inside an autograd function it is off
        self.head = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        self.dtype = matmul_dtype(hidden, head.weight)
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)

    def run(
        self, needed: tuple[bool, bool, bool], token_weights: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Values `[T, N]`, and the gradients of sum_n token_weights[n] * (weighted sum of terms)[n], by default ones.

        Gradients are with respect to hidden states, weight and bias, as far as `needed`.
        """
        hidden, weight, bias = self.hidden, self.head.weight.to(self.dtype), self.head.bias
        plain = Head(weight, bias)
        values = torch.empty(len(self.terms), len(hidden), dtype=self.sum_dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=self.sum_dtype) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=self.sum_dtype) if needed[2] else None

        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), self.chunk):
                chunk_hidden = hidden[rows].to(self.dtype)
                products = plain.logits(chunk_hidden)  # [n, V]
                if not any(needed):
                    values[:, rows] = self._values(products, rows)
                    continue
                values[:, rows], grad = self._values_and_gradient(products, rows, token_weights)
                grad = grad.to(self.dtype)
                if needed[0]:
                    grad_hidden[rows] = (grad @ weight).to(hidden.dtype)
                if needed[1] and self.dtype == self.sum_dtype:
                    grad_weight.addmm_(grad.T, chunk_hidden)
                elif needed[1]:
                    grad_weight += grad.T @ chunk_hidden
                if needed[2]:
                    grad_bias += grad.sum(0, dtype=self.sum_dtype)
        return values, (grad_hidden, grad_weight, grad_bias)

    def _values(self, products: Tensor, rows: slice) -> Tensor:
        logits = self.head.scaled(products)
        return torch.stack([term(logits, rows) for term in self.terms])

    @torch.enable_grad()
    def _values_and_gradient(
        self, products: Tensor, rows: slice, token_weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        products.requires_grad_()
        values = self._values(products, rows)
        factors = self.column_of_weights(values).expand_as(values)
        if token_weights is not None:
            factors = factors * token_weights[rows]
        return values.detach(), torch.autograd.grad(values, products, factors)[0]

    def column_of_weights(self, like: Tensor) -> Tensor:
        """The terms' weights, `[T, 1]`."""
        return torch.tensor(self.weights, dtype=like.dtype, device=like.device)[:, None]


def _chunks(num_tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, num_tokens)) for start in range(0, num_tokens, chunk)]


def _check_same_vocabulary(student_head: Head, teacher_head: Head) -> None:
    student_size, teacher_size = student_head.weight.shape[0], teacher_head.weight.shape[0]
    if student_size != teacher_size:
        raise ValueError(
            f"Student and teacher heads must have one vocabulary: the student's has {student_size} rows, the "
            f"teacher's {teacher_size}. Crop both to the shared ids (`Head.cropped`) once the tokenizers are proven "
            "to agree."
        )
