"""Reading, checking and tokenising rows."""

import gzip
import json

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from datasets import Dataset

from llmdistill.data import language
from llmdistill.data.language import IGNORE_INDEX, end_of_answer, load, tokenize
from llmdistill.data.rows import Source
from llmdistill.errors import UserError


def write(path, rows) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def counted_text(row, tokenizer) -> str:
    return tokenizer.decode(
        [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE_INDEX]
    )


TEXT_ROWS = [{"prompt": "one two", "completion": " three"}, {"prompt": "four", "completion": " five six"}]


def test_sample_data_is_shipped():
    rows = load(Source(path="samples/gsm8k", split="test", rows=5))
    assert len(rows) == 5
    assert rows.column_names == ["prompt", "completion"]
    assert rows[0]["completion"][0]["content"].endswith("#### 18")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_files_and_columns(tmp_path, name):
    path = write(tmp_path / name, [{"question": "a", "reply": "b", "id": 7}] * 3)
    source = Source(path=path, columns={"prompt": "question", "completion": "reply"}, rows=2)
    assert load(source).to_list() == [{"prompt": "a", "completion": "b"}] * 2


def test_a_folder_has_one_file_per_split(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"text": split}])
    (tmp_path / "README.md").write_text("not rows")
    assert load(Source(path=str(tmp_path), split="test"))["text"][:] == ["test"]


def test_messages_come_before_a_bare_prompt(tmp_path):
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "messages": conversation}])
    assert load(Source(path=path)).column_names == ["messages"]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}], "one row has no answer.*row 2"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 2, "2 rows have no answer in `messages`.*row 1"),
        ([{"text": ""}], "no answer in `text`"),
        ([{"question": "a", "answer": "b"}], "columns question, answer: expected `messages`"),
        ([{"messages": [{"from": "user", "value": "a"}]}], "row 1 is neither text nor a conversation"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}], "row 2 is neither"),
        (
            [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}],
            "row 1 one of prompt, completion is a text",
        ),
        ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], "make both of one kind"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "row 1 is neither"),
    ],
)
def test_rows_without_an_answer_are_refused(tmp_path, rows, complaint):
    with pytest.raises(UserError, match=complaint):
        load(Source(path=write(tmp_path / "rows.jsonl", rows)))


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl.*empty"):
        load(Source(path=write(tmp_path / "rows.jsonl", [])))


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"rows\.jsonl: line 2 is not JSON"):
        load(Source(path=str(path)))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"path": "nowhere.jsonl"}, "no file or folder `nowhere.jsonl`"),
        ({"path": "./nowhere"}, "no file or folder"),
        ({"path": __file__}, "must end in .jsonl"),
        ({"path": "samples/gsm9k"}, "Did you mean `gsm8k`"),
        ({"path": "samples/gsm8k", "split": "tset"}, "Did you mean `test`"),
        ({"path": "samples/gsm8k", "columns": {"text": "answr"}}, "no column `answr`"),
        ({"path": "samples/gsm8k", "columns": {"promt": "a"}}, "`promt` is none. Did you mean `prompt`"),
        ({"path": "someone/nothing"}, "no file here"),
    ],
)
def test_missing_data_is_named_with_a_remedy(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        load(Source(**settings))


def test_a_source_checks_itself():
    with pytest.raises(ValueError, match="`rows` must be at least 1"):
        Source(path="x", rows=0)


def test_answers_are_labelled_and_end(tokenizer):
    rows = tokenize(Dataset.from_list(TEXT_ROWS), tokenizer, "assistant", 64)
    assert counted_text(rows[0], tokenizer) == " three<|end|>"
    assert tokenizer.decode(rows[0]["input_ids"]) == "one two three<|end|>"


def test_conversations_go_through_the_chat_template(rows, tokenizer):
    tokenized = tokenize(Dataset.from_list(rows), tokenizer, "assistant", 64)
    row, first = tokenized[0], rows[0]
    assert counted_text(row, tokenizer) == first["completion"][0]["content"] + "<|end|>"
    assert tokenizer.decode(row["input_ids"]).startswith(
        f"<|user|>{first['prompt'][0]['content']}<|end|><|assistant|>"
    )


def test_every_answer_of_a_conversation_counts(tokenizer):
    turns = ["one", "two", "three", "four"]
    messages = [{"role": "assistant" if index % 2 else "user", "content": turn} for index, turn in enumerate(turns)]
    (row,) = tokenize(Dataset.from_list([{"messages": messages}]), tokenizer, "assistant", 64)
    assert counted_text(row, tokenizer) == "two<|end|>four<|end|>"


def test_only_the_completion_counts_when_the_prompt_has_answers_too(tokenizer):
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    (row,) = tokenize(Dataset.from_list([row]), tokenizer, "assistant", 64)
    assert counted_text(row, tokenizer) == "assistant<|end|>"


def test_mask_all_counts_everything_but_the_first_token(tokenizer):
    (row, _) = tokenize(Dataset.from_list(TEXT_ROWS), tokenizer, "all", 64)
    assert row["labels"] == [IGNORE_INDEX, *row["input_ids"][1:]]


def test_rows_are_cut_and_rows_without_labels_dropped(tokenizer):
    rows = [{"prompt": "one " * 30, "completion": "two"}, {"prompt": "one", "completion": " two" * 30}]
    (row,) = tokenize(Dataset.from_list(rows), tokenizer, "assistant", 20)
    assert len(row["input_ids"]) == len(row["labels"]) == 20
    with pytest.raises(UserError, match="first 20 tokens"):
        tokenize(Dataset.from_list(rows[:1]), tokenizer, "assistant", 20)


TURNS = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]


