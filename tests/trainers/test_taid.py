"""The TAID trainer on tiny models: the right loss, exactly repeatable, and nothing else touched."""

import copy
import json

import pytest
import torch
from conftest import make_rows, make_tokenizer
from datasets import Dataset
from watch import LargestTensor

from llmdistill import checkpoints
from llmdistill.data.language import IGNORE_INDEX
from llmdistill.objectives.divergences import DIVERGENCES, cross_entropy, forward_kl
from llmdistill.objectives.taid import interpolate_logits
from llmdistill.trainers.common import training_summary
from llmdistill.trainers.taid import TaidConfig, TaidTrainer


@pytest.fixture
def make_trainer(make_model, tokenizer, tokenized, tmp_path):
    """A function that builds a trainer of a 2-layer student under a 4-layer teacher."""

    def make(folder: str = "run", student=None, teacher=None, tokenizers=None, dataset=None, extra=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "schedule": "linear",
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        own, others = tokenizers or (tokenizer, tokenizer)
        return TaidTrainer(
            student or make_model(2, 32, seed=2),
            teacher or make_model(4, 48, seed=1),
            TaidConfig(**(defaults | settings)),
            processing_class=own,
            teacher_processing_class=others,
            train_dataset=tokenized if dataset is None else dataset,
            **(extra or {}),
        )

    return make


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def shares(trainer) -> list[float]:
    return [entry["t"] for entry in trainer.state.log_history if "t" in entry]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def one_batch(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def dense_loss(trainer, batch, function, t=None) -> torch.Tensor:
    """The textbook form on full logits of both models."""
    labels = batch["labels"][:, 1:]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    student_logits = trainer.model(**inputs).logits[:, :-1]
    with torch.no_grad():
        teacher_logits = trainer.teacher.model(**inputs).logits[:, :-1]
    target = teacher_logits if t is None else interpolate_logits(student_logits, teacher_logits, t)
    counted = labels != IGNORE_INDEX
    return function(student_logits, target)[counted].mean()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_and_its_gradient_are_the_dense_ones(make_trainer, name):
    trainer = make_trainer(divergence=name)
    trainer.on_train_begin(10)
    batch = one_batch(trainer)
    trainer.model.train()
    num_items = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    theirs = dense_loss(trainer, batch, DIVERGENCES[name], t=0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    parameters = list(trainer.model.parameters())
    for our_gradient, their_gradient in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        assert (our_gradient - their_gradient).norm() <= 1e-4 * their_gradient.norm()


def test_reference_mode_takes_the_authors_cross_entropy(make_trainer):
    trainer = make_trainer(schedule="reference")
    trainer.on_train_begin(10)
    batch = one_batch(trainer)
    trainer.model.train()
    num_items = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    torch.testing.assert_close(
        ours, dense_loss(trainer, batch, cross_entropy, t=trainer.schedule.t), rtol=1e-5, atol=0
    )


def test_label_weight_mixes_in_the_cross_entropy_of_labels(make_trainer):
    trainer = make_trainer(label_weight=0.3, schedule="constant", t_start=1.0)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            mixed = 0.7 * entry["distillation"] + 0.3 * entry["label_loss"]
            assert entry["loss"] == pytest.approx(mixed, rel=1e-4)


def test_label_weight_one_is_fine_tuning_without_a_teacher(make_trainer):
    from trl import SFTConfig, SFTTrainer

    ours = make_trainer(label_weight=1.0, train_sampling_strategy="sequential")
    assert ours.teacher is None
    reference = SFTTrainer(
        make_trainer().model,
        SFTConfig(**{name: getattr(ours.args, name) for name in SHARED_SETTINGS}, output_dir=ours.args.output_dir),
        processing_class=ours.processing_class,
        train_dataset=ours.train_dataset,
    )
    ours.train()
    reference.train()
    assert losses(ours) == pytest.approx(losses(reference), rel=1e-4)


SHARED_SETTINGS = (
    "per_device_train_batch_size", "max_steps", "learning_rate", "bf16", "logging_steps", "save_strategy", "report_to",
    "disable_tqdm", "use_cpu", "train_sampling_strategy", "activation_checkpointing",
)  # fmt: skip


def test_student_like_teacher_has_no_loss_and_no_gradient(make_trainer, make_model):
    same = {"student": make_model(2, 32, seed=7), "teacher": make_model(2, 32, seed=7)}
    trainer = make_trainer(**same, optim="sgd")  # Adam would blow rounding errors up to whole steps
    trainer.train()
    assert losses(trainer) == pytest.approx([0.0] * 4, abs=1e-6)
    assert all(entry["grad_norm"] < 1e-5 for entry in trainer.state.log_history if "grad_norm" in entry)


def test_the_student_learns(make_trainer):
    trainer = make_trainer(max_steps=60, learning_rate=3e-2, schedule="constant", t_start=1.0)
    trainer.train()
    assert sum(losses(trainer)[-6:]) < 0.8 * sum(losses(trainer)[:6])


def test_the_teacher_is_frozen_silent_and_unchanged(make_trainer, make_model):
    teacher = make_model(4, 48, seed=1, attention_dropout=0.5)
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(teacher=teacher)
    trainer.train()
    assert not trainer.teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 4), (4, 2), (1, 8)])
