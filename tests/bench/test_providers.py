"""The bench's providers, oracles, fits and limits: right numbers, hand-computed cases, and wrong ones refused."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import scaling, suites
from bench.machine import ceilings, host
from bench.machine.memory import peak_extra_bytes
from bench.pages import fits
from bench.providers import chains, oracle, peers
from bench.providers.chains import COMPILED, FULL, MAPS, METHODS, QK, Provider, Shape

ROOT = Path(__file__).resolve().parents[2]
SIZE = (2, 3, 17, 17)
PLAIN = [name for name in MAPS if name != COMPILED]


def random_maps(seed: int = 0, layers: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(SIZE, generator=generator)).softmax(-1) for _ in range(layers)]


def random_qk() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(2, 3, 17, 8, generator=generator) for _ in range(6)]
    return made[:3], made[3:]


@pytest.mark.parametrize("name", PLAIN)
def test_rows_from_maps_agree_with_the_oracle(name: str) -> None:
    maps, provider = random_maps(), MAPS[name]
    exact = oracle.from_maps(maps, provider.method)
    assert oracle.relative_error(provider.run(maps), exact) <= 1e-6


@pytest.mark.parametrize("name", [name for name in FULL if name != COMPILED])
def test_full_matrices_agree_with_the_oracle(name: str) -> None:
    maps, provider = random_maps(), FULL[name]
    exact = oracle.from_maps(maps, provider.method, query=None)
    assert oracle.relative_error(provider.run(maps), exact) <= 1e-6


@pytest.mark.parametrize("name", [name for name in QK if name != COMPILED])
def test_rows_from_queries_and_keys_agree_with_the_oracle(name: str) -> None:
    assert oracle.relative_error(QK[name].run(*random_qk()), oracle.from_qk(*random_qk())) <= 1e-6


@pytest.mark.parametrize(("method", "who"), METHODS)
def test_other_methods_agree_with_the_oracle(method: str, who: str) -> None:
    maps = random_maps()
    gradients = [torch.randn(SIZE, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    given = (maps, gradients) if method == "chefer" else (maps,)
    exact = oracle.from_maps(maps, method, gradients=given[1] if len(given) > 1 else None)
    assert oracle.relative_error(METHODS[method, who].run(*given), exact) <= 1e-6


def test_peers_on_a_case_done_by_hand() -> None:
    """Two layers of two positions and one head: R = M_2·M_1, every number worked out on paper."""
    first = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None]
    second = torch.tensor([[0.5, 0.5], [0.0, 1.0]])[None, None]
    # M_1 = ½(I + A_1) = [[½, ½], [½, ½]]; M_2 = [[¾, ¼], [0, 1]]
    for peer in (peers.abnar_zuidema, peers.chefer_rollout, peers.pyhealth_maths):
        assert peer([first, second])[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    # R = I + max(A_1∘G_1, 0) = [[1, 2], [0, 1]], then R + max(A_2∘G_2, 0)·R = R + [[½, 1], [0, 1]]·R
    gradient = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])[None, None]
    found = peers.chefer_gradients([first, second], [gradient, gradient])
    assert found[0].tolist() == [[1.5, 4.0], [0.0, 2.0]]


def test_discard_on_a_case_done_by_hand() -> None:
    """Half of four entries go: 0.1 and 0.3; the largest head counts; rows are divided by their sums."""
    maps = torch.tensor([[[0.6, 0.1], [0.3, 0.7]], [[0.2, 0.1], [0.1, 0.2]]])[None]
    # (F + I)/2 = [[0.8, 0], [0, 0.85]], and each row over its sum
    assert peers.gildenblat_discard([maps], 0.5)[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    spared = torch.tensor([[0.0, 0.5], [0.25, 1.0]])[None, None]  # [0, 0] is among the lowest and is spared
    found = peers.gildenblat_discard([spared], 0.5)[0]
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3], [0.0, 1.0]]))


def test_the_long_oracles_agree_with_the_reference() -> None:
    assert oracle.relative_error(oracle.row_chain(random_maps()), oracle.from_maps(random_maps())) <= 1e-14
    assert oracle.relative_error(oracle.row_chain_qk(*random_qk()), oracle.from_qk(*random_qk())) <= 1e-14


def test_error_of_a_wrong_shape_or_a_nan_is_infinite() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    assert oracle.relative_error(torch.ones(2, 3) * 1.5, exact) == 0.5
    assert oracle.relative_error(torch.ones(2, 2), exact) == math.inf
    assert oracle.relative_error(torch.full((2, 3), math.nan), exact) == math.inf


SUITE = """
import pytest
import torch

