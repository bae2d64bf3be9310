"""TAID: the target moves from the student's own distribution to the teacher's while training goes on.

Source: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation", ICLR 2025 (arXiv:2501.16937).
"""

import math
import warnings

import torch
from torch import Tensor

from llmdistill.objectives.divergences import cross_entropy

MODES = ("adaptive", "linear", "exponential", "constant", "reference")


def interpolate_logits(student_logits: Tensor, teacher_logits: Tensor, t: float) -> Tensor:
    """Logits of the intermediate teacher, (1 - t) * student + t * teacher, a constant for the gradient.

    Args:
        student_logits: `[..., V]`, any float dtype.
        teacher_logits: `[..., V]`, same vocabulary.
        t: share of the teacher, in [0, 1]: 0 is the student itself, 1 plain distillation.

    Returns:
        `[..., V]` in at least float32, without gradient; `-inf` where either model's logit is `-inf`, except that at
        t = 0 and t = 1 the model with share 0 has no say.

    Raises:
        ValueError: `t` lies outside [0, 1].

    Source: section 3.1: logits are mixed, not probabilities, and the student is detached.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"`t` must lie in [0, 1], got {t}.")
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student, teacher = student_logits.detach().to(dtype), teacher_logits.detach().to(dtype)
    if t == 0:
        return student
    if t == 1:
        return teacher
    return (t * teacher).add_(student, alpha=1 - t)


def taid_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, t: float) -> Tensor:
    """The authors' form of the objective: cross-entropy of the student against the intermediate teacher.

    Its gradient equals that of `forward_kl(student, interpolate_logits(student, teacher, t))`; its value is larger by
    the entropy of the target.

    Args:
        student_logits: `[..., V]`, receives the gradient.
        teacher_logits: `[..., V]`, a constant.
        t: share of the teacher in the target, in [0, 1].

    Returns:
        `[...]` in nats.

    Source: section 3.1 and the authors' code.
    """
    return cross_entropy(student_logits, interpolate_logits(student_logits, teacher_logits, t))


class TaidSchedule:
    """The share `t` of the teacher in the target, as training goes on.

    Call `step` once per optimizer step with that step's mean loss; `t` is the value for the next one. Modes, with
    floor = t_start + (t_end - t_start) * step / num_steps:

    - `linear`: t is the floor.
    - `adaptive`: t grows by alpha * sigmoid(momentum of the loss's relative fall) * (1 - t), at least to the floor.
    - `exponential`: as `adaptive` with the sigmoid fixed at 1/2, so that the loss has no say.
    - `constant`: t stays at t_start; t_start = 1 is plain distillation.
    - `reference`: the authors' float32 arithmetic call for call, in which a non-finite loss makes t fall.

    Except in `reference`, non-finite losses are skipped and t never falls.

    Args:
        num_steps: optimizer steps of the whole training.
        t_start: share of the teacher at the first step, in [0, 1].
        t_end: largest share, in [t_start, 1].
        alpha: size of an adaptive step.
        beta: momentum of the relative change of the loss, in [0, 1).
        mode: one of `MODES`.

    Raises:
        ValueError: a value lies outside its range.

    Source: algorithm 1 and the authors' code. Deviation: theirs steps on every micro-batch of one rank, in evaluation
    too; here the caller steps once per optimizer step with the loss averaged over ranks and accumulation.
    """

    def __init__(
        self,
        num_steps: int,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        mode: str = "adaptive",
    ):
        if mode not in MODES:
            raise ValueError(f"Unknown mode `{mode}` of TaidSchedule: use one of {', '.join(MODES)}.")
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
        if not 0 <= t_start <= t_end <= 1:
            raise ValueError(f"Need 0 <= t_start <= t_end <= 1, got t_start={t_start} and t_end={t_end}.")
        if alpha <= 0 or not 0 <= beta < 1:
            raise ValueError(f"Need alpha > 0 and 0 <= beta < 1, got alpha={alpha} and beta={beta}.")
        if mode == "adaptive" and num_steps <= 2 / alpha:
            warnings.warn(
                f"The adaptive schedule equals the linear one here: over {num_steps} steps the linear floor rises "
                f"faster than alpha={alpha:g} can. Adaptivity shows from {math.floor(2 / alpha) + 1} steps on, or "
                f"with alpha > {2 / num_steps:.2g}.",
                stacklevel=2,
            )
        self.num_steps, self.t_start, self.t_end = num_steps, t_start, t_end
        self.alpha, self.beta, self.mode = alpha, beta, mode
        self.t = float(torch.tensor(t_start)) if mode == "reference" else t_start
        self._previous_loss: float | None = None
        self._momentum = 0.0
        self._num_calls = 0

    def step(self, loss: float, global_step: int | None = None) -> float:
        """Take note of a finished step's loss and return `t` for the next one.

        Args:
            loss: mean loss of the finished step, over all ranks and accumulation steps.
            global_step: number of the finished step, counted from 0; by default the number of calls so far.
        """
        step = self._num_calls if global_step is None else global_step
        self._num_calls += 1
        if self.mode == "constant":
            return self.t
        if self.mode == "reference":
            return self._reference_step(loss, step)
        if math.isfinite(loss):
            self.t = max(self.t, min(self.t_end, max(self._floor(step), self.t + self._growth(loss))))
            self._previous_loss = loss
        return self.t

    def state_dict(self) -> dict[str, float | int | None]:
        """What `load_state_dict` needs to go on exactly here, in JSON types."""
        return {
            "t": self.t,
            "previous_loss": self._previous_loss,
            "momentum": self._momentum,
            "num_calls": self._num_calls,
        }

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.t, self._previous_loss = state["t"], state["previous_loss"]
        self._momentum, self._num_calls = state["momentum"], state["num_calls"]

    def _floor(self, step: int) -> float:
        return self.t_start + (self.t_end - self.t_start) * (step / self.num_steps)

    def _growth(self, loss: float) -> float:
        """How much t grows beyond the floor's demand; the first call only takes note of the loss."""
        if self.mode == "linear" or self._previous_loss is None:
            return 0.0
        if self.mode == "adaptive":
            change = (self._previous_loss - loss) / (self._previous_loss + 1e-15)
            self._momentum = self.beta * self._momentum + (1 - self.beta) * change
        return self.alpha * _sigmoid(self._momentum) * (1 - self.t)

    def _reference_step(self, loss: float, step: int) -> float:
        """The authors' update in their float32 tensors; NaN loses every comparison of Python's `min` and `max`."""
        if self._previous_loss is not None:
            previous, t = torch.tensor(self._previous_loss), torch.tensor(self.t)
            change = (previous - torch.tensor(loss)) / (previous + 1e-15)
            momentum = self.beta * torch.tensor(self._momentum) + (1 - self.beta) * change
            grown = t + self.alpha * torch.sigmoid(momentum) * (1 - t)
            self.t = float(torch.as_tensor(min(self.t_end, max(self._floor(step), grown)), dtype=torch.float32))
            self._momentum = float(momentum)
        self._previous_loss = float(torch.tensor(loss))
        return self.t


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
