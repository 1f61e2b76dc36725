"""The methods by name. A method is a `Method`: how each layer's matrix M_l is formed; the chain is the same for all.

To add one, add an entry to `METHODS` (see CONTRIBUTING.md).
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from rollout_kernels.method import Method

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "rollout": Method(
            residual=0.5,
            renormalize=True,
            paper="Abnar & Zuidema 2020, Quantifying Attention Flow in Transformers, arXiv:2005.00928, section 3",
        ),
        "pyhealth": Method(
            residual=0.5,
            renormalize=False,
            paper="Abnar & Zuidema 2020 as pyhealth.interpret.methods.AttentionRollout computes it: no renormalisation",
        ),
        "chefer_rollout": Method(
            residual=1.0,
            attention=1.0,
            renormalize=True,
            paper="The rollout baseline of Chefer, Gur & Wolf 2021 (CVPR), arXiv:2012.09838: rownorm(I + mean_h A)",
        ),
        "discard": Method(
            head_fusion="max",
            residual=0.5,
            renormalize=True,
            discard_ratio=0.9,
            paper="Gildenblat 2020, Exploring Explainability for Vision Transformers (vit-explain)",
        ),
        "grad_rollout": Method(
            residual=0.5,
            renormalize=True,
            gradients="fuse_then_clamp",
            paper="Gradient attention rollout, Gildenblat 2020 (vit-explain): rownorm(½(I + max(mean_h A∘∇A, 0)))",
        ),
        "chefer": Method(
            residual=1.0,
            attention=1.0,
            renormalize=False,
            gradients="clamp_then_fuse",
            paper="Chefer, Gur & Wolf 2021 (ICCV), arXiv:2103.15679, equations 5 and 6, self-attention: "
            "I + mean_h max(A∘∇A, 0)",
        ),
        "chefer_normalised": Method(
            residual=0.5,
            renormalize=True,
            normalize_attention=True,
            gradients="clamp_then_fuse",
            paper="chefer with its rows normalised before the residual, as grad_rollout weighs the two: "
            "½I + ½ rownorm(mean_h max(A∘∇A, 0)); a row of zeros is I's. This project's; A∘∇A as in arXiv:2103.15679",
        ),
        "value_norm": Method(
            residual=1.0,
            attention=1.0,
            values="norm_then_sum",
            paper="A linear cousin of kobayashi, head by head as Kobayashi et al. 2020, arXiv:2004.10102, take norms: "
            "rownorm(Σ_h A_hij‖W_O^h v_hj‖ + δ_ij‖x_i‖)",
        ),
        "kobayashi": Method(
            residual=1.0,
            attention=1.0,
            values="sum_then_norm",
            paper="Kobayashi et al. 2021, arXiv:2109.07152, attention and residual without layer normalisation, in the "
            "chain of GlobEnc (Modarressi et al. 2022, arXiv:2205.03286): rownorm(‖Σ_h A_hij W_O^h v_hj + δ_ij x_i‖)",
        ),
        "product": Method(
            residual=0.0,
            attention=1.0,
            renormalize=False,
            matrices=True,
            paper="The caller's own matrices (ALTI, GlobEnc, DecompX, value-norm weighting): their product only",
        ),
    }
)


def sums_to_one(method: Method) -> bool:
    """Whether every row of the chain sums to 1 when every row of the attention maps does.

    It does where each M_l is renormalised; else where the heads are averaged, nothing is discarded or weighted by a
    gradient or by values, and the weights of I and F_l add up to 1. Without its own path a row is divided by what is
    left: it sums to 1 whatever M_l is, or is 0.
    """
    if not method.own_path:
        return True
    if method.matrices or method.renormalize:
        return method.renormalize
    averaged = isinstance(method.head_fusion, Tensor) or method.head_fusion == "mean"
    whole = math.isclose(method.residual + method.attention_weight, 1.0, abs_tol=1e-6)
    return averaged and whole and method.gradients is None and method.values is None and method.discard_ratio == 0.0


def get_method(method: str | Method, name: str = "attention_rollout") -> Method:
    """The `Method` for a name in `METHODS`; a `Method` is passed through.

    Raises:
        ValueError: no such name; the message lists the names.
        TypeError: neither a string nor a `Method`.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"{name}: method must be a name in rollout.METHODS or a rollout.Method, got {method!r}")
    if method not in METHODS:
        raise ValueError(f"{name}: method must be one of {sorted(METHODS)} or a rollout.Method, got {method!r}")
    return METHODS[method]
