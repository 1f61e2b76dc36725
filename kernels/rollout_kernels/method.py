"""`Method`: how one layer's matrix M_l is formed from its attention maps.

Every rollout-like method is the same chain of matrices R = M_L · … · M_1; they differ in M_l only:

    F_l = fuse_h(A_l)                         head fusion; A_l ∘ G_l for the gradient-weighted methods
    F_l = F_l / rowsum(F_l)                   when `normalize_attention`
    M_l = residual · I + attention · F_l      residual addition
    M_l = M_l / rowsum(M_l)                   renormalisation, when `renormalize`

The value-aware methods measure what a position hands on, and what it keeps, by the vectors themselves:
f_hj = W_O^h v_hj of each key and head, and the layer's input x_i, the residual.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

HEAD_FUSIONS = ("mean", "max", "min")
GRADIENT_FORMS = ("clamp_then_fuse", "fuse_then_clamp")
VALUE_FORMS = ("norm_then_sum", "sum_then_norm")

HeadFusion = str | Tensor | Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Method:
    """How M_l is formed. Immutable; checked when made.

    Attributes:
        head_fusion: how F_l is made of the heads of A_l [B, H, S, S]: `"mean"`, `"max"`, `"min"`, a tensor of head
            weights [H] or [L, H] (normalised to sum 1), or a function `(maps [b, H, n, n], gradients or None) ->
            [b, n, n]` for a form that is none of these (torch and reference backends only). The function sees one
            sample's valid block at a time, in the accumulation dtype, and must not write to its arguments.
        residual: α, the weight of the identity.
        attention: the weight of F_l; `None` means 1 − residual.
        renormalize: divide every row of M_l by its sum.
        normalize_attention: divide every row of F_l by its sum before the residual is added, so that the two weigh what
            `residual` and `attention` say however small A∘G is; a row of F_l that sums to 0 stays. Not with `values`.
        discard_ratio: q in [0, 1). Per layer and sample, over the valid n×n block of F_l, the ⌊q·n²⌋ smallest entries
            (ties by flat index) become 0; entry [0, 0] is spared even when it is one of them.
        start_layer: layers below it (input side) are left out of the chain.
        gradients: `None`, or how G_l enters: `"clamp_then_fuse"`, F_l = fuse_h(max(A∘G, 0)), or `"fuse_then_clamp"`,
            F_l = max(fuse_h(A∘G), 0). Either one makes the `gradients=` argument mandatory.
        values: `None`, or how values and inputs enter: `"norm_then_sum"`, the norm of each head's vector on its own,
            M_l = residual·diag(‖x_i‖) + attention·F_l with F_ij = Σ_h A_hij‖f_hj‖; or `"sum_then_norm"`, the norm of
            their sum, M_ij = ‖attention·Σ_h A_hij f_hj + residual·δ_ij x_i‖. Either one makes the arguments `values=`,
            `output_weights=` and `inputs=` mandatory. Heads are added up, as W_O does: `head_fusion` stays `"mean"`.
        own_path: False leaves out of row i the share that i keeps by the one path that never attends: Π_l r_l/d_l, r
            the residual's weight at i and d the row sum that divides it, 1 without renormalisation. What is left is
            divided by its sum; a row of nothing else is 0. A weighting w over rows loses w_i times that of each row i,
            and must not be negative. Not with `"sum_then_norm"`, where the residual has no share of its own.
        matrices: True when the caller supplies the matrices themselves, [B, S, S]: maps of several heads are refused.
        paper: where the method comes from.

    Raises:
        ValueError: a field is outside its range; the message names it and what is wanted.
        TypeError: a field has the wrong type.
    """

    head_fusion: HeadFusion = "mean"
    residual: float = 0.5
    attention: float | None = None
    renormalize: bool = True
    normalize_attention: bool = False
    discard_ratio: float = 0.0
    start_layer: int = 0
    gradients: Literal["clamp_then_fuse", "fuse_then_clamp"] | None = None
    values: Literal["norm_then_sum", "sum_then_norm"] | None = None
    own_path: bool = True
    matrices: bool = False
    paper: str = ""

    def __post_init__(self) -> None:
        _check_head_fusion(self.head_fusion)
        if isinstance(self.head_fusion, Tensor):  # a copy: fetched once where it is on a GPU, and nobody's to change
            object.__setattr__(self, "head_fusion", self.head_fusion.detach().to("cpu", torch.float64, copy=True))
        for name in ("residual", "attention", "discard_ratio"):
            value = getattr(self, name)
            if name == "attention" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Method: {name} must be a real number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"Method: {name} must be finite, got {value!r}")
        if not 0.0 <= self.discard_ratio < 1.0:
            raise ValueError(f"Method: discard_ratio must be in [0, 1), got {self.discard_ratio!r}")
        if isinstance(self.start_layer, bool) or not isinstance(self.start_layer, int):
            raise TypeError(f"Method: start_layer must be an int, got {self.start_layer!r}")
        if self.start_layer < 0:
            raise ValueError(f"Method: start_layer must be 0 or more, got {self.start_layer}")
        if self.gradients is not None and self.gradients not in GRADIENT_FORMS:
            raise ValueError(f"Method: gradients must be None or one of {GRADIENT_FORMS}, got {self.gradients!r}")
        if self.values is not None:
            _check_values(self)
        for name in ("own_path", "normalize_attention"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Method: {name} must be True or False, got {getattr(self, name)!r}")

    @property
    def attention_weight(self) -> float:
        """The weight of F_l: `attention`, or 1 − residual when that is None."""
        return 1.0 - self.residual if self.attention is None else float(self.attention)

    @property
    def needs_whole_map(self) -> bool:
        """Whether one row of F_l depends on the whole map, so that the top layer is not free."""
        return self.discard_ratio > 0.0 or callable(self.head_fusion)

    def head_weights(self, layers: int, heads: int, name: str = "attention_rollout") -> Tensor | None:
        """The normalised head weights [L, H] float64 on CPU, or None when `head_fusion` is not a tensor.

        Raises:
            ValueError: the tensor is not [H] or [L, H].
        """
        if not isinstance(self.head_fusion, Tensor):
            return None
        weights = self.head_fusion / self.head_fusion.sum(-1, keepdim=True)
        if tuple(weights.shape) not in ((heads,), (layers, heads)):
            raise ValueError(
                f"{name}: head_fusion weights must be [H] = [{heads}] or [L, H] = [{layers}, {heads}], "
                f"got {list(weights.shape)}"
            )
        return weights.expand(layers, heads)


def _check_values(method: Method) -> None:
    if method.values not in VALUE_FORMS:
        raise ValueError(f"Method: values must be None or one of {VALUE_FORMS}, got {method.values!r}")
    if method.head_fusion != "mean":
        raise ValueError(
            f"Method: head_fusion must be left at 'mean' with values: W_O adds heads up, got {method.head_fusion!r}"
        )
    for name, none in (
        ("gradients", None),
        ("discard_ratio", 0.0),
        ("matrices", False),
        ("normalize_attention", False),
    ):
        if getattr(method, name) != none:
            raise ValueError(f"Method: {name} must be {none!r} with values, got {getattr(method, name)!r}")
    if method.values == "sum_then_norm" and method.attention_weight <= 0:
        raise ValueError(
            f"Method: attention must be more than 0 with values='sum_then_norm', got {method.attention_weight!r}"
        )
    if method.values == "sum_then_norm" and not method.own_path:
        raise ValueError(
            "Method: own_path must be True with values='sum_then_norm': the residual has no share of its own"
        )


def _check_head_fusion(fusion: object) -> None:
    if isinstance(fusion, str):
        if fusion not in HEAD_FUSIONS:
            raise ValueError(
                f"Method: head_fusion must be one of {HEAD_FUSIONS}, a tensor of head weights [H] or [L, H], "
                f"or a function, got {fusion!r}"
            )
    elif isinstance(fusion, Tensor):
        if fusion.dim() not in (1, 2) or fusion.numel() == 0:
            raise ValueError(f"Method: head_fusion weights must be [H] or [L, H], got {list(fusion.shape)}")
        if fusion.is_complex() or fusion.dtype == torch.bool:
            raise TypeError(f"Method: head_fusion weights must be real numbers, got {fusion.dtype}")
        sums = fusion.detach().to("cpu", torch.float64).sum(-1)
        if not bool(torch.isfinite(sums).all()):
            raise ValueError("Method: head_fusion weights must be finite")
        if bool((sums == 0).any()):
            raise ValueError("Method: head_fusion weights must not sum to 0: they are normalised to sum 1")
    elif not callable(fusion):
        raise TypeError(
            f"Method: head_fusion must be a string, a tensor of head weights or a function, got {type(fusion).__name__}"
        )
