"""The plan of the house: which room of `rollout/` may import which, and that every public path that is named exists."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    ("errors", "files", "stopwatch", "method", "evaluate", "intervals"),
    ("api", "data", "results"),
    ("tape", "report"),
    ("_capture",),
    ("frozen",),
    ("pyhealth",),
    ("cohort", "bench"),
    ("runfile",),
    ("doctor",),
    ("demo",),
    ("cli",),
]
"""The rooms, files and folders of `rollout/`, from the ground up. A room imports from the floors below it only."""

DOTTED = re.compile(r"(?<![\w./\\-])rollout(?:_kernels)?(?:\.[A-Za-z_]\w*)+(?![\w/*])")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def rooms() -> set[str]:
    inside = (ROOT / "rollout").iterdir()
    named = {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").is_file()}
    return named - {"__init__", "__main__"}


def imported_rooms(path: Path) -> Iterator[str]:
    """The rooms a file imports from, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "rollout":
                assert parts[1:] and parts[1] in rooms(), f"{path.relative_to(ROOT)} imports all of rollout"  # noqa: PT018
                yield parts[1]


def test_every_room_has_its_floor():
    assert sorted(room for floor in FLOORS for room in floor) == sorted(rooms())
    assert len(rooms()) <= 20


def test_no_import_goes_up():
    floor_of = {room: floor for floor, named in enumerate(FLOORS) for room in named}
    seen = 0
    for path in sorted((ROOT / "rollout").rglob("*.py")):
        if path.parent.name == "rollout" and path.stem.startswith("__"):
            continue
        own = path.relative_to(ROOT / "rollout").parts[0].removesuffix(".py")
        for room in imported_rooms(path):
            seen += 1
            assert room == own or floor_of[room] < floor_of[own], f"{path.relative_to(ROOT)} imports from {room}"
    assert seen > 100


def docstrings() -> Iterator[str]:
    for path in sorted([*(ROOT / "rollout").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def named_paths() -> list[str]:
    """Every dotted path of ours that a page or a docstring names, and those promised beyond them."""
    promised = {
        "rollout.cohort.explain.Explained",
        "rollout.runfile.save_model",
        "rollout.evaluate",
        "rollout.intervals",
    }
    texts = [page.read_text(encoding="utf-8") for page in PAGES] + list(docstrings())
    return sorted(promised.union(*(DOTTED.findall(text) for text in texts)))


@pytest.mark.parametrize("path", named_paths())
def test_public_path(path: str):
    """`rollout.a.b.C` is found: modules are imported as far as they go, the rest are attributes."""
    parts, found, at = path.split("."), None, 0
    for at in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:at]))
            break
        except ModuleNotFoundError as error:
            if error.name is None or not path.startswith(error.name):
                pytest.skip(f"{error.name} is not installed")
    for name in parts[at:]:
        found = getattr(found, name)
    assert found is not None
