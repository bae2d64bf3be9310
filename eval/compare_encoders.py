"""LELP against its controls: same teacher, same student, same rows, several seeds.

    python eval/compare_encoders.py             # all tasks and sizes, then the table
    python eval/compare_encoders.py --task clinc_domains --rows 300

Every seed draws its own rows. Runs that are finished are not repeated: the command can be stopped and started again.
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Annotated

import typer

TEACHER_RECIPE = "recipes/finetune/minilm_clinc_domains.yaml"
RECIPE = "recipes/lelp/minilm_to_bert-tiny_clinc_domains.yaml"
CONTROLS = ("vanilla", "lelp", "uniform_split", "random_split", "oracle_subclasses")
SPLITS = {"clinc_domains": "test", "sst2_sentences": "test", "uci_sentiment": "validation"}
"""Task -> the rows that are judged; no setting was chosen on them."""
SHIPPED = ("clinc_domains", "uci_sentiment")
SIZES = (300, 1000, 0)
METRICS = {"accuracy": (100, 2), "cross_entropy": (1, 3)}
"""Metric -> factor and digits in the table."""

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder with classification/sst2_sentences.")] = Path("../shared/data"),
    task: Annotated[list[str] | None, typer.Option(help="Only these tasks.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Only these numbers of training rows; 0 for all.")] = None,
    seeds: int = 3,
    folder: Path = Path("runs/compare-encoders"),
) -> None:
    """Train what is missing and print the table."""
    import datasets

    datasets.disable_progress_bars()
    tasks, sizes = task or list(SPLITS), rows or SIZES
    teachers = {name: _teacher(name, _path(name, data), folder) for name in tasks}
    for seed in range(seeds):
        for name in tasks:
            for size in sizes:
                for control in _controls(name):
                    _student(name, _path(name, data), size, control, seed, folder)
    for name in tasks:
        print(f"\n{name}: teacher {100 * teachers[name]['accuracy']:.2f} % accuracy\n")
        _print_table(name, sizes, seeds, folder)


def _path(task: str, data: Path) -> str:
    return f"samples/{task}" if task in SHIPPED else str(data / "classification" / task)


def _controls(task: str) -> tuple[str, ...]:
    """True subclasses are known for one task only."""
    return CONTROLS if task == "clinc_domains" else CONTROLS[:-1]


def _teacher(task: str, path: str, folder: Path) -> dict[str, float]:
    overrides = [f"data.0.path={path}", f"evaluation.data.path={path}", f"evaluation.data.split={SPLITS[task]}"]
    run = folder / f"teacher-{task}"
    if not (run / "model").is_dir():
        for student in folder.glob(f"{task}-*"):  # of an earlier teacher
            shutil.rmtree(student)
    return _run(TEACHER_RECIPE, run, overrides)["student"]


def _student(task: str, path: str, rows: int, control: str, seed: int, folder: Path) -> None:
    overrides = [
        f"teacher.model={folder}/teacher-{task}/model",
        f"data.0.path={path}",
        f"data.0.rows={rows or 'null'}",
        f"data.0.shuffle_seed={seed}",
        f"evaluation.data.path={path}",
        f"evaluation.data.split={SPLITS[task]}",
        f"training.targets={control}",
        f"training.seed={seed}",
        f"training.answers_folder={folder}/answers",
    ]
    if control == "oracle_subclasses":
        overrides.append("training.subclass_column=intent")
    _run(RECIPE, _folder(folder, task, rows, control, seed), overrides)


def _folder(folder: Path, task: str, rows: int, control: str, seed: int) -> Path:
    return folder / f"{task}-{rows or 'all'}-{control}-{seed}"


def _run(recipe: str, run: Path, overrides: list[str]) -> dict:
    """The results of a run, which is made unless it is finished; a folder of another recipe is refused."""
    from llmdistill import jobs

    print(f"== {run}", flush=True)
    job, loaded, tree = jobs.load(recipe, [*overrides, f"training.output_dir={run}"])
    job.run(loaded, tree)
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return json.loads((run / "results.json").read_text())["models"]


def _print_table(task: str, sizes: list[int], seeds: int, folder: Path) -> None:
    print("| targets | " + " | ".join(f"{size or 'all'} rows" for size in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for metric, (factor, digits) in METRICS.items():
        for control in _controls(task):
            cells = []
            for size in sizes:
                ours, plain = (
                    [factor * _figure(folder, task, size, one, seed, metric) for seed in range(seeds)]
                    for one in (control, "vanilla")
                )
                cells.append(_cell(ours, plain, digits))
            print(f"| {control}, {metric.replace('_', ' ')} | " + " | ".join(cells) + " |")


def _figure(folder: Path, task: str, rows: int, control: str, seed: int, metric: str) -> float:
    results = json.loads((_folder(folder, task, rows, control, seed) / "results.json").read_text())
    return results["models"]["student"][metric]


def _cell(values: list[float], plain: list[float], digits: int) -> str:
    """Mean and standard deviation, and the mean difference to plain distillation with its standard error."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1 or values == plain:
        return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"
    differences = [one - other for one, other in zip(values, plain, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    spread = f"{statistics.stdev(values):.{digits}f}"
    return f"{text} ± {spread} ({statistics.mean(differences):+.{digits}f} ± {error:.{digits}f})"


if __name__ == "__main__":
    app()
