"""Multiple-choice sets through lm-evaluation-harness, from files on this machine (extra `eval`)."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from llmdistill.data.rows import SUFFIXES, builder, read_files
from llmdistill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIELDS = {"query", "choices", "gold"}


def check_file(path: str | Path) -> None:
    """Refuse what the harness would fail on later.

    Raises:
        UserError: the harness is not installed, no such file, or a row without `query`, `choices` and `gold`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('multiple-choice sets need lm-evaluation-harness: `pip install "llmdistill[eval]"`.')
    if not Path(path).is_file():
        raise UserError(f"there is no file `{path}`.")
    if builder(Path(path)) is None:
        raise UserError(f"cannot tell what kind of file `{path}` is: it must end in {', '.join(SUFFIXES)}.")
    rows = read_files([Path(path)])
    if missing := FIELDS - set(rows.column_names):
        raise UserError(f"{path} has no field {', '.join(sorted(missing))}: expected rows of query, choices and gold.")


def score_choices(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    files: dict[str, str | Path],
    rows: int | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Accuracy on files of `{query, choices, gold}` rows, by the likelihood of each choice after the query.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        files: name of the set -> .jsonl or .jsonl.gz file; `gold` is the index of the right choice.
        rows: only the first so many of each file.
        batch_size: choices scored at once.

    Returns:
        `accuracy_<name>` (likelihood of the whole choice), `accuracy_norm_<name>` (per byte of the choice) and the
        standard error of both, all in [0, 1].

    Source: lm-evaluation-harness, output type `multiple_choice`. The prompt is the query and a line `Answer:`, as the
    harness asks ARC and PIQA; no examples, no chat template.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    tasks = [ConfigurableTask(config=_task(name, path)) for name, path in files.items()]
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    answers = simple_evaluate(wrapped, tasks=tasks, limit=rows, bootstrap_iters=1, log_samples=False)["results"]
    results = {}
    for name in files:
        for key, metric in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
            results[f"{key}_{name}"] = answers[name][f"{metric},none"]
            results[f"{key}_error_{name}"] = answers[name][f"{metric}_stderr,none"]
    return results


def _task(name: str, path: str | Path) -> dict:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query.strip()}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }
