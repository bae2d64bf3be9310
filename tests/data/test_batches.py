"""The sampler: little padding, one order however a step is divided."""

import pytest
import torch
from datasets import Dataset

from llmdistill.data.batches import LengthGroupedSampler, token_lengths

LENGTHS = torch.randint(5, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()


def padding(order: list[int], rows_per_batch: int) -> float:
    batches = [order[start : start + rows_per_batch] for start in range(0, len(order), rows_per_batch)]
    padded = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches)
    return 1 - sum(LENGTHS[row] for row in order) / padded


def test_every_row_once_per_epoch_in_another_order():
    sampler = LengthGroupedSampler(LENGTHS[:1000], 8, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_rows_that_fill_no_step_wait_for_another_epoch():
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=1)
    left_out = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == len(set(order)) == 1000
        left_out.append(set(range(len(LENGTHS))) - set(order))
    assert left_out[0] != left_out[1] != left_out[2]


@pytest.mark.parametrize("rows_per_batch", [8, 4])
def test_at_most_five_percent_is_padding(rows_per_batch):
    order = list(LengthGroupedSampler(LENGTHS, 8, seed=1))
    assert padding(order, rows_per_batch) < 0.05
    assert padding(list(range(len(LENGTHS))), rows_per_batch) > 0.3  # what random batches cost


def test_the_longest_step_comes_first_and_the_order_of_steps_is_random():
    order = list(LengthGroupedSampler(LENGTHS, 8, seed=1))
    assert LENGTHS[order[0]] == max(LENGTHS)
    longest = [LENGTHS[order[start]] for start in range(0, 400, 8)]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("count", [1, 7, 8])
def test_few_rows(count):
    assert sorted(LengthGroupedSampler(LENGTHS[:count], 8, seed=0)) == list(range(count))


def test_token_lengths_follow_a_selection():
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in (3, 1, 4)], "labels": [[0]] * 3})
    assert token_lengths(rows) == [3, 1, 4]
    assert token_lengths(rows.select([2, 0])) == [4, 3]
