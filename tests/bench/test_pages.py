"""What is rendered from a record: exact rows, verdicts, the places kept for a GPU, markers, plots; merging suites."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import run, scaling, suites
from bench.machine import record
from bench.pages import report, tables, targets
from bench.pages.report import Device

HEAD = {"date": "2001-02-03", "threads": 2, "python": "3.12", "versions": {"torch": "2.9"}}
CEILINGS = {"read": 10e9, "copy": 15e9, "matmul": 100e9, "cache": 2**25}


def timed(median: float, **info: Any) -> dict[str, Any]:
    spread = {"min": 0.9 * median, "max": 2 * median, "q1": 0.95 * median, "q3": 1.1 * median, "rounds": 9}
    return {"seconds": {"median": median, **spread}, "peak_extra_bytes": 2**21, "dtype": "float32", **info}


def suite(*results: dict[str, Any]) -> dict[str, Any]:
    return {**HEAD, "ceilings": CEILINGS, "results": list(results)}


def maps_suite() -> dict[str, Any]:
    shape = {"B": 2, "H": 3, "L": 4}
    rows = []
    for seq, naive, ours in ((64, 0.010, 0.002), (128, 0.030, 0.010), (256, 0.060, 0.010), (512, 0.300, 0.020)):
        sizes = {**shape, "S": seq}
        rows += [
            timed(ours, provider="ours", shape=sizes, error=3e-7, bytes=60_000_000, flop=0),
            timed(naive, provider="naive chain", shape=sizes, error=2e-6, bytes=80_000_000, flop=10_000_000),
            timed(0.8 * ours, provider="one read of the maps", shape=sizes, bytes=60_000_000),
        ]
    return suite(*rows)


def cohort_suite() -> dict[str, Any]:
    sizes = {"H": 8}
    rows = [
        {"case": "synthetic cohort", "provider": "PyHealth", "samples": 1000, "samples_per_second": 50.0,
         "median": 20.0},
        {"case": "synthetic cohort", "provider": "ours", "samples": 20000, "samples_per_second": 400.0, "median": 50.0,
         "bookkeeping": 0.08, "peak_bytes": 2**30, "stages": {"collate": 1.0, "forward": 46.0}},
        {"case": "workers", "provider": "one worker", "samples": 100, "samples_per_second": 100.0, "median": 1.0},
        {"case": "workers", "provider": "two workers", "samples": 100, "samples_per_second": 150.0, "median": 1.0},
        {"case": "memory, 2,000 samples", "provider": "ours", "samples": 2000, "median": 1.0, "peak_bytes": 1000},
        {"case": "memory, 20,000 samples", "provider": "ours", "samples": 20000, "median": 9.0, "peak_bytes": 1050},
    ]  # fmt: skip
    return suite(*({**row, "seconds": {"median": row.pop("median"), "rounds": 1}, "shape": sizes} for row in rows))


def scaling_suite() -> dict[str, Any]:
    """Ours takes S² time and 1 MiB beside its inputs; the naive chain S³ time and S² memory, and stops at 1024."""
    points: list[dict[str, Any]] = []
    for source in ("maps", "Q,K"):
        for provider, power in (("ours", 2), ("naive chain", 3)):
            for seq in (64, 128, 256, 512):
                extra = 2**20 if provider == "ours" else 64 * seq**2
                inputs = 128 * seq**2 if source == "maps" else 16384 * seq
                shape = {"B": 1, "H": 8, "S": seq, "L": 4}
                points.append({
                    "source": source, "provider": provider, "axis": "S", "value": seq, "shape": shape, "rounds": 5,
                    "seconds": 1e-9 * seq**power, "extra": extra, "inputs": inputs, "error": 1e-7, "checked": "float64",
                })  # fmt: skip
            why = {"stopped": "memory", "value": 1024, "predicted": 2**28, "limit": 2**26}
            points.append({"source": source, "provider": provider, "axis": "S", **why})
    return {**HEAD, "ceilings": CEILINGS, "memory_limit": 2**26, "results": points}


def small_record() -> dict[str, Any]:
    end_to_end = suite(
        *(
            timed(median, case=case, provider=who, patients=32, shape={"B": 32, "S": 500}, error=1e-7)
            for case, theirs, ours in (("lengths 256-512", 2.0, 0.25), ("log-normal, sorted", 1.0, 0.2))
            for who, median in (("PyHealth", theirs), ("ours", ours), ("plain forward", 0.5))
        )
    )
    made = {"rows from maps": maps_suite(), "PyHealth end to end": end_to_end, "cohort run": cohort_suite(),
            "scaling": scaling_suite()}  # fmt: skip
    return {"schema": 2, "device": "Some CPU", "cores": 2, "suites": made}


def test_headline_is_rendered_from_the_record() -> None:
    device = Device(Path("x"), cpu=small_record())
    lines = report.readme_table(device, report.all_verdicts([device], device)).splitlines()
    assert lines[0] == "Some CPU, 2 cores; `make bench`, 2001-02-03. Medians of one run."
    assert lines[2:] == [
        "| suite | against | theirs | ours | speed-up | target |",
        "|---|---|---|---|---|---|",
        "| rows from maps, S=64 | naive chain | 10.0 ms | 2.00 ms | 5.0× | ≥ 2.5×, met |",
        "| rows from maps, S=128 | naive chain | 30.0 ms | 10.0 ms | 3.0× | ≥ 3.5×, missed |",
        "| rows from maps, S=256 | naive chain | 60.0 ms | 10.0 ms | 6.0× | ≥ 5×, met |",
        "| rows from maps, S=512 | naive chain | 300.0 ms | 20.0 ms | 15.0× | ≥ 10×, met |",
        "| PyHealth end to end, log-normal, sorted | PyHealth's interpreter | 32 samples/s | 160 samples/s | 5.0× "
        "| ≥ 8×, missed |",
        "| PyHealth end to end, lengths 256-512 | PyHealth's interpreter | 16 samples/s | 128 samples/s | 8.0× "
        "| ≥ 6×, met |",
        "| cohort run, synthetic cohort | PyHealth's interpreter | 50 samples/s | 400 samples/s | 8.0× | ≥ 7×, met |",
        "| everything on a GPU | – | – | – | – | not yet run on a GPU |",
        "",
        "Targets: 12 met, 3 missed, 6 not yet run on a GPU, 14 not in the record.",
    ]


def test_verdicts_say_met_missed_or_not_run() -> None:
    found = {each.what: (each.found, each.verdict) for each in targets.verdicts(small_record())}
    assert found["CPU, rows from maps, S=256, of the read limit"] == ("80 %", "met")
    assert found["CPU, cohort run, time beside model and chain"] == ("8 %", "met")
    assert found["CPU, cohort run, two workers against one"] == ("1.5×", "missed")
    assert found["CPU, cohort run, change of peak memory with its size"] == ("5 %", "met")
    assert found["CPU, extra memory from maps, O(B·H·S): its exponent in S at the last doubling"] == ("0", "met")
    assert found["CPU, largest error against float64 over largest value, rows from maps"] == ("3.0e-07", "met")
    assert found["CPU, rows from Q,K, S=64, against the naive chain"] == ("–", "not in the record")
    assert {verdict for what, (_, verdict) in found.items() if what.startswith("GPU")} == {"not yet run on a GPU"}


def test_verdicts_of_a_gpu_record() -> None:
    gpu = {
        "results": [
            {"name": "maps-fp32-c1", "share_of_copy": 0.94},
            {"name": "maps-fp32-small", "ms": 0.065},
            {"name": "full-fp32-c1", "failed": "runs differ in their bits"},
        ]
    }
    found = {
        each.suite: each.verdict for each in targets.verdicts(None, None, gpu) if each.suite.startswith("bench.gpu")
    }
    assert found == {
        "bench.gpu, maps-fp32-c1": "missed",
        "bench.gpu, maps-fp32-small": "met",
        "bench.gpu, qk-bf16-c1-given": "not yet run on a GPU",
        "bench.gpu, full-fp32-c1": "missed",
    }


def test_suite_table_gives_rate_and_share_of_the_ceiling_that_binds() -> None:
    lines = tables.suite_table(maps_suite()).splitlines()
    ours = next(line for line in lines if "| S=512 | ours |" in line)
    # 60 MB in 20 ms are 3 GB/s, of 10 GB/s
    assert ours == ("| S=512 | ours | 20.0 ms | -5 to +10 % | 9 | 15.00× | 3.0 GB/s | 30% of read | 2 MiB | 3.0e-07 |")
    assert "| S=64 | naive chain | 10.0 ms | -5 to +10 % | 9 | – | 8.0 GB/s | 80% of read | 2 MiB | 2.0e-06 |" in lines


def test_scaling_tables_have_exponents_and_stops() -> None:
    made = small_record()
    exponents = [line for line in tables.exponents_table(made).splitlines() if line.startswith("| maps")]
    assert "| 2.00 ± 0.00 | 0.00 ± 0.00 |" in exponents[0]
    assert "| 3.00 ± 0.00 | 2.00 ± 0.00 |" in exponents[1]
    stops = tables.stops_table(made).splitlines()
    # 192·S² bytes pass 64 MiB at S = √(2²⁶/192) = 591, and of Q and K 16,384·S + 2²⁰ bytes at S = 4,032
    naive = next(line for line in stops if line.startswith("| maps | naive chain"))
    assert naive == "| maps | naive chain | S=512 | 48 MiB | S=1024 needs 256 MiB | S ≈ 590 |"
    ours = next(line for line in stops if line.startswith("| Q,K | ours"))
    assert ours == "| Q,K | ours | S=512 | 9 MiB | S=1024 needs 256 MiB | S ≈ 4,000 |"


def test_cohort_table_estimates_full_mimic() -> None:
    text = tables.cohort_table(small_record())
    assert (
        "| synthetic cohort | ours | 20,000 | 50.0 s | 400 | 8.00× | collate 1.0, forward 46.0 | 8% | 1024 MiB |"
        in text
    )
    assert "| workers | two workers | 100 | 1.0 s | 150 | 1.50× |" in text
    assert text.splitlines()[-1].startswith("Estimate, not a measurement: the 236,532 samples")
    assert text.endswith("PyHealth 1.3 h, ours 0.2 h.")  # 236,532 / 50 and / 400 seconds


def test_the_page_keeps_the_places_of_what_has_not_run() -> None:
    device = Device(Path("some-cpu"), cpu=small_record())
    text = report.page([device], report.all_verdicts([device], device), device)
    assert "Kernels, case by case (`python -m bench.gpu`): **not yet run on a GPU**." in text
    assert "(`python -m bench.run --device cuda`): **not yet run on a GPU**." in text
    assert 'Not in the record: `python -m bench.run --suite "full matrix"`.' in text
    for name in suites.SUITES:
        assert f"### {name}\n" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_page_of_a_gpu_record() -> None:
    case = {"name": "c", "shape": {"B": 1, "S": 9, "D": 0}, "dtype": "float32", "ms": 2.0, "gb_s": 100.0,
            "share_of_copy": 0.5, "peers_ms": {"naive chain": 5.0}}  # fmt: skip
    bad = {"name": "w", "shape": {"B": 1}, "dtype": "bfloat16", "failed": "runs differ in their bits"}
    gpu = {"device": "Some GPU", "date": "2001-02-03", "ceilings": {"copy_gb_s": 200.0, "matmul_tflop_s": 7.0},
           "results": [case, bad]}  # fmt: skip
    lines = tables.gpu_table(gpu).splitlines()
    assert lines[0] == "Some GPU, 2001-02-03: copy 200 GB/s, bf16 matmul 7 TFLOP/s."
    assert lines[-2:] == [
        "| c | B=1, S=9 | float32 | 2.000 ms | 100 GB/s | 50% of copy | naive chain 2.5× |",
        "| w | B=1 | bfloat16 | wrong, not timed: runs differ in their bits | – | – | – |",
    ]


def checkout(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the pages' markers and one record, and this machine made out to be another."""
    folder = root / "bench" / "results" / "some-cpu"
    folder.mkdir(parents=True)
    (root / "README.md").write_text("above\n<!-- bench -->\nold\n<!-- /bench -->\nbelow\n")
    (root / "bench" / "README.md").write_text("x\n<!-- verdicts -->\n<!-- /verdicts -->\ny\n")
    record.save(folder / "cpu.json", small_record())
    monkeypatch.setattr("bench.machine.host.folder", lambda: folder)
    return folder