@pytest.fixture
def module_ceilings():
    return {"read": 1.0}

@pytest.fixture
def flush():
    return lambda: None

def test_right(measure):
    measure(lambda: torch.ones(3), reference=torch.ones(3).double(), tolerance=1e-6, suite="s", provider="right")

def test_wrong(measure):
    measure(lambda: torch.ones(3) * 1.01, reference=torch.ones(3).double(), tolerance=1e-3, suite="s", provider="wrong")
"""


def test_a_wrong_provider_reports_no_number(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.conftest", "-p", "no:cacheprovider", "--rootdir",
               str(tmp_path), str(tmp_path), f"--benchmark-json={tmp_path}/raw.json"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "BENCH_SECONDS": "0.01"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not timed: max|err|/max|ref| = 1.00e-02, allowed 1e-03" in done.stdout
    (kept,) = json.loads((tmp_path / "raw.json").read_text())["benchmarks"]
    assert kept["extra_info"]["provider"] == "right"
    assert kept["extra_info"]["error"] == 0.0
    assert kept["extra_info"]["cache"] == "flushed before every call"
    assert kept["extra_info"]["ceilings"] == {"read": 1.0}


def test_work_counts_what_is_read_and_multiplied() -> None:
    shape = Shape(B=2, H=3, S=5, L=4, D=7)
    assert shape.row_bytes() == 4 * (2 * 3 * 25 * 3 + 2 * 3 * 5)
    assert shape.all_bytes(2) == 2 * (2 * 3 * 25 * 4)
    assert shape.product_flop == 2 * 2 * 125 * 3
    assert shape.row_scores_flop == 2 * 7 * (2 * 3 * 25 * 3 + 2 * 3 * 5)
    assert MAPS["ours"].work(shape) == (shape.row_bytes(), 0)
    assert MAPS["naive chain"].work(shape) == (shape.all_bytes(), shape.product_flop)


def test_the_ceiling_that_binds() -> None:
    limits = {"read": 100.0, "copy": 150.0, "matmul": 1000.0}
    assert ceilings.binding(limits, 200, 1000, 4.0) == ("read", 0.5)
    assert ceilings.binding(limits, 200, 5000, 20.0) == ("matmul", 0.25)
    assert ceilings.binding(limits, 0, 0, 1.0) is None


def test_ceilings_are_measured() -> None:
    found = ceilings.measure(size=2**22, side=128)
    assert found.cache == host.cache_bytes() > 2**16
    assert 1e8 < found.read < 1e13
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.matmul < 1e14


def test_power_finds_an_exact_exponent() -> None:
    sizes = [64, 128, 256, 512, 1024]
    fit = fits.power(sizes, [1.0, *(3e-9 * size**2 for size in sizes[1:])])  # the first lies off: it is not in the tail
    assert fit is not None
    assert fit.exponent == pytest.approx(2.0, abs=1e-9)
    assert fit.error == pytest.approx(0.0, abs=1e-7)
    assert fit.at(2048) == pytest.approx(3e-9 * 2048**2)
    assert fit.reaches(3e-9 * 4096**2) == pytest.approx(4096)


def test_power_standard_error() -> None:
    """x = e⁰…e³ and log y = 0, 2, 2, 4: slope 1.2, residuals ∓0.2, ±0.6, so √(0.8 / 2 / 5)."""
    fit = fits.power([math.exp(i) for i in range(4)], [math.exp(v) for v in (0, 2, 2, 4)])
    assert fit is not None
    assert (fit.exponent, fit.error) == (pytest.approx(1.2), pytest.approx(math.sqrt(0.8 / 2 / 5)))
    assert str(fit) == "1.20 ± 0.28"


def test_power_refuses_and_gives_up() -> None:
    assert fits.power([1, 2, 4], [0, 0, 5]) is None
    flat = fits.power([1, 2, 4], [3, 3, 3])
    assert flat is not None
    assert flat.reaches(10) == math.inf
    with pytest.raises(ValueError, match="one length, got 2 and 1"):
        fits.power([1, 2], [1])
    with pytest.raises(ValueError, match="x must be positive, got 0"):
        fits.power([0, 2], [1, 2])


def test_peak_memory_of_a_call() -> None:
    size = 48 * 2**20
    found = peak_extra_bytes(lambda: torch.ones(size // 4).sum())
    if found is None:
        pytest.skip("no /proc/self/clear_refs that can be written")
    assert 0.9 * size <= found <= 1.5 * size


def test_grown_predicts_the_next_doubling() -> None:
    assert scaling.grown([10.0, 40.0], 1.0) == 160.0
    assert scaling.grown([10.0, 400.0], 1.0) == 3200.0  # at most ×8
    assert scaling.grown([10.0], 1.0) == 40.0
    assert scaling.grown([0.5, 0.9], 1.0) == 0.9


def test_a_curve_stops_before_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of S=256 take 8 MiB here; a limit of 5 MiB must end the curve at S=128 without making them."""
    made: list[int] = []
    make = scaling.make_inputs

    def spied(source: str, shape: Shape) -> tuple[list[Tensor], ...]:
        made.append(shape.S)
        return make(source, shape)

    monkeypatch.setattr(scaling, "make_inputs", spied)
    limits = scaling.Limits(5 * 2**20, timing=0.0)
    *points, end = scaling.climb("maps", "ours", "S", limits, lambda: None)
    assert made == [64, 128] == [point["value"] for point in points]
    assert [point["inputs"] for point in points] == [2**19, 2**21]
    assert all(point["error"] < 1e-6 for point in points)
    assert (end["stopped"], end["value"], end["limit"]) == ("memory", 256, 5 * 2**20)
    assert end["predicted"] >= 2**23


