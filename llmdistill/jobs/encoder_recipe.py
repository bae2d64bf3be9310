"""The recipes of the encoder job, and the proof that they can work."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmdistill import classifiers, models
from llmdistill.data import glue as data
from llmdistill.data.rows import Source, together
from llmdistill.errors import UserError
from llmdistill.evaluation.glue import TASKS
from llmdistill.jobs.checks import Faults, check_context, check_launch, check_training_section
from llmdistill.jobs.sections import Teacher, check_origin
from llmdistill.students.heads import layer_pairs
from llmdistill.students.init import check_layers
from llmdistill.trainers.finetune import FinetuneConfig
from llmdistill.trainers.lelp import LelpConfig
from llmdistill.trainers.lelp_targets import subclass_numbers
from llmdistill.trainers.mi_alpha import MiAlphaConfig, check_full_batch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig


@dataclass(kw_only=True)
class Student:
    """The model that is trained: an encoder of its own, or cut from the teacher; its head is new where it has none."""

    model: str | None = None
    """`samples/<name>`, a folder, or a name on the Hub."""
    from_teacher: bool = False
    """Take the teacher's embeddings and some of its layers."""
    layers: int | list[int] | None = None
    """With `from_teacher`: the layers to keep, or how many; they are then chosen by how little the output changes
    without the others, on the first `probe_rows` training rows."""
    probe_rows: int = 64
    trust_remote_code: bool = False
    """Run Python code that lies beside the model."""

    def __post_init__(self):
        check_origin(self.model, self.from_teacher, self.layers, self.probe_rows)


@dataclass(kw_only=True)
class Evaluation:
    """What the finished student and the teacher are compared on."""

    data: Source
    """Held-out rows."""
    task: Literal[tuple(TASKS)] | None = None
    """A task of GLUE, whose official metrics come first."""
    batch_size: int = 32

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")


@dataclass(kw_only=True)
class LelpRecipe:
    """A teacher of few classes teaches a student pseudo-subclasses."""

    method: Literal["lelp"]
    teacher: Teacher
    student: Student
    data: list[Source]
    """Training rows: one source, or several that are put one after another."""
    training: LelpConfig
    evaluation: Evaluation | None = None

    def __post_init__(self):
        check_training_section(self.training, self.evaluation is not None)


@dataclass(kw_only=True)
class MiAlphaRecipe:
    """A teacher teaches a student with its logits and its layers."""

    method: Literal["mi_alpha"]
    teacher: Teacher
    student: Student
    data: list[Source]
    """Training rows: one source, or several that are put one after another."""
    training: MiAlphaConfig
    evaluation: Evaluation | None = None

    def __post_init__(self):
        check_training_section(self.training, self.evaluation is not None)


@dataclass(kw_only=True)
class FinetuneRecipe:
    """An encoder learns a task from labels alone."""

    method: Literal["finetune"]
    student: Student
    data: list[Source]
    """Training rows: one source, or several that are put one after another."""
    training: FinetuneConfig
    evaluation: Evaluation | None = None
    teacher: None = None

    def __post_init__(self):
        check_training_section(self.training, self.evaluation is not None)
        if self.student.model is None:
            raise ValueError("`student.model` is missing: fine-tuning has no teacher to cut a student from.")


Recipe = LelpRecipe | MiAlphaRecipe | FinetuneRecipe


@dataclass(frozen=True)
class Plan:
    """What was found out before any weights were loaded."""

    rows: "Dataset"
    """Training rows, as they came."""
    held_out: "Dataset | None"
    """Rows of the evaluation."""
    names: list[str] | None
    """Of the student's classes; None where it predicts a number."""
    outputs: int
    """Of the student for each class."""


def check(recipe: Recipe) -> Plan:
    """Prove, before any weights are loaded, that the run can work.

    Raises:
        UserError: all faults that were found, one line each.
    """
    faults, configs = Faults("The run cannot work:"), {}
    faults.attempt("training", check_launch, recipe.training)
    for key, section in (("teacher", recipe.teacher), ("student", recipe.student)):
        if section is not None and section.model is not None:
            options = {"trust_remote_code": section.trust_remote_code}
            configs[key] = faults.attempt(f"{key}.model", models.load_config, section.model, **options)
    faults.attempt("training.max_length", check_context, recipe.training.max_length, configs)
    column = getattr(recipe.training, "subclass_column", None)
    extra = [] if column is None else [column]
    parts = [faults.attempt(f"data.{index}", data.load, source, extra) for index, source in enumerate(recipe.data)]
    if recipe.student.from_teacher and configs.get("teacher") is not None:
        num_layers = configs["teacher"].get_text_config().num_hidden_layers
        faults.attempt("student.layers", check_layers, recipe.student.layers, num_layers)
    if recipe.method == "mi_alpha" and None not in configs.values():
        faults.attempt("student", _check_depth, recipe, configs)
    faults.report()
    rows = faults.attempt("data", together, parts)
    faults.report()
    held_out = faults.attempt("evaluation.data", _held_out, recipe, rows)
    names = faults.attempt("teacher" if recipe.teacher else "data", _class_names, recipe, configs, rows)
    faults.report()
    labelled = faults.attempt("data", data.with_class_ids, rows, names, "The data set")
    if labelled is not None:
        faults.attempt("data", _check_labels, recipe, labelled, names)
    if held_out is not None:
        faults.attempt("evaluation.data", data.with_class_ids, held_out, names, "The data set")
    faults.report()
    if recipe.method == "mi_alpha":
        faults.attempt("data", check_full_batch, len(rows), recipe.training)
    faults.report()
    return Plan(rows, held_out, names, _outputs(recipe, labelled))


