"""Students cut from their teacher: some of its layers, with embeddings, norms and head as they are."""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def layer_scores(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[float]:
    """How much the trunk's output changes when one layer is left out, for every layer.

    The score of a layer is the mean over tokens of ||output - output without the layer||^2, where output is the last
    hidden state `[H]` of a token. Layers before the one left out are not computed again.

    Args:
        model: a causal language model or an encoder under any head, on the device of `inputs`.
        inputs: a probe batch with `input_ids` and `attention_mask`, both `[B, S]`.

    Returns:
        One score per layer, in the order of the layers.

    Source: LAPTOP-Diff (arXiv:2404.11098), section 3.1: such scores add up well enough to choose by them at once.
    """
    trunk, layers = model.get_decoder(), layers_of(model)
    options = {"use_cache": False} if model.can_generate() else {}
    counted = inputs["attention_mask"].bool()
    inputs_of, outputs_of = {}, {}
    handles = [
        layer.register_forward_hook(_remember(index, inputs_of, outputs_of), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    full = trunk(**inputs, **options).last_hidden_state[counted].float()
    for handle in handles:
        handle.remove()

    scores = []
    for left_out in range(len(layers)):
        known = {index: outputs_of[index] for index in range(left_out)}
        known[left_out] = _with_hidden(outputs_of[left_out], inputs_of[left_out])
        with _known_outputs(layers, known):
            without = trunk(**inputs, **options).last_hidden_state[counted].float()
        scores.append((full - without).square().sum(-1).mean().item())
    return scores


def check_layers(layers: int | Sequence[int], num_layers: int) -> None:
    """Refuse layers that a model of `num_layers` cannot keep: a number of them, or a list.

    Raises:
        ValueError: a number outside 1 to `num_layers`, or a list that is empty, not rising or leads outside the model.
    """
    kept = list(range(layers)) if isinstance(layers, int) else list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= num_layers:
        raise ValueError(
            f"The teacher has {num_layers} layers: give how many to keep (1 to {num_layers}), or a rising list of "
            f"numbers from 0 to {num_layers - 1}; got {layers}."
        )


def choose_layers(scores: Sequence[float], num_layers: int) -> list[int]:
    """The layers to keep: the `num_layers` with the largest scores, in their order.

    Raises:
        ValueError: `num_layers` is not between 1 and the number of scores.
    """
    check_layers(num_layers, len(scores))
    kept = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)[:num_layers]
    return sorted(kept)


def cut_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave only the layers `kept` in `model`, in place; save and load it before it is used.

    Raises:
        ValueError: the list is empty, not rising, or names a layer that the model has not.
    """
    config, layers = model.config.get_text_config(), layers_of(model)
    num_layers = len(layers)
    check_layers(kept, num_layers)
    parent, name = _stack(model)
    setattr(parent, name, nn.ModuleList(layers[index] for index in kept))
    for key, value in config.to_dict().items():  # per-layer settings such as `layer_types`
        if isinstance(value, list) and len(value) == num_layers:
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of layers of a language model or an encoder."""
    parent, name = _stack(model)
    return getattr(parent, name)


def _stack(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The part of the trunk that holds its stack of layers, and the stack's name there."""
    num_layers = model.config.get_text_config().num_hidden_layers
    trunk = model.get_decoder()  # of encoders too
    paths = [
        path
        for path, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    outermost = [path for path in paths if path.count(".") == min(one.count(".") for one in paths)]
    if len(outermost) != 1:
        raise ValueError(
            f"Cannot tell which part of {type(model).__name__} is its stack of {num_layers} layers. Give the student "
            "as a model of its own (`student.model`)."
        )
    parent, _, name = outermost[0].rpartition(".")
    return trunk.get_submodule(parent), name


def _remember(index: int, inputs_of: dict, outputs_of: dict):
    def hook(layer, arguments, keywords, output):
        inputs_of[index] = arguments[0] if arguments else keywords["hidden_states"]
        outputs_of[index] = output

    return hook


def _with_hidden(output: Tensor | tuple, hidden: Tensor) -> Tensor | tuple:
    """A layer's output with its hidden states exchanged; some architectures return them in a tuple."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def _known_outputs(layers: nn.ModuleList, known: dict[int, Tensor | tuple]):
    """Inside, the layers of `known` answer from memory instead of computing."""
    for index, output in known.items():
        layers[index].forward = lambda *arguments, _output=output, **keywords: _output
    try:
        yield
    finally:
        for index in known:
            del layers[index].forward  # back to the class's own
