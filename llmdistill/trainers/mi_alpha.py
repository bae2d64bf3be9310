"""Intermediate distillation of encoders: MI-alpha, and the objectives it is compared with, in one program."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from llmdistill import classifiers
from llmdistill.data import glue as data
from llmdistill.objectives.features import FEATURES, variational
from llmdistill.objectives.labels import label_loss, logit_cross_entropy, logit_squared_error
from llmdistill.objectives.mutual_information import Bound, info_nce, mi_alpha_parts, nwj
from llmdistill.students.heads import BOUNDS, Compared, StudentWithHeads, layer_pairs, pooled
from llmdistill.trainers.common import (
    DistillationMixin,
    Sampling,
    freeze,
    place_frozen,
    refused_settings,
    set_machine_defaults,
)

SATURATED = 0.95
"""Share of log(B - 1) from which on a bound says more of the batch than of the representations."""


@dataclass(kw_only=True)
class MiAlphaConfig(TrainingArguments):
    """The trainer library's arguments and those of intermediate distillation.

    The loss is `label_weight` * task + `logit_weight` * logits + `intermediate_weight` * sum over pairs of layers.
    """

    objective: Literal[(*BOUNDS, *FEATURES, "vid", "none")] = "mi_alpha"
    """How layers are compared; `none` is plain distillation of logits."""
    alpha: float = 0.9
    """Of `mi_alpha`, in [0, 1]: 1 is of low variance and at most log(B - 1), 0 the other way round."""
    layer_map: Literal["skip", "last"] = "skip"
    """Compare the student's layers with every so-manieth of the teacher's, or with its last ones."""
    pooling: Literal["first", "mean"] = "first"
    """The vector of a layer: its first token's, or the mean of all tokens."""
    negatives: Literal["batch", "gathered"] = "batch"
    """The false pairs of a bound: of the rank's own batch, or of all ranks. Accumulation makes no larger batch."""
    critic_learning_rate: float | None = None
    """Of projections, critics and baselines; by default the student's."""
    logit_loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """How logits are compared; a regression needs mse."""
    temperature: float = 1.0
    """Of the cross-entropy of logits."""
    label_weight: float = 1.0
    """Of the task's own loss; at 0 rows need no labels."""
    logit_weight: float = 1.0
    intermediate_weight: float = 1.0
    max_length: int = 128
    """Tokens of a row."""
    bf16: bool | None = None
    """Compute in bfloat16, but for the critics; by default where the machine is fast at it."""
    train_sampling_strategy: Sampling = "group_by_length"
    save_total_limit: int | None = 2
    """Checkpoints kept on disk."""

    def __post_init__(self):
        set_machine_defaults(self)
        faults = refused_settings(self)
        super().__post_init__()
        self.remove_unused_columns = False  # the teacher's inputs are no argument of the student
        self.label_names = ["labels"]  # the library would look for them in the forward of the wrapped student
        if not 0 <= self.alpha <= 1:
            faults.append(f"`alpha` must lie in [0, 1], got {self.alpha}")
        if self.critic_learning_rate is not None and self.critic_learning_rate < 0:
            faults.append(f"`critic_learning_rate` must not be negative, got {self.critic_learning_rate}")
        if self.temperature <= 0:
            faults.append(f"`temperature` must be positive, got {self.temperature}")
        weights = {name: getattr(self, name) for name in ("label_weight", "logit_weight", "intermediate_weight")}
        faults += [f"`{name}` must not be negative, got {value}" for name, value in weights.items() if value < 0]
        if self.objective == "none":
            del weights["intermediate_weight"]
        if not any(weights.values()):
            faults.append("all weights are 0")
        everyone = self.world_size if self.negatives == "gathered" else 1
        if self.objective in BOUNDS and self.per_device_train_batch_size * everyone < 2:
            faults.append("`per_device_train_batch_size` must be at least 2: a batch of one has no false pairs")
        if faults:
            raise ValueError("; ".join(faults))


