"""`rollout.frozen_gradient`: one forward pass with what weights signals held, one backward pass to the embedding."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rollout._capture.patch import Around, around_call, around_forward
from rollout._capture.refusals import refuse_dropout, refuse_opaque
from rollout.errors import CaptureError
from rollout.frozen.mode import Frozen

__all__ = ["frozen_gradient", "run_frozen"]

Target = Callable[[Any], Tensor]
Leaves = dict[Any, Tensor]
Names = frozenset[str] | None
LOGITS = ("logits", "logit")


def frozen_gradient(
    model: nn.Module, inputs: Any, target: int | Target | None = None, at: str | None = None
) -> Tensor | dict[str, Tensor]:
    """The signed relevance of every input position for a logit: gradient × embedding with what weights signals held.

    Attention weights, the statistics of LayerNorm and RMSNorm, and gates are constants, an activation is its input
    times a constant: what is left of the model is linear in the embedding, and the relevance of all positions, and of
    the constants in it (biases, positions), sums to the logit. Fused attention stays on, no map is made.

    The model's outputs, parameters and `.grad` stay as they are, and nothing is left on it. Works also where the
    parameters are frozen, and under `torch.no_grad()` and `torch.inference_mode()`.

    Args:
        model: in eval mode; its operations must be known to be linear once these are held, else it is refused.
        inputs: what the model is called with: a mapping of keyword arguments, a tuple, or one tensor.
        target: the class whose logit is explained; None is the one predicted, per sample; or a function of the model's
            output that gives a number a sample [B], or the sum of these. Without one the output must be the logits
            [B, C], or hold them as `logits` or `logit`; a single logit has no choice.
        at: the path of the module whose output is the embedding [B, S, E], or a dict of them. None: the input
            embeddings of a Hugging Face model, the patches of a timm model, `embedding_model` of a PyHealth model, else
            the first input, a floating tensor [B, S, E].

    Returns:
        Signed scores [B, S], in the embedding's dtype, or a dict of them where the embedding is one.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: there is no such module, class, logit or embedding.
        rollout.CaptureError: dropout is on; the model does with the embedding what is not known to be linear.

    Source: Ali et al. 2022 (ICML), arXiv:2202.07304, equations 5 to 8 (LRP-AH and LN); gates as in Arras et al. 2017,
        arXiv:1706.07206; activations by LRP's rule, Bach et al. 2015, doi:10.1371/journal.pone.0130140.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"frozen_gradient: model must be a torch.nn.Module, got {type(model).__name__}")
    path = _embedding(model) if at is None else at
    if path is not None and path not in dict(model.named_modules()):
        raise ValueError(f"frozen_gradient: at must be the path of a module of the model, got {at!r}")
    chosen: Target = partial(_logit, target) if target is None or isinstance(target, int) else target
    relevance = run_frozen(model, lambda: _call(model, inputs), chosen, path)[0]
    return relevance[None] if set(relevance) == {None} else relevance


def run_frozen(
    model: nn.Module,
    call: Callable[[], Any],
    target: Target,
    path: str | None,
    around: dict[nn.Module, Around] | None = None,
    names: Names = None,
) -> tuple[dict[Any, Tensor], Any]:
    """Scores by the name of the embedding (None: there is but one), and what `call`, which runs the model, gave.

    Args:
        path: of the module whose output is the embedding; None: the first input of the model is.
        around: further stand-ins for forwards.
        names: of an embedding that is a dict, those wanted; None: every floating tensor in it.
    """
    refuse_opaque(model, "frozen_gradient")
    refuse_dropout(model, "frozen_gradient")
    mode, leaves = Frozen(model), Leaves()
    site = model if path is None else model.get_submodule(path)
    taken: Around = partial(_take_input, mode, leaves) if path is None else partial(_take_output, mode, leaves, names)
    named: dict[nn.Module, Around] = {m: partial(_within, mode, _name(name, m)) for name, m in model.named_modules()}
    acting: dict[nn.Module, Around] = {
        m: partial(_activate, mode) for m in model.modules() if type(m).__module__ == "transformers.activations"
    }
    with (
        torch.inference_mode(False), torch.enable_grad(),
        around_call({site: taken}), around_call(named), around_forward(acting | (around or {})),
    ):  # fmt: skip
        with mode:
            output = call()
            if not leaves:
                raise ValueError(
                    f"frozen_gradient: the model must run {path or 'with its first input a tensor'}, it did not"
                )
            wanted = target(output)
            mode.check(wanted)
            total = wanted.sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    with torch.inference_mode(False):
        pairs = zip(leaves.items(), gradients, strict=True)
        return {name: (leaf.detach() * gradient).sum(-1) for (name, leaf), gradient in pairs}, output


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**{name: _usable(value) for name, value in inputs.items()})
    return model(*map(_usable, inputs if isinstance(inputs, tuple | list) else (inputs,)))


