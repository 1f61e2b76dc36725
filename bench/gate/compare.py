"""Is this revision slower than that one? `python -m bench.gate --base REVISION`.

Both revisions run in one go: two long-lived processes, each importing its own revision, take turns at every case, so
that what else the machine does hits both. Each result is checked against float64 and against the other's before it is
timed. What counts as slower, and why noise alone does not bring it about: `bench/gate/paired.py`.

Ends with 0 when no case is slower, 1 when one is (or its result is wrong), 2 when the comparison could not be made.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gate.paired import REPEATS, Judgement, Pairs, judge, sign_interval, suspected
from bench.gate.processes import Duel, WorkerError
from bench.gate.trees import RevisionError, Tree, trees
from bench.gate.worker import case_names

ROOT = Path(__file__).resolve().parents[2]
FAILURES = ("slower", "wrong")


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
        if self.pairs is None:
            return {"case": self.name, "verdict": self.verdict, "reason": self.reason}
        ratio = self.pairs.ratio
        return {
            "case": self.name,
            "verdict": self.verdict,
            "ratio": {"estimate": ratio.estimate, "low": ratio.low, "high": ratio.high},
            "base": list(self.pairs.base),
            "head": list(self.pairs.head),
        }


HEADER = f"{'case':<36} {'base ms':>9} {'head ms':>9}   {'head/base [95 %]':<22}  verdict"


def checked(answers: dict[str, dict[str, Any]]) -> tuple[str, str] | None:
    """Why a case cannot be timed, as (verdict, reason); None when both results are right and agree."""
    base, head = answers["base"], answers["head"]
    if "cannot" in head:
        if "cannot" in base:
            return "skipped", f"neither revision runs it: {head['cannot']}"
        return "wrong", f"the base runs it, the head does not: {head['cannot']}"
    against = off_float64("head", head)
    if against:
        return "wrong", against
    if "cannot" in base:
        return "skipped", f"the base does not run it: {base['cannot']}"
    against = off_float64("base", base)
    if against:
        return "skipped", against
    if head["difference"] > head["allowed"]:
        return "wrong", f"the two differ by {head['difference']:.1e}, allowed {head['allowed']:.0e}"
    return None


def off_float64(name: str, answer: dict[str, Any]) -> str:
    """What is wrong with a revision's result; empty when it is right."""
    error, allowed = answer["error"], answer["allowed"]
    if error is None:
        return f"the {name}'s result has the wrong shape or is not finite"
    return f"the {name} is {error:.1e} off float64, allowed {allowed:.0e}" if error > allowed else ""


class Comparison:
    """All cases of a run: a first measurement of each, then those suspected again in new processes."""

    def __init__(
        self, found: dict[str, Tree], *, device: str, threads: int, pairs: int, threshold: float, seed: int
    ) -> None:
        self.found, self.device, self.threads = found, device, threads
        self.pairs, self.threshold = pairs, threshold
        self._generator = random.Random(seed)

    def run(self, names: Iterable[str]) -> Iterator[Result]:
        """The results: of cases not suspected at once, of the others at the end."""
        first: dict[str, Pairs] = {}
        with Duel(self.found, self.device, self.threads) as duel:
            for name in names:
                against = checked(duel.prepare(name))
                if against is not None:
                    yield Result(name, against[0], reason=against[1])
                    continue
                measured = duel.measure(self.pairs, self._generator)
                if suspected(measured, self.threshold):
                    first[name] = measured
                    continue
                yield self._result(name, judge(measured, (), self.threshold))
        repeats = self._repeats(list(first))
        for name, measured in first.items():
            yield self._result(name, judge(measured, repeats[name], self.threshold))

    def _repeats(self, names: list[str]) -> dict[str, list[Pairs]]:
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
                    against = checked(duel.prepare(name))
                    if against is not None:
                        raise WorkerError(f"{name} could be timed, and in new processes cannot: {against[1]}")
                    repeats[name].append(duel.measure(self.pairs, self._generator))
        return repeats

    def _result(self, name: str, judgement: Judgement) -> Result:
        return Result(name, judgement.verdict, judgement.pairs)


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
        found,
        device=options.device,
        threads=options.threads,
        pairs=options.rounds,
        threshold=options.threshold,
        seed=options.seed,
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
        record = {
            "base": found["base"].label,
            "head": found["head"].label,
            "device": options.device,
            "threads": options.threads,
            "torch": torch.__version__,
            "threshold": options.threshold,
            "seed": options.seed,
            "results": [result.record for result in results],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return status(results)


def status(results: list[Result]) -> int:
    """0 when nothing is slower or wrong, 1 when something is, 2 when nothing could be compared."""
    if any(result.verdict in FAILURES for result in results):
        return 1
    return 0 if any(result.pairs is not None for result in results) else 2


def summary(results: list[Result], threshold: float) -> str:
    """One line on what was found, and one a verdict that needs a word."""
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in ("slower", "wrong")}
    if counts["slower"] or counts["wrong"]:
        lines = [f"FAILED: {counts['slower']} slower by more than {threshold:.0%}, {counts['wrong']} wrong"]
    elif status(results):
        lines = ["nothing was compared"]
    else:
        lines = [f"passed: no case is slower by more than {threshold:.0%}"]
    if any(result.verdict == "unclear" for result in results):
        lines.append(
            "unclear: slower by the estimate, but the machine is too noisy to tell; again on a quiet one, or --rounds"
        )
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
    options.cases = [name for name in case_names(options.device) if options.only in name]
    if not options.cases:
        parser.error(f"--only {options.only!r} is in no case's name: {', '.join(case_names(options.device))}")
    return options
