"""Jobs: a recipe becomes stages. `JOBS` is the table of contents; each module reads from top to bottom."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from llmdistill import recipe
from llmdistill.errors import nearest

JOBS = {"taid": "language", "lelp": "encoder", "mi_alpha": "encoder", "finetune": "encoder"}
"""Method of a recipe -> module of this package, which holds `RECIPES`, `run`, `train` and `evaluate`."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> tuple[ModuleType, object, dict]:
    """The job of the recipe at `path`, the recipe itself, checked, and the same as plain dictionaries.

    Raises:
        RecipeError: the recipe cannot be run; nothing has been loaded yet.
    """
    tree = recipe.read(path, overrides)
    method = tree.get("method")
    if not isinstance(method, str) or method not in JOBS:
        got = f"got `{method}`." if method else "it is missing."
        raise recipe.RecipeError(f"{path} cannot be run:\n  method: expected a method, {got}{nearest(method, JOBS)}")
    job = importlib.import_module(f"llmdistill.jobs.{JOBS[method]}")
    return job, recipe.build(job.RECIPES[method], tree, path), tree
