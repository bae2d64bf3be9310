"""Classifiers with several outputs for each class load everywhere, and as classes here."""

import subprocess
import sys

import pytest
import torch
from encoders import NAMES, make_classifier
from transformers import AutoModelForSequenceClassification, pipeline

from llmdistill import classifiers
from llmdistill.errors import UserError


@pytest.fixture
def trunk(tmp_path, tokenizer):
    make_classifier(tokenizer, labels=("a", "b")).save_pretrained(tmp_path / "trunk")
    return str(tmp_path / "trunk")


@pytest.fixture
def student(trunk, tmp_path, tokenizer):
    """A folder with a student of three classes and four outputs for each."""
    folder = tmp_path / "student"
    classifiers.new(trunk, NAMES, 4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


INPUTS = {"input_ids": torch.arange(5, 15)[None]}


def test_a_plain_program_sees_named_subclasses(student):
    plain = AutoModelForSequenceClassification.from_pretrained(student)
    assert plain.config.num_labels == 12
    assert plain.config.id2label[0] == "animal/0"
    assert plain.config.id2label[11] == "other/3"
    assert classifiers.class_names(plain.config) == list(NAMES)


def test_loaded_here_its_logits_are_those_of_classes(student):
    plain, ours = AutoModelForSequenceClassification.from_pretrained(student).eval(), classifiers.load(student).eval()
    with torch.no_grad():
        expected = plain(**INPUTS).logits.exp().unflatten(-1, (3, 4)).sum(-1).log()
        torch.testing.assert_close(ours(**INPUTS).logits, expected)
    assert ours.config.id2label == dict(enumerate(NAMES))
    assert classifiers.class_names(ours.config) == list(NAMES)
    with pytest.raises(ValueError, match="copy the folder"):
        ours.save_pretrained("x")


def test_the_documented_line_gives_the_same_classes_in_a_fresh_process(student):
    with torch.no_grad():
        ours = classifiers.load(student).eval()(**INPUTS).logits
    code = (
        "import torch; from transformers import AutoModelForSequenceClassification as M\n"
        f"model = M.from_pretrained({student!r}).eval()\n"
        "logits = model(input_ids=torch.arange(5, 15)[None]).logits\n"
        "print(logits.unflatten(-1, (3, 4)).logsumexp(-1).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(torch.tensor(eval(printed)), ours, rtol=1e-5, atol=1e-6)


def test_a_pipeline_of_it_names_classes(student, tokenizer):
    classify = pipeline("text-classification", model=classifiers.load(student), tokenizer=tokenizer, top_k=None)
    answers = classify("the fox")[0] if isinstance(classify("the fox")[0], list) else classify("the fox")
    assert {answer["label"] for answer in answers} == set(NAMES)
    assert sum(answer["score"] for answer in answers) == pytest.approx(1.0, abs=1e-5)


def test_the_trunk_is_kept_and_a_fitting_head_too(trunk, tokenizer):
    original = AutoModelForSequenceClassification.from_pretrained(trunk)
    new, same = classifiers.new(trunk, NAMES, 2), classifiers.new(trunk, ("a", "b"))
    for name, values in original.bert.state_dict().items():
        torch.testing.assert_close(new.bert.state_dict()[name], values, rtol=0, atol=0)
    torch.testing.assert_close(same.classifier.weight, original.classifier.weight, rtol=0, atol=0)
    assert new.classifier.weight.shape[0] == 6


def test_a_model_that_predicts_a_number_has_no_classes(trunk):
    assert classifiers.class_names(classifiers.new(trunk, None).config) is None


def test_pickles_are_not_opened(tmp_path, tokenizer):
    model = make_classifier(tokenizer)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights must be safetensors"):
        classifiers.load(str(tmp_path))
