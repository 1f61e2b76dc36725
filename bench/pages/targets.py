"""What the project set out to reach, as rows of data, and the one judge of whether a record says it has.

What depends on the machine is judged by a share of work that cannot be left out, timed in the same run on the same
inputs; ratios to other people's code are figures, and no targets, but for what is theirs to do: PyHealth's functions.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.machine.record import Record, Suite, find, seconds
from bench.providers.chains import NAIVE, NATIVE, PRODUCTS, READ, SEQUENCES
from rollout.bench.end_to_end import FUSED, STOCK
from rollout.bench.measure import OURS

MET, MISSED, NO_GPU, NO_RUN = "met", "missed", "not yet run on a GPU", "not in the record"
CPU, GPU = "CPU", "GPU"
END_TO_END, COHORT, CAPTURE, KERNELS = "PyHealth end to end", "cohort run", "overhead of capture", "kernels on a GPU"
TRITON = f"{OURS}, triton"

Value = Callable[[Suite], float]


class Target(NamedTuple):
    """One thing asked of a suite: `value` of it at least or at most so much.

    Attributes:
        suite: which.
        what: what is asked, beside the suite's name, in words; nothing is looked up by it.
        value: from the suite of a record; raises LookupError where that lacks what is asked for.
        least, most: one of the two.
        unit: after the number.
        device: whose record.
        case: of the kernels on a GPU, the one that is timed.
        precision: of its products, as it is shipped: what a floor is to be reckoned with; "" without products.
    """

    suite: str
    what: str
    value: Value
    least: float | None = None
    most: float | None = None
    unit: str = " %"
    device: str = CPU
    case: str = ""
    precision: str = ""

    @property
    def asked(self) -> str:
        return f"≥ {self.least:g}{self.unit}" if self.least is not None else f"≤ {self.most:g}{self.unit}"


class Verdict(NamedTuple):
    """A target, what the record says, None where it says nothing, and which of the four words that comes to."""

    target: Target
    found: float | None
    word: str


def judge(target: Target, record: Record | None) -> Verdict:
    """The verdict on one target by the record of its device; None: there is none."""
    if record is None:
        return Verdict(target, None, NO_GPU if target.device == GPU else NO_RUN)
    try:
        found = target.value(record["suites"][target.suite])
    except LookupError:
        return Verdict(target, None, NO_RUN)
    met = found >= target.least if target.least is not None else found <= (target.most or 0.0)
    return Verdict(target, found, MET if met else MISSED)


def judge_all(cpu: Record | None, cuda: Record | None = None) -> list[Verdict]:
    return [judge(target, {CPU: cpu, GPU: cuda}[target.device]) for target in TARGETS]


def field(suite: Suite, name: str, provider: str = OURS, **which: Any) -> Any:
    """What the first result of this kind says.

    Raises:
        LookupError: there is no such result, or it does not say.
    """
    found = find(suite["results"], provider=provider, **which)
    if found is None or found.get(name) is None:
        raise LookupError(name)
    return found[name]


def median(suite: Suite, provider: str = OURS, **which: Any) -> float:
    return seconds({"seconds": field(suite, "seconds", provider, **which)})


def share(of: str, ours: str = OURS, **which: Any) -> Value:
    """The time of the work that cannot be left out over that of ours, in percent."""
    return lambda suite: 100 * median(suite, of, **which) / median(suite, ours, **which)


def slower(provider: str, than: str, **which: Any) -> Value:
    """How many times as long one takes as another."""
    return lambda suite: median(suite, provider, **which) / median(suite, than, **which)


def memory_change(suite: Suite) -> float:
    """How far the peak memory of two cohort runs lies apart, in percent of the smaller run's."""
    few, many = (field(suite, "peak_bytes", case=f"memory, {count} samples") for count in ("2,000", "20,000"))
    return 100 * abs(many / few - 1)


def memory_exponent(case: str) -> Value:
    """Of the extra memory of ours in S, at the last doubling: 1 is linear; 0 where it does not grow."""

    def value(suite: Suite) -> float:
        ours = [each for each in suite["results"] if (each["case"], each["provider"]) == (case, OURS)]
        sizes = sorted(each["shape"]["S"] for each in ours)
        before, last = (field(suite, "peak_extra_bytes", case=case, S=size) for size in (sizes[-2], sizes[-1]))
        return max(0.0, math.log2(max(1, last) / max(1, before)))

    return value


def memory_share(of: str, **which: Any) -> Value:
    """The extra memory of ours over that of another, in percent."""
    name = "peak_extra_bytes"
    return lambda suite: 100 * field(suite, name, **which) / field(suite, name, of, **which)


