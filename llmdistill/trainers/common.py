"""What every distillation trainer shares: the one mean, the one step, the sampler, and whole checkpoints."""

import importlib.util
import resource
import sys
import time
import typing
from collections import defaultdict

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from llmdistill import checkpoints
from llmdistill.data.batches import LengthGroupedSampler, token_lengths
from llmdistill.errors import nearest
from llmdistill.models import has_fast_bfloat16

Sampling = typing.Literal["group_by_length", "random", "sequential", "batch_rebalance"]
"""How rows make a step. Rows of similar length save padding; `random` is the trainer library's default."""

REFUSED = (
    ("save_only_model", False, "a run that goes on would have lost its optimizer"),
    ("restore_callback_states_from_checkpoint", False, "what has to be restored is restored"),
    ("parallelism_config", None, "tensor, context and sequence parallelism are not supported"),
    ("average_tokens_across_devices", True, "items would be weighed by the rank they fall on"),
    ("fsdp", None, "not supported yet: shard with `deepspeed`"),
    ("label_smoothing_factor", 0.0, "these losses know no smoothed labels"),
)
"""Settings of the trainer library that no trainer here can honour: name, default, why or what instead."""


def set_machine_defaults(args: TrainingArguments) -> None:
    """Fill in, before the library looks at them, the settings that depend on the machine.

    Raises:
        ValueError: `deepspeed` is asked for and not installed.
    """
    if not torch.accelerator.is_available():
        args.use_cpu = True  # DeepSpeed and bf16 on a CPU need it said
    if args.bf16 is None:
        args.bf16 = not args.fp16 and has_fast_bfloat16()
    if args.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise ValueError('`deepspeed` is not installed: `pip install "llmdistill[deepspeed]"`')


def refused_settings(args: TrainingArguments, more: tuple = ()) -> list[str]:
    """A line for each setting of `REFUSED` and `more` that is not at its default, and for each unknown choice.

    To be asked before the library's own `__post_init__`, which changes some settings.
    """
    settings = (*REFUSED, *more)
    refused = [f"`{name}`: {reason}" for name, default, reason in settings if getattr(args, name) != default]
    for name, hint in typing.get_type_hints(type(args)).items():
        if typing.get_origin(hint) is typing.Literal and getattr(args, name) not in typing.get_args(hint):
            refused.append(
                f"`{name}` is `{getattr(args, name)}`.{nearest(getattr(args, name), typing.get_args(hint))}"
            )
    return refused


