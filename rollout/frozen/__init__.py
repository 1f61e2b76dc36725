"""Gradient × input with attention weights and norm statistics frozen: signed, class-specific, one backward pass."""

from rollout.frozen.gradient import frozen_gradient

__all__ = ["frozen_gradient"]