def test_a_wrong_provider_has_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scaling.MAPS, "ours", Provider(lambda maps: chains.ours(maps) * 1.001))
    with pytest.raises(AssertionError, match=r"not timed: error 1\.00e-03"):
        next(scaling.climb("maps", "ours", "S", scaling.QUICK, lambda: None))


def test_scaling_inputs_are_maps_of_their_own() -> None:
    (maps,) = scaling.make_inputs("maps", Shape(2, 3, 16, 4))
    assert len({each.data_ptr() for each in maps}) == 4
    assert not torch.equal(maps[0], maps[1])
    assert all(torch.allclose(each.sum(-1), torch.ones(2, 3, 16)) for each in maps)
    assert sum(each.nbytes for each in maps) == scaling.input_bytes("maps", Shape(2, 3, 16, 4))
    queries, keys = scaling.make_inputs("Q,K", Shape(2, 3, 16, 4))
    assert sum(each.nbytes for each in (*queries, *keys)) == scaling.input_bytes("Q,K", Shape(2, 3, 16, 4))


def test_every_suite_names_tests_that_exist() -> None:
    for name, (file, functions) in suites.SUITES.items():
        text = (ROOT / "bench" / file).read_text()
        for function in functions:
            assert f"def {function}(" in text, f"{name}: {file} has no {function}"
        assert f'"{name}"' in text, f"{file} records no suite {name!r}"


def test_suites_of_one_file_are_one_call() -> None:
    found = suites.selections(["rows from maps", "head sum", "scaling", "full matrix"])
    assert found == {
        "test_rows_from_maps.py": [
            "bench/test_rows_from_maps.py::test_float32", "bench/test_rows_from_maps.py::test_head_sum",
        ],
        "test_full_matrix.py": ["bench/test_full_matrix.py"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"suite must be one of rows from maps, .*; got nonsense"):
        suites.selections(["nonsense"])
