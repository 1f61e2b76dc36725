"""Is this revision slower than that one? `python -m bench.gate --base REVISION`.

Both revisions run in one go: two long-lived processes, each importing its own revision, take turns at every case, so
that what else the machine does hits both. Each result is checked against float64 before it is timed.
What counts as slower, and why noise alone does not bring it about: `bench/gate/paired.py`.

Ends with 0 when no case is slower, 1 when one is (or its result is wrong), 2 when the comparison could not be made.
"""

import argparse
import os
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gate.cases import CASES
from bench.gate.paired import REPEATS, Pairs, judge, sign_interval, suspected
from bench.gate.processes import Duel, WorkerError
from bench.gate.trees import RevisionError, Tree, trees
from rollout.files import write_json

ROOT = Path(__file__).resolve().parents[2]
FAILURES = ("slower", "wrong")
HEADER = f"{'case':<36} {'base ms':>9} {'head ms':>9}   {'head/base [95 %]':<22}  verdict"


@dataclass(frozen=True)
class Result:
    """What came of one case: a verdict, and either the pairs it rests on or a reason why there are none."""

    name: str
    verdict: str
    pairs: Pairs | None = None
    reason: str = ""

    @property
    def line(self) -> str:
        if self.pairs is None:
            return f"{self.name:<36} {self.verdict}: {self.reason}"
        base, head = (1e3 * sign_interval(seconds).estimate for seconds in (self.pairs.base, self.pairs.head))
        return f"{self.name:<36} {base:>9.3f} {head:>9.3f}   {self.pairs.ratio!s:<22}  {self.verdict}"

    @property
    def record(self) -> dict[str, Any]:
        """For JSON; seconds."""
        found = {"case": self.name, "verdict": self.verdict}
        if self.pairs is None:
            return found | {"reason": self.reason}
        return found | {"ratio": self.pairs.ratio._asdict(), **asdict(self.pairs)}


def checked(answers: dict[str, dict[str, Any]]) -> tuple[str, str] | None:
    """Why a case cannot be timed, as (verdict, reason); None when both results are right."""
    base, head = (answer.get("cannot", "") for answer in (answers["base"], answers["head"]))
    if head:
        if base:
            return "skipped", f"neither revision runs it: {head}"
        return "wrong", f"the base runs it, the head does not: {head}"
    if against := off_float64("head", answers["head"]):
        return "wrong", against
    against = f"the base does not run it: {base}" if base else off_float64("base", answers["base"])
    return ("skipped", against) if against else None


def off_float64(name: str, answer: dict[str, Any]) -> str:
    """What is wrong with a revision's result; empty when it is right."""
    error, allowed = answer["error"], answer["allowed"]
    return f"the {name} is {error:.1e} off float64, allowed {allowed:.0e}" if error > allowed else ""


@dataclass(frozen=True)
class Comparison:
    """All cases of a run: a first measurement of each, then those suspected again in new processes."""

    found: dict[str, Tree]
    device: str
    threads: int
    pairs: int
    threshold: float
    generator: random.Random

    def run(self, names: Iterable[str]) -> Iterator[Result]:
        """The results: of cases not suspected at once, of the others at the end."""
        first: dict[str, Pairs] = {}
        with Duel(self.found, self.device, self.threads) as duel:
            for name in names:
                if against := checked(duel.prepare(name)):
                    yield Result(name, against[0], reason=against[1])
                    continue
                measured = duel.measure(self.pairs, self.generator)
                if suspected(measured, self.threshold):
                    first[name] = measured
                else:
                    yield self._judge(name, measured, [])
        repeats = self._repeat(list(first))
        for name, measured in first.items():
            yield self._judge(name, measured, repeats[name])

    def _repeat(self, names: list[str]) -> dict[str, list[Pairs]]:
        """Suspected cases, measured again in new processes.

        Raises:
            WorkerError: a case that could be timed at first now cannot.
        """
        repeats: dict[str, list[Pairs]] = {name: [] for name in names}
        if names:
            print(f"suspected, measured {REPEATS} times more in new processes: {'; '.join(names)}", flush=True)
        for _ in range(REPEATS if names else 0):
            with Duel(self.found, self.device, self.threads) as duel:
                for name in names:
                    if against := checked(duel.prepare(name)):
                        raise WorkerError(f"{name} could be timed, and in new processes cannot: {against[1]}")
                    repeats[name].append(duel.measure(self.pairs, self.generator))
        return repeats

    def _judge(self, name: str, first: Pairs, repeats: list[Pairs]) -> Result:
        return Result(name, *judge(first, repeats, self.threshold))


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; the exit status."""
    options = _options(arguments)
    try:
        with trees(options.repository, options.base, options.head) as found:
            return _compare(options, found)
    except (RevisionError, WorkerError) as error:
        print(f"bench.gate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.gate: interrupted; nothing is left behind", file=sys.stderr)
        return 130


def _compare(options: argparse.Namespace, found: dict[str, Tree]) -> int:
    comparison = Comparison(
        found, options.device, options.threads, options.rounds, options.threshold, random.Random(options.seed)
    )
    print(f"base {found['base'].label}\nhead {found['head'].label}\n{options.device}, {options.threads} CPU threads, "
          f"up to {options.rounds} pairs a case, threshold {options.threshold:.0%}\n\n{HEADER}")  # fmt: skip
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        print(f"this machine is busy (load {os.getloadavg()[0]:.1f}): small differences will not show", file=sys.stderr)
    results = []
    for result in comparison.run(options.cases):
        results.append(result)
        print(result.line, flush=True)
    print(f"\n{summary(results, options.threshold)}")
    if options.json is not None:
        settings = {name: getattr(options, name) for name in ("device", "threads", "threshold", "seed")}
        labels = {name: tree.label for name, tree in found.items()}
        record = {**labels, **settings, "torch": torch.__version__, "results": [each.record for each in results]}
        write_json(record, options.json)
    return status(results)


def status(results: list[Result]) -> int:
    """0 when nothing is slower or wrong, 1 when something is, 2 when nothing could be compared."""
    if any(result.verdict in FAILURES for result in results):
        return 1
    return 0 if any(result.pairs is not None for result in results) else 2


def summary(results: list[Result], threshold: float) -> str:
    """One line on what was found, and one a verdict that needs a word."""
    slower, wrong = (sum(result.verdict == verdict for result in results) for verdict in FAILURES)
    if slower or wrong:
        lines = [f"FAILED: {slower} slower by more than {threshold:.0%}, {wrong} wrong"]
    elif status(results):
        lines = ["nothing was compared"]
    else:
        lines = [f"passed: no case is slower by more than {threshold:.0%}"]
    if any(result.verdict == "unclear" for result in results):
        lines.append("unclear: slower by the estimate, but too noisy to tell; again on a quiet machine, or --rounds")
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="the revision to compare with")
    parser.add_argument("--head", default=".", help="a folder with a checkout, or a revision (default: %(default)s)")
    parser.add_argument("--repository", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=32, help="pairs a case (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.10, help="slower by more fails (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns (default: %(default)s)")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
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
    options.cases = [name for name in CASES if options.only in name]
    if not options.cases:
        parser.error(f"--only {options.only!r} is in no case's name: {', '.join(CASES)}")
    return options
