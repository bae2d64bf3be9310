"""Rows for language models: read, checked and tokenised with labels on the tokens that count."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill import samples
from llmdistill.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
SHAPES = (("messages",), ("prompt", "completion"), ("text",))
"""The columns of a row, by the first of these shapes that a data set has; as in TRL."""
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(kw_only=True)
class Source:
    """Where rows come from, as a recipe names it."""

    path: str
    """`samples/<name>`, a file (.jsonl, .json, .parquet, .csv; also .gz), a folder with one file per split, or a data
    set on the Hub."""
    split: str = "train"
    """File name in a folder, or split of a data set on the Hub."""
    name: str | None = None
    """Configuration of a data set on the Hub that has several."""
    rows: int | None = None
    """Take only the first so many rows."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column -> the data set's, e.g. `{completion: response}`."""

    def __post_init__(self):
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"`rows` must be at least 1, got {self.rows}.")
        known = [column for shape in SHAPES for column in shape]
        for column in self.columns:
            if column not in known:
                raise ValueError(
                    f"`columns` maps our names to the data set's; `{column}` is none.{nearest(column, known)}"
                )


def find(source: Source) -> Path | None:
    """The file that `source` names, or None where it names a data set on the Hub.

    Raises:
        UserError: the path is neither, or the folder has no such split.
    """
    path = Path(source.path).expanduser()
    if source.path.startswith(samples.PREFIX):
        path = samples.data_folder(source.path.removeprefix(samples.PREFIX))
    if path.is_file():
        return path
    if path.is_dir():
        files = {file.name.partition(".")[0]: file for file in sorted(path.iterdir()) if _builder(file)}
        if source.split not in files:
            raise UserError(f"`{source.path}` has no split `{source.split}`.{nearest(source.split, files)}")
        return files[source.split]
    if source.path.startswith((".", "/", "~")) or source.path.count("/") > 1 or _builder(path):
        raise UserError(f"there is no file or folder `{source.path}`.")
    return None


def load(source: Source) -> "Dataset":
    """The rows of `source`, checked, with the columns of one of `SHAPES` only.

    Raises:
        UserError: no such data, unreadable, empty, or rows without an answer.
    """
    import datasets

    file = find(source)
    if file is None:
        rows = _load_from_hub(source)
    else:
        try:
            rows = datasets.load_dataset(_builder(file), data_files=str(file), split="train")
        except StopIteration:
            raise UserError(f"{file} is empty: it has no rows.") from None
        except datasets.exceptions.DatasetGenerationError as error:
            raise UserError(f"cannot read {file}: {_bad_line(file) or error.__cause__ or error}") from None
    where = f"{source.path} ({source.split})" if file is None else str(file)
    rows = rows.rename_columns({theirs: ours for ours, theirs in _present(source, rows, where).items()})
    shape = next((shape for shape in SHAPES if set(shape) <= set(rows.column_names)), None)
    if shape is None:
        raise UserError(
            f"{where} has the columns {', '.join(rows.column_names)}: expected `messages`, `prompt` and `completion`, "
            "or `text`. Name yours with `columns`, e.g. `columns: {completion: response}`."
        )
    rows = rows.select_columns(list(shape))
    rows = rows.select(range(min(source.rows or len(rows), len(rows))))
    check(rows, where)
    return rows


def check(rows: "Dataset", where: str) -> None:
    """Refuse an empty data set and rows that have nothing to learn from.

    Raises:
        UserError: names the file and the first faulty row, counted from 1.
    """
    if len(rows) == 0:
        raise UserError(f"{where} is empty: it has no rows.")
    column = rows.column_names[-1]
    faulty = [number for number, value in enumerate(rows[column], start=1) if not _has_answer(value)]
    if faulty:
        count = f"{len(faulty)} rows have" if len(faulty) > 1 else "one row has"
        raise UserError(
            f"{where}: {count} no answer in `{column}`; the first is row {faulty[0]}. Mend or remove them."
        )


