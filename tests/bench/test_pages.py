"""What is rendered from a record: exact rows, verdicts, the places kept for a GPU, markers, plots; merging suites."""

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from bench import run, suites
from bench.machine import record
from bench.pages import plots, report, tables, targets
from bench.pages.frame import frame_of
from bench.pages.targets import Target, judge
from rollout.files import put_between_markers

HEAD = {"date": "2001-02-03", "threads": 2, "python": "3.12", "versions": {"torch": "2.9"}}
CEILINGS = {"read": 10e9, "copy": 8e9, "matmul": 100e9, "cache": 2**25, "matmul_bf16": None}


def timed(median: float, **info: Any) -> dict[str, Any]:
    spread = {"min": 0.9 * median, "max": 2 * median, "q1": 0.95 * median, "q3": 1.1 * median, "rounds": 9}
    return {"seconds": {"median": median, **spread}, "peak_extra_bytes": 2**21, "dtype": "float32", **info}


def record_of(made: dict[str, Any], device: str = "Some CPU") -> dict[str, Any]:
    return {"schema": 3, "device": device, "cores": 2, "suites": made}


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
            timed(0.005, provider="one read of the maps", shape=sizes, bytes=60_000_000),
        ]
    return suite(*rows)


def cohort_suite() -> dict[str, Any]:
    rows = [
        {"case": "synthetic cohort", "provider": "PyHealth", "samples": 1000, "median": 20.0},
        {"case": "synthetic cohort", "provider": "ours", "samples": 20000, "median": 50.0, "bookkeeping": 0.08,
         "peak_bytes": 2**30, "stages": {"collate": 1.0, "forward": 46.0}},
        {"case": "workers", "provider": "one worker", "samples": 100, "median": 3.0},
        {"case": "workers", "provider": "two workers", "samples": 100, "median": 2.0},
        {"case": "memory, 2,000 samples", "provider": "ours", "samples": 2000, "median": 1.0, "peak_bytes": 1000},
        {"case": "memory, 20,000 samples", "provider": "ours", "samples": 20000, "median": 9.0, "peak_bytes": 1050},
    ]  # fmt: skip
    taken = ({**row, "seconds": {"median": row.pop("median"), "rounds": 1}} for row in rows)
    return suite(*(each | {"shape": {"H": 8}} for each in taken))


def scaling_suite() -> dict[str, Any]:
    """Ours takes S² time and 1 MiB beside its inputs; the naive chain S³ time and S² memory."""
    points = []
    for case in ("maps", "Q,K"):
        for provider, power in (("ours", 2), ("naive chain", 3)):
            for seq in (64, 128, 256, 512, 1024):
                extra = 2**20 if provider == "ours" else 64 * seq**2
                inputs = 128 * seq**2 if case == "maps" else 16384 * seq
                shape = {"B": 1, "H": 8, "S": seq, "L": 4}
                off = 7.0 if seq == 64 else 1.0  # the first lies off: the fit is of the last four
                points.append(timed(off * 1e-9 * seq**power, case=case, provider=provider, shape=shape, inputs=inputs,
                                    error=1e-7, checked="float64") | {"peak_extra_bytes": extra})  # fmt: skip
    return suite(*points)


def small_record() -> dict[str, Any]:
    end_to_end = suite(
        *(
            timed(median, case=case, provider=who, samples=32, shape={"B": 32, "S": 500}, error=1e-7)
            for case, theirs, ours in (("lengths 256-512", 2.0, 0.25), ("log-normal, sorted", 1.0, 0.2))
            for who, median in (("PyHealth", theirs), ("ours", ours), ("fused forward, no padding", 0.18))
        )
    )
    made = {"rows from maps": maps_suite(), "PyHealth end to end": end_to_end, "cohort run": cohort_suite(),
            "scaling": scaling_suite()}  # fmt: skip
    return record_of(made)


def rows_of(name: str, made: dict[str, Any]) -> pl.DataFrame:
    """The frame of a record with one suite."""
    return frame_of(record_of({name: made}))


