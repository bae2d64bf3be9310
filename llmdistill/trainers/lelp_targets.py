"""What a LELP student learns from its teacher's answers to rows, and what the controls put in its place."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from llmdistill import classifiers
from llmdistill.data import glue as data
from llmdistill.errors import UserError
from llmdistill.objectives.lelp import Directions, Moments, directions_from, subclass_logits, subclass_targets
from llmdistill.store import AnswerStore, fingerprint
from llmdistill.teachers.encoder import EncoderTeacher, ask
from llmdistill.trainers.common import freeze

if TYPE_CHECKING:
    from llmdistill.trainers.lelp import LelpConfig

DIRECTIONS = "directions.safetensors"
"""File of a run's directions, means and scales, in its folder."""


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
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        args: "LelpConfig",
        tokenizer: PreTrainedTokenizerBase,
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

    def _answers(self, store: AnswerStore) -> Iterator[tuple[range, dict[str, Tensor]]]:
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
