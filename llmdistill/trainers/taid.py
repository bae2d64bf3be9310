"""TAID, and with it plain distillation by any divergence and supervised fine-tuning: one program for all of them."""

import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from llmdistill.data import language as data
from llmdistill.data.language import IGNORE_INDEX
from llmdistill.data.vocabulary import shared_vocabulary
from llmdistill.models import check_head, last_hidden_states, output_head, unwrapped
from llmdistill.objectives.chunked import (
    Term,
    chunked_terms,
    divergence_term,
    label_term,
    select_tokens,
    spread_tokens,
)
from llmdistill.objectives.divergences import DIVERGENCES, cross_entropy
from llmdistill.objectives.taid import TaidSchedule
from llmdistill.teachers.language import LanguageTeacher
from llmdistill.trainers.common import (
    DistillationMixin,
    Sampling,
    freeze,
    place_frozen,
    refused_settings,
    set_machine_defaults,
)

logger = get_logger(__name__)

REFUSED = (
    ("loss_type", "nll", "this loss is the one of `divergence`"),
    ("chat_template_path", None, "set the chat template of the student's tokenizer"),
    ("eos_token", None, "set it in the student's tokenizer"),
    ("completion_only_loss", None, "say `mask: assistant` or `mask: all`"),
    ("assistant_only_loss", False, "say `mask: assistant` or `mask: all`"),
    ("truncation_mode", "keep_start", "rows are cut at their end"),
    ("dataset_text_field", "text", "name the column `text`"),
    ("dataset_kwargs", None, "pass rows with `input_ids` and `labels` to skip tokenising"),
    ("padding_free", False, "`packing: true` is the form without padding"),
)
"""Settings of TRL that this trainer cannot honour: name, default, why or what instead."""


@dataclass(kw_only=True)
class TaidConfig(SFTConfig):
    """TRL's `SFTConfig` and what TAID adds to it."""

    schedule: Literal["adaptive", "linear", "exponential", "constant", "reference"] = "adaptive"
    """How the teacher's share t in the target grows (see `TaidSchedule`). `constant` with `t_start: 1.0` is plain
    distillation. `reference` also takes the authors' loss value, the cross-entropy."""
    t_start: float = 0.4
    """Share of the teacher in the target at the first step, in [0, 1]; 0.2 for a larger gap between the models."""
    t_end: float = 1.0
    """Largest share, in [t_start, 1]."""
    t_step_size: float = 5e-4
    """Size of an adaptive step of t (alpha in the paper)."""
    t_momentum: float = 0.99
    """Momentum of the relative change of the loss (beta in the paper), in [0, 1)."""
    divergence: Literal[tuple(DIVERGENCES)] = "forward_kl"
    """How the student is compared with the target."""
    divergence_options: dict[str, float] = field(default_factory=dict)
    """Options of the divergence, e.g. `{skew: 0.1}`."""
    label_weight: float = 0.0
    """Share of the cross-entropy of the labels in the loss, in [0, 1]: 0 is distillation only, 1 fine-tuning only (the
    teacher is then not asked)."""
    mask: Literal["assistant", "all"] = "assistant"
    """Tokens that count: the answers', or every token of prompt and answer as in the paper."""
    loss_chunk_bytes: int | None = None
    """Bytes of one float32 buffer `[chunk of tokens, V]` of the loss; by default 32 MiB on a CPU, 128 MiB on a GPU."""
    train_sampling_strategy: Sampling = "group_by_length"
    save_total_limit: int | None = 2
    """Checkpoints kept on disk; each holds the student and its optimizer, about four times the student's bytes."""
    gradient_checkpointing: bool | None = None
    """The old name of `activation_checkpointing`, which is off by default: the loss needs no memory for logits."""

    def __post_init__(self):
        set_machine_defaults(self)
        faults = refused_settings(self, REFUSED)
        super().__post_init__()
        if self.loss_chunk_bytes is not None and self.loss_chunk_bytes < 1:
            faults.append(f"`loss_chunk_bytes` must be at least 1, got {self.loss_chunk_bytes}")
        if not 0 <= self.label_weight <= 1:
            faults.append(f"`label_weight` must lie in [0, 1], got {self.label_weight}")
        if self.schedule == "reference" and self.divergence != "forward_kl":
            faults.append("`schedule: reference` takes the cross-entropy: leave `divergence` at forward_kl")
        probe = torch.zeros(2)
        for attempt in (
            lambda: self.new_schedule(num_steps=10**9),
            lambda: DIVERGENCES[self.divergence](probe, probe, **self.divergence_options),
        ):
            try:
                attempt()
            except KeyError:
                pass  # an unknown divergence is among the faults already
            except (ValueError, TypeError) as error:
                faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))

    def new_schedule(self, num_steps: int) -> TaidSchedule:
        """The schedule of t over `num_steps` optimizer steps."""
        return TaidSchedule(
            num_steps, self.t_start, self.t_end, alpha=self.t_step_size, beta=self.t_momentum, mode=self.schedule
        )