class DistillationMixin:
    """To be placed before a library trainer among the bases.

    A trainer's `compute_loss` averages with `mean_over_step` only and reports its terms with `record`; it may override
    `on_train_begin`, `on_step` and `resumable_state`.
    """

    # compute_loss normalises over the whole step; without this the library would scale gradients once more.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, **kwargs):
        self._step_terms: dict[str, Tensor] = {}
        self._logged_terms: dict[str, list[float]] = defaultdict(list)
        self._evaluated: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._train_sampler: Sampler | None = None
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that the library counts num_items_in_batch for every model
        self._clock = StepCallback(self)
        self.add_callback(self._clock)

    # -- The loss of a step ---------------------------------------------------------------------------------------

    def mean_over_step(
        self, values: Tensor, counted: Tensor, num_items_in_batch: Tensor | None, name: str = "loss"
    ) -> Tensor:
        """Mean of `values` where `counted`, over all ranks and accumulation steps of one optimizer step.

        Args:
            values: `[B, ...]` one loss per token or example.
            counted: bool, same shape.
            num_items_in_batch: how many values count in the whole step; the library passes it in training only.
            name: under which evaluation reports the mean over everything, as `eval_<name>`.

        Returns:
            A scalar. In training, the sum of it over accumulation steps, averaged over ranks, is the step's mean. In
            evaluation it is the batch's mean; `evaluation_loop` reports the exact mean over all batches and ranks.
        """
        values = values.masked_fill(~counted, 0.0)
        if not self.model.training:
            per_example = tuple(part.reshape(len(part), -1).sum(1) for part in (values, counted))
            self._evaluated[name].append(self.accelerator.gather_for_metrics(per_example))
            return values.sum() / counted.sum().clamp(min=1)
        if num_items_in_batch is None:
            raise RuntimeError("The trainer library did not count the items of this step; is there a `labels` column?")
        ranks = self.accelerator.num_processes  # they average their gradients
        return values.sum() * ranks / torch.as_tensor(num_items_in_batch).clamp(min=1)

    def mean_of_batches(self, statistic: Tensor, name: str | None = None) -> Tensor:
        """Mean over ranks and accumulation steps of a statistic that belongs to a whole batch.

        Args:
            statistic: a scalar.
            name: under which evaluation reports the mean over batches, as `eval_<name>`; None reports nothing.
        """
        if self.model.training:
            return statistic / self.current_gradient_accumulation_steps
        if name is not None:
            one = statistic.detach().float().reshape(1)
            self._evaluated[name].append(tuple(self.accelerator.gather(part) for part in (one, torch.ones_like(one))))
        return statistic

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """The library's loop, with the mean over all counted values in place of its mean of batch means."""
        self._evaluated.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, batches in self._evaluated.items():
            total, count = (sum(part.sum() for part in parts) for parts in zip(*batches, strict=True))
            output.metrics[f"{metric_key_prefix}_{name}"] = (total / count.clamp(min=1)).item()
        self._evaluated.clear()
        return output

    # -- What is reported and followed, step by step --------------------------------------------------------------

    def record(self, terms: dict[str, Tensor]) -> None:
        """Note parts of a training step's loss as `mean_over_step` returns them; they are logged as step means."""
        if self.model.training:
            for name, value in terms.items():
                self._step_terms[name] = self._step_terms.get(name, 0.0) + value.detach().float()

    def finish_step(self) -> None:
        """After an optimizer step: bring its terms together over ranks, keep them for the log, tell `on_step`."""
        names = list(self._step_terms)
        means = {}
        if names:
            values = torch.stack([self._step_terms.pop(name) for name in names])
            means = dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        for name, value in means.items():
            self._logged_terms[name].append(value)
        self.on_step(means)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the recorded terms since the last training log."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._logged_terms.items()}
            self._logged_terms.clear()
        super().log(logs, start_time)

    def on_train_begin(self, num_steps: int) -> None:
        """Called once the number of optimizer steps is known."""

    def on_step(self, terms: dict[str, float]) -> None:
        """Called after every optimizer step with the recorded terms, averaged over ranks and accumulation."""

    def resumable_state(self) -> dict:
        """What has to be in a checkpoint beside the library's own state, in JSON types."""
        return {}

    def load_resumable_state(self, state: dict) -> None:
        """Go on from what `resumable_state` returned; called after `on_train_begin`."""

    def _prepare_input(self, data):
        """To the device only: under DeepSpeed the library would round targets and labels to the model's dtype."""
        if isinstance(data, Tensor) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)

    # -- Batches and checkpoints ----------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._train_sampler = LengthGroupedSampler(token_lengths(train_dataset), rows_per_step, seed)
        return self._train_sampler

    def _save_checkpoint(self, model, trial) -> None:
        """The library's checkpoint, closed as whole before any older one is deleted."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every rank has written its part
        if self.args.should_save:
            folder = self._get_output_dir(trial)
            checkpoints.close(f"{folder}/checkpoint-{self.state.global_step}")
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint, use_mtime=True)

    def final_state(self) -> TrainerState:
        """The library's state with this trainer's own part up to date, as a checkpoint would hold it."""
        self.state.stateful_callbacks[StepCallback.__name__] = self._clock.state()
        return self.state

    def create_model_card(self, *args, **kwargs) -> None:
        """The libraries' cards know nothing of the teacher, so none is written."""


class StepCallback(TrainerCallback, ExportableState):
    """Tells a trainer of its own steps, and puts its state and clock into `trainer_state.json` of every checkpoint."""

    def __init__(self, trainer: DistillationMixin):
        self.trainer = trainer
        self._earlier_seconds = 0.0
        self._start = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Hand over the number of steps, then the state of the checkpoint that is resumed."""
        self._start = time.monotonic()
        self.trainer._step_terms.clear()  # of a step that failed, where the library tries again with smaller batches
        self.trainer.on_train_begin(state.max_steps)
        if state.global_step > 0:
            saved = state.stateful_callbacks[type(self).__name__]["attributes"]
            self._earlier_seconds = saved["seconds"]
            self.trainer.load_resumable_state(saved["trainer"])

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Give every epoch its own order, the same one when it is resumed."""
        if self.trainer._train_sampler is not None:
            self.trainer._train_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """After every optimizer step."""
        self.trainer.finish_step()

    def state(self) -> dict:
        """For `trainer_state.json`."""
        attributes = {
            "seconds": self._earlier_seconds + time.monotonic() - self._start,
            "peak_memory_bytes": _peak_memory_bytes(self.trainer.args.device),
            "processes": self.trainer.args.world_size,
            "trainer": self.trainer.resumable_state(),
        }
        return {"args": {}, "attributes": attributes}


def training_summary(state: TrainerState) -> dict:
    """What a training took and how it went, over all its sessions, from its final state."""
    own = state.stateful_callbacks[StepCallback.__name__]["attributes"]
    return {
        "optimizer_steps": state.global_step,
        "epochs": state.epoch,
        "seconds": own["seconds"],
        "processes": own["processes"],
        "peak_memory_bytes": own["peak_memory_bytes"],
        "log": state.log_history,
    }


def _peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process ever held: of the GPU where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """A model that is only asked: no gradients, no dropout."""
    return model.requires_grad_(False).eval()


def place_frozen(model: PreTrainedModel, trainer) -> torch.nn.Module:
    """A frozen model on the trainer's devices: sharded under ZeRO-3, whole on every rank otherwise."""
    if trainer.is_deepspeed_enabled:
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)
