"""Writes the tables of `docs/capture.md` from the families of the tests: `python -m tests.support.capture_table`."""

import re
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

import rollout
from tests.support.capture_family import Family, largest_error, prepared

PAGE = Path(__file__).parents[2] / "docs" / "capture.md"
# A group is called after its library: where its families are.
GROUPS = {
    "transformers": "capture_families.FAMILIES",
    "timm": "capture_timm.TIMM",
    "x-transformers": "capture_x_transformers.X_TRANSFORMERS",
    "pyhealth": "capture_pyhealth.PYHEALTH",
    "torch": "capture_own.OWN",
}


def main(groups: list[str]) -> None:
    """Run every family of the groups, by default of all, and replace their tables on the page."""
    for group in groups or GROUPS:
        module, name = GROUPS[group].split(".")
        families: Mapping[str, Family] = getattr(import_module(f"tests.support.{module}"), name)
        rows = [
            f"| {group} {version(group).split('+')[0]} | attention | capture | largest error |",
            "|---|---|---|---|",
        ]
        for family, kind in cases(families):
            rows.append(f"| {family} | {kind} | {' | '.join(outcome(families[family], kind))} |")
        start, end = marks(group)
        before, _, rest = PAGE.read_text().partition(start)
        PAGE.write_text("\n".join([before + start, *rows, end + rest.partition(end)[2]]))


def marks(group: str) -> tuple[str, str]:
    """What stands before and behind the table of a group."""
    return f"<!-- families of {group} -->", f"<!-- end of {group} -->"


def cases(families: Mapping[str, Family]) -> list[tuple[str, str]]:
    """Every family with every implementation that is to be tried."""
    return [(name, kind) for name, family in families.items() for kind in family.implementations]


def outcome(family: Family, implementation: str) -> tuple[str, str]:
    """What a capture says, and the largest error of a rollout."""
    model, inputs = prepared(family, implementation)
    try:
        with torch.no_grad(), rollout.capture(model, shared_layers=family.shared) as tape:
            model(**inputs)
    except rollout.CaptureError as error:
        said = re.search(family.refused or "", str(error))
        return f"refused: {said[0] if said else error}", ""
    return "right", f"{largest_error(family, model, inputs, tape):.0e} ({'float32' if family.single else 'float64'})"


def assert_in_table(families: Mapping[str, Family], group: str) -> None:
    """The page has a row for every case, and says what the tests say."""
    start, end = marks(group)
    table = PAGE.read_text().partition(start)[2].partition(end)[0]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in table.splitlines()[3:]]
    assert [row[:2] for row in rows] == cases(families)
    for name, _, said in rows:
        assert said.startswith("right" if families[name].refused is None else "refused")


if __name__ == "__main__":
    main(sys.argv[1:])