def test_accumulation_changes_nothing(make_trainer, tokenized, batch, accumulation):
    rows = tokenized.select(range(21))  # no multiple of a step

    def run(batch: int, accumulation: int):
        trainer = make_trainer(
            dataset=rows,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_steps=5,
        )
        trainer.train()
        return trainer

    whole, divided = run(8, 1), run(batch, accumulation)
    assert losses(divided) == pytest.approx(losses(whole), rel=1e-5)
    assert shares(divided) == shares(whole)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(divided)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["adaptive", "linear", "reference"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_trainer, schedule):
    settings = {
        "max_steps": 9,  # 24 rows in steps of 4: into the second epoch
        "schedule": schedule,
        "t_step_size": 0.5,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 5,
    }
    whole = make_trainer("whole", **settings)
    whole.train()
    resumed = make_trainer("resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert losses(resumed) == losses(whole)
    assert shares(resumed) == shares(whole)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=0)


def test_t_steps_once_per_optimizer_step_from_the_mean_loss(make_trainer):
    trainer = make_trainer(schedule="adaptive", t_step_size=0.5, gradient_accumulation_steps=2, max_steps=6)
    seen = []
    trainer.on_train_begin, begin = (lambda num_steps: (begin(num_steps), watch())), trainer.on_train_begin

    def watch():
        step = trainer.schedule.step
        trainer.schedule.step = lambda loss, global_step: seen.append((loss, global_step)) or step(loss, global_step)

    trainer.train()
    assert [global_step for _, global_step in seen] == list(range(6))
    assert [loss for loss, _ in seen] == pytest.approx(losses(trainer), rel=1e-5)


def test_evaluation_leaves_t_alone_and_measures_against_the_teacher_itself(make_trainer, tokenized):
    settings = {"schedule": "adaptive", "t_step_size": 0.5, "max_steps": 6}
    plain = make_trainer("plain", **settings)
    plain.train()
    evaluated = make_trainer(
        "evaluated", eval_strategy="steps", eval_steps=1, extra={"eval_dataset": tokenized}, **settings
    )
    evaluated.train()
    assert shares(evaluated) == shares(plain)
    assert losses(evaluated) == losses(plain)

    evaluated.model.eval()
    values, counts = [], []
    for row in tokenized:
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        values.append(dense_loss(evaluated, batch, forward_kl).item())
        counts.append(sum(label != IGNORE_INDEX for label in row["labels"]))
    expected = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    assert evaluated.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)  # not a mean of batch means


def test_a_batch_without_labels_is_a_finite_zero(make_trainer):
    trainer = make_trainer(label_weight=0.3)
    trainer.on_train_begin(10)
    batch = one_batch(trainer)
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    for parameter in trainer.model.parameters():
        assert (parameter.grad == 0).all()


def test_mixed_precision_reaches_the_loss(make_trainer, monkeypatch):
    seen = []

    def watched(student_logits, target_logits):
        seen.append(student_logits.dtype)
        return forward_kl(student_logits, target_logits)

    exact = make_trainer("exact", schedule="constant", t_start=1.0)
    mixed = make_trainer("mixed", schedule="constant", t_start=1.0, bf16=True)
    monkeypatch.setitem(DIVERGENCES, "forward_kl", watched)
    for trainer, dtype in ((exact, torch.float32), (mixed, torch.bfloat16)):
        seen.clear()
        trainer.train()
        assert set(seen) == {dtype}
    assert losses(mixed) == pytest.approx(losses(exact), rel=0.03)
    assert all(parameter.dtype == torch.float32 for parameter in mixed.model.parameters())


