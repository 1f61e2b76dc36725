"""Gradient-weighted methods for PyHealth models, its `CheferRelevance` among them, as a row chain."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rollout.api import attention_rollout
from rollout.method import get_method
from rollout.pyhealth.fused import Attended, CannotFuseError, FusedCapture, can_fuse
from rollout.pyhealth.interpreter import RowInterpreter
from rollout.pyhealth.merged import CannotMergeError, MergedGradientCapture
from rollout.pyhealth.protocol import Target, protocol_gradients, usable
from rollout.pyhealth.readout import Relevance
from rollout.pyhealth.watch import CheferInterpretable, MapCapture, Sites
from rollout_kernels import BackendError, Method

__all__ = ["CheferRelevance", "GradientRollout"]

FROM_OUTPUTS = ("auto", "triton", "torch", "reference")  # backends that weight maps from Q, K, V and dO


class GradientRollout(RowInterpreter):
    """Class-specific relevance of a PyHealth model by a method that weights attention with its gradient.

    R = M_L · … · M_1, M_l made of A_l ∘ ∂y/∂A_l as the method says, y the logit of the class; of R the row the model
    reads, per feature.

    One forward and one backward pass, the latter to the attention alone: no parameter's `.grad` is touched, and nothing
    is left on the model, also after an exception. Frozen parameters, `torch.no_grad()` and `torch.inference_mode()`
    make no difference. `model.eval()` is called once, here.

    For PyHealth's own Transformer and StageAttentionNet only the row read is computed, as in `AttentionRollout`, and a
    Transformer is run, forward and back, on the distinct rows of each record where that is so there. In float32 and
    float64 no map is stored: ∂y/∂A = ∂y/∂O·Vᵀ of the attention's output O = A·V, tile by tile. Other models are run by
    PyHealth's protocol, their own hooks included, and handed the full R [B, S, S]. Not yet run on a GPU.

    Args:
        model: implements PyHealth's `CheferInterpretable`.
        method: a name in `rollout.METHODS` or a `rollout.Method`; gradient-weighted ones only.
        backend: as in `rollout.attention_rollout`.

    Raises:
        ValueError: the model does not implement it; there is no such method, or it needs no gradients.
    """

    def __init__(self, model: Any, method: str | Method = "grad_rollout", backend: str = "auto") -> None:
        name = type(self).__name__
        if not isinstance(model, CheferInterpretable):
            raise ValueError(f"{name}: model must implement CheferInterpretable interface, got {type(model).__name__}")
        self.method = get_method(method, name)
        if self.method.gradients is None:
            raise ValueError(f"{name}: method must be gradient-weighted, got {method!r}; use AttentionRollout for it")
        super().__init__(model)
        self.backend = backend

    def attribute(self, target_class_idx: int | None = None, **data: Any) -> Relevance:
        """The relevance of every input position for the logit of a class.

        Args:
            target_class_idx: the class; None is the one predicted, per sample. A single logit has no choice.
            **data: a batch of the dataloader, labels and ids included.

        Returns:
            Per feature key a non-negative tensor of the shape of the feature's value tensor, on the model's device,
            float32 (float64 for a float64 model).

        Raises:
            MissingFeatureError: the batch lacks a feature of the model (a `ValueError` and a `KeyError`).
            RuntimeError: the model gave no attention map for a feature; there is no such class.
        """
        return super().attribute(target_class_idx, **data)

    def _by_protocol(self, data: dict[str, Any], target_class_idx: int | None) -> Relevance:
        maps, gradients = protocol_gradients(self.model, data, self._target(target_class_idx))
        matrices = {
            key: chain(maps.pop(key), gradients.pop(key), None, self.method, self.backend) for key in list(maps)
        }
        return self._read_matrices(matrices, data)

    def _by_capture(self, sites: Sites, data: dict[str, Any], target_class_idx: int | None) -> Relevance:
        target = self._target(target_class_idx)
        if can_fuse(self.model, sites):
            with suppress(CannotMergeError, CannotFuseError):
                merged = MergedGradientCapture(self.model, sites, self.method, self._merged_blocks(), target)
                found = self._by_merged(merged, data)
                if found is not None:
                    return found
            if self.backend in FROM_OUTPUTS:
                with suppress(CannotFuseError, BackendError):  # the one named may serve stored maps
                    return self._by_rows(
                        FusedGradientCapture(self.model, sites, self.method, self.backend, target), data
                    )
        return self._by_rows(GradientCapture(self.model, sites, self.method, self.backend, target), data)

    def _by_rows(self, captured: "GradientCapture | FusedGradientCapture", data: dict[str, Any]) -> Relevance:
        captured.run(data)
        rows = self._rows(captured, data)
        relevance = {key: captured.rollout(key, None if rows is None else rows[key]) for key in captured.sites}
        return self._read_matrices(relevance, data) if rows is None else relevance

    def _target(self, target_class_idx: int | None) -> Target:
        """The logits [B, C] → the sum over samples of the logit of each one's class."""

        def target(logits: Tensor) -> Tensor:
            classes = self._resolve_target_indices(logits.detach(), target_class_idx)
            return (functional.one_hot(classes, logits.shape[1]).to(logits) * logits).sum()

        return target


