"""The loss of the task itself, from labels."""

import torch
from torch import Tensor
from torch.nn import functional


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes, or squared error where labels are numbers to be predicted.

    Args:
        logits: `[B, C]`, or `[B, 1]` of a regression. Receives the gradient.
        labels: `[B]` class ids, or floats for a regression.

    Returns:
        `[B]` in nats, or in squared units of the labels; at least float32.

    Raises:
        ValueError: floats for more than one output.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not labels.is_floating_point():
        return functional.cross_entropy(logits, labels, reduction="none")
    if logits.shape[-1] != 1:
        raise ValueError(f"Labels are numbers to be predicted, but the model has {logits.shape[-1]} outputs, not one.")
    return (logits[:, 0] - labels).square()


def logit_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the tempered classes, times temperature squared.

    Args:
        student_logits: `[B, C]`, receives the gradient.
        teacher_logits: `[B, C]`, a constant.
        temperature: of both.

    Returns:
        `[B]` in nats times temperature squared, at least float32.

    Raises:
        ValueError: one logit, whose softmax is 1 whatever it is, so that nothing would be learned.

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
    """
    if student_logits.shape[-1] == 1:
        raise ValueError("Cross-entropy of one logit is 0 whatever the student says: use the squared error.")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_probs = (student_logits.to(dtype) / temperature).log_softmax(-1)
    return -(temperature**2) * ((teacher_logits.detach().to(dtype) / temperature).softmax(-1) * log_probs).sum(-1)


def logit_squared_error(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over classes of the squared difference of logits, `[B, C] -> [B]`; also for one that is predicted.

    Source: Ba and Caruana 2014 (arXiv:1312.6184), equation 1.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    return (student_logits.to(dtype) - teacher_logits.detach().to(dtype)).square().mean(-1)
