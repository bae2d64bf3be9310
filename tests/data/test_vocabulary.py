"""The proof that two tokenizers agree."""

import pytest
from conftest import make_tokenizer

from llmdistill.data.vocabulary import same_encoding, shared_vocabulary


def test_padded_sizes_are_cropped_to_the_smaller(tokenizer):
    size = len(tokenizer)
    assert shared_vocabulary(tokenizer, make_tokenizer(), size + 7, size + 40) == size + 7
    assert shared_vocabulary(tokenizer, make_tokenizer(), size + 40, size) == size


def test_the_first_differing_id_and_both_sizes_are_named(tokenizer):
    other = make_tokenizer("entirely different words with other merges " * 3)
    size = len(tokenizer)
    with pytest.raises(ValueError, match=rf"{size} rows, the teacher's {len(other)}\): id 261 is"):
        shared_vocabulary(tokenizer, other, size, len(other))


def test_a_token_that_only_the_teacher_knows_is_a_difference(tokenizer):
    other = make_tokenizer()
    other.add_tokens(["<extra>"])
    size = len(tokenizer)
    with pytest.raises(ValueError, match=f"id {size} is None to the student and '<extra>'"):
        shared_vocabulary(tokenizer, other, size + 8, size + 8)
    assert shared_vocabulary(tokenizer, other, size, size + 8) == size  # beyond the shared rows it does not matter


def test_a_student_token_beyond_the_teachers_head_is_refused(tokenizer):
    other = make_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=f"ids up to {len(tokenizer)}"):
        shared_vocabulary(other, tokenizer, len(other), len(tokenizer))


def test_equal_tokens_that_split_differently_are_refused(tokenizer):
    from tokenizers import pre_tokenizers

    other = make_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="split text differently"):
        shared_vocabulary(tokenizer, other, len(tokenizer), len(other))


def test_one_vocabulary_may_still_make_other_inputs():
    first, second = make_tokenizer(), make_tokenizer()
    assert same_encoding(first, second)
    second.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert not same_encoding(first, second)
    assert not same_encoding(first, make_tokenizer("other words"))
