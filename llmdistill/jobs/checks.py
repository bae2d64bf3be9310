"""What every job proves before anything large is loaded."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmdistill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments

OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text"}
"""Architectures that number positions from the padding token's id + 1 on."""

IGNORED = (
    ("trust_remote_code", False, "set it in the sections `student` and `teacher`"),
    ("resume_from_checkpoint", None, "a run goes on from its last whole checkpoint by itself"),
    ("push_to_hub", False, "push the finished model yourself"),
    ("model_init_kwargs", None, "the sections `student` and `teacher` say how models are loaded"),
)
"""Settings of the trainer library that jobs would pass over: name, default, what to do instead."""


class Faults:
    """Faults of a recipe, gathered so that they are reported together.

    Args:
        heading: first line of the report.
    """

    def __init__(self, heading: str):
        self.heading, self.lines = heading, []

    def attempt(self, key: str, action: Callable, *arguments: Any, **options: Any) -> Any:
        """What `action` returns; None, and a line under `key`, where it refuses."""
        try:
            return action(*arguments, **options)
        except ValueError as error:
            self.lines.append(f"  {key}: {error}")
            return None

    def report(self) -> None:
        """Raise all faults so far as one `UserError`, if there are any."""
        if self.lines:
            raise UserError("\n".join([self.heading, *self.lines]))


def check_training_section(training: "TrainingArguments", has_evaluation: bool) -> None:
    """Refuse settings without which, or with which, no run can be made.

    Raises:
        ValueError: no `output_dir`, `eval_strategy` without held-out rows, or a setting that would have no effect.
    """
    if not training.output_dir or training.output_dir == "trainer_output":
        raise ValueError("`training.output_dir` is missing: the folder of the run, e.g. runs/my-student.")
    if training.eval_strategy != "no" and not has_evaluation:
        raise ValueError("`training.eval_strategy` needs an `evaluation` section with held-out rows.")
    for name, default, remedy in IGNORED:
        if getattr(training, name, default) != default:
            raise ValueError(f"`training.{name}` has no effect in a recipe: {remedy}.")


def check_launch(training: "TrainingArguments") -> None:
    """Refuse ways of starting that would silently do something else.

    Raises:
        ValueError: one process for several GPUs, or DeepSpeed without torchrun.
    """
    if training.n_gpu > 1:
        raise ValueError(
            f"one process sees {training.n_gpu} GPUs. Start one process for each (torchrun --nproc-per-node "
            f"{training.n_gpu} -m llmdistill ...), or show it one only (CUDA_VISIBLE_DEVICES=0)."
        )
    if training.deepspeed is not None and "RANK" not in os.environ:
        raise ValueError("`deepspeed` needs torchrun, also for one process: torchrun -m llmdistill ...")


def check_context(wanted: int | None, configs: dict[str, "PreTrainedConfig | None"]) -> None:
    """Refuse rows longer than a model's context; `configs` by the role of the model, None where it is not known.

    Raises:
        ValueError: names the model and its context.
    """
    if wanted is None:
        raise ValueError("it must be a number: rows longer than the models' context cannot be fed to them.")
    for role, config in configs.items():
        context = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
        if context is not None and config.model_type in OFFSET_POSITIONS:
            context -= config.pad_token_id + 1
        if context is not None and wanted > context:
            raise ValueError(f"{wanted} tokens exceed the {role}'s context of {context}. Lower it.")
