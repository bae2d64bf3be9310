"""A run is a folder: its recipe, the student as it began, checkpoints, the finished model, results.

```
recipe.yaml     as run, overrides included; `llmdistill run FOLDER/recipe.yaml` makes it again
student/        where the recipe cuts the student from the teacher: the student before training
checkpoint-N/   whole checkpoints, from which a stopped run goes on
model/          the finished student, in the layout of the library that loads it
training.json   steps, seconds, memory and the log of the training
results.json    the evaluation
answers.jsonl   what the compared models wrote
```
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmdistill import checkpoints, recipe
from llmdistill.errors import UserError

RESULTS = "results.json"


class Run:
    """The folder of a run.

    Args:
        folder: `training.output_dir` of the recipe.
        tree: the recipe as plain dictionaries, overrides applied.
    """

    def __init__(self, folder: str | Path, tree: dict[str, Any]):
        self.folder, self.tree = Path(folder), tree
        self.student, self.model = self.folder / "student", self.folder / "model"
        self._recipe = self.folder / "recipe.yaml"

    def check_recipe(self) -> None:
        """Refuse a folder that holds the work of another recipe; the evaluation may differ.

        Raises:
            UserError: names the differing keys.
        """
        differences = self._differences()
        if differences and (self.model.is_dir() or checkpoints.last_whole(self.folder) is not None):
            raise UserError(
                f"{self.folder} holds a run of another recipe. It differs in:\n"
                + "\n".join(f"  {key}: {there!r} there, {here!r} now" for key, (there, here) in differences.items())
                + "\nChoose another `training.output_dir`, or remove that folder."
            )

    @contextmanager
    def at_work(self):
        """Inside, the folder is this process's alone, and the recipe is in it.

        Raises:
            UserError: another process is at work in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"Another process is at work in {self.folder}: wait for it, or stop it.") from None
            if self._differences():  # from a run that came to nothing yet
                shutil.rmtree(self.student, ignore_errors=True)
            (self.folder / RESULTS).unlink(missing_ok=True)  # of an earlier model
            write_whole(self._recipe, recipe.dump(self.tree))
            yield

    def _differences(self) -> dict[str, tuple[Any, Any]]:
        """Keys in which the recipe in the folder differs from this one."""
        if not self._recipe.is_file():
            return {}
        return _differences(_without_evaluation(recipe.read(self._recipe)), _without_evaluation(self.tree))

    def build(self, folder: Path, make: Callable[[Path], None]) -> None:
        """Make the sub-folder `folder` of the run with `make`, all of it or nothing."""
        unfinished = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)

    def last_checkpoint(self) -> Path | None:
        """The last whole checkpoint; half-written ones are removed."""
        for broken in checkpoints.remove_broken(self.folder):
            print(f"Removed {broken}: it was not written to its end.")
        return checkpoints.last_whole(self.folder)

    def results(self) -> dict[str, Any] | None:
        """The results, where the evaluation of just this recipe is finished."""
        try:
            results = json.loads((self.folder / RESULTS).read_text())
        except (OSError, ValueError):
            return None
        return results if results.get("evaluation") == self.tree.get("evaluation") else None

    def write_results(self, results: dict[str, Any]) -> dict[str, Any]:
        """Keep the results beside the evaluation section that they answer, and return both."""
        results = {"evaluation": self.tree.get("evaluation"), **results}
        write_whole(self.folder / RESULTS, json.dumps(results, indent=2) + "\n")
        return results


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there in full or as it was before."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _without_evaluation(tree: dict[str, Any]) -> dict[str, Any]:
    """What decides the trained model; another evaluation of the same model is welcome."""
    return {key: value for key, value in tree.items() if key != "evaluation"}


def _differences(first: Any, second: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(first, dict) and isinstance(second, dict):
        found = {}
        for name in {**first, **second}:
            found |= _differences(first.get(name), second.get(name), f"{key}.{name}" if key else str(name))
        return found
    return {} if first == second else {key: (first, second)}