class TaidTrainer(DistillationMixin, SFTTrainer):
    """Distils a causal language model into a smaller one with TAID.

    Rows are as in TRL (`messages`; `prompt` and `completion`; `text`) or tokenised (`input_ids` and `labels`). The
    loss is made from hidden states in chunks of tokens, so full logits of either model never exist.

    Args:
        model: the student.
        teacher: a causal language model; None only where `label_weight` is 1.
        args: a `TaidConfig`.
        processing_class: the student's tokenizer.
        teacher_processing_class: the teacher's tokenizer. Needed as proof where the two heads differ in size.
        kwargs: of `SFTTrainer`, e.g. `train_dataset`, `eval_dataset`, `peft_config`, `callbacks`.

    Raises:
        ValueError: no teacher where one is needed, different vocabularies, or an option that this loss cannot honour.
    """

    _name = "TAID"

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher: PreTrainedModel | None,
        args: TaidConfig,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        if teacher is None and args.label_weight < 1:
            raise ValueError("`teacher` is missing; only `label_weight: 1` (fine-tuning) does without one.")
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("`compute_metrics` needs full logits, which never exist here; evaluate the saved model.")
        if args.packing and args.world_size > 1 and kwargs.get("eval_dataset") is not None:
            raise ValueError("Packed rows cannot be evaluated exactly over several processes: leave `packing` off.")
        with args.main_process_first(local=False):
            for name in ("train_dataset", "eval_dataset"):
                kwargs[name] = _tokenized(kwargs.get(name), processing_class, args)
        super().__init__(model, args=args, processing_class=processing_class, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError(
                "The router loss of mixture-of-experts students is not supported: `router_aux_loss_coef: 0`."
            )

        self._loss_shifts_labels = True  # in the library's count of items, also for models whose loss it does not know
        self.schedule: TaidSchedule | None = None
        self.teacher: LanguageTeacher | None = None
        self._head_is_proven = False
        self._vocabulary_size: int | None = None
        weights = {"distillation": 1 - args.label_weight, "label_loss": args.label_weight}
        self._weights = {name: weight for name, weight in weights.items() if weight > 0}
        if args.label_weight < 1:
            self._vocabulary_size = self._shared_vocabulary(teacher, teacher_processing_class)
            self.teacher = LanguageTeacher(place_frozen(freeze(teacher), self), self._vocabulary_size)

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """The library's evaluation; raw rows are tokenised as those of the training were."""
        return super().evaluate(_tokenized(eval_dataset, self.processing_class, self.args), *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The mean over counted tokens of (1 - label_weight) * divergence + label_weight * cross-entropy.

        In evaluation the target is the teacher itself (t = 1), so that values of different steps can be compared.
        """
        if return_outputs:
            raise ValueError("Full logits never exist here, so there are no outputs to return.")
        labels = inputs.pop("labels")[:, 1:]  # position s predicts token s + 1
        counted = labels != IGNORE_INDEX  # [B, S - 1]
        with self.accelerator.autocast():  # the library's own covers the models' forward only
            hidden, last_logits = last_hidden_states(model, inputs)
            head = output_head(model, self._vocabulary_size)
            if not self._head_is_proven:
                check_head(head, hidden, last_logits, "student")
                self._head_is_proven = True

            terms = self._terms(inputs, labels, counted)
            weights = [self._weights[name] for name in terms]
            hidden = select_tokens(hidden[:, :-1], counted)
            total, values = chunked_terms(hidden, head, list(terms.values()), weights, self.args.loss_chunk_bytes)

        def mean(per_token: Tensor, name: str) -> Tensor:
            return self.mean_over_step(spread_tokens(per_token, counted), counted, num_items_in_batch, name)

        self.record({name: mean(value, name) for name, value in zip(terms, values, strict=True)})
        return mean(total, "loss")

    def _terms(self, inputs: dict[str, Tensor], labels: Tensor, counted: Tensor) -> dict[str, Term]:
        """The terms of the loss by the names under which they are logged."""
        terms = {}
        if "distillation" in self._weights:
            t = self.schedule.t if self.model.training else None
            teacher_hidden = select_tokens(self.teacher.hidden_states(inputs)[:, :-1], counted)
            divergence = cross_entropy if self.args.schedule == "reference" else self.args.divergence
            options = self.args.divergence_options
            terms["distillation"] = divergence_term(teacher_hidden, self.teacher.head(), divergence, t, **options)
        if "label_loss" in self._weights:
            terms["label_loss"] = label_term(labels[counted])
        return terms

    def on_train_begin(self, num_steps: int) -> None:
        """Begin the schedule of t."""
        self.schedule = self.args.new_schedule(num_steps)

    def on_step(self, terms: dict[str, float]) -> None:
        """Move t by the finished step's distillation loss."""
        if "distillation" in terms:
            self.schedule.step(terms["distillation"], self.state.global_step - 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add t, as the next step will use it, to the training log."""
        if "loss" in logs and self.teacher is not None:
            logs["t"] = self.schedule.t
        super().log(logs, start_time)

    def resumable_state(self) -> dict:
        """The schedule's state."""
        return {} if self.schedule is None else self.schedule.state_dict()

    def load_resumable_state(self, state: dict) -> None:
        """Go on with the schedule of the checkpoint."""
        self.schedule.load_state_dict(state)

    def _shared_vocabulary(
        self, teacher: PreTrainedModel, teacher_processing_class: PreTrainedTokenizerBase | None
    ) -> int:
        """Ids shared by both models; a crop is logged."""
        student_size, teacher_size = (
            model.config.get_text_config().vocab_size for model in (unwrapped(self.model), unwrapped(teacher))
        )
        if teacher_processing_class is None:
            if student_size != teacher_size:
                raise ValueError(
                    f"The student's vocabulary has {student_size:,} rows, the teacher's {teacher_size:,}: pass "
                    "`teacher_processing_class` to prove that the shared ids mean the same."
                )
            warnings.warn(
                "Nothing proves that student and teacher speak one vocabulary: pass `teacher_processing_class`.",
                stacklevel=3,
            )
            return student_size
        size = shared_vocabulary(self.processing_class, teacher_processing_class, student_size, teacher_size)
        if student_size != teacher_size:
            logger.warning(
                f"The output heads of the student ({student_size:,} rows) and the teacher ({teacher_size:,}) are "
                f"cropped to the {size:,} ids that both tokenizers were proven to share."
            )
        return size


def _tokenized(rows, tokenizer: PreTrainedTokenizerBase | None, args: TaidConfig):
    """Rows as `input_ids` and `labels`; those that are tokenised already, names and None stay as they are."""
    if isinstance(rows, dict):
        return {name: _tokenized(part, tokenizer, args) for name, part in rows.items()}
    if rows is None or isinstance(rows, str):
        return rows
    columns = set(next(iter(rows), {}))
    if "input_ids" in columns:
        if "labels" not in columns:
            raise ValueError("Tokenised rows need `labels` too, -100 where a token does not count.")
        return rows
    shape = data.shape_of(columns)
    if shape is None or not isinstance(rows, Dataset):
        raise ValueError(
            f"Rows have {', '.join(sorted(columns)) or 'no columns'}: expected a `Dataset` with `messages`, `prompt` "
            "and `completion`, or `text`; or any data set with `input_ids` and `labels`."
        )
    if tokenizer is None:
        raise ValueError("`processing_class` is missing: rows are tokenised with the student's tokenizer.")
    rows = rows.select_columns(list(shape))
    data.check(rows, "the data set")
    return data.tokenize(rows, tokenizer, args.mask, args.max_length, args.dataset_num_proc)
