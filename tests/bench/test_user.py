"""`rollout bench`: the chain it compares with, its measurements on known clocks, and its lines and record."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import rollout
import rollout.bench
from rollout.bench import chains, end_to_end, methods, table
from rollout.bench import comparison as bench
from rollout.bench import measure as measuring
from rollout.bench.measure import Ceilings, Row
from rollout.bench.settings import Settings
from rollout_kernels._native import library

NATIVE = library.unusable() is None
SMALL = Settings(batch=2, heads=2, layers=3, size=8, sequences=(8, 16), seconds=0.01)
CPU = torch.device("cpu")
CEILINGS = Ceilings(read=10e9, copy=20e9, matmul=50e9, cache=2**20)


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known limits, without the seconds it takes to measure them, nor those to flush a large cache."""
    monkeypatch.setattr(bench, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(measuring, "MOST_FLUSHED", 2**20)


def random_maps(seq: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, seq, seq, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(4)]


def test_the_naive_chain_is_the_formula_by_hand() -> None:
    low = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    high = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    # ½(I + high) has row 0 (½, ½); ½(I + low) is [[1, 0], [¼, ¾]]: together (½ + ⅛, ⅜).
    maps = [layer.expand(1, 2, 2, 2) for layer in (low, high)]
    assert rollout.bench.naive_chain(maps).tolist() == [[0.625, 0.375]]
    unnormalised = [4 * layer for layer in maps]  # rows of ½(I + 4A) sum to 2½ and are divided by it
    assert rollout.bench.naive_chain(unnormalised)[0].tolist() == pytest.approx(
        [(0.2 + 0.8 * 0.4), 0.8 * 0.6], abs=1e-7
    )
    with pytest.raises(ValueError, match="one or more layers"):
        rollout.bench.naive_chain([])


def test_the_naive_chain_is_the_reference_backends_row() -> None:
    maps = random_maps()
    wanted = rollout.attention_rollout(maps, query=0, backend="reference")
    torch.testing.assert_close(rollout.bench.naive_chain(maps), wanted, atol=1e-14, rtol=0)
    generator = torch.Generator().manual_seed(1)
    queries, keys = ([torch.randn(2, 3, 9, 4, generator=generator).double() for _ in range(3)] for _ in range(2))
    wanted = rollout.attention_rollout_qk(queries, keys, query=0, backend="reference")
    torch.testing.assert_close(rollout.bench.naive_chain_qk(queries, keys), wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "bench: batch must be at least 1, got 0"),
        ({"size": -1}, "bench: size must be at least 1, got -1"),
        ({"sequences": ()}, "bench: sequences must be one or more lengths"),
        ({"sequences": (8, 0)}, "bench: sequences must be one or more lengths"),
        ({"seconds": 0.0}, "bench: seconds must be positive, got 0.0"),
        ({"device": "abacus"}, "bench: device must be one that torch can use here, got 'abacus'"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_lines_and_record(ceilings: None, tmp_path: Path) -> None:
    said: list[str] = []
    assert bench.run(SMALL, file=tmp_path / "record.json", say=said.append)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["versions"]["torch"] == version("torch")
    assert record["threads"] == torch.get_num_threads()
    assert record["ceilings"] == {"read": 10e9, "copy": 20e9, "matmul": 50e9, "cache": 2**20, "matmul_bf16": None}
    rows, costs = record["rows"][:4], record["rows"][4:]
    assert [(row["table"], row["case"], row["floor"]) for row in rows] == [
        (name, f"S={seq}", floor)
        for name, floor in (("rows from maps", "one read of the maps"), ("rows from Q,K", "QKᵀ alone"))
        for seq in (8, 16)
    ]
    for row in rows:
        assert not row["wrong"]
        assert row["backend"] == ("native" if NATIVE and row["table"] == "rows from maps" else "torch")
        assert set(row["seconds"]) == set(row["peak"]) == {"naive chain", "ours", row["floor"]}
        assert row["speedup"] == pytest.approx(row["seconds"]["naive chain"] / row["seconds"]["ours"])
        assert row["share"] == pytest.approx(row["seconds"][row["floor"]] / row["seconds"]["ours"])
        assert row["error"].keys() == {"naive chain", "ours"}  # a floor is no rollout
        assert max(row["error"].values()) < 1e-6
    assert [(row["table"], row["case"]) for row in costs] == [
        ("methods from Q,K", f"{method}, S=16") for method in methods.METHODS
    ]
    for row in costs:
        assert not row["wrong"]
        assert set(row["seconds"]) == {"rollout", "ours", "QKᵀ alone"}
        assert row["cost"] == pytest.approx(row["seconds"]["ours"] / row["seconds"]["rollout"])
        assert row["error"]["ours"] < 1e-5
        line = next(line for line in said if line.startswith(row["case"]))
        taken = [f"{1e3 * row['seconds'][name]:.2f} ms" for name in ("rollout", "ours")]
        assert line[len(row["case"]) :].split()[:5] == [*" ".join(taken).split(), f"{row['cost']:.2f}×"]
    assert "of rollout" in "\n".join(said).split("Methods from Q,K, B=2 H=2 L=3 D=8, float32\n")[1].splitlines()[0]
    printed = [line for line in said if line.startswith("S=")]
    for row, line in zip(rows, printed, strict=True):
        times = [f"{1e3 * row['seconds'][name]:.2f} ms" for name in ("naive chain", "ours", row["floor"])]
        figures = [*times[:2], f"{row['speedup']:.1f}×", times[2], f"{row['share']:.0%}"]
        assert line.split()[:9] == [row["case"], *" ".join(figures).split()]
        assert line.endswith(row["backend"])
    assert "read 10.0 GB/s, copy 20.0 GB/s (read and written), float32 matmul 50 GFLOP/s" in said
    assert "\nRows from Q,K, B=2 H=2 L=3 D=8, float32\n" in "\n".join(said)


def test_the_floors_do_the_work_that_cannot_be_left_out() -> None:
    maps = [layer.float() for layer in random_maps()]
    found = chains.read_maps(maps)
    assert found.tolist() == pytest.approx(
        [*(float(layer.sum()) for layer in maps[:-1]), float(maps[-1][:, :, 0].sum())]
    )
    halves = [layer.bfloat16() for layer in maps]
    words = halves[0].contiguous().view(-1).view(torch.float32)  # two numbers a word, none converted
    assert torch.equal(chains.read_maps(halves)[0], words.sum())
    assert chains.read_maps(maps[:1]).tolist() == pytest.approx([float(maps[0][:, :, 0].sum())])
    queries, keys = ([torch.full((2, 3, 5, 4), value) for value in values] for values in ((1.0, 2.0), (3.0, 0.5)))
    assert chains.multiply(queries, keys).tolist() == [[[[4.0] * 5]] * 3] * 2  # the top layer's row: 2 · ½ · 4


def test_a_wrong_method_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MOST_FLUSHED", 2**20)
    right = methods.attention_rollout_qk

    def wrong(*, backend: str, method: str, **given: Any) -> torch.Tensor:
        factor = 1.001 if (backend, method) == ("auto", "kobayashi") else 1.0
        return right(backend=backend, method=method, **given) * factor

    monkeypatch.setattr(methods, "attention_rollout_qk", wrong)
    rows = {row.case.partition(",")[0]: row for row in methods.rows_from_qk(SMALL)}
    assert {name for name, row in rows.items() if row.wrong} == {"kobayashi"}
    assert rows["kobayashi"].cost is None
    assert table.line(rows["kobayashi"]).splitlines()[1].strip() == (
        "WRONG, not timed: ours is 1.0e-03 off float64, allowed 1e-05"
    )


@pytest.mark.parametrize(("name", "case"), [("attention_rollout", "maps"), ("attention_rollout_qk", "Q,K")])
def test_a_wrong_result_has_no_figure(ceilings: None, monkeypatch: pytest.MonkeyPatch, name: str, case: str) -> None:
    right = getattr(bench, name)
    monkeypatch.setattr(bench, name, lambda *inputs, **options: right(*inputs, **options) * 1.001)
    said: list[str] = []
    assert not bench.run(SMALL, say=said.append)
    lines = "\n".join(said).split(f"Rows from {case}")[1].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 4
    for line, complaint in zip(lines[::2], lines[1::2], strict=True):
        assert "ms" in line  # the naive chain's
        assert line.split()[3:5] == ["–", "–"]  # ours and the speed-up
        assert line.split()[7:9] == ["–", "–"]  # the share and the error: the floor has its time
        assert complaint.strip().startswith("WRONG, not timed: ours is 1.0e-03 off float64, allowed")


def test_a_result_that_is_not_finite_is_wrong(ceilings: None) -> None:
    reference = torch.ones(2, 3, dtype=torch.float64)
    runs = {"ours": lambda: torch.full((2, 3), torch.nan), "naive chain": lambda: torch.full((2, 3), 1.5)}
    empty = Row("rows from maps", "S=3", "naive chain", "one read of the maps", {}, {}, {})
    row = measuring.compare(empty, runs, reference, {"ours": 1e-6, "naive chain": 1.0}, 0.001, CPU)
    assert row.error == {"ours": float("inf"), "naive chain": 0.5}
    assert row.wrong == ("ours is inf off float64, allowed 1e-06",)
    assert set(row.seconds) == set(row.peak) == {"naive chain"}
    assert row.speedup is None


def test_what_does_not_fit_in_memory_is_skipped(ceilings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "available_bytes", lambda device: 2**20)
    said: list[str] = []
    assert bench.run(Settings(sequences=(4096,), batch=4, heads=8, layers=4, seconds=0.01), say=said.append)
    skipped = [line for line in said if line.startswith("S=4096")]
    # Seven times 4·8·4096² floats: the maps, a layer in float64, and what the naive chain makes.
    assert skipped[0] == f"{'S=4096':<{table.CASE}} skipped: needs about 14.0 GiB of memory, 0.0 GiB are available"
    assert len(skipped) == 2
    assert sum("S=4096" in line and "skipped" in line for line in said) == 2 + len(methods.METHODS)


def test_turns_alternate_and_the_median_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flushed: list[int] = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    seconds: dict[str, Iterator[float]] = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 60.0])}

    def clock(run: Any, device: torch.device) -> float:
        run()
        return next(seconds[order[-1]])

    monkeypatch.setattr(measuring, "clock", clock)
    assert measuring.alternate(runs, 0.0, CPU, lambda: flushed.append(len(order))) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert flushed == [0, 1, 2, 3, 4, 5]  # before every call