def test_activation_checkpointing_changes_nothing(make_trainer):
    plain = make_trainer("plain")
    checkpointed = make_trainer("checkpointed", activation_checkpointing=True)
    for trainer in (plain, checkpointed):
        trainer.train()
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-6)


def test_prompt_tuning_would_shift_the_labels_and_is_refused(make_trainer):
    from peft import PromptTuningConfig

    virtual = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="are labelled"):
        make_trainer(extra={"peft_config": virtual}).train()


def test_a_non_finite_loss_does_not_move_t(make_trainer):
    trainer = make_trainer(schedule="adaptive", t_step_size=0.5)
    trainer.on_train_begin(10)
    trainer.schedule.step(2.0, 0)
    trainer.state.global_step = 2
    before = trainer.schedule.t
    trainer.on_step({"distillation": float("nan")})
    assert trainer.schedule.t == before


def test_lora_students_train_their_adapters_only(make_trainer):
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(max_steps=30, schedule="constant", t_start=1.0, extra={"peft_config": adapters})
    before = weights(trainer)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_padded_heads_are_cropped_to_the_shared_ids(make_trainer, make_model, tokenizer, caplog):
    size = len(tokenizer)
    teacher = make_model(4, 48, seed=1, vocab_size=size + 11)
    trainer = make_trainer(student=make_model(2, 32, seed=2, vocab_size=size + 5), teacher=teacher, max_steps=2)
    assert f"cropped to the {size + 5:,} ids" in caplog.text
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


def test_heads_of_different_size_need_the_teachers_tokenizer(make_trainer, make_model, tokenizer):
    with pytest.raises(ValueError, match="teacher_processing_class"):
        make_trainer(teacher=make_model(4, 48, vocab_size=len(tokenizer) + 8), tokenizers=(tokenizer, None))
    with pytest.warns(UserWarning, match="Nothing proves"):
        make_trainer(tokenizers=(tokenizer, None))


def test_another_vocabulary_is_refused(make_trainer, tokenizer):
    other = make_tokenizer("entirely different words with other merges " * 3)
    with pytest.raises(ValueError, match=r"different vocabularies.*id 261"):
        make_trainer(tokenizers=(tokenizer, other))


CONVERSATION = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
TEXTS = [{"prompt": "one two", "completion": " three"}, {"prompt": "four", "completion": " five six"}]


@pytest.mark.parametrize("mask", ["assistant", "all"])
@pytest.mark.parametrize("shape", ["conversations", "texts", "messages", "text"])
def test_raw_rows_as_in_trl(make_trainer, make_model, tokenizer, shape, mask):
    from trl import SFTConfig, SFTTrainer

    template = tokenizer.chat_template
    rows = Dataset.from_list(
        {
            "conversations": make_rows(4),
            "texts": TEXTS,
            "messages": [{"messages": CONVERSATION}],
            "text": [{"text": row["prompt"]} for row in TEXTS],
        }[shape]
    )
    ours = make_trainer(dataset=rows, mask=mask, extra={"eval_dataset": rows})
    masks = {"completion_only_loss": mask == "assistant"} if "prompt" in rows.column_names else {}
    if shape == "messages" and mask == "assistant":
        masks = {"assistant_only_loss": True}
        answer = "{{ message['content'] + '<|end|>' }}"
        tokenizer = copy.deepcopy(tokenizer)  # TRL needs to be told in the template what an answer is
        tokenizer.chat_template = (
            "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}"
            f"{{% generation %}}{answer}{{% endgeneration %}}{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
        )
    settings = {name: getattr(ours.args, name) for name in SHARED_SETTINGS}
    theirs = SFTTrainer(
        make_model(),
        SFTConfig(**settings, output_dir=ours.args.output_dir, **masks),
        processing_class=tokenizer,
        train_dataset=rows,
    )
    assert template == ours.processing_class.chat_template
    for our_row, their_row in zip(ours.train_dataset, theirs.train_dataset, strict=True):
        assert our_row["input_ids"] == their_row["input_ids"]
        assert our_row["labels"][1:] == their_row["labels"][1:]
    assert ours.eval_dataset.to_list() == ours.train_dataset.to_list()
    assert ours.evaluate(rows)["eval_loss"] == pytest.approx(ours.evaluate()["eval_loss"])


