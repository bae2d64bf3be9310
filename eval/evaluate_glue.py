"""Score classifiers on GLUE's tasks or on any labelled texts: any models, made by llmdistill or not.

    python eval/evaluate_glue.py --model runs/lelp-clinc_domains/model --data samples/clinc_domains --split test
    python eval/evaluate_glue.py --model new=run-0/model --model new=run-1/model --model old=old-0/model \
        --model old=old-1/model --data nyu-mll/glue --name rte --task rte

Models of one name are seeds of one another: their mean and standard deviation are printed, and the differences of the
other names to the first, seed by seed.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from llmdistill.errors import UserError, nearest


def main(
    model: Annotated[list[str], typer.Option(help="Folder or Hub name, also NAME=FOLDER; several times for several.")],
    data: Annotated[str, typer.Option(help="File, folder, samples/<name> or Hub data set.")],
    split: str = "validation",
    name: Annotated[str | None, typer.Option(help="Configuration of a data set on the Hub.")] = None,
    rows: Annotated[int | None, typer.Option(help="Only the first so many.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="OURS=THEIRS, e.g. sentence=review.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Task of GLUE; by default the name of the data, if it is one.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    batch_size: int = 32,
    submission: Annotated[Path | None, typer.Option(help="Write GLUE's file of predictions to this folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
) -> None:
    """Score models side by side and print a table."""
    try:
        source = dict(path=data, split=split, name=name, rows=rows, columns=dict(_named(one) for one in column or []))
        models = [_named(one) for one in model]
        _check(models, task, submission, output, batch_size)
        results = evaluate(models, source, task or _task(data, name), max_length, batch_size, submission)
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")


def evaluate(
    models: list[tuple[str, str]], source: dict, task: str | None, max_length: int, batch_size: int, submission
) -> dict[str, list[dict[str, float]]]:
    """Load, score and print; the metrics of every seed of every name."""
    from llmdistill import classifiers
    from llmdistill.data import glue as data
    from llmdistill.data.rows import Source
    from llmdistill.evaluation import glue
    from llmdistill.models import default_device, load_config, load_tokenizer

    rows = data.load(Source(**source), texts=glue.TASKS[task].texts if task else None)
    for _, path in models:
        load_config(path)
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, path in models:
        loaded, tokenizer = classifiers.load(path).to(default_device()).eval(), load_tokenizer(path)
        if submission is not None:
            tokens = data.tokenize(data.unlabelled(rows), tokenizer, max_length)
            logits, _ = glue.predict(loaded, tokenizer, tokens, batch_size)
            logits = glue.in_order_of(task, logits, classifiers.class_names(loaded.config))
            print(glue.write_submission(submission, task, logits))
        else:
            results[name].append(glue.evaluate(loaded, tokenizer, rows, task, max_length, batch_size)[0])
    if results:
        print(glue.table({name: _mean(seeds) for name, seeds in results.items()}))
        _print_spread(results)
    return results


def _check(
    models: list[tuple[str, str]], task: str | None, submission: Path | None, output: Path | None, batch_size: int
) -> None:
    from llmdistill.evaluation.glue import TASKS

    if batch_size < 1:
        raise UserError(f"`--batch-size` must be at least 1, got {batch_size}.")
    if task is not None and task not in TASKS:
        raise UserError(f"`--task` is `{task}`.{nearest(task, TASKS)}")
    if submission is not None and (task is None or len(models) != 1):
        raise UserError("`--submission` needs one model and `--task`.")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent} for the results.")


def _task(data: str, name: str | None) -> str | None:
    from llmdistill.evaluation.glue import TASKS

    return next((one for one in (name, Path(data).name) if one in TASKS), None)


def _named(text: str) -> tuple[str, str]:
    """`name=value`, or a value that names itself."""
    name, equals, value = text.partition("=")
    return (name, value) if equals else (text, text)


def _mean(seeds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.mean(seed[key] for seed in seeds) for key in seeds[0]}


def _print_spread(results: dict[str, list[dict[str, float]]]) -> None:
    first, *others = results
    for name, seeds in results.items():
        if len(seeds) > 1:
            metric = next(iter(seeds[0]))
            values = [100 * seed[metric] for seed in seeds]
            print(
                f"{name}: {metric} {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}, {len(seeds)} seeds"
            )
    for name in others:
        if len(results[name]) == len(results[first]) > 1:
            metric = next(iter(results[name][0]))
            pairs = zip(results[name], results[first], strict=True)
            differences = [100 * (one[metric] - other[metric]) for one, other in pairs]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            print(f"{name} - {first}: {statistics.mean(differences):+.2f} ± {error:.2f} (standard error, paired)")


if __name__ == "__main__":
    typer.run(main)
