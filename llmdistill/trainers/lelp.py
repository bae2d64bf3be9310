"""LELP and its controls: a teacher of few classes teaches pseudo-subclasses of them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from llmdistill import classifiers
from llmdistill.data import glue as data
from llmdistill.errors import UserError
from llmdistill.objectives.labels import label_loss
from llmdistill.objectives.lelp import (
    Directions,
    Moments,
    class_logits,
    directions_from,
    lelp_loss,
    subclass_logits,
    subclass_targets,
)
from llmdistill.store import AnswerStore, fingerprint
from llmdistill.teachers.encoder import EncoderTeacher, ask
from llmdistill.trainers.common import DistillationMixin, Sampling, freeze, refused_settings, set_machine_defaults

DIRECTIONS = "directions.safetensors"


@dataclass(kw_only=True)
class LelpConfig(TrainingArguments):
    """The trainer library's arguments and what LELP adds to them."""

    targets: Literal["lelp", "vanilla", "uniform_split", "random_split", "oracle_subclasses"] = "lelp"
    """What a class is split by: the teacher's embeddings; not at all (plain distillation); evenly; by chance; or, for
    the row's own class, by the true subclass in `subclass_column`. The last three are controls."""
    num_subclasses: int = 4
    """Outputs of the student for each class; `vanilla` has one, `oracle_subclasses` as many as there are."""
    temperature: float = 1.0
    """Of teacher and student over classes."""
    subclass_temperature: float = 1.0
    """Of the split; smaller is harder."""
    null_space: bool = True
    """Look for directions outside what the teacher's logits already say."""
    rotate: bool = True
    """Turn the directions of all classes by one random rotation."""
    scale: bool = True
    """Divide by the spread of each class, so that a subclass temperature means the same on every teacher."""
    label_weight: float = 0.0
    """Share of the cross-entropy of the labels in the loss, in [0, 1); at 0 rows need no labels."""
    subclass_column: str | None = None
    """Column of the true subclass, for `oracle_subclasses`."""
    max_length: int = 128
    """Tokens of a row, of the teacher's as of the student's."""
    teacher_batch_size: int = 64
    """Rows that the teacher answers at once."""
    answers_folder: str | None = None
    """Where the teacher's answers are kept, for all runs that ask the same; by default `teacher` in `output_dir`."""
    bf16: bool | None = None
    """Compute in bfloat16; by default where the machine is fast at it."""
    train_sampling_strategy: Sampling = "group_by_length"
    save_total_limit: int | None = 2
    """Checkpoints kept on disk."""

    def __post_init__(self):
        set_machine_defaults(self)
        faults = refused_settings(self)
        super().__post_init__()
        self.remove_unused_columns = False  # the targets are no argument of the model
        for name in ("temperature", "subclass_temperature"):
            if getattr(self, name) <= 0:
                faults.append(f"`{name}` must be positive, got {getattr(self, name)}")
        if not 0 <= self.label_weight < 1:
            faults.append(f"`label_weight` must lie in [0, 1), got {self.label_weight}; `method: finetune` is for 1")
        if self.teacher_batch_size < 1:
            faults.append(f"`teacher_batch_size` must be at least 1, got {self.teacher_batch_size}")
        if self.num_subclasses < 1:
            faults.append(f"`num_subclasses` must be at least 1, got {self.num_subclasses}")
        if (self.targets == "oracle_subclasses") != (self.subclass_column is not None):
            faults.append("`subclass_column` goes with `targets: oracle_subclasses`")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def answers_root(self) -> Path:
        """Folder of the teacher's answers."""
        return Path(self.answers_folder or Path(self.output_dir) / "teacher").expanduser()


class LelpTrainer(DistillationMixin, Trainer):
    """Distils a classifier into a smaller one through pseudo-subclasses of its classes.

    Rows are texts with a label (see `llmdistill.data.glue`), or prepared (`input_ids`, `labels` and `targets`). The
    teacher is asked once, before the training; its answers stay on disk.

    Args:
        model: the student with K outputs for each of C classes, as `llmdistill.classifiers.new` makes it.
        teacher: a classifier with a linear head; None only where rows are prepared.
        args: a `LelpConfig`.
        processing_class: the student's tokenizer.
        teacher_processing_class: the teacher's, where it is another.
        kwargs: of the library's `Trainer`.

    Raises:
        ValueError: other classes or another number of outputs than the teacher's, or rows that cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        args: LelpConfig,
        processing_class: PreTrainedTokenizerBase,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ):
        targets = None
        if teacher is not None:
            targets = Targets(model, teacher, args, teacher_processing_class or processing_class)

        def prepared(rows: Dataset | None) -> Dataset | None:
            if rows is None or "targets" in rows.column_names:
                return rows
            if targets is None:
                raise ValueError("`teacher` is missing: only rows with `input_ids`, `labels` and `targets` need none.")
            return targets.add(rows, processing_class)

        super().__init__(
            model,
            args=args,
            processing_class=processing_class,
            train_dataset=prepared(train_dataset),
            eval_dataset=prepared(eval_dataset),
            data_collator=DataCollatorWithPadding(processing_class),
            **kwargs,
        )
        self._num_classes = len(classifiers.class_names(model.config))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The mean over rows of (1 - label_weight) * LELP + label_weight * cross-entropy of classes.

        Outputs, where asked for, are the logits `[B, C]` of classes.
        """
        labels, targets = inputs.pop("labels"), inputs.pop("targets")  # [B], [B, C * K]
        logits = model(**inputs).logits  # [B, C * K]
        of_classes = class_logits(logits.float(), self._num_classes)

        weight, counted = self.args.label_weight, torch.ones_like(labels, dtype=torch.bool)
        distillation = lelp_loss(logits, targets, self.args.temperature)
        loss, terms = distillation, {"distillation": distillation}
        if weight > 0:
            terms["label_loss"] = label_loss(of_classes, labels)
            loss = (1 - weight) * distillation + weight * terms["label_loss"]
        self.record(
            {name: self.mean_over_step(term, counted, num_items_in_batch, name) for name, term in terms.items()}
        )
        loss = self.mean_over_step(loss, counted, num_items_in_batch)
        return (loss, {"logits": of_classes}) if return_outputs else loss


