"""The report of `rollout doctor`."""

import re

import pytest
import torch

from rollout import doctor
from rollout.doctor import machine
from rollout_kernels import _dispatch, _native


def test_every_check_is_good_and_says_what_does_not_serve() -> None:
    report = list(doctor.lines("cpu"))
    checks = [line for line, _ in report if re.match(r"(ok |BAD) ", line)]
    assert all(good for _, good in report)
    assert len(checks) == 16
    assert all("(not triton: tensors are on cpu" in line for line in checks)
    by_native = ["row, ragged, max fusion", "row"] if _native.unusable() is None else []
    for line in checks:
        served = "  maps " in line and line.partition(": ")[2].partition(":")[0] in by_native
        assert f": {'native' if served else 'torch'}   (" in line
        assert ("| not native: " in line) != served


@pytest.mark.parametrize("reason", [None, "it was not compiled when this package was installed"])
def test_says_whether_the_native_kernel_can_be_called(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    monkeypatch.setattr(_native, "unusable", lambda: reason)
    monkeypatch.setattr(machine, "cases", lambda device: [])
    said = f"compiled rows from stored maps, on a CPU: {reason or 'built, and they can be called'}"
    assert (said, True) in list(doctor.lines("cpu"))


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _dispatch._TABLE["torch"]
    wrong = _dispatch.Backend("torch", right.refusals, lambda problem: right.run(problem) * 1.0001)
    monkeypatch.setitem(_dispatch._TABLE, "torch", wrong)
    checks = [(line, good) for line, good in doctor.lines("cpu") if re.match(r"(ok |BAD) .*: torch ", line)]
    assert len(checks) >= 10
    assert not any(good for _, good in checks)
    assert all(line.startswith("BAD 1e-04") for line, _ in checks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="doctor: device must be one that torch can use here, got 'cuda'"):
        list(doctor.lines("cuda"))
