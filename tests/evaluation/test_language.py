"""Scores against their textbook forms, and the script that prints them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer

from llmdistill.data.language import IGNORE_INDEX
from llmdistill.evaluation.language import compare, score_answers, table, write_answers

SCRIPT = Path(__file__).parents[2] / "eval" / "evaluate_language.py"
DATA = Path(os.environ.get("LLMDISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def models(make_model):
    return {"student": make_model(2, 32, seed=2).eval(), "teacher": make_model(4, 48, seed=1).eval()}


def test_scores_are_the_means_over_all_counted_tokens(models, tokenized):
    scores = score_answers(models, tokenized, batch_size=5, teacher="teacher")
    totals, count = {"ce": 0.0, "kl": 0.0, "agree": 0.0}, 0
    for row in tokenized:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            student, teacher = (models[name](ids).logits[0, :-1].log_softmax(-1) for name in ("student", "teacher"))
        for position, label in enumerate(row["labels"][1:]):
            if label != IGNORE_INDEX:
                count += 1
                totals["ce"] -= student[position, label].item()
                totals["kl"] += (teacher[position].exp() * (teacher[position] - student[position])).sum().item()
                totals["agree"] += (student[position].argmax() == teacher[position].argmax()).item()
    assert scores["student"]["answer_cross_entropy"] == pytest.approx(totals["ce"] / count, rel=1e-5)
    assert scores["student"]["perplexity"] == pytest.approx(math.exp(totals["ce"] / count), rel=1e-5)
    assert scores["student"]["kl_to_teacher"] == pytest.approx(totals["kl"] / count, rel=1e-4)
    assert scores["student"]["top1_agreement"] == pytest.approx(totals["agree"] / count)
    assert (scores["teacher"]["kl_to_teacher"], scores["teacher"]["top1_agreement"]) == (0, 1)
    assert scores["student"]["parameters"] == models["student"].num_parameters()


@pytest.mark.parametrize("batch_size", [1, 24])
def test_the_batch_size_changes_nothing(models, tokenized, batch_size):
    one = score_answers(models, tokenized, batch_size=7, teacher="teacher")["student"]
    other = score_answers(models, tokenized, batch_size=batch_size, teacher="teacher")["student"]
    for key in ("answer_cross_entropy", "kl_to_teacher", "top1_agreement"):
        assert one[key] == pytest.approx(other[key], rel=1e-5)


def test_a_head_that_is_not_known_is_not_scored(models, tokenized):
    models["student"].lm_head.register_forward_hook(lambda layer, inputs, logits: 2 * logits)
    with pytest.raises(ValueError, match="student's architecture"):
        score_answers(models, tokenized)


def test_without_a_teacher_there_is_no_distance_to_one(models, tokenized):
    scores = score_answers({"student": models["student"]}, tokenized)
    assert "kl_to_teacher" not in scores["student"]


def test_answers_are_greedy_and_scored_by_rouge(models, tokenizer, tokenized):
    metrics, answers = write_answers(models["student"], tokenizer, tokenized.select(range(5)), 6, batch_size=2)
    for row, answer in zip(tokenized, answers, strict=False):
        start = next(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
        ids = torch.tensor([row["input_ids"][:start]])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, models["student"](ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert answer["answer"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
        assert (
            answer["reference"]
            == tokenizer.decode(row["input_ids"][start : start + 6], skip_special_tokens=True).strip()
        )
    assert 0 <= metrics["rouge_l"] <= 100


def test_rouge_of_the_reference_itself_is_100(tokenizer, tokenized, make_model, monkeypatch):
    model = make_model()
    rows = tokenized.select(range(4))
    longest = max(len(row["input_ids"]) for row in rows)
    references = iter(rows)

    def generate(input_ids, max_new_tokens, **options):
        if max_new_tokens == 1:  # the call that is not timed
            return input_ids
        answers = []
        for _ in range(len(input_ids)):
            row = next(references)
            answer = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
            answers.append(answer + [tokenizer.pad_token_id] * (longest - len(answer)))
        return torch.cat([input_ids, torch.tensor(answers)], 1)

    monkeypatch.setattr(model, "generate", generate)
    metrics, _ = write_answers(model, tokenizer, rows, 64, batch_size=2)
    assert metrics["rouge_l"] == pytest.approx(100)


def test_the_table_has_a_column_per_model_and_no_made_up_numbers(models, tokenizer, tokenized):
    results, answers = compare(models, tokenizer, tokenized, teacher="teacher", generate=2, max_new_tokens=3)
    del results["teacher"]["rouge_l"]
    lines = table(results).splitlines()
    assert lines[0].split() == ["student", "teacher"]
    rouge = next(line for line in lines if line.startswith("ROUGE-L"))
    assert rouge.split()[-1] == "-"
    assert len(answers) == 2
    assert set(answers[0]) == {"prompt", "reference", "student", "teacher"}


def test_the_script_judges_models_from_folders(workspace):
    command = [
        sys.executable,
        str(SCRIPT),
        "--model",
        f"mine={workspace}/student",
        "--teacher",
        f"{workspace}/teacher",
    ]
    command += ["--data", f"{workspace}/test.jsonl", "--rows", "6", "--generate", "2", "--max-new-tokens", "3"]
    result = subprocess.run(
        [*command, "--output", f"{workspace}/out.json"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "cross-entropy of the answers" in result.stdout
    assert set(json.loads((workspace / "out.json").read_text())) == {"mine", "teacher"}


def test_the_script_refuses_models_of_different_vocabularies(workspace):
    make_tokenizer("entirely different words with other merges " * 3).save_pretrained(workspace / "teacher")
    command = [sys.executable, str(SCRIPT), "--model", f"{workspace}/student", "--teacher", f"{workspace}/teacher"]
    result = subprocess.run(
        [*command, "--data", f"{workspace}/test.jsonl"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "different vocabularies" in result.stderr


def test_the_script_says_what_is_missing(workspace):
    command = [sys.executable, str(SCRIPT), "--model", "./nowhere", "--data", f"{workspace}/test.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "Error: there is no model folder `./nowhere`" in result.stderr


@pytest.mark.parametrize("name", ["arc_easy", "piqa"])
def test_multiple_choice_through_the_harness(make_model, tokenizer, tmp_path, name):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from llmdistill.evaluation.multiple_choice import check_file, score_choices

    path = DATA / "lm_eval" / name / "test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}: set LLMDISTILL_DATA to the folder of the data sets")
    check_file(path)
    model = make_model(max_position_embeddings=1024).eval()
    scores = score_choices(model, tokenizer, {name: path}, rows=6)

    import datasets

    right = 0
    for row in datasets.load_dataset("json", data_files=str(path), split="train").select(range(6)):
        query = tokenizer(row["query"].strip() + "\nAnswer:")["input_ids"]
        likelihoods = []
        for choice in row["choices"]:
            ids = tokenizer(row["query"].strip() + "\nAnswer: " + choice)["input_ids"]
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(log_probs[i - 1, ids[i]].item() for i in range(len(query), len(ids))))
        right += likelihoods.index(max(likelihoods)) == row["gold"]
    assert scores[f"accuracy_{name}"] == pytest.approx(right / 6)
    assert 0 <= scores[f"accuracy_error_{name}"] < 0.5
