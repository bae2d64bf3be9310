"""Labelled texts: read, checked, and their classes matched with a model's."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from llmdistill.data.glue import Labels, class_order, labels_of, load, tokenize, with_class_ids
from llmdistill.data.rows import Source
from llmdistill.errors import UserError


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("columns", "ours"),
    [
        (("sentence",), ("text",)),
        (("text",), ("text",)),
        (("sentence1", "sentence2"), ("text", "pair")),
        (("premise", "hypothesis"), ("text", "pair")),
        (("question", "sentence"), ("text", "pair")),
    ],
)
def test_texts_are_found_under_the_names_of_glue(tmp_path, columns, ours):
    row = {name: f"the {name}" for name in columns} | {"label": 1, "idx": 7}
    rows = load(Source(path=write(tmp_path / "rows.jsonl", [row])))
    assert rows.column_names == [*ours, "label"]
    assert [rows[0][name] for name in ours] == [f"the {name}" for name in columns]


def test_shipped_domains_have_names_and_intents():
    rows = load(Source(path="samples/clinc_domains", split="test"), extra=["intent"])
    assert len(rows) == 4500
    labels = labels_of(rows)
    assert len(labels.names) == 10
    assert labels.names[:2] == ("auto_and_commute", "banking")
    assert len(set(rows["intent"])) == 150


def test_a_shuffled_part_is_the_same_every_time_and_not_the_first_rows():
    first, again, plain = (
        load(Source(path="samples/clinc_domains", rows=50, shuffle_seed=seed))["text"][:] for seed in (1, 1, None)
    )
    assert first == again != plain
    assert len(set(load(Source(path="samples/clinc_domains", rows=300, shuffle_seed=0))["label"])) == 10


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ([{"a": "x"}], {}, "columns a: expected `sentence`"),
        ([{"sentence": "x"}], {"texts": 2}, "has one text in a row .*, expected a pair"),
        ([{"sentence1": "x", "sentence2": "y"}], {"texts": 1}, "has a pair of texts"),
        ([{"sentence": "x"}, {"sentence": " "}], {}, "row 2 has no text in `sentence`"),
        ([{"sentence1": "x", "sentence2": None}, {"sentence1": "x", "sentence2": "y"}], {}, "row 1 .*`sentence2`"),
        ([{"sentence": "x", "intent": "y"}], {"extra": ["intend"]}, "no column `intend`. Did you mean `intent`"),
        ([], {}, "is empty"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, rows, options, complaint):
    with pytest.raises(UserError, match=complaint):
        load(Source(path=write(tmp_path / "rows.jsonl", rows)), **options)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0, 2], Labels(("0", "1", "2"), are_ids=True)),
        ([1, -1, None], Labels(("0", "1"), are_ids=True)),
        ([1.0, None, 2.0], Labels(("0", "1", "2"), are_ids=True)),  # integers with gaps, as a csv file gives them
        (["b", "a", "b"], Labels(("a", "b"))),
        (["10", "9", "2"], Labels(("2", "9", "10"))),
        ([0.5, 4.0, 1.0], Labels(None)),
        ([1.0, 2.0, -1.0], Labels(None)),
        ([-1, -1, -1], None),
    ],
)
def test_what_labels_mean(values, expected):
    assert labels_of(Dataset.from_dict({"label": values})) == expected


def test_names_of_the_data_set_itself_are_kept_in_its_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "maybe", "a"])})
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [2, 0]}, features=features)
    assert labels_of(rows).names == ("no", "maybe", "a")
    assert with_class_ids(rows, ["a", "maybe", "NO"], "x")["label"][:] == [0, 2]


@pytest.mark.parametrize(
    ("theirs", "ours", "order"),
    [
        (["b", "A"], ["a", "b", "c"], [1, 0]),
        (["2", "4", "5"], ["1", "2", "3", "4", "5"], [1, 3, 4]),
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
        (["US", "us"], ["us", "US"], [1, 0]),
        (["0", "1"], ["neg", "pos"], [0, 1]),
        (["1", "0"], ["neg", "pos"], [1, 0]),
        (["neg", "pos"], ["LABEL_1", "LABEL_0"], [1, 0]),
    ],
)
def test_class_order_by_name_and_by_place(theirs, ours, order):
    assert class_order(theirs, ours, "x") == order


@pytest.mark.parametrize(
    ("theirs", "ours", "complaint"),
    [
        (["good", "bad"], ["good", "evil"], "The teacher has classes that the model does not know: bad"),
        (["0", "1", "2"], ["a", "b"], r"has 3 classes \(0, 1, 2\), the model 2"),
        (["a", "b"], ["0", "1", "2"], "has 2 classes"),
        (["Us"], ["us", "US"], "does not know: Us"),
    ],
)
def test_other_classes_are_refused(theirs, ours, complaint):
    with pytest.raises(UserError, match=complaint):
        class_order(theirs, ours, "The teacher")


def test_bare_numbers_are_places(tmp_path):
    rows = Dataset.from_dict({"text": list("xyz"), "label": [0, 2, -1]})
    assert with_class_ids(rows, ["1", "2", "3"], "x")["label"][:] == [0, 2, -1]
    with pytest.raises(UserError, match="x has the class 2, the model only 0 to 1"):
        with_class_ids(rows, ["a", "b"], "x")
    with pytest.raises(UserError, match="1 of 3 rows have no number to be predicted"):
        with_class_ids(Dataset.from_dict({"label": [0.5, None, 2.0]}), None, "x")


def test_folders_of_the_hubs_form_have_several_files_per_split(tmp_path):
    for number in range(2):
        rows = Dataset.from_dict({"sentence": [f"text {number}"], "label": [number]})
        rows.to_parquet(tmp_path / f"validation_matched-0000{number}-of-00002.parquet")
    rows = load(Source(path=str(tmp_path), split="validation_matched"))
    assert rows["text"][:] == ["text 0", "text 1"]


def test_class_ids_of_texts_numbers_and_missing_labels():
    rows = Dataset.from_dict({"text": list("wxyz"), "label": ["b", "a", None, "b"]})
    assert with_class_ids(rows, ["b", "a"], "x")["label"][:] == [0, 1, -1, 0]
    assert with_class_ids(rows.remove_columns("label"), ["b", "a"], "x").column_names == ["text"]
    with pytest.raises(UserError, match="has classes, the model knows numbers"):
        with_class_ids(rows, None, "The data set")


def test_pairs_are_tokenised_together_and_cut(tokenizer):
    rows = Dataset.from_dict({"text": ["the fox"], "pair": ["one two three four five"], "label": [1]})
    tokens = tokenize(rows, tokenizer, 6)
    assert len(tokens[0]["input_ids"]) == 6
    assert tokens[0]["labels"] == 1
    whole = tokenize(rows, tokenizer, 64)[0]["input_ids"]
    assert whole == tokenizer("the fox", "one two three four five")["input_ids"]