def test_the_readmes_table_shows_peers_and_shares_and_no_verdict() -> None:
    text = report.readme_table(small_record(), None)
    lines = text.splitlines()
    assert lines[0].startswith("Some CPU, 2 cores; `make bench`, 2001-02-03. Medians of one run. Share: the time of")
    assert lines[2:] == [
        "| suite | against | theirs | ours | speed-up | share |",
        "|---|---|---|---|---|---|",
        "| rows from maps, S=64 | naive chain | 10.0 ms | 2.00 ms | 5.00× | 250% of one read of the maps |",
        "| rows from maps, S=512 | naive chain | 300.0 ms | 20.0 ms | 15.00× | 25% of one read of the maps |",
        "| PyHealth end to end, log-normal, sorted | PyHealth | 32 samples/s | 160 samples/s | 5.00× "
        "| 90% of fused forward, no padding |",
        "| cohort run, synthetic cohort | PyHealth | 50 samples/s | 400 samples/s | 8.00× | – |",
    ]
    assert not any(word in text for word in (targets.MET, targets.MISSED, "≥", "≤"))


def test_the_readme_shows_the_compiled_kernel_where_there_is_one() -> None:
    """As `"auto"` takes it."""
    given = small_record()
    given["suites"]["rows from maps"]["results"].append(
        timed(0.001, provider="ours, native", shape={"B": 2, "H": 3, "L": 4, "S": 64})
    )
    assert "| rows from maps, S=64 | naive chain | 10.0 ms | 1.00 ms | 10.00× |" in report.readme_table(given, None)


def test_the_readme_has_the_kernels_where_a_gpu_has_run() -> None:
    case = {"case": "maps-fp32-c1", "bytes": 6_000_000_000, "flop": 0, "shape": {"S": 512}}
    kernels = suite(
        timed(0.002, provider="ours, triton", **case),
        timed(0.014, provider="naive chain", **case),
        timed(0.005, provider="FlexAttention, Q and K swapped", **case),
        timed(0.001, provider="ours, triton", **case | {"case": "alone"}),
    ) | {"ceilings": CEILINGS | {"copy": 4e12}}
    cuda = record_of({"kernels on a GPU": kernels}, "Some GPU")
    *_, told, table = report.readme_table(small_record(), cuda).split("\n\n")
    header, _, *rows = table.splitlines()
    assert told == "Some GPU; `make gpu`, 2001-02-03."
    assert header == "| kernel | time | rate | over the naive chain | over FlexAttention |"
    assert rows == [
        "| maps-fp32-c1 | 2.00 ms | 3000.0 GB/s, 75% of memory | 7.0× | 2.5× |",
        "| alone | 1.00 ms | 6000.0 GB/s, 150% of memory | – | – |",
    ]


def verdicts(cpu: dict[str, Any] | None, cuda: dict[str, Any] | None = None) -> dict[tuple[str, str], Any]:
    """(suite, what), the GPU's told apart → what was found and the verdict."""
    frames = {"CPU": cpu and frame_of(cpu), "GPU": cuda and frame_of(cuda)}
    judged = {}
    for target in targets.TARGETS:
        found, word = judge(target, frames[target.device])
        name = target.suite if target.device == "CPU" else "GPU"
        judged[name, target.what] = None if found is None else round(found, 9), word
    return judged


def test_verdicts_say_met_missed_or_not_run() -> None:
    found = verdicts(small_record())
    assert found["rows from maps", "S=256, of one read of the maps"] == (50.0, "missed")
    assert found["PyHealth end to end", "log-normal, sorted, of a fused forward, no padding"] == (90.0, "met")
    assert found["PyHealth end to end", "lengths 256-512, of a fused forward, no padding"] == (72.0, "missed")
    assert found["cohort run", "time beside model and chain"] == (8.0, "met")
    assert found["cohort run", "two workers against one"] == (1.5, "missed")
    assert found["cohort run", "change of peak memory from 2,000 to 20,000 samples"] == (5.0, "met")
    assert found["scaling", "from maps: exponent of extra memory in S"] == (0.0, "met")
    assert found["rows from maps", "largest error over largest value"] == (3e-7, "met")
    assert found["rows from Q,K", "S=128, of QKᵀ alone"] == (None, "not in the record")
    assert {word for (suite, _), (_, word) in found.items() if suite == "GPU"} == {"not yet run on a GPU"}
    assert {word for (suite, _), (_, word) in verdicts(None).items() if suite != "GPU"} == {"not in the record"}


