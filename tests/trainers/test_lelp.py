"""The LELP trainer on tiny encoders: its targets, its exactness, its controls."""

import pytest
import torch
from encoders import NAMES, make_classifier, texts
from safetensors.torch import load_file

from llmdistill import classifiers
from llmdistill.objectives.lelp import class_logits, fit_directions, subclass_logits, subclass_targets
from llmdistill.teachers.encoder import EncoderTeacher
from llmdistill.trainers import lelp_targets
from llmdistill.trainers.lelp import LelpConfig, LelpTrainer
from llmdistill.trainers.lelp_targets import subclass_numbers


def make_student(tokenizer, each: int = 3, names=NAMES):
    student = make_classifier(tokenizer, classifiers.head_labels(names, each), seed=2)
    student.config.num_subclasses = each
    return student


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """A function that builds a trainer of a 2-layer student under a 4-layer teacher."""

    def make(folder: str = "run", student=None, teacher=None, rows=None, held_out=None, each: int = 3, **settings):
        defaults = {
            "output_dir": str(tmp_path / folder),
            "answers_folder": str(tmp_path / "answers"),
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "num_subclasses": 3,
            "max_length": 32,
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return LelpTrainer(
            student or make_student(tokenizer, each),
            teacher or make_classifier(tokenizer, layers=4, hidden=48, seed=1),
            LelpConfig(**(defaults | settings)),
            tokenizer,
            train_dataset=texts() if rows is None else rows,
            eval_dataset=held_out,
        )

    return make


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def targets(trainer, each: int = 3) -> torch.Tensor:
    return torch.tensor(trainer.train_dataset["targets"][:]).unflatten(-1, (3, each))


def teacher_answers(tokenizer, rows=None):
    """Labels, logits, embeddings and weight of the teacher on the training rows, asked directly."""
    rows = texts() if rows is None else rows
    inputs = tokenizer(rows["text"][:], padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    teacher = EncoderTeacher(make_classifier(tokenizer, layers=4, hidden=48, seed=1).eval(), inputs)
    labels = torch.tensor([NAMES.index(name) for name in rows["label"]])
    return labels, *teacher.answer(inputs), teacher.weight


def test_targets_are_those_of_the_objective(make_trainer, tokenizer):
    trainer = make_trainer(temperature=2.0, subclass_temperature=0.5, seed=7)
    labels, logits, embeddings, weight = teacher_answers(tokenizer)
    fitted = fit_directions(embeddings, labels, weight, 3, seed=7)
    expected = subclass_targets(logits, subclass_logits(embeddings, fitted), 2.0, 0.5)
    torch.testing.assert_close(targets(trainer), expected.float(), rtol=1e-3, atol=1e-5)
    assert trainer.train_dataset["labels"][:] == labels.tolist()


def test_the_loss_is_the_textbook_one(make_trainer):
    trainer = make_trainer(temperature=2.0, label_weight=0.3)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(8))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    soft = -4 * (batch["targets"] * (logits / 2).log_softmax(-1)).sum(-1).mean()
    classes = logits.softmax(-1).unflatten(-1, (3, 3)).sum(-1)
    hard = -classes[torch.arange(8), batch["labels"]].log().mean()
    torch.testing.assert_close(ours, 0.7 * soft + 0.3 * hard)


def test_the_student_learns(make_trainer):
    trainer = make_trainer(max_steps=30, label_weight=0.5)
    trainer.train()
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(48)])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert (class_logits(logits, 3).argmax(-1) == inputs["labels"]).float().mean() > 0.9
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize(
    ("kind", "each", "settings"),
    [
        ("vanilla", 1, {}),
        ("uniform_split", 3, {}),
        ("random_split", 3, {}),
        ("oracle_subclasses", 4, {"subclass_column": "kind"}),
    ],
)
def test_controls_keep_the_teachers_classes(make_trainer, tokenizer, kind, each, settings):
    trainer = make_trainer(targets=kind, each=each, temperature=2.0, **settings)
    _, logits, _, _ = teacher_answers(tokenizer)
    found = targets(trainer, each)
    torch.testing.assert_close(found.sum(-1), (logits / 2).softmax(-1), rtol=1e-4, atol=1e-5)
    if kind == "uniform_split":
        torch.testing.assert_close(found, found.mean(-1, keepdim=True).expand_as(found))
    if kind == "random_split":
        assert found.std(-1).min() > 0
    trainer.train()


def test_the_true_subclass_gets_all_of_its_own_class(make_trainer):
    rows = texts()
    trainer = make_trainer(targets="oracle_subclasses", each=4, subclass_column="kind")
    found = targets(trainer, 4)
    for row, label, kind in zip(range(48), trainer.train_dataset["labels"], rows["kind"], strict=True):
        kinds = sorted({one for one, name in zip(rows["kind"], rows["label"], strict=True) if name == NAMES[label]})
        assert found[row, label].count_nonzero() == 1
        assert found[row, label].argmax() == kinds.index(kind)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4)])
