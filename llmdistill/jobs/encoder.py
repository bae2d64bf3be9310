"""Training encoder classifiers, with a teacher or from labels alone: check -> student -> train -> evaluate."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from llmdistill import classifiers, models
from llmdistill.data import glue as data
from llmdistill.data.vocabulary import same_encoding
from llmdistill.distributed import plain_loading, prepare_deepspeed_on_cpu
from llmdistill.evaluation import glue as evaluation
from llmdistill.jobs.encoder_recipe import (
    FinetuneRecipe,
    LelpRecipe,
    MiAlphaRecipe,
    Plan,
    Recipe,
    check,
    load_tokenizers,
)
from llmdistill.jobs.stages import check_evaluable, is_trained, run_all, train_and_save
from llmdistill.runs import RESULTS, Run
from llmdistill.students.heads import student_weights
from llmdistill.students.init import choose_layers, cut_layers, layer_scores
from llmdistill.trainers.finetune import FinetuneTrainer
from llmdistill.trainers.lelp import LelpTrainer
from llmdistill.trainers.mi_alpha import MiAlphaTrainer

RECIPES = {"lelp": LelpRecipe, "mi_alpha": MiAlphaRecipe, "finetune": FinetuneRecipe}


def run(recipe: Recipe, tree: dict[str, Any]) -> None:
    """All stages, from the first unfinished one on."""
    run_all(recipe, tree, train, evaluate)


def train(recipe: Recipe, tree: dict[str, Any]) -> None:
    """Check everything, make the student, train it and save it; goes on from the last whole checkpoint."""
    run, arguments = Run(recipe.training.output_dir, tree), recipe.training
    if is_trained(run, arguments):
        return
    plan = check(recipe)
    prepare_deepspeed_on_cpu(arguments)
    with run.at_work() if arguments.process_index == 0 else nullcontext():
        with arguments.main_process_first(local=False), plain_loading(arguments):
            student, teacher = load_tokenizers(recipe)
            if arguments.process_index == 0 and not run.student.is_dir():
                run.build(run.student, lambda folder: _make_student(recipe, plan, student, folder))
        train_and_save(
            run,
            arguments,
            make_trainer=lambda: _trainer(recipe, run, plan, student, teacher),
            save=lambda trained, folder: _save(recipe, run, trained, student, folder),
        )


def evaluate(recipe: Recipe, tree: dict[str, Any]) -> dict[str, Any]:
    """Compare the finished student with its teacher; print the table and keep the results.

    Raises:
        UserError: the recipe has no `evaluation`, or the student is not trained yet.
    """
    run = Run(recipe.training.output_dir, tree)
    check_evaluable(recipe, run)
    results = run.results()
    if results is None:
        with plain_loading(recipe.training):
            results = run.write_results({"models": _compare(recipe, run)})
    print(evaluation.table(results["models"]))
    print(f"\nModel:   {run.model}\nResults: {run.folder / RESULTS}")
    return results


def _compare(recipe: Recipe, run: Run) -> dict[str, dict[str, float]]:
    section = recipe.evaluation
    rows = data.load(section.data)
    compared = {"student": (classifiers.load(str(run.model)), models.load_tokenizer(str(run.model)))}
    if recipe.teacher is not None:
        compared["teacher"] = (_load_teacher(recipe), load_tokenizers(recipe)[1])
    results, chosen, names = {}, {}, {}
    for name, (model, tokenizer) in compared.items():
        model = model.to(models.default_device()).eval()
        settings = (section.task, recipe.training.max_length, section.batch_size)
        results[name], logits = evaluation.evaluate(model, tokenizer, rows, *settings)
        chosen[name], names[name] = logits.argmax(-1), classifiers.class_names(model.config)
    if recipe.teacher is not None and names["student"] is not None:
        order = np.array(data.class_order(names["teacher"], names["student"], "The teacher"))
        results["student"]["agreement"] = float((chosen["student"] == order[chosen["teacher"]]).mean())
    return results


def _make_student(recipe: Recipe, plan: Plan, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The student before training: its trunk, and a head that is new where it has none for these classes."""
    section, layers = recipe.student, recipe.student.layers
    set_seed(recipe.training.seed)
    name = recipe.teacher.model if section.from_teacher else section.model
    options = {"dtype": torch.float32, "trust_remote_code": section.trust_remote_code}
    student = classifiers.new(name, plan.names, plan.outputs, **options)
    if section.from_teacher:
        if isinstance(layers, int):
            rows = plan.rows.select(range(min(section.probe_rows, len(plan.rows))))
            tokens = data.tokenize(data.unlabelled(rows), tokenizer, recipe.training.max_length)
            inputs = tokenizer.pad(tokens[:], return_tensors="pt")
            layers = choose_layers(layer_scores(student.eval(), dict(inputs)), layers)
            print(f"Layers of the student, chosen by output error: {layers}")
        cut_layers(student, layers)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trainer(
    recipe: Recipe,
    run: Run,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> Trainer:
    arguments = recipe.training
    options = {"trust_remote_code": recipe.student.trust_remote_code}
    student = classifiers.load_as_trained(str(run.student), torch.float32, **options)
    datasets = {
        "train_dataset": plan.rows,
        "eval_dataset": plan.held_out if arguments.eval_strategy != "no" else None,
    }
    if recipe.teacher is None:
        return FinetuneTrainer(student, arguments, tokenizer, **datasets)
    with plain_loading(arguments):
        teacher = _load_teacher(recipe)
    if same_encoding(tokenizer, teacher_tokenizer):
        teacher_tokenizer = None  # one is enough for both
    kind = LelpTrainer if recipe.method == "lelp" else MiAlphaTrainer
    return kind(student, teacher, arguments, tokenizer, teacher_tokenizer, **datasets)


def _load_teacher(recipe: LelpRecipe | MiAlphaRecipe) -> PreTrainedModel:
    section = recipe.teacher
    dtype = models.default_dtype() if section.dtype is None else getattr(torch, section.dtype)
    return classifiers.load(section.model, dtype, trust_remote_code=section.trust_remote_code)


def _save(recipe: Recipe, run: Run, trained: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The finished student in the layout of transformers, without what it had in training only."""
    options = {"trust_remote_code": recipe.student.trust_remote_code}
    if recipe.method == "mi_alpha":
        student = classifiers.load_as_trained(str(run.student), torch.float32, **options)
        student.load_state_dict(student_weights(trained))
    else:
        student = classifiers.load_as_trained(str(trained), torch.float32, **options)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
