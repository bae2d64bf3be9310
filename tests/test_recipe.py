"""Recipes: strict YAML, overrides, and every fault named with its remedy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from llmdistill import jobs, recipe
from llmdistill.recipe import RecipeError

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


@dataclass(kw_only=True)
class Item:
    path: str
    rows: int | None = None


@dataclass(kw_only=True)
class Section:
    rate: float = 1.0
    count: int = 1
    flag: bool = False
    kind: Literal["plain", "fancy"] = "plain"
    choice: str = field(default="one", metadata={"choices": ["one", "two"]})
    layers: int | list[int] | None = None

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("`count` must not be negative.")


@dataclass(kw_only=True)
class Example:
    method: str
    section: Section = field(default_factory=Section)
    items: list[Item] = field(default_factory=list)


def build(text: str, tmp_path, *overrides: str) -> Example:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return recipe.build(Example, recipe.read(path, overrides), path)


def test_values_keep_their_types(tmp_path):
    built = build(
        "method: no\nsection: {rate: 1e-4, count: 3, flag: true, layers: [1, 2]}\nitems: [{path: a}]", tmp_path
    )
    assert built == Example(
        method="no", section=Section(rate=1e-4, count=3, flag=True, layers=[1, 2]), items=[Item(path="a")]
    )


def test_overrides_reach_sections_lists_and_new_keys(tmp_path):
    text = "method: a\nitems: [{path: a}]"
    built = build(text, tmp_path, "items.0.path=b", "section.rate=2e-5", "section.layers=[3]", "method=b")
    assert built == Example(method="b", section=Section(rate=2e-5, layers=[3]), items=[Item(path="b")])


@pytest.mark.parametrize("override", ["section", "method.deeper=1", "items.5.path=x", "items.x=1"])
def test_overrides_that_lead_nowhere_are_refused(tmp_path, override):
    with pytest.raises(RecipeError, match="override"):
        build("method: a\nitems: [{path: a}]", tmp_path, override)


@pytest.mark.parametrize("value", ["[1,", "{rate: 1.0, rate: 2.0}"])
def test_overrides_that_are_no_yaml_say_so(tmp_path, value):
    with pytest.raises(RecipeError, match=r"The override `section=.*(not valid YAML|written twice)"):
        build("method: a", tmp_path, f"section={value}")


def test_an_empty_section_can_be_filled_by_an_override(tmp_path):
    assert build("method: a\nsection:", tmp_path, "section.count=3").section.count == 3


def test_integers_are_decimal(tmp_path):
    assert build("method: a\nsection: {count: 010, layers: [09]}", tmp_path).section == Section(count=10, layers=[9])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("section: {rat: 1.0}", "section.rat: unknown key. Did you mean `rate`?"),
        ("section: {nothing_like_it: 1}", "section.nothing_like_it: unknown key. Choices: rate, count, flag"),
        ("section: {count: 8.0}", "section.count: expected an integer, got 8.0."),
        ("section: {count: true}", "section.count: expected an integer, got True."),
        ("section: {flag: yes}", "section.flag: expected true or false, got 'yes'."),
        ("section: {rate: fast}", "section.rate: expected a number, got 'fast'."),
        ("section: {kind: odd}", "section.kind: expected `plain` or `fancy`, got 'odd'."),
        ("section: {choice: tow}", "section.choice: unknown choice `tow`. Did you mean `two`?"),
        ("section: {layers: all}", "section.layers: expected an integer or list[int] or null, got 'all'."),
        ("section: {count: -1}", "section: `count` must not be negative."),
        ("section: 3", "section: expected a section with keys such as rate, count"),
        ("items: [{path: a, rwos: 1}]", "items.0.rwos: unknown key. Did you mean `rows`?"),
        ("items: [{rows: 1}]", "items.0.path: is missing"),
        ("sections: {}", "sections: unknown key. Did you mean `section`?"),
    ],
)
def test_faults_name_key_value_and_remedy(tmp_path, text, fault):
    with pytest.raises(RecipeError) as error:
        build(f"method: a\n{text}", tmp_path)
    assert f"  {fault}" in str(error.value)


def test_all_faults_come_at_once(tmp_path):
    with pytest.raises(RecipeError) as error:
        build("section: {rat: 1.0, count: 8.5, choice: tow}\nitems: [{}]", tmp_path)
    keys = [line.strip().split(":")[0] for line in str(error.value).splitlines()[1:]]
    assert keys == ["items.0.path", "method", "section.choice", "section.count", "section.rat"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("method: a\nmethod: b", "`method` is written twice"),
        ("section: {rate: 1.0, rate: 2.0}", "`rate` is written twice"),
        ("method: [", "not valid YAML"),
        ("just words", "is not a recipe"),
        ("a: &a {rate: 1.0}\nmethod: x\nsection:\n  <<: *a", "unknown key"),
        ("", "is not a recipe"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, complaint):
    with pytest.raises(RecipeError, match=complaint):
        build(text, tmp_path)


def test_dump_is_read_back_as_it_was(tmp_path):
    tree = {"method": "a", "section": {"rate": 1e-5, "flag": False, "layers": None}, "items": [{"path": "1e3"}]}
    (tmp_path / "recipe.yaml").write_text(recipe.dump(tree))
    assert recipe.read(tmp_path / "recipe.yaml") == tree


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"method: \xff\xfe")
    with pytest.raises(RecipeError, match="not text in UTF-8"):
        recipe.read(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("method", ["tiad", "null", "3", "[taid]"])
def test_unknown_methods_are_refused(tmp_path, method):
    (tmp_path / "recipe.yaml").write_text(f"method: {method}\n")
    with pytest.raises(RecipeError, match=r"method: expected a method.*taid"):
        jobs.load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_project_are_valid(path, monkeypatch):
    monkeypatch.chdir(path.parents[1] if path.parent.name == "recipes" else path.parents[2])
    _, loaded, tree = jobs.load(path)
    assert loaded.training.output_dir == tree["training"]["output_dir"]
    first_line = path.read_text().splitlines()[0]
    assert first_line.startswith("# ")
    assert str(path.relative_to(Path.cwd())) in first_line  # the recipe's own command
