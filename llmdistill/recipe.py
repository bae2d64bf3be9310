"""Recipes: a YAML file plus `section.key=value` overrides, checked against dataclasses before anything is loaded.

YAML is read strictly: a key written twice is refused, `1e-4` is a number, only `true` and `false` are booleans. Types
are checked strictly too (no float for an integer), all faults are reported at once, and a misspelt key is told the
nearest valid one.
"""

import dataclasses
import enum
import functools
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from llmdistill.errors import UserError, nearest


class RecipeError(UserError):
    """A recipe that cannot be run; one line per fault, each naming the key and the remedy."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's few scalar types instead of 1.1's many, and no key twice."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"{node.start_mark.name}: the key `{key}` is written twice in one section.")
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node):
        return int(node.value)  # 010 is ten, not eight


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)


def read(path: str | Path, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """The recipe at `path` as plain dictionaries, with `overrides` such as `training.learning_rate=1e-5` applied.

    Raises:
        RecipeError: no such file, not a YAML mapping, a key twice, or an override without `=`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"Cannot read the recipe {path}: it is not text in UTF-8.") from None
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} is not a recipe: expected `key: value` lines, got {tree!r:.80}.")
    for override in overrides:
        _override(tree, override)
    return tree


def dump(tree: dict[str, Any]) -> str:
    """A recipe as text that `read` understands."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)


def build(recipe_type: type, tree: dict[str, Any], source: str | Path) -> Any:
    """An instance of the dataclass `recipe_type` from what `read` returned.

    Raises:
        RecipeError: unknown or missing keys, wrong types, wrong choices, or what a `__post_init__` refuses.
    """
    from pydantic import TypeAdapter, ValidationError

    faults = _wrong_choices(recipe_type, tree)
    try:
        # Through JSON, because pydantic's strict mode takes a mapping for a dataclass only there.
        instance = TypeAdapter(_forbid_extras(recipe_type)).validate_json(json.dumps(tree), strict=True)
    except TypeError as error:
        raise RecipeError(f"{source} holds a value that is no plain YAML: {error}.") from None
    except ValidationError as error:
        faults |= {key: text for key, text in _explain(recipe_type, error).items() if key not in faults}
    if faults:
        lines = [f"  {key}: {text}" if key else f"  {text}" for key, text in sorted(faults.items())]
        raise RecipeError(f"{source} cannot be run:\n" + "\n".join(lines))
    return instance


def _parse(text: str, name: str) -> Any:
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"The override `{override}` has no `=`: write it as `section.key=value`.")
    *parents, last = path.split(".")
    parsed = _parse(value, f"The override `{override}`")
    node: Any = tree
    try:
        for name in parents:
            if isinstance(node, dict) and node.get(name) is None:
                node[name] = {}  # missing, or a section without keys
            node = node[int(name) if isinstance(node, list) else name]
        node[int(last) if isinstance(node, list) else last] = parsed
    except (AttributeError, TypeError, IndexError, ValueError):
        raise RecipeError(f"The override `{override}` does not fit: `{path}` leads through a plain value.") from None


@functools.cache
def _forbid_extras(cls: type) -> type:
    """Let pydantic refuse unknown keys in `cls` and in every dataclass among its fields."""
    from pydantic import ConfigDict

    cls.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    for hint in _hints(cls).values():
        for section in _members(hint):
            if dataclasses.is_dataclass(section):
                _forbid_extras(section)
    return cls


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _members(hint: Any) -> list[Any]:
    """The plain types inside unions and lists."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union, list):
        return [member for argument in typing.get_args(hint) for member in _members(argument)]
    return [hint]


def _section(hint: Any) -> type | None:
    """The dataclass that a field holds, itself or in a list."""
    return next((member for member in _members(hint) if dataclasses.is_dataclass(member)), None)


def _wrong_choices(cls: type, tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Values outside the choices that a field declares in its metadata or as an enumeration."""
    faults = {}
    for field in dataclasses.fields(cls):
        value, hint, key = tree.get(field.name), _hints(cls)[field.name], prefix + field.name
        if isinstance(value, dict) and (section := _section(hint)):
            faults |= _wrong_choices(section, value, f"{key}.")
        elif isinstance(value, list) and (section := _section(hint)):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    faults |= _wrong_choices(section, item, f"{key}.{index}.")
        enums = [m for m in _members(hint) if isinstance(m, type) and issubclass(m, enum.Enum)]
        choices = field.metadata.get("choices") or [member.value for cls_ in enums for member in cls_]
        if choices and isinstance(value, str) and value not in choices:
            faults[key] = f"unknown choice `{value}`.{nearest(value, map(str, choices))}"
    return faults


def _explain(recipe_type: type, error: Any) -> dict[str, str]:
    """One line per key from pydantic's errors, of which a union makes several for one key."""
    faults: dict[str, str] = {}
    for fault in error.errors():
        path, owner, hint = _follow(recipe_type, fault["loc"])
        if fault["type"] == "unexpected_keyword_argument":
            name = path.rpartition(".")[2]
            text = "unknown key." + nearest(name, (field.name for field in dataclasses.fields(owner)))
        elif fault["type"] == "missing":
            text = "is missing and has no default."
        elif fault["type"] == "value_error":
            text = str(fault["ctx"]["error"])
        else:
            text = f"expected {_describe(hint)}, got {fault['input']!r:.80}."
        faults.setdefault(path, text)
    return faults


def _follow(recipe_type: type, location: tuple) -> tuple[str, type, Any]:
    """Where pydantic's location leads: the dotted key, the dataclass that owns it and the type of its value.

    Locations also hold the names of union members; they are no part of the key and are passed over.
    """
    owner, hint, path = recipe_type, recipe_type, []
    for step in location:
        section = _section(hint)
        if isinstance(step, int):
            path.append(str(step))
        elif section is not None and (step in _hints(section) or step == location[-1]):
            owner, hint = section, _hints(section).get(step)
            path.append(step)
    return ".".join(path), owner, hint


def _describe(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return f"a section with keys such as {', '.join(field.name for field in dataclasses.fields(hint)[:4])}"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(member) for member in typing.get_args(hint))
    if hint is type(None):
        return "null"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))
