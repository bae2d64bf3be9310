"""Teachers answer with logits and with what their last linear layer reads, whatever the architecture."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from llmdistill import store
from llmdistill.store import AnswerStore
from llmdistill.teachers.encoder import EncoderTeacher, ask

COMMON = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig, SIZES),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, SIZES),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig,
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "electra": (ElectraForSequenceClassification, ElectraConfig, SIZES | {"embedding_size": 8}),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config, SIZES),
    "llama": (LlamaForSequenceClassification, LlamaConfig, SIZES),
}


def make(name: str):
    torch.manual_seed(0)
    kind, config, sizes = MODELS[name]
    return kind(config(**COMMON, **sizes)).eval()


def make_inputs(rows: int = 5):
    ids = torch.randint(1, 50, (rows, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_weight_times_the_embedding(name):
    model, inputs = make(name), make_inputs()
    teacher = EncoderTeacher(model, {key: values[:1] for key, values in inputs.items()})
    logits, embeddings = teacher.answer(inputs)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**inputs).logits)
    head = model.score if name == "llama" else getattr(model.classifier, "out_proj", model.classifier)
    bias = 0 if head.bias is None else head.bias.detach()
    torch.testing.assert_close(embeddings @ teacher.weight.T + bias, logits)
    assert not embeddings.requires_grad


def test_a_head_that_is_not_linear_at_its_end_is_refused():
    model = make("bert")
    model.classifier.register_forward_hook(lambda layer, arguments, output: output.exp())
    with pytest.raises(ValueError, match="does not end in a linear layer that makes its 3 logits"):
        EncoderTeacher(model, make_inputs())


def test_answers_are_those_of_the_rows_whatever_the_batches_and_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PIECE_ROWS", 4)
    inputs, model = make_inputs(10), make("bert")
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
    tokens = Dataset.from_dict({"input_ids": rows})
    teacher = EncoderTeacher(model, inputs)

    def pad(batch):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in batch], True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    answers = AnswerStore(tmp_path, "x", 10)
    ask(teacher, tokens, pad, answers, batch_size=3, rank=1, ranks=2)
    assert answers.missing() == [0, 2]
    ask(teacher, tokens, pad, answers, batch_size=3, rank=0, ranks=2)
    logits, embeddings = (
        torch.cat([answers.read(number)[name] for number in range(3)]) for name in ("logits", "embeddings")
    )
    expected = teacher.answer(inputs)
    torch.testing.assert_close(logits, expected[0])
    torch.testing.assert_close(embeddings, expected[1])
    monkeypatch.setattr(teacher, "answer", lambda inputs: pytest.fail("asked again"))
    ask(teacher, tokens, pad, answers, batch_size=3)
