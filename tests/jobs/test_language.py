"""The language job from a recipe to results, and what it says when it cannot work."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset, Value
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill import checkpoints, jobs
from llmdistill.errors import UserError
from llmdistill.trainers.taid import TaidTrainer


def do(verb: str, workspace: Path, *overrides: str) -> Path:
    """Run a verb on the workspace's recipe, as the command line does, and return the folder of the run."""
    job, recipe, tree = jobs.load(workspace / "recipe.yaml", overrides)
    getattr(job, verb)(recipe, tree)
    return Path(recipe.training.output_dir)


def start(workspace: Path, *overrides: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "llmdistill", "run", str(workspace / "recipe.yaml"), *overrides]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}} | options  # as many as here: sums depend on it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_a_run_ends_with_a_plain_model_and_results(workspace, capsys):
    run = do("run", workspace)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.config.num_hidden_layers == 2
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert not list((run / "model").glob("*.bin"))

    results = json.loads((run / "results.json").read_text())["models"]
    assert list(results) == ["student", "untrained student", "teacher"]
    student, untrained, teacher = results.values()
    assert student["kl_to_teacher"] < untrained["kl_to_teacher"]
    assert teacher["kl_to_teacher"] == 0
    assert teacher["top1_agreement"] == 1
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert set(answers[0]) == {"prompt", "reference", "student", "untrained student", "teacher"}
    summary = json.loads((run / "training.json").read_text())
    assert summary["optimizer_steps"] == 6
    assert summary["seconds"] > 0
    assert summary["peak_memory_bytes"] > 1e8

    printed = capsys.readouterr().out
    assert "cross-entropy of the answers" in printed
    assert str(run / "model") in printed


def test_a_second_run_trains_nothing_and_shows_the_results(workspace, capsys, monkeypatch):
    do("run", workspace)
    monkeypatch.setattr(TaidTrainer, "train", lambda *arguments, **options: pytest.fail("trained again"))
    first = capsys.readouterr().out
    do("run", workspace)
    second = capsys.readouterr().out
    assert "Already trained" in second
    assert second.split("nats per token", 1)[1] == first.split("nats per token", 1)[1]  # the same table


def test_another_evaluation_of_the_same_model_is_welcome(workspace, monkeypatch):
    run = do("run", workspace)
    monkeypatch.setattr(TaidTrainer, "train", lambda *arguments, **options: pytest.fail("trained again"))
    do("evaluate", workspace, "evaluation.data.rows=3", "evaluation.generate=0")
    results = json.loads((run / "results.json").read_text())
    assert results["evaluation"]["data"]["rows"] == 3
    assert "rouge_l" not in results["models"]["student"]


def test_results_of_an_earlier_model_are_not_shown_for_a_new_one(workspace):
    run = do("run", workspace)
    for part in [run / "model", *run.glob("checkpoint-*")]:
        shutil.rmtree(part)
    do("train", workspace, "training.learning_rate=1e-5")
    assert not (run / "results.json").exists()


def test_adapters_of_a_killed_run_do_not_get_into_the_next_one(workspace):
    run = do("train", workspace, "student.lora={rank: 4}", "training.save_strategy=no")
    (run / "model").rename(workspace / "elsewhere")
    left_over = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(workspace / "student"), left_over).save_pretrained(
        run / ".trained"
    )
    do("train", workspace, "training.save_strategy=no")
    again = do("train", workspace, "training.save_strategy=no", f"training.output_dir={workspace}/clean")
    for name, values in load_file(again / "model" / "model.safetensors").items():
        torch.testing.assert_close(load_file(run / "model" / "model.safetensors")[name], values, rtol=0, atol=0)


def test_an_evaluation_that_cannot_work_is_refused_before_models_are_loaded(workspace, monkeypatch):
    do("train", workspace)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **o: pytest.fail("weights were loaded"))
    faults = ("evaluation.max_length=999", "evaluation.multiple_choice=[{name: a, path: nothing.jsonl}]")
    with pytest.raises(UserError, match=r"exceed the teacher's context of 128(.|\n)*there is no file `nothing.jsonl`"):
        do("evaluate", workspace, *faults)


def test_adapters_are_merged_in_the_precision_of_the_training(workspace):
    student = AutoModelForCausalLM.from_pretrained(workspace / "student")
    student.bfloat16().save_pretrained(workspace / "student")
    run = do("train", workspace, "student.lora={rank: 4}")
    assert AutoModelForCausalLM.from_pretrained(run / "model").dtype == torch.float32


