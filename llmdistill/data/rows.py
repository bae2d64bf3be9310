"""Rows from files, folders and the Hub, before anything is known of what they mean."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmdistill import samples
from llmdistill.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(kw_only=True)
class Source:
    """Where rows come from, as a recipe names it."""

    path: str
    """`samples/<name>`, a file (.jsonl, .json, .parquet, .csv; also .gz), a folder with one file per split, or a
    data set on the Hub."""
    split: str = "train"
    """File name in a folder, or split of a data set on the Hub."""
    name: str | None = None
    """Configuration of a data set on the Hub that has several."""
    rows: int | None = None
    """Take only the first so many rows."""
    shuffle_seed: int | None = None
    """Put the rows in random order first, so that `rows` is a random sample."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column -> the data set's, e.g. `{completion: response}`."""

    def __post_init__(self):
        if self.rows is not None and self.rows < 1:
            raise UserError(f"`rows` must be at least 1, got {self.rows}.")


def load(source: Source, known: Iterable[str]) -> tuple["Dataset", str]:
    """The rows of `source` under our names of columns, and what to call them in messages.

    Args:
        source: of the recipe.
        known: our names, which `source.columns` may map to the data set's.

    Raises:
        UserError: no such data, unreadable or empty, or `columns` names a column that is not there.
    """
    for ours in source.columns:
        if ours not in known:
            raise UserError(f"`columns` maps our names to the data set's; `{ours}` is none.{nearest(ours, known)}")
    files = find(source)
    rows = _load_from_hub(source) if files is None else read_files(files)
    where = f"{source.path} ({source.split})" if files is None else str(files[0])
    for theirs in source.columns.values():
        if theirs not in rows.column_names:
            raise UserError(f"{where} has no column `{theirs}`.{nearest(theirs, rows.column_names)}")
    rows = rows.rename_columns({theirs: ours for ours, theirs in source.columns.items()})
    if source.shuffle_seed is not None:
        rows = rows.shuffle(seed=source.shuffle_seed)
    return rows.select(range(min(source.rows or len(rows), len(rows)))), where


def find(source: Source) -> list[Path] | None:
    """The files that `source` names, or None where it names a data set on the Hub.

    A split of a folder is one file of that name, or several of the Hub's form `<split>-00000-of-00002.parquet`.

    Raises:
        UserError: the path is neither, or the folder has no such split.
    """
    path = Path(source.path).expanduser()
    if source.path.startswith(samples.PREFIX):
        path = samples.data_folder(source.path.removeprefix(samples.PREFIX))
    if path.is_file():
        if builder(path) is None:
            raise UserError(f"cannot tell what kind of file `{source.path}` is: it must end in {', '.join(SUFFIXES)}.")
        return [path]
    if path.is_dir():
        splits: dict[str, list[Path]] = {}
        for file in sorted(path.iterdir()):
            if builder(file):
                splits.setdefault(re.sub(r"-\d+-of-\d+$", "", file.name.partition(".")[0]), []).append(file)
        if source.split not in splits:
            raise UserError(f"`{source.path}` has no split `{source.split}`.{nearest(source.split, splits)}")
        return splits[source.split]
    if source.path.startswith((".", "/", "~")) or source.path.count("/") > 1 or builder(path):
        raise UserError(f"there is no file or folder `{source.path}`.")
    return None


def read_files(files: list[Path]) -> "Dataset":
    """All rows of files of one kind, one after another.

    Raises:
        UserError: a file is empty or broken; names the first broken line.
    """
    import datasets

    try:
        return datasets.load_dataset(builder(files[0]), data_files=[str(file) for file in files], split="train")
    except StopIteration:
        raise UserError(f"{files[0]} is empty: it has no rows.") from None
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = next(filter(None, map(_bad_line, files)), None) or error.__cause__ or error
        raise UserError(f"cannot read {', '.join(map(str, files))}: {reason}") from None


def together(sources: list["Dataset"]) -> "Dataset":
    """Data sets of one kind of rows, one after another.

    Raises:
        UserError: they have other columns, or other types in them.
    """
    import datasets

    try:
        if any(set(source.column_names) != set(sources[0].column_names) for source in sources):
            raise ValueError
        return datasets.concatenate_datasets(sources)
    except ValueError:
        kinds = [str(source.features) for source in sources]
        raise UserError(f"the sources have different kinds of rows: {kinds}. Use one kind.") from None


def cache_name(code: str, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", *settings) -> str:
    """A name for what tokenising `rows` gives, under which the datasets library keeps it.

    The library's own looks neither into the functions that are called nor, reliably, into tokenizers.

    Args:
        code: the file that does it.
        rows: what is tokenised.
        tokenizer: a fast one.
        settings: whatever else decides the outcome.
    """
    vocabulary = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map
    parts = (Path(code).read_text(encoding="utf-8"), rows._fingerprint, vocabulary, settings)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _load_from_hub(source: Source) -> "Dataset":
    import datasets

    try:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"`{source.path}` is no file here, and the Hugging Face Hub gives no such data set: {reason}"
        ) from None


def builder(file: Path) -> str | None:
    """The reader of the datasets library for a file, None for files that hold no rows."""
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def _bad_line(file: Path) -> str | None:
    """The first line of a JSON-lines file that is no JSON object."""
    if builder(file) != "json":
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
