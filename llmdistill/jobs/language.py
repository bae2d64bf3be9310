"""Distilling causal language models: check -> student -> train -> evaluate."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdistill import models
from llmdistill.data import language as data
from llmdistill.distributed import leave_group, plain_loading, prepare_deepspeed_on_cpu
from llmdistill.errors import UserError
from llmdistill.evaluation import language as evaluation
from llmdistill.jobs.language_recipe import Lora, Recipe, check
from llmdistill.runs import RESULTS, Run, write_whole
from llmdistill.students.init import choose_layers, cut_layers, layer_scores
from llmdistill.trainers.taid import TaidTrainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(recipe: Recipe, tree: dict[str, Any]) -> None:
    """All stages, from the first unfinished one on."""
    train(recipe, tree)
    if recipe.evaluation is None:
        return
    gc.collect()  # the trainer holds its models in cycles of references
    leave_group()
    if recipe.training.process_index == 0:
        evaluate(recipe, tree)


def train(recipe: Recipe, tree: dict[str, Any]) -> None:
    """Check everything, make the student, train it and save it; goes on from the last whole checkpoint."""
    run, arguments = Run(recipe.training.output_dir, tree), recipe.training
    main = arguments.process_index == 0
    run.check_recipe()
    if run.model.is_dir():
        if main:
            print(f"Already trained: {run.model}")
        return
    prepare_deepspeed_on_cpu(arguments)
    tokenizer, rows = check(recipe)
    with arguments.main_process_first(local=False):
        if main:
            run.keep_recipe()
            if recipe.student.from_teacher and not run.student.is_dir():
                with plain_loading(arguments):
                    run.build(run.student, lambda folder: _make_student(recipe, tokenizer, rows, folder))

    trainer = _trainer(recipe, run, tokenizer, rows)
    (checkpoint,) = broadcast_object_list([run.last_checkpoint() if main else None])
    if main and checkpoint is not None:
        print(f"Going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _save(recipe, run, trainer)


def evaluate(recipe: Recipe, tree: dict[str, Any]) -> dict[str, Any]:
    """Compare the finished student with its beginning and its teacher; print the table and keep the results.

    Raises:
        UserError: the recipe has no `evaluation`, or the student is not trained yet.
    """
    run, section = Run(recipe.training.output_dir, tree), recipe.evaluation
    if section is None:
        raise UserError("The recipe has no `evaluation` section.")
    run.check_recipe()
    if not run.model.is_dir():
        raise UserError(
            f"There is no trained model in {run.folder} yet: `llmdistill run` or `llmdistill train` first."
        )
    results = run.results()
    if results is None:
        tokenizer = models.load_tokenizer(str(run.model))
        max_length = section.max_length or recipe.training.max_length
        rows = data.tokenize(data.load(section.data), tokenizer, recipe.training.mask, max_length)
        with plain_loading(recipe.training):
            compared = _load_compared(recipe, run)
        compared, answers = evaluation.compare(
            compared,
            tokenizer,
            rows,
            teacher="teacher" if "teacher" in compared else None,
            batch_size=section.batch_size,
            generate=section.generate,
            max_new_tokens=section.max_new_tokens,
            multiple_choice={choice.name: (choice.path, choice.rows) for choice in section.multiple_choice},
        )
        write_whole(run.folder / "answers.jsonl", "".join(json.dumps(answer) + "\n" for answer in answers))
        results = run.write_results({"models": compared})
    print(evaluation.table(results["models"]))
    print(f"\nModel:   {run.model}\nResults: {run.folder / RESULTS}")
    return results


def _make_student(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Dataset, folder: Path) -> None:
    """Cut the student from the teacher and save it."""
    layers = recipe.student.layers
    if isinstance(layers, int):
        teacher = _load_teacher(recipe).to(models.default_device()).eval()
        rows = rows.select(range(min(recipe.student.probe_rows, len(rows))))
        probe = data.tokenize(rows, tokenizer, "all", recipe.training.max_length)
        inputs, _ = next(evaluation.batches(probe, len(probe), teacher.device))
        layers = choose_layers(layer_scores(teacher, inputs), layers)
        print(f"Layers of the student, chosen by output error: {layers}")
    student = models.load_causal_lm(recipe.teacher.model, trust_remote_code=recipe.teacher.trust_remote_code)
    cut_layers(student, layers)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trainer(recipe: Recipe, run: Run, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> TaidTrainer:
    arguments, student = recipe.training, recipe.student
    with arguments.main_process_first(local=False):
        rows = data.tokenize(rows, tokenizer, arguments.mask, arguments.max_length)
    asked = arguments.label_weight < 1
    return TaidTrainer(
        model=models.load_causal_lm(
            str(run.student) if student.from_teacher else student.model,
            DTYPES[student.dtype],
            trust_remote_code=student.trust_remote_code,
        ),
        teacher=_load_teacher(recipe) if asked else None,
        args=arguments,
        processing_class=tokenizer,
        teacher_processing_class=models.load_tokenizer(recipe.teacher.model) if asked else None,
        train_dataset=rows,
        peft_config=None if student.lora is None else _lora_config(student.lora),
    )


def _load_teacher(recipe: Recipe) -> PreTrainedModel:
    section = recipe.teacher
    dtype = models.default_dtype() if section.dtype is None else DTYPES[section.dtype]
    return models.load_causal_lm(section.model, dtype, trust_remote_code=section.trust_remote_code)


def _load_compared(recipe: Recipe, run: Run) -> dict[str, PreTrainedModel]:
    """The models of the results' table, ready to be asked."""
    beginning = str(run.student) if recipe.student.from_teacher else recipe.student.model
    options = {"dtype": models.default_dtype(), "trust_remote_code": recipe.student.trust_remote_code}
    compared = {
        "student": models.load_causal_lm(str(run.model), **options),
        "untrained student": models.load_causal_lm(beginning, **options),
    }
    if recipe.teacher is not None:
        compared["teacher"] = _load_teacher(recipe)
    return {name: model.to(models.default_device()).eval() for name, model in compared.items()}


def _lora_config(lora: Lora):
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def _save(recipe: Recipe, run: Run, trainer: TaidTrainer) -> None:
    """The finished student as plain transformers loads it, adapters merged, and the log of its training."""
    unfinished = run.folder / ".trained"
    trainer.save_model(str(unfinished))  # every rank takes part where the student is sharded
    if recipe.training.process_index != 0:
        return
    write_whole(run.folder / "training.json", json.dumps(trainer.summary(), indent=1) + "\n")

    def take(folder: Path) -> None:
        if recipe.student.lora is not None:
            with plain_loading(recipe.training):
                models.load_causal_lm(str(unfinished), DTYPES[recipe.student.dtype]).save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
            return
        for file in unfinished.iterdir():
            if file.name != "training_args.bin":  # a pickle, and of no use to who loads the model
                file.rename(folder / file.name)

    run.build(run.model, take)
    shutil.rmtree(unfinished)
