"""Writes the table of `docs/capture.md` from the families of the tests: `python -m tests.support.capture_table`."""

import re
from pathlib import Path

import torch
import transformers

import rollout
from tests.support.capture_families import FAMILIES, Family, largest_error, prepared

PAGE = Path(__file__).parents[2] / "docs" / "capture.md"
START, END = "<!-- families -->", "<!-- end of families -->"


def main() -> None:
    """Run every family and replace the table between the two marks of the page."""
    rows = [f"| transformers {transformers.__version__} | attention | capture | largest error |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        for implementation in family.implementations:
            rows.append(f"| {name} | {implementation} | {' | '.join(outcome(family, implementation))} |")
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text("\n".join([before + START, *rows, END + rest.partition(END)[2]]))


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


if __name__ == "__main__":
    main()
