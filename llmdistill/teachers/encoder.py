"""Classifiers as teachers: their answers are logits and the embeddings that their last linear layer reads."""

from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llmdistill.store import AnswerStore


class EncoderTeacher:
    """A frozen classifier of the transformers library: encoders of any kind, and causal models with a `score` head.

    Args:
        model: frozen, in evaluation mode, on its device.
        probe: inputs of its forward for one or more rows, by which its last linear layer is found.

    Raises:
        ValueError: its logits are not what a linear layer makes of one embedding for each row.
    """

    def __init__(self, model: PreTrainedModel, probe: dict[str, Tensor]):
        self.model = model
        self._pads = getattr(model.config, "pad_token_id", None)
        self._head = self._find_head(probe)

    @property
    def weight(self) -> Tensor:
        """`[C, D]` of the last linear layer."""
        return self._head.weight.detach()

    @torch.no_grad()
    def answer(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits `[B, C]` and embeddings `[B, D]` of a batch, both float32 and on the teacher's device."""
        logits, calls = self._watch([self._head], inputs)
        return logits.float(), self._of_rows(calls[-1][1], inputs).float()

    @torch.no_grad()
    def _find_head(self, probe: dict[str, Tensor]) -> nn.Linear:
        labels = self.model.config.num_labels
        linear = [part for part in self.model.modules() if isinstance(part, nn.Linear) and part.out_features == labels]
        logits, calls = self._watch(linear, probe)
        for layer, read in reversed(calls):
            made = nn.functional.linear(self._of_rows(read, probe), layer.weight, layer.bias)
            if made.shape == logits.shape and (made - logits).abs().max() <= 0.02 * logits.abs().max():
                return layer
        raise ValueError(
            f"{type(self.model).__name__} does not end in a linear layer that makes its {labels} logits from one "
            "embedding for each row, so it cannot teach with its embeddings. Take another teacher."
        )

    def _watch(self, layers: list[nn.Linear], inputs: dict[str, Tensor]) -> tuple[Tensor, list]:
        """The model's logits, and which of the layers read what, in the order of their calls."""
        calls = []
        handles = [
            layer.register_forward_hook(lambda layer, arguments, output: calls.append((layer, arguments[0])))
            for layer in layers
        ]
        try:
            inputs = {name: values.to(self.model.device) for name, values in inputs.items()}
            return self.model(**inputs).logits, calls
        finally:
            for handle in handles:
                handle.remove()

    def _of_rows(self, read: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """`[B, D]`: causal models give one state for each token, of which the last that is no padding speaks."""
        if read.ndim == 2:
            return read
        if self._pads is None:
            return read[:, -1]
        ids = inputs["input_ids"].to(read.device)
        places = torch.arange(ids.shape[1], device=ids.device) * (ids != self._pads)
        return read[torch.arange(len(ids), device=ids.device), places.argmax(-1)]


def ask(
    teacher: EncoderTeacher,
    tokens: Dataset,
    pad: Callable[[list[dict]], dict[str, Tensor]],
    store: AnswerStore,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Have the teacher answer all rows whose answers are not in the store yet; each rank its share of the pieces.

    Args:
        teacher: that answers.
        tokens: R rows of its inputs, without labels.
        pad: makes a batch of rows.
        store: takes `logits` `[rows, C]` and `embeddings` `[rows, D]`.
        batch_size: rows the teacher sees at once; those of a piece are sorted by length first.
        rank: this process's number.
        ranks: how many processes share the work.
    """
    pieces, missing = store.pieces(), store.missing()
    for number in tqdm([number for number in missing if number % ranks == rank], desc="Asking the teacher"):
        rows = tokens.select(pieces[number])
        lengths = [len(ids) for ids in rows["input_ids"]]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        answers = []
        for start in range(0, len(order), batch_size):
            answers.append(teacher.answer(pad([rows[row] for row in order[start : start + batch_size]])))
        logits, embeddings = (torch.cat(parts).cpu() for parts in zip(*answers, strict=True))
        back = torch.tensor(order).argsort()
        store.write(number, {"logits": logits[back], "embeddings": embeddings[back]})
