"""`rollout doctor`: what this machine computes with and whether it is right, and what a capture makes of a model."""

from rollout.doctor.machine import lines
from rollout.doctor.model import examine

__all__ = ["examine", "lines"]
