"""Attention-rollout kernels: the oracle, the CPU path, the GPU kernels, and the operations over them."""

from rollout_kernels import operators
from rollout_kernels._dispatch import BackendError
from rollout_kernels.method import Method
from rollout_kernels.ops import attention_rollout, attention_rollout_qk

__all__ = ["BackendError", "Method", "attention_rollout", "attention_rollout_qk", "operators"]
