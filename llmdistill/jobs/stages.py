"""What the stages of all jobs have in common."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerState, TrainingArguments

from llmdistill.distributed import leave_group, plain_loading
from llmdistill.errors import UserError
from llmdistill.runs import Run, write_whole
from llmdistill.trainers.common import training_summary


def run_all(recipe: Any, tree: dict[str, Any], train: Callable, evaluate: Callable) -> None:
    """Train, then evaluate on the main process where the recipe says how."""
    train(recipe, tree)
    if recipe.evaluation is None:
        return
    gc.collect()  # the trainer holds its models in cycles of references
    leave_group()
    if recipe.training.process_index == 0:
        evaluate(recipe, tree)


def is_trained(run: Run, arguments: TrainingArguments) -> bool:
    """Whether there is nothing left to train; says so."""
    run.check_recipe()
    if not run.model.is_dir():
        return False
    if arguments.process_index == 0:
        print(f"Already trained: {run.model}")
    return True


def train_and_save(
    run: Run, arguments: TrainingArguments, make_trainer: Callable[[], Trainer], save: Callable[[Path, Path], None]
) -> None:
    """Train from the last whole checkpoint on, and make `model/` and `training.json`.

    Args:
        run: whose folder this process holds.
        arguments: of the training.
        make_trainer: loads the models; not called where a checkpoint of the last step is there.
        save: makes the finished model: from the folder of the trained weights, in the folder to be filled.
    """
    main = arguments.process_index == 0
    (checkpoint,) = broadcast_object_list([run.last_checkpoint() if main else None])
    trained = checkpoint and _finished(checkpoint, arguments)
    if trained is None:
        trainer = make_trainer()
        if main and checkpoint is not None:
            print(f"Going on from {checkpoint}")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trained = run.folder / ".trained"
        if main:
            shutil.rmtree(trained, ignore_errors=True)  # of a run that was killed here
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(trained))  # every rank takes part where the student is sharded
        state = trainer.final_state()
    else:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if main:
        summary = training_summary(state) | {"arguments": arguments.to_dict()}
        write_whole(run.folder / "training.json", json.dumps(summary, indent=1) + "\n")
        with plain_loading(arguments):
            run.build(run.model, lambda folder: save(trained, folder))
        shutil.rmtree(run.folder / ".trained", ignore_errors=True)


def check_evaluable(recipe: Any, run: Run) -> None:
    """Refuse to evaluate what is not there.

    Raises:
        UserError: the recipe has no `evaluation`, or the student is not trained yet.
    """
    if recipe.evaluation is None:
        raise UserError("The recipe has no `evaluation` section.")
    run.check_recipe()
    if not run.model.is_dir():
        raise UserError(
            f"There is no trained model in {run.folder} yet: `llmdistill run` or `llmdistill train` first."
        )


def _finished(checkpoint: Path, arguments: TrainingArguments) -> Path | None:
    """Where the weights of a training lie that ended with this checkpoint, None where it has steps to go."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return None
    return Path(state.best_model_checkpoint) if arguments.load_best_model_at_end else checkpoint