def test_verdicts_of_a_gpu_record() -> None:
    kernels = suite(
        timed(0.01, case="maps-fp32-c1", provider="ours, triton", bytes=77_000_000, flop=0),  # 7.7 of 8 GB/s
        timed(0.01, case="full-fp32-c1", provider="ours, triton", bytes=28_000_000, flop=0),
        timed(0.01, case="qk-bf16-c1-given", provider="ours, triton", bytes=0, flop=3_500_000_000_000),
        timed(1.0, case="maps-fp32-small", provider="naive chain", bytes=1, flop=1),
    )
    found = verdicts(None, record_of({"kernels on a GPU": kernels}))
    assert found["GPU", "rows from maps, ≥ 1 GB, of copy bandwidth"] == (96.25, "met")
    full = "full matrix from fp32 maps, S=512, products as bf16x6, of copy bandwidth"
    assert found["GPU", full] == (35.0, "missed")
    assert found["GPU", "rows from Q,K, bf16, D=64"] == (350.0, "met")
    assert found["GPU", "small batch B8 H12 S197 L12, validate=False"] == (None, "not in the record")


@pytest.mark.parametrize(
    ("least", "most", "found", "word"),
    [
        (60.0, None, 60.0, "met"),
        (60.0, None, 59.99, "missed"),
        (None, 1.4, 1.4, "met"),
        (None, 1.4, 1.41, "missed"),
        (None, 0.0, 0.0, "met"),
    ],
)
def test_the_judge(least: float | None, most: float | None, found: float, word: str) -> None:
    target = Target("full matrix", "of something", pl.col("error").first(), least, most)
    judged = judge(target, rows_of("full matrix", suite(timed(1.0, provider="ours", error=found))))
    assert judged == (found, word)
    for lacking in (None, frame_of(record_of({})), rows_of("full matrix", suite()), frame_of(small_record())):
        assert judge(target, lacking) == (None, "not in the record")


def test_a_target_that_is_wrongly_written_is_no_missing_record() -> None:
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        judge(Target("full matrix", "", pl.col("nothing"), 1.0), frame_of(record_of({})))


def test_no_ratio_to_a_peer_is_a_target() -> None:
    """Slowing every peer down, and nothing else, changes no verdict."""
    made = small_record()
    before = verdicts(made)
    for each in made["suites"].values():
        for result in each["results"]:
            if result["provider"] in ("naive chain", "PyHealth"):
                result["seconds"]["median"] *= 100
    assert verdicts(made) == before


def test_every_target_is_of_a_suite_and_asks_one_thing() -> None:
    assert {target.suite for target in targets.TARGETS} <= suites.SUITES.keys()
    assert all((target.least is None) != (target.most is None) for target in targets.TARGETS)
    names = [(target.device, target.suite, target.what) for target in targets.TARGETS]
    assert len(set(names)) == len(names)


def test_suite_table_gives_share_rate_and_the_ceiling_that_binds() -> None:
    lines = tables.suite_table(rows_of("rows from maps", maps_suite())).splitlines()
    # 60 MB in 20 ms are 3 GB/s, of 10 GB/s
    assert (
        "| S=512 | ours | 20.0 ms | -5 to +10 % | 9 | 15.00× | 25% of one read of the maps "
        "| 3.0 GB/s, 30% of memory | 2 MiB | 3.0e-07 |"
    ) in lines
    assert (
        "| S=64 | naive chain | 10.0 ms | -5 to +10 % | 9 | – | 50% of one read of the maps "
        "| 8.0 GB/s, 80% of memory | 2 MiB | 2.0e-06 |"
    ) in lines
    assert "samples" not in lines[0]  # a column in which none has anything is left out
    order = [line.split(" | ")[:2] for line in lines[2:8]]  # groups as they ran, in each the baseline first
    providers = ("naive chain", "ours", "one read of the maps")
    assert order == [[f"| S={seq}", provider] for seq in (64, 128) for provider in providers]
    assert "| S=64 | one read of the maps | 5.00 ms | -5 to +10 % | 9 | 2.00× | – |" in lines[4]


