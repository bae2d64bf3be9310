"""Tiny models and rows, made in milliseconds."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "golden"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog and counts one two three four five six seven eight nine ten apples"


@pytest.fixture(autouse=True)
def few_threads():
    """Tiny matrices run slower on many threads, and forked ranks share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 300 tokens with a chat template."""
    return make_tokenizer()


def make_tokenizer(text: str = TEXT) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """A function that builds a tiny Llama; equal arguments give equal weights."""

    def make(layers: int = 2, hidden: int = 32, seed: int = 0, **options) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        return LlamaForCausalLM(LlamaConfig(**(settings | options)))

    return make


def make_rows(count: int = 24, seed: int = 0) -> list[dict]:
    """Conversations of very different lengths."""
    words = TEXT.split()
    generator = torch.Generator().manual_seed(seed)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return " ".join(words[int(index)] for index in torch.randint(0, len(words), (length,), generator=generator))

    return [
        {
            "prompt": [{"role": "user", "content": text(8)}],
            "completion": [{"role": "assistant", "content": text(16)}],
        }
        for _ in range(count)
    ]


@pytest.fixture
def rows() -> list[dict]:
    return make_rows()


@pytest.fixture
def tokenized(rows, tokenizer):
    """The rows as `input_ids` and `labels`."""
    from datasets import Dataset

    from llmdistill.data.language import tokenize

    return tokenize(Dataset.from_list(rows), tokenizer, "assistant", 64)


@pytest.fixture
def workspace(tmp_path, make_model, tokenizer) -> Path:
    """A folder with a teacher, a student, training and held-out rows, and a recipe that uses them."""
    for name, model in {"teacher": make_model(4, 48, seed=1), "student": make_model(2, 32, seed=2)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, seed in {"train": 0, "test": 1}.items():
        lines = (json.dumps(row) for row in make_rows(seed=seed))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.yaml").write_text(f"""
method: taid
teacher: {{model: {tmp_path}/teacher}}
student: {{model: {tmp_path}/student}}
data: [{{path: {tmp_path}/train.jsonl}}]
training:
  output_dir: {tmp_path}/run
  max_length: 64
  max_steps: 6
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  schedule: linear
  bf16: false
  save_steps: 2
  logging_steps: 1
evaluation:
  data: {{path: {tmp_path}/test.jsonl, rows: 8}}
  generate: 2
  max_new_tokens: 4
""")
    return tmp_path
