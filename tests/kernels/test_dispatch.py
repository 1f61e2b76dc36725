"""Which backend serves a call, and what a refusal says."""

import os
import sys

import pytest
import torch

import rollout
from rollout import Method
from rollout_kernels import BackendError, _dispatch, _native, ops
from tests.support.cases import random_maps, random_qk, same_bits
from tests.support.oracles import assert_close, rollout_matrices

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter accepts CPU tensors"
)


def test_auto_on_the_cpu():
    maps, method = random_maps(2, 3, 8), rollout.METHODS["rollout"]
    rows, full = (ops.maps_problem(maps, query=query, method=method) for query in (0, None))
    assert _dispatch.choose(rows, "auto").name == ("torch" if _native.unusable() else "native")
    assert _dispatch.choose(full, "auto").name == "torch"
    auto = rollout.attention_rollout(maps)
    assert same_bits(auto, rollout.attention_rollout(maps, backend="torch"))
    assert_close(auto, rollout_matrices(maps, method))


def test_triton_says_why_it_cannot():
    with pytest.raises(BackendError, match=r"attention_rollout: backend='triton' .*triton: tensors are on cpu"):
        rollout.attention_rollout(random_maps(2, 3, 8), query=0, backend="triton")


def test_triton_gives_every_reason_at_once():
    maps = random_maps(2, 3, 8, dtype=torch.float64)
    method = Method(head_fusion=lambda a, g: a.mean(1))
    with pytest.raises(BackendError) as error:
        rollout.attention_rollout(maps, query=0, method=method, backend="triton")
    for reason in ("tensors are on cpu", "float64", "head_fusion"):
        assert reason in str(error.value)


def test_triton_refuses_queries_and_keys_on_the_cpu():
    with pytest.raises(BackendError, match=r"attention_rollout_qk: backend='triton' .*triton: "):
        rollout.attention_rollout_qk(*random_qk(1, 2, 5), query=0, backend="triton")


def test_without_triton_auto_still_serves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rollout_kernels._triton", None)
    monkeypatch.delattr("rollout_kernels._triton", raising=False)
    maps = random_maps(2, 3, 8)
    assert_close(rollout.attention_rollout(maps, query=0), rollout_matrices(maps, rollout.METHODS["rollout"])[:, 0])
    with pytest.raises(BackendError, match="triton: Triton cannot be imported"):
        rollout.attention_rollout(maps, query=0, backend="triton")


@pytest.mark.parametrize("backend", ["cuda", "Torch", "", None, 3])
def test_an_unknown_backend(backend: object):
    with pytest.raises(
        ValueError, match=r"attention_rollout: backend must be one of \('auto', 'triton', 'native', 'torch'"
    ) as error:
        rollout.attention_rollout(random_maps(1, 1, 3), backend=backend)  # type: ignore[arg-type]
    assert repr(backend) in str(error.value)
    assert not isinstance(error.value, BackendError)


def test_a_refusal_is_a_value_error():
    assert issubclass(BackendError, ValueError)


def test_a_backend_that_reads_no_values_refuses_methods_that_need_them():
    """Else its numbers would be those of other methods."""
    given = {
        "values": [torch.rand(1, 2, 5, 4)],
        "output_weights": [torch.rand(2, 4, 6)],
        "inputs": [torch.rand(1, 5, 6)],
    }
    problem = ops.maps_problem(random_maps(1, 2, 5, layers=1), query=0, method=rollout.METHODS["value_norm"], **given)
    assert "it reads no values" in _dispatch.refusals(problem, "native")
    assert _dispatch.choose(problem, "auto").name == "torch"
