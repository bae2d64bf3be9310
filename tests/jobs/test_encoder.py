"""The encoder job from a recipe to results: fine-tuning, LELP from its outcome, and what cannot work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from encoders import NAMES, make_classifier, make_texts
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from llmdistill import classifiers, jobs
from llmdistill.errors import UserError
from llmdistill.trainers.lelp import LelpTrainer

SCRIPT = Path(__file__).parents[2] / "eval" / "evaluate_glue.py"


@pytest.fixture
def workspace(tmp_path, tokenizer):
    """A folder with a teacher, an encoder without a head, rows, and a recipe for each method."""
    make_classifier(tokenizer, layers=4, hidden=32, seed=1).save_pretrained(tmp_path / "teacher")
    make_classifier(tokenizer, seed=2).bert.save_pretrained(tmp_path / "encoder")
    for name in ("teacher", "encoder"):
        tokenizer.save_pretrained(tmp_path / name)
    for name, count in {"train": 48, "test": 30}.items():
        lines = (json.dumps(row) for row in make_texts(count, seed=count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    common = f"""
data: [{{path: {tmp_path}/train.jsonl}}]
training:
  output_dir: {tmp_path}/run
  max_length: 32
  max_steps: 12
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  bf16: false
  save_steps: 4
  logging_steps: 4
evaluation:
  data: {{path: {tmp_path}/test.jsonl}}
