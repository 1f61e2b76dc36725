"""The choice of a launch by the tuning script, on clocks that are known; what it times runs on a card only."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from rollout_kernels._triton import tune

DEFAULT = {"block_m": 1, "num_warps": 4}
OPTIONS = {"block_m": (1, 2, 3), "num_warps": (4, 8)}


Key = tuple[int, int]


def choose(monkeypatch: pytest.MonkeyPatch, seconds: dict[Key, float], off: Key = (0, 0)) -> Any:
    """The choice where candidates take so many milliseconds, 9 if not named; one that takes 0 cannot be compiled."""
    spent: list[float] = []
    monkeypatch.setattr(tune, "do_bench", lambda run, return_mode: spent[-1])

    def trials(candidate: dict[str, int]) -> list[tune.Trial]:
        key = (candidate["block_m"], candidate["num_warps"])
        spent.append(seconds.get(key, 9.0))
        if not spent[-1]:
            raise tune.CANNOT[0](None, None, "no such launch")
        return [(lambda: None, lambda: torch.tensor([1.1 if key == off else 1.0]))]

    return tune.fastest("x", OPTIONS, DEFAULT, trials)


def test_the_fastest_that_can_be_compiled_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {(1, 4): 5.0, (2, 4): 4.0, (3, 8): 3.0, (2, 8): 0.0}
    assert choose(monkeypatch, seconds) == {"block_m": 3, "num_warps": 8}


def test_the_default_stays_where_nothing_is_2_percent_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, {(1, 4): 5.0, (2, 4): 4.91}) == DEFAULT
    assert choose(monkeypatch, {(1, 4): 5.0, (2, 4): 4.89}) == {"block_m": 2, "num_warps": 4}


def test_a_candidate_that_gives_other_numbers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="gives other numbers than"):
        choose(monkeypatch, {(1, 4): 5.0}, off=(2, 4))


def test_a_table_has_one_launch_a_line() -> None:
    text = tune.format_table({"rows": {"32": {"64": {"rows": 8, "num_warps": 4}, "128": {"rows": 4, "num_warps": 8}}}})
    assert '      "64": {"rows": 8, "num_warps": 4},\n      "128": {"rows": 4, "num_warps": 8}\n' in text
