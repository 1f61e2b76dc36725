"""The choice of a launch by the tuning script, on clocks that are known; what it times runs on a card only."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from rollout_kernels import _triton
from rollout_kernels._triton import launch, tune

DEFAULT = {"block_m": 1, "num_warps": 4}
OPTIONS = {"block_m": (1, 2, 3), "num_warps": (4, 8)}


Key = tuple[int, int]


CANNOT_COMPILE = _triton.CANNOT[0](None, None, "no such launch")


def choose(
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[Key, float],
    off: Key = (0, 0),
    error: Exception = CANNOT_COMPILE,
    busy: Callable[[dict[str, int]], bool] = lambda candidate: True,
) -> Any:
    """The choice where candidates take so many milliseconds, 9 if not named; one that takes 0 raises `error`."""
    spent: list[float] = []
    monkeypatch.setattr(tune, "do_bench", lambda run, return_mode: spent[-1])

    def trials(candidate: dict[str, int]) -> list[tune.Trial]:
        key = (candidate["block_m"], candidate["num_warps"])
        spent.append(seconds.get(key, 9.0))
        if not spent[-1]:
            raise error
        return [(lambda: None, lambda: torch.tensor([1.1 if key == off else 1.0]))]

    return tune.fastest("x", OPTIONS, DEFAULT, trials, busy=busy)


def test_the_fastest_that_can_be_compiled_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {(1, 4): 5.0, (2, 4): 4.0, (3, 8): 3.0, (2, 8): 0.0}
    assert choose(monkeypatch, seconds) == {"block_m": 3, "num_warps": 8}


def test_the_default_stays_where_nothing_is_2_percent_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, {(1, 4): 5.0, (2, 4): 4.91}) == DEFAULT
    assert choose(monkeypatch, {(1, 4): 5.0, (2, 4): 4.89}) == {"block_m": 2, "num_warps": 4}


def test_a_candidate_that_gives_other_numbers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="gives other numbers than"):
        choose(monkeypatch, {(1, 4): 5.0}, off=(2, 4))


def test_a_pass_of_the_compiler_that_fails_rules_a_candidate_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {(1, 4): 5.0, (2, 4): 0.0, (3, 8): 3.0}
    failed = RuntimeError("PassManager::run failed")
    assert choose(monkeypatch, seconds, error=failed) == {"block_m": 3, "num_warps": 8}
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        choose(monkeypatch, seconds, error=RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_candidate_that_cannot_keep_the_device_busy_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {(1, 4): 5.0, (2, 4): 4.0, (3, 8): 3.0}
    chosen = choose(monkeypatch, seconds, busy=lambda candidate: candidate["num_warps"] == 4)
    assert chosen == {"block_m": 2, "num_warps": 4}
    assert "3 of 6 tried" in capsys.readouterr().out


H200 = 233472  # bytes of shared memory of a multiprocessor


def test_launches_of_rows_that_are_worth_compiling() -> None:
    launch = {"rows": 8, "num_warps": 8, "stages": 4, "parts": 16, "maxnreg": 128}
    assert tune.keeps_loads_busy(launch, 512, 4, H200)  # two programs
    assert tune.keeps_loads_busy(launch | {"maxnreg": 255}, 512, 4, H200)  # one, of 8 warps
    assert not tune.keeps_loads_busy(launch | {"num_warps": 16, "maxnreg": 255}, 512, 4, H200)  # none fits
    assert not tune.keeps_loads_busy(launch | {"rows": 32}, 512, 4, H200)  # 128 registers for two tiles
    assert not tune.keeps_loads_busy(launch | {"num_warps": 4, "stages": 6, "rows": 8}, 1024, 4, H200)  # 160 KiB


@pytest.mark.parametrize("dtype", ["32", "16"])
@pytest.mark.parametrize("name", ["default", "sm_80", "sm_90", "sm_100"])
def test_every_shipped_launch_is_worth_compiling(name: str, dtype: str) -> None:
    """What prunes candidates must not prune what was chosen by hand."""
    table, itemsize = launch.tables(name), int(dtype) // 8
    for width, each in table["rows"][dtype].items():
        assert tune.keeps_loads_busy(each, int(width), itemsize, H200), (width, each)
    for kernel in ("logsumexp", "columns"):
        for size, each in table[kernel][dtype].items():
            assert tune.holds_its_tiles(each, int(size), itemsize, H200), (kernel, size, each)


def test_pruning_leaves_a_part_of_the_candidates() -> None:
    options = {"block_m": (16, 32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)}
    tried = [
        values for values in itertools.product(*options.values())
        if tune.holds_its_tiles(dict(zip(options, values, strict=True)), 128, 4, H200)
    ]  # fmt: skip
    assert 8 <= len(tried) < 48


def test_a_table_has_one_launch_a_line() -> None:
    text = tune.format_table({"rows": {"32": {"64": {"rows": 8, "num_warps": 4}, "128": {"rows": 4, "num_warps": 8}}}})
    assert '      "64": {"rows": 8, "num_warps": 4},\n      "128": {"rows": 4, "num_warps": 8}\n' in text
