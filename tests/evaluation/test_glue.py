"""Official metrics, and classifiers scored with them."""

import numpy as np
import pytest
import torch
from encoders import NAMES, make_classifier, texts
from sklearn import metrics as official

from llmdistill.errors import UserError
from llmdistill.evaluation import glue
from llmdistill.evaluation.glue import (
    METRICS,
    TASKS,
    evaluate,
    in_order_of,
    metrics_of,
    predict,
    score,
    table,
    write_submission,
)


@pytest.fixture
def answers():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, 2))
    labels = (logits[:, 1] - logits[:, 0] + generator.normal(size=200) > 0).astype(int)
    return logits, labels


def test_metrics_are_the_official_ones(answers):
    logits, labels = answers
    predicted = logits.argmax(-1)
    found = score(logits, labels, ["accuracy", "f1", "macro_f1", "matthews_correlation", "cross_entropy"])
    assert found["accuracy"] == pytest.approx(official.accuracy_score(labels, predicted))
    assert found["f1"] == pytest.approx(official.f1_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(official.f1_score(labels, predicted, average="macro"))
    assert found["matthews_correlation"] == pytest.approx(official.matthews_corrcoef(labels, predicted))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found["cross_entropy"] == pytest.approx(official.log_loss(labels, probs))


def test_correlations():
    labels = np.array([0.0, 1.0, 2.0, 3.0])
    found = score(np.array([[0.0], [1.0], [4.0], [9.0]]), labels, ["pearson", "spearman"])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef(labels, labels**2)[0, 1])
    assert score(np.ones((4, 1)), labels, ["pearson"])["pearson"] == 0.0


def test_calibration_error_by_hand():
    def logits(confidence: float) -> list[float]:
        return [np.log(confidence), np.log(1 - confidence)]

    rows = np.array([logits(0.9)] * 4 + [logits(0.62)] * 2)
    labels = np.array([0, 0, 0, 1, 0, 0])  # 75 % right where 90 % sure, 100 % where 62 %
    expected = 4 / 6 * (0.9 - 0.75) + 2 / 6 * (1 - 0.62)
    assert score(rows, labels, ["expected_calibration_error"])["expected_calibration_error"] == pytest.approx(expected)


def test_every_task_names_known_metrics():
    for name, task in TASKS.items():
        assert set(task.metrics) <= set(METRICS)
        assert metrics_of(name, regression=name == "stsb")[: len(task.metrics)] == task.metrics
    assert metrics_of(None, regression=True) == ("pearson", "spearman")


def test_rows_without_a_label_are_left_out(answers):
    logits, labels = answers
    labels = labels.copy()
    labels[100:] = -1
    assert score(logits, labels, ["accuracy"]) == score(logits[:100], labels[:100], ["accuracy"])
    with pytest.raises(UserError, match="No row has a label"):
        score(logits, np.full(200, -1), ["accuracy"])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_logits_are_in_the_order_of_the_rows(tokenizer, batch_size):
    model, rows = make_classifier(tokenizer).eval(), texts(20)
    tokens = rows.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]})
    logits, speed = predict(model, tokenizer, tokens, batch_size)
    for row in (0, 7, 19):
        with torch.no_grad():
            alone = model(torch.tensor([tokens[row]["input_ids"]])).logits[0]
        np.testing.assert_allclose(logits[row], alone.numpy(), atol=1e-5)
    assert speed > 0


def test_labels_may_be_in_another_order_than_the_models(tokenizer):
    model = make_classifier(tokenizer, ("other", "animal", "number")).eval()
    results, logits = evaluate(model, tokenizer, texts(30))
    names = np.array(["other", "animal", "number"])[logits.argmax(-1)]
    assert results["accuracy"] == pytest.approx((names == np.array(texts(30)["label"])).mean())
    assert results["parameters"] == model.num_parameters()
    with pytest.raises(UserError, match="does not know"):
        evaluate(make_classifier(tokenizer, ("x", "y", "z")).eval(), tokenizer, texts(30))


def test_submissions_have_the_form_of_glue(tmp_path):
    file = write_submission(tmp_path, "rte", np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert file.name == "RTE.tsv"
    assert file.read_text() == "index\tprediction\n0\tentailment\n1\tnot_entailment\n"
    assert write_submission(tmp_path, "cola", np.array([[0.0, 1.0]])).read_text().endswith("0\t1\n")
    numbers = write_submission(tmp_path, "stsb", np.array([[-1.0], [2.34567], [9.0]])).read_text().splitlines()
    assert numbers[1:] == ["0\t0.000", "1\t2.346", "2\t5.000"]


def test_a_models_order_of_classes_is_brought_to_glues(tokenizer, monkeypatch):
    names = ("contradiction", "entailment", "neutral")  # as fine-tuning on labels as texts makes it
    always = np.tile([0.0, 1.0, 0.0], (3, 1))
    np.testing.assert_array_equal(in_order_of("mnli_matched", always, names), np.tile([1.0, 0.0, 0.0], (3, 1)))
    np.testing.assert_array_equal(in_order_of("rte", always[:, 1:], ("LABEL_0", "LABEL_1")), always[:, 1:])
    for task in ("rte", "stsb"):
        with pytest.raises(UserError, match=f"`{task}`"):
            in_order_of(task, always, names)

    monkeypatch.setattr(glue, "predict", lambda *arguments: (np.tile([1.0, 0.0], (4, 1)), 1.0))
    model = make_classifier(tokenizer, ("equivalent", "not_equivalent"))
    rows = texts(4).remove_columns("label").add_column("label", [1, 1, 0, 1])  # GLUE's numbers
    results, _ = evaluate(model, tokenizer, rows, task="mrpc")
    assert results["f1"] == pytest.approx(official.f1_score([1, 1, 0, 1], [1, 1, 1, 1]))
    assert results["accuracy"] == pytest.approx(0.75)


def test_rows_without_labels_cannot_be_scored(tokenizer):
    with pytest.raises(UserError, match="No row has a label"):
        evaluate(make_classifier(tokenizer).eval(), tokenizer, texts(4).remove_columns("label"))


def test_the_table_has_a_line_per_model():
    text = table({"student": {"accuracy": 0.5, "parameters": 2e6}, "teacher": {"accuracy": 1.0, "pearson": 0.1}})
    assert text.splitlines()[1].split() == ["student", "50.00", "2.0M", "-"]
    assert len(text.splitlines()) == 3
    assert NAMES[0] not in text
