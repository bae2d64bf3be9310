"""Rows for classifiers: a sentence or a pair of them, and a label; GLUE's tasks and any data of that kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmdistill.data.rows import Source, cache_name
from llmdistill.data.rows import load as load_rows
from llmdistill.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SHAPES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "pair"),
    ("sentence",),
    ("text",),
)
"""The texts of a row, by the first of these shapes that a data set has; the pairs are those of GLUE."""
LABEL = "label"
TEACHER = "teacher_"
"""Prefix of the columns of the teacher's own inputs, where its tokenizer is another."""


@dataclass(frozen=True)
class Labels:
    """What the labels of a data set mean."""

    names: tuple[str, ...] | None
    """Of the classes in the order of their ids; None where labels are numbers to be predicted (regression)."""
    are_ids: bool = False
    """Labels are bare class numbers: `names` are these numbers as text and say nothing."""


def load(source: Source, extra: Sequence[str] = (), texts: int | None = None) -> "Dataset":
    """The rows of `source` as `text`, `pair` where there are two, `label` where there is one, and `extra` columns.

    Args:
        source: of a recipe.
        extra: further columns to keep, under the data set's names.
        texts: how many texts a row must have; any number if None.

    Raises:
        UserError: no such data, unreadable, empty, without texts, with another number of them, or a column missing.
    """
    rows, where = load_rows(source, [*(column for shape in SHAPES for column in shape), LABEL])
    shape = next((shape for shape in SHAPES if set(shape) <= set(rows.column_names)), None)
    if shape is None:
        raise UserError(
            f"{where} has the columns {', '.join(rows.column_names)}: expected `sentence`, or `sentence1` and "
            "`sentence2`. Name yours with `columns`, e.g. `columns: {sentence: review}`."
        )
    if texts is not None and texts != len(shape):
        kind = {1: "one text", 2: "a pair of texts"}
        raise UserError(f"{where} has {kind[len(shape)]} in a row ({', '.join(shape)}), expected {kind[texts]}.")
    for column in extra:
        if column not in rows.column_names:
            raise UserError(f"{where} has no column `{column}`.{nearest(column, rows.column_names)}")
    kept = [*shape, *([LABEL] if LABEL in rows.column_names else []), *extra]
    rows = rows.select_columns(list(dict.fromkeys(kept)))
    rows = rows.rename_columns({theirs: ours for theirs, ours in zip(shape, ("text", "pair"), strict=False)})
    for name in ("text", "pair")[: len(shape)]:
        for number, text in enumerate(rows[name], start=1):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}: row {number} has no text in `{shape[name == 'pair']}`. Mend or remove it.")
    return rows


def labels_of(rows: "Dataset") -> Labels | None:
    """What the labels mean, or None where no row has one.

    Names of the data set's own are kept in its order, texts are put in alphabetical order (numbers among them by
    size), integers count classes from 0, and numbers with a fraction are to be predicted. Rows without a label have
    None, NaN or, among classes, -1. Whole numbers that a file gives as fractions because some are missing are classes.

    Raises:
        UserError: negative class numbers.
    """
    if LABEL not in rows.column_names:
        return None
    values = [value for value in rows[LABEL] if not _is_missing(value)]
    present = [value for value in values if value != -1]
    if not present:
        return None
    if getattr(rows.features[LABEL], "names", None):
        return Labels(tuple(rows.features[LABEL].names))
    if isinstance(present[0], str):
        return Labels(tuple(sorted(set(present), key=lambda name: (int(name) if name.isdigit() else -1, name))))
    has_gaps = len(values) < len(rows) and all(value == int(value) for value in values)
    if isinstance(present[0], float) and not has_gaps:
        return Labels(None)
    if min(present) < 0:
        raise UserError(f"Labels must be class numbers from 0 on, got {min(present)}; -1 says that there is none.")
    return Labels(tuple(str(number) for number in range(max(2, int(max(present)) + 1))), are_ids=True)


def class_order(theirs: Sequence[str], ours: Sequence[str], who: str) -> list[int]:
    """Which of our classes each of their classes is.

    Equal names are equal classes; else names are compared without regard to case; else, where one side has only
    numbers for names (`LABEL_0`, `0`), a class is the one at the place that the number says.

    Args:
        theirs: class names of some data, or of another model.
        ours: class names of the model that is to understand them.
        who: what to call the other side in the error.

    Returns:
        For each of their classes the index among ours.

    Raises:
        UserError: other names, or another number of classes.
    """
    if set(theirs) <= set(ours):
        return [list(ours).index(name) for name in theirs]
    folded = [name.casefold() for name in ours]
    unknown = [name for name in theirs if folded.count(name.casefold()) != 1]
    if not unknown and len({name.casefold() for name in theirs}) == len(theirs):
        return [folded.index(name.casefold()) for name in theirs]
    if are_numbers(theirs):
        places = [_number(name) for name in theirs]
    elif are_numbers(ours) and len(theirs) == len(ours):
        numbers = [_number(name) for name in ours]
        places = [numbers.index(place) if place in numbers else len(ours) for place in range(len(theirs))]
    elif are_numbers(ours):
        places = [len(ours)]
    else:
        raise UserError(
            f"{who} has classes that the model does not know: {', '.join(unknown[:5] or theirs[:5])}. The model's are "
            f"{', '.join(ours[:10])}. Rename them, or take another model."
        )
    if max(places) >= len(ours):
        raise UserError(f"{who} has {len(theirs)} classes ({', '.join(theirs[:5])}), the model {len(ours)}.")
    return places