def test_ceilings_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best call but one of nine: 0.5 s."""
    seconds = iter([9.0, 1.0, 0.5, 3.0, 0.1, 1.0, 2.0, 2.0, 2.0] * 3)
    monkeypatch.setattr(measuring, "clock", lambda run, device: next(seconds))
    found = measuring.measure_ceilings(CPU, size=2**20, side=64)
    assert (found.read, found.copy, found.matmul) == (2**21, 2**22, 2 * 64**3 * 2)
    assert found.memory == found.copy
    assert found.cache == measuring.cache_bytes(CPU) > 2**16
    assert found.matmul_bf16 is None


def test_ceilings_of_this_machine() -> None:
    found = measuring.measure_ceilings(CPU, size=2**22, side=128)
    assert 1e7 < found.read < 1e13
    assert 1e7 < found.copy < 1e13
    assert 1e7 < found.matmul < 1e14


def test_the_ceiling_that_binds() -> None:
    found = Ceilings(read=100.0, copy=80.0, matmul=1000.0, cache=1)
    assert found.binding(200, 1000, 4.0) == ("memory", 0.5)
    assert found.binding(200, 5000, 20.0) == ("matmul", 0.25)
    assert found.binding(0, 0, 1.0) is None


def test_error_of_a_wrong_shape_or_a_nan_is_infinite() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    assert measuring.relative_error(torch.ones(2, 3) * 1.5, exact) == 0.5
    assert measuring.relative_error(torch.ones(2, 2), exact) == math.inf
    assert measuring.relative_error(torch.full((2, 3), math.nan), exact) == math.inf


def test_a_gpu_is_timed_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that tell the number of calls before them, in milliseconds; the device waits while a call is launched."""
    calls: list[str] = []
    waits: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of None"
            self.at = len(calls)

        def synchronize(self) -> None:
            calls.append("waited")

        def elapsed_time(self, later: "Event") -> float:
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (waits.append(cycles), calls.append("wait")))
    timer = measuring.EventTimer()
    for count in (2, 5):  # a pair of calls each, and nothing of one is left for the next
        assert timer() == 0.0
        calls.extend(["call"] * count)
        assert timer() == count
    assert waits == [measuring.HEAD_START] * 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system has no /proc to ask")
