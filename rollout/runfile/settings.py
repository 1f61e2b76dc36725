"""The settings of a cohort run, as a run file or the command line gives them: checked before anything is read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rollout.data.classes import did_you_mean
from rollout.method import METHODS
from rollout_kernels._dispatch import BACKENDS

COUNTS = ("batch_tokens", "batch_samples", "part_samples", "workers")
WORDS = {
    "method": tuple(name for name, method in METHODS.items() if not method.matrices),
    "readout": ("model", "forward"),
    "backend": tuple(BACKENDS),
}
SETTINGS = ("method", "batch_tokens", "batch_samples", "part_samples", "device", "workers", "readout", "backend",
            "target_class", "equal_lengths")  # fmt: skip


def check_settings(settings: Mapping[str, Any], named: Callable[[str], str]) -> None:
    """Refuse values that ``attribute_cohort`` would refuse after the samples are prepared.

    Args:
        settings: By the names of ``attribute_cohort``.
        named: What to call a setting in an error.

    Raises:
        ValueError: naming the setting, what it may be and what was given.
    """
    for key, value in settings.items():
        if key in COUNTS or key == "target_class":
            least = 0 if key == "target_class" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{named(key)} must be a whole number of at least {least}, got {value!r}")
        elif key == "equal_lengths":
            if not isinstance(value, bool):
                raise ValueError(f"{named(key)} must be true or false, got {value!r}")
        elif key == "device":
            check_device(value, named(key))
        elif value not in WORDS[key]:
            raise ValueError(
                f"{named(key)} must be one of {', '.join(WORDS[key])}, got {value!r}{did_you_mean(value, WORDS[key])}"
            )
    gradients = METHODS[settings.get("method", "rollout")].gradients
    if "target_class" in settings and gradients is None:
        raise ValueError(
            f"{named('target_class')} is for class-specific methods, "
            f"{', '.join(name for name in WORDS['method'] if METHODS[name].gradients is not None)}; "
            f"got the method {settings.get('method', 'rollout')}"
        )
    if gradients is not None and settings.get("readout", "model") != "model":
        raise ValueError(f"{named('readout')} must be model for a class-specific method, got {settings['readout']!r}")


def check_device(device: Any, name: str) -> str:
    """Return a device as torch writes it.

    Raises:
        ValueError: If torch has no such device, or sees no GPU for it.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} must be a torch device such as cpu or cuda, got {device!r}") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name} {device!r} asked for, but torch sees no CUDA device; use cpu")
    return str(wanted)
