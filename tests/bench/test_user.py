"""`rollout bench`: the chain it compares with, its measurements on known clocks, and its lines and record."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import rollout
from rollout.bench import comparison as bench
from rollout.bench import measure as measuring
from rollout.bench import table
from rollout.bench.measure import Ceilings, Row, Settings

SMALL = Settings(batch=2, heads=2, layers=3, size=8, sequences=(8, 16), seconds=0.01)
CPU = torch.device("cpu")
CEILINGS = Ceilings(read=10e9, copy=20e9, matmul=50e9)


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known limits, without the seconds it takes to measure them."""
    monkeypatch.setattr(bench, "measure_ceilings", lambda device: CEILINGS)


def random_maps(seq: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, seq, seq, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(4)]


def test_the_naive_chain_is_the_formula_by_hand() -> None:
    low = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    high = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    # ½(I + high) has row 0 (½, ½); ½(I + low) is [[1, 0], [¼, ¾]]: together (½ + ⅛, ⅜).
    maps = [layer.expand(1, 2, 2, 2) for layer in (low, high)]
    assert bench.naive_chain(maps).tolist() == [[0.625, 0.375]]
    unnormalised = [4 * layer for layer in maps]  # rows of ½(I + 4A) sum to 2½ and are divided by it
    assert bench.naive_chain(unnormalised)[0].tolist() == pytest.approx([(0.2 + 0.8 * 0.4), 0.8 * 0.6], abs=1e-7)
    with pytest.raises(ValueError, match="one or more layers"):
        bench.naive_chain([])


def test_the_naive_chain_is_the_reference_backends_row() -> None:
    maps = random_maps()
    wanted = rollout.attention_rollout(maps, query=0, backend="reference")
    torch.testing.assert_close(bench.naive_chain(maps), wanted, atol=1e-14, rtol=0)
    generator = torch.Generator().manual_seed(1)
    queries, keys = ([torch.randn(2, 3, 9, 4, generator=generator).double() for _ in range(3)] for _ in range(2))
    wanted = rollout.attention_rollout_qk(queries, keys, query=0, backend="reference")
    torch.testing.assert_close(bench.naive_chain_qk(queries, keys), wanted, atol=1e-14, rtol=0)


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
    assert record["ceilings"] == {"read": 10e9, "copy": 20e9, "matmul": 50e9}
    rows = record["rows"]
    assert [(row["table"], row["case"]) for row in rows] == [
        (name, f"S={seq}") for name in ("rows from maps", "rows from Q,K") for seq in (8, 16)
    ]
    maps_work = [4 * 2 * 2 * (2 * seq * seq + seq) for seq in (8, 16)]  # bytes: B·H·((L−1)·S² + S) floats
    qk_work = [2 * 8 * 2 * 2 * (2 * seq * seq + seq) for seq in (8, 16)]  # 2·D operations for each such score
    for row, work, limit in zip(rows, maps_work + qk_work, [20e9, 20e9, 50e9, 50e9], strict=True):
        assert not row["wrong"]
        assert row["backend"] == "torch"
        assert set(row["seconds"]) == set(row["error"]) == set(row["peak"]) == {"naive chain", "ours"}
        assert row["speedup"] == pytest.approx(row["seconds"]["naive chain"] / row["seconds"]["ours"])
        assert row["rate"] == pytest.approx(work / row["seconds"]["ours"])
        assert row["share"] == pytest.approx(row["rate"] / limit)
        assert max(row["error"].values()) < 1e-6
    printed = [line for line in said if line.startswith("S=")]
    for row, line in zip(rows, printed, strict=True):
        figures = [f"{1e3 * row['seconds'][name]:.2f} ms" for name in ("naive chain", "ours")]
        assert line.split()[:6] == [row["case"], *" ".join(figures).split(), f"{row['speedup']:.1f}×"]
        assert line.endswith("torch")
    assert "read 10.0 GB/s, copy 20.0 GB/s (read and written), float32 matmul 50 GFLOP/s" in said
    assert "\nRows from Q,K, B=2 H=2 L=3 D=8, float32\n" in "\n".join(said)


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
        assert line.split()[1:][2:7] == ["–"] * 5  # ours, speed-up, rate, share, error
        assert complaint.strip().startswith("WRONG, not timed: ours is 1.0e-03 off float64, allowed")