def test_extra_memory_is_what_the_call_adds() -> None:
    kept = torch.ones(2**22)  # 16 MiB held before is not meant

    def run() -> float:
        return float(torch.ones(2**24).sum() + kept[0])  # 64 MiB

    run()
    extra = measuring.peak_extra_bytes(run, CPU)
    assert extra is not None
    assert 60 * 2**20 < extra < 72 * 2**20


def test_a_busy_machine_is_told_and_a_missing_package_left_out() -> None:
    assert table.versions(("torch", "no-such-package")) == {"torch": version("torch")}
    found = {
        "device": "X", "cores": 4, "threads": 2, "python": "3.12.0", "load": 2.5,
        "versions": {"torch": "2.15.0"},
    }  # fmt: skip
    assert table.head(found).splitlines() == [
        "X, 4 cores, 2 CPU threads",
        "Python 3.12.0, torch 2.15.0",
        "This machine is busy (load 2.5 on 4 cores): figures will be off.",
    ]
    assert len(table.head({**found, "load": 1.9}).splitlines()) == 2


def test_a_file_without_a_folder_and_heads_that_do_not_divide_are_refused_before_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def worked(*_: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(bench, "measure_ceilings", worked)
    for file in (tmp_path / "no" / "x.json", tmp_path):
        with pytest.raises(ValueError, match="bench: json must be a file in a folder that is there"):
            bench.run(SMALL, file=file)
    with pytest.raises(ValueError, match="heads must divide the model's width 128, got 3"):
        bench.run(Settings(heads=3), pyhealth=True)
    monkeypatch.setitem(sys.modules, "pyhealth", None)
    with pytest.raises(ImportError, match=r"pip install 'attention-rollout\[pyhealth\]'"):
        bench.run(SMALL, pyhealth=True)


def test_samples_a_second(ceilings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pyhealth = pytest.importorskip("pyhealth", reason="not installed: pip install 'attention-rollout[pyhealth]'")
    monkeypatch.setattr(end_to_end, "CASES", ("S=12", "log-normal, unsorted"))
    monkeypatch.setattr(end_to_end, "LONGEST", 30)
    logged: list[str] = []
    monkeypatch.setattr(pyhealth.handler, "emit", lambda record: logged.append(record.getMessage()))
    said: list[str] = []
    assert bench.run(SMALL, pyhealth=True, file=tmp_path / "x.json", say=said.append)
    assert not [line for line in logged if "vocab" in line]  # between the lines of the table
    every = [row for row in json.loads((tmp_path / "x.json").read_text())["rows"] if row["samples"]]
    rows = [row for row in every if row["peer"] == "PyHealth"]
    others = [row for row in every if row not in rows]
    assert [row["case"] for row in others] == [f"{method}, S=16" for method in (*methods.METHODS, "frozen_gradient")]
    for row in others:
        assert not row["wrong"]
        assert row["cost"] == pytest.approx(row["seconds"]["ours"] / row["seconds"]["rollout"])
    assert [(row["case"], row["samples"]) for row in rows] == [("S=12", 2), ("log-normal, unsorted", 8)]
    for row in rows:
        assert row["error"].keys() == {"PyHealth", "ours"}
        assert max(row["error"].values()) < 1e-6
        line = next(line for line in said if line.startswith(row["case"] + " "))
        rates = [f"{row['samples'] / row['seconds'][name]:.0f}" for name in ("PyHealth", "ours", row["floor"])]
        assert line[len(row["case"]) :].split()[:4] == [*rates[:2], f"{row['speedup']:.1f}×", rates[2]]


@pytest.mark.parametrize("case", ["S=9", "lengths 3-14", "log-normal, sorted", "log-normal, unsorted"])
def test_the_forward_without_padding_gives_the_models_own_logits(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    pytest.importorskip("pyhealth", reason="PyHealth is not installed: pip install 'attention-rollout[pyhealth]'")
    monkeypatch.setattr(end_to_end, "LONGEST", 30)
    model = end_to_end.make_model(heads=2, layers=3, device=CPU).double()
    batches = end_to_end.make_batches(case, 4, CPU)
    wanted = end_to_end.plain_forward(model, batches)
    assert len(wanted) == (16 if case.startswith("log") else 4)
    torch.testing.assert_close(end_to_end.fused_forward(model, batches), wanted, atol=1e-14, rtol=0)
    torch.testing.assert_close(
        end_to_end.plain_forward(model, batches), wanted, atol=0, rtol=0
    )  # nothing is left on it


def test_lengths_of_the_cases() -> None:
    assert end_to_end.draw_lengths("S=7", 3) == [[7, 7, 7]]
    (spread,) = end_to_end.draw_lengths("lengths 256-512", 32)
    assert 256 <= min(spread) < 290
    assert 480 < max(spread) <= 512
    cases = (end_to_end.draw_lengths(f"log-normal, {order}", 32) for order in ("unsorted", "sorted"))
    unsorted, ordered = ([length for batch in case for length in batch] for case in cases)
    assert sorted(unsorted) == ordered != unsorted
    assert 40 < ordered[64] < 60  # the median of 128


def test_importing_it_loads_no_optional_package() -> None:
    code = (
        "import sys, rollout.bench\n"
        "print([m for m in ('pyhealth', 'transformers', 'pyarrow', 'matplotlib', 'pytest') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
