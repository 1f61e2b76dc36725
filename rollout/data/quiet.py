"""PyHealth without its log of every step."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_pyhealth() -> Iterator[None]:
    """Leave PyHealth's warnings and progress bars, without its log of every step and of its memory."""
    logger = logging.getLogger("pyhealth")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A newer version of litdata")
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)
