"""Whole checkpoints: each is closed with a list of its files, so that a half-written one is known as such."""

import json
import re
import shutil
from pathlib import Path

CLOSING_FILE = "whole.json"
"""Written last: file name -> bytes of everything else in the folder."""


def close(folder: str | Path) -> None:
    """Declare the checkpoint in `folder` whole."""
    folder = Path(folder)
    (folder / CLOSING_FILE).unlink(missing_ok=True)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    unfinished = folder / f"{CLOSING_FILE}.part"
    unfinished.write_text(json.dumps(sizes, indent=1, sort_keys=True))
    unfinished.rename(folder / CLOSING_FILE)


def is_whole(folder: str | Path) -> bool:
    """Whether `folder` was closed and still holds every file in full."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / CLOSING_FILE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def last_whole(run: str | Path) -> Path | None:
    """The checkpoint of `run` with the most steps that is whole, None where there is none."""
    return next((folder for folder in reversed(_checkpoints(run)) if is_whole(folder)), None)


def remove_broken(run: str | Path) -> list[Path]:
    """Delete checkpoints that are not whole, and return what was deleted."""
    broken = [folder for folder in _checkpoints(run) if not is_whole(folder)]
    for folder in broken:
        shutil.rmtree(folder)
    return broken


def _checkpoints(run: str | Path) -> list[Path]:
    folders = [folder for folder in Path(run).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
