"""How `rollout.capture` works: recording, what it refuses, and an adapter for each family of attention modules."""

from rollout._capture.entry import capture
from rollout._capture.readers import register_capture

__all__ = ["capture", "register_capture"]