def test_the_run_folder_keeps_the_recipe_and_refuses_another(workspace):
    run = do("train", workspace, "training.max_steps=2")
    kept = (run / "recipe.yaml").read_text()
    assert "max_steps: 2" in kept
    with pytest.raises(UserError, match=r"training\.max_steps: 2 there, 6 now") as error:
        do("train", workspace)
    assert "output_dir" in str(error.value)
    again = (workspace / "recipe.yaml").write_text(kept)
    assert again
    do("train", workspace)  # the kept recipe is the same run


@pytest.mark.parametrize("layers", [2, [0, 3]])
def test_students_cut_from_the_teacher(workspace, layers):
    overrides = ("student={from_teacher: true}", f"student.layers={layers}")
    run = do("run", workspace, *overrides)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (workspace / "teacher", run / "student")
    )
    assert student.config.num_hidden_layers == 2
    torch.testing.assert_close(student.lm_head.weight, teacher.lm_head.weight)
    if layers == [0, 3]:
        torch.testing.assert_close(
            student.model.layers[1].mlp.up_proj.weight, teacher.model.layers[3].mlp.up_proj.weight
        )


def test_adapters_are_merged_into_the_saved_model(workspace):
    run = do("run", workspace, "student.lora={rank: 4}", "training.learning_rate=0.1")
    before = load_file(workspace / "student" / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_fine_tuning_needs_no_teacher(workspace):
    run = do("run", workspace, "teacher=null", "training.label_weight=1.0")
    results = json.loads((run / "results.json").read_text())["models"]
    assert list(results) == ["student", "untrained student"]
    assert results["student"]["answer_cross_entropy"] < results["untrained student"]["answer_cross_entropy"]


def test_sources_of_different_formats_are_put_together(workspace):
    rows = Dataset.from_list([{"prompt": "one ", "completion": "two three"}] * 4)
    rows.to_json(workspace / "texts.jsonl")
    rows.to_csv(workspace / "texts.csv")
    rows.cast_column("prompt", Value("large_string")).to_parquet(workspace / "texts.parquet")
    sources = ", ".join(f"{{path: {workspace}/texts.{suffix}}}" for suffix in ("jsonl", "csv", "parquet"))
    do("train", workspace, f"data=[{sources}]", "training.max_steps=1")


def test_several_sources_are_put_together(workspace):
    sources = f"[{{path: {workspace}/train.jsonl, rows: 5}}, {{path: {workspace}/test.jsonl, rows: 4}}]"
    do("train", workspace, f"data={sources}", "training.max_steps=1")


@pytest.fixture
def long_recipe(workspace) -> Path:
    """A run that takes some seconds."""
    text = (workspace / "recipe.yaml").read_text()
    text = text.replace("max_steps: 6", "max_steps: 240").replace("save_steps: 2", "save_steps: 40")
    (workspace / "recipe.yaml").write_text(text + "\n")
    return workspace


def test_a_killed_run_goes_on_to_the_same_end(long_recipe):
    whole = do("train", long_recipe, f"training.output_dir={long_recipe}/whole")
    process = start(long_recipe)
    wait_for(long_recipe / "run" / "checkpoint-40" / checkpoints.CLOSING_FILE, process)
    process.kill()
    process.wait()
    assert not (long_recipe / "run" / "model").exists()
    resumed = do("train", long_recipe)
    for name, value in load_file(whole / "model" / "model.safetensors").items():
        assert torch.equal(value, load_file(resumed / "model" / "model.safetensors")[name]), name


def test_ctrl_c_is_a_message_and_whole_checkpoints(long_recipe, capsys):
    process = start(long_recipe)
    wait_for(long_recipe / "run" / "checkpoint-80", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Run the same command again" in output
    assert "Traceback" not in output
    assert not (long_recipe / "run" / "model").exists()
    assert checkpoints.last_whole(long_recipe / "run") is not None
    run = do("train", long_recipe)
    assert "Going on from" in capsys.readouterr().out
    assert (run / "model" / "model.safetensors").is_file()


def test_a_run_that_was_stopped_after_its_last_step_trains_no_further(workspace, monkeypatch):
    run = do("train", workspace)
    first = load_file(run / "model" / "model.safetensors")
    summary = json.loads((run / "training.json").read_text())
    (run / "model").rename(workspace / "first")
    monkeypatch.setattr(TaidTrainer, "train", lambda *arguments, **options: pytest.fail("trained again"))
    do("train", workspace)
    second = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((run / "training.json").read_text())["optimizer_steps"] == summary["optimizer_steps"] == 6


def test_two_processes_do_not_share_a_folder(long_recipe):
    process = start(long_recipe)
    wait_for(long_recipe / "run" / "recipe.yaml", process)
    with pytest.raises(UserError, match="Another process is at work"):
        do("train", long_recipe)
    process.kill()
    process.wait()


def test_a_recipe_can_be_mended_until_something_would_be_lost(workspace):
    cut = "student={from_teacher: true, layers: 2}"
    with pytest.raises(UserError, match="raise `max_length`"):
        do("train", workspace, cut, "training.max_length=3")
    do("train", workspace, cut, "training.max_steps=1", "student.layers=3")  # another student, and rows that fit
    kept = AutoModelForCausalLM.from_pretrained(workspace / "run" / "model")
    assert kept.config.num_hidden_layers == 3


def test_the_student_stops_where_its_answers_end(workspace):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<pad>"  # a base model that knows another end
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(workspace / name)
    run = do("train", workspace, "training.max_steps=1")
    stops = AutoModelForCausalLM.from_pretrained(run / "model").generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|end|>") in (stops if isinstance(stops, list) else [stops])


def test_held_out_rows_can_be_followed_while_training(workspace):
    overrides = ("training.eval_strategy=steps", "training.eval_steps=2", "training.load_best_model_at_end=true")
    run = do("train", workspace, *overrides, "training.metric_for_best_model=loss")
    log = json.loads((run / "training.json").read_text())["log"]
    assert len([entry for entry in log if "eval_loss" in entry]) == 3


def test_half_written_checkpoints_are_removed_and_the_one_before_is_used(workspace, capsys):
    run = do("train", workspace)
    (run / "model").rename(workspace / "first")
    (run / "checkpoint-6" / "model.safetensors").write_bytes(b"cut off")
    do("train", workspace)
    printed = capsys.readouterr().out
    assert "Removed" in printed
    assert "checkpoint-6" in printed
    assert f"Going on from {run / 'checkpoint-4'}" in printed
    first, second = (load_file(folder / "model.safetensors") for folder in (workspace / "first", run / "model"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("share_of_the_model", [0.5, 1.2])  # the model's file fails, or only the larger optimizer's
def test_a_full_disk_is_a_message_and_loses_nothing(workspace, share_of_the_model):
    limit = int(share_of_the_model * (workspace / "student" / "model.safetensors").stat().st_size)

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(
        workspace, preexec_fn=small_files_only, env=os.environ | {"HF_DATASETS_CACHE": str(workspace / "c")}
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "disk is full" in output
    assert "Traceback" not in output
    assert not (workspace / "run" / "model").exists()
    assert checkpoints.last_whole(workspace / "run") is None
    do("train", workspace)  # with space again


def break_recipe(workspace: Path, case: str) -> list[str]:
    """Bring one fault into the workspace and return the overrides that lead to it."""
    if case == "empty":
        (workspace / "train.jsonl").write_text("")
    elif case == "no answer":
        row = {"prompt": "a", "completion": ""}
        (workspace / "train.jsonl").write_text(json.dumps(row) + "\n")
    elif case == "choice kind":
        (workspace / "teacher" / "config.txt").write_text("")
    elif case == "kinds":
        (workspace / "texts.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    elif case == "tokenizer":
        make_tokenizer("entirely different words with other merges " * 3).save_pretrained(workspace / "student")
    return {
        "model": ["student.model=./nowhere"],
        "sample": ["teacher.model=samples/smollm2"],
        "folder": [f"teacher.model={workspace}"],
        "data": ["data.0.path=nowhere.jsonl"],
        "split": ["evaluation.data.path=samples/gsm8k", "evaluation.data.split=dev"],
        "context": ["training.max_length=4096"],
        "no length": ["training.max_length=null"],
        "layers": ["student={from_teacher: true, layers: 9}"],
        "layer list": ["student={from_teacher: true, layers: [0, 4]}"],
        "choice file": [f"evaluation.multiple_choice=[{{name: a, path: {workspace}/nothing.jsonl}}]"],
        "choice kind": [f"evaluation.multiple_choice=[{{name: a, path: {workspace}/teacher/config.txt}}]"],
        "held out": ["evaluation.max_length=2"],
        "choices": [f"evaluation.multiple_choice=[{{name: a, path: {workspace}/train.jsonl}}]"],
        "deepspeed": [f"training.deepspeed={Path(__file__).parents[2]}/recipes/deepspeed/zero2.json"],
        "kinds": [f"data=[{{path: {workspace}/train.jsonl}}, {{path: {workspace}/texts.jsonl}}]"],
    }.get(case, [])


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("empty", r"data\.0: .*train\.jsonl is empty"),
        ("no answer", r"data\.0: .*train\.jsonl: one row has no answer in `completion`; the first is row 1"),
        ("tokenizer", r"student: Student and teacher speak different vocabularies .* id 261"),
        ("model", r"student\.model: there is no model folder `\./nowhere`"),
        ("sample", r"teacher\.model: there is no sample model `samples/smollm2`"),
        ("folder", r"teacher\.model: the folder .* holds no model: it has no config\.json"),
        ("data", r"data\.0: there is no file or folder `nowhere\.jsonl`"),
        ("split", r"evaluation\.data: `samples/gsm8k` has no split `dev`"),
        ("context", r"training\.max_length: 4096 tokens exceed the teacher's context of 128"),
        ("no length", r"training\.max_length: it must be a number"),
        ("layers", r"student\.layers: The teacher has 4 layers"),
        ("layer list", r"student\.layers: The teacher has 4 layers"),
        ("choice file", r"evaluation\.multiple_choice\.0: there is no file"),
        ("choice kind", r"cannot tell what kind of file .*config\.txt` is"),
        ("held out", r"evaluation: No row has an answer within the first 2 tokens"),
        ("choices", r"evaluation\.multiple_choice\.0: .*train\.jsonl has no field choices, gold, query"),
        ("deepspeed", r"training: `deepspeed` needs torchrun"),
        ("kinds", r"data: the sources have different kinds of rows"),
    ],
)
def test_bad_input_is_named_before_any_weights_are_loaded(workspace, monkeypatch, case, complaint):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **o: pytest.fail("weights were loaded"))
    overrides = break_recipe(workspace, case)
    with pytest.raises(UserError, match=complaint):
        do("run", workspace, *overrides)
    assert not (workspace / "run").exists()


def test_several_faults_come_together(workspace):
    with pytest.raises(UserError) as error:
        do("run", workspace, "student.model=./nowhere", "data.0.path=nowhere.jsonl", "training.max_length=999")
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "student.model",
        "data.0",
        "training.max_length",
    ]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("student={}", "either `model` or `from_teacher: true`"),
        ("student={from_teacher: true}", "needs `layers`"),
        ("student.layers=3", "needs `from_teacher: true`"),
        ("teacher=null", "`teacher` is missing"),
        ("training.output_dir=null", "`training.output_dir` is missing"),
        ("training.push_to_hub=true", "`training.push_to_hub` has no effect"),
        ("evaluation.batch_size=0", "`batch_size` must be at least 1"),
        ("evaluation.generate=-1", "`generate` must be at least 0"),
        ("training.learning_rat=1.0", "Did you mean `learning_rate`"),
    ],
)
def test_contradictions_in_the_recipe(workspace, override, complaint):
    with pytest.raises(UserError, match=complaint):
        jobs.load(workspace / "recipe.yaml", [override])


