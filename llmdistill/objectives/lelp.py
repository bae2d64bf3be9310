"""LELP: a teacher of few classes says more once each class is split along the directions of its own embeddings.

The logits of a teacher with two classes hold one number per example. Its embeddings hold more: inside each class they
spread along some directions, and where an example lies along them becomes K pseudo-subclasses of the class, which the
student learns to tell apart. Summed over its subclasses, a class keeps exactly the probability the teacher gave it.

Source: Loo, Iliopoulos, Hu, Vee 2024 (arXiv:2409.20449). Its code is not public; where the paper leaves a choice, the
docstring says which one was made.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Directions:
    """The affine map from embeddings to subclass logits, one per class."""

    mean: Tensor
    """`[C, D]` mean embedding of each class, without what the teacher's logits already say."""
    directions: Tensor
    """`[C, D, K]` orthonormal in each class."""
    scale: Tensor
    """`[C]` by which the projections are divided: root mean square of a class's own projections, or 1."""

    def to(self, *args, **kwargs) -> "Directions":
        """On another device or in another dtype, as `Tensor.to`."""
        return Directions(*(getattr(self, field.name).to(*args, **kwargs) for field in fields(self)))


class Moments:
    """Count, sum and sum of outer products of the embeddings of each class: all that the fit needs of a data set.

    One pass over the rows in batches of any size, in float64; memory is `[C, D, D]`. The moments of several ranks add
    up to those of all rows: sum `state()` over them.

    Args:
        num_classes: C.
        width: D of the embeddings.
    """

    def __init__(self, num_classes: int, width: int):
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.sum = torch.zeros(num_classes, width, dtype=torch.float64)
        self.products = torch.zeros(num_classes, width, width, dtype=torch.float64)

    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Take in rows.

        Args:
            embeddings: `[B, D]`, any float dtype and device.
            labels: `[B]` class of each row, in [0, C).
        """
        embeddings, labels = embeddings.detach().cpu().double(), labels.cpu()
        for label in labels.unique().tolist():
            rows = embeddings[labels == label]
            self.count[label] += len(rows)
            self.sum[label] += rows.sum(0)
            self.products[label] += rows.T @ rows

    def state(self) -> list[Tensor]:
        """The three sums, to be added up in place over ranks."""
        return [self.count, self.sum, self.products]


def fit_directions(
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    num_subclasses: int,
    null_space: bool = True,
    rotate: bool = True,
    scale: bool = True,
    seed: int = 0,
    rotation: Tensor | None = None,
) -> Directions:
    """The K leading principal directions of each class's embeddings, outside what the teacher's logits already say.

    Args:
        embeddings: `[R, D]` inputs of the teacher's last linear layer.
        labels: `[R]` class of each row; the teacher's arg max where rows have none.
        weight: `[C, D]` of that layer; `[1, D]` for a head of one logit, which has two classes.
        num_subclasses: K per class.
        null_space: remove the span of `weight` first, along which embeddings decide the logits.
        rotate: turn the K directions of all classes by one random rotation, so that none is more telling than others.
        scale: divide by the root mean square of a class's K projections, so that a subclass temperature means the same
            on every teacher (our choice).
        seed: of the rotation.
        rotation: `[K, K]` orthonormal, in place of the random one.

    Returns:
        Directions in float64. The largest loading of each direction is positive before the rotation.

    Raises:
        ValueError: a class has fewer than K + 1 rows, or its embeddings vary along fewer than K directions.

    Source: arXiv:2409.20449, section 3, as methods reviews agree on it; covariance over N, not N - 1 (our choice).
    """
    moments = Moments(max(2, len(weight)), embeddings.shape[-1])
    moments.add(embeddings, labels)
    return directions_from(moments, weight, num_subclasses, null_space, rotate, scale, seed, rotation)


def directions_from(
    moments: Moments,
    weight: Tensor,
    num_subclasses: int,
    null_space: bool = True,
    rotate: bool = True,
    scale: bool = True,
    seed: int = 0,
    rotation: Tensor | None = None,
) -> Directions:
    """`fit_directions` from the moments of a data set that is never in memory at once."""
    _check_counts(moments.count, num_subclasses)
    width = weight.shape[-1]
    keep = _null_space(weight.detach().cpu().double()) if null_space else torch.eye(width, dtype=torch.float64)
    if rotation is None:
        rotation = random_rotation(num_subclasses, seed) if rotate else torch.eye(num_subclasses)
    means, directions, scales = [], [], []
    for label, (count, total, products) in enumerate(zip(*moments.state(), strict=True)):
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        # In coordinates of the subspace that is kept, of which there are fewer than D.
        eigenvalues, vectors = torch.linalg.eigh(keep.T @ covariance @ keep)
        _check_rank(eigenvalues, label, num_subclasses, noise=products.diagonal().sum() / count)
        leading = keep @ vectors.flip(-1)[:, :num_subclasses]  # [D, K], largest variance first
        signs = leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()
        means.append(keep @ (keep.T @ mean))
        directions.append(leading * signs @ rotation.double())
        scales.append(eigenvalues[-num_subclasses:].mean().sqrt() if scale else torch.ones((), dtype=torch.float64))
    return Directions(torch.stack(means), torch.stack(directions), torch.stack(scales))


def random_rotation(size: int, seed: int) -> Tensor:
    """A `[size, size]` orthonormal matrix in float64, uniformly distributed, the same for the same seed."""
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orthonormal, triangular = torch.linalg.qr(normal)
    return orthonormal * triangular.diagonal().sign()


def subclass_logits(embeddings: Tensor, directions: Directions) -> Tensor:
    """Where each row lies along the directions of every class, its own and the others.

    Args:
        embeddings: `[R, D]`.
        directions: of K subclasses in each of C classes.

    Returns:
        `[R, C, K]` in the dtype of the directions.
    """
    offsets = torch.einsum("cd,cdk->ck", directions.mean, directions.directions)
    projected = torch.einsum("rd,cdk->rck", embeddings.to(offsets.dtype), directions.directions)
    return (projected - offsets) / directions.scale[:, None]


def subclass_targets(
    teacher_logits: Tensor, subclass_logits: Tensor, temperature: float = 1.0, subclass_temperature: float = 1.0
) -> Tensor:
    """What the student learns: each class's tempered probability, split among its subclasses.

    Tempered first, then split (our choice), so that the sum over subclasses is the tempered teacher at every
    temperature.

    Args:
        teacher_logits: `[R, C]`, or `[R, 1]` of a head of one logit, which says how much class 1 leads class 0.
        subclass_logits: `[R, C, K]`.
        temperature: of the classes.
        subclass_temperature: of the split; towards infinity every subclass gets 1/K, towards 0 one gets all.

    Returns:
        `[R, C, K]` probabilities, a constant, in at least float32.
    """
    dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
    logits = two_logits(teacher_logits.detach()).to(dtype)
    class_probs = (logits / temperature).softmax(-1)
    split = (subclass_logits.detach().to(dtype) / subclass_temperature).softmax(-1)
    return class_probs[..., None] * split


def two_logits(logits: Tensor) -> Tensor:
    """`[R, 1]` logits of a yes-or-no head as `[R, 2]` with the same probabilities; others as they are."""
    return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits


def lelp_loss(student_logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student's C * K outputs against the targets, times temperature squared.

    Args:
        student_logits: `[B, C * K]`, subclass k of class c at `c * K + k`. Receives the gradient.
        targets: `[B, C, K]` of `subclass_targets` at the same temperature.
        temperature: of the student; the square keeps gradients at one size over temperatures.

    Returns:
        `[B]` in nats times temperature squared, at least float32.

    Source: arXiv:2409.20449; with K = 1 the cross-entropy form of Hinton et al. 2015 (arXiv:1503.02531).
    """
    log_probs = (_at_least_float32(student_logits) / temperature).log_softmax(-1)
    return -(temperature**2) * (targets.detach().flatten(1) * log_probs).sum(-1)


