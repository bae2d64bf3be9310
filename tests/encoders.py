"""Tiny encoders and labelled texts, made in milliseconds."""

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

NAMES = ("animal", "number", "other")
WORDS = {"animal": "fox dog lazy jumps", "number": "one two three four", "other": "apples quick brown over"}


def make_classifier(tokenizer, labels=NAMES, layers: int = 2, hidden: int = 32, seed: int = 0, **options):
    """A tiny BERT under a classification head; equal arguments give equal weights."""
    torch.manual_seed(seed)
    names = dict(enumerate(labels))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        problem_type="single_label_classification",
        **options,
    )
    return BertForSequenceClassification(config)


def make_texts(count: int = 48, seed: int = 0, names=NAMES) -> list[dict]:
    """Texts of different lengths that hold words of their class, and a kind within it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(items: list[str], number: int) -> list[str]:
        return [items[int(index)] for index in torch.randint(0, len(items), (number,), generator=generator)]

    rows = []
    for number in range(count):
        label = names[number % len(names)]
        words = WORDS[label].split()
        length = int(torch.randint(2, 9, (1,), generator=generator))
        first = draw(words, 1)
        rows.append({"sentence": " ".join(first + draw(words, length)), "label": label, "kind": first[0]})
    return rows


def texts(count: int = 48, **options) -> Dataset:
    """The same as a data set with the columns `text`, `label` and `kind`."""
    return Dataset.from_list(make_texts(count, **options)).rename_column("sentence", "text")
