"""Classifiers of the transformers library, with several outputs for each class where the student was taught so.

A student of LELP has K outputs for each of C classes. Its folder is a plain sequence classifier of C * K labels, named
`class/0`, `class/1` and so on, which every program loads. The logits of the C classes are the log of the summed
exponentials over each class's outputs, `logits.unflatten(-1, (C, K)).logsumexp(-1)`; `load` does so by itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmdistill.models import from_safetensors, load_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def class_names(config: "PreTrainedConfig") -> list[str] | None:
    """Names of the classes in the order of their logits, None for a model that predicts a number."""
    names = [config.id2label[index] for index in range(len(config.id2label))]
    if len(names) == 1 and config.problem_type != "single_label_classification":
        return None
    each = num_subclasses(config)
    return [name.rpartition("/")[0] for name in names[::each]] if each > 1 else names


def num_subclasses(config: "PreTrainedConfig") -> int:
    """Outputs for each class."""
    return getattr(config, "num_subclasses", 1)


def load(name: str, dtype: "torch.dtype | str" = "auto", **options) -> "PreTrainedModel":
    """The classifier `name`, whose forward gives logits of classes, also where it was taught subclasses.

    Raises:
        UserError: there are no such weights.
    """
    model = load_as_trained(name, dtype, **options)
    return model if num_subclasses(model.config) == 1 else joined(model)


def load_as_trained(name: str, dtype: "torch.dtype | str" = "auto", **options) -> "PreTrainedModel":
    """The classifier `name` with one logit for each output of its head; read from safetensors only.

    Raises:
        UserError: there are no such weights.
    """
    from transformers import AutoModelForSequenceClassification

    return from_safetensors(AutoModelForSequenceClassification, name, dtype=dtype, **options)


def new(name: str, names: Sequence[str] | None, each: int = 1, **options) -> "PreTrainedModel":
    """The encoder `name` under a classification head for the classes `names`, new unless it has just this head.

    Args:
        name: of a model.
        names: of the classes; None for one number to be predicted.
        each: outputs for each class.
        options: of `from_pretrained`.
    """
    labels = head_labels(names, each)
    config = load_config(name, trust_remote_code=options.get("trust_remote_code", False))
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "regression" if names is None else "single_label_classification"
    config.num_subclasses = each
    return load_as_trained(name, config=config, ignore_mismatched_sizes=True, **options)


def head_labels(names: Sequence[str] | None, each: int = 1) -> list[str]:
    """Labels of a head's outputs, in their order."""
    if names is None:
        return ["LABEL_0"]
    return list(names) if each == 1 else [f"{name}/{number}" for name in names for number in range(each)]


def joined(model: "PreTrainedModel") -> "PreTrainedModel":
    """A model of subclasses, in place, as one of classes: its logits, its label names. It cannot be saved any more."""
    from llmdistill.objectives.lelp import class_logits

    names = class_names(model.config)

    def join(module, arguments, output):
        output.logits = class_logits(output.logits, len(names))
        return output

    def refuse(*arguments, **options):
        raise ValueError("This model's outputs were joined to classes: copy the folder that it was loaded from.")

    model.register_forward_hook(join)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.config.num_subclasses = 1
    model.save_pretrained = refuse
    return model
