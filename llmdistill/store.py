"""A teacher's answers on disk: written once, in whole pieces, found again by what they answer.

The folder of the answers is named after a fingerprint of the teacher's weights and of the inputs themselves, so that
no setting can be forgotten: other weights, other rows or another tokenisation are other answers.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE_ROWS = 2048
"""Rows of one file: what a killed pass loses at most."""


class AnswerStore:
    """The answers to `num_rows` rows, in files of `PIECE_ROWS` rows.

    Args:
        root: folder of all stores.
        fingerprint: of teacher and rows, see `fingerprint`.
        num_rows: R.
    """

    def __init__(self, root: Path, fingerprint: str, num_rows: int):
        self.folder, self.num_rows = root / fingerprint, num_rows

    def pieces(self) -> list[range]:
        """The rows of each piece."""
        starts = range(0, self.num_rows, PIECE_ROWS)
        return [range(start, min(start + PIECE_ROWS, self.num_rows)) for start in starts]

    def missing(self) -> list[int]:
        """Numbers of the pieces that are not there, or not whole."""
        return [number for number in range(len(self.pieces())) if not _is_whole(self._file(number))]

    def write(self, number: int, answers: dict[str, "Tensor"]) -> None:
        """Keep the answers to a piece, `[rows of the piece, ...]` each."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._file(number).with_suffix(f".{os.getpid()}.part")
        save_file({name: values.cpu().contiguous() for name, values in answers.items()}, unfinished)
        os.replace(unfinished, self._file(number))

    def read(self, number: int) -> dict[str, "Tensor"]:
        """The answers to a piece."""
        return load_file(self._file(number))

    def _file(self, number: int) -> Path:
        return self.folder / f"answers-{number:05}.safetensors"


def fingerprint(model: "torch.nn.Module", inputs: Iterable) -> str:
    """A name for what `model` answers to `inputs`, from every byte of its weights and of the inputs.

    Args:
        model: the teacher.
        inputs: one value per row, e.g. lists of token ids.
    """
    import torch

    digest = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for row in inputs:
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def _is_whole(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt"):  # compares the header with the length of the file
            return True
    except SafetensorError:
        return False
