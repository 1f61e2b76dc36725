"""The bench's providers and oracle, its measure fixture and its suites: right numbers, hand-computed cases."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import suites, test_chains, test_gpu
from bench.providers import kernels, oracle, peers
from bench.providers.chains import COMPILED, KERNELS, MAPS, QK, TABLES, Provider
from bench.providers.kernels import COLUMNS, FLEX
from bench.providers.oracle import Problem, make_inputs
from rollout.bench.measure import relative_error

ROOT = Path(__file__).resolve().parents[2]


def problem(kind: str, **other: Any) -> Problem:
    return Problem(kind, 2, 3, 17, 3, 8 if kind == "Q,K" else 0, **other)


def random_maps() -> list[Tensor]:
    return make_inputs(problem("maps"))["maps"]


def random_qk() -> tuple[list[Tensor], list[Tensor]]:
    inputs = make_inputs(problem("Q,K"))
    return inputs["queries"], inputs["keys"]


@pytest.mark.parametrize(
    ("kind", "provider"),
    [
        pytest.param(kind, provider, id=f"{kind}-{name}")
        for kind, table in (TABLES | {"Q,K": QK | KERNELS}).items()
        for name, provider in table.items()
        if name not in (COMPILED, COLUMNS) and provider.method is not None
    ],
)
def test_providers_agree_with_the_oracle(kind: str, provider: Provider) -> None:
    given = provider.on(problem(kind))
    assert given["reference"].dtype == torch.float64
    assert given["reference"].shape == ((2, 17, 17) if kind == "full" else (2, 17))
    assert relative_error(given["part"](given["run"]()), given["reference"]) <= 1e-6


def test_the_oracle_takes_lengths() -> None:
    """Of a ragged batch each row is that of the sample alone, and 0 beyond its length; in float64 all the way."""
    maps = random_maps()
    exact = oracle.from_maps(maps, lengths=torch.tensor([17, 5]))
    alone = oracle.from_maps([layer[1:, :, :5, :5].double() for layer in maps])
    torch.testing.assert_close(exact[1, :5], alone[0], atol=1e-14, rtol=0)
    assert exact[1, 5:].tolist() == [0.0] * 12
    queries, keys = random_qk()
    wide = oracle.from_qk([q.double() for q in queries], [k.double() for k in keys])
    torch.testing.assert_close(oracle.from_qk(queries, keys), wide, atol=1e-14, rtol=0)


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


SUITE = """
import pytest
import torch

@pytest.fixture
def ceilings():
    return {"read": 1.0}

@pytest.fixture
def flush():
    return lambda: None

def test_right(measure):
    measure(lambda: torch.ones(3), reference=torch.ones(3).double(), tolerance=1e-6, suite="s", provider="right")

def test_part(measure):
    whole = torch.tensor([1.0, 5.0, 7.0])
    first = torch.ones(1).double()
    measure(lambda: whole, reference=first, part=lambda x: x[:1], suite="s", provider="part", cold=False)

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
    right, part = (each["extra_info"] for each in json.loads((tmp_path / "raw.json").read_text())["benchmarks"])
    assert (right["provider"], right["error"], right["ceilings"]) == ("right", 0.0, {"read": 1.0})
    assert right["cache"] == "flushed before every call"
    assert (part["provider"], part["error"]) == ("part", 0.0)
    assert part["cache"] == "as the call before left it"


def test_work_counts_what_is_read_and_multiplied() -> None:
    shape = Problem("Q,K", B=2, H=3, S=5, L=4, D=7)
    row, every = 2 * 3 * 25 * 3 + 2 * 3 * 5, 2 * 3 * 25 * 4
    assert MAPS["ours"].work(shape) == MAPS["one read of the maps"].work(shape) == (row, 0)
    assert MAPS["naive chain"].work(shape) == (every, 2 * 2 * 125 * 3)
    assert QK["ours"].work(shape) == QK["QKᵀ alone"].work(shape) == (0, 2 * 7 * row)
    assert QK["naive chain"].work(shape) == (0, 2 * 7 * every + 2 * 2 * 125 * 3)


def test_what_a_suite_records_of_its_inputs() -> None:
    given = MAPS["ours"].on(problem("maps", dtype=torch.bfloat16))
    maps = make_inputs(problem("maps", dtype=torch.bfloat16))["maps"]
    assert given["dtype"] == "bfloat16"
    assert given["shape"] == {"B": 2, "H": 3, "S": 17, "L": 3}
    assert given["inputs"] == sum(layer.nbytes for layer in maps)
    assert given["bytes"] == 2 * 2 * 3 * (2 * 17 * 17 + 17)
    assert relative_error(given["run"](), oracle.from_maps(maps)) <= given["tolerance"] == 1e-6
    assert MAPS["naive chain"].on(problem("maps", dtype=torch.bfloat16))["tolerance"] == 5e-2  # it adds in bfloat16


def test_every_layer_is_memory_of_its_own() -> None:
    maps, gradients = make_inputs(problem("chefer")).values()
    assert len({each.data_ptr() for each in (*maps, *gradients)}) == 6
    assert not torch.equal(maps[0], maps[1])
    assert all(torch.allclose(each.sum(-1), torch.ones(2, 3, 17)) for each in maps)


@pytest.mark.parametrize("kind", ["maps", "Q,K"])
@pytest.mark.parametrize("compared", [0, 1, 2])
def test_some_samples_or_the_sums_of_all_rows_are_compared(kind: str, compared: int) -> None:
    given = TABLES[kind]["ours"].on(problem(kind, compared=compared))
    assert given["reference"].shape == ((compared, 17) if compared else (2,))
    assert relative_error(given["part"](given["run"]()), given["reference"]) <= 1e-6
    assert relative_error(given["part"](1.01 * given["run"]()), given["reference"]) > 1e-3


