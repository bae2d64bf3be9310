"""Classifiers on GLUE's tasks and on any other labelled texts, with the official metrics."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmdistill.data import glue as data
from llmdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION_BINS = 15


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(-1) == labels).mean())


def _f1(logits: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, logits.argmax(-1), zero_division=0.0))


def _macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, logits.argmax(-1), average="macro", zero_division=0.0))


def _matthews_correlation(logits: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, logits.argmax(-1)))


def _pearson(logits: np.ndarray, labels: np.ndarray) -> float:
    return _correlation("pearsonr", logits, labels)


def _spearman(logits: np.ndarray, labels: np.ndarray) -> float:
    return _correlation("spearmanr", logits, labels)


def _correlation(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """0 where the predictions are all alike, for which the correlation is not defined."""
    from scipy import stats

    return float(getattr(stats, name)(logits[:, 0], labels)[0]) if np.ptp(logits[:, 0]) > 0 else 0.0


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)))


def _expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over bins of equal width of confidence, weighted by their rows.

    Source: Guo et al. 2017 (arXiv:1706.04599), equation 3, with 15 bins as there.
    """
    confidence, predicted = torch.tensor(logits).softmax(-1).max(-1)
    right = (predicted.numpy() == labels).astype(float)
    bins = np.minimum((confidence.numpy() * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs((right - confidence.numpy())[bins == number].sum()) for number in range(CALIBRATION_BINS)]
    return float(sum(gaps) / len(labels))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews_correlation,
    "pearson": _pearson,
    "spearman": _spearman,
    "cross_entropy": _cross_entropy,
    "expected_calibration_error": _expected_calibration_error,
}
"""Name -> function of logits `[R, C]` and labels `[R]`; all in [0, 1] or [-1, 1] but the cross-entropy, in nats."""
CLASSES = ("accuracy", "macro_f1", "cross_entropy", "expected_calibration_error")
NUMBERS = ("pearson", "spearman")


@dataclass(frozen=True)
class Task:
    """A task of GLUE."""

    texts: int
    """In a row."""
    metrics: tuple[str, ...]
    """The official ones, the first of them the main one."""
    file: str
    """Of a submission."""
    names: tuple[str, ...] | None
    """Of the classes in GLUE's order; None where a number is predicted."""
    writes_names: bool = False
    """A submission holds names of classes, not their numbers."""


ENTAILMENT = ("entailment", "not_entailment")
MNLI = ("entailment", "neutral", "contradiction")
TASKS = {
    "cola": Task(1, ("matthews_correlation",), "CoLA.tsv", ("unacceptable", "acceptable")),
    "sst2": Task(1, ("accuracy",), "SST-2.tsv", ("negative", "positive")),
    "mrpc": Task(2, ("f1", "accuracy"), "MRPC.tsv", ("not_equivalent", "equivalent")),
    "stsb": Task(2, ("pearson", "spearman"), "STS-B.tsv", None),
    "qqp": Task(2, ("f1", "accuracy"), "QQP.tsv", ("not_duplicate", "duplicate")),
    "mnli_matched": Task(2, ("accuracy",), "MNLI-m.tsv", MNLI, writes_names=True),
    "mnli_mismatched": Task(2, ("accuracy",), "MNLI-mm.tsv", MNLI, writes_names=True),
    "qnli": Task(2, ("accuracy",), "QNLI.tsv", ENTAILMENT, writes_names=True),
    "rte": Task(2, ("accuracy",), "RTE.tsv", ENTAILMENT, writes_names=True),
    "wnli": Task(2, ("accuracy",), "WNLI.tsv", ("not_entailment", "entailment")),
}


def in_order_of(task: str, logits: np.ndarray, names: Sequence[str] | None) -> np.ndarray:
    """A model's logits `[R, C]` with classes in GLUE's order.

    Raises:
        UserError: the model knows other classes than the task's.
    """
    expected = TASKS[task].names
    if (expected is None) != (names is None):
        raise UserError(f"`{task}` is about {'classes' if expected else 'a number'}, the model is not.")
    if expected is None:
        return logits
    if len(names) != len(expected):
        raise UserError(f"`{task}` has {len(expected)} classes, the model {len(names)}.")
    return logits[:, data.class_order(expected, names, f"`{task}`")]


def metrics_of(task: str | None, regression: bool) -> tuple[str, ...]:
    """The metrics to report: the task's own first, then those of every classification or regression."""
    general = NUMBERS if regression else CLASSES
    return tuple(dict.fromkeys((TASKS[task].metrics if task else ()) + general))


