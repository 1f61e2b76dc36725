"""Is this revision slower than that one? `python -m bench.gate --base REVISION`.

Both revisions run in one go: two long-lived processes, each importing its own revision, take turns at every case, so
that what else the machine does hits both. Each result is checked against float64 before it is timed.
What counts as slower, and why noise alone does not bring it about: `bench/gate/paired.py`.

Ends with 0 when no case is slower, 1 when one is (or its result is wrong), 2 when the comparison could not be made.
"""

import argparse
import os
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gate.cases import CASES, Case
from bench.gate.paired import REPEATS, SUSPECTED, Interval, Pairs, judge
from bench.gate.processes import Duel
from bench.gate.trees import GateError, trees
from rollout.bench.measure import relative_error
from rollout.files import write_json

ROOT = Path(__file__).resolve().parents[2]
HEADER = f"{'case':<36} {'base ms':>9} {'head ms':>9}   {'head/base [95 %]':<22}  verdict"


@dataclass(frozen=True)
class Result:
    """What came of one case: a verdict, and either the pairs of seconds it rests on or a reason why there are none."""

    case: str
    verdict: str
    ratio: Interval | None = None
    pairs: Pairs = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.case:<36} {self.verdict}: {self.reason}"
        base, head = (1e3 * statistics.median(seconds) for seconds in zip(*self.pairs, strict=True))
        ratio = f"{self.ratio.estimate:.3f} [{self.ratio.low:.3f}, {self.ratio.high:.3f}]"
        return f"{self.case:<36} {base:>9.3f} {head:>9.3f}   {ratio:<22}  {self.verdict}"


def check(case: Case, base: Any, head: Any) -> tuple[str, str]:
    """Why a case cannot be timed, as (verdict, reason); two empty strings when both results are right."""
    if isinstance(base, str) and isinstance(head, str):
        return "skipped", f"neither revision runs it: {head}"
    for verdict, side, result in (("wrong", "head", head), ("skipped", "base", base)):
        if isinstance(result, str):
            return verdict, f"the {side} does not run it: {result}"
        if (error := relative_error(torch.from_numpy(result), case.exact)) > case.allowed:
            return verdict, f"the {side} is {error:.1e} off float64, allowed {case.allowed:.0e}"
    return "", ""


def compare(folder: Path, options: argparse.Namespace) -> Iterator[Result]:
    """The results: of cases not suspected at once, of the others at the end, from new processes.

    Raises:
        GateError: a process ended or does not answer; or a case that could be timed at first now cannot.
    """
    generator = random.Random(options.seed)

    def measure(duel: Duel, name: str) -> Result:
        torch.manual_seed(0)  # a case is the same numbers every time
        case = CASES[name]()
        verdict, reason = check(case, **duel.prepare(case.run))
        if verdict:
            return Result(name, verdict, reason=reason)
        pairs = duel.measure(options.rounds, generator)
        return Result(name, *judge(pairs, options.threshold), pairs)

    suspected: dict[str, Pairs] = {}
    with Duel(folder, options.device, options.threads) as duel:
        for name in options.cases:
            result = measure(duel, name)
            if result.verdict in SUSPECTED:
                suspected[name] = ()
            else:
                yield result
    if not suspected:
        return
    print(f"suspected, measured {REPEATS} times more in new processes: {'; '.join(suspected)}", flush=True)
    for _ in range(REPEATS):
        with Duel(folder, options.device, options.threads) as duel:
            for name in suspected:
                result = measure(duel, name)
                if result.reason:
                    raise GateError(f"{name} could be timed, and in new processes cannot: {result.reason}")
                suspected[name] += result.pairs
    for name, pairs in suspected.items():
        yield Result(name, *judge(pairs, options.threshold), pairs)


def summarise(results: list[Result], threshold: float) -> tuple[int, str]:
    """The exit status and what was found, in a line; one more for a verdict that needs a word."""
    slower, wrong, unclear = (sum(r.verdict == verdict for r in results) for verdict in ("slower", "wrong", "unclear"))
    status, found = 0, f"passed: no case is slower by more than {threshold:.0%}"
    if slower or wrong:
        status, found = 1, f"FAILED: {slower} slower by more than {threshold:.0%}, {wrong} wrong"
    elif all(result.reason for result in results):
        status, found = 2, "nothing was compared"
    if unclear:
        found += "\nunclear: slower by the estimate, but too noisy to tell; again on a quiet machine, or --rounds"
    return status, found


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; the exit status."""
    options = _options(arguments)
    try:
        with trees(ROOT, options.base, options.head) as (folder, labels):
            print(f"base {labels['base']}\nhead {labels['head']}")
            print(f"{options.device}, {options.threads} CPU threads, up to {options.rounds} pairs a case, "
                  f"threshold {options.threshold:.0%}\n\n{HEADER}")  # fmt: skip
            if (load := os.getloadavg()[0]) > 0.5 * (os.cpu_count() or 1):
                print(f"this machine is busy (load {load:.1f}): small differences will not show", file=sys.stderr)
            results = []
            for result in compare(folder, options):
                results.append(result)
                print(result, flush=True)
        status, said = summarise(results, options.threshold)
        print(f"\n{said}")
        if options.json is not None:
            settings = {name: getattr(options, name) for name in ("device", "threads", "threshold", "seed")}
            made = [asdict(result) for result in results]
            write_json({**labels, **settings, "torch": torch.__version__, "results": made}, options.json)
        return status
    except (GateError, OSError) as error:
        print(f"bench.gate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.gate: interrupted; nothing is left behind", file=sys.stderr)
        return 130


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="the revision to compare with")
    parser.add_argument("--head", default=".", help="a folder with a checkout, or a revision (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=32, help="pairs a case (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.10, help="slower by more fails (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns (default: %(default)s)")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    options.cases = [name for name in CASES if options.only in name]
    if options.rounds < 6:
        parser.error(f"--rounds must be at least 6, the fewest that give a median an interval, got {options.rounds}")
    if not 0 < options.threshold < 10:
        parser.error(f"--threshold must be a share between 0 and 10 (0.10 is 10 %), got {options.threshold}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.resolve().parent}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if not options.cases:
        parser.error(f"--only {options.only!r} is in no case's name: {', '.join(CASES)}")
    return options