"""
    (tmp_path / "finetune.yaml").write_text(f"method: finetune\nstudent: {{model: {tmp_path}/encoder}}\n{common}")
    lelp = f"method: lelp\nteacher: {{model: {tmp_path}/teacher}}\nstudent: {{from_teacher: true, layers: [0, 3]}}\n"
    (tmp_path / "lelp.yaml").write_text(f"{lelp}{common}")
    mi_alpha = f"method: mi_alpha\nteacher: {{model: {tmp_path}/teacher}}\nstudent: {{model: {tmp_path}/encoder}}\n"
    (tmp_path / "mi_alpha.yaml").write_text(f"{mi_alpha}{common}")
    return tmp_path


def do(verb: str, recipe: Path, *overrides: str) -> Path:
    job, loaded, tree = jobs.load(recipe, overrides)
    getattr(job, verb)(loaded, tree)
    return Path(loaded.training.output_dir)


def test_a_teacher_is_fine_tuned_and_teaches(workspace, capsys):
    longer = ("training.max_steps=60", "training.learning_rate=3e-3")
    teacher = do("run", workspace / "finetune.yaml", f"training.output_dir={workspace}/tuned", *longer)
    results = json.loads((teacher / "results.json").read_text())["models"]
    assert list(results) == ["student"]
    assert results["student"]["accuracy"] > 0.9
    config = AutoConfig.from_pretrained(teacher / "model")
    assert classifiers.class_names(config) == sorted(NAMES)

    run = do("run", workspace / "lelp.yaml", f"teacher.model={teacher}/model", "student.layers=[1]", *longer)
    results = json.loads((run / "results.json").read_text())["models"]
    assert results["student"]["accuracy"] > 0.8
    assert results["student"]["agreement"] > 0.8
    assert results["teacher"]["accuracy"] > 0.9
    assert (run / "directions.safetensors").is_file()
    plain = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert plain.config.num_labels == 12
    assert plain.config.num_hidden_layers == 1
    assert "agreement" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["mi_alpha", "mse", "none"])
def test_layers_teach_and_only_the_student_is_saved(workspace, objective):
    more = [f"training.objective={objective}", "training.max_steps=60", "training.learning_rate=3e-3"]
    run = do("run", workspace / "mi_alpha.yaml", *more)
    results = json.loads((run / "results.json").read_text())["models"]
    assert results["student"]["accuracy"] > 0.8
    plain = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert plain.config.num_labels == 3
    assert set(load_file(run / "model" / "model.safetensors")) == set(plain.state_dict())
    trained = load_file(run / "checkpoint-60" / "model.safetensors")
    for name, values in plain.state_dict().items():
        torch.testing.assert_close(values, trained[f"student.{name}"], rtol=0, atol=0)


def test_a_teacher_of_numbers_teaches_numbers(workspace, tokenizer):
    break_workspace(workspace, "number teacher", tokenizer)
    lines = [json.dumps({"sentence": "the fox " * n, "label": n / 2}) for n in range(1, 20)]
    for name in ("train", "test"):
        (workspace / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"set `training\.logit_loss: mse`"):
        do("run", workspace / "mi_alpha.yaml")
    run = do("run", workspace / "mi_alpha.yaml", "training.logit_loss=mse", "training.max_steps=2")
    assert "pearson" in json.loads((run / "results.json").read_text())["models"]["teacher"]


def test_a_student_deeper_than_its_teacher_is_refused(workspace, tokenizer):
    make_classifier(tokenizer, layers=1, seed=1).save_pretrained(workspace / "teacher")
    with pytest.raises(UserError, match="student: The student has 2 layers, the teacher only 1"):
        do("train", workspace / "mi_alpha.yaml")


def test_a_second_run_trains_nothing(workspace, monkeypatch, capsys):
    do("run", workspace / "lelp.yaml")
    monkeypatch.setattr(LelpTrainer, "train", lambda *arguments, **options: pytest.fail("trained again"))
    do("run", workspace / "lelp.yaml")
    assert "Already trained" in capsys.readouterr().out


def test_a_stopped_run_goes_on_to_the_same_end(workspace, monkeypatch):
    whole = do("train", workspace / "lelp.yaml")

    def stop_after(self, *arguments, **options):
        self.args.max_steps = 12
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    step = LelpTrainer.training_step
    monkeypatch.setattr(LelpTrainer, "training_step", stop_after)
    with pytest.raises(KeyboardInterrupt):
        do("train", workspace / "lelp.yaml", f"training.output_dir={workspace}/stopped")
    monkeypatch.setattr(LelpTrainer, "training_step", step)
    stopped = do("train", workspace / "lelp.yaml", f"training.output_dir={workspace}/stopped")
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, stopped))
    for name, values in first.items():
        torch.testing.assert_close(second[name], values, rtol=0, atol=0, msg=name)


def test_layers_can_be_chosen_by_output_error(workspace, capsys):
    run = do("train", workspace / "lelp.yaml", "student.layers=2", "training.max_steps=1")
    assert AutoConfig.from_pretrained(run / "model").num_hidden_layers == 2
    assert "chosen by output error" in capsys.readouterr().out


def test_numbers_can_be_predicted(workspace):
    lines = (json.dumps({"sentence1": "the fox", "sentence2": "a dog " * n, "label": n / 2}) for n in range(1, 20))
    (workspace / "train.jsonl").write_text("\n".join(lines) + "\n")
    run = do(
        "run", workspace / "finetune.yaml", f"evaluation.data.path={workspace}/train.jsonl", "evaluation.task=stsb"
    )
    results = json.loads((run / "results.json").read_text())["models"]["student"]
    assert list(results)[:2] == ["pearson", "spearman"]
    assert results["spearman"] > 0.5


@pytest.mark.parametrize("targets", ["vanilla", "uniform_split", "random_split", "oracle_subclasses"])
def test_every_control_is_one_override(workspace, targets):
    more = ["training.subclass_column=kind"] if targets == "oracle_subclasses" else []
    run = do("train", workspace / "lelp.yaml", f"training.targets={targets}", "training.max_steps=1", *more)
    config = AutoConfig.from_pretrained(run / "model")
    assert config.num_labels == (3 if targets == "vanilla" else 12)


def test_held_out_rows_can_be_followed_with_true_subclasses(workspace):
    oracle = ("training.targets=oracle_subclasses", "training.subclass_column=kind")
    run = do("train", workspace / "lelp.yaml", "training.eval_strategy=steps", "training.eval_steps=6", *oracle)
    log = json.loads((run / "training.json").read_text())["log"]
    assert len([entry for entry in log if "eval_distillation" in entry]) == 2


def test_agreement_is_of_classes_whatever_their_names(workspace, tokenizer):
    twin = make_classifier(tokenizer, ("LABEL_0", "LABEL_1", "LABEL_2"), layers=4, seed=1)
    twin.save_pretrained(workspace / "teacher")
    make_classifier(tokenizer, layers=4, seed=1).save_pretrained(workspace / "encoder")
    still = ("training.targets=vanilla", "training.learning_rate=1e-12", "training.max_steps=1")
    run = do("run", workspace / "lelp.yaml", f"student={{model: {workspace}/encoder}}", *still)
    assert json.loads((run / "results.json").read_text())["models"]["student"]["agreement"] == 1.0


def test_rows_without_labels_teach_too(workspace):
    rows = [{"sentence": row["sentence"]} for row in make_texts(48)]
    (workspace / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    do("train", workspace / "lelp.yaml", "training.targets=uniform_split", "training.max_steps=1")


def break_workspace(workspace: Path, case: str, tokenizer) -> list[str]:
    """Bring one fault into the workspace and return the overrides that lead to it."""
    rows = make_texts(48)
    if case == "few":
        rows = rows[:11]
    elif case == "names":
        rows = [row | {"label": row["label"].replace("number", "figure")} for row in rows]
    elif case in ("taught", "several"):
        config = AutoConfig.from_pretrained(workspace / "teacher")
        changes = {"num_subclasses": 3} if case == "taught" else {"problem_type": "multi_label_classification"}
        config.update(changes)
        config.save_pretrained(workspace / "teacher")
    elif case in ("half", "oracle"):
        rows = [row | {"label": None if index % 2 else row["label"]} for index, row in enumerate(rows)]
    elif case == "fraction":
        rows = [row | {"label": 0.5} for row in rows]
    elif case == "pair":
        rows = [row | {"sentence2": "x", "sentence1": "y"} for row in rows]
    elif case == "number teacher":
        teacher = classifiers.new(str(workspace / "teacher"), None)
        teacher.save_pretrained(workspace / "teacher")
    if case == "empty":
        (workspace / "test.jsonl").write_text("")
    (workspace / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {
        "half": ["training.label_weight=0.5"],
        "oracle": ["training.targets=oracle_subclasses", "training.subclass_column=kind"],
        "task": ["evaluation.task=rte"],
        "headless": [f"teacher.model={workspace}/encoder", "student.layers=[0]"],
        "column": ["training.targets=oracle_subclasses", "training.subclass_column=knd"],
        "context": ["training.max_length=4096"],
        "layers": ["student.layers=9"],
    }.get(case, [])


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("few", r"data: 4 subclasses need at least 5 rows in every class; animal has 4"),
        ("names", r"data: The data set has classes that the model does not know: figure"),
        ("half", r"data: 24 of 48 rows have no label"),
        ("fraction", r"data: The data set has numbers to be predicted, the model knows classes"),
        ("pair", r"evaluation\.data: .* has one text in a row \(sentence\), expected a pair"),
        ("number teacher", r"teacher: the teacher predicts a number, LELP needs classes"),
        ("headless", r"teacher: the model has no classification head \(BertModel\)"),
        ("taught", r"teacher: the teacher was taught subclasses itself"),
        ("several", r"teacher: the teacher says yes or no to each class by itself"),
        ("oracle", r"data: 24 of 48 rows have no label, so their true subclass is not known"),
        ("empty", r"evaluation\.data: .*test\.jsonl is empty"),
        ("task", r"evaluation\.data: `rte` has 2 texts in a row, the training rows 1"),
        ("column", r"data\.0: .* has no column `knd`"),
        ("context", r"training\.max_length: 4096 tokens exceed the teacher's context of 64"),
        ("layers", r"student\.layers: The teacher has 4 layers"),
    ],
)
def test_bad_input_is_named_before_any_weights_are_loaded(workspace, monkeypatch, tokenizer, case, complaint):
    overrides = break_workspace(workspace, case, tokenizer)
    monkeypatch.setattr(
        AutoModelForSequenceClassification, "from_pretrained", lambda *a, **o: pytest.fail("weights were loaded")
    )
    with pytest.raises(UserError, match=complaint):
        do("run", workspace / "lelp.yaml", *overrides)
    assert not (workspace / "run").exists()


def test_fine_tuning_needs_labels_and_a_model_of_its_own(workspace):
    with pytest.raises(UserError, match=r"`student\.model` is missing"):
        do("train", workspace / "finetune.yaml", "student={from_teacher: true, layers: 2}")
    (workspace / "train.jsonl").write_text(json.dumps({"sentence": "a fox"}) + "\n")
    with pytest.raises(UserError, match="fine-tuning needs rows with a `label`"):
        do("train", workspace / "finetune.yaml")


def script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_script_scores_students_seeds_and_foreign_models(workspace):
    run = do("train", workspace / "lelp.yaml", "training.max_steps=2")
    models = [f"ours={run}/model", f"ours={run}/model", f"other={workspace}/teacher", f"other={workspace}/teacher"]
    flags = [part for model in models for part in ("--model", model)]
    done = script(*flags, "--data", f"{workspace}/test.jsonl", "--output", f"{workspace}/out.json")
    assert done.returncode == 0, done.stderr
    assert "other - ours:" in done.stdout
    assert "2 seeds" in done.stdout
    assert len(json.loads((workspace / "out.json").read_text())["ours"]) == 2


def test_the_script_writes_submissions_and_refuses_what_cannot_be(workspace, tokenizer):
    flags = ["--model", f"{workspace}/teacher", "--data", f"{workspace}/test.jsonl"]
    done = script(*flags, "--task", "cola", "--submission", f"{workspace}/out")
    assert done.returncode == 1
    assert "`cola` has 2 classes, the model 3" in done.stderr
    make_classifier(tokenizer, ("LABEL_0", "LABEL_1")).save_pretrained(workspace / "teacher")
    done = script(*flags, "--task", "cola", "--submission", f"{workspace}/out")
    assert done.returncode == 0, done.stderr
    assert len((workspace / "out" / "CoLA.tsv").read_text().splitlines()) == 31
    done = script(*flags, "--task", "colla")
    assert done.returncode == 1
    assert "Did you mean `cola`" in done.stderr