def test_a_result_that_is_not_finite_is_wrong() -> None:
    reference = torch.ones(2, 3, dtype=torch.float64)
    runs = {"ours": lambda: torch.full((2, 3), torch.nan), "naive chain": lambda: torch.full((2, 3), 1.5)}
    row = measuring.compare(
        Row("rows from maps", "S=3", {}, {}, {}), runs, reference, {"ours": 1e-6, "naive chain": 1.0}, 0.001, CPU
    )
    assert row.error == {"ours": float("inf"), "naive chain": 0.5}
    assert row.wrong == ("ours is inf off float64, allowed 1e-06",)
    assert set(row.seconds) == set(row.peak) == {"naive chain"}
    assert row.speedup is None


def test_what_does_not_fit_in_memory_is_skipped(ceilings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_available_bytes", lambda device: 2**20)
    said: list[str] = []
    assert bench.run(Settings(sequences=(4096,), batch=4, heads=8, layers=4, seconds=0.01), say=said.append)
    skipped = [line for line in said if line.startswith("S=4096")]
    # Seven times 4·8·4096² floats: the maps, a layer in float64, and what the naive chain makes.
    assert skipped[0] == "S=4096   skipped: needs about 14.0 GiB of memory, 0.0 GiB are available"
    assert len(skipped) == 2


def test_turns_alternate_and_the_median_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    seconds: dict[str, Iterator[float]] = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 60.0])}

    def clock(run: Any, device: torch.device) -> float:
        run()
        return next(seconds[order[-1]])

    monkeypatch.setattr(measuring, "_clock", clock)
    assert measuring.alternate(runs, 0.0, CPU) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_ceilings_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_clock", lambda run, device: 0.5 if run() is not None else 0.0)
    found = measuring.measure_ceilings(CPU, size=2**20, side=64)
    assert (found.read, found.copy, found.matmul) == (2**21, 2**22, 2 * 64**3 * 2)
    assert found.memory == found.copy


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
    found = {
        "device": "X", "cores": 4, "threads": 2, "python": "3.12.0", "load": 2.5,
        "versions": {"torch": "2.15.0", "pyhealth": None},
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


def test_patients_a_second(ceilings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pyhealth", reason="PyHealth is not installed: pip install 'attention-rollout[pyhealth]'")
    from rollout.bench import end_to_end

    monkeypatch.setattr(end_to_end, "CASES", ("S=12", "log-normal lengths"))
    monkeypatch.setattr(end_to_end, "LONGEST", 30)
    said: list[str] = []
    assert bench.run(SMALL, pyhealth=True, file=tmp_path / "x.json", say=said.append)
    rows = [row for row in json.loads((tmp_path / "x.json").read_text())["rows"] if row["table"] == "patients"]
    assert [(row["case"], row["patients"]) for row in rows] == [("S=12", 2), ("log-normal lengths", 8)]
    for row in rows:
        assert set(row["error"]) == {"PyHealth's", "ours"}
        assert max(row["error"].values()) < 1e-6
        line = next(line for line in said if line.startswith(row["case"] + " "))
        figures = [f"{row['patients'] / row['seconds'][name]:.0f}" for name in ("PyHealth's", "ours")]
        assert line[len(row["case"]) :].split()[:2] == figures


def test_importing_it_loads_no_optional_package() -> None:
    code = (
        "import sys, rollout.bench\n"
        "print([m for m in ('pyhealth', 'transformers', 'pyarrow', 'matplotlib', 'pytest') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
