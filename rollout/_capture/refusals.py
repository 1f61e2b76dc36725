"""Models that cannot be recorded whatever their attention is, refused before they run."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from rollout._capture.patch import is_compiled
from rollout.errors import CaptureError

ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
# What attributes that hold an attention, or what stands in its place, are called.
MIXER = re.compile(r"att(entio)?n|mixer|xca|mh[cs]?a", re.IGNORECASE)


def refuse_dropout(model: nn.Module, caller: str = "capture") -> None:
    """Attention that drops out is not the softmax that rollout computes from.

    Raises:
        CaptureError: a module with dropout is in training mode.
    """
    for path, module in model.named_modules():
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
        if module.training and isinstance(rate, float) and rate > 0.0:
            raise CaptureError(
                f"{caller}: the model must be in eval mode, got dropout {rate} on in {type(module).__name__} at "
                f"{path or 'the root'}: call model.eval()"
            )


def refuse_opaque(model: nn.Module, caller: str = "capture") -> None:
    """Modules whose Python code does not run cannot be watched.

    Raises:
        CaptureError: the model, or a part of it, is compiled, scripted or run in copies.
    """
    for path, module in model.named_modules():
        kind, where = type(module).__name__, path or "the root"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{caller}: the model must run as Python, got {kind} at {where}: take the unscripted one"
            )
        if is_compiled(module) or isinstance(getattr(module, "_orig_mod", None), nn.Module):
            raise CaptureError(
                f"{caller}: the model must not be compiled, got {kind} at {where}: take the module given to "
                f"torch.compile (its _orig_mod)"
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise CaptureError(
                f"{caller}: the model must run itself, got {kind} at {where}, which runs copies of it in threads: "
                f"take and call its .module"
            )


def nothing_found(model: nn.Module, left_out: Sequence[str]) -> str:
    """Why a model cannot be captured at all: what was left out, or what it has that looks like attention."""
    if left_out:
        return (
            f"capture: the model must attend over a sequence of its own, in the call of {type(model).__name__} every "
            f"attention was left out, as over another sequence or by the function registered for it: "
            f"{_listed(left_out)}"
        )
    named = [
        f"{path} ({type(module).__name__})"
        for path, module in model.named_modules()
        if ATTENTION.search(type(module).__name__)
    ]
    found = (
        f"attention-like modules found: {_listed(named)}" if named else "no module with attention in its name was found"
    )
    return (
        f"capture: the model must have softmax attention that torch computes, in the call of {type(model).__name__} "
        f"none was seen: {found}. Known are scaled_dot_product_attention, attention written out as softmax(QKᵀ)·V, and "
        f"torch.nn.MultiheadAttention; teach it another with rollout.register_capture(module_type, function). "
        f"Recurrence, state spaces, convolution and weights that pool positions are no self-attention: rollout does "
        f"not apply to them"
    )


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
