"""The settings of a cohort run, each checked in one place: for `attribute_cohort`, run files and the command line."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rollout.data.classes import did_you_mean
from rollout.method import METHODS
from rollout_kernels import Method
from rollout_kernels._dispatch import BACKENDS

FROZEN = "frozen_gradient"
"""The method of a cohort run that is no chain: `rollout.pyhealth.FrozenGradient`."""
OWN_PATH_OFF = ":own_path=false"
"""After the name of a method: without the share that the position read keeps by the path that never attends
(`Method(own_path=False)`)."""
READOUTS = ("model", "forward")
COUNTS = {
    "batch_tokens": (1, 2**24), "batch_samples": (1, 2**16), "part_samples": (1, 2**20), "workers": (1, 512),
    "target_class": (0, 2**20), "query": (-(2**20), 2**20), "seed": (0, 2**32 - 1), "leave_one_out": (0, 4096),
}  # fmt: skip
"""Whole numbers: the least and the most. Past the most it is a slip of the pen, or no machine has the memory."""
WORDS = {
    "method": (*(name for name, method in METHODS.items() if not method.matrices), FROZEN),
    "readout": READOUTS,
    "backend": tuple(BACKENDS),
}
SETTINGS = ("method", "batch_tokens", "batch_samples", "part_samples", "device", "workers", "readout", "backend",
            "target_class", "query", "equal_lengths")  # fmt: skip


def check_settings(settings: Mapping[str, Any], named: Callable[[str], str]) -> None:
    """Refuse values that no run can have, before anything is read.

    Args:
        settings: By the names of `attribute_cohort`; those that are not among them have their defaults.
        named: What to call a setting in an error.

    Raises:
        ValueError, TypeError: naming the setting, what it may be and what was given.
    """
    for key, value in settings.items():
        if key in COUNTS:
            check_count(key, value, named(key))
        elif key == "equal_lengths":
            check_flag(key, value, named(key))
        elif key == "device":
            check_device(value, named(key))
        else:
            check_word(key, value, named(key))
    method = METHODS.get(str(settings.get("method", "rollout")).removesuffix(OWN_PATH_OFF))
    check_class(method, settings.get("target_class"), settings.get("readout", "model"), named)


def check_count(key: str, value: Any, name: str) -> None:
    """Check a whole number that `COUNTS` bounds.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is out of range.
    """
    least, most = COUNTS[key]
    message = f"{name} must be a whole number from {least} to {most:,}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message)
    if not least <= value <= most:
        raise ValueError(message)


def check_word(key: str, value: Any, name: str) -> None:
    """Check a name that `WORDS` lists.

    Raises:
        ValueError: If it is none of them.
    """
    given = value.removesuffix(OWN_PATH_OFF) if key == "method" and isinstance(value, str) else value
    if given not in WORDS[key] or (given == FROZEN and value != FROZEN):
        raise ValueError(
            f"{name} must be one of {', '.join(WORDS[key])}, got {value!r}{did_you_mean(value, WORDS[key])}"
        )


def check_flag(key: str, value: Any, name: str) -> None:
    """Check what is on or off.

    Raises:
        TypeError: If it is neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def class_specific(method: Method | None) -> bool:
    """Whether a method, None for `FROZEN`, explains one class."""
    return method is None or method.gradients is not None


def check_class(method: Method | None, target_class: int | None, readout: str, named: Callable[[str], str]) -> None:
    """Refuse a class for a method that has none, and the readout that a class-specific one does not have.

    Raises:
        ValueError: naming the setting.
    """
    if target_class is not None and not class_specific(method):
        specific = ", ".join(name for name in WORDS["method"] if class_specific(METHODS.get(name)))
        raise ValueError(
            f"{named('target_class')} is for class-specific methods, {specific}; got a method that gives every class "
            "the same relevance"
        )
    if class_specific(method) and readout != "model":
        raise ValueError(f"{named('readout')} must be model for a class-specific method, got {readout!r}")


def check_device(device: Any, name: str, *, here: bool = True) -> torch.device:
    """Return a device of torch.

    Args:
        device: A name or a `torch.device`.
        name: What to call it in an error.
        here: Whether it must be on this machine.

    Raises:
        ValueError: If torch has no such device, or does not see it on this machine.
    """
    try:
        wanted = (
            device if isinstance(device, torch.device) else torch.device(device) if isinstance(device, str) else None
        )
    except RuntimeError:
        wanted = None
    if wanted is None:
        raise ValueError(f"{name} must be a torch device such as cpu or cuda, got {device!r}")
    if not here or (wanted.type == "cpu" and not wanted.index):
        return wanted
    seen = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if seen is None or seen.type != wanted.type or (wanted.index or 0) >= torch.accelerator.device_count():
        there = "no GPU" if seen is None else f"{torch.accelerator.device_count()} of type {seen.type}"
        raise ValueError(f"{name} {str(device)!r} asked for, but torch sees {there} on this machine; use cpu")
    return wanted
