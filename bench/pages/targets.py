"""What the project set out to reach, as rows of data, and the one judge of whether a record says it has.

What depends on the machine is judged by a share of work that cannot be left out, timed in the same run on the same
inputs; ratios to other people's code are figures, and no targets, but for what is theirs to do: PyHealth's functions.
"""

from typing import Any, NamedTuple

import polars as pl

from bench.pages.frame import ratio
from bench.providers.chains import NAIVE, NATIVE, PRODUCTS, READ, SEQUENCES
from rollout.bench.end_to_end import FUSED, STOCK
from rollout.bench.measure import OURS

MET, MISSED, NO_GPU, NO_RUN = "met", "missed", "not yet run on a GPU", "not in the record"
CPU, GPU = "CPU", "GPU"
END_TO_END, COHORT, KERNELS = "PyHealth end to end", "cohort run", "kernels on a GPU"
TRITON = f"{OURS}, triton"


class Target(NamedTuple):
    """One thing asked of a suite: `value` of it at least or at most so much, one of the two."""

    suite: str
    what: str  # is asked, beside the suite's name, in words; nothing is looked up by it
    value: pl.Expr  # of the suite's rows of a frame; null where they lack what is asked for
    least: float | None = None
    most: float | None = None
    unit: str = " %"
    device: str = CPU  # whose record
    case: str = ""  # of the kernels on a GPU, the one that is timed
    precision: str = ""  # of its products, as shipped: what a floor is reckoned with; "" without products

    @property
    def asked(self) -> str:
        return f"≤ {self.most:g}{self.unit}" if self.least is None else f"≥ {self.least:g}{self.unit}"


def judge(target: Target, frame: pl.DataFrame | None) -> tuple[float | None, str]:
    """What the record of its device says, None where it says nothing, and which of the four words that comes to."""
    if frame is None:
        return None, NO_GPU if target.device == GPU else NO_RUN
    found = frame.filter(suite=target.suite).select(target.value).item()
    if found is None:
        return None, NO_RUN
    met = found <= target.most if target.least is None else found >= target.least
    return found, MET if met else MISSED


def at(value: pl.Expr, provider: str = OURS, **which: Any) -> pl.Expr:
    """What a column, or what is reckoned of columns, is for the first result of this kind; null without one."""
    return value.filter(provider=provider, **which).first()


def memory_exponent(case: str) -> pl.Expr:
    """Of the extra memory of ours in S, at the last doubling: 1 is linear; 0 where it does not grow."""
    extra, size = (pl.col(name).filter(case=case, provider=OURS) for name in ("peak_extra_bytes", "S"))
    return extra.sort_by(size).clip(1).log(2).diff().last().clip(0)


def _kernel(case: str, what: str, value: pl.Expr, **asked: Any) -> Target:
    return Target(KERNELS, what, at(value, TRITON, case=case), device=GPU, case=case, **asked)


MAPS, BF16_MAPS, QK, CLASSES = "rows from maps", "rows from bf16 maps", "rows from Q,K", "class-specific relevance"
EXTRA, LONGER = "peak_extra_bytes", SEQUENCES[1:]
FEW, MANY = (at(pl.col("peak_bytes"), case=f"memory, {count} samples") for count in ("2,000", "20,000"))
LARGEST_ERROR = pl.col("error").filter(provider=OURS).max()
# Of a kernel on a GPU: the rate at which it reads what it must, in percent of a copy's; and at which it multiplies.
OF_COPY = 100 * pl.col("bytes") / pl.col("copy") / pl.col("median")
TERA_FLOP = pl.col("flop") / pl.col("median") / 1e12

TARGETS = (
    *(Target(suite, f"S={seq}, of {READ}", 100 * at(ratio(READ), S=seq), least=60)
      for suite in (MAPS, BF16_MAPS) for seq in LONGER),
    *(Target(suite, f"native, S={seq}, of {READ}", 100 * at(ratio(READ), NATIVE, S=seq), least=90)
      for suite in (MAPS, BF16_MAPS) for seq in SEQUENCES),
    *(Target(QK, f"S={seq}, of {PRODUCTS}", 100 * at(ratio(PRODUCTS), S=seq), least=60) for seq in LONGER),
    *(Target(END_TO_END, f"{case}, of a {FUSED}", 100 * at(ratio(FUSED), case=case), least=80, device=CPU)
      for case in ("log-normal, sorted", "lengths 256-512")),
    Target(COHORT, "time beside model and chain", 100 * at(pl.col("bookkeeping")), most=10),
    Target(COHORT, "two workers against one", at(ratio("one worker"), "two workers"), least=1.7, unit="×"),
    Target(COHORT, "change of peak memory from 2,000 to 20,000 samples", 100 * (MANY / FEW - 1).abs(), most=10),
    *(Target("scaling", f"from {case}: exponent of extra memory in S", memory_exponent(case), most=1, unit="")
      for case in ("maps", "Q,K")),
    *(Target(suite, "largest error over largest value", LARGEST_ERROR, most=most, unit="")
      for suite, most in ((MAPS, 1e-6), ("full matrix", 1e-6), (QK, 3e-6))),
    *(Target("overhead of capture", f"{case}, of its forward", 1 / at(ratio("plain forward"), "capture", case=case),
             most=1.4, unit="×") for case in ("BERT-base", "PyHealth Transformer")),
    Target("BERT-base from tokens", "extra memory, of that of stored maps", 100 / at(ratio(NAIVE, field=EXTRA)),
           most=25),
    Target(CLASSES, "S=512, different codes, extra memory, of PyHealth's", 100 / at(ratio(STOCK, field=EXTRA), S=512),
           most=25),
    *(Target("evaluation", f"{case}, of PyHealth's time", at(ratio(STOCK), case=case), least=least, unit="×")
      for case, least in (
          ("whole, log-normal, unsorted, E64 H2 L2", 25), ("whole, log-normal, unsorted, E128 H8 L4", 25),
          ("whole, log-normal, sorted, E64 H2 L2", 5), ("three methods, log-normal, sorted, E64 H2 L2", 15))),
    Target(CLASSES, "different codes, S=512, of PyHealth's time", at(ratio(STOCK), case="different codes", S=512),
           least=4, unit="×"),
    _kernel("maps-fp32-c1", "rows from maps, ≥ 1 GB, of copy bandwidth", OF_COPY, least=95),
    _kernel("full-fp32-c1", "full matrix from fp32 maps, S=512, products as bf16x6, of copy bandwidth", OF_COPY,
            least=36, precision="bf16x6"),
    _kernel("qk-bf16-c1-given", "rows from Q,K, bf16, D=64", TERA_FLOP, least=340, unit=" TFLOP/s", precision="bf16"),
    _kernel("maps-fp32-small", "small batch B8 H12 S197 L12, validate=False", 1e3 * pl.col("median"), most=0.07,
            unit=" ms"),
    *(Target(END_TO_END, f"{case}, of a {FUSED}", 100 * at(ratio(FUSED), case=case), least=80, device=GPU)
      for case in ("log-normal, sorted", "lengths 256-512")),
)  # fmt: skip
