"""The invented codes of a synthetic cohort: per stream a vocabulary, its names, and which of its codes are planted."""

from dataclasses import dataclass
from typing import Any

import numpy as np

PREVALENCE = 0.06
"""Share of the admissions with a non-empty stream that get a given planted code."""


@dataclass(frozen=True)
class Stream:
    """One code stream of an admission: its table, its lengths (log-normal), its vocabulary (Zipf–Mandelbrot).

    Attributes:
        feature: The name `MortalityPredictionMIMIC4` gives the stream.
        table: The MIMIC-IV table that holds it.
        median, sigma, cap: Length of a non-empty record: `min(cap, median · exp(sigma · z))`.
        empty: Share of admissions with no entry.
        vocabulary: Number of codes; the r-th has weight `1 / (r + offset)`.
        fresh: Entry i of a record, from 0, repeats one of the i before it, each alike, with probability
            `i / (i + fresh)` (Hoppe's urn), as drugs are ordered again; None: a code stands once in an admission.
        planted: Number of planted codes.
        log_odds: What one risk code adds to the log odds of dying in the next admission.
    """

    feature: str
    table: str
    median: float
    sigma: float
    cap: int
    empty: float
    vocabulary: int
    offset: float
    fresh: float | None
    planted: int
    log_odds: float


STREAMS = (
    Stream("conditions", "diagnoses_icd", 17.0, 0.58, 39, 0.0, 400, 20.0, None, 4, 4.0),
    Stream("procedures", "procedures_icd", 3.0, 0.80, 40, 0.3, 150, 5.0, None, 3, 4.0),
    Stream("drugs", "prescriptions", 52.0, 0.85, 1000, 0.08, 300, 8.0, 90.0, 4, 4.0),
)

_MANNERS = (
    "acute",
    "chronic",
    "recurrent",
    "latent",
    "diffuse",
    "focal",
    "late-onset",
    "transient",
    "residual",
    "mixed",
)
_PLACES = ("tessal", "orbic", "lumenal", "cardine", "nephral", "hepatine", "ossal", "dermic", "vastal", "thoral")
_FINDINGS = (
    "attenuation",
    "lability",
    "congestion",
    "thinning",
    "overgrowth",
    "insufficiency",
    "irritation",
    "rigidity",
)
_ACTS = ("inspection", "drainage", "replacement", "division", "mapping", "release", "reinforcement", "transfer")
_ROUTES = ("open", "percutaneous", "endoscopic", "external")
_STEMS = ("alto", "brevi", "cedo", "dura", "ergo", "fali", "gento", "hexo", "ilva", "juno", "kelo", "luma")
_ENDINGS = ("prane", "stat", "micin", "dolol", "zepine", "mab", "cillin", "tide", "vastin", "gliptin")


@dataclass(frozen=True)
class CodeBook:
    """The codes of one stream: `planted` are indices into `codes`; `cdf` leaves them out of the draws.

    `effects` is what each planted code adds to the log odds of dying in the next admission.
    """

    codes: np.ndarray
    names: np.ndarray
    planted: np.ndarray
    effects: np.ndarray
    cdf: np.ndarray

    def planted_rows(self) -> list[dict[str, Any]]:
        """Return the planted codes as rows of the truth file."""
        return [
            {
                "code": str(self.codes[i]),
                "name": str(self.names[i]),
                "log_odds": float(effect),
                "prevalence": PREVALENCE,
            }
            for i, effect in zip(self.planted, self.effects, strict=True)
        ]


def code_books(rng: np.random.Generator, protective: bool = False) -> dict[str, CodeBook]:
    """Make each stream's codes and names, and choose the planted ones; every other one protective if so asked."""
    books = {}
    for stream in STREAMS:
        numbers = np.arange(stream.vocabulary)
        codes, names = _CODERS[stream.feature](numbers)
        weights = rng.permutation(1.0 / (numbers + stream.offset))
        planted = np.sort(rng.choice(stream.vocabulary, stream.planted, replace=False))
        weights[planted] = 0.0
        effects = np.full(stream.planted, stream.log_odds)
        effects[1::2] *= -1.0 if protective else 1.0
        books[stream.feature] = CodeBook(codes, names, planted, effects, np.cumsum(weights) / weights.sum())
    return books


def repeated_entry(rng: np.random.Generator, place: np.ndarray, fresh: float) -> np.ndarray:
    """Which entry each entry repeats, itself where it is new, by Hoppe's urn in each of consecutive records.

    Args:
        rng: draws two numbers an entry.
        place: long [T], an entry's place in its record, from 0.
        fresh: the urn's weight of a new entry.

    Returns:
        Indices, long [T].
    """
    entry = np.arange(len(place))
    again = rng.random(len(place)) * (place + fresh) < place
    earlier = entry - place + (rng.random(len(place)) * place).astype(np.int64)
    repeated = np.where(again, earlier, entry)
    while np.any(repeated != repeated[repeated]):  # an entry that repeats one that repeats another
        repeated = repeated[repeated]
    return repeated


def _conditions(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = np.array([f"U{50 + n // 100}{n % 100:02d}" for n in numbers])
    manners, places, findings = (
        _word(_MANNERS, numbers),
        _word(_PLACES, numbers // 10),
        _word(_FINDINGS, numbers // 100),
    )
    return codes, np.array([f"{m.capitalize()} {p} {f}" for m, p, f in zip(manners, places, findings, strict=True)])


def _procedures(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = np.array([f"Y{n // 36 % 10}{chr(65 + n % 24)}{n % 10}{chr(65 + n // 24 % 24)}ZZ" for n in numbers])
    acts, places, routes = _word(_ACTS, numbers), _word(_PLACES, numbers // 8), _word(_ROUTES, numbers // 80)
    return codes, np.array(
        [f"{a.capitalize()} of {p} structure, {r} approach" for a, p, r in zip(acts, places, routes, strict=True)]
    )


def _drugs(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = np.array([f"99{n * 7919 % 10**9:09d}" for n in numbers])
    stems, endings = _word(_STEMS, numbers), _word(_ENDINGS, numbers // 12)
    return codes, np.array(
        [f"{s.capitalize()}{e} {5 * (1 + n // 120)} mg" for s, e, n in zip(stems, endings, numbers, strict=True)]
    )


def _word(words: tuple[str, ...], numbers: np.ndarray) -> list[str]:
    return [words[n % len(words)] for n in numbers]


_CODERS = {"conditions": _conditions, "procedures": _procedures, "drugs": _drugs}