def class_logits(student_logits: Tensor, num_classes: int) -> Tensor:
    """The student's logits of classes: log of the summed exponentials over each class's subclasses.

    Args:
        student_logits: `[..., C * K]`, subclass k of class c at `c * K + k`.
        num_classes: C.

    Returns:
        `[..., C]`, whose softmax is the student's probability of each class.
    """
    return student_logits.unflatten(-1, (num_classes, -1)).logsumexp(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _null_space(weight: Tensor) -> Tensor:
    """`[D, D - rank]` orthonormal basis of the embeddings that change no logit."""
    _, singular_values, vectors = torch.linalg.svd(weight, full_matrices=True)
    tolerance = singular_values.max() * max(weight.shape) * torch.finfo(weight.dtype).eps
    return vectors[(singular_values > tolerance).sum() :].T


def _check_counts(count: Tensor, num_subclasses: int) -> None:
    faulty = [f"class {label} has {int(rows)}" for label, rows in enumerate(count) if rows <= num_subclasses]
    if num_subclasses < 1 or faulty:
        raise ValueError(
            f"{num_subclasses} subclasses need at least {num_subclasses + 1} rows in every class; "
            f"{', '.join(faulty) or 'one is the fewest'}. Use fewer subclasses, or more rows."
        )


def _check_rank(eigenvalues: Tensor, label: int, num_subclasses: int, noise: Tensor) -> None:
    """Refuse directions whose variance is only rounding: of the teacher's float32 embeddings, whatever their size."""
    tolerance = max(eigenvalues.max() if len(eigenvalues) else noise, noise) * torch.finfo(torch.float32).eps
    rank = int((eigenvalues > tolerance).sum())
    if rank < num_subclasses:
        raise ValueError(
            f"The embeddings of class {label} vary along {rank} directions only, {num_subclasses} subclasses need as "
            "many. Use fewer subclasses, or more varied rows."
        )