def _check_depth(recipe: MiAlphaRecipe, configs: dict[str, "PreTrainedConfig"]) -> None:
    """Refuse a student of more layers than the teacher has."""
    if recipe.student.model is not None and recipe.training.objective != "none":
        layers = (configs[key].get_text_config().num_hidden_layers for key in ("student", "teacher"))
        layer_pairs(*layers, recipe.training.layer_map)


def _held_out(recipe: Recipe, rows: "Dataset") -> "Dataset | None":
    if recipe.evaluation is None:
        return None
    texts = 2 if "pair" in rows.column_names else 1
    task = recipe.evaluation.task
    if task is not None and TASKS[task].texts != texts:
        raise UserError(f"`{task}` has {TASKS[task].texts} texts in a row, the training rows {texts}.")
    column = getattr(recipe.training, "subclass_column", None)
    extra = [column] if column is not None and recipe.training.eval_strategy != "no" else []
    held_out = data.load(recipe.evaluation.data, extra, texts=texts)
    if data.labels_of(held_out) is None:
        raise UserError("no row has a label to score by.")
    return held_out


def _class_names(recipe: Recipe, configs: dict[str, "PreTrainedConfig"], rows: "Dataset") -> list[str] | None:
    """The student's classes: its own head's, the teacher's, or those of the rows."""
    own = _own_names(configs.get("student"))
    if recipe.teacher is None:
        labels = data.labels_of(rows)
        if labels is None:
            raise UserError("fine-tuning needs rows with a `label`.")
        names = None if labels.names is None else list(labels.names)
    else:
        names = classifiers.class_names(configs["teacher"])
        if configs["teacher"].problem_type == "multi_label_classification":
            raise UserError("the teacher says yes or no to each class by itself; it must choose one of several.")
        if classifiers.num_subclasses(configs["teacher"]) > 1:
            raise UserError("the teacher was taught subclasses itself: its classes are no linear layer's outputs.")
        if not _is_classifier(configs["teacher"]):
            raise UserError(
                f"the model has no classification head ({', '.join(configs['teacher'].architectures or ['?'])}). "
                "Fine-tune it first: `method: finetune`."
            )
        _check_regression(recipe, names)
    if own is None or names is None or len(own) != len(names):
        return names
    data.class_order(names, own, "The teacher" if recipe.teacher else "The data set")
    return own


def _check_regression(recipe: LelpRecipe | MiAlphaRecipe, names: list[str] | None) -> None:
    if names is not None:
        return
    if recipe.method == "lelp":
        raise UserError("the teacher predicts a number, LELP needs classes.")
    if recipe.training.logit_weight > 0 and recipe.training.logit_loss == "cross_entropy":
        raise UserError("cross-entropy of one logit is 0 whatever the student says: set `training.logit_loss: mse`.")


def _is_classifier(config: "PreTrainedConfig") -> bool:
    return any("Classification" in name for name in config.architectures or [])


def _own_names(config: "PreTrainedConfig | None") -> list[str] | None:
    """Names of a head that the student has already; not where they are numbers only."""
    if config is None or not _is_classifier(config):
        return None
    names = classifiers.class_names(config)
    return None if names is None or data.are_numbers(names) else names


def _check_labels(recipe: Recipe, rows: "Dataset", names: list[str] | None) -> None:
    """Refuse missing labels that are needed, and classes too small for LELP."""
    missing = data.num_unlabelled(rows)
    needed = recipe.teacher is None or recipe.training.label_weight > 0
    if missing and needed:
        raise UserError(f"{missing} of {len(rows)} rows have no label. Label them, or distil with `label_weight: 0`.")
    targets = getattr(recipe.training, "targets", None)
    if missing and targets == "oracle_subclasses":
        raise UserError(f"{missing} of {len(rows)} rows have no label, so their true subclass is not known either.")
    if targets != "lelp" or missing:
        return
    counts, least = Counter(rows[data.LABEL]), recipe.training.num_subclasses + 1
    if small := [f"{name} has {counts[index]}" for index, name in enumerate(names) if counts[index] < least]:
        raise UserError(
            f"{recipe.training.num_subclasses} subclasses need at least {least} rows in every class; "
            f"{', '.join(small[:5])}. Lower `training.num_subclasses`, or take more rows."
        )


def _outputs(recipe: Recipe, rows: "Dataset") -> int:
    """Outputs of the student for each class."""
    if recipe.method != "lelp" or recipe.training.targets == "vanilla":
        return 1
    if recipe.training.targets != "oracle_subclasses":
        return recipe.training.num_subclasses
    kinds = map(str, rows[recipe.training.subclass_column])
    numbers = subclass_numbers(list(zip(rows[data.LABEL], kinds, strict=True)))
    return max(numbers.values()) + 1


def load_tokenizers(recipe: Recipe) -> tuple[Any, Any]:
    """The student's tokenizer and the teacher's."""
    student, teacher = recipe.student, recipe.teacher
    of_teacher = None
    if teacher is not None:
        of_teacher = models.load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code)
    if student.from_teacher:
        return of_teacher, of_teacher
    return models.load_tokenizer(student.model, trust_remote_code=student.trust_remote_code), of_teacher