def test_who_counts_no_samples_is_compared_by_the_call() -> None:
    both = [timed(4.0, provider="naive chain", samples=8), timed(1.0, provider="ours", samples=1)]
    one = [both[0], timed(1.0, provider="ours")]
    assert [rows_of("model families", suite(*each))["speed_up"][1] for each in (both, one)] == [0.5, 4.0]


def test_products_of_other_dtypes_have_no_share_of_a_float32_ceiling() -> None:
    products = timed(1.0, provider="ours", flop=50_000_000_000)
    made = suite(products, timed(1.0, provider="nobody"), products | {"dtype": "bfloat16"})
    without = made | {"ceilings": None}
    rates = [tables.cell(row, "rate") for each in (made, without) for row in rows_of("full matrix", each).to_dicts()]
    assert rates == ["50 GFLOP/s, 50% of matmul", "–", "50 GFLOP/s", "–", "–", "–"]


def test_scaling_table_has_exponents() -> None:
    """The fit is scipy's, of the last four points: an exact power has no standard error."""
    rows = [
        line
        for line in tables.scaling_table(rows_of("scaling", scaling_suite())).splitlines()
        if line.startswith("| maps")
    ]
    assert rows[0] == ("| maps | ours | 64 … 1024 | 2.00 ± 0.00 | 0.00 ± 0.00 | 1.05 ms | 128 MiB | 1 MiB | 1e-07 |")
    assert "| maps | naive chain | 64 … 1024 | 3.00 ± 0.00 | 2.00 ± 0.00 |" in rows[1]


def test_exponent_standard_error_by_hand() -> None:
    """x = e⁰…e³ and log y = 0, 2, 2, 4: slope 1.2, residuals ∓0.2, ±0.6, so √(0.8 / 2 / 5)."""
    sizes = pl.Series([0, 1, 2, 3]).exp()
    assert tables.exponent(sizes, pl.Series([0, 2, 2, 4]).exp()) == "1.20 ± 0.28"
    assert tables.exponent(sizes, pl.Series([1.0, 1.0, 0.0, None])) == "–"


def test_cohort_table_has_stages_and_memory() -> None:
    text = tables.suite_table(rows_of("cohort run", cohort_suite()))
    assert (
        "| synthetic cohort | ours | 20,000 | 50.00 s | 1 | 400 | 8.00× | collate 1.0, forward 46.0 | 8% | 1024 MiB |"
    ) in text
    assert "| workers | two workers | 100 | 2.00 s | 1 | 50 | 1.50× |" in text