def test_every_page_and_plot_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'attention-rollout[plots]'")
    folder = checkout(tmp_path, monkeypatch)
    written = report.write_all(tmp_path)
    pictures = {path.name for path in written if path.suffix == ".png"}
    assert pictures == {
        "speed-up.png", "ceilings.png", "scaling-time.png", "scaling-memory.png", "samples-per-second.png",
    }  # fmt: skip
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("above\n<!-- bench -->\nSome CPU, 2 cores")
    assert readme.endswith("\n<!-- /bench -->\nbelow\n")
    assert "old" not in readme
    page = (tmp_path / "bench" / "RESULTS.md").read_text()
    assert all(f"](results/some-cpu/{name})" in page for name in pictures)
    verdicts = (tmp_path / "bench" / "README.md").read_text()
    assert "| CPU, rows from maps, S=512, against the naive chain | ≥ 10× | 15× | met | rows from maps |" in verdicts
    again = {path: path.read_bytes() for path in report.write_all(tmp_path, plots=False)}
    assert again[tmp_path / "bench" / "RESULTS.md"].decode() == page
    assert again[tmp_path / "README.md"].decode() == readme


def test_markers_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(
        ValueError, match=r"README\.md must have the markers <!-- bench --> and <!-- /bench --> once each"
    ):
        report.render(tmp_path / "README.md", "text", "bench")


