"""Lower bounds on the mutual information of teacher and student representations; a loss is a bound with a minus.

Scores are `[B, B]`: `scores[i, j]` says how well the student's representation j goes with the teacher's i, so that the
pairs that belong together lie on the diagonal. Every bound is a statistic of the whole batch and returns one scalar in
nats. It knows the batch it is given only: gather over ranks before the call.

Sources: Poole et al. 2019, "On Variational Bounds of Mutual Information" (arXiv:1905.06922); He et al. 2021, Distiller
(arXiv:2109.11105).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """A bound and its two parts."""

    value: Tensor
    """1 + joint - marginal, in nats."""
    joint: Tensor
    """Mean lead of the true pairs over their baseline."""
    marginal: Tensor
    """Mean weight of the false pairs against theirs; 1 at the optimum."""


def mi_alpha(scores: Tensor, log_baseline: Tensor | None = None, alpha: float = 0.9) -> Tensor:
    """The interpolated bound I_alpha between a single-sample and a multi-sample bound.

    Args:
        scores: `[B, B]`, row the teacher's, column the student's, B at least 2. Receives the gradient.
        log_baseline: `[B]` log a(y) of the teacher's representations; 0 where it is None. Receives the gradient.
        alpha: in [0, 1]. At 1 the leave-one-out InfoNCE: low variance, at most log(B - 1). At 0 the bound with the
            baseline alone (TUBA): no such limit, but a variance that grows with the exponential of the information.
            (The docstring of much-copied public code has the two ends the other way round.)

    Returns:
        A scalar in nats, at least float32; below the mutual information in expectation.

    Raises:
        ValueError: fewer than two pairs, scores that are not square, or alpha outside [0, 1].

    Source: Poole et al. 2019, equation 15, summed over pairs with the positive left out of its own mixture.
    """
    return mi_alpha_parts(scores, log_baseline, alpha).value


def mi_alpha_parts(scores: Tensor, log_baseline: Tensor | None = None, alpha: float = 0.9) -> Bound:
    """`mi_alpha` with its joint and marginal parts, for the log."""
    scores = _checked(scores)
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie in [0, 1], got {alpha}.")
    if log_baseline is None:
        log_baseline = scores.new_zeros(len(scores))
    log_baseline = log_baseline.to(scores.dtype)[:, None]
    if alpha == 0:
        mixture = log_baseline.expand_as(scores)
    elif alpha == 1:  # nothing of the baseline, its gradient neither
        mixture = _leave_one_out(scores)
    else:
        mixture = torch.logaddexp(_leave_one_out(scores) + math.log(alpha), log_baseline + math.log1p(-alpha))
    others = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    pairs = others.sum()
    joint = ((scores.diagonal()[:, None] - mixture) * others).sum() / pairs
    weights = (scores - mixture.diagonal()[:, None]).masked_fill(~others, -math.inf).exp()
    marginal = weights.sum() / pairs
    return Bound(1 + joint - marginal, joint, marginal)


def info_nce(scores: Tensor) -> Tensor:
    """InfoNCE over the whole batch: at most log B, low variance, biased where the information is larger.

    Args:
        scores: `[B, B]`, B at least 2. Receives the gradient.

    Returns:
        A scalar in nats.

    Source: van den Oord et al. 2018 (arXiv:1807.03748), equation 4, as a bound: log B minus that loss.
    """
    scores = _checked(scores)
    return math.log(len(scores)) + (scores.diagonal() - scores.logsumexp(-1)).mean()


def nwj(scores: Tensor) -> Tensor:
    """The bound of Nguyen, Wainwright and Jordan: unbiased at the best critic, of high variance.

    Args:
        scores: `[B, B]`, B at least 2. Receives the gradient.

    Returns:
        A scalar in nats: `mi_alpha` with alpha 0 and a log-baseline of 1.

    Source: Nguyen et al. 2010 (arXiv:0809.0853), in the form of Poole et al. 2019, equation 7.
    """
    return mi_alpha(scores, scores.new_ones(len(scores)), alpha=0.0)


def _checked(scores: Tensor) -> Tensor:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"Scores must be `[B, B]`, a row and a column for every pair; got {list(scores.shape)}.")
    if len(scores) < 2:
        raise ValueError("A batch of one has no false pairs to tell from the true one: use at least two rows.")
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _leave_one_out(scores: Tensor) -> Tensor:
    """`[B, B]` log of the mean of exp(scores[i, l]) over all l but j.

    Subtracting from the row's sum is exact as long as j is not nearly all of it; where j is the row's largest, the sum
    is made anew without it.
    """
    total = scores.logsumexp(-1, keepdim=True)
    largest = torch.nn.functional.one_hot(scores.argmax(-1), len(scores)).bool()
    without_largest = scores.masked_fill(largest, -math.inf).logsumexp(-1, keepdim=True)
    gap = torch.where(largest, 1.0, total - scores)  # 1 where unused: no infinite gradient may leak from there
    return torch.where(largest, without_largest, total + torch.log(-torch.expm1(-gap))) - math.log(len(scores) - 1)
