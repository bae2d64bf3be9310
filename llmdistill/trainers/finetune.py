"""Plain fine-tuning of a classifier: how a teacher is made where there is none yet."""

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from llmdistill import classifiers
from llmdistill.data import glue as data
from llmdistill.objectives.labels import label_loss
from llmdistill.trainers.common import DistillationMixin, Sampling, refused_settings, set_machine_defaults


@dataclass(kw_only=True)
class FinetuneConfig(TrainingArguments):
    """The trainer library's arguments with our defaults."""

    max_length: int = 128
    """Tokens of a row."""
    bf16: bool | None = None
    """Compute in bfloat16; by default where the machine is fast at it."""
    train_sampling_strategy: Sampling = "group_by_length"
    save_total_limit: int | None = 2
    """Checkpoints kept on disk."""

    def __post_init__(self):
        set_machine_defaults(self)
        faults = refused_settings(self)
        super().__post_init__()
        if faults:
            raise ValueError("; ".join(faults))


class FinetuneTrainer(DistillationMixin, Trainer):
    """Trains a classifier, or a model that predicts one number, from labels alone.

    Args:
        model: as `llmdistill.classifiers.new` makes it.
        args: a `FinetuneConfig`.
        processing_class: the model's tokenizer.
        train_dataset: texts with labels (see `llmdistill.data.glue`).
        eval_dataset: likewise.
        kwargs: of the library's `Trainer`.

    Raises:
        ValueError: rows without labels, or with other ones than the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: FinetuneConfig,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ):
        def prepared(rows: Dataset | None) -> Dataset | None:
            return None if rows is None else labelled_tokens(rows, model, processing_class, args)

        super().__init__(
            model,
            args=args,
            processing_class=processing_class,
            train_dataset=prepared(train_dataset),
            eval_dataset=prepared(eval_dataset),
            data_collator=DataCollatorWithPadding(processing_class),
            **kwargs,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The mean over rows of the cross-entropy, or of the squared error."""
        labels = inputs.pop("labels")  # [B]
        logits = model(**inputs).logits  # [B, C]
        counted = torch.ones_like(labels, dtype=torch.bool)
        loss = self.mean_over_step(label_loss(logits, labels), counted, num_items_in_batch)
        return (loss, {"logits": logits}) if return_outputs else loss


def labelled_tokens(
    rows: Dataset, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> Dataset:
    """Rows as the model's inputs with `labels`, ids of its classes or numbers.

    Raises:
        ValueError: rows without labels, or with other ones than the model's.
    """
    rows = data.with_class_ids(rows, classifiers.class_names(model.config), "The data set")
    if data.num_unlabelled(rows):
        raise ValueError("Fine-tuning needs a `label` in every row.")
    with args.main_process_first(local=False, desc="tokenising"):
        return data.tokenize(rows, tokenizer, args.max_length)
