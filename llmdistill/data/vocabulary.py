"""The proof that two models speak one vocabulary, token id by token id."""

from typing import TYPE_CHECKING

from llmdistill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("The quick brown fox, 3.14 \u00d7 2!", "  def f(x):\n\treturn x_1 + 'é'", "Größe 北京 🙂\r\n\n")
"""Texts that separate tokenizers with equal tokens but different rules of splitting."""


def shared_vocabulary(
    student_tokenizer: "PreTrainedTokenizerBase",
    teacher_tokenizer: "PreTrainedTokenizerBase",
    student_size: int,
    teacher_size: int,
) -> int:
    """How many ids, from 0 on, mean the same to both models: what both heads are cropped to.

    Families pad their output heads to different sizes (Qwen2.5: 151,936 and 152,064 rows for one tokenizer), so sizes
    alone prove nothing.

    Args:
        student_tokenizer: of the student; its ids are fed to both models.
        teacher_tokenizer: of the teacher.
        student_size: rows of the student's output head.
        teacher_size: rows of the teacher's.

    Returns:
        The smaller of the two sizes.

    Raises:
        UserError: an id means different tokens, a text is split differently, or the student has tokens beyond the
            teacher's last row; names both sizes and the first differing id.
    """
    shared = min(student_size, teacher_size)
    student_tokens, teacher_tokens = _tokens(student_tokenizer), _tokens(teacher_tokenizer)
    sizes = f"the student's vocabulary has {student_size:,} rows, the teacher's {teacher_size:,}"
    for token_id in range(shared):
        student_token, teacher_token = student_tokens.get(token_id), teacher_tokens.get(token_id)
        if student_token != teacher_token:
            raise UserError(
                f"Student and teacher speak different vocabularies ({sizes}): id {token_id} is {student_token!r} to "
                f"the student and {teacher_token!r} to the teacher. Use a teacher of the student's family."
            )
    beyond = max(student_tokens) + 1
    if beyond > shared:
        raise UserError(
            f"The student's tokenizer has ids up to {beyond - 1}, of which the teacher knows only the first {shared} "
            f"({sizes}). Use a teacher of the student's family, or remove the added tokens."
        )
    for text in PROBES:
        student_ids, teacher_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        if student_ids != teacher_ids:
            raise UserError(
                f"Student and teacher have the same tokens but split text differently: {text!r} is {student_ids} to "
                f"the student and {teacher_ids} to the teacher. Use a teacher of the student's family."
            )
    return shared


def _tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def same_encoding(tokenizer: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> bool:
    """Whether two fast tokenizers make the same model inputs of every text and pair."""
    first, second = (
        (one.backend_tokenizer.to_str(), one.model_input_names, one.padding_side) for one in (tokenizer, other)
    )
    return first == second
