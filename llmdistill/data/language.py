"""Rows for language models: read, checked and tokenised with labels on the tokens that count."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jinja2

from llmdistill.data.rows import Source, cache_name
from llmdistill.data.rows import load as load_rows
from llmdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
SHAPES = (("messages",), ("prompt", "completion"), ("text",))
"""The columns of a row, by the first of these shapes that a data set has; as in TRL."""


def load(source: Source) -> "Dataset":
    """The rows of `source`, checked, with the columns of one of `SHAPES` only.

    Raises:
        UserError: no such data, unreadable, empty, or rows without an answer.
    """
    import datasets

    rows, where = load_rows(source, [column for shape in SHAPES for column in shape])
    shape = shape_of(rows.column_names)
    if shape is None:
        raise UserError(
            f"{where} has the columns {', '.join(rows.column_names)}: expected `messages`, `prompt` and `completion`, "
            "or `text`. Name yours with `columns`, e.g. `columns: {completion: response}`."
        )
    rows = rows.select_columns(list(shape))
    check(rows, where)
    if _is_plain(rows):  # texts have one type, whatever file they came from
        rows = rows.cast(datasets.Features(dict.fromkeys(rows.column_names, datasets.Value("string"))))
    return rows


def shape_of(columns: Iterable[str]) -> tuple[str, ...] | None:
    """The first of `SHAPES` whose columns are all there."""
    return next((shape for shape in SHAPES if set(shape) <= set(columns)), None)


def check(rows: "Dataset", where: str) -> None:
    """Refuse an empty data set and rows that have nothing to learn from.

    Raises:
        UserError: names the file and the first faulty row, counted from 1.
    """
    if len(rows) == 0:
        raise UserError(f"{where} is empty: it has no rows.")
    *before, last = rows.column_names
    faulty = []
    for number, row in enumerate(rows, start=1):
        if any(not _is_text(row[column], may_be_empty=True) for column in before) or not _is_text(row[last]):
            raise UserError(
                f"{where}: row {number} is neither text nor a conversation in {', '.join(rows.column_names)}: "
                "expected a text, or a list of messages with `role` and `content` as texts."
            )
        if before and isinstance(row[before[0]], str) != isinstance(row[last], str):
            raise UserError(
                f"{where}: in row {number} one of {', '.join(rows.column_names)} is a text, the other a conversation: "
                "make both of one kind."
            )
        if not _has_answer(row[last]):
            faulty.append(number)
    if faulty:
        count = f"{len(faulty)} rows have" if len(faulty) > 1 else "one row has"
        raise UserError(f"{where}: {count} no answer in `{last}`; the first is row {faulty[0]}. Mend or remove them.")


def tokenize(
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    mask: str,
    max_length: int | None,
    num_processes: int | None = None,
) -> "Dataset":
    """Rows as `input_ids` and `labels`, cut to `max_length` tokens.

    Args:
        rows: with the columns of one of `SHAPES`; conversations go through the tokenizer's chat template.
        tokenizer: the student's.
        mask: `assistant` puts labels on the answers' tokens only, `all` on every token. Plain text has labels on all.
        max_length: tokens of a row; what lies beyond is cut, and rows whose labels are all cut are dropped. None cuts
            nothing.
        num_processes: that tokenise side by side.

    Raises:
        UserError: the chat template refuses a row or does not tell where an answer begins, or nothing is left.
    """

    def convert(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        try:
            text, spans, options = _text_and_answers(row, tokenizer, mask)
        except jinja2.TemplateError as error:
            raise UserError(f"The tokenizer's chat template refuses row {index + 1}: {error}") from None
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        # A token counts if it ends inside an answer; one that began before it has merged with its first character.
        labels = [
            token if any(start < end <= stop for start, stop in spans) else IGNORE_INDEX
            for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        # The first token is predicted by nothing.
        return {"input_ids": encoded["input_ids"][:max_length], "labels": [IGNORE_INDEX, *labels[1:max_length]]}

    if not tokenizer.is_fast:
        raise UserError("The tokenizer is a slow one, which cannot tell where its tokens lie in the text.")
    if not _is_plain(rows) and tokenizer.chat_template is None:
        raise UserError(
            "The tokenizer has no chat template, which conversations need. Use rows of `prompt` and `completion` as "
            "text, or give the tokenizer a template."
        )
    name = cache_name(__file__, rows, tokenizer, mask, max_length)
    settings = {"with_indices": True, "remove_columns": rows.column_names, "num_proc": num_processes}
    tokenized = rows.map(convert, desc="Tokenizing", new_fingerprint=name, **settings)
    kept = tokenized.filter(
        lambda row: any(label != IGNORE_INDEX for label in row["labels"]),
        desc="Checking labels",
        new_fingerprint=f"{name}-kept",
    )
    if len(kept) == 0:
        raise UserError(
            f"No row has an answer within the first {max_length} tokens: raise `max_length` or shorten the prompts."
        )
    return kept


def end_of_answer(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", max_length: int) -> int | None:
    """The special token that ends the answers of tokenised rows: what a student of them learns to stop with.

    Rows of `max_length` tokens may have been cut before their end, so the first shorter one speaks; None without one.
    """
    special = set(tokenizer.all_special_ids) | {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    whole = next((row["labels"] for row in rows if len(row["labels"]) < max_length), [])
    ends = [label for label in whole if label in special]
    return ends[-1] if ends else None


def _text_and_answers(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", mask: str
) -> tuple[str, list[tuple[int, int]], dict[str, Any]]:
    """The text of a row, which characters of it are answers, and how to tokenise it."""
    if "text" in row:
        text = _ended(row["text"], tokenizer)
        return text, [(-1, len(text))], {}
    if "prompt" in row and isinstance(row["prompt"], str):
        text, start, options = row["prompt"] + _ended(row["completion"], tokenizer), len(row["prompt"]), {}
        spans = [(start, len(text))]
    else:
        first = len(row.get("prompt", []))
        messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        text, options = _render(messages, tokenizer), {"add_special_tokens": False}  # the template has put them
        spans = _answer_spans(messages, text, tokenizer, first) if mask == "assistant" else []
    return text, [(-1, len(text))] if mask == "all" else spans, options


def _answer_spans(
    messages: list[dict[str, str]], text: str, tokenizer: "PreTrainedTokenizerBase", first: int
) -> list[tuple[int, int]]:
    """Where in the rendered conversation the assistant's messages from number `first` on lie, their ends included."""
    spans = []
    for number, message in enumerate(messages):
        if number < first or message["role"] != "assistant":
            continue
        before = _render(messages[:number], tokenizer, add_generation_prompt=True) if number else ""
        after = _render(messages[: number + 1], tokenizer)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                "The tokenizer's chat template renders a conversation differently once it goes on, so that the "
                "answers cannot be told apart. Use `mask: all`, rows of `prompt` and `completion` as text, or "
                "another chat template."
            )
        spans.append((len(before), len(after)))
    return spans


def _render(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _ended(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text with the end-of-sequence token, so that the student learns to stop."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def _is_plain(rows: "Dataset") -> bool:
    """Whether the rows are texts, not conversations."""
    return isinstance(rows[0][rows.column_names[-1]], str)


def _is_text(value: Any, may_be_empty: bool = False) -> bool:
    """Whether a value is a text or a conversation, of the kinds that can be tokenised."""
    if isinstance(value, list):
        return (may_be_empty or bool(value)) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) and _is_text(message.get("content"))
            for message in value
        )
    return isinstance(value, str)


def _has_answer(value: str | list[dict[str, str]]) -> bool:
    if isinstance(value, list):
        return any(message["role"] == "assistant" and message["content"].strip() for message in value)
    return bool(value.strip())
