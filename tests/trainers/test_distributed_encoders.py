"""Two gloo ranks against one process for the encoder trainers: the teacher's pass, the fit, the training."""

import json
from pathlib import Path

import pytest
import torch
from encoders import NAMES, make_classifier, texts
from ranks import run_ranks

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

import deepspeed  # noqa: F401  imported before the fork, like what follows
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llmdistill import classifiers, store
from llmdistill.distributed import plain_loading, prepare_deepspeed_on_cpu
from llmdistill.trainers import lelp_targets
from llmdistill.trainers.finetune import FinetuneConfig, FinetuneTrainer
from llmdistill.trainers.lelp import LelpConfig, LelpTrainer
from llmdistill.trainers.mi_alpha import MiAlphaConfig, MiAlphaTrainer

RECIPES = Path(__file__).parents[2] / "recipes" / "deepspeed"
MODES = {"ddp": None, "zero2": str(RECIPES / "zero2.json"), "zero3": str(RECIPES / "zero3.json")}


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    """A folder with the models that a rank loads."""
    monkeypatch.setattr(store, "PIECE_ROWS", 10)  # so that both ranks have something to ask
    make_classifier(tokenizer, layers=4, hidden=48, seed=1).save_pretrained(tmp_path / "teacher")
    for name, each in (("student", 3), ("plain", 1)):
        student = make_classifier(tokenizer, classifiers.head_labels(NAMES, each), seed=2)
        student.config.num_subclasses = each
        student.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def train(folder: Path, name: str, method: str, rows: int, deepspeed_config: str | None, bf16: bool = False) -> None:
    """What each rank runs: train, save the model and the log under `folder/name`."""
    settings = {
        "output_dir": str(folder / name),
        "per_device_train_batch_size": rows,
        "max_steps": 5,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_length": 32,
        "bf16": bf16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "deepspeed": deepspeed_config,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = {"train_dataset": texts(45), "eval_dataset": texts(13, seed=1)}
    if method in ("mi_alpha", "mse", "vid"):
        settings |= {"objective": method, "negatives": "gathered", "critic_learning_rate": 0.05}
        arguments = MiAlphaConfig(**settings)
        prepare_deepspeed_on_cpu(arguments)
        with plain_loading(arguments):
            teacher = classifiers.load(str(folder / "teacher"))
        student = classifiers.load_as_trained(str(folder / "plain"))
        trainer = MiAlphaTrainer(student, teacher, arguments, tokenizer, **data)
    elif method == "finetune":
        arguments = FinetuneConfig(**settings)
        prepare_deepspeed_on_cpu(arguments)
        trainer = FinetuneTrainer(classifiers.load_as_trained(str(folder / "plain")), arguments, tokenizer, **data)
    else:
        arguments = LelpConfig(**settings, num_subclasses=3, label_weight=0.3)
        prepare_deepspeed_on_cpu(arguments)
        with plain_loading(arguments):
            teacher = classifiers.load(str(folder / "teacher"))
        student = classifiers.load_as_trained(str(folder / "student"))
        trainer = LelpTrainer(student, teacher, arguments, tokenizer, **data)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / name / "model"))
    if arguments.process_index == 0:
        (folder / name / "log.json").write_text(json.dumps([*trainer.state.log_history, {"evaluation": metrics}]))


def log(folder: Path, name: str, key: str) -> list[float]:
    return [entry[key] for entry in json.loads((folder / name / "log.json").read_text()) if key in entry]


def weights(folder: Path, method: str) -> dict[str, torch.Tensor]:
    if method in ("lelp", "finetune"):
        return classifiers.load_as_trained(str(folder), torch.float32).state_dict()
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", ["lelp", "finetune", "mi_alpha", "mse", "vid"])
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_one(folder, mode, method):
    run_ranks(train, folder, "one", method, 8, None, ranks=1)
    run_ranks(train, folder, "two", method, 4, MODES[mode])
    assert log(folder, "two", "loss") == pytest.approx(log(folder, "one", "loss"), rel=1e-4)
    (one,), (two,) = log(folder, "one", "evaluation"), log(folder, "two", "evaluation")
    name = "eval_label_loss" if method == "mi_alpha" else "eval_loss"  # a bound is a statistic of its batch
    assert two[name] == pytest.approx(one[name], rel=1e-4)
    if method == "mi_alpha":
        assert log(folder, "two", "mi_log_negatives") == log(folder, "one", "mi_log_negatives")
    if method == "lelp":
        fits = (load_file(folder / name / lelp_targets.DIRECTIONS) for name in ("one", "two"))
        for first, second in zip(*(fit.values() for fit in fits), strict=True):
            torch.testing.assert_close(second, first, rtol=0, atol=1e-6)
    one, two = (weights(folder / name / "model", method) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["lelp", "mi_alpha", "vid"])
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_bfloat16_under_deepspeed(folder, mode, method):
    run_ranks(train, folder, "one", method, 8, None, ranks=1)
    run_ranks(train, folder, "two", method, 4, MODES[mode], True)
    assert log(folder, "two", "loss") == pytest.approx(log(folder, "one", "loss"), rel=0.1)


def keep_precision(folder: Path, config: str) -> None:
    """What a rank runs: targets stay float32 where DeepSpeed computes in bfloat16."""
    settings = {"bf16": True, "deepspeed": config, "report_to": "none", "max_length": 32}
    arguments = LelpConfig(output_dir=str(folder / "precise"), num_subclasses=3, **settings)
    prepare_deepspeed_on_cpu(arguments)
    with plain_loading(arguments):
        teacher = classifiers.load(str(folder / "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    student = classifiers.load_as_trained(str(folder / "student"))
    trainer = LelpTrainer(student, teacher, arguments, tokenizer, train_dataset=texts(45))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert batch["targets"].dtype == torch.float32


def test_targets_keep_their_precision_under_deepspeed(folder):
    run_ranks(keep_precision, folder, MODES["zero2"], ranks=1)