class MiAlphaTrainer(DistillationMixin, Trainer):
    """Distils an encoder into a smaller one through its logits and its layers.

    `trainer.model` is a `StudentWithHeads`; what is wanted in the end is `trainer.model.student`.

    Args:
        model: the student, as `llmdistill.classifiers.new` makes it.
        teacher: a classifier of the same classes, or of one number like the student.
        args: a `MiAlphaConfig`.
        processing_class: the student's tokenizer.
        teacher_processing_class: the teacher's, where it is another; each model then gets its own encoding.
        train_dataset: texts with labels (see `llmdistill.data.glue`).
        eval_dataset: likewise.
        kwargs: of the library's `Trainer`.

    Raises:
        ValueError: other classes than the teacher's, more layers than it has, or labels that are missing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        args: MiAlphaConfig,
        processing_class: PreTrainedTokenizerBase,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ):
        names, theirs = (classifiers.class_names(one.config) for one in (model, teacher))
        if (names is None) != (theirs is None):
            raise ValueError("One of student and teacher predicts a number, the other classes.")
        if names is None and args.logit_loss == "cross_entropy" and args.logit_weight > 0:
            raise ValueError("Cross-entropy of one logit is 0 whatever the student says: set `logit_loss: mse`.")
        self._columns = None  # of the teacher's logits, in the student's order of classes
        if names is not None:
            self._columns = torch.tensor(data.class_order(theirs, names, "The teacher"), device=args.device).argsort()
        student_layers, teacher_layers = (one.config.get_text_config().num_hidden_layers for one in (model, teacher))
        pairs = layer_pairs(student_layers, teacher_layers, args.layer_map) if args.objective != "none" else []
        set_seed(args.seed)  # of the heads
        wrapped = StudentWithHeads(
            model,
            pairs,
            args.objective,
            teacher.config.get_text_config().hidden_size,
            args.pooling,
            has_baseline=args.objective == "mi_alpha" and args.alpha < 1,
        )

        def prepared(rows: Dataset | None) -> Dataset | None:
            if rows is None:
                return None
            rows = data.with_class_ids(rows, names, "The data set")
            missing = data.num_unlabelled(rows)
            if missing and args.label_weight > 0:
                raise ValueError(
                    f"{missing} of {len(rows)} rows have no label: set `label_weight` to 0, or label them."
                )
            labels = rows[data.LABEL][:] if data.LABEL in rows.column_names else [-1] * len(rows)
            with args.main_process_first(local=False, desc="tokenising"):
                tokens = data.tokenize_for_both(rows, processing_class, teacher_processing_class, args.max_length)
            return tokens.add_column("labels", labels)

        super().__init__(
            wrapped,
            args=args,
            processing_class=processing_class,
            train_dataset=prepared(train_dataset),
            eval_dataset=prepared(eval_dataset),
            data_collator=data.PairCollator(processing_class, teacher_processing_class),
            **kwargs,
        )
        self.teacher = place_frozen(freeze(teacher), self)
        self._pairs, self._limit, self._is_saturated = pairs, math.inf, False
        if self.train_dataset is not None:
            check_full_batch(len(self.train_dataset), args)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the task's loss, the distance of logits and the distance of layers."""
        labels = inputs.pop("labels")  # [B]
        own, theirs = data.split_inputs(inputs)
        teacher_logits, features = self._ask(theirs or own)
        compared = model(teacher_features=features, **own)

        args, counted = self.args, torch.ones_like(labels, dtype=torch.bool)
        terms = {}
        if args.label_weight > 0:
            terms["label_loss"] = (args.label_weight, label_loss(compared.logits, labels))
        if args.logit_weight > 0:
            terms["logit_loss"] = (args.logit_weight, self._logit_loss(compared.logits, teacher_logits))
        if self._pairs and args.intermediate_weight > 0 and args.objective not in BOUNDS:
            terms["intermediate"] = (args.intermediate_weight, self._distances(compared))
        means = {
            name: (weight, self.mean_over_step(values, counted, num_items_in_batch, name))
            for name, (weight, values) in terms.items()
        }
        is_alone = not self.model.training and len(labels) == 1  # the last row of an evaluation has no false pairs
        if self._pairs and args.intermediate_weight > 0 and args.objective in BOUNDS and not is_alone:
            means["intermediate"] = (args.intermediate_weight, self._minus_bounds(compared))
        self.record({name: mean for name, (_, mean) in means.items()})
        loss = sum((weight * mean for weight, mean in means.values()), compared.logits.new_zeros(()))
        return (loss, {"logits": compared.logits}) if return_outputs else loss

    @torch.no_grad()
    def _ask(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's logits `[B, C]` in the student's order of classes, and pooled features `[P, B, Ht]`."""
        with self.accelerator.autocast():
            output = self.teacher(**inputs, output_hidden_states=True)
        logits = output.logits if self._columns is None else output.logits[:, self._columns]
        mask, states = inputs["attention_mask"], [output.hidden_states[layer] for _, layer in self._pairs]
        features = [pooled(state, mask, self.args.pooling) for state in states]
        return logits, torch.stack(features) if features else logits.new_zeros(0)

    def _logit_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if self.args.logit_loss == "mse":
            return logit_squared_error(logits, teacher_logits)
        return logit_cross_entropy(logits, teacher_logits, self.args.temperature)

    def _distances(self, compared: Compared) -> Tensor:
        """`[B]` summed over pairs of layers."""
        if self.args.objective == "vid":
            return variational(compared.student, compared.teacher, compared.extra[:, None]).sum(0)
        return FEATURES[self.args.objective](compared.student, compared.teacher).sum(0)

    def _minus_bounds(self, compared: Compared) -> Tensor:
        """Minus the sum of the bounds over pairs of layers, a statistic of the batch, averaged over accumulation."""
        gathers = self.args.negatives == "gathered" and self.model.training
        gather = self._gathered if gathers else lambda values: values
        student, teacher = gather(compared.student), gather(compared.teacher)
        baselines = None if compared.extra is None else gather(compared.extra)
        bounds = []
        with torch.autocast(student.device.type, enabled=False):
            for pair, scores in enumerate(teacher @ student.transpose(1, 2)):  # [B, B], rows are the teacher's
                bounds.append(self._bound(scores, None if baselines is None else baselines[pair]))
        self._report(bounds, num_negatives=student.shape[1] - 1)
        total = -sum(bound.value for bound in bounds)
        if gathers:
            # Each rank's gradient reaches its own rows only, and ranks are averaged: the sum is what is wanted.
            ranks = self.accelerator.num_processes
            total = total + (ranks - 1) * (total - total.detach())
        return self.mean_of_batches(total, "intermediate")

    def _bound(self, scores: Tensor, log_baseline: Tensor | None) -> Bound:
        if self.args.objective == "mi_alpha":
            return mi_alpha_parts(scores, log_baseline, self.args.alpha)
        value = info_nce(scores) if self.args.objective == "info_nce" else nwj(scores)
        return Bound(value, value - 1, torch.zeros_like(value))

    def _report(self, bounds: list[Bound], num_negatives: int) -> None:
        values = torch.stack([torch.stack(bound) for bound in bounds]).mean(0).detach()
        names = ("mi", "mi_joint", "mi_marginal")[: 3 if self.args.objective == "mi_alpha" else 1]
        self.record({name: self.mean_of_batches(value) for name, value in zip(names, values, strict=False)})
        self.record({"mi_log_negatives": self.mean_of_batches(values.new_tensor(math.log(num_negatives)))})
        self._limit = self._largest_bound(num_negatives)

    def _largest_bound(self, num_negatives: int) -> float:
        """What the objective cannot exceed on a batch, in nats."""
        args = self.args
        if args.objective == "info_nce":
            return math.log(num_negatives + 1)
        if args.objective == "nwj" or args.alpha == 0:
            return math.inf
        return math.log(num_negatives) if args.alpha == 1 else 1 + math.log(num_negatives / args.alpha)

    def on_step(self, terms: dict[str, float]) -> None:
        """Warn once where the bound has come near the largest value that it can have."""
        if 0 < SATURATED * self._limit <= terms.get("mi", -math.inf) and not self._is_saturated:
            self._is_saturated = True
            warnings.warn(
                f"The bound on mutual information has come to {terms['mi']:.2f} nats, of at most {self._limit:.2f} "
                "with so many negatives: it teaches little more. Use a larger batch, or `negatives: gathered`.",
                stacklevel=2,
            )

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """The library's loop, with the loss made of the exact means of its terms."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        weights = {"label_loss": self.args.label_weight, "logit_loss": self.args.logit_weight}
        weights["intermediate"] = self.args.intermediate_weight
        terms = {name: output.metrics.get(f"{metric_key_prefix}_{name}") for name in weights}
        loss = sum(weights[name] * value for name, value in terms.items() if value is not None)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def _gathered(self, values: Tensor) -> Tensor:
        """`[P, B, ...]` of all ranks `[P, ranks * B, ...]`, with gradient to this rank's part."""
        if self.accelerator.num_processes == 1:
            return values
        everyone = list(self.accelerator.gather(values.detach().transpose(0, 1).contiguous()).split(values.shape[1]))
        everyone[self.accelerator.process_index] = values.transpose(0, 1)
        return torch.cat(everyone).transpose(0, 1)

    def get_train_dataloader(self) -> DataLoader:
        """The library's, without a ragged last batch: a bound on a smaller batch is another bound."""
        before, self.args.dataloader_drop_last = self.args.dataloader_drop_last, True
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = before

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's optimizer, with a learning rate of their own for the critics."""
        if self.optimizer is None:
            args, model = self.args, self.model if model is None else model
            decayed, heads = self.get_decay_parameter_names(model), self.model.head_parameters()
            rates = {False: args.learning_rate, True: args.critic_learning_rate}
            if args.critic_learning_rate is None:
                rates[True] = args.learning_rate
            kind, options = self.get_optimizer_cls_and_kwargs(args, model)
            groups = [
                {
                    "params": [
                        parameter
                        for name, parameter in model.named_parameters()
                        if (name in heads, name in decayed) == (is_head, decays) and parameter.requires_grad
                    ],
                    "weight_decay": args.weight_decay if decays else 0.0,
                    "lr": rates[is_head],
                }
                for is_head in (False, True)
                for decays in (True, False)
            ]
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer


def check_full_batch(num_rows: int, args: MiAlphaConfig) -> None:
    """Refuse rows of which no batch can be made, since ragged ones are left out.

    Raises:
        ValueError: names both numbers.
    """
    if num_rows < args.train_batch_size * args.world_size:
        raise ValueError(
            f"{num_rows} training rows do not fill one batch of {args.train_batch_size} on each of {args.world_size} "
            "processes."
        )
