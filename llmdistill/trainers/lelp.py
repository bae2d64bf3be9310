"""LELP and its controls: a teacher of few classes teaches pseudo-subclasses of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from llmdistill import classifiers
from llmdistill.objectives.labels import label_loss
from llmdistill.objectives.lelp import class_logits, lelp_loss
from llmdistill.trainers.common import DistillationMixin, Sampling, refused_settings, set_machine_defaults
from llmdistill.trainers.lelp_targets import Targets


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