def test_a_template_that_rewrites_the_past_needs_mask_all():
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if not add_generation_prompt %}closed{% endif %}"
    rows = Dataset.from_list([{"messages": TURNS}])
    with pytest.raises(UserError, match="mask: all"):
        tokenize(rows, tokenizer, "assistant", 64)
    (row,) = tokenize(rows, tokenizer, "all", 64)
    assert tokenizer.decode(row["input_ids"]).endswith("assistant<|end|>closed")
    assert row["labels"][1:] == row["input_ids"][1:]


@pytest.mark.parametrize("answer", ["\n\nthree", "  three", " \n", "\nthree\n\n"])
def test_answers_may_begin_and_end_with_spaces(tokenizer, answer):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": answer}, *TURNS]
    (row,) = tokenize(Dataset.from_list([{"messages": messages}]), tokenizer, "assistant", 64)
    assert counted_text(row, tokenizer) == f"{answer}<|end|>assistant<|end|>assistant<|end|>"


def test_a_token_that_merges_prompt_and_answer_counts():
    tokenizer = make_tokenizer("x\n\n\ny " * 50)  # learns to join line breaks
    row = {"prompt": "x\n", "completion": "\n\ny"}
    (row,) = tokenize(Dataset.from_list([row]), tokenizer, "assistant", 64)
    assert counted_text(row, tokenizer).endswith("y<|end|>")
    assert counted_text(row, tokenizer).startswith("\n\n")


def test_a_conversation_may_begin_with_an_answer(tokenizer):
    (row,) = tokenize(Dataset.from_list([{"messages": TURNS[1:]}]), tokenizer, "assistant", 64)
    assert counted_text(row, tokenizer).endswith("assistant<|end|>assistant<|end|>")


def test_a_row_that_the_template_refuses_is_named(tokenizer):
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE
    rows = [{"messages": TURNS}, {"messages": [{"role": "system", "content": "be brief"}, *TURNS]}]
    with pytest.raises(UserError, match="refuses row 2: no system role"):
        tokenize(Dataset.from_list(rows), strict, "assistant", 64)


@pytest.mark.parametrize("mask", ["assistant", "all"])
def test_the_special_token_that_ends_answers_is_found(tokenizer, mask):
    long = [TURNS[0], {"role": "assistant", "content": "nine " * 80}]
    rows = tokenize(Dataset.from_list([{"messages": long}, {"messages": TURNS}]), tokenizer, mask, 64)
    assert len(rows[0]["input_ids"]) == 64  # cut before its end
    assert end_of_answer(rows, tokenizer, 64) == tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_of_answer(rows.select([0]), tokenizer, 64) is None


def test_conversations_need_a_chat_template(tokenizer):
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        tokenize(Dataset.from_list([{"messages": TURNS}]), plain, "assistant", 64)
    assert len(tokenize(Dataset.from_list([{"prompt": "a", "completion": " b"}]), plain, "assistant", 64)) == 1


def test_tokens_are_kept_until_rows_tokenizer_settings_or_code_change(tmp_path, tokenizer, monkeypatch):
    rows = load(Source(path=write(tmp_path / "rows.jsonl", [{"prompt": "one ", "completion": "two three"}])))

    def tokens(text: str = "", **settings) -> list[int]:
        return tokenize(
            rows, make_tokenizer(text) if text else tokenizer, **({"mask": "all", "max_length": 9} | settings)
        )

    first = tokens()
    monkeypatch.setattr(language, "_text_and_answers", lambda *arguments: pytest.fail("tokenised again"))
    assert tokens()[:] == first[:]
    for change in ({"mask": "assistant"}, {"max_length": 8}, {"text": "other words altogether"}):
        with pytest.raises(BaseException, match="tokenised again"):
            tokens(**change)
    monkeypatch.setattr(language, "__file__", __file__)
    with pytest.raises(BaseException, match="tokenised again"):
        tokens()
