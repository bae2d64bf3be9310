"""The import direction of the rooms."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmdistill"
ROOMS = {
    "objectives": set(),
    "teachers": {"objectives"},
    "students": {"objectives"},
    "data": {"objectives"},
    "trainers": {"objectives", "teachers", "students", "data"},
    "evaluation": {"objectives", "teachers", "students", "data"},
    "jobs": {"objectives", "teachers", "students", "data", "trainers", "evaluation"},
}
"""Room -> rooms it may import from. Modules beside the rooms may import objectives and each other, cli everything."""
BESIDE = {"objectives"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_names(file: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, by their first name inside the package."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    parts = (name.split(".") for name in names)
    return {part[1] for part in parts if part[0] == "llmdistill" and len(part) > 1}


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_import_direction(file):
    place = file.relative_to(PACKAGE).parts[0]
    if place in ("cli.py", "__main__.py", "__init__.py"):
        return
    allowed = ROOMS.get(place, BESIDE)
    rooms = imported_names(file) & set(ROOMS)
    assert rooms <= allowed | {place}, f"{place} must not import {sorted(rooms - allowed - {place})}"
    if place == "objectives":
        assert not imported_names(file) - {"objectives"}, "objectives know nothing but torch"


def test_every_room_has_a_rule():
    found = {file.relative_to(PACKAGE).parts[0] for file in FILES if len(file.relative_to(PACKAGE).parts) > 1}
    assert found - {"samples"} == set(ROOMS)
