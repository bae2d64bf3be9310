"""Sections of a recipe that several jobs have."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class Teacher:
    """The model that is asked."""

    model: str
    """`samples/<name>`, a folder, or a name on the Hub."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """By default bfloat16 where the machine is fast at it, else float32."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model."""


def check_origin(model: str | None, from_teacher: bool, layers: int | list[int] | None, probe_rows: int) -> None:
    """Refuse a student of no origin, or of two.

    Raises:
        ValueError: says what to give.
    """
    if from_teacher == (model is not None):
        raise ValueError("give either `model` or `from_teacher: true`, and not both.")
    if from_teacher and layers is None:
        raise ValueError("`from_teacher` needs `layers`: how many to keep, or a list of them.")
    if not from_teacher and layers is not None:
        raise ValueError("`layers` cuts the teacher: it needs `from_teacher: true`.")
    if probe_rows < 1:
        raise ValueError(f"`probe_rows` must be at least 1, got {probe_rows}.")
