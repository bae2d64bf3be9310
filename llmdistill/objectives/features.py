"""Comparing hidden representations: the fair baselines of the bounds on mutual information.

`FEATURES` compares vectors of equal width, one value per vector, so that the caller decides which tokens count; a
student of another width is projected first. `token_relations` and `attention_maps` compare how tokens stand to one
another, where the widths may differ. Teachers are constants, students receive the gradient, and the arithmetic runs in
at least float32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the width of the squared difference.

    Args:
        student: `[..., H]`.
        teacher: `[..., H]`.

    Returns:
        `[...]`.
    """
    student, teacher = _prepared(student, teacher)
    return (student - teacher).square().mean(-1)


def absolute_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the width of the absolute difference, `[..., H] -> [...]`."""
    student, teacher = _prepared(student, teacher)
    return (student - teacher).abs().mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, in [0, 2], `[..., H] -> [...]`."""
    student, teacher = _prepared(student, teacher)
    return 1 - functional.cosine_similarity(student, teacher, dim=-1)


def normalized_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the unit vectors, which is twice the cosine distance, `[..., H] -> [...]`.

    Source: Sun et al. 2019, Patient KD (arXiv:1908.09355), equation 7, there of the [CLS] vectors.
    """
    student, teacher = _prepared(student, teacher)
    return (functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)).square().sum(-1)


def softmax_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the features taken as logits, in nats, `[..., H] -> [...]`.

    Source: He et al. 2021, Distiller (arXiv:2109.11105), among its intermediate objectives.
    """
    student, teacher = _prepared(student, teacher)
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": squared_error,
    "l1": absolute_error,
    "cosine": cosine_distance,
    "pkd": normalized_squared_error,
    "cross_entropy": softmax_cross_entropy,
}
"""Name in recipes -> function of vectors `[..., H]` of student and teacher."""


def variational(student: Tensor, teacher: Tensor, log_variance: Tensor) -> Tensor:
    """Minus the log-likelihood of the teacher's features under a Gaussian around the student's, without constants.

    Args:
        student: `[..., H]`, the predicted mean.
        teacher: `[..., H]`.
        log_variance: `[H]`, learned; receives the gradient too.

    Returns:
        `[...]` in nats per unit of width; may be negative.

    Source: Ahn et al. 2019, VID (arXiv:1904.05835), equation 4.
    """
    student, teacher = _prepared(student, teacher)
    log_variance = log_variance.to(student.dtype)
    return 0.5 * (log_variance + (student - teacher).square() * (-log_variance).exp()).mean(-1)


def token_relations(student: Tensor, teacher: Tensor, counted: Tensor, num_heads: int) -> Tensor:
    """KL of the teacher's relations between tokens to the student's, of one kind of states (queries, keys or values).

    A token's relations are softmax over the other tokens of scaled dot products, in `num_heads` heads into which the
    width is cut anew; so student and teacher may differ in width and in their own number of heads.

    Args:
        student: `[B, S, H]`.
        teacher: `[B, S, Ht]` of the same tokens.
        counted: `[B, S]` bool; padding is left out of rows and columns.
        num_heads: divides both widths.

    Returns:
        `[B, S]` in nats, mean over heads; 0 for tokens that do not count.

    Raises:
        ValueError: `num_heads` does not divide a width.

    Source: Wang et al. 2021, MiniLMv2 (arXiv:2012.15828), equations 4 to 6.
    """
    student_log_probs = _relations(student, counted, num_heads, "student")
    teacher_log_probs = _relations(teacher.detach(), counted, num_heads, "teacher")
    both = counted[:, None, :, None] & counted[:, None, None, :]  # [B, 1, S, S]
    difference = (teacher_log_probs - student_log_probs).masked_fill(~both, 0.0)
    return (teacher_log_probs.exp().masked_fill(~both, 0.0) * difference).sum(-1).mean(1)


def attention_maps(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Mean squared difference of attention weights, averaged over heads.

    Args:
        student: `[B, heads, S, S]`.
        teacher: `[B, heads', S, S]` of the same tokens; with another number of heads both are averaged over theirs.
        counted: `[B, S]` bool; padding is left out of rows and columns.

    Returns:
        `[B, S]`, one value for each asking token, mean over the tokens it may look at; 0 for tokens that do not count.

    Source: Jiao et al. 2020, TinyBERT (arXiv:1909.10351), equation 7, on weights where the authors take scores, which
    the transformers library does not give.
    """
    student, teacher = _prepared(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    both = counted[:, :, None] & counted[:, None, :]  # [B, S, S]
    squared = (student - teacher).square().mean(1).masked_fill(~both, 0.0)
    return squared.sum(-1) / both.sum(-1).clamp(min=1)


def _prepared(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _relations(states: Tensor, counted: Tensor, num_heads: int, who: str) -> Tensor:
    """`[B, heads, S, S]` log-probabilities."""
    if states.shape[-1] % num_heads:
        raise ValueError(f"The {who}'s width of {states.shape[-1]} cannot be cut into {num_heads} relation heads.")
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    heads = states.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, heads, S, width]
    scores = heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])
    # A large negative number, not -inf: a text without tokens must not give NaN.
    return scores.masked_fill(~counted[:, None, None, :], -1e9).log_softmax(-1)
