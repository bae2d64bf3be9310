"""Several processes on one job: who does what first, and how DeepSpeed is met on a machine without a GPU."""

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import TrainingArguments


def prepare_deepspeed_on_cpu(arguments: "TrainingArguments") -> None:
    """Make DeepSpeed ready on processors; call it before any model is loaded.

    DeepSpeed would compile an operator at its first start, and a process killed meanwhile leaves a lock on which every
    later run hangs; the operator only speeds up a single machine's all-reduce, so it is switched off.
    """
    if arguments.deepspeed is None or not arguments.use_cpu:
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@contextmanager
def plain_loading(arguments: "TrainingArguments"):
    """Inside, `from_pretrained` loads whole models on the calling process alone, also where ZeRO-3 is configured."""
    if arguments.deepspeed is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def leave_group() -> None:
    """End the process group: what follows runs on the main process alone, and nobody waits for it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def whole_copy(parameter: Tensor) -> Tensor:
    """The whole of a parameter that ZeRO-3 shards, as a copy through which its gradient flows.

    For weights that are used outside the forward of the module that owns them. Every rank must call it together.
    """
    return _WholeCopy.apply(parameter)


class _WholeCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter):
        import deepspeed

        ctx.parameter = parameter
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        # A gradient can only be put at a parameter of its own size. DeepSpeed restores that size in the backward pass
        # of the owning module, which has none here; so it is restored now, and taken back once the gradient is there.
        parameter = ctx.parameter
        parameter.all_gather()

        def take_back(parameter):
            handle.remove()
            if not parameter.ds_active_sub_modules:  # else its module will do so
                parameter.partition()

        handle = parameter.register_post_accumulate_grad_hook(take_back)
        return gradient