def with_class_ids(rows: "Dataset", ours: Sequence[str] | None, who: str) -> "Dataset":
    """Rows whose `label` is an id among the classes `ours`, -1 where a row has none; numbers stay for regression.

    Raises:
        UserError: classes that the model does not know, classes where it predicts a number, or numbers of which some
            are missing.
    """
    labels = labels_of(rows)
    if labels is None:
        return unlabelled(rows)
    if (labels.names is None) != (ours is None):
        kinds = {True: "numbers to be predicted", False: "classes"}
        raise UserError(f"{who} has {kinds[labels.names is None]}, the model knows {kinds[ours is None]}.")
    values = rows[LABEL][:]
    if ours is None:
        if missing := sum(map(_is_missing, values)):
            raise UserError(f"{who}: {missing} of {len(rows)} rows have no number to be predicted. Remove them.")
        return rows
    if labels.are_ids:
        if len(labels.names) > max(2, len(ours)):
            raise UserError(f"{who} has the class {len(labels.names) - 1}, the model only 0 to {len(ours) - 1}.")
        ids = {number: number for number in range(len(ours))}
    else:
        order = class_order(labels.names, ours, who)
        keys = labels.names if isinstance(next(filter(None, values), 0), str) else range(len(order))
        ids = dict(zip(keys, order, strict=True))
    return rows.remove_columns(LABEL).add_column(LABEL, [ids.get(value, -1) for value in values])


def unlabelled(rows: "Dataset") -> "Dataset":
    """Rows without their labels."""
    return rows.remove_columns(LABEL) if LABEL in rows.column_names else rows


def tokenize(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", max_length: int) -> "Dataset":
    """Texts as the inputs of a model, and `labels` where there is a `label`; other columns are left out.

    Args:
        rows: of `load`.
        tokenizer: of the model.
        max_length: tokens of a row; of a pair the longer text is cut first.
    """

    def convert(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(batch["text"], batch.get("pair"), truncation=True, max_length=max_length)
        return {name: values for name, values in encoded.items() if name != "attention_mask"}

    others = [name for name in rows.column_names if name != LABEL]
    name = cache_name(__file__, rows, tokenizer, max_length)
    tokens = rows.map(convert, batched=True, remove_columns=others, desc="Tokenizing", new_fingerprint=name)
    return tokens.rename_column(LABEL, "labels") if LABEL in tokens.column_names else tokens


def num_unlabelled(rows: "Dataset") -> int:
    """How many rows of `with_class_ids` have no label."""
    if LABEL not in rows.column_names:
        return len(rows)
    return rows[LABEL][:].count(-1) if rows.features[LABEL].dtype.startswith("int") else 0


def tokenize_for_both(
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    teacher_tokenizer: "PreTrainedTokenizerBase | None",
    max_length: int,
) -> "Dataset":
    """Texts as the student's inputs and, under a prefix, as the teacher's where it has a tokenizer of its own."""
    import datasets

    tokens = tokenize(unlabelled(rows), tokenizer, max_length)
    if teacher_tokenizer is None:
        return tokens
    theirs = tokenize(unlabelled(rows), teacher_tokenizer, max_length)
    theirs = theirs.rename_columns({name: f"{TEACHER}{name}" for name in theirs.column_names})
    return datasets.concatenate_datasets([tokens, theirs], axis=1)


class PairCollator:
    """Pads rows of `tokenize_for_both`.

    Args:
        tokenizer: the student's.
        teacher_tokenizer: the teacher's, where it has its own.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", teacher_tokenizer: "PreTrainedTokenizerBase | None"):
        from transformers import DataCollatorWithPadding

        self._own = DataCollatorWithPadding(tokenizer)
        self._theirs = None if teacher_tokenizer is None else DataCollatorWithPadding(teacher_tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, "Tensor"]:
        """Tensors by column."""
        own, theirs = zip(*map(split_inputs, rows), strict=True)
        batch = dict(self._own(list(own)))
        if self._theirs is not None:
            batch |= {f"{TEACHER}{name}": values for name, values in self._theirs(list(theirs)).items()}
        return batch


def split_inputs(columns: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The student's columns of a row or batch, and the teacher's without their prefix."""
    own = {name: values for name, values in columns.items() if not name.startswith(TEACHER)}
    theirs = {name.removeprefix(TEACHER): values for name, values in columns.items() if name.startswith(TEACHER)}
    return own, theirs


def are_numbers(names: Sequence[str]) -> bool:
    """Whether class names say nothing but their place."""
    return all(name.removeprefix("LABEL_").isdigit() for name in names)


def _number(name: str) -> int:
    return int(name.removeprefix("LABEL_"))


def _is_missing(value: object) -> bool:
    return value is None or value != value  # NaN
