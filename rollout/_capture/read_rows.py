"""Which positions the head of a sequence classifier reads, found out by asking it.

Of what the model computes for each position, the logits (or what else it gives of all of them) take in some and not
others. The gradient says which: it is
exactly 0 at a position that is not read, and the same at all where their mean is. It is taken at the last module that
still gives a state per position, so that what comes after it (pooling, dense layers) is the head.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rollout._capture.entry import capture

Inputs = Mapping[str, Tensor]


def logits_of(output: Any) -> Tensor:
    """The logits [B, K] of a classifier's output."""
    found: Tensor = output.logits
    return found


def positions_read(model: nn.Module, inputs: Inputs, head: Callable[[Any], Tensor] = logits_of) -> str:
    """What the logits read: `first` position, `last` one that is there, or the `mean` of those that are.

    Args:
        model: The classifier, in evaluation mode. It is left as it was.
        inputs: `input_ids` and `attention_mask` [B, S] of records of different lengths, padded on the right; what else
            the model takes.
        head: Gives, of the model's output, what is asked about, [B, K].

    Raises:
        CaptureError: The model cannot be captured exactly.
        ValueError: It has several stacks of attention layers, or reads something else.
    """
    with capture(model, shared_layers=True) as tape, torch.inference_mode():
        model(**inputs)
    if len(tape.streams) != 1:
        raise ValueError(f"the model must have one stack of attention layers, got {', '.join(tape.streams)}")
    mask, top = inputs["attention_mask"].bool(), model.get_submodule(tape.modules()[-1])
    slopes = _slopes(model, inputs, _last_with_positions(model, inputs, top), head)
    read = slopes.abs().amax(-1) > 0
    places = torch.arange(mask.shape[1])
    if torch.equal(read, (places == 0).expand_as(read)):
        return "first"
    if torch.equal(read, places == mask.sum(1, keepdim=True) - 1):
        return "last"
    means = (slopes * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
    rounding = 1e-4 if slopes.dtype in (torch.float32, torch.float64) else 3e-2
    apart = ((slopes - means) * mask[..., None]).abs().amax((1, 2)) > rounding * means.abs().amax((1, 2))
    if torch.equal(read, mask) and not bool(apart.any()):
        return "mean"
    raise ValueError(
        f"the model reads positions {read[0].nonzero().flatten().tolist()} of a record of {int(mask[0].sum())} tokens, "
        "by weights of its own: neither the first, nor the last, nor their mean; say which rows are wanted in Python: "
        "rollout attribute --entry package.module:function"
    )


def _last_with_positions(model: nn.Module, inputs: Inputs, top: nn.Module) -> nn.Module:
    """The last module, from the topmost attention on, that gives a state [B, S, E] as wide as the layers' own."""
    shape = (*inputs["input_ids"].shape, model.config.hidden_size)  # type: ignore[union-attr]
    seen: list[nn.Module] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        state = _state(output)
        if module is not model and (module is top or (state is not None and state.shape == shape)):
            seen.append(module)

    with _hooked(model.modules(), note), torch.no_grad():
        model(**inputs)
    last = seen[-1] if seen else top
    if last is top or top not in seen:
        raise ValueError(f"no module above {type(top).__name__} gives a state per position, as layers do")
    return last


def _slopes(model: nn.Module, inputs: Inputs, module: nn.Module, head: Callable[[Any], Tensor]) -> Tensor:
    """The gradient of a combination of what the head gives by what a module gives, [B, S, E]."""
    leaves: list[Tensor] = []

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        state = _state(output)
        assert state is not None
        leaves.append(state.detach().clone().requires_grad_())
        return (leaves[-1], *output[1:]) if isinstance(output, tuple) else leaves[-1]

    with _hooked([module], replace), torch.enable_grad():
        logits = head(model(**inputs))
    weights = torch.arange(1.0, logits.numel() + 1).view_as(logits).to(logits)
    (slopes,) = torch.autograd.grad((logits * weights).sum(), leaves[-1])
    return slopes.detach()


def _state(output: Any) -> Tensor | None:
    found = output[0] if isinstance(output, tuple) and output else output
    return found if isinstance(found, Tensor) and found.dim() == 3 and found.is_floating_point() else None


@contextmanager
def _hooked(modules: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
