"""TAID, and with it plain distillation by any divergence and supervised fine-tuning: one program for all of them."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from llmdistill.data.language import IGNORE_INDEX
from llmdistill.data.vocabulary import shared_vocabulary
from llmdistill.models import check_head, has_fast_bfloat16, last_hidden_states, output_head, unwrapped
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
from llmdistill.trainers.common import DistillationMixin, freeze, place_frozen

logger = get_logger(__name__)


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
    train_sampling_strategy: str = "group_by_length"
    """Rows of similar length make a step, which saves padding. `random` is the trainer library's default."""
    save_total_limit: int | None = 2
    """Checkpoints kept on disk; each holds the student and its optimizer, about four times the student's bytes."""
    gradient_checkpointing: bool | None = None
    """The old name of `activation_checkpointing`, which is off by default: the loss needs no memory for logits."""

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True  # DeepSpeed and bf16 on a CPU need it said
        if self.bf16 is None and not self.fp16:
            self.bf16 = has_fast_bfloat16()
        super().__post_init__()
        faults = []
        if not 0 <= self.label_weight <= 1:
            faults.append(f"`label_weight` must lie in [0, 1], got {self.label_weight}")
        if self.label_smoothing_factor or self.loss_type != "nll":
            faults.append("`label_smoothing_factor` and `loss_type` have no effect on this loss: remove them")
        if self.schedule == "reference" and self.divergence != "forward_kl":
            faults.append("`schedule: reference` takes the cross-entropy: leave `divergence` at forward_kl")
        probe = torch.zeros(2)
        for attempt in (
            lambda: self.new_schedule(num_steps=10**9),
            lambda: DIVERGENCES[self.divergence](probe, probe, **self.divergence_options),
        ):
            try:
                attempt()
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
        columns = set(next(iter(kwargs["train_dataset"])))
        args.assistant_only_loss = args.mask == "assistant" and "messages" in columns
        args.completion_only_loss = args.mask == "assistant" if {"prompt", "completion"} <= columns else None
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
            return student_size
        size = shared_vocabulary(self.processing_class, teacher_processing_class, student_size, teacher_size)
        if student_size != teacher_size:
            logger.warning(
                f"The output heads of the student ({student_size:,} rows) and the teacher ({teacher_size:,}) are "
                f"cropped to the {size:,} ids that both tokenizers were proven to share."
            )
        return size