def test_suites_from_pytest_benchmark() -> None:
    stats = {"min": 1.0, "median": 2.0, "max": 3.0, "q1": 1.5, "q3": 2.5, "rounds": 9, "mean": 2.0}
    info = {"suite": "head sum", "provider": "ours", "ceilings": CEILINGS, "threads": 2, "shape": {"S": 64}}
    child = {"suite": "cohort run", "provider": "ours", "threads": 1, "elapsed": 7.0, "samples_per_second": 3.0}
    found = record.by_suite({"benchmarks": [
        {"name": "a", "stats": stats, "extra_info": info}, {"name": "b", "stats": stats, "extra_info": child},
    ]})  # fmt: skip
    assert list(found) == ["head sum", "cohort run"]
    assert (found["head sum"]["threads"], found["head sum"]["ceilings"]) == (2, CEILINGS)
    assert found["head sum"]["results"] == [
        {"seconds": {key: stats[key] for key in record.KEPT}, "provider": "ours", "shape": {"S": 64}}
    ]
    assert found["cohort run"]["results"][0]["seconds"] == {"median": 7.0, "rounds": 1}


def test_a_suite_run_again_replaces_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.json"
    record.save(path, small_record())
    fresh = suite(timed(9.0, provider="ours", shape={"S": 64})) | {"date": "2002-02-02"}
    asked: list[list[str]] = []

    def time_file(nodes: list[str]) -> dict[str, dict[str, Any]]:
        asked.append(nodes)
        return {"full matrix": fresh}

    monkeypatch.setattr(run, "time_file", time_file)
    assert run.main(["--suite", "full matrix", "--out", str(path)]) == 0
    assert asked == [["bench/test_full_matrix.py"]]
    kept = record.load(path)
    assert kept["suites"] == small_record()["suites"] | {"full matrix": fresh}


