"""The report of `rollout doctor`."""

import re

import pytest
import torch

from rollout import doctor
from rollout_kernels import _dispatch


def test_every_check_is_good_and_says_why_triton_does_not_serve_the_cpu() -> None:
    report = list(doctor.lines("cpu"))
    checks = [line for line, _ in report if re.match(r"(ok |BAD) ", line)]
    assert all(good for _, good in report)
    assert len(checks) == 14
    assert all(": torch   (not triton: tensors are on cpu" in line for line in checks)


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _dispatch._TABLE["torch"]
    wrong = _dispatch.Backend("torch", right.refusals, lambda problem: right.run(problem) * 1.0001)
    monkeypatch.setitem(_dispatch._TABLE, "torch", wrong)
    checks = [(line, good) for line, good in doctor.lines("cpu") if line.startswith(("ok ", "BAD"))]
    assert not any(good for _, good in checks)
    assert all(line.startswith("BAD 1e-04") for line, _ in checks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="doctor: device must be one that torch can use here, got 'cuda'"):
        list(doctor.lines("cuda"))
