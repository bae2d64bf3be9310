"""Answers on disk: whole pieces, found by what they answer."""

import pytest
import torch

from llmdistill import store
from llmdistill.store import AnswerStore, fingerprint


@pytest.fixture
def answers(tmp_path, monkeypatch) -> AnswerStore:
    monkeypatch.setattr(store, "PIECE_ROWS", 4)
    return AnswerStore(tmp_path, "abc", 10)


def test_pieces_cover_all_rows_once(answers):
    assert answers.pieces() == [range(0, 4), range(4, 8), range(8, 10)]
    assert answers.missing() == [0, 1, 2]


def test_what_is_written_is_read_again_and_not_missing(answers):
    values = torch.randn(4, 3)
    answers.write(1, {"logits": values})
    torch.testing.assert_close(answers.read(1)["logits"], values, rtol=0, atol=0)
    assert answers.missing() == [0, 2]
    assert AnswerStore(answers.folder.parent, "abc", 10).missing() == [0, 2]  # of another process
    assert AnswerStore(answers.folder.parent, "abd", 10).missing() == [0, 1, 2]


@pytest.mark.parametrize("length", [0, 5, -1])
def test_a_broken_piece_is_missing(answers, length):
    answers.write(0, {"logits": torch.zeros(4, 3)})
    (file,) = answers.folder.iterdir()
    file.write_bytes(file.read_bytes()[:length])
    assert 0 in answers.missing()


def test_the_fingerprint_knows_weights_and_rows():
    def model(value: float) -> torch.nn.Module:
        layer = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(layer.weight, value)
        torch.nn.init.zeros_(layer.bias)
        return layer

    rows = [[1, 2], [3]]
    names = [
        fingerprint(model(1.0), rows),
        fingerprint(model(1.0 + 1e-7), rows),
        fingerprint(model(1.0), [[1], [2, 3]]),
        fingerprint(model(1.0).bfloat16(), rows),
    ]
    assert len(set(names)) == 4
    assert fingerprint(model(1.0), iter(rows)) == names[0]
