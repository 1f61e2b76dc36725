"""What each operation of torch does to relevance, by its name; what is in no table is not known, and refused."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Linear in all tensors that depend on the embedding taken together, up to constants; or positively homogeneous.
LINEAR = frozenset(
    """
    add __add__ __radd__ __iadd__ add_ sub __sub__ __rsub__ __isub__ sub_ rsub subtract neg __neg__ negative
    sum mean cumsum view reshape transpose transpose_ permute t contiguous expand
    broadcast_to repeat repeat_interleave tile cat concat concatenate stack hstack vstack split chunk unbind
    tensor_split split_with_sizes unsafe_split unsafe_chunk __iter__ select narrow index_select gather take_along_dim
    __getitem__ __setitem__ index_copy index_copy_ index_put index_put_ masked_select masked_scatter squeeze unsqueeze
    flatten unflatten movedim moveaxis swapaxes swapdims masked_fill masked_fill_ where clone to type float
    double half bfloat16 cpu cuda pad roll flip dropout alpha_dropout feature_dropout linear conv1d conv2d conv3d
    adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d unfold tril triu diagonal __get__ copy_ requires_grad_
    _pad rearrange identity atleast_1d atleast_2d view_as_real view_as_complex
    relu relu_ leaky_relu max amax min amin abs max_pool1d max_pool2d batch_norm
    """.split()  # noqa: SIM905
)
# Linear where one factor alone depends on the embedding.
PRODUCTS = frozenset(
    """
    mul __mul__ __rmul__ __imul__ mul_ multiply matmul __matmul__ __rmatmul__ bmm mm einsum baddbmm addmm addbmm
    tensordot inner
    """.split()  # noqa: SIM905
)
QUOTIENTS = frozenset(["div", "__truediv__", "__itruediv__", "div_", "true_divide", "divide"])
# Their value scales a signal, and is held.
WEIGHTS = frozenset(["softmax", "sigmoid", "hardsigmoid"])
STATISTICS = frozenset(["rsqrt", "sqrt", "std", "norm", "vector_norm", "linalg_vector_norm"])
# Elementwise with f(0) = 0: y = x · (f(x)/x), the quotient held.
ACTIVATIONS = frozenset(["gelu", "silu", "silu_", "tanh", "elu", "selu", "celu", "mish", "hardswish", "softsign"])
QUESTIONS = frozenset(["size", "dim", "stride", "numel", "is_floating_point", "is_complex", "element_size", "__len__",
                       "__format__", "__repr__", "is_contiguous", "data_ptr", "is_inference"])  # fmt: skip
ATTRIBUTES = frozenset(["__set__", "__delete__", "requires_grad_"])
SHAPED_AS = frozenset(["view_as", "reshape_as", "expand_as", "type_as"])  # of a second tensor no number is read
NEW = frozenset(["new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like", "full_like",
                 "empty_like", "rand_like", "randn_like"])  # fmt: skip
POWERS = frozenset(["pow", "__pow__"])


def activate(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x · (f(x)/x) with the quotient held, f'(0) where x is 0: relevance passes an activation whole.

    Source: Bach et al. 2015, doi:10.1371/journal.pone.0130140: a neuron's relevance is that of its pre-activation.
    """
    held = x.detach()
    with torch.no_grad():
        quotient = function(held.clone(), *args, **kwargs) / held
    if bool((held == 0).any()):
        zero = held.new_zeros(1).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(function(zero.clone(), *args, **kwargs), zero)
        quotient = torch.where(held == 0, slope, quotient)
    return x * quotient


def layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm whose standard deviation is held; the mean is linear (Ali et al. 2022, arXiv:2202.07304)."""
    axes = tuple(range(-len(shape), 0))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    centred = wide - wide.mean(axes, keepdim=True)
    scaled = centred * (centred.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    return _affine(scaled.to(x.dtype), weight, bias)


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """RMSNorm whose root mean square is held."""
    axes = tuple(range(-len(shape), 0))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    scaled = wide * (wide.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    return _affine(scaled.to(x.dtype), weight, None)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    """x over its norm, the norm held."""
    return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """The gate is held: a weight of the other half, as an attention is (Arras et al. 2017, arXiv:1706.07206)."""
    signal, gate = x.chunk(2, dim)
    return signal * gate.detach().sigmoid()


REPLACED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.layer_norm: layer_norm,
    torch.layer_norm: lambda x, shape, weight=None, bias=None, eps=1e-5, *_: layer_norm(x, shape, weight, bias, eps),
    functional.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    functional.normalize: normalize,
    functional.glu: glu,
}
"""Operations done otherwise: the same values, other derivatives. Linear in their first argument."""
