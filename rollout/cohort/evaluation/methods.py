"""The methods that are evaluated side by side: what each is, and how it scores the entries of a batch."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.cohort.code import name_of
from rollout.cohort.digest import is_plain, shown
from rollout.cohort.evaluation.explainer import Explainer, Scores
from rollout.cohort.evaluation.stored import StoredScores
from rollout.cohort.explain import PyHealthExplain, chain_of, describe_method
from rollout.cohort.identity import function_identity
from rollout.cohort.prefetch import ReadBatch
from rollout.cohort.settings import OWN_PATH_OFF, WORDS
from rollout.cohort.source import Source
from rollout.data.classes import did_you_mean
from rollout.files import first_line
from rollout_kernels import Method

RANDOM = "random"


@dataclass(frozen=True)
class Named(Explainer):
    """A method by its name in `rollout.METHODS`, or by its formula; None: the frozen gradient."""

    chain: Method | None

    @property
    def signed(self) -> bool:  # type: ignore[override]
        return self.chain is None

    def __call__(self, model: Any, batch: ReadBatch, valid: Mapping[str, Tensor]) -> Scores:
        scores: Scores = PyHealthExplain(self.chain).interpreter(model).attribute(**batch.ready)
        return scores


@dataclass(frozen=True)
class Interpreter(Explainer):
    """An interpreter of PyHealth's, or one like it."""

    interpreter: Any

    def __call__(self, model: Any, batch: ReadBatch, valid: Mapping[str, Tensor]) -> Scores:
        interpreter = self.interpreter
        if interpreter.model is not model:  # in another process the model came by itself
            interpreter = copy.copy(interpreter)
            interpreter.model = model
        scores: Scores = interpreter.attribute(**batch.ready)
        return scores


@dataclass(frozen=True)
class Function(Explainer):
    """A function of the caller's: (model, batch) → scores."""

    function: Callable[[Any, Mapping[str, Any]], Scores]

    def __call__(self, model: Any, batch: ReadBatch, valid: Mapping[str, Tensor]) -> Scores:
        return self.function(model, batch.ready)


@dataclass(frozen=True)
class Random(Explainer):
    """Scores that know nothing, a sample's own whatever batch it is in."""

    seed: int

    def __call__(self, model: Any, batch: ReadBatch, valid: Mapping[str, Tensor]) -> Scores:
        generators = [np.random.default_rng([self.seed, number]) for number in batch.index.tolist()]
        masks = {feature: real.cpu().numpy() for feature, real in valid.items()}
        scores = {feature: np.zeros(mask.shape, dtype=np.float32) for feature, mask in masks.items()}
        for real in (True, False):  # what is real first: padding changes nothing of it
            for feature, mask in masks.items():
                for row, own, generator in zip(scores[feature], mask == real, generators, strict=True):
                    row[own] = generator.random(int(own.sum()), dtype=np.float32)
        return {feature: torch.from_numpy(drawn) for feature, drawn in scores.items()}


def named_methods(methods: Any) -> dict[str, Any]:
    """Name → what was given, of the `methods` of `evaluate_cohort`.

    Raises:
        ValueError, TypeError: there is none; a name comes twice, or is "random"; what is no name has none.
    """
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(methods, Mapping):
        if not isinstance(methods, Sequence) or not all(isinstance(one, str) for one in methods):
            raise TypeError(
                "evaluate_cohort: methods must be names of methods, or a mapping of a name of yours to a name, a "
                f"rollout.Method, an interpreter, a function or a folder; got {methods!r}"
            )
        if len(set(methods)) < len(methods):
            raise ValueError(f"evaluate_cohort: methods must each be named once, got {list(methods)}")
        methods = {name: name for name in methods}
    named = {str(name): given for name, given in methods.items() if not (name == RANDOM and given == RANDOM)}
    if RANDOM in named:
        raise ValueError("evaluate_cohort: methods must not name one of theirs 'random': a random ranking always is")
    if not named:
        raise ValueError("evaluate_cohort: methods must name at least one method beside the random ranking")
    return named


def explainer_of(name: str, given: Any, model: Any, source: Source) -> tuple[Explainer, dict[str, Any]]:
    """A method, and how it is described in a manifest.

    Raises:
        ValueError, TypeError: there is no such method, the model does not serve it, or a folder is of other samples.
    """
    known = isinstance(given, str) and given.removesuffix(OWN_PATH_OFF) in WORDS["method"]
    if isinstance(given, Path) or (isinstance(given, str) and not known):
        if isinstance(given, str) and not Path(given).is_dir():
            raise ValueError(
                f"evaluate_cohort: methods: {given!r} is neither a method, {', '.join(WORDS['method'])}, nor a folder "
                f"of attributions{did_you_mean(given, WORDS['method'])}"
            )
        stored = StoredScores(Path(given), source)
        return stored, stored.description
    if isinstance(given, str | Method):
        chain = chain_of(given)
        explain = PyHealthExplain(chain)
        try:
            explain.check(model)
        except (ValueError, TypeError, AssertionError) as error:
            message = f"evaluate_cohort: method {name!r} cannot explain this model: {first_line(error)}"
            raise ValueError(message) from error
        return Named(chain), describe_method(given)
    if hasattr(given, "attribute") and hasattr(given, "model"):
        if given.model is not model:
            raise ValueError(f"evaluate_cohort: the interpreter {name!r} is of another model than the one given")
        kind = type(given)
        plain = {key: shown(value) for key, value in vars(given).items() if is_plain(value)}
        described = {"interpreter": f"{kind.__module__}.{kind.__qualname__}", "settings": plain}
        return Interpreter(given), described
    if callable(given):
        return Function(given), {"function": name_of(given), **function_identity(given, [model, source.dataset])}
    raise TypeError(
        f"evaluate_cohort: method {name!r} must be a name, a rollout.Method, an interpreter with attribute(), a "
        f"function of model and batch or a folder of attributions, got {type(given).__name__}"
    )
