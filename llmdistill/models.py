"""Causal language models as every room needs them: found by name, loaded, and opened between trunk and output head.

The transformers library gives logits; the objectives here want the last hidden states and the head instead, so that
full logits never exist. `last_hidden_states` and `output_head` open a model of any architecture that way.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from llmdistill import samples
from llmdistill.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmdistill.objectives.chunked import Head


def locate(name: str) -> str:
    """A name from a recipe as `from_pretrained` takes it: a sample, a folder on this machine or a name on the Hub.

    Raises:
        UserError: the sample is unknown or not fetched, or the name is a path and no model lies there.
    """
    if name.startswith(samples.PREFIX):
        return str(samples.model_folder(name.removeprefix(samples.PREFIX)))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise UserError(f"the folder `{name}` holds no model: it has no config.json.")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder `{name}`.")
    return name


def load_config(name: str, **options) -> "PreTrainedConfig":
    """The configuration of the model `name`: the cheap proof that the model exists.

    Raises:
        UserError: neither a folder nor a model on the Hub, or the Hub is out of reach.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(locate(name), **options)
    except OSError as error:
        raise UserError(
            f"`{name}` is neither a model folder here nor a model that the Hugging Face Hub gives us: "
            f"{str(error).splitlines()[0]}"
        ) from None


def load_causal_lm(name: str, dtype: "torch.dtype | str" = "auto", **options) -> "PreTrainedModel":
    """The causal language model `name`; weights are read from safetensors only, no pickle is opened.

    Raises:
        UserError: there are no such weights.
    """
    from transformers import AutoModelForCausalLM

    path = locate(name)
    if (Path(path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        if not (Path(path) / "adapter_model.safetensors").is_file():
            raise UserError(f"`{name}` cannot be loaded; weights must be safetensors: adapter_model.safetensors.")
        return AutoPeftModelForCausalLM.from_pretrained(path, dtype=dtype, **options).merge_and_unload()
    return from_safetensors(AutoModelForCausalLM, name, dtype=dtype, **options)


def from_safetensors(auto_class: type, name: str, **options) -> "PreTrainedModel":
    """The model `name` as a class of the transformers library makes it; no pickle is opened.

    Raises:
        UserError: there are no such weights.
    """
    try:
        return auto_class.from_pretrained(locate(name), use_safetensors=True, **options)
    except OSError as error:
        if error.errno is not None:  # the system's own errors speak for themselves
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"`{name}` cannot be loaded; weights must be safetensors. {reason}") from None


def load_tokenizer(name: str, **options) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies beside the model `name`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate(name), **options)


def has_fast_bfloat16() -> bool:
    """Whether the machine multiplies bfloat16 matrices in hardware; elsewhere float32 is the faster choice."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return accelerator.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def default_dtype() -> "torch.dtype":
    """The dtype of models that are only asked, not trained."""
    import torch

    return torch.bfloat16 if has_fast_bfloat16() else torch.float32


def default_device() -> "torch.device":
    """The accelerator of this machine, or its processor."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def unwrapped(model: "nn.Module") -> "PreTrainedModel":
    """The transformers model inside DDP, DeepSpeed and PEFT wrappers."""
    from peft import PeftModel

    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model


def last_hidden_states(model: "nn.Module", inputs: dict) -> tuple["Tensor", "Tensor"]:
    """The hidden states that the output head sees, and the model's own logits of the last position.

    The model is called through its wrapper, so that DDP and DeepSpeed synchronise, and asked for one position's logits
    only.

    Args:
        model: a causal language model, possibly wrapped.
        inputs: arguments of its forward, without labels.

    Returns:
        `[B, S, H]` and `[B, 1, V]`, both with gradient where gradients are on.
    """
    captured = {}

    def capture(module, arguments, output):
        captured["hidden"] = output.last_hidden_state

    handle = unwrapped(model).get_decoder().register_forward_hook(capture)
    try:
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits
    finally:
        handle.remove()
    return captured["hidden"], logits


def output_head(model: "nn.Module", vocabulary_size: int | None = None) -> "Head":
    """The output head of a causal language model, on its own parameters, so that gradients reach them.

    Args:
        model: a causal language model, possibly wrapped. Where ZeRO-3 shards it, every rank must call this together;
            the head then holds whole copies, which live as long as the caller keeps them.
        vocabulary_size: crop the head to so many ids; by default it keeps all of them.
    """
    from llmdistill.distributed import whole_copy
    from llmdistill.objectives.chunked import Head

    inner = unwrapped(model)
    layer = inner.get_output_embeddings()
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if hasattr(weight, "ds_id"):  # DeepSpeed's mark of a sharded parameter
        weight, bias = whole_copy(weight), None if bias is None else whole_copy(bias)
    config = inner.config.get_text_config()
    head = Head(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))
    return head.cropped(vocabulary_size or weight.shape[0])


def _logit_scale(config: "PreTrainedConfig") -> float:
    """The factor that some architectures put on their logits, under four names."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    if getattr(config, "logits_scaling", None) is None:
        return 1.0
    return config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling


def check_head(head: "Head", hidden: "Tensor", logits: "Tensor", name: str) -> None:
    """Prove on one batch that the head makes the model's own logits from its hidden states.

    Args:
        head: as `output_head` yields it.
        hidden: `[B, S, H]` last hidden states.
        logits: `[B, 1, V']` the model's logits of the last position, where V' may exceed a cropped head's V.
        name: what to call the model in the error.

    Raises:
        UserError: the logits are not finite, or the architecture makes them in a way that `Head` does not know.
    """
    import torch

    with torch.no_grad():
        ours, theirs = head.logits(hidden[:, -1:]).float(), logits[..., : len(head.weight)].float()
        if not theirs.isfinite().all():
            raise UserError(f"The {name}'s logits are not finite: its training diverged. Lower the learning rate.")
        error = (ours - theirs).abs().max() / theirs.abs().max()
    if not error < 0.02:  # two bfloat16 products of the same operands differ by less
        raise UserError(
            f"The {name}'s architecture makes its logits in a way that is not known here: hidden states times output "
            f"head differ from the model's own logits by {error:.1%} of the largest. It cannot be distilled with "
            "chunked losses."
        )