def test_a_file_that_fails_keeps_the_earlier_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    record.save(path, small_record())
    monkeypatch.setattr(run, "time_file", lambda nodes: None)
    assert run.main(["--suite", "rows from Q,K", "--out", str(path)]) == 1
    assert "test_rows_from_qk.py FAILED" in capsys.readouterr().err
    assert record.load(path) == small_record()


def test_unknown_suites_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["--suite", "speed"])
    assert stopped.value.code == 2
    assert "suite must be one of rows from maps" in capsys.readouterr().err
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(suites.NAMES)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"bench: .*cpu\.json must"):
        record.load(tmp_path / "cpu.json")


def test_the_stored_pages_are_those_of_the_stored_records(tmp_path: Path) -> None:
    """RESULTS.md and the verdicts in bench/README.md were rendered from the records beside them."""
    root = Path(report.__file__).resolve().parents[2]
    for page in ("README.md", "bench/README.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(root / page, tmp_path / page)
    shutil.copytree(root / "bench" / "results", tmp_path / "bench" / "results")
    report.write_all(tmp_path, plots=False)
    for page in ("bench/README.md", "bench/RESULTS.md"):
        assert (tmp_path / page).read_text() == (root / page).read_text(), f"{page}: run python -m bench.pages"


def test_every_suite_is_described() -> None:
    assert set(report.ABOUT) == set(suites.SUITES)
    assert json.dumps(sorted(scaling.BASE)) == '["B", "H", "L", "S"]'