def test_the_page_keeps_the_places_of_what_has_not_run(tmp_path: Path) -> None:
    alone = {tmp_path / "some-cpu" / "cpu.json": small_record()}
    text = report.page(alone, "VERDICTS")
    assert "## Targets (CPU: Some CPU)\n\nVERDICTS\n" in text
    assert "(`python -m bench.run --device cuda`): **not yet run on a GPU**." in text
    assert "`torch.compile`: no compiler works on this machine." in text
    there = small_record()["suites"]
    left_out = [name for name in suites.SUITES if name not in there]
    assert f"Not in this record: {', '.join(left_out)}." in text
    for name in there:
        assert f"### {name}\n\n" in text
    assert "2001-02-03, 2 threads; torch 2.9; read 10.0 GB/s, copy 8.0 GB/s, float32 100 GFLOP/s" in text
    assert "middle half of the rounds typically 15% of the median wide." in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block
    both = alone | {tmp_path / "some-gpu" / "cuda.json": record_of(small_record()["suites"], "Some GPU")}
    assert "not yet run on a GPU" not in report.page(both, "")
    assert "## Some GPU, 2 cores" in report.page(both, "")


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
    judged = (tmp_path / "bench" / "README.md").read_text()
    assert "| CPU | rows from maps | S=512, of one read of the maps | ≥ 60 % | 25 % | missed |" in judged
    again = {path: path.read_bytes() for path in report.write_all(tmp_path, plots=False)}
    assert again[tmp_path / "bench" / "RESULTS.md"].decode() == page
    assert again[tmp_path / "README.md"].decode() == readme


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The points, and axes that a reader can read: plain numbers, the sizes or cases there are, the line at 100 %."""
    figures = {}
    matplotlib = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda self, path, **_: figures.update({path.stem: self}))
    made = small_record()
    for name in ("rows from maps", "scaling"):
        made["suites"][name]["results"].reverse()  # sizes ascend, in whatever order they ran
    plots.draw_all(made, tmp_path)
    lines = {
        (name, axis.get_title(), line.get_label()): (list(line.get_xdata()), [round(y, 9) for y in line.get_ydata()])
        for name, figure in figures.items() for axis in figure.axes for line in axis.get_lines()
    }  # fmt: skip
    sizes = [64, 128, 256, 512]
    assert lines["speed-up", "rows from maps", "ours"] == (sizes, [5.0, 3.0, 6.0, 15.0])
    assert lines["ceilings", "rows from maps", "ours"] == (sizes, [300.0, 60.0, 60.0, 30.0])
    assert lines["scaling-time", "rows from Q,K", "naive chain: S^3.00 ± 0.00"][1][1:3] == [0.002097152, 0.016777216]
    assert lines["scaling-memory", "rows from maps", "ours"][1][0] == round((2**19 + 2**20) / 2**30, 9)
    cases = ["lengths 256-512", "log-normal, sorted"]
    assert lines["samples-per-second", "PyHealth end to end", "ours"] == (cases, [128.0, 160.0])
    assert lines["samples-per-second", "cohort run", "PyHealth"] == (["synthetic cohort"], [50.0])
    speed_up, ceilings, by_case = (figures[name].axes[0] for name in ("speed-up", "ceilings", "samples-per-second"))
    assert [label.get_text() for label in speed_up.get_xticklabels()] == [str(size) for size in sizes]
    assert [label.get_text() for label in by_case.get_xticklabels()] == cases
    assert {"1", "2", "5", "10"} <= {label.get_text() for label in speed_up.get_yticklabels()}
    assert (speed_up.get_yscale(), ceilings.get_yscale(), ceilings.get_ylim()[0]) == ("log", "linear", 0.0)
    assert [100, 100] in [list(line.get_ydata()) for line in ceilings.get_lines()]
    assert figures["speed-up"].get_suptitle() == "Speed-up over the naive chain\nSome CPU, 2 cores"


def test_markers_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(
        ValueError, match=r"README\.md must have the markers <!-- bench --> and <!-- /bench --> once each"
    ):
        put_between_markers(tmp_path / "README.md", "bench", "text")


def test_suites_from_pytest_benchmark() -> None:
    stats = {"min": 1.0, "median": 2.0, "max": 3.0, "q1": 1.5, "q3": 2.5, "rounds": 9, "mean": 2.0}
    info = {"suite": "full matrix", "provider": "ours", "ceilings": CEILINGS, "threads": 2, "shape": {"S": 64}}
    child = {"suite": "cohort run", "provider": "ours", "threads": 1, "elapsed": 7.0, "samples_per_second": 3.0}
    found = record.by_suite({"benchmarks": [
        {"name": "a", "stats": stats, "extra_info": info}, {"name": "b", "stats": stats, "extra_info": child},
    ]})  # fmt: skip
    assert list(found) == ["full matrix", "cohort run"]
    assert (found["full matrix"]["threads"], found["full matrix"]["ceilings"]) == (2, CEILINGS)
    assert found["full matrix"]["results"] == [
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
    assert asked == [["bench/test_chains.py::test_full_matrix"]]
    kept = record.load(path)
    assert kept["suites"] == small_record()["suites"] | {"full matrix": fresh}


def test_a_file_that_fails_keeps_the_earlier_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    record.save(path, small_record())
    monkeypatch.setattr(run, "time_file", lambda nodes: None)
    assert run.main(["--suite", "rows from Q,K", "--out", str(path)]) == 1
    assert "test_chains.py FAILED" in capsys.readouterr().err
    assert record.load(path) == small_record()


def test_unknown_suites_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["--suite", "speed"])
    assert stopped.value.code == 2
    assert "--suite: invalid choice: 'speed' (choose from" in capsys.readouterr().err
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(suites.SUITES)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"cpu\.json (is damaged|must have schema 3).*remove it and run"):
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


def test_every_suite_is_described_in_the_readme() -> None:
    text = (Path(report.__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    for name in suites.SUITES:
        assert f"| {name} |" in text, name