def _usable(value: Any) -> Any:
    """A tensor made under inference mode cannot enter autograd, its copy can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _name(path: str, module: nn.Module) -> str:
    return f"{path or 'the root'} ({type(module).__name__})"


def _embedding(model: nn.Module) -> str | None:
    """The path of the module that makes the embedding, None where the first input is one."""
    paths = {module: path for path, module in model.named_modules()}
    found: Any = getattr(model, "embedding_model", None)
    if found is None:
        found = getattr(model, "get_input_embeddings", lambda: None)()
    if found is None:
        found = getattr(model, "patch_embed", None)
    return paths.get(found) if isinstance(found, nn.Module) else None


def _logit(index: int | None, output: Any) -> Tensor:
    """The logit of a class, of each sample [B]."""
    logits = output
    for name in LOGITS:
        if isinstance(logits, Mapping):
            logits = logits.get(name, logits)
        elif not isinstance(logits, Tensor):
            logits = getattr(logits, name, logits)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            f"frozen_gradient: the output must be logits [B, C] or hold them as logits or logit, got "
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__}; give target as a function"
        )
    classes = logits.shape[1]
    if index is not None and not 0 <= index < max(classes, 2):
        raise ValueError(f"frozen_gradient: target must be a class below {max(classes, 2)}, got {index}")
    if classes == 1:
        return logits[:, 0]
    chosen = logits.detach().argmax(1) if index is None else torch.full((len(logits),), index, device=logits.device)
    return logits.gather(1, chosen[:, None])[:, 0]


def _begin(mode: Frozen, leaves: Leaves, name: Any, value: Any) -> Tensor:
    """The embedding as a leaf that the gradient is taken to."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"frozen_gradient: the embedding must be a floating tensor [B, …, E], got {got}: give at=")
    if name in leaves:
        raise CaptureError("frozen_gradient: the embedding must be made once in a pass, its module ran twice: give at=")
    with torch._C.DisableTorchFunction():
        leaf = leaves[name] = value.detach().clone().requires_grad_()
        mode.begin(leaf)
    return leaf


def _take_output(
    mode: Frozen, leaves: Leaves, names: Names, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    output = call(*args, **kwargs)
    if not mode.here:
        return output
    if isinstance(output, tuple) and output:  # with masks
        return (_take(mode, leaves, names, output[0]), *output[1:])
    return _take(mode, leaves, names, output)


def _take(mode: Frozen, leaves: Leaves, names: Names, made: Any) -> Any:
    if not isinstance(made, Mapping):
        return _begin(mode, leaves, None, made)
    wanted = names or [k for k, value in made.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return {name: _begin(mode, leaves, name, value) if name in wanted else value for name, value in made.items()}


def _take_input(
    mode: Frozen, leaves: Leaves, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if mode.here and args and isinstance(args[0], Tensor):
        args = (_begin(mode, leaves, None, args[0]), *args[1:])
    return call(*args, **kwargs)


def _within(mode: Frozen, name: str, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not mode.here:
        return call(*args, **kwargs)
    mode.names.append(name)
    try:
        return call(*args, **kwargs)
    finally:
        mode.names.pop()


def _activate(mode: Frozen, module: nn.Module, call: Callable[..., Any], *args: Any) -> Any:
    """An activation that is made of several operations is one."""
    return mode.activate(call, *args) if mode.here else call(*args)
