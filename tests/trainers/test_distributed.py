"""Two gloo ranks against one process: DDP, ZeRO-2 and ZeRO-3 give the same losses, weights and reloaded model."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

import deepspeed  # noqa: F401  imported before the fork, like what follows
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill.distributed import prepare_deepspeed_on_cpu
from llmdistill.trainers.taid import TaidConfig, TaidTrainer

RECIPES = Path(__file__).parents[2] / "recipes"
MODES = {
    "ddp": None,
    "zero2": str(RECIPES / "deepspeed" / "zero2.json"),
    "zero3": str(RECIPES / "deepspeed" / "zero3.json"),
}


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, tokenized):
    """A folder with everything that a rank loads."""
    models = {"teacher": make_model(4, 48, seed=1, tie_word_embeddings=True), "student": make_model(2, 32, seed=2)}
    models["tied"] = make_model(2, 32, seed=2, tie_word_embeddings=True)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenized.save_to_disk(tmp_path / "rows")
    return tmp_path


def train(
    folder: Path, name: str, rows: int, deepspeed_config: str | None = None, student: str = "student", **options
) -> None:
    """What each rank runs: train from `folder`, save the model and the log under `folder/name`."""
    from datasets import load_from_disk

    adapters, resume = options.pop("adapters", None), options.pop("resume", None)
    settings = {
        "output_dir": str(folder / name),
        "per_device_train_batch_size": rows,
        "max_steps": 6,
        "learning_rate": 0.1,
        "optim": "sgd",
        "schedule": "adaptive",
        "t_step_size": 0.5,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "deepspeed": deepspeed_config,
    }
    arguments = TaidConfig(**(settings | options))
    prepare_deepspeed_on_cpu(arguments)
    data = load_from_disk(str(folder / "rows")).select(range(21))  # no multiple of a step
    trainer = TaidTrainer(
        AutoModelForCausalLM.from_pretrained(folder / student, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32),
        arguments,
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        teacher_processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        train_dataset=data,
        eval_dataset=data.select(range(7)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / name / "model"))
    if trainer.args.process_index == 0:
        (folder / name / "log.json").write_text(json.dumps([*trainer.state.log_history, {"evaluation": metrics}]))


def log(folder: Path, name: str, key: str) -> list[float]:
    return [entry[key] for entry in json.loads((folder / name / "log.json").read_text()) if key in entry]


def logits(folder: Path, name: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder / name / "model", dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("student", ["student", "tied"])
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_one(folder, mode, student):
    run_ranks(train, folder, "one", 4, None, student, ranks=1)
    run_ranks(train, folder, "two", 2, MODES[mode], student)
    assert log(folder, "two", "loss") == pytest.approx(log(folder, "one", "loss"), rel=1e-4)
    assert log(folder, "two", "t") == pytest.approx(log(folder, "one", "t"), rel=1e-6)
    (one,), (two,) = log(folder, "one", "evaluation"), log(folder, "two", "evaluation")
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    torch.testing.assert_close(logits(folder, "two"), logits(folder, "one"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_over_ranks_equals_one_large_batch(folder, mode):
    run_ranks(train, folder, "one", 8, ranks=1)
    settings = {"gradient_accumulation_steps": 2}
    run_ranks(_train_with, folder, "two", 2, MODES[mode], settings)
    assert log(folder, "two", "loss") == pytest.approx(log(folder, "one", "loss"), rel=1e-4)
    assert log(folder, "two", "t") == pytest.approx(log(folder, "one", "t"), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_two_resumed_ranks_equal_uninterrupted_ones(folder, mode):
    settings = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    run_ranks(_train_with, folder, "whole", 2, MODES[mode], settings)
    resume = {"resume": str(folder / "whole" / "checkpoint-3")}
    run_ranks(_train_with, folder, "resumed", 2, MODES[mode], settings | resume)
    assert log(folder, "resumed", "loss") == log(folder, "whole", "loss")
    assert log(folder, "resumed", "t") == log(folder, "whole", "t")
    torch.testing.assert_close(logits(folder, "resumed"), logits(folder, "whole"), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_over_ranks(folder, mode):
    settings = {"adapters": True, "learning_rate": 0.5}
    run_ranks(_train_with, folder, "one", 4, None, settings, ranks=1)
    run_ranks(_train_with, folder, "two", 2, MODES[mode], settings)
    assert log(folder, "two", "loss") == pytest.approx(log(folder, "one", "loss"), rel=1e-4)
    one, two = (load_file(folder / name / "model" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_bfloat16_under_deepspeed(folder, mode):
    run_ranks(train, folder, "one", 4, ranks=1)
    run_ranks(_train_with, folder, "two", 2, MODES[mode], {"bf16": True})
    assert log(folder, "two", "loss") == pytest.approx(log(folder, "one", "loss"), rel=0.05)


def _train_with(folder: Path, name: str, rows: int, deepspeed_config: str | None, settings: dict) -> None:
    train(folder, name, rows, deepspeed_config, **settings)
