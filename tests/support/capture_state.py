"""What a model is before and after a capture: every attribute, hook, flag, config and gradient."""

from typing import Any

from torch import nn

from rollout._capture import patch, recording


def state(model: nn.Module) -> dict[str, Any]:
    """A picture of the model that differs when anything was left on it."""
    picture: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, dict):
                picture[f"{path}:{name}"] = {key: id(held) for key, held in value.items()}
            else:
                picture[f"{path}:{name}"] = (
                    type(value),
                    id(value) if not isinstance(value, bool | int | float | str) else value,
                )
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            picture[f"{path}:implementation"] = config._attn_implementation
            picture[f"{path}:config"] = repr(sorted(config.to_dict().items(), key=repr))
    for name, parameter in model.named_parameters():
        picture[f"{name}:grad"] = parameter.grad is None, parameter.requires_grad
    return picture


def assert_nothing_left(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is as in the picture, and no capture is open anywhere."""
    after = state(model)
    assert {k: v for k, v in after.items() if before.get(k) != v} == {}
    assert after == before
    assert not patch._patches
    assert recording._recordings.get() == ()
