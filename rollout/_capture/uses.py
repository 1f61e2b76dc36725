"""What one call of a torch function does to a tensor among its arguments, where that is one of a few plain things."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rollout._capture.shadow import _has_storage

__all__ = ["Use"]

SAME = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach"}
SAME |= {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"}
TURNED = {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"}
ADD, TIMES = {"add", "iadd", "radd"}, {"mul", "multiply", "imul", "rmul"}
OVER = {"div", "divide", "true_divide", "truediv", "itruediv"}


@dataclass(frozen=True)
class Use:
    """A function that is about to run.

    Attributes:
        name: without the marks of an operator or of what happens in place.
        args, kwargs: what it is called with.
        given: the tensors among them.
        changed: those of them that it writes.
    """

    name: str
    args: Any
    kwargs: Any
    given: list[Tensor]
    changed: list[Tensor]

    @property
    def keeps(self) -> bool:
        """Whether it gives the numbers of its first tensor, in whatever shape, in the order they are in."""
        if self.name in DROPOUTS:
            named = dict(zip(("input", "p", "training"), self.args, strict=False)) | self.kwargs
            return not named.get("training", named.get("train", True)) or named.get("p", 0.5) == 0
        return self.name in SAME and bool(self.given)

    @property
    def scales(self) -> bool:
        """Whether it gives the numbers of its first tensor, all times one number."""
        if not self.args or not isinstance(self.args[0], Tensor) or self.args[0].numel() == 1:
            return False
        factor = self.factor(self.args[0], 1)
        return factor is not None and (not isinstance(factor, Tensor) or factor.numel() == 1)

    @property
    def turns(self) -> bool:
        """Whether it gives the numbers of its first tensor, in another order of its dimensions."""
        return self.name in TURNED

    @property
    def swaps_rows(self) -> bool:
        """Whether it changes the first two dimensions of three with each other."""
        if not self.args or self.args[0].dim() != 3 or self.kwargs:
            return False
        dims = self.args[1:]
        if self.name == "permute":
            dims = dims[0] if len(dims) == 1 else dims
            return [dim % 3 for dim in dims] == [1, 0, 2]
        return len(dims) == 2 and all(isinstance(dim, int) for dim in dims) and {dim % 3 for dim in dims} == {0, 1}

    def beside(self, tensor: Tensor) -> Any:
        """The one other operand; None when there is none, or something modifies the operation."""
        options = {name: value for name, value in self.kwargs.items() if (name, value) != ("alpha", 1)}
        others = [value for value in self.args if value is not tensor]
        return others[0] if len(self.args) == 2 and len(others) == 1 and not options else None

    def factor(self, tensor: Tensor, width: int) -> Any:
        """What it multiplies a tensor by: a number, or a tensor of one number or of one for each of the last dimension.

        None when it does another thing.
        """
        if self.name not in TIMES and not (self.name in OVER and self.args and self.args[0] is tensor):
            return None
        other = self.beside(tensor)
        if isinstance(other, Tensor):
            if other.numel() != 1 and (other.numel() != width or other.shape[-1] != width):
                return None
        elif isinstance(other, bool) or not isinstance(other, int | float) or other == 0:
            return None
        return 1.0 / other if self.name in OVER else other

    def map(self, tensor: Tensor) -> tuple[Tensor, Any] | None:
        """The matrix [in, out] that a tensor's last dimension is mapped by, and what is added; None when none is."""
        if self.name == "linear":
            named = dict(zip(("input", "weight", "bias"), self.args, strict=False)) | self.kwargs
            first, matrix, bias = named.get("input"), named.get("weight"), named.get("bias")
            matrix = matrix.mT if isinstance(matrix, Tensor) and matrix.dim() == 2 else None
        elif self.name == "addmm" and not self.kwargs and len(self.args) == 3:
            bias, first, matrix = self.args
        elif self.name in ("matmul", "mm") and not self.kwargs and len(self.args) == 2:
            (first, matrix), bias = self.args, None
        else:
            return None
        fits = first is tensor and isinstance(matrix, Tensor) and matrix.dim() == 2
        return (matrix.detach(), bias) if fits and _has_storage(matrix) else None
