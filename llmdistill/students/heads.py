"""A student with what it needs in training only: projections, critics and baselines, called in one forward.

Data-parallel wrappers and ZeRO see the parameters that a forward uses, so everything that learns is used in the one
forward of `StudentWithHeads`. What is saved in the end is the student alone.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

BOUNDS = ("mi_alpha", "info_nce", "nwj")
"""Objectives that compare the rows of a batch with one another, through critics."""
CRITIC_WIDTH = 64
STUDENT = "student."
"""Prefix of the student's own parameters."""


class Compared(NamedTuple):
    """What a forward gives for the objective, stacked over the P pairs of layers."""

    logits: Tensor
    """`[B, C]` of the student."""
    student: Tensor
    """`[P, B, W]`: features brought to the teacher's width, or to the critic's."""
    teacher: Tensor
    """`[P, B, W]`, through the critic's own network where there is one."""
    extra: Tensor | None
    """`[P, B]` log-baselines of a bound, or `[P, W]` log-variances of `vid`."""


class StudentWithHeads(nn.Module):
    """A classifier, and for each pair of layers the networks by which they are compared.

    Args:
        student: a classifier of the transformers library; gives hidden states.
        pairs: (student's layer, teacher's layer), counted from 1; 0 would be the embeddings.
        objective: one of `BOUNDS`, `vid`, or a name of `llmdistill.objectives.features.FEATURES`.
        teacher_width: Ht of the teacher's hidden states.
        pooling: `first` takes the vector of the first token, `mean` that of all tokens.
        has_baseline: whether a bound has a log-baseline network of its own.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        pairs: list[tuple[int, int]],
        objective: str,
        teacher_width: int,
        pooling: str,
        has_baseline: bool = False,
    ):
        super().__init__()
        self.student, self.pairs, self.pooling = student, pairs, pooling
        self.config = student.config  # DeepSpeed and the trainer library look there
        width = student.config.get_text_config().hidden_size
        heads = {}
        if objective in BOUNDS:
            heads["student"] = _each(pairs, lambda: critic(width, CRITIC_WIDTH))
            heads["teacher"] = _each(pairs, lambda: critic(teacher_width, CRITIC_WIDTH))
            if has_baseline:
                heads["baseline"] = _each(pairs, lambda: critic(teacher_width, 1))
        elif width != teacher_width or objective == "vid":
            heads["student"] = _each(pairs, lambda: Float32Linear(width, teacher_width))
        self.heads = nn.ModuleDict(heads)
        self.log_variance = nn.Parameter(torch.zeros(len(pairs), teacher_width)) if objective == "vid" else None
        first = next(student.parameters())
        if hasattr(first, "ds_id"):  # ZeRO-3 shards parameters of one dtype; its optimizer keeps float32 copies
            self.heads.to(first.dtype)
            if self.log_variance is not None:
                self.log_variance.data = self.log_variance.data.to(first.dtype)

    def forward(self, teacher_features: Tensor, **inputs: Tensor) -> Compared:
        """Compare a batch with the teacher's pooled features.

        Args:
            teacher_features: `[P, B, Ht]`, a constant.
            inputs: of the student.
        """
        output = self.student(**inputs, output_hidden_states=True)
        states = [output.hidden_states[layer] for layer, _ in self.pairs]
        if not states:
            return Compared(output.logits, teacher_features, teacher_features, None)
        features = torch.stack([pooled(state, inputs["attention_mask"], self.pooling) for state in states])
        with torch.autocast(features.device.type, enabled=False):  # critics are float32 throughout
            student, teacher = features.float(), teacher_features.float()
            # A copy: data-parallel wrappers take a parameter that a forward returns for one that was used twice.
            extra = None if self.log_variance is None else self.log_variance.float().clone()
            if "baseline" in self.heads:
                extra = _apply(self.heads["baseline"], teacher)[..., 0]
            if "student" in self.heads:
                student = _apply(self.heads["student"], student)
            if "teacher" in self.heads:
                teacher = _apply(self.heads["teacher"], teacher)
        return Compared(output.logits, student, teacher, extra)

    def activation_checkpointing_enable(self, *arguments, **options) -> None:
        """The student's own; the heads hold little."""
        self.student.activation_checkpointing_enable(*arguments, **options)

    def head_parameters(self) -> set[str]:
        """Names of the parameters that are not the student's."""
        return {name for name, _ in self.named_parameters() if not name.startswith(STUDENT)}


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever its weights are kept in: DeepSpeed makes them bfloat16."""

    def forward(self, features: Tensor) -> Tensor:
        """`[..., outputs]` in float32."""
        return nn.functional.linear(features.float(), self.weight.float(), self.bias.float())


def student_weights(folder: Path) -> dict[str, Tensor]:
    """The student's own weights from a folder to which a `StudentWithHeads` was saved."""
    weights = load_file(folder / "model.safetensors")
    return {name.removeprefix(STUDENT): values for name, values in weights.items() if name.startswith(STUDENT)}


def pooled(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """One vector for each text.

    Args:
        states: `[B, S, H]`.
        attention_mask: `[B, S]`.
        pooling: `first` token or `mean` of all tokens.

    Returns:
        `[B, H]`.
    """
    if pooling == "first":
        return states[:, 0]
    mask = attention_mask[..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


def critic(width: int, outputs: int) -> nn.Sequential:
    """The network of a separable critic or of a baseline.

    Source: He et al. 2021, Distiller (arXiv:2109.11105): three linear layers with ReLU between them.
    """
    hidden = [Float32Linear(width, width), nn.ReLU(), Float32Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, Float32Linear(width, outputs))


def layer_pairs(num_student: int, num_teacher: int, layer_map: str) -> list[tuple[int, int]]:
    """Which layer of the teacher each layer of the student is compared with, both counted from 1.

    Args:
        num_student: layers of the student.
        num_teacher: layers of the teacher, at least as many.
        layer_map: `skip` spreads the student's over the teacher's, `last` pairs the last ones.

    Raises:
        ValueError: the teacher has fewer layers than the student.
    """
    if num_student > num_teacher:
        raise ValueError(f"The student has {num_student} layers, the teacher only {num_teacher}.")
    layers = range(1, num_student + 1)
    if layer_map == "skip":
        return [(layer, layer * num_teacher // num_student) for layer in layers]
    return [(layer, num_teacher - num_student + layer) for layer in layers]


def _each(pairs: list[tuple[int, int]], make) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in pairs)


def _apply(networks: nn.ModuleList, features: Tensor) -> Tensor:
    """`[P, B, W]` from `[P, B, H]`, each pair through its own network."""
    return torch.stack([network(values) for network, values in zip(networks, features, strict=True)])
