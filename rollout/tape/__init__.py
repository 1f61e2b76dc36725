"""What `rollout.capture` keeps of a forward pass, and rollout from it."""

from rollout.tape.record import Record
from rollout.tape.tape import Tape

__all__ = ["Record", "Tape"]
