"""The recipe of the language job, and the proof that it can work."""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llmdistill import models
from llmdistill.data import language as data
from llmdistill.data.rows import Source, together
from llmdistill.data.vocabulary import shared_vocabulary
from llmdistill.distributed import plain_loading
from llmdistill.evaluation.multiple_choice import check_file
from llmdistill.jobs.checks import Faults, check_context, check_launch, check_training_section
from llmdistill.jobs.sections import Teacher, check_origin
from llmdistill.students.init import check_layers
from llmdistill.trainers.taid import TaidConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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
        check_origin(self.model, self.from_teacher, self.layers, self.probe_rows)


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

    data: Source
    """Held-out rows."""
    batch_size: int = 8
    mask: Literal["assistant", "all"] = "assistant"
    """Tokens that count."""
    max_length: int | None = None
    """Tokens of a row; by default `training.max_length`."""
    generate: int = 32
    """Rows whose prompts are answered for ROUGE-L; 0 for none."""
    max_new_tokens: int = 128
    """Of an answer."""
    multiple_choice: list[MultipleChoice] = field(default_factory=list)
    """Sets for lm-evaluation-harness (extra `eval`)."""

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("max_length", 1), ("generate", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")


@dataclass(kw_only=True)
class Recipe:
    """A recipe of this job."""

    method: Literal["taid"]
    student: Student
    data: list[Source]
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
        check_training_section(self.training, self.evaluation is not None)

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
    faults = Faults("The run cannot work:")
    faults.attempt("training", check_launch, recipe.training)
    configs = {}
    for key, section in (("teacher", recipe.teacher), ("student", recipe.student)):
        if section is not None and section.model is not None:
            options = {"trust_remote_code": section.trust_remote_code}
            configs[key] = faults.attempt(f"{key}.model", models.load_config, section.model, **options)
    sources = [faults.attempt(f"data.{index}", data.load, source) for index, source in enumerate(recipe.data)]
    faults.attempt("training.max_length", check_context, recipe.training.max_length, configs)
    held_out = _check_evaluation(recipe, configs, faults)
    if recipe.student.from_teacher and configs["teacher"] is not None:
        num_layers = configs["teacher"].get_text_config().num_hidden_layers
        faults.attempt("student.layers", check_layers, recipe.student.layers, num_layers)
    faults.report()
    rows = faults.attempt("data", together, sources)
    with plain_loading(recipe.training):
        tokenizer = faults.attempt("student", _tokenizer, recipe, configs)
    faults.report()
    if held_out is not None:
        faults.attempt("evaluation", tokenize_held_out, recipe, held_out, tokenizer)
    faults.report()
    return tokenizer, rows


def check_evaluation(recipe: Recipe) -> "Dataset":
    """Prove that the evaluation of a trained run can work, and return its raw rows.

    Raises:
        UserError: all faults that were found, one line each.
    """
    faults = Faults("The evaluation cannot work:")
    configs = {"teacher": models.load_config(recipe.teacher.model)} if recipe.teacher is not None else {}
    rows = _check_evaluation(recipe, configs, faults)
    faults.report()
    return rows


def tokenize_held_out(recipe: Recipe, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """The rows of the evaluation as `input_ids` and `labels`."""
    section = recipe.evaluation
    return data.tokenize(rows, tokenizer, section.mask, section.max_length or recipe.training.max_length)


def _check_evaluation(recipe: Recipe, configs: dict[str, Any], faults: Faults) -> "Dataset | None":
    section = recipe.evaluation
    if section is None:
        return None
    if section.max_length is not None:
        faults.attempt("evaluation.max_length", check_context, section.max_length, configs)
    for index, choice in enumerate(section.multiple_choice):
        faults.attempt(f"evaluation.multiple_choice.{index}", check_file, choice.path)
    return faults.attempt("evaluation.data", data.load, section.data)


def _tokenizer(recipe: Recipe, configs: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """The student's tokenizer, proven to be the teacher's; it borrows the teacher's chat template if it has none."""
    tokenizer = models.load_tokenizer(recipe.tokenizer_source, trust_remote_code=recipe.student.trust_remote_code)
    if "student" in configs and recipe.teacher is not None:
        of_teacher = load_teacher_tokenizer(recipe)
        sizes = (configs[key].get_text_config().vocab_size for key in ("student", "teacher"))
        shared_vocabulary(tokenizer, of_teacher, *sizes)
        if tokenizer.chat_template is None and of_teacher.chat_template is not None:
            warnings.warn("The student has no chat template: it takes the teacher's.", stacklevel=2)
            tokenizer.chat_template = of_teacher.chat_template
        student_size, teacher_size = (
            _num_parameters(configs[key], section.trust_remote_code)
            for key, section in (("student", recipe.student), ("teacher", recipe.teacher))
        )
        if student_size > teacher_size:
            warnings.warn("The student is larger than its teacher.", stacklevel=2)
    return tokenizer


def load_teacher_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies beside the teacher."""
    return models.load_tokenizer(recipe.teacher.model, trust_remote_code=recipe.teacher.trust_remote_code)


def _num_parameters(config: Any, trust_remote_code: bool) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).num_parameters()
