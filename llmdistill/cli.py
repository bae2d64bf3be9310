"""The verbs of the command line; what they do lives in the jobs."""

import errno
import os
import re
from contextlib import contextmanager
from typing import Annotated

import typer

from llmdistill.errors import UserError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make small models from large ones. A recipe (YAML) says what; any value of it can be overridden, "
    "e.g. `llmdistill run recipes/quickstart.yaml training.max_steps=10`.",
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The YAML file of the recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. training.learning_rate=1e-5.")
]


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train and evaluate, from the first unfinished stage on."""
    _do("run", recipe, overrides)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train only. Several processes: torchrun --nproc-per-node 8 -m llmdistill train RECIPE."""
    _do("train", recipe, overrides)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Evaluate the trained model of a recipe, beside its teacher and its beginning."""
    _do("evaluate", recipe, overrides)


@app.command()
def samples(names: Annotated[list[str] | None, typer.Argument(help="By default all of them.")] = None) -> None:
    """Fetch the small sample models that recipes name `samples/...`."""
    with _messages():
        from llmdistill.samples import MODELS, PREFIX, fetch

        for name in names or MODELS:
            fetch(name.removeprefix(PREFIX))


def main() -> None:
    """Run the command line."""
    app()


def _do(verb: str, recipe: str, overrides: list[str] | None) -> None:
    with _messages():
        from llmdistill import jobs

        job, loaded, tree = jobs.load(recipe, overrides or [])
        getattr(job, verb)(loaded, tree)


@contextmanager
def _messages():
    """What a user can mend is one message and exit code 1, Ctrl-C exit code 130; anything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        _leave(f"Error: {error}", 1)
    except KeyboardInterrupt:
        _leave("\nInterrupted. Run the same command again to go on from the last whole checkpoint.", 130)
    except Exception as error:
        if not _is_full_disk(error):
            raise
        _leave(
            f"Error: the disk is full, or a file may not grow so large ({error}). Checkpoints that were finished are "
            "whole: make room and run the same command again.",
            1,
        )


def _is_full_disk(error: Exception) -> bool:
    """Python's, safetensors' and torch.save's way of saying that nothing more could be written."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    if type(error).__name__ == "SafetensorError":
        code = re.search(r"os error (\d+)", str(error))
        return code is not None and int(code[1]) in FULL_DISK
    return (
        isinstance(error, RuntimeError) and re.search(r"inline_container|PytorchStreamWriter", str(error)) is not None
    )


def _leave(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    typer.echo(message if rank == "0" else f"[rank {rank}] {message}", err=True)
    raise typer.Exit(code)