def tokenize(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", mask: str, max_length: int) -> "Dataset":
    """Rows as `input_ids` and `labels`, cut to `max_length` tokens.

    Args:
        rows: with the columns of one of `SHAPES`; conversations go through the tokenizer's chat template.
        tokenizer: the student's.
        mask: `assistant` puts labels on the answers' tokens only, `all` on every token. Plain text has labels on all.
        max_length: tokens of a row; what lies beyond is cut, and rows whose labels are all cut are dropped.

    Raises:
        UserError: the chat template does not tell where an answer begins, or nothing is left.
    """

    def convert(row: dict[str, Any]) -> dict[str, list[int]]:
        ids, counted = _tokens(row, tokenizer)
        if mask == "all":
            counted = [True] * len(ids)
        labels = [token if counts else IGNORE_INDEX for token, counts in zip(ids, counted, strict=True)]
        # The first token is predicted by nothing.
        return {"input_ids": ids[:max_length], "labels": [IGNORE_INDEX, *labels[1:max_length]]}

    tokenized = rows.map(convert, remove_columns=rows.column_names, desc="Tokenizing")
    kept = tokenized.filter(lambda row: any(label != IGNORE_INDEX for label in row["labels"]), desc="Checking labels")
    if len(kept) == 0:
        raise UserError(
            f"No row has an answer within the first {max_length} tokens: raise `max_length` or shorten the prompts."
        )
    return kept


def _tokens(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """The tokens of one row, and which of them are the answer's."""
    if "text" in row:
        ids = tokenizer(_ended(row["text"], tokenizer))["input_ids"]
        return ids, [True] * len(ids)
    if "messages" in row:
        return _conversation_tokens(row["messages"], tokenizer)
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + _ended(row["completion"], tokenizer))["input_ids"]
        start = _common_prefix(prompt, ids)  # tokens may merge across the boundary
        return ids, [position >= start for position in range(len(ids))]
    messages = row["prompt"] + row["completion"]
    return _conversation_tokens(messages, tokenizer, first_answer=len(row["prompt"]))


def _conversation_tokens(
    messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", first_answer: int = 0
) -> tuple[list[int], list[bool]]:
    """A conversation in the chat template; the answers are the assistant's messages from number `first_answer` on."""

    def render(end: int, add_generation_prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            messages[:end], add_generation_prompt=add_generation_prompt, return_dict=True
        )["input_ids"]

    ids = render(len(messages), False)
    counted = [False] * len(ids)
    for number, message in enumerate(messages):
        if number < first_answer or message["role"] != "assistant":
            continue
        before, after = render(number, True), render(number + 1, False)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise UserError(
                "The tokenizer's chat template renders a conversation differently once it goes on, so that the "
                "answers' tokens cannot be told apart. Use `mask: all`, rows of `prompt` and `completion` as text, or "
                "another chat template."
            )
        counted[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, counted


def _ended(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text with the end-of-sequence token, so that the student learns to stop."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((position for position, (one, other) in pairs if one != other), min(len(first), len(second)))


def _has_answer(value: str | list[dict[str, str]] | None) -> bool:
    if isinstance(value, list):
        return any(message["role"] == "assistant" and (message["content"] or "").strip() for message in value)
    return bool(value and value.strip())


def _present(source: Source, rows: "Dataset", where: str) -> dict[str, str]:
    for theirs in source.columns.values():
        if theirs not in rows.column_names:
            raise UserError(f"{where} has no column `{theirs}`.{nearest(theirs, rows.column_names)}")
    return source.columns


def _load_from_hub(source: Source) -> "Dataset":
    import datasets

    try:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"`{source.path}` is no file here, and the Hugging Face Hub gives no such data set: {reason}"
        ) from None


def _builder(file: Path) -> str | None:
    """The reader of the datasets library for a file, None for files that hold no rows."""
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def _bad_line(file: Path) -> str | None:
    """The first line of a JSON-lines file that is no JSON object."""
    if _builder(file) != "json":
        return None
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt") as lines:
        for number, line in enumerate(_nonblank(lines), start=1):
            try:
                json.loads(line)
            except ValueError as error:
                return f"line {number} is not JSON ({error})."
    return None


def _nonblank(lines: Iterable[str]) -> Iterable[str]:
    return (line for line in lines if line.strip())