def largest_error(suite: Suite) -> float:
    return max(each["error"] for each in suite["results"] if each["provider"] == OURS)


def rate(name: str, case: str) -> Value:
    """Of a kernel on a GPU: bytes or operations a second."""
    return lambda suite: field(suite, name, TRITON, case=case) / median(suite, TRITON, case=case)


def of_copy(case: str) -> Value:
    """The rate at which a kernel reads what it must, in percent of the rate of a copy."""
    return lambda suite: 100 * rate("bytes", case)(suite) / suite["ceilings"]["copy"]


def tera_flop(case: str) -> Value:
    """The rate at which a kernel multiplies what it must, in 10¹² operations a second."""
    return lambda suite: rate("flop", case)(suite) / 1e12


def milliseconds(case: str) -> Value:
    return lambda suite: 1e3 * median(suite, TRITON, case=case)


def _kernel(case: str, what: str, value: Callable[[str], Value], least: float | None = None, **more: Any) -> Target:
    return Target(KERNELS, what, value(case), least, device=GPU, case=case, **more)


def _shares(suite: str, of: str) -> list[Target]:
    return [Target(suite, f"S={seq}, of {of}", share(of, S=seq), 60) for seq in (128, 256, 512)]


def _native_shares(suite: str) -> list[Target]:
    return [Target(suite, f"native, S={seq}, of {READ}", share(READ, NATIVE, S=seq), 90) for seq in SEQUENCES]


def _end_to_end(device: str) -> list[Target]:
    cases = ("log-normal, sorted", "lengths 256-512")
    return [Target(END_TO_END, f"{case}, of a {FUSED}", share(FUSED, case=case), 80, device=device) for case in cases]


def _faster(suite: str, cases: dict[str, float]) -> list[Target]:
    return [
        Target(suite, f"{case}, of PyHealth's time", slower(STOCK, OURS, case=case), least=least, unit="×")
        for case, least in cases.items()
    ]


TARGETS = (
    *_shares("rows from maps", READ),
    *_shares("rows from bf16 maps", READ),
    *_native_shares("rows from maps"),
    *_native_shares("rows from bf16 maps"),
    *_shares("rows from Q,K", PRODUCTS),
    *_end_to_end(CPU),
    Target(COHORT, "time beside model and chain", lambda suite: 100 * field(suite, "bookkeeping"), most=10),
    Target(COHORT, "two workers against one", slower("one worker", "two workers"), 1.7, unit="×"),
    Target(COHORT, "change of peak memory from 2,000 to 20,000 samples", memory_change, most=10),
    *(Target("scaling", f"from {case}: exponent of extra memory in S", memory_exponent(case), most=1, unit="")
      for case in ("maps", "Q,K")),
    *(Target(suite, "largest error over largest value", largest_error, most=most, unit="")
      for suite, most in (("rows from maps", 1e-6), ("full matrix", 1e-6), ("rows from Q,K", 3e-6))),
    *(Target(CAPTURE, f"{case}, of its forward", slower("capture", "plain forward", case=case), most=1.4, unit="×")
      for case in ("BERT-base", "PyHealth Transformer")),
    Target("BERT-base from tokens", "extra memory, of that of stored maps", memory_share(NAIVE), most=25),
    Target("class-specific relevance", "S=512, different codes, extra memory, of PyHealth's",
           memory_share(STOCK, S=512), most=25),
    *_faster("evaluation", {
        "whole, log-normal, unsorted, E64 H2 L2": 25, "whole, log-normal, unsorted, E128 H8 L4": 25,
        "whole, log-normal, sorted, E64 H2 L2": 5, "three methods, log-normal, sorted, E64 H2 L2": 15,
    }),
    Target("class-specific relevance", "different codes, S=512, of PyHealth's time",
           slower(STOCK, OURS, case="different codes", S=512), least=4, unit="×"),
    _kernel("maps-fp32-c1", "rows from maps, ≥ 1 GB, of copy bandwidth", of_copy, 95),
    _kernel("full-fp32-c1", "full matrix from fp32 maps, S=512, products as bf16x6, of copy bandwidth", of_copy, 36,
            precision="bf16x6"),
    _kernel("qk-bf16-c1-given", "rows from Q,K, bf16, D=64", tera_flop, 340, unit=" TFLOP/s", precision="bf16"),
    _kernel("maps-fp32-small", "small batch B8 H12 S197 L12, validate=False", milliseconds, most=0.07, unit=" ms"),
    *_end_to_end(GPU),
)  # fmt: skip