def test_column_means_are_those_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-colreduce runs on a GPU only: here with its own words for a function, [B, H, S] of `reduction`."""

    def flash_colreduce(query: Tensor, key: Tensor, reduction: str) -> Tensor:
        return getattr((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1), reduction)(2)

    monkeypatch.setitem(sys.modules, "flash_colreduce", SimpleNamespace(flash_colreduce=flash_colreduce))
    inputs = random_qk()
    exact = oracle.from_qk(*inputs, KERNELS[COLUMNS].method)
    assert relative_error(KERNELS[COLUMNS].run(*inputs), exact) <= 1e-6
    torch.testing.assert_close(exact.sum(-1), torch.ones(2, dtype=torch.float64))


def test_flex_attention_takes_the_logsumexp_that_is_given() -> None:
    queries, keys = random_qk()
    given = [(q @ k.mT / 8**0.5).logsumexp(-1) for q, k in zip(queries, keys, strict=True)]
    wanted = oracle.from_qk(queries, keys)
    assert relative_error(KERNELS[FLEX].run(queries, keys, given), wanted) <= 1e-6
    assert relative_error(KERNELS[FLEX].run(queries, keys, [lse + 1 for lse in given]), wanted) > 0.1


def test_a_kernel_that_cannot_run_is_skipped_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert KERNELS[COLUMNS].problem() == "flash-colreduce is not installed: pip install flash-colreduce"
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    assert KERNELS[COLUMNS].problem() == "flash-colreduce needs a GPU"
    assert KERNELS[FLEX].problem() is None


def test_what_runs_on_a_gpu_beside_ours() -> None:
    found: dict[str, list[str]] = {}
    for name, provider in test_gpu.RUNS:
        found.setdefault(name, []).append(provider)
    assert found["maps-bf16-c1"] == [test_gpu.OURS, "naive chain", COMPILED, "PyHealth's arithmetic"]
    assert found["qk-bf16-c1"] == [test_gpu.OURS, "naive chain", COMPILED, FLEX, COLUMNS]
    assert found["qk-bf16-c3-given"] == [test_gpu.OURS, FLEX]
    assert found["qk-bf16-c4-given"] == [test_gpu.OURS]


def test_what_a_suite_of_chains_records_beside_its_problem() -> None:
    for test, kind, wanted in (
        (test_chains.test_rows_from_maps, "maps", {"suite": "rows from maps"}),
        (test_chains.test_warm, "maps", {"suite": "rows from maps, warm", "cold": False}),
        (test_chains.test_methods, "chefer", {"suite": "other methods", "method": "chefer"}),
    ):
        found: dict[str, Any] = {}
        test(problem(kind), "ours", found.update, quick=False)
        unnamed = TABLES[kind]["ours"].on(problem(kind)).keys()
        assert {key: found[key] for key in found.keys() - unnamed} == {"provider": "ours", **wanted}
        assert found["shape"] == {"B": 2, "H": 3, "S": 17, "L": 3}
    with pytest.raises(pytest.skip.Exception, match="left out of the quick run"):
        test_chains.test_warm(problem("maps"), "ours", found.update, quick=True)


def timed_on_a_gpu(name: str, provider: str) -> dict[str, Any]:
    """What a case hands to `measure`, small."""
    found: dict[str, Any] = {}
    test_gpu.test_kernel(name, provider, found.update, quick=True)
    return found


def test_ours_on_a_gpu_are_the_kernels_with_a_forwards_logsumexp_where_it_is_given() -> None:
    given = timed_on_a_gpu("qk-bf16-c1-given", test_gpu.OURS)
    options = given["run"].keywords
    assert (options["backend"], options["validate"], options["query"].tolist()) == ("triton", False, [0, 0])
    pairs = zip(options["queries"], options["keys"], strict=True)
    wanted = [(q.float() @ k.float().mT / 4).logsumexp(-1) for q, k in pairs]
    torch.testing.assert_close(options["logsumexp"], wanted)
    assert timed_on_a_gpu("qk-bf16-c1-given", FLEX)["run"].keywords.keys() == {"queries", "keys", "logsumexp"}
    assert timed_on_a_gpu("full-fp32-c1", test_gpu.OURS)["run"].keywords.keys() == {"maps", "backend", "validate"}
    # Without it every score is made twice, and Chefer's method takes as much again for the gradients.
    for name, times in (("qk-bf16-c1", 2), ("chefer-bf16-c1", 3)):
        made = timed_on_a_gpu(name, test_gpu.OURS)
        assert made["flop"] == times * given["flop"]
        assert made["run"].keywords.get("logsumexp") is None
    assert made["run"].keywords["method"] == "chefer"
    # Of long rows their sums.
    long = timed_on_a_gpu("qk-bf16-c3", test_gpu.OURS)
    assert (long["reference"].tolist(), long["tolerance"], given["tolerance"]) == ([1.0, 1.0], 1e-3, 3e-6)


def test_every_suite_names_a_test_that_records_it() -> None:
    for name, node in suites.SUITES.items():
        file, _, function = node.partition("::")  # or all tests of a file
        module = importlib.import_module(f"bench.{file.removesuffix('.py')}")
        assert not function or callable(getattr(module, function)), f"{name}: {file} has no {function}"
        assert f'"{name}"' in inspect.getsource(module), f"{file} records no suite {name!r}"


def test_suites_of_one_file_are_one_call() -> None:
    assert suites.select(["rows from maps", "full matrix", "scaling"]) == {
        "test_chains.py": ["bench/test_chains.py::test_rows_from_maps", "bench/test_chains.py::test_full_matrix"],
        "test_scaling.py": ["bench/test_scaling.py::test_scaling"],
    }
