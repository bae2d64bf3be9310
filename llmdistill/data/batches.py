"""Which rows make a batch: rows of similar length together, since padding costs as much as text."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from datasets import Dataset

STEPS_PER_GROUP = 50
"""Rows are sorted by length within groups of so many steps: long enough for little padding, and random enough."""


class LengthGroupedSampler(Sampler[int]):
    """Rows in random order, but those of one optimizer step of similar length, and within a step by falling length.

    The order depends on the seed, the epoch and the rows of one step over all ranks and accumulation steps, not on how
    that step is divided: 8 x 1, 2 x 4 and two ranks of 4 see the same steps. For the same reason the rows that do not
    fill a step are left out, other ones in every epoch. The longest step of all comes first, so that a batch too large
    for the memory fails at once.

    Args:
        lengths: tokens of each row.
        rows_per_step: rows of one optimizer step, over all ranks and accumulation steps.
        seed: of the random order; `set_epoch` gives every epoch another one.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int):
        self.lengths, self.rows_per_step, self.seed = lengths, rows_per_step, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of epoch `epoch`, counted from 0, from the next iteration on."""
        self.epoch = epoch

    def __len__(self) -> int:
        if len(self.lengths) < self.rows_per_step:  # all that there is, in one small step
            return len(self.lengths)
        return len(self.lengths) // self.rows_per_step * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)[: len(self)].tolist()
        steps = []
        for group in _pieces(order, STEPS_PER_GROUP * self.rows_per_step):
            group.sort(key=lambda row: self.lengths[row], reverse=True)
            steps += _pieces(group, self.rows_per_step)
        steps = [steps[index] for index in torch.randperm(len(steps), generator=generator).tolist()]
        longest = max(range(len(steps)), key=lambda index: self.lengths[steps[index][0]])
        steps[0], steps[longest] = steps[longest], steps[0]
        return (row for step in steps for row in step)


def token_lengths(rows: "Dataset") -> list[int]:
    """Tokens of each row of a tokenised data set, without making Python lists of them."""
    import pyarrow

    def count(table: pyarrow.Table) -> pyarrow.Table:
        return pyarrow.table({"length": pyarrow.compute.list_value_length(table["input_ids"])})

    counted = rows.select_columns("input_ids").with_format("arrow").map(count, batched=True, desc="Measuring rows")
    return counted.with_format(None)["length"][:]


def _pieces(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]
