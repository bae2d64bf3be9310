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