def test_a_student_larger_than_its_teacher_is_a_warning(workspace):
    overrides = (f"teacher.model={workspace}/student", f"student.model={workspace}/teacher")
    with pytest.warns(UserWarning, match="larger than its teacher"):
        do("train", workspace, *overrides, "training.max_steps=1")


def test_a_base_student_takes_the_teachers_chat_template(workspace):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(workspace / "student")
    (workspace / "student" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="takes the teacher's"):
        run = do("train", workspace, "training.max_steps=1")
    assert AutoTokenizer.from_pretrained(run / "model").chat_template == make_tokenizer().chat_template


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero3.json"])
def test_torchrun_with_two_processes(workspace, config):
    exact = ["training.optim=sgd", "training.learning_rate=0.1", "teacher.dtype=float32"]
    overrides = ["training.per_device_train_batch_size=2", *exact]
    if config is not None:
        overrides.append(f"training.deepspeed={Path(__file__).parents[2]}/recipes/deepspeed/{config}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"]
    command = [*launcher, "-m", "llmdistill", "run", str(workspace / "recipe.yaml"), *overrides]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("cross-entropy of the answers") == 1
    two = load_file(workspace / "run" / "model" / "model.safetensors")
    alone = do("train", workspace, *exact, f"training.output_dir={workspace}/alone")
    for name, value in load_file(alone / "model" / "model.safetensors").items():
        torch.testing.assert_close(two[name].float(), value, rtol=1e-3, atol=1e-5)


def test_no_warning_of_ours_in_an_ordinary_run(workspace):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        do("train", workspace, "training.max_steps=1")
