"""Divergences between the student's and the teacher's next-token distributions, one value per token.

Common to all of them:

- Logits are `[..., V]` of one vocabulary. The student receives the gradient, the teacher is a constant.
- The arithmetic runs in float32, or in float64 where the logits are float64.
- A token whose logit is `-inf` for the student or the teacher is excluded: it contributes exactly 0, never NaN.
- No temperature: divide both logits before the call.

`DIVERGENCES` is the table of contents; recipes name its keys.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Log-probability that stands for an excluded token: its probability is exactly 0 and differences stay finite.
EXCLUDED = -1e4


def _log_probs(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both log-distributions in at least float32, with every excluded token at `EXCLUDED` in both."""
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student = student_logits.to(dtype).log_softmax(-1)
    teacher = teacher_logits.detach().to(dtype).log_softmax(-1)
    if not (_has_excluded(student.detach()) or _has_excluded(teacher)):
        return student, teacher
    excluded = student.isneginf() | teacher.isneginf()
    return student.masked_fill(excluded, EXCLUDED), teacher.masked_fill(excluded, EXCLUDED)


def _has_excluded(log_probs: Tensor) -> bool:
    return log_probs.numel() > 0 and log_probs.amin().item() == -math.inf


def _kl(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """KL(first || second) from log-probabilities, `[..., V] -> [...]`."""
    return (log_probs.exp() * (log_probs - other_log_probs)).sum(-1)


def _log_mixture(log_probs: Tensor, other_log_probs: Tensor, weight: float) -> Tensor:
    """log(weight * first + (1 - weight) * second), for `weight` in (0, 1)."""
    return torch.logaddexp(log_probs + math.log(weight), other_log_probs + math.log1p(-weight))


def _check_fraction(name: str, value: float, closed: bool = False) -> None:
    inside = 0 <= value <= 1 if closed else 0 < value < 1
    if not inside:
        raise ValueError(f"`{name}` must lie {'in [0, 1]' if closed else 'strictly between 0 and 1'}, got {value}.")


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student): the student is made to cover every mode of the teacher.

    Args:
        student_logits: `[..., V]`, receives the gradient.
        teacher_logits: `[..., V]`, a constant.

    Returns:
        `[...]` in nats, 0 exactly where the two distributions agree.

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2, without the T^2 factor.
    """
    student, teacher = _log_probs(student_logits, teacher_logits)
    return _kl(teacher, student)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher): the student is made to stay where the teacher has mass.

    Args:
        student_logits: `[..., V]`, receives the gradient.
        teacher_logits: `[..., V]`, a constant.

    Returns:
        `[...]` in nats.

    Source: Gu et al. 2024, MiniLLM (arXiv:2306.08543), equation 1, per token of the given text.
    """
    student, teacher = _log_probs(student_logits, teacher_logits)
    return _kl(student, teacher)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, teacher_weight: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, between forward KL (weight 0) and reverse KL (weight 1).

    With teacher p, student q, w = `teacher_weight` and M = w p + (1 - w) q it is w KL(p || M) + (1 - w) KL(q || M).
    The ends are the limits after division by the vanishing weight: exactly `forward_kl` at 0 and `reverse_kl` at 1.

    Args:
        student_logits: `[..., V]`, receives the gradient, inside the mixture too.
        teacher_logits: `[..., V]`, a constant.
        teacher_weight: share of the teacher in the mixture, in [0, 1]; equals `beta` of TRL's GKD.

    Returns:
        `[...]` in nats; at most log 2 for weights strictly between 0 and 1.

    Raises:
        ValueError: `teacher_weight` lies outside [0, 1].

    Source: Agarwal et al. 2024, GKD (arXiv:2306.13649), equation 1 and the limits below it.
    """
    _check_fraction("teacher_weight", teacher_weight, closed=True)
    student, teacher = _log_probs(student_logits, teacher_logits)
    if teacher_weight == 0:
        return _kl(teacher, student)
    if teacher_weight == 1:
        return _kl(student, teacher)
    mixture = _log_mixture(teacher, student, teacher_weight)
    return teacher_weight * _kl(teacher, mixture) + (1 - teacher_weight) * _kl(student, mixture)


def skewed_forward_kl(student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1) -> Tensor:
    """KL(teacher || skew * teacher + (1 - skew) * student): forward KL with a bounded gradient.

    Args:
        student_logits: `[..., V]`, receives the gradient.
        teacher_logits: `[..., V]`, a constant.
        skew: share of the teacher in the mixture, in (0, 1); towards 0 it becomes `forward_kl`.

    Returns:
        `[...]` in nats, at most -log(skew).

    Raises:
        ValueError: `skew` lies outside (0, 1).

    Source: Ko et al. 2024, DistiLLM (arXiv:2402.03898), section 3.1.
    """
    _check_fraction("skew", skew)
    student, teacher = _log_probs(student_logits, teacher_logits)
    return _kl(teacher, _log_mixture(teacher, student, skew))


def skewed_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1) -> Tensor:
    """KL(student || (1 - skew) * teacher + skew * student): reverse KL with a bounded gradient.

    Args:
        student_logits: `[..., V]`, receives the gradient, inside the mixture too.
        teacher_logits: `[..., V]`, a constant.
        skew: share of the student in the mixture, in (0, 1); towards 0 it becomes `reverse_kl`.

    Returns:
        `[...]` in nats, at most -log(skew).

    Raises:
        ValueError: `skew` lies outside (0, 1).

    Source: Ko et al. 2024, DistiLLM (arXiv:2402.03898), section 3.1.
    """
    _check_fraction("skew", skew)
    student, teacher = _log_probs(student_logits, teacher_logits)
    return _kl(student, _log_mixture(student, teacher, skew))


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Half the sum of |teacher - student| over the vocabulary.

    Args:
        student_logits: `[..., V]`, receives the gradient.
        teacher_logits: `[..., V]`, a constant.

    Returns:
        `[...]`, a probability: in [0, 1].

    Source: Wen et al. 2023, f-DISTILL (arXiv:2307.15190), section 3.
    """
    student, teacher = _log_probs(student_logits, teacher_logits)
    return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, head_mass: float = 0.5) -> Tensor:
    """Forward and reverse KL, weighted by where the two distributions differ more: in the teacher's head or its tail.

    The head is the teacher's likeliest tokens whose cumulative mass is at most `head_mass`; the likeliest token always
    belongs to it. Forward KL is weighted by the head's share of the whole gap sum |p - q|, reverse KL by the rest. The
    weights are constants; where there is no gap at all they are one half.

    Args:
        student_logits: `[..., V]`, receives the gradient.
        teacher_logits: `[..., V]`, a constant.
        head_mass: cumulative teacher probability of the head, in [0, 1].

    Returns:
        `[...]` in nats.

    Raises:
        ValueError: `head_mass` lies outside [0, 1].

    Source: Wu et al. 2024, AKL (arXiv:2404.02657), section 4, as the authors' code has it.
    """
    _check_fraction("head_mass", head_mass, closed=True)
    student, teacher = _log_probs(student_logits, teacher_logits)
    with torch.no_grad():
        sorted_teacher_probs, order = teacher.exp().sort(stable=True, dim=-1, descending=True)
        gap = (sorted_teacher_probs - student.exp().gather(-1, order)).abs()
        in_head = sorted_teacher_probs.cumsum(-1) <= head_mass
        in_head[..., 0] = True
        whole = gap.sum(-1)
        head_share = torch.where(whole > 0, (gap * in_head).sum(-1) / whole, 0.5)
    return head_share * _kl(teacher, student) + (1 - head_share) * _kl(student, teacher)


