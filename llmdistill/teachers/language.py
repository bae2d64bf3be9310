"""Causal language models as teachers: their answers are last hidden states and the head that reads them."""

import torch
from torch import Tensor, nn

from llmdistill.models import check_head, last_hidden_states, output_head
from llmdistill.objectives.chunked import Head


class LanguageTeacher:
    """A frozen causal language model.

    Args:
        model: frozen, in evaluation mode and placed; possibly wrapped by DeepSpeed.
        vocabulary_size: ids shared with the student; the head is cropped to them.
    """

    def __init__(self, model: nn.Module, vocabulary_size: int):
        self.model, self.vocabulary_size = model, vocabulary_size
        self._head_is_proven = False

    @torch.no_grad()
    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states `[B, S, Ht]` for the student's inputs (without labels)."""
        hidden, logits = last_hidden_states(self.model, inputs)
        if not self._head_is_proven:
            check_head(self.head(), hidden, logits, "teacher")
            self._head_is_proven = True
        return hidden

    def head(self) -> Head:
        """The output head `[V, Ht]` of the shared vocabulary."""
        return output_head(self.model, self.vocabulary_size)