def test_accumulation_changes_nothing(make_trainer, batch, accumulation):
    settings = {"optim": "sgd", "label_weight": 0.3, "learning_rate": 0.1}
    whole, parts = (
        make_trainer(per_device_train_batch_size=rows, gradient_accumulation_steps=steps, **settings)
        for rows, steps in ((8, 1), (batch, accumulation))
    )
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for (name, one), other in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6, msg=name)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_trainer):
    whole = make_trainer("whole", max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make_trainer("resumed", max_steps=6)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


def test_the_teacher_is_asked_once_for_all_runs(make_trainer, monkeypatch):
    first = make_trainer("first")
    monkeypatch.setattr(EncoderTeacher, "answer", lambda *arguments: pytest.fail("asked again"))
    second = make_trainer("second", subclass_temperature=0.5)
    assert not torch.allclose(targets(first), targets(second))
    with pytest.raises(BaseException, match="asked again"):
        make_trainer("third", rows=texts(seed=3))


def test_saved_directions_are_used_again_and_only_for_the_same_run(make_trainer, tmp_path, monkeypatch):
    first = make_trainer()
    saved = load_file(tmp_path / "run" / lelp_targets.DIRECTIONS)
    assert saved["directions"].shape == (3, 48, 3)
    monkeypatch.setattr(lelp_targets, "directions_from", lambda *arguments: pytest.fail("fitted again"))
    torch.testing.assert_close(targets(make_trainer()), targets(first), rtol=0, atol=0)
    with pytest.raises(BaseException, match="fitted again"):
        make_trainer(seed=5)


def test_other_labels_are_fitted_anew(make_trainer):
    first = make_trainer()
    shifted = texts().map(lambda row: {"label": NAMES[(NAMES.index(row["label"]) + 1) % 3]})
    second = make_trainer(rows=shifted)
    fresh = make_trainer("fresh", rows=shifted)
    assert not torch.allclose(targets(first), targets(second))
    torch.testing.assert_close(targets(second), targets(fresh), rtol=0, atol=0)


def test_the_students_outputs_must_be_those_of_the_settings(make_trainer, tokenizer):
    with pytest.raises(ValueError, match="`targets: lelp` needs 3 outputs of the student for each class, it has 4"):
        make_trainer(student=make_student(tokenizer, 4))


def test_rows_without_labels_are_grouped_by_the_teachers_choice(make_trainer, tokenizer):
    trainer = make_trainer(rows=texts(240).remove_columns("label"), targets="uniform_split")
    _, logits, _, _ = teacher_answers(tokenizer, texts(240))
    assert trainer.train_dataset["labels"][:] == logits.argmax(-1).tolist()
    with pytest.raises(ValueError, match="240 of 240 rows have no label: set `label_weight` to 0"):
        make_trainer(rows=texts(240).remove_columns("label"), label_weight=0.1)


def test_classes_in_another_order_are_permuted(make_trainer, tokenizer):
    order = ("other", "animal", "number")
    plain = make_trainer()
    permuted = make_trainer("permuted", student=make_student(tokenizer, names=order))
    indices = [NAMES.index(name) for name in order]
    torch.testing.assert_close(targets(permuted).sum(-1), targets(plain).sum(-1)[:, indices])
    assert [order[label] for label in permuted.train_dataset["labels"]] == texts()["label"][:]
    with pytest.raises(ValueError, match="classes that the model does not know: number"):
        make_trainer(student=make_student(tokenizer, names=("animal", "figure", "other")))


def test_the_teacher_is_frozen_and_unchanged(make_trainer, tokenizer):
    teacher = make_classifier(tokenizer, layers=4, hidden=48, seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    make_trainer(teacher=teacher).train()
    assert not teacher.training
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_predictions_are_of_classes(make_trainer):
    trainer = make_trainer()
    assert trainer.predict(trainer.train_dataset).predictions.shape == (48, 3)


def test_evaluation_is_the_mean_over_all_rows(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=5)
    once = make_trainer(per_device_eval_batch_size=48).evaluate(trainer.train_dataset)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(once["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"label_weight": 1.0}, r"must lie in \[0, 1\)"),
        ({"teacher_batch_size": 0}, "`teacher_batch_size` must be at least 1"),
        ({"num_subclasses": 0}, "`num_subclasses` must be at least 1"),
        ({"targets": "oracle_subclasses"}, "`subclass_column` goes with"),
        ({"subclass_column": "kind"}, "`subclass_column` goes with"),
        ({"targets": "lepl"}, "`targets` is `lepl`. Did you mean `lelp`"),
    ],
)
def test_impossible_settings_are_refused_at_once(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        LelpConfig(output_dir=str(tmp_path), **settings)


def test_a_class_with_too_few_rows_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"3 subclasses need at least 4 rows in every class; class 2 has 3.*2 other"):
        make_trainer(rows=texts(11))


def test_a_true_subclass_that_training_never_saw_is_refused(make_trainer):
    settings = {"targets": "oracle_subclasses", "each": 4, "subclass_column": "kind"}
    with pytest.raises(ValueError, match="which no training row of its class has"):
        make_trainer(rows=texts(12), held_out=texts(96, seed=4), **settings)


def test_numbers_of_subclasses():
    assert subclass_numbers([(1, "b"), (0, "z"), (1, "a"), (1, "b")]) == {(0, "z"): 0, (1, "a"): 0, (1, "b"): 1}