class CheferRelevance(GradientRollout):
    """Class-specific relevance of a PyHealth model, a drop-in for `pyhealth.interpret.methods.CheferRelevance`.

    `GradientRollout` with M_l = I + mean_h max(A_l ∘ ∂y/∂A_l, 0). Rows of R do not sum to 1.

    Args:
        model: implements PyHealth's `CheferInterpretable`.

    Raises:
        ValueError: it does not.

    Source: Chefer, Gur & Wolf 2021 (ICCV), arXiv:2103.15679, equations 5 and 6.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, "chefer")

    def get_relevance_matrix(self, **data: Any) -> Relevance:
        """`attribute`, by PyHealth's older name for it."""
        return self.attribute(**data)


class GradientCapture(MapCapture):
    """The maps of one forward pass, and the gradients of its target to them."""

    def __init__(self, model: Any, sites: Sites, method: Method, backend: str, target: Target) -> None:
        super().__init__(model, sites)
        self.method, self.backend = method, backend
        self._target = target
        self._gradients: dict[nn.Module, Tensor] = {}

    def run(self, data: Any) -> None:
        """Run the model forward, its own hooks off, and backward as far as the maps."""
        with torch.inference_mode(False), torch.enable_grad():
            logits = self.forward(usable(data))["logit"]
            self.shapes()
            self._gradients = _gradients_of(self._target(logits), self._maps)
        self._maps = {site: attention.detach() for site, attention in self._maps.items()}

    def keep(self, module: nn.Module, args: tuple[Any, ...], mixed: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a map in its graph; one that depends on nothing that takes gradients becomes a leaf."""
        if not attention.requires_grad:
            mixed = attention.requires_grad_() @ args[2]
        self._maps[module] = attention
        return mixed, attention

    def rollout(self, key: str, rows: Tensor | None) -> Tensor:
        """Rows [B, S] of the relevance of a feature key, or all of it [B, S, S]; what was recorded is dropped here."""
        maps, gradients = self.take(key), [self._gradients.pop(site) for site in self.sites[key]]
        return chain(maps, gradients, rows, self.method, self.backend)


class FusedGradientCapture(FusedCapture):
    """Queries, keys and values of one forward pass, and the gradients of its target to the output of each attention.

    Its `run` raises CannotFuseError as that of `FusedCapture`.
    """

    def __init__(self, model: Any, sites: Sites, method: Method, backend: str, target: Target) -> None:
        super().__init__(model, sites, method, backend)
        self._target = target
        self._outputs: dict[nn.Module, Tensor] = {}
        self._gradients: dict[nn.Module, Tensor] = {}

    def run(self, data: Any) -> None:
        """Run the model forward, its own hooks off, and backward as far as the lowest attention."""
        with torch.inference_mode(False), torch.enable_grad():
            logits = self.forward(usable(data))["logit"]
            self.shapes()
            self._gradients = _gradients_of(self._target(logits), self._outputs)
        self._outputs.clear()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mixed, no_map = super().attend(module, query, key, value, mask)
        self._attended[self.key_of[module]].values.append(value.detach())
        if module is self.sites[self.key_of[module]][0]:  # nothing is asked of what lies below
            mixed = mixed.detach()
        if not mixed.requires_grad:
            mixed.requires_grad_()
        self._outputs[module] = mixed
        return mixed, no_map

    def _measured(self, key: str, attended: Attended) -> dict[str, Any]:
        gradients = [self._gradients.pop(site) for site in self.sites[key]]
        return {"values": attended.values, "output_gradients": gradients}


def _gradients_of(target: Tensor, recorded: dict[nn.Module, Tensor]) -> dict[nn.Module, Tensor]:
    gradients = torch.autograd.grad(target, list(recorded.values()), materialize_grads=True)
    return dict(zip(recorded, gradients, strict=True))


def chain(maps: list[Tensor], gradients: list[Tensor], rows: Tensor | None, method: Method, backend: str) -> Tensor:
    """Rows [B, S] of the relevance, or all of it [B, S, S]; a NaN stays in its sample."""
    return attention_rollout(maps, query=rows, gradients=gradients, method=method, backend=backend, validate=False)