def score(logits: np.ndarray, labels: np.ndarray, metrics: Sequence[str]) -> dict[str, float]:
    """Metrics by name.

    Args:
        logits: `[R, C]`, `[R, 1]` where a number is predicted.
        labels: `[R]` class ids or numbers.
        metrics: of `METRICS`.

    Raises:
        UserError: there are no rows with a label.
    """
    labelled = labels != -1 if logits.shape[-1] > 1 else np.full(len(labels), True)
    if not labelled.any():
        raise UserError("No row has a label to score by.")
    return {name: METRICS[name](logits[labelled], labels[labelled]) for name in metrics}


@torch.no_grad()
def predict(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: "Dataset", batch_size: int = 32
) -> tuple[np.ndarray, float]:
    """Logits of all rows, and rows per second.

    Args:
        model: a classifier in evaluation mode, on its device.
        tokenizer: that pads.
        tokens: R rows of `input_ids` and whatever else the model takes; rows of similar length go together.
        batch_size: rows at once.

    Returns:
        `[R, C]` in float32, in the order of the rows; and the speed, tokenising and loading not counted.
    """
    from transformers import DataCollatorWithPadding

    pad = DataCollatorWithPadding(tokenizer)
    tokens = tokens.select_columns([name for name in tokens.column_names if name in tokenizer.model_input_names])
    order = np.argsort([len(ids) for ids in tokens["input_ids"]], kind="stable")
    logits, seconds = [], 0.0
    for start in range(0, len(order), batch_size):
        batch = pad([tokens[int(row)] for row in order[start : start + batch_size]]).to(model.device)
        if start == 0:
            model(**batch)  # the first call is slower and not timed
        begun = time.perf_counter()
        logits.append(model(**batch).logits.float().cpu())  # waits for the device
        seconds += time.perf_counter() - begun
    return torch.cat(logits).numpy()[np.argsort(order)], len(order) / seconds


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Dataset",
    task: str | None = None,
    max_length: int = 128,
    batch_size: int = 32,
) -> tuple[dict[str, float], np.ndarray]:
    """Metrics, speed and size of a model, and its logits `[R, C]`.

    Args:
        model: as `llmdistill.classifiers.load` gives it.
        tokenizer: the model's.
        rows: texts and labels, as `llmdistill.data.glue.load` gives them; names of classes may be in any order.
        task: of `TASKS`, whose metrics come first.
        max_length: tokens of a row.
        batch_size: rows at once.

    Raises:
        UserError: the rows' labels, or the task's classes, are not the model's, or no row has a label.
    """
    from llmdistill.classifiers import class_names

    names = class_names(model.config)
    tokens = data.tokenize(data.unlabelled(rows), tokenizer, max_length)
    logits, speed = predict(model, tokenizer, tokens, batch_size)
    scored = logits
    if task is not None:
        scored, names = in_order_of(task, logits, names), TASKS[task].names
    rows = data.with_class_ids(rows, names, "The data set")
    if data.LABEL not in rows.column_names:
        raise UserError("No row has a label to score by.")
    results = score(scored, np.array(rows[data.LABEL][:]), metrics_of(task, names is None))
    return results | {"examples_per_second": speed, "parameters": model.num_parameters()}, logits


def write_submission(folder: Path, task: str, logits: np.ndarray) -> Path:
    """A file of predictions in the form that GLUE's server takes, for its test rows in their order.

    Args:
        folder: to write it to.
        task: of `TASKS`.
        logits: `[R, C]` of the test rows, classes in GLUE's order (see `in_order_of`).
    """
    file, names = folder / TASKS[task].file, TASKS[task].names if TASKS[task].writes_names else None
    if logits.shape[-1] == 1:
        predictions = [f"{value:.3f}" for value in logits[:, 0].clip(0, 5)]
    else:
        predictions = [names[index] if names else str(index) for index in logits.argmax(-1)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["index\tprediction", *(f"{index}\t{prediction}" for index, prediction in enumerate(predictions))]
    file.write_text("\n".join(lines) + "\n")
    return file


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as text, one line per model and one column per metric."""
    keys = list(dict.fromkeys(key for metrics in results.values() for key in metrics))
    width = max(len(name) for name in results)
    lines = [" " * width + "".join(f"  {key.replace('_', ' '):>{max(10, len(key))}}" for key in keys)]
    for name, metrics in results.items():
        cells = (f"  {_cell(key, metrics.get(key)):>{max(10, len(key))}}" for key in keys)
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "parameters":
        return f"{value / 1e6:,.1f}M"
    if key == "examples_per_second":
        return f"{value:,.0f}"
    return f"{value:.3f}" if key in ("cross_entropy", "expected_calibration_error") else f"{100 * value:.2f}"