def test_rows_that_cannot_be_told_are_refused(make_trainer, tokenized):
    with pytest.raises(ValueError, match="need `labels` too"):
        make_trainer(dataset=tokenized.remove_columns("labels"))
    with pytest.raises(ValueError, match="expected a `Dataset` with `messages`"):
        make_trainer(dataset=Dataset.from_list([{"question": "a"}]))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"t_start": 1.5}, "t_start"),
        ({"label_weight": -0.1}, "label_weight"),
        ({"divergence": "skewed_forward_kl", "divergence_options": {"skew": 2.0}}, "`skew`"),
        ({"divergence_options": {"skw": 0.1}}, "skw"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"assistant_only_loss": True}, "say `mask: assistant`"),
        ({"save_only_model": True}, "lost its optimizer"),
        ({"chat_template_path": "x"}, "chat template of the student's tokenizer"),
        ({"deepspeed": "nowhere.json"}, "nowhere.json"),
        ({"schedule": "reference", "divergence": "reverse_kl"}, "reference"),
        ({"divergence": "reverse"}, "`divergence` is `reverse`. Did you mean `reverse_kl`"),
        ({"mask": "answers"}, "`mask` is `answers`. Choices: assistant, all"),
        ({"train_sampling_strategy": "group_by_lenght"}, "Did you mean `group_by_length`"),
        ({"loss_chunk_bytes": -5}, "`loss_chunk_bytes` must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_at_once(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        TaidConfig(output_dir=str(tmp_path), **settings)


def test_outputs_and_metrics_that_need_full_logits_are_refused(make_trainer):
    with pytest.raises(ValueError, match="compute_metrics"):
        make_trainer(extra={"compute_metrics": lambda prediction: {}})


def test_an_unknown_architecture_between_trunk_and_logits_is_found_out(make_trainer, make_model):
    student = make_model(2, 32, seed=2)
    student.lm_head.register_forward_hook(lambda layer, inputs, logits: 3 * logits)
    with pytest.raises(ValueError, match="student's architecture"):
        make_trainer(student=student).train()


def test_a_diverged_student_is_told_so(make_trainer, make_model):
    student = make_model(2, 32, seed=2)
    torch.nn.init.constant_(student.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="student's logits are not finite: its training diverged"):
        make_trainer(student=student).train()


def test_checkpoints_are_closed_and_old_ones_go_only_then(make_trainer, monkeypatch):
    trainer = make_trainer(save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3)
    monkeypatch.setattr(checkpoints, "close", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    monkeypatch.undo()
    assert checkpoints.last_whole(trainer.args.output_dir) is None
    trainer = make_trainer("again", save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3)
    trainer.train()
    last = checkpoints.last_whole(trainer.args.output_dir)
    assert last.name == "checkpoint-3"
    state = json.loads((last / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["StepCallback"]["attributes"]
    assert saved["trainer"] == trainer.schedule.state_dict()
    assert 0 < saved["seconds"] <= training_summary(trainer.final_state())["seconds"]


def test_full_logits_of_neither_model_ever_exist(make_trainer, tokenizer):
    trainer = make_trainer(loss_chunk_bytes=4 * len(tokenizer) * 3, label_weight=0.2)
    trainer.on_train_begin(10)
    trainer.model.train()
    batch = one_batch(trainer)
    rows, tokens = batch["input_ids"].shape
    with LargestTensor() as watch:
        num_items = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items).backward()
    assert watch.largest < rows * tokens * len(tokenizer)


def test_packed_rows_do_not_see_each_other(make_trainer):
    settings = {"train_sampling_strategy": "sequential", "optim": "sgd", "max_steps": 1, "schedule": "constant"}
    plain = make_trainer("plain", per_device_train_batch_size=24, **settings)
    packed = make_trainer("packed", packing=True, max_length=512, per_device_train_batch_size=8, **settings)
    assert len(packed.train_dataset) < 8
    plain.train()
    packed.train()
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-4)
