"""What the project set out to reach, and whether the records say it has: met, missed, or not yet run."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench import scaling
from bench.machine.record import Record, Result, find, ratio, results
from bench.pages import fits
from bench.providers.chains import NAIVE, OURS, READ

MET, MISSED, NO_GPU, NO_RUN = "met", "missed", "not yet run on a GPU", "not in the record"

# Suite → {S: the least speed-up over the naive chain}.
SPEED = {
    "rows from maps": {64: 2.5, 128: 3.5, 256: 5.0, 512: 10.0},
    "rows from maps, warm": {64: 2.5, 128: 3.5},
    "rows from Q,K": {64: 2.0, 128: 2.8, 256: 4.5, 512: 5.0},
    "rows from bf16 maps": {128: 20.0, 256: 20.0},
}
READ_SHARE, READ_FROM = 0.70, (256, 512)  # of the read limit, at these S
PYHEALTH = {"log-normal, sorted": 8.0, "lengths 256-512": 6.0}
COHORT_CASE, COHORT = "synthetic cohort", 7.0
COHORT_WRITING, COHORT_WORKERS, COHORT_FLAT = 10.0, 1.6, 10.0  # %, ×, %
ERRORS = {"rows from maps": 1e-6, "full matrix": 1e-6, "rows from Q,K": 3e-6}
CAPTURE, CAPTURE_S = 1.40, 256  # of a plain forward on fused attention
BERT_SPEED, BERT_MEMORY = 3.0, 0.25  # times as fast as stored maps; of their memory
GPU_END_TO_END = 10.0
MEMORY_EXPONENT = 1.0  # of the extra memory in S, at most
# Name of a case of bench.gpu → (what, the field that counts, the least or most it may be, unit).
GPU_CASES = {
    "maps-fp32-c1": ("rows from maps, ≥ 1 GB of maps, share of copy", "share_of_copy", 0.95, ""),
    "qk-bf16-c1-given": ("rows from Q,K, bf16, D=64", "tflop_s", 340.0, "TFLOP/s"),
    "maps-fp32-small": ("small batch B8 H12 S197 L12, validate=False", "ms", 0.070, "ms"),
    "full-fp32-c1": ("full matrix from fp32 maps, S=512 (1.25 × its floor)", "ms", 3.3, "ms"),
}


@dataclass(frozen=True)
class Verdict:
    """One target: what, what was asked, what the record says, and the suite it is from."""

    what: str
    wanted: str
    found: str
    verdict: str
    suite: str


def at_least(what: str, wanted: float, found: float | None, suite: str, unit: str = "×") -> Verdict:
    return _judged(what, f"≥ {wanted:g}{unit}", found, suite, unit, found is not None and found >= wanted)


def at_most(what: str, wanted: float, found: float | None, suite: str, unit: str = "×") -> Verdict:
    return _judged(what, f"≤ {wanted:g}{unit}", found, suite, unit, found is not None and found <= wanted)


def _judged(what: str, wanted: str, found: float | None, suite: str, unit: str, good: bool) -> Verdict:
    if found is None:
        return Verdict(what, wanted, "–", NO_RUN, suite)
    return Verdict(what, wanted, f"{found:.3g}{unit}", (MISSED, MET)[good], suite)


def verdicts(cpu: Record | None, cuda: Record | None = None, gpu: Record | None = None) -> list[Verdict]:
    """Every target. `cpu` and `cuda` are records of bench.run, `gpu` is that of bench.gpu."""
    found = [*_speed(cpu), *_share(cpu), *_pyhealth(cpu), *_cohort(cpu), *_memory(cpu), *_accuracy(cpu), *_models(cpu)]
    return [*found, *_gpu(cuda, gpu)]


def _speed(cpu: Record | None) -> Iterator[Verdict]:
    for suite, wanted in SPEED.items():
        for seq, least in wanted.items():
            faster = ratio(*(find(cpu, suite, S=seq, provider=who) for who in (NAIVE, OURS)))
            yield at_least(f"CPU, {suite}, S={seq}, against the naive chain", least, faster, suite)


def _share(cpu: Record | None) -> Iterator[Verdict]:
    suite = "rows from maps"
    for seq in READ_FROM:
        share = ratio(*(find(cpu, suite, S=seq, provider=who) for who in (OURS, READ)))
        part = None if share is None else 100 / share
        yield at_least(f"CPU, {suite}, S={seq}, of the read limit", 100 * READ_SHARE, part, suite, " %")


def _pyhealth(cpu: Record | None) -> Iterator[Verdict]:
    suite = "PyHealth end to end"
    for case, least in PYHEALTH.items():
        faster = ratio(*(find(cpu, suite, case=case, provider=who) for who in ("PyHealth", OURS)))
        yield at_least(f"CPU, patients/s against PyHealth's interpreter, {case}", least, faster, suite)


def _cohort(cpu: Record | None) -> Iterator[Verdict]:
    suite = "cohort run"
    theirs, ours = (find(cpu, suite, case=COHORT_CASE, provider=who) for who in ("PyHealth", OURS))
    yield at_least("CPU, cohort run, samples/s against PyHealth's interpreter", COHORT, ratio(theirs, ours), suite)
    spent = None if ours is None or "bookkeeping" not in ours else 100 * ours["bookkeeping"]
    yield at_most("CPU, cohort run, time beside model and chain", COHORT_WRITING, spent, suite, " %")
    pair = (
        find(cpu, suite, case="workers", provider=f"{count} worker{'s' * (count == 'two')}") for count in ("one", "two")
    )
    yield at_least("CPU, cohort run, two workers against one", COHORT_WORKERS, ratio(*pair), suite)
    peaks = [each["peak_bytes"] for each in sized(cpu)]
    change = 100 * abs(peaks[-1] / peaks[0] - 1) if len(peaks) > 1 else None
    yield at_most("CPU, cohort run, change of peak memory with its size", COHORT_FLAT, change, suite, " %")


def sized(cpu: Record | None) -> list[Result]:
    """The cohort runs that differ in size alone, smallest first."""
    found = [each for each in results(cpu, "cohort run") if str(each.get("case", "")).startswith("memory")]
    return sorted((each for each in found if each.get("peak_bytes")), key=lambda each: each["samples"])


def _memory(cpu: Record | None) -> Iterator[Verdict]:
    for source in (scaling.MAPS_SOURCE, scaling.QK_SOURCE):
        points = curve(results(cpu, "scaling"), source, OURS, "S")
        fit = fits.power([each["value"] for each in points], [each["extra"] or 0 for each in points], tail=2)
        grown = None if fit is None else max(0.0, round(fit.exponent, 2))
        what = f"CPU, extra memory from {source}, O(B·H·S): its exponent in S at the last doubling"
        yield at_most(what, MEMORY_EXPONENT, grown, "scaling", "")


def _accuracy(cpu: Record | None) -> Iterator[Verdict]:
    for suite, most in ERRORS.items():
        errors = [each["error"] for each in results(cpu, suite) if each["provider"] == OURS and "error" in each]
        worst = max(errors, default=None)
        shown = "–" if worst is None else f"{worst:.1e}"
        verdict = NO_RUN if worst is None else (MISSED, MET)[worst <= most]
        yield Verdict(
            f"CPU, largest error against float64 over largest value, {suite}", f"≤ {most:.0e}", shown, verdict, suite
        )


def _models(cpu: Record | None) -> Iterator[Verdict]:
    for suite, plain in (("overhead of capture", "plain forward"), ("overhead of capture, PyHealth", "fused forward")):
        pair = (find(cpu, suite, S=CAPTURE_S, provider=who) for who in ("capture", plain))
        yield at_most(f"CPU, {suite}, S={CAPTURE_S}, of a fused forward", CAPTURE, ratio(*pair), suite)
    suite = "BERT-base from tokens"
    naive, ours = (find(cpu, suite, S=512, provider=who) for who in (NAIVE, OURS))
    yield at_least("CPU, BERT-base from tokens, against stored maps", BERT_SPEED, ratio(naive, ours), suite)
    yield at_most("CPU, BERT-base from tokens, memory of that of stored maps", BERT_MEMORY, _memory_ratio(ours, naive),
                  suite)  # fmt: skip


def _memory_ratio(ours: Result | None, naive: Result | None) -> float | None:
    if not ours or not naive or not ours.get("peak_extra_bytes") or not naive.get("peak_extra_bytes"):
        return None
    return float(ours["peak_extra_bytes"] / naive["peak_extra_bytes"])


def _gpu(cuda: Record | None, gpu: Record | None) -> Iterator[Verdict]:
    cases = {} if gpu is None else {each["name"]: each for each in gpu["results"]}
    for name, (what, field, limit, unit) in GPU_CASES.items():
        found = cases.get(name, {}).get(field)
        judge = at_most if field == "ms" else at_least
        verdict = judge(f"GPU, {what}", limit, found, f"bench.gpu, {name}", f" {unit}".rstrip())
        if "failed" in cases.get(name, {}):
            yield Verdict(verdict.what, verdict.wanted, "wrong, not timed", MISSED, verdict.suite)
        else:
            yield verdict if found is not None else _not_on_gpu(verdict)
    suite = "PyHealth end to end"
    for case in PYHEALTH:
        faster = ratio(*(find(cuda, suite, case=case, provider=who) for who in ("PyHealth", OURS)))
        verdict = at_least(f"GPU, patients/s against PyHealth's interpreter, {case}", GPU_END_TO_END, faster, suite)
        yield verdict if faster is not None else _not_on_gpu(verdict)


def _not_on_gpu(verdict: Verdict) -> Verdict:
    return Verdict(verdict.what, verdict.wanted, "–", NO_GPU, verdict.suite)


def curve(points: list[Result], source: str, provider: str, axis: str) -> list[Result]:
    """The timed points of one curve of the scaling suite, smallest first."""
    wanted = (source, provider, axis)
    found = [
        each for each in points if (each["source"], each["provider"], each["axis"]) == wanted and "seconds" in each
    ]
    return sorted(found, key=lambda each: each["value"])


def stop(points: list[Result], source: str, provider: str, axis: str) -> Result | None:
    """Why that curve ended."""
    wanted = (source, provider, axis)
    return next(
        (each for each in points if (each["source"], each["provider"], each["axis"]) == wanted and "stopped" in each),
        None,
    )


def memory_limit(points: list[Result]) -> float:
    """The bytes a call could take: that of an entry that stopped for memory, or else as much as was allowed."""
    limits = [each["limit"] for each in points if each.get("stopped") in ("memory", "end")]
    return float(limits[0]) if limits else float(scaling.LARGEST_LIMIT)
