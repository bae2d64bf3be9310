"""Whole and half-written checkpoints."""

from llmdistill import checkpoints


def make(run, step: int, closed: bool = True):
    folder = run / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / "shards" / "rank0.pt").write_bytes(b"123")
    if closed:
        checkpoints.close(folder)
    return folder


def test_the_last_whole_one_is_found_by_number(tmp_path):
    for step in (9, 10, 100):
        make(tmp_path, step)
    make(tmp_path, 200, closed=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.last_whole(tmp_path).name == "checkpoint-100"
    assert checkpoints.last_whole(tmp_path / "nowhere") is None


def test_a_missing_or_shortened_file_breaks_it(tmp_path):
    assert checkpoints.is_whole(make(tmp_path, 1))
    (make(tmp_path, 2) / "model.safetensors").write_bytes(b"1234")
    (make(tmp_path, 3) / "shards" / "rank0.pt").unlink()
    (make(tmp_path, 4) / checkpoints.CLOSING_FILE).write_text("{")
    assert not any(checkpoints.is_whole(tmp_path / f"checkpoint-{step}") for step in (2, 3, 4))
    assert [folder.name for folder in checkpoints.remove_broken(tmp_path)] == [f"checkpoint-{n}" for n in (2, 3, 4)]
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-1"]


def test_closing_again_takes_new_files_in(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "more.bin").write_bytes(b"1")
    checkpoints.close(folder)
    (folder / "more.bin").unlink()
    assert not checkpoints.is_whole(folder)