class Targets:
    """What a student learns from a teacher's answers to rows: probabilities of subclasses.

    Args:
        student: whose classes and number of outputs count.
        teacher: a classifier of the same classes, in any order.
        args: of the training.
        tokenizer: the teacher's.

    Raises:
        ValueError: the two do not know the same classes, or the student has another number of outputs.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, args: LelpConfig, tokenizer: PreTrainedTokenizerBase
    ):
        names, theirs = (classifiers.class_names(model.config) for model in (student, teacher))
        if names is None or theirs is None:
            raise ValueError("LELP needs classes, but the student or the teacher predicts a number.")
        if len(names) != len(theirs):
            raise ValueError(f"The student knows {len(names)} classes, the teacher {len(theirs)}.")
        self.names, self.args, self.tokenizer = names, args, tokenizer
        self._column_of = torch.tensor(data.class_order(theirs, names, "The teacher")).argsort()
        self._num_subclasses = classifiers.num_subclasses(student.config)
        outputs = {"vanilla": 1, "oracle_subclasses": self._num_subclasses}.get(args.targets, args.num_subclasses)
        if self._num_subclasses != outputs:
            raise ValueError(
                f"`targets: {args.targets}` needs {outputs} outputs of the student for each class, it has "
                f"{self._num_subclasses}."
            )
        self._model = freeze(teacher).to(args.device)
        self._pad = DataCollatorWithPadding(tokenizer)
        self._directions: Directions | None = None
        self._oracle: dict[tuple[int, str], int] | None = None

    def add(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Rows as the student's inputs with `labels` and `targets`; directions are fitted on the first rows given.

        Args:
            rows: texts with or without labels, see `llmdistill.data.glue`.
            tokenizer: the student's.

        Raises:
            ValueError: classes that the models do not know, or no labels where `label_weight` is positive.
        """
        args = self.args
        with args.main_process_first(local=False, desc="tokenising"):
            rows = data.with_class_ids(rows, self.names, "The data set")
            texts = data.unlabelled(rows)
            asked, tokens = (data.tokenize(texts, one, args.max_length) for one in (self.tokenizer, tokenizer))
        teacher = EncoderTeacher(self._model, self._pad([asked[0]]))
        store = AnswerStore(args.answers_root, fingerprint(self._model, asked["input_ids"]), len(asked))
        ask(teacher, asked, self._pad, store, args.teacher_batch_size, args.process_index, args.world_size)
        PartialState().wait_for_everyone()

        labels = self._labels(rows, store)
        if args.targets == "lelp" and self._directions is None:
            self._directions = self._fit(store, labels, teacher.weight)
        split = self._splitter(rows, labels)
        targets = []
        for piece, answers in self._answers(store):
            targets.append(
                subclass_targets(
                    answers["logits"], split(piece, answers), args.temperature, args.subclass_temperature
                ).flatten(1)
            )
        tokens = tokens.add_column("labels", labels.tolist())
        return tokens.add_column("targets", list(torch.cat(targets).numpy()))

    def _answers(self, store: AnswerStore):
        """Piece by piece the rows' numbers and the answers, logits in the order of the student's classes."""
        for number, piece in enumerate(store.pieces()):
            answers = store.read(number)
            yield piece, answers | {"logits": answers["logits"][:, self._column_of]}

    def _labels(self, rows: Dataset, store: AnswerStore) -> Tensor:
        """`[R]` class ids; the teacher's arg max where a row has none."""
        labels = torch.full((len(rows),), -1)
        if data.LABEL in rows.column_names:
            labels = torch.tensor(rows[data.LABEL][:])
        unlabelled = labels == -1
        if unlabelled.any():
            if self.args.label_weight > 0:
                raise ValueError(
                    f"{int(unlabelled.sum())} of {len(rows)} rows have no label: set `label_weight` to 0, or label "
                    "them."
                )
            guesses = torch.cat([answers["logits"].argmax(-1) for _, answers in self._answers(store)])
            labels = torch.where(unlabelled, guesses, labels)
        return labels

    def _fit(self, store: AnswerStore, labels: Tensor, weight: Tensor) -> Directions:
        """The directions of these answers; those saved with the run where they are of just these answers."""
        args = self.args
        grouped = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
        settings = (self._num_subclasses, args.null_space, args.rotate, args.scale, args.seed, self.names)
        settings = {"of": repr((store.folder.name, grouped, *settings))}
        file = Path(args.output_dir) / DIRECTIONS
        with args.main_process_first(local=False, desc="fitting directions"):
            if not _is_of(file, settings):
                moments = Moments(len(self.names), weight.shape[-1])
                for piece, answers in self._answers(store):
                    moments.add(answers["embeddings"], labels[piece.start : piece.stop])
                options = (args.null_space, args.rotate, args.scale, args.seed)
                try:
                    fitted = directions_from(moments, weight, self._num_subclasses, *options)
                except ValueError as error:
                    names = ", ".join(f"{number} {name}" for number, name in enumerate(self.names))
                    raise UserError(f"{error} (The classes: {names}.)") from None
                file.parent.mkdir(parents=True, exist_ok=True)
                tensors = {name: value.contiguous() for name, value in vars(fitted).items()}
                save_file(tensors, file.with_suffix(".part"), metadata=settings)
                file.with_suffix(".part").replace(file)
        with safe_open(file, "pt") as saved:
            return Directions(**{name: saved.get_tensor(name) for name in saved.keys()})  # noqa: SIM118

    def _splitter(self, rows: Dataset, labels: Tensor) -> Callable[[range, dict[str, Tensor]], Tensor]:
        """A function from a piece's rows and answers to the logits `[rows, C, K]` by which classes are split."""
        classes, each = len(self.names), self._num_subclasses
        if self.args.targets == "lelp":
            directions = self._directions.to(torch.float32)
            return lambda piece, answers: subclass_logits(answers["embeddings"], directions)
        if self.args.targets == "random_split":
            generator = torch.Generator().manual_seed(self.args.seed)
            return lambda piece, answers: torch.randn(len(piece), classes, each, generator=generator)
        if self.args.targets == "oracle_subclasses":
            true = self._true_subclasses(rows, labels)
            return lambda piece, answers: true[piece.start : piece.stop]
        return lambda piece, answers: torch.zeros(len(piece), classes, each)

    def _true_subclasses(self, rows: Dataset, labels: Tensor) -> Tensor:
        """`[R, C, K]` all on the true subclass in the row's own class, even over the existing ones in the others."""
        if self.args.subclass_column not in rows.column_names:
            raise ValueError(f"The rows have no column `{self.args.subclass_column}`.")
        keys = list(zip(labels.tolist(), map(str, rows[self.args.subclass_column]), strict=True))
        if self._oracle is None:
            self._oracle = subclass_numbers(keys)
        exists = torch.zeros(len(self.names), self._num_subclasses, dtype=torch.bool)
        exists[:, 0] = True  # also of a class without rows
        for (label, _), number in self._oracle.items():
            if number >= self._num_subclasses:
                raise ValueError(f"Class `{self.names[label]}` has more subclasses than the student has outputs.")
            exists[label, number] = True
        logits = torch.zeros(len(keys), *exists.shape).masked_fill(~exists, -torch.inf)
        for row, (label, name) in enumerate(keys):
            if (label, name) not in self._oracle:
                raise ValueError(f"Row {row + 1} has the subclass `{name}`, which no training row of its class has.")
            logits[row, label] = -torch.inf
            logits[row, label, self._oracle[label, name]] = 0.0
        return logits


def subclass_numbers(keys: list[tuple[int, str]]) -> dict[tuple[int, str], int]:
    """(class, name of the subclass) -> number of the subclass in its class, by name."""
    numbers, seen = {}, {}
    for label, name in sorted(set(keys)):
        numbers[label, name] = seen.get(label, 0)
        seen[label] = numbers[label, name] + 1
    return numbers


def _is_of(file: Path, settings: dict[str, str]) -> bool:
    if not file.is_file():
        return False
    with safe_open(file, "pt") as saved:
        return saved.metadata() == settings
