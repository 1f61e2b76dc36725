"""From a batch to relevance and prediction, in one forward pass of the model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rollout.cohort.settings import FROZEN, OWN_PATH_OFF, check_class, class_specific
from rollout.method import get_method
from rollout_kernels import Method

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Explained:
    """What is known of a batch of B samples.

    Attributes:
        relevance: Feature → scores [B, S], [B, V, C], or [B, 1] for a feature that is one step.
        y_prob: [B, K], or None.
        y_true: [B, K] or [B], or None.
        target: The class the scores are for, int64 [B]; None for a class-agnostic method.
        row_sums: Whether the scores of a feature's positions, padding included and a visit counted once however many
            codes it has, sum to 1 in each sample, by the method. A sample where they do not is then a failure. Leave it
            False where nothing of the kind holds, as for a class-specific relevance.
        zero_rows: Whether a row of nothing but 0 is no failure then: the method left out all there was.
    """

    relevance: Mapping[str, Tensor]
    y_prob: Tensor | None = None
    y_true: Tensor | None = None
    target: Tensor | None = None
    row_sums: bool = False
    zero_rows: bool = False


Explain = Callable[[Any, Batch], Explained]


@dataclass
class PyHealthExplain:
    """Explain a PyHealth model's batches with the interpreters of `rollout.pyhealth`.

    Attributes:
        method: Its maps are gradient-weighted when `method.gradients` says so; None: no chain, the frozen gradient.
        readout: `"model"` or `"forward"`, as in `rollout.pyhealth.AttentionRollout`.
        backend: As in `rollout.attention_rollout`.
        target_class: Of a class-specific method; None is the class predicted, per sample.
    """

    method: Method | None
    readout: str = "model"
    backend: str = "auto"
    target_class: int | None = None

    def check(self, model: Any) -> None:
        """Refuse what cannot work, before any work.

        Raises:
            ValueError, TypeError: As the interpreters raise them, or when `target_class` has no meaning.
        """
        if self.method is not None and self.method.matrices:
            raise ValueError(
                "attribute_cohort: a method of supplied matrices, such as 'product', reads no attention of a model; "
                "give another, or explain="
            )
        check_class(self.method, self.target_class, self.readout, lambda key: f"attribute_cohort: {key}")
        classes = getattr(model, "get_output_size", lambda: None)()
        if self.target_class is not None and classes is not None and self.target_class >= max(classes, 2):
            raise ValueError(f"attribute_cohort: target_class must be below {classes}, got {self.target_class}")
        if getattr(self.interpreter(model), "captured", None) is not None:
            raise ValueError(
                f"what a {type(model).__name__} makes of a record has relevance by attribute_cohort; it is no entry of "
                "the record that could be taken out"
            )

    def __call__(self, model: Any, batch: Batch) -> Explained:
        """One forward pass, and one backward for a class-specific method."""
        interpreter = self.interpreter(model)
        with model_outputs(model) as outputs:
            relevance = interpreter.attribute(self.target_class, **batch)
        output = outputs[-1] if outputs else {}
        target = None
        if class_specific(self.method) and "logit" in output:
            target = interpreter._resolve_target_indices(output["logit"].detach(), self.target_class)
        whole = getattr(interpreter, "rows_sum_to_one", False)
        prob, true = (value if value is None else value.detach() for value in map(output.get, ("y_prob", "y_true")))
        emptied = self.method is not None and not self.method.own_path
        return Explained(relevance, prob, true, target, row_sums=whole, zero_rows=emptied)

    def interpreter(self, model: Any) -> Any:
        from rollout.pyhealth import AttentionRollout, FrozenGradient, GradientRollout

        if self.method is None:
            return FrozenGradient(model)
        if self.method.gradients is not None:
            return GradientRollout(model, self.method, self.backend)
        return AttentionRollout(model, method=self.method, backend=self.backend, readout=self.readout)


@contextmanager
def model_outputs(model: torch.nn.Module) -> Iterator[list[Mapping[str, Any]]]:
    """What the model returns from each of its forward passes while it is open."""
    outputs: list[Mapping[str, Any]] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Mapping):
            outputs[:] = [output]

    handle = model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def chain_of(method: str | Method) -> Method | None:
    """How a method forms its chain; None for the one that has none. A name may end in `OWN_PATH_OFF`.

    Raises:
        ValueError, TypeError: there is no such method.
    """
    if method == FROZEN:
        return None
    if isinstance(method, str) and method.endswith(OWN_PATH_OFF):
        return replace(get_method(method.removesuffix(OWN_PATH_OFF), "attribute_cohort"), own_path=False)
    return get_method(method, "attribute_cohort")


def describe_method(name: str | Method) -> dict[str, Any]:
    """A method as it stands in a manifest: its name, if it has one, and the fields of its formula.

    Fields that came later stand there where they say something, so that a run begun before them is the same run.
    """
    method = chain_of(name)
    if method is None:
        return {
            "name": FROZEN,
            "formula": ["e ∘ ∂logit/∂e summed over the embedding e of a code; attention weights, norm statistics and "
                        "gates held", "positive: speaks for the class; negative: against it"],
            "paper": "Ali et al. 2022 (ICML), XAI for Transformers: Better Explanations through Conservative "
                     "Propagation, arXiv:2202.07304",
        }  # fmt: skip
    fusion: Any = method.head_fusion
    if isinstance(fusion, Tensor):
        fusion = fusion.tolist()
    elif callable(fusion):
        fusion = f"{fusion.__module__}.{fusion.__qualname__}"
    unsaid: dict[str, Any] = {"values": None, "own_path": True, "normalize_attention": False}
    later = {field: getattr(method, field) for field, plain in unsaid.items() if getattr(method, field) != plain}
    return {
        "name": name if isinstance(name, str) else None,
        "head_fusion": fusion,
        "residual": method.residual,
        "attention": method.attention_weight,
        "renormalize": method.renormalize,
        "discard_ratio": method.discard_ratio,
        "start_layer": method.start_layer,
        "gradients": method.gradients,
        **later,
        "paper": method.paper,
    }
