"""The settings of a cohort run, as a run file or the command line gives them: checked before anything is read."""

from collections.abc import Callable, Mapping
from typing import Any

from rollout.cohort import settings as cohort
from rollout.cohort.settings import SETTINGS

__all__ = ["SETTINGS", "check_device", "check_settings"]


def check_settings(settings: Mapping[str, Any], named: Callable[[str], str]) -> None:
    """Refuse values that `attribute_cohort` would refuse after the samples are prepared.

    Args:
        settings: By the names of `attribute_cohort`.
        named: What to call a setting in an error.

    Raises:
        ValueError: naming the setting, what it may be and what was given.
    """
    try:
        cohort.check_settings(settings, named)
    except TypeError as error:
        raise ValueError(str(error)) from None


def check_device(device: Any, name: str) -> str:
    """Return a device as torch writes it.

    Raises:
        ValueError: If torch has no such device, or does not see it on this machine.
    """
    return str(cohort.check_device(device, name))
