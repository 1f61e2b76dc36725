"""Every family of transformers: the same bits with a capture as without, and right rollouts, or a refusal."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'attention-rollout[hf]'")

from tests.support.capture_families import FAMILIES
from tests.support.capture_family import check
from tests.support.capture_table import assert_in_table, cases


@pytest.mark.parametrize(("name", "implementation"), cases(FAMILIES))
def test_family(name: str, implementation: str) -> None:
    check(FAMILIES[name], implementation)


def test_the_page_has_every_family() -> None:
    assert_in_table(FAMILIES, "transformers")