def alpha_beta(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """Alpha-beta divergence: `alpha` weighs the teacher's mass, `beta` the student's confidence.

    With teacher p and student q it is -1/(ab) sum[p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]. It tends to forward
    KL at (1, 0) and to reverse KL at (0, 1).

    Args:
        student_logits: `[..., V]`, receives the gradient.
        teacher_logits: `[..., V]`, a constant.
        alpha: exponent of the teacher, > 0.
        beta: exponent of the student, > 0.

    Returns:
        `[...]`, never negative.

    Raises:
        ValueError: an exponent is not positive.

    Source: Wang et al. 2025, ABKD (arXiv:2505.04560), definition 3.1.
    """
    if alpha <= 0 or beta <= 0:
        raise ValueError(
            f"`alpha` and `beta` must be positive, got alpha={alpha} and beta={beta}. For the limits at 0 use "
            "`forward_kl` (alpha 1, beta 0) or `reverse_kl` (alpha 0, beta 1)."
        )
    student, teacher = _log_probs(student_logits, teacher_logits)
    total = alpha + beta
    cross = (alpha * teacher + beta * student).exp()
    own = (alpha * (total * teacher).exp() + beta * (total * student).exp()) / total
    return (own - cross).sum(-1) / (alpha * beta)


def balanced_kl(student_logits: Tensor, teacher_logits: Tensor, weight: float = 2.0) -> Tensor:
    """Forward plus reverse KL, one of them weighted more: forward where the student is surer than the teacher.

    Where the student's entropy is below the teacher's, the sum is weight * forward + reverse, elsewhere
    forward + weight * reverse. The choice is a constant, the entropies receive no gradient through it.

    Args:
        student_logits: `[..., V]`, receives the gradient.
        teacher_logits: `[..., V]`, a constant.
        weight: factor of the favoured direction, > 0; 1 is the plain sum of both.

    Returns:
        `[...]` in nats.

    Raises:
        ValueError: `weight` is not positive.

    Source: BD-KD (arXiv:2212.12965). The paper's exact rule was not at hand; this is the reading of public code.
    """
    if weight <= 0:
        raise ValueError(f"`weight` must be positive, got {weight}.")
    student, teacher = _log_probs(student_logits, teacher_logits)
    student_is_surer = _entropy(student.detach()) < _entropy(teacher)
    forward_weight = torch.where(student_is_surer, weight, 1.0)
    reverse_weight = torch.where(student_is_surer, 1.0, weight)
    return forward_weight * _kl(teacher, student) + reverse_weight * _kl(student, teacher)


def cross_entropy(student_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Cross-entropy of the student against the target's distribution: `forward_kl` plus the target's entropy.

    The gradient is that of `forward_kl`; only the value differs. Not a divergence: it is not 0 at agreement.

    Args:
        student_logits: `[..., V]`, receives the gradient.
        target_logits: `[..., V]`, a constant.

    Returns:
        `[...]` in nats.
    """
    student, target = _log_probs(student_logits, target_logits)
    return -(target.exp() * student).sum(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        jensen_shannon,
        skewed_forward_kl,
        skewed_reverse_kl,
        total_variation,
        adaptive_kl,
        alpha_beta,
        balanced_kl,
    )
}
