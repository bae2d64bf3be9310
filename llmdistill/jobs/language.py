"""Distilling causal language models: check -> student -> train -> evaluate."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdistill import models
from llmdistill.data import language as data
from llmdistill.distributed import plain_loading, prepare_deepspeed_on_cpu
from llmdistill.errors import UserError
from llmdistill.evaluation import language as evaluation
from llmdistill.jobs.language_recipe import (
    Lora,
    Recipe,
    check,
    check_evaluation,
    load_teacher_tokenizer,
    tokenize_held_out,
)
from llmdistill.jobs.stages import check_evaluable, is_trained, run_all, train_and_save
from llmdistill.runs import RESULTS, Run, write_whole
from llmdistill.students.init import choose_layers, cut_layers, layer_scores
from llmdistill.trainers.taid import TaidTrainer

RECIPES = {"taid": Recipe}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(recipe: Recipe, tree: dict[str, Any]) -> None:
    """All stages, from the first unfinished one on."""
    run_all(recipe, tree, train, evaluate)


def train(recipe: Recipe, tree: dict[str, Any]) -> None:
    """Check everything, make the student, train it and save it; goes on from the last whole checkpoint."""
    run, arguments = Run(recipe.training.output_dir, tree), recipe.training
    if is_trained(run, arguments):
        return
    tokenizer, rows = check(recipe)
    prepare_deepspeed_on_cpu(arguments)
    with run.at_work() if arguments.process_index == 0 else nullcontext():
        with arguments.main_process_first(local=False):
            tokens = data.tokenize(rows, tokenizer, arguments.mask, arguments.max_length, arguments.dataset_num_proc)
            if arguments.process_index == 0 and recipe.student.from_teacher and not run.student.is_dir():
                with plain_loading(arguments):
                    run.build(run.student, lambda folder: _make_student(recipe, tokenizer, rows, folder))
        train_and_save(
            run,
            arguments,
            make_trainer=lambda: _trainer(recipe, run, tokenizer, tokens),
            save=lambda trained, folder: _save(recipe, tokenizer, tokens, trained, folder),
        )


def evaluate(recipe: Recipe, tree: dict[str, Any]) -> dict[str, Any]:
    """Compare the finished student with its beginning and its teacher; print the table and keep the results.

    Raises:
        UserError: the recipe has no `evaluation`, or the student is not trained yet.
    """
    run, section = Run(recipe.training.output_dir, tree), recipe.evaluation
    check_evaluable(recipe, run)
    results = run.results()
    if results is None:
        tokenizer = models.load_tokenizer(str(run.model))
        rows = tokenize_held_out(recipe, check_evaluation(recipe), tokenizer)
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


def _trainer(recipe: Recipe, run: Run, tokenizer: PreTrainedTokenizerBase, tokens: Dataset) -> TaidTrainer:
    arguments, student = recipe.training, recipe.student
    asked = arguments.label_weight < 1
    evaluated = {}
    if arguments.eval_strategy != "no":
        evaluated["eval_dataset"] = data.load(recipe.evaluation.data)
    options = {"trust_remote_code": student.trust_remote_code}
    try:
        return TaidTrainer(
            models.load_causal_lm(_beginning(recipe, run), DTYPES[student.dtype], **options),
            teacher=_load_teacher(recipe) if asked else None,
            args=arguments,
            processing_class=tokenizer,
            teacher_processing_class=load_teacher_tokenizer(recipe) if asked else None,
            train_dataset=tokens,
            peft_config=None if student.lora is None else _lora_config(student.lora),
            **evaluated,
        )
    except ImportError as error:
        raise UserError(f"The training needs a package that is not installed: {error}") from None


def _beginning(recipe: Recipe, run: Run) -> str:
    """The student before training."""
    return str(run.student) if recipe.student.from_teacher else recipe.student.model


def _load_teacher(recipe: Recipe) -> PreTrainedModel:
    section = recipe.teacher
    dtype = models.default_dtype() if section.dtype is None else DTYPES[section.dtype]
    return models.load_causal_lm(section.model, dtype, trust_remote_code=section.trust_remote_code)


def _load_compared(recipe: Recipe, run: Run) -> dict[str, PreTrainedModel]:
    """The models of the results' table, ready to be asked."""
    options = {"dtype": models.default_dtype(), "trust_remote_code": recipe.student.trust_remote_code}
    compared = {
        "student": models.load_causal_lm(str(run.model), **options),
        "untrained student": models.load_causal_lm(_beginning(recipe, run), **options),
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


def _save(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tokens: Dataset, trained: Path, folder: Path) -> None:
    """The finished student as plain transformers loads it, adapters merged, and stopping where its answers end."""
    options = {"trust_remote_code": recipe.student.trust_remote_code}
    student = models.load_causal_lm(str(trained), DTYPES[recipe.student.dtype], **options)
    stops = student.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else stops or []
    end = data.end_of_answer(tokens, tokenizer, recipe.training.max_length)
    if end is not None and end not in stops:
        student.generation_config.eos_token_id = [*stops, end]
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
