"""The trainer of intermediate distillation on tiny encoders."""

import math

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from encoders import NAMES, make_classifier, texts

from llmdistill import classifiers
from llmdistill.objectives.features import FEATURES
from llmdistill.objectives.mutual_information import mi_alpha
from llmdistill.students.heads import BOUNDS, layer_pairs
from llmdistill.trainers import mi_alpha as mi_alpha_trainer
from llmdistill.trainers.mi_alpha import MiAlphaConfig, MiAlphaTrainer


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """A function that builds a trainer of a 2-layer student under a wider 4-layer teacher."""

    def make(folder: str = "run", student=None, teacher=None, rows=None, teacher_tokenizer=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "max_length": 32,
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return MiAlphaTrainer(
            student or make_classifier(tokenizer, seed=2),
            teacher or make_classifier(tokenizer, layers=4, hidden=48, seed=1),
            MiAlphaConfig(**(defaults | settings)),
            tokenizer,
            teacher_tokenizer,
            train_dataset=texts() if rows is None else rows,
        )

    return make


def logged(trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def one_batch(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_loss_is_the_textbook_one(make_trainer, pooling):
    trainer = make_trainer(
        alpha=0.6, pooling=pooling, label_weight=0.5, logit_weight=2.0, intermediate_weight=0.3, temperature=2.0
    )
    batch = one_batch(trainer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(8))

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student, teacher = (
        model(**inputs, output_hidden_states=True) for model in (trainer.model.student, trainer.teacher)
    )
    expected = 0.5 * torch.nn.functional.cross_entropy(student.logits, batch["labels"])
    log_probs, probs = (student.logits / 2).log_softmax(-1), (teacher.logits / 2).softmax(-1)
    expected = expected - 2.0 * 4 * (probs * log_probs).sum(-1).mean()
    for pair, (own, their) in enumerate([(1, 2), (2, 4)]):
        states = []
        for output, layer in ((student, own), (teacher, their)):
            rows = [state[mask.bool()] for state, mask in zip(output.hidden_states[layer], inputs["attention_mask"])]  # noqa: B905
            states.append(torch.stack([row[0] if pooling == "first" else row.mean(0) for row in rows]))
        heads = trainer.model.heads
        scores = heads["teacher"][pair](states[1]) @ heads["student"][pair](states[0]).T
        expected = expected - 0.3 * mi_alpha(scores, heads["baseline"][pair](states[1])[:, 0], 0.6)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("objective", [*BOUNDS, *FEATURES, "vid"])
def test_every_objective_falls_while_training(make_trainer, objective):
    settings = {"label_weight": 0.0, "logit_weight": 0.0, "max_steps": 25, "learning_rate": 3e-3}
    trainer = make_trainer(objective=objective, **settings)
    trainer.train()
    values = logged(trainer, "intermediate")
    assert sum(values[-5:]) < sum(values[:5])


def test_plain_distillation_has_no_heads(make_trainer):
    trainer = make_trainer(objective="none")
    assert not trainer.model.head_parameters()
    trainer.train()
    assert set(trainer.state.log_history[0]) >= {"label_loss", "logit_loss"}
    assert "intermediate" not in trainer.state.log_history[0]


def test_bounds_are_logged_with_their_limit(make_trainer):
    trainer = make_trainer()
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["mi_log_negatives"] == pytest.approx(math.log(7), rel=1e-5)
    assert first["mi"] == pytest.approx(1 + first["mi_joint"] - first["mi_marginal"], rel=1e-4)
    assert first["intermediate"] == pytest.approx(-2 * first["mi"], rel=1e-4)


def test_a_saturated_bound_is_a_warning(make_trainer, monkeypatch):
    monkeypatch.setattr(mi_alpha_trainer, "SATURATED", 0.3)
    settings = {"label_weight": 0.0, "logit_weight": 0.0, "learning_rate": 3e-3, "alpha": 1.0}
    with pytest.warns(UserWarning, match=r"nats, of at most 0\.69 with so many negatives"):
        make_trainer(per_device_train_batch_size=3, max_steps=100, **settings).train()


@pytest.mark.parametrize("objective", ["mse", "pkd"])
def test_accumulation_changes_nothing_where_rows_stand_alone(make_trainer, objective):
    settings = {"optim": "sgd", "objective": objective, "learning_rate": 0.05}
    whole = make_trainer(per_device_train_batch_size=8, **settings)
    parts = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    whole.train()
    parts.train()
    assert logged(parts) == pytest.approx(logged(whole), rel=1e-5)
    for (name, one), other in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6, msg=name)


def test_a_bound_over_accumulation_is_the_mean_of_its_batches(make_trainer):
    settings = {"label_weight": 0.0, "logit_weight": 0.0, "max_steps": 1, "train_sampling_strategy": "sequential"}
    parts = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    singles = [
        make_trainer(per_device_train_batch_size=4, rows=texts().select(range(start, start + 4)), **settings)
        for start in (0, 4)
    ]
    for trainer in (parts, *singles):
        trainer.train()
    expected = sum(logged(single, "mi")[0] for single in singles) / 2
    assert logged(parts, "mi")[0] == pytest.approx(expected, rel=1e-5)
    assert logged(parts, "mi_log_negatives")[0] == pytest.approx(math.log(3), rel=1e-5)


@pytest.mark.parametrize("objective", ["mi_alpha", "vid"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_trainer, objective):
    settings = {"max_steps": 6, "objective": objective, "critic_learning_rate": 3e-3}
    whole = make_trainer("whole", save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = make_trainer("resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert logged(resumed) == logged(whole)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


def test_critics_have_a_learning_rate_of_their_own(make_trainer):
    trainer = make_trainer(critic_learning_rate=0.0, objective="mse")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not moved & trainer.model.head_parameters()


def test_heads_are_those_of_the_seed(make_trainer):
    first, again, other = (make_trainer(seed=seed).model.heads.state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not all(torch.equal(other[name], value) for name, value in first.items())


def test_activation_checkpointing_changes_nothing(make_trainer):
    plain, checkpointed = make_trainer(), make_trainer("checkpointed", activation_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert logged(checkpointed) == pytest.approx(logged(plain), rel=1e-5)


def test_rows_that_fill_no_batch_are_refused(make_trainer):
    with pytest.raises(ValueError, match="5 training rows do not fill one batch of 8"):
        make_trainer(rows=texts(5))


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"objective": "info_nce"}, math.log(8)),
        ({"alpha": 1.0}, math.log(7)),
        ({"alpha": 0.5}, 1 + math.log(14)),
        ({"alpha": 0.0}, math.inf),
        ({"objective": "nwj"}, math.inf),
    ],
)
def test_every_bound_has_its_own_largest_value(make_trainer, settings, limit):
    trainer = make_trainer(**settings)
    trainer.train()
    assert trainer._limit == pytest.approx(limit)


def test_each_model_reads_its_own_encoding(make_trainer):
    other = make_tokenizer("entirely different words and other merges " * 3)
    teacher = make_classifier(other, layers=4, hidden=48, seed=1)
    trainer = make_trainer(teacher=teacher, teacher_tokenizer=other, max_length=64)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    assert batch["teacher_input_ids"].shape[1] != batch["input_ids"].shape[1]
    theirs = {name.removeprefix("teacher_"): batch[name] for name in ("teacher_input_ids", "teacher_attention_mask")}
    logits, features = trainer._ask(theirs)
    inputs = other(texts()["text"][0], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = teacher(**inputs, output_hidden_states=True)
    torch.testing.assert_close(logits[0], expected.logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[1, 0], expected.hidden_states[4][0, 0], rtol=1e-4, atol=1e-5)
    trainer.train()


def test_numbers_can_be_predicted(make_trainer, tokenizer, tmp_path):
    make_classifier(tokenizer, layers=4, hidden=48, seed=1).save_pretrained(tmp_path / "teacher")
    make_classifier(tokenizer, seed=2).save_pretrained(tmp_path / "student")
    models = {name: classifiers.new(str(tmp_path / name), None) for name in ("teacher", "student")}
    rows = Dataset.from_dict({"text": texts()["text"][:], "label": [float(n) / 7 for n in range(48)]})
    with pytest.raises(ValueError, match="set `logit_loss: mse`"):
        make_trainer(rows=rows, **models)
    trainer = make_trainer(rows=rows, logit_loss="mse", **models)
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_label_loss"] > 0


def test_rows_without_labels_teach_where_labels_do_not_count(make_trainer):
    rows = texts().remove_columns("label")
    make_trainer(rows=rows, label_weight=0.0).train()
    with pytest.raises(ValueError, match="48 of 48 rows have no label"):
        make_trainer(rows=rows)


@pytest.mark.parametrize("others", [1.0, 0.0])
def test_evaluation_takes_every_row(make_trainer, others):
    settings = {"label_weight": others, "logit_weight": others}
    trainer = make_trainer(per_device_eval_batch_size=47, **settings)  # the last row is alone
    whole = make_trainer(per_device_eval_batch_size=48, **settings)
    ours, theirs = (one.evaluate(one.train_dataset) for one in (trainer, whole))
    if others:
        assert ours["eval_label_loss"] == pytest.approx(theirs["eval_label_loss"], rel=1e-5)
    expected = sum(value for name, value in theirs.items() if name in ("eval_label_loss", "eval_logit_loss"))
    assert theirs["eval_loss"] == pytest.approx(expected * others + theirs["eval_intermediate"], rel=1e-5)


def test_classes_in_another_order_are_permuted(make_trainer, tokenizer):
    order = ("other", "animal", "number")
    trainer = make_trainer(student=make_classifier(tokenizer, order, seed=2))
    batch = one_batch(trainer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own_order = trainer.teacher(**inputs).logits
    torch.testing.assert_close(trainer._ask(inputs)[0], own_order[:, [NAMES.index(name) for name in order]])


def test_layer_pairs():
    assert layer_pairs(2, 4, "skip") == [(1, 2), (2, 4)]
    assert layer_pairs(3, 12, "last") == [(1, 10), (2, 11), (3, 12)]
    assert layer_pairs(4, 6, "skip") == [(1, 1), (2, 3), (3, 4), (4, 6)]
    with pytest.raises(ValueError, match="has 5 layers, the teacher only 4"):
        layer_pairs(5, 4, "skip")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"alpha": 1.5}, r"`alpha` must lie in \[0, 1\]"),
        ({"per_device_train_batch_size": 1}, "a batch of one has no false pairs"),
        ({"logit_weight": -1.0}, "`logit_weight` must not be negative"),
        ({"label_weight": 0.0, "logit_weight": 0.0, "intermediate_weight": 0.0}, "all weights are 0"),
        ({"label_weight": 0.0, "logit_weight": 0.0, "objective": "none"}, "all weights are 0"),
        ({"critic_learning_rate": -1.0}, "`critic_learning_rate` must not be negative"),
        ({"objective": "mee"}, "`objective` is `mee`. Did you mean `mse`"),
    ],
)
def test_impossible_settings_are_refused_at_once(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        MiAlphaConfig(output_dir=str(tmp_path), **settings)
