"""The recipe of the language job, and the proof that it can work."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llmdistill import models
from llmdistill.data import language as data
from llmdistill.data.vocabulary import shared_vocabulary
from llmdistill.distributed import plain_loading
from llmdistill.errors import UserError
from llmdistill.evaluation.multiple_choice import check_file
from llmdistill.trainers.taid import TaidConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Teacher:
    """The model that is asked."""

    model: str
    """`samples/<name>`, a folder, or a name on the Hub."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """By default bfloat16 where the machine is fast at it, else float32."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model."""


@dataclass(kw_only=True)
class Lora:
    """Low-rank adapters on a frozen student."""

    rank: int = 16
    alpha: float = 32.0
    """Scale of the adapters' output is alpha / rank."""
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get adapters; the output head cannot be one."""


@dataclass(kw_only=True)
class Student:
    """The model that is trained: one of its own, or cut from the teacher."""

    model: str | None = None
    """`samples/<name>`, a folder, or a name on the Hub."""
    from_teacher: bool = False
    """Take the teacher's embeddings and head, and some of its layers."""
    layers: int | list[int] | None = None
    """With `from_teacher`: the layers to keep, or how many; they are then chosen by how little the output changes
    without the others, on the first `probe_rows` training rows."""
    probe_rows: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that the optimizer keeps; mixed precision (`training.bf16`) computes in bfloat16 anyway."""
    lora: Lora | None = None
    """Train adapters only; the saved model has them merged."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model."""

    def __post_init__(self):
        if self.from_teacher == (self.model is not None):
            raise ValueError("give either `model` or `from_teacher: true`, and not both.")
        if self.from_teacher and self.layers is None:
            raise ValueError("`from_teacher` needs `layers`: how many to keep, or a list of them.")
        if not self.from_teacher and self.layers is not None:
            raise ValueError("`layers` cuts the teacher: it needs `from_teacher: true`.")
        if self.probe_rows < 1:
            raise ValueError(f"`probe_rows` must be at least 1, got {self.probe_rows}.")


@dataclass(kw_only=True)
class MultipleChoice:
    """A file of `{query, choices, gold}` rows."""

    name: str
    path: str
    rows: int | None = None
    """Only the first so many."""


@dataclass(kw_only=True)
class Evaluation:
    """What the finished student, the student before training and the teacher are compared on."""

    data: data.Source
    """Held-out rows."""
    batch_size: int = 8
    max_length: int | None = None
    """Tokens of a row; by default `training.max_length`."""
    generate: int = 32
    """Rows whose prompts are answered for ROUGE-L; 0 for none."""
    max_new_tokens: int = 128
    """Of an answer."""
    multiple_choice: list[MultipleChoice] = field(default_factory=list)
    """Sets for lm-evaluation-harness (extra `eval`)."""


@dataclass(kw_only=True)
class Recipe:
    """A recipe of this job."""

    method: Literal["taid"]
    student: Student
    data: list[data.Source]
    """Training rows: one source, or several that are put one after another."""
    training: TaidConfig
    teacher: Teacher | None = None
    """Not needed where `training.label_weight` is 1."""
    evaluation: Evaluation | None = None
    """Without it the run ends with the trained model."""

    def __post_init__(self):
        if self.teacher is None and (self.student.from_teacher or self.training.label_weight < 1):
            raise ValueError(
                "`teacher` is missing: only `training.label_weight: 1` with a `student.model` needs none."
            )
        if not self.training.output_dir or self.training.output_dir == "trainer_output":
            raise ValueError("`training.output_dir` is missing: the folder of the run, e.g. runs/my-student.")

    @property
    def tokenizer_source(self) -> str:
        """The model whose tokenizer the student has."""
        return self.teacher.model if self.student.from_teacher else self.student.model


def check(recipe: Recipe) -> tuple["PreTrainedTokenizerBase", "Dataset"]:
    """Prove, before any weights are loaded, that the run can work.

    Returns:
        The student's tokenizer and the raw training rows.

    Raises:
        UserError: all faults that were found, one line each.
    """
    import datasets

    faults: list[str] = []

    def attempt(key: str, action: Callable, *arguments: Any, **options: Any) -> Any:
        try:
            return action(*arguments, **options)
        except ValueError as error:
            faults.append(f"  {key}: {error}")
            return None

    configs = {}
    for key, section in (("teacher", recipe.teacher), ("student", recipe.student)):
        if section is not None and section.model is not None:
            options = {"trust_remote_code": section.trust_remote_code}
            configs[key] = attempt(f"{key}.model", models.load_config, section.model, **options)
    sources = [attempt(f"data.{index}", data.load, source) for index, source in enumerate(recipe.data)]
    if recipe.evaluation is not None:
        attempt("evaluation.data", data.load, recipe.evaluation.data)
        for index, choice in enumerate(recipe.evaluation.multiple_choice):
            attempt(f"evaluation.multiple_choice.{index}", check_file, choice.path)
    for key, config in configs.items():
        if config is not None:
            attempt("training.max_length", _check_context, recipe, key, config)
    if recipe.student.from_teacher and configs["teacher"] is not None:
        attempt("student.layers", _check_layers, recipe.student.layers, configs["teacher"])
    tokenizer = None
    if not faults:
        with plain_loading(recipe.training):
            tokenizer = attempt("student", _tokenizer, recipe, configs)
        columns = {tuple(rows.column_names) for rows in sources}
        if len(columns) > 1:
            faults.append(f"  data: the sources have different kinds of rows: {sorted(columns)}. Use one kind.")
    if faults:
        raise UserError("The run cannot work:\n" + "\n".join(faults))
    return tokenizer, datasets.concatenate_datasets(sources)


def _check_context(recipe: Recipe, key: str, config: Any) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = recipe.training.max_length
    if wanted is None:
        raise ValueError("it must be a number: rows longer than the models' context cannot be fed to them.")
    if context is not None and wanted > context:
        raise ValueError(f"{wanted} tokens exceed the {key}'s context of {context}. Lower it.")


def _check_layers(layers: int | list[int], config: Any) -> None:
    total = config.get_text_config().num_hidden_layers
    wanted = range(layers) if isinstance(layers, int) else layers
    if not wanted or max(wanted) >= total or min(wanted) < 0 or list(wanted) != sorted(set(wanted)):
        raise ValueError(
            f"the teacher has {total} layers: give how many to keep (1 to {total}), or a rising list of numbers from "
            f"0 to {total - 1}; got {layers}."
        )


def _tokenizer(recipe: Recipe, configs: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """The student's tokenizer, proven to be the teacher's; it borrows the teacher's chat template if it has none."""
    tokenizer = models.load_tokenizer(recipe.tokenizer_source, trust_remote_code=recipe.student.trust_remote_code)
    if "student" in configs and recipe.teacher is not None:
        of_teacher = models.load_tokenizer(recipe.teacher.model, trust_remote_code=recipe.teacher.trust_remote_code)
        sizes = (configs[key].get_text_config().vocab_size for key in ("student", "teacher"))
        shared_vocabulary(tokenizer, of_teacher, *sizes)
        if tokenizer.chat_template is None and of_teacher.chat_template is not None:
            warnings.warn("The student has no chat template: it takes the teacher's.", stacklevel=2)
            tokenizer.chat_template = of_teacher.chat_template
        if _num_parameters(configs["student"]) > _num_parameters(configs["teacher"]):
            warnings.warn("The student is larger than its teacher.", stacklevel=2)
    return tokenizer


def _num_parameters(config: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()
